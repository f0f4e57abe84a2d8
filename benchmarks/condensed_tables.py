"""The table of `condensed.py`'s results, from ``results/condensed.json`` alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from table_parts import Row, load, markdown, percent

from folklora.report.tables import human_bytes

NOTHING = "-"


def condensed() -> str:
    """Accuracy and bytes by variant, the lightest first; what an attack makes of it beside its control."""
    found: dict[str, list[Row]] = {}
    for row in load("condensed")["rows"]:
        found.setdefault(row["variant"], []).append(row)
    order = sorted(found, key=lambda name: _mean(found[name], "bytes_of_a_client"))
    lines = [
        [
            f"`{name}`",
            str(len(found[name])),
            *(human_bytes(_mean(found[name], f"bytes_{way}")) for way in ("up_a_round", "down_a_round", "once")),
            human_bytes(_mean(found[name], "bytes_of_a_client")),
            *(percent(row[f"accuracy_{key}"] for row in found[name]) for key in ("mean", "worst_tenth")),
            *(_leak(found[name], metric) for metric in ("hit", "single_hit", "summed_precision")),
        ]
        for name in order
    ]
    header = ["variant", "seeds", "up a round", "down", "once", "all of a client", "accuracy", "worst tenth"]
    table = markdown([*header, "nearest is the client's", "of classes of one", "found in sums"], lines)
    return table + _tokens([row for rows in found.values() for row in rows if "token_cosine" in row.get("leak", {})])


def _tokens(rows: Sequence[Row]) -> str:
    """Of made-up embeddings: are their nearest tokens near, and the client's?"""
    if not rows:
        return ""
    mean = {
        (metric, part): statistics.fmean(row["leak"][metric][part] for row in rows)
        for metric in ("token_cosine", "token_recall")
        for part in ("mean", "control")
    }
    return (
        f"\n*Nearest tokens of made-up embeddings: cosine {mean['token_cosine', 'mean']:.2f} (another client's: "
        f"{mean['token_cosine', 'control']:.2f}); {100 * mean['token_recall', 'mean']:.0f} % of a sentence's tokens "
        f"are among them (another client's: {100 * mean['token_recall', 'control']:.0f} %).*\n"
    )


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _leak(rows: Sequence[Row], metric: str) -> str:
    """Percent, and the control's."""
    told = [row["leak"][metric] for row in rows if metric in row.get("leak", {})]
    if not told:
        return NOTHING
    shown = []
    for part in ("mean", "control"):
        values = [each[part] for each in told if each[part] is not None]
        shown.append(f"{100 * statistics.fmean(values):.0f}" if values else NOTHING)
    return " / ".join(shown)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {"condensed": ("condensed", condensed)}
