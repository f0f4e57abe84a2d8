"""The tables and the picture of `quality.py`'s results, from ``results/quality.json`` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from table_parts import NOT_RUN, Row, load, markdown, picture

from folklora.report.style import canvas, clean, drawing, headline, percent_axis

MEASURES = ("regularity of blocks", "ratio to shuffled", "entropy rate", "sample entropy", "zlib ratio", "copies, near",
            "copies, exact")  # fmt: skip
FAULTS = {
    "scramble": "random words",
    "duplicate": "copies",
    "near": "edited copies",
    "labels": "other labels (the control)",
}
MEANT = {"scramble": "regularity", "duplicate": "duplicates"}
METHODS = ("fedit", "folklora")


def audits(setting: str) -> list[Row]:
    """A row a seed."""
    return [row for row in (load("quality") or {"audits": []})["audits"] if row["setting"] == setting]


def auc(setting: str) -> Callable[[], str]:
    """How well each measure tells clients that are struck from the others, by fault and share of examples."""

    def made() -> str:
        rows = audits(setting)
        if not rows:
            return NOT_RUN
        lines = []
        for place, fault in enumerate(rows[0]["faults"]):
            share = "" if fault["kind"] == "labels" else f"{fault['rows']:.0%}"
            cells = []
            for measure in MEASURES:
                found = [row["faults"][place]["auc"][measure] for row in rows]
                known = [value for value in found if value is not None]
                cells.append(f"{np.mean(known):.2f} ± {np.std(known):.2f}" if len(known) == len(found) else "-")
            lines.append([FAULTS[fault["kind"]], share, *cells])
        planned = load("quality")["seeds"]["audits"]
        part = "" if len(rows) >= planned else f" *Partial: {len(rows)} of {planned} seeds.*"
        sizes = [size for row in rows for size in row["train_examples"]]
        note = (
            "AUC, mean ± standard deviation over seeds: the probability that a client that is struck has the higher "
            f"value; 0.5 tells nothing, 0 as much as 1. Clients have {min(sizes)} to {max(sizes)} examples, "
            f"{np.mean(sizes):.0f} on average.{part}"
        )
        return markdown(["fault", "of its examples", *MEASURES], lines, left=1) + "\n" + note + "\n"

    return made


def runs() -> str:
    """Accuracy with and without weights, and what weights add, paired by seed."""
    rows = (load("quality") or {"rows": []})["rows"]
    lines = []
    for method in METHODS:
        for kind in (*MEANT, "none"):
            for share in sorted({row["rows"] for row in rows if row["kind"] == kind}):
                for weights in MEANT.values() if kind == "none" else (MEANT[kind],):
                    lines += _pair(rows, method, kind, share, weights)
    if not lines:
        return NOT_RUN
    planned = load("quality")["seeds"]["runs"]
    note = (
        "Test accuracy in per cent, mean over all clients and seeds; the difference is paired by seed, with the least "
        f"and the most beside it where there are several. {planned} seeds are planned."
    )
    header = [
        "method",
        "half of the clients have",
        "of their examples",
        "weights",
        "seeds",
        "without",
        "with",
        "difference",
    ]
    return markdown(header, lines, left=2) + "\n" + note + "\n"


def _pair(rows: Sequence[Row], method: str, kind: str, share: float, weights: str) -> list[list[str]]:
    found: dict[str, dict[int, float]] = {"none": {}, weights: {}}
    for row in rows:
        if (row["method"], row["kind"], row["rows"]) == (method, kind, share) and row["weights"] in found:
            found[row["weights"]][row["seed"]] = 100 * row["accuracy"]
    seeds = sorted(found["none"].keys() & found[weights].keys())
    if not seeds:
        return []
    without, with_them = (np.array([found[name][seed] for seed in seeds]) for name in ("none", weights))
    gaps = with_them - without
    spread = f" ({gaps.min():+.1f} to {gaps.max():+.1f})" if len(seeds) > 1 else ""
    told = [method, FAULTS.get(kind, "no faults"), f"{share:.0%}" if share else "", weights, str(len(seeds))]
    return [[*told, f"{without.mean():.1f}", f"{with_them.mean():.1f}", f"{gaps.mean():+.1f}{spread}"]]


def measured() -> Figure | None:
    """What two measures come to, by the share of examples that is struck."""
    names = list(dict.fromkeys(row["setting"] for row in (load("quality") or {"audits": []})["audits"]))
    if not names:
        return None
    panels = (("scramble", "regularity of blocks", "random words"), ("near", "copies, near", "edited copies"))
    with drawing("light") as theme:
        figure = canvas(3.3, 8.6)
        for ax, (kind, measure, words) in zip(figure.subplots(1, 2), panels, strict=True):
            clean(ax, theme)
            for i, name in enumerate(names):
                shares, values = _curve(audits(name), kind, measure)
                mean, spread = values.mean(0), values.std(0)
                ax.errorbar(
                    shares, mean, yerr=spread, color=theme.palette[i], marker="os"[i % 2], capsize=3, label=name
                )
            percent_axis(ax, "x")
            ax.set_xlabel(f"of a client's examples are {words}")
            ax.set_ylabel(measure)
            ax.set_ylim(*((0.65, 1.0) if kind == "scramble" else (-0.02, None)))
        figure.axes[0].legend(frameon=False, fontsize=8)
        headline(figure, "What an audit measures of clients whose data are worse, mean and spread over seeds")
        return figure


def _curve(rows: Sequence[Row], kind: str, measure: str) -> tuple[list[float], Any]:
    """Shares, and [seeds, shares]: clean clients first."""
    shares = [0.0, *(fault["rows"] for fault in rows[0]["faults"] if fault["kind"] == kind)]
    values = [
        [row["clean"][measure], *(fault["struck"][measure] for fault in row["faults"] if fault["kind"] == kind)]
        for row in rows
    ]
    return shares, np.array(values, dtype=float)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "quality-auc-banking77": ("quality", auc("banking77")),
    "quality-auc-snips": ("quality", auc("snips")),
    "quality-runs": ("quality", runs),
    "quality-picture": ("quality", picture("quality", "What an audit measures of clients whose data are worse")),
}
"""Marker -> the results it needs, and what makes it."""

PICTURES: dict[str, Callable[[], Figure | None]] = {"quality": measured}
"""File name -> what draws it."""
