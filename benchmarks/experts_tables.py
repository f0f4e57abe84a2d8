"""The table and the picture of `experts.py`'s results, from ``results/experts.json`` alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
from accuracy_tables import bytes_cells
from matplotlib.figure import Figure
from table_parts import NOT_RUN, Row, label, load, markdown, percent

from folklora.report.style import canvas, clean, drawing, headline


def experts() -> str:
    """By setting and variant: accuracy of the mean client and of the worst tenth, bytes, and who shares experts."""
    document = load("experts")
    rows: list[Row] = document["rows"] if document else []
    if not rows:
        return NOT_RUN
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        for variant in dict.fromkeys(row["variant"] for row in here):
            own = [row for row in here if row["variant"] == variant]
            up, down, _ = bytes_cells(own)
            alike = [row["alike"] for row in own if "alike" in row]
            held = [bound for row in own for bound in row.get("experts_held", [])]
            lines.append(
                [
                    setting,
                    label(variant),
                    percent([row["accuracy_mean"] for row in own]),
                    percent([row["accuracy_worst_tenth"] for row in own]),
                    percent([row["accuracy_tuned_mean"] for row in own]),
                    f"{own[0]['lr']:g}",
                    up,
                    down,
                    f"{min(held)} to {max(held)}" if held else "-",
                    f"{statistics.fmean(alike):.2f}" if alike else "-",
                ]
            )
    header = ["setting", "method", "accuracy, %", "worst tenth", "before the reply", "lr", "up, client and round"]
    header += ["down", "experts held", "shared with those alike"]
    planned = document["seeds"] * len({(row["setting"], row["variant"]) for row in rows})
    partial = f" Partial: {len(rows)} of {planned} runs of these are done." if len(rows) < planned else ""
    note = (
        "Mean over clients, and ± the standard deviation over seeds. *Before the reply*: as a client's own training "
        "leaves its model. *Shared with those alike*: correlation, over pairs of clients, between the experts and the "
        f"training labels that they have in common.{partial}"
    )
    return markdown(header, lines, left=2) + f"\n*{note}*\n"


def assignment() -> Figure | None:
    """Who holds which experts of the last adapted layer when a run of FedAMoLE ends; below, who shares with whom."""
    document = load("experts")
    rows = [r for r in (document["rows"] if document else []) if r["variant"] == "fedamole" and r["seed"] == 0]
    if not rows:
        return None
    with drawing("light") as theme:
        figure = canvas(4.9, gap=0.08)
        upper, lower = figure.subplots(2, len(rows), squeeze=False, height_ratios=[1, 1.5])
        for ax, beneath, row in zip(upper, lower, rows, strict=True):
            common = np.array(row["in_common"])
            held = np.zeros((len(common), len(row["assigned"])))
            for expert, clients in enumerate(row["assigned"]):
                held[clients, expert] = 1
            order = np.lexsort(held[::-1])  # experts of the same clients side by side
            clean(ax, theme, "none").imshow(held[:, order], aspect="auto", cmap=theme.heat, interpolation="nearest")
            ax.set_title(row["setting"], loc="left", fontsize=9.5)
            ax.set_xlabel("experts, those of like clients together", fontsize=8.5)
            ax.set_ylabel("client", fontsize=8.5)
            shown = np.ma.masked_array(common, np.eye(len(common), dtype=bool))  # with itself everybody shares all
            image = clean(beneath, theme, "none").imshow(shown, cmap=theme.heat, interpolation="nearest", vmin=0)
            figure.colorbar(image, ax=beneath, shrink=0.8).outline.set_visible(False)
            beneath.set_xlabel("experts in common, mean over layers", fontsize=8.5)
        headline(figure, "Which clients hold which experts")
        return figure


TABLES: dict[str, tuple[str, Callable[[], str]]] = {"experts": ("experts", experts)}
"""Marker -> the results it needs, and what makes it."""
PICTURES: dict[str, Callable[[], Figure | None]] = {"experts": assignment}
"""File name -> what draws it."""
