"""The table and the picture of `newcomers.py`'s results, from ``results/newcomers.json`` alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from table_parts import NOT_RUN, Row, load, markdown

from folklora.report.style import canvas, clean, drawing, headline, percent_axis
from folklora.report.tables import human_bytes

STARTS = {
    ("folklora", False): "`folklora`: a common core, a head by its sketch",
    ("folklora:similarity=data", False): "`folklora`, cores mixed by its data",
    ("celora:basis=frozen:head=sketched", False): "`celora` in a common frame, cores mixed by its data",
    ("sketch", False): "`sketch`: a head by its sketch, no adapter",
    ("fedit", False): "`fedit`: the global model",
    ("local", False): "local training from zero",
    ("folklora", True): "`folklora`'s start, then trained at home",
    ("fedit", True): "`fedit`'s global model, then trained at home",
}
ZERO = ("local", False)
RESAMPLES = 10_000

Start = tuple[str, bool]
Scores = Mapping[tuple[int, str], float]
"""(seed, newcomer) -> accuracy."""


def rows_of(setting: str) -> dict[Start, list[Row]]:
    """The rows of each start, in the order of the table."""
    found: dict[Start, list[Row]] = {start: [] for start in STARTS}
    for row in (load("newcomers") or {"rows": []})["rows"]:
        if row["setting"] == setting and (row["variant"], row["trained"]) in found:
            found[row["variant"], row["trained"]].append(row)
    return {start: rows for start, rows in found.items() if rows}


def settings() -> list[str]:
    return list(dict.fromkeys(row["setting"] for row in (load("newcomers") or {"rows": []})["rows"]))


def scores(rows: Sequence[Row]) -> dict[tuple[int, str], float]:
    return {(row["seed"], client): value for row in rows for client, value in row["newcomers"].items()}


def paired(one: Scores, other: Scores) -> tuple[float, float, float] | None:
    """Mean difference of the same newcomers, and its 95 % bootstrap interval; None without two of them.

    A resample draws newcomers with replacement, each with both its scores.
    """
    common = [key for key in one if key in other]
    if len(common) < 2:
        return None
    differences = np.array([one[key] - other[key] for key in common])
    draws = np.random.default_rng(0).integers(len(common), size=(RESAMPLES, len(common)))
    low, high = np.quantile(differences[draws].mean(axis=1), (0.025, 0.975))
    return float(differences.mean()), float(low), float(high)


def table(setting: str) -> Callable[[], str]:
    """One setting: what newcomers reach by where they start, and what that cost them."""

    def made() -> str:
        found = rows_of(setting)
        if not found:
            return NOT_RUN
        planned, zero = load("newcomers")["seeds"], scores(found.get(ZERO, []))
        lines = []
        for start, rows in found.items():
            own = scores(rows)
            text = f"{100 * statistics.fmean(own.values()):.1f}"
            text += "" if len(rows) >= planned else f" ({len(rows)} of {planned} seeds)"
            gap = paired(own, zero) if start != ZERO else None
            gained = "-" if gap is None else f"{100 * gap[0]:+.1f} ({100 * gap[1]:+.1f} to {100 * gap[2]:+.1f})"
            # Of those who trained: a start that is trained further is the same run.
            others = "" if start[1] else f"{100 * statistics.fmean(row['others'] for row in rows):.1f}"
            moved = statistics.fmean(row["bytes_up"] + row["bytes_down"] for row in rows)
            lines.append([STARTS[start], text, gained, others, human_bytes(moved)])
        header = ["a newcomer begins with", "accuracy %", "over local training from zero", "who took part %", "bytes"]
        note = f"\n{len(zero)} newcomers; intervals: 95 %, paired bootstrap over them.\n" if zero else ""
        return markdown(header, lines) + note

    return made


def starts() -> Figure | None:
    """Each newcomer's accuracy over local training from zero, by where it starts."""
    shown = {name: found for name in settings() if ZERO in (found := rows_of(name))}
    if not shown:
        return None
    with drawing("light") as theme:
        names = [start for start in STARTS if start != ZERO and any(start in found for found in shown.values())]
        figure = canvas(0.42 * len(names) + 1.1, 9.0)
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for ax, (setting, found) in zip(axes, shown.items(), strict=True):
            clean(ax, theme)
            zero = scores(found[ZERO])
            ax.axvline(0, color=theme.palette[9], linewidth=1)
            for place, start in enumerate(names):
                own = scores(found.get(start, []))
                each = [own[key] - zero[key] for key in own if key in zero]
                if not each:
                    continue
                color = theme.palette[1 if start[1] else 0]
                ax.plot(each, [place] * len(each), "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
                gap = paired(own, zero)
                if gap is not None:
                    ax.plot(gap[1:], [place] * 2, color=color, linewidth=2)
                ax.plot([statistics.fmean(each)], [place], "D", color=color, markersize=6)
            ax.set_title(setting, loc="left", fontsize=9)
            percent_axis(ax, "x")
        axes[0].set_yticks(range(len(names)), [STARTS[start].replace("`", "") for start in names], fontsize=8)
        axes[0].invert_yaxis()
        headline(figure, "Newcomers: accuracy over local training from zero, each, the mean, its 95 % interval")
        return figure


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "newcomers-banking77": ("newcomers", table("banking77 dirichlet 0.5")),
    "newcomers-banking77-skewed": ("newcomers", table("banking77 dirichlet 0.1")),
    "newcomers-snips": ("newcomers", table("snips dirichlet 0.1")),
}
"""Marker -> the results it needs, and what makes it."""

PICTURES: dict[str, Callable[[], Figure | None]] = {"newcomers": starts}
"""File name -> what draws it."""
