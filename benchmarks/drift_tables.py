"""The table and the picture of `drift.py`'s results, from ``results/drift.json`` alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from table_parts import Row, label, load, markdown, percent

from folklora.report.style import canvas, clean, drawing, headline, percent_axis
from folklora.report.tables import human_bytes

SHOWN = ("local", "fedit", "celora:similarity=data", "folklora")
"""Drawn, each with what refreshed sketches make of it as a line of the same colour."""


def drift() -> str:
    """By setting and variant: those who drift before, in and after the change, the others, and what it costs."""
    document = load("drift")
    rows: list[Row] = document["rows"]
    change = document["change"]
    header = ["setting", "method", "before", "at the change", "at the end", "the others", "bytes up a client-round"]
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        for variant in dict.fromkeys(row["variant"] for row in here):
            own = [row for row in here if row["variant"] == variant]
            curves = [dict(row["curves"]["drifted"]) for row in own]
            line = [setting, label(variant)]
            line += [percent(curve[r] for curve in curves if r in curve) for r in (change - 1, change)]
            line += [percent(row[group] for row in own) for group in ("drifted", "others")]
            line.append(human_bytes(statistics.fmean(row["bytes_up"] for row in own)))
            lines.append(line)
    seeds = sorted({row["seed"] for row in rows})
    note = (
        f"Accuracy, %, of the clients whose data change in round {change} of {document['rounds']}: on their validation "
        "splits in the round before it and in its own, on their test splits at the end; the others on theirs. Seed"
        f"{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; a row without a spread has one of them."
    )
    return markdown(header, lines, left=2) + f"\n*{note}*\n"


def curves() -> Figure | None:
    """Validation accuracy of the drifted clients by round, a panel a setting."""
    document = load("drift")
    rows: list[Row] = document["rows"] if document else []
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    if not settings:
        return None
    with drawing("light") as theme:
        columns = min(2, len(settings))
        lines = -(-len(settings) // columns)
        figure = canvas(2.7 * lines + 0.8)
        axes = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
        for ax, setting in zip(axes, settings, strict=False):
            clean(ax, theme)
            for i, name in enumerate(SHOWN):
                for variant, style in ((name, "-"), (f"{name}:refresh={document['refresh']}", "--")):
                    found = _mean_curve([r for r in rows if r["setting"] == setting and r["variant"] == variant])
                    if found:
                        told = label(variant).replace("`", "")
                        ax.plot(*zip(*found, strict=True), style, color=theme.palette[i], label=told, linewidth=1.7)
            ax.axvline(document["change"] - 0.5, color=theme.soft, linewidth=1, linestyle=(0, (2, 2)))
            ax.set_title(setting, loc="left", fontsize=9.5)
            percent_axis(ax)
        for ax in axes[len(settings) :]:
            ax.set_visible(False)
        for ax in axes[max(0, len(settings) - columns) : len(settings)]:
            ax.set_xlabel("round")
        lines_of = {line.get_label(): line for ax in axes for line in ax.get_lines() if line.get_label()[0] != "_"}
        figure.legend(lines_of.values(), lines_of.keys(), loc="outside lower center", ncols=3, fontsize=8)
        headline(figure, "Clients whose data change, on their validation splits")
        return figure


def _mean_curve(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """Over seeds, of the rounds that all of them have."""
    found = [dict(row["curves"]["drifted"]) for row in rows]
    rounds = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    return [(round, statistics.fmean(curve[round] for curve in found)) for round in rounds]


TABLES: dict[str, tuple[str, Callable[[], str]]] = {"drift": ("drift", drift)}
"""Marker -> the results it needs, and what makes it."""
PICTURES: dict[str, Callable[[], Figure | None]] = {"drift": curves}
"""File name -> what draws it."""
