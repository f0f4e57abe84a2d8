"""The tables of `entropy.py`'s and `regularity.py`'s results, from ``results/entropy.json`` and ``regularity.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from table_parts import NOT_RUN, load, markdown

from folklora.report.tables import human_seconds


def _range(values: Mapping[str, float], show: Callable[[float], str]) -> str:
    median, low, high = (show(values[key]) for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} to {high})"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else human_seconds(seconds)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}"


def speed() -> str:
    """Approximate entropy beside antropy's, by content and length."""
    document = load("entropy")
    if not document:
        return NOT_RUN
    lines = []
    for cell in document["against_antropy"]:
        seconds = [_seconds(cell[arm]["median"]) for arm in ("ours_seconds", "antropy_seconds")]
        lines.append([cell["content"], f"{cell['tokens']:,}", *seconds, _range(cell["times_faster"], _times)])
    gap = max(cell["largest_gap"] for cell in document["against_antropy"])
    note = (
        f"m = {document['order']}; processor seconds of one core, median, and the range of the ratios; a million "
        f"tokens were done once. The values differ by {gap:.0e} at most."
    )
    return markdown(["content", "tokens", "here", "antropy", "times faster"], lines) + "\n" + note + "\n"


def measures() -> str:
    """All measures at a million tokens."""
    document = load("entropy")
    if not document:
        return NOT_RUN
    rows = document["measures"]
    contents = list(dict.fromkeys(row["content"] for row in rows))
    found = {(row["measure"], row["content"]): row for row in rows}
    lines = [
        [measure, *(_seconds(found[measure, content]["seconds"]["median"]) for content in contents)]
        for measure in dict.fromkeys(row["measure"] for row in rows)
    ]
    slowest = max(row["wall_seconds"]["max"] for row in rows if row["measure"] == "approximate entropy")
    copies = document["copies"]
    note = (
        f"Processor seconds of one core, median. On the wall, approximate entropy took {_seconds(slowest)} at most, "
        f"with others at work on the machine. Of {copies['texts']:,} texts, {copies['copied']:,} of them another with "
        f"a word more: exact copies in {_seconds(copies['exact_seconds']['median'])}, near ones in "
        f"{_seconds(copies['near_seconds']['median'])} ({copies['near_found']:,} found at 0.8)."
    )
    return markdown(["a million tokens", *contents], lines) + "\n" + note + "\n"


def noise() -> str:
    """How regularity sees texts whose words are drawn at random, by words of a client."""
    document = load("regularity")
    if not document:
        return NOT_RUN
    rows = document["noise"]
    shares = sorted({row["share"] for row in rows} - {0.0})
    lines = []
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        for words in dict.fromkeys(row["words"] for row in rows):
            found = {row["share"]: row for row in rows if (row["corpus"], row["words"]) == (corpus, words)}
            cells = [f"{found[share]['auc']:.2f}, {round(100 * found[share]['order_left'])} %" for share in shares]
            clean = f"{found[0.0]['mean']:.2f} ± {found[0.0]['sd']:.2f}"
            lines.append([corpus, f"{words:,}", f"{found[0.0]['texts']:.0f}", clean, *cells])
    header = ["corpus", "words", "texts", "clean", *(f"{100 * share:.0f} % noise" for share in shares)]
    note = (
        f"Regularity of clean data, mean and standard deviation over {document['draws']} draws; then for each share of "
        "noisy texts how well regularity tells such data from clean ones (AUC), and how much of the order, "
        "1 - regularity, is left. The squares of the shares of clean texts are "
        + ", ".join(f"{100 * (1 - share) ** 2:.0f} %" for share in shares)
        + "."
    )
    return markdown(header, lines) + "\n" + note + "\n"


def lengths() -> str:
    """Regularity of the same sort of data at growing lengths."""
    document = load("regularity")
    if not document:
        return NOT_RUN
    rows = document["lengths"]
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == name]
        true = own[0]["true"]
        cells = [_range(row["regularity"], lambda value: f"{value:.2f}") for row in own]
        lines.append([name, *cells, "" if true is None else f"{true:.2f}"])
    note = f"Median and range of {document['few']} draws."
    return markdown(["data", *(f"{n:,} tokens" for n in tokens), "true"], lines) + "\n" + note + "\n"


def rates() -> str:
    """The entropy rate over the true one."""
    document = load("regularity")
    if not document:
        return NOT_RUN
    lines = [
        [
            f"{row['symbols']} symbols, noise {row['noise']:g}",
            f"{row['tokens']:,}",
            *(_range(row[kind], lambda value: f"{value:.2f}") for kind in ("one", "pieces")),
        ]
        for row in document["rates"]
    ]
    header = ["chain", "tokens", "one sequence", f"pieces of {document['piece']}"]
    note = f"Estimate over the true rate, median and range of {document['few']} draws. Noise 1 is independent symbols."
    return markdown(header, lines) + "\n" + note + "\n"


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "entropy-speed": ("entropy", speed),
    "entropy-measures": ("entropy", measures),
    "regularity-noise": ("regularity", noise),
    "regularity-lengths": ("regularity", lengths),
    "entropy-rates": ("regularity", rates),
}
"""Marker -> the results it needs, and what makes it."""
