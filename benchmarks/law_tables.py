"""The tables and pictures of `law.py`'s results, from ``results/law.json`` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table_parts import NOT_RUN, Row, load, markdown, picture

from folklora.report.style import Theme, canvas, clean, drawing, headline

CELLS = 48
LAW = "law"
SHOWN = {"ndcg": ("NDCG@10", 100, 2), "accuracy": ("accuracy", 100, 2), "loss": ("loss", 1, 4)}
TITLES = {"badges": "badges", "markov": "Markov chain", "adapters": "adapters on Banking77"}
PAIRS = (("badges", "ndcg"), ("markov", "ndcg"), ("adapters", "accuracy"))
"""What the pictures show."""


def grids(names: Sequence[str]) -> list[Row]:
    return [grid for grid in (load("law") or {"grids": []})["grids"] if grid["name"] in names]


def _number(value: float | None, metric: str) -> str:
    _, scale, digits = SHOWN[metric]
    return "-" if value is None else f"{scale * value:.{digits}f}"


def errors(*names: str) -> Callable[[], str]:
    """Root mean square errors of every predictor: the least of each kind in bold."""

    def made() -> str:
        lines = []
        for grid in grids(names):
            metric = grid["metric"]
            title = f"{TITLES[grid['name']]}: {SHOWN[metric][0]}"
            for predictor in grid["predictors"]:
                cells = []
                for how in ("largest", "beyond", "between"):
                    found = [each[how] for each in grid["predictors"] if each[how] is not None]
                    shown = _number(predictor[how], metric)
                    cells.append(f"**{shown}**" if found and predictor[how] == min(found) else shown)
                lines.append([title, predictor["name"], *cells])
                title = ""
        if not lines:
            return NOT_RUN
        header = ["", "predictor", "the largest from the smaller", "one size larger", "between"]
        return markdown(header, lines, left=2) + _note(grids(names))

    return made


def _note(found: Sequence[Row]) -> str:
    """How much of it has been measured, and how far seeds are apart."""
    seen: dict[str, Row] = {grid["name"]: grid for grid in found}
    said = []
    for name, grid in seen.items():
        own = [each for each in found if each["name"] == name and each["between_seeds"] is not None]
        apart = ", ".join(
            f"{SHOWN[each['metric']][0]} {_number(each['between_seeds'], each['metric'])}" for each in own
        )
        seeds = f"{grid['seeds']} seed{'s' * (grid['seeds'] > 1)}"
        said.append(
            f"{TITLES[name]}: {grid['cells']} of {CELLS} cells, {seeds}; the largest: fitted to "
            f"{grid['fitted_to']} runs, asked about {grid['asked_about']}"
            + (f"; runs of one cell differ by {apart} (standard deviation)" if apart else "")
        )
    return f"\n*{'. '.join(said)}.*\n"


def verdicts() -> str:
    """What `folklora plan` would say of each grid."""
    lines = [
        [
            f"{TITLES[grid['name']]}: {SHOWN[grid['metric']][0]}",
            " to ".join(_number(each, grid["metric"]) for each in grid["range"]),
            f"{grid['in_sample_r2']:.2f}",
            grid["chosen"] or "refused",
        ]
        for grid in grids(tuple(TITLES))
    ]
    if not lines:
        return NOT_RUN
    return markdown(["", "measured", "R² of the law in-sample", "plan predicts with"], lines)


def corners() -> str:
    """The largest cell of all: predicted from the smaller ones, measured, tested."""
    shown = grids(tuple(TITLES))
    names = list(dict.fromkeys(each["name"] for grid in shown for each in grid["predictors"]))
    lines = []
    for grid in shown:
        corner, metric = grid["corner"], grid["metric"]
        if corner["validation"] is None:
            continue
        said = {each["name"]: each["corner"] for each in grid["predictors"]}
        lines.append(
            [
                f"{TITLES[grid['name']]}: {SHOWN[metric][0]}",
                *(_number(said.get(name), metric) for name in names),
                _number(corner["validation"], metric),
                _number(corner["test"], metric),
            ]
        )
    if not lines:
        return NOT_RUN
    return markdown(["", *names, "measured", "on test"], lines)


def entropy() -> str:
    """How regular each data set is."""
    lines = [
        [
            row["setting"],
            f"{100 * row['share']:.0f} %",
            f"{row['tokens']:,}",
            *(f"{row[key]:.2f}" for key in ("shannon", "approximate_entropy", "regularity", "entropy_rate")),
            "-" if row["known"] is None else f"{row['known']:.2f}",
        ]
        for row in (load("law") or {"data": []})["data"]
    ]
    if not lines:
        return NOT_RUN
    header = ["", "share", "tokens", "Shannon", "approximate entropy", "its ratio to shuffles", "entropy rate", "true"]
    return markdown(header, lines)


def readings() -> str:
    """Chains of several entropies, each predicted from the others, by reading of D'."""
    found = (load("law") or {"entropy": []})["entropy"]
    if not found:
        return NOT_RUN
    lines = []
    for place, reading in enumerate(found[0]["readings"]):
        cells = []
        for each in found:
            own = each["readings"][place]
            cells += [_number(own["rmse"], each["metric"]), f"{own['spearman']:+.2f}"]
        lines.append([reading["reading"], *cells])
    cells = []
    for each in found:
        cells += [_number(each["mean"], each["metric"]), ""]
    lines.append(["*mean of the other chains*", *cells])
    header = ["D'"]
    for each in found:
        header += [f"{SHOWN[each['metric']][0]}: error", "rank correlation"]
    note = f"\n*{found[0]['chains']} chains, {found[0]['runs']} runs.*\n"
    return markdown(header, lines) + note


def published() -> str:
    """What the authors' fit makes of D from several starts."""
    rows = (load("law") or {"published": {}})["published"]
    lines = [
        [TITLES[name], f"{each['start']:g}", f"{each['data']:.2f}", f"{each['in_sample_r2']:.3f}", str(each["cells"])]
        for name, found in rows.items()
        for each in found
    ]
    return markdown(["", "D starts at", "and ends at", "R² in-sample", "cells"], lines) if lines else NOT_RUN


def predicted() -> Figure | None:
    """Measured against predicted by the law that was fitted to the smaller cells."""
    words = "The law, fitted to the smaller cells: measured against predicted"
    return _side_by_side(3.4, _measured_against_predicted, words)


def _side_by_side(height: float, draw: Callable[[Axes, Row, Theme], None], words: str) -> Figure | None:
    """Each grid of `PAIRS` on axes of its own."""
    found = [grid for pair in PAIRS for grid in grids((pair[0],)) if grid["metric"] == pair[1]]
    if not found:
        return None
    with drawing("light") as theme:
        figure = canvas(height, 9.4)
        for ax, grid in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
            draw(ax, grid, theme)
        headline(figure, words)
        return figure


def _measured_against_predicted(ax: Axes, grid: Row, theme: Theme) -> None:
    name, scale, _ = SHOWN[grid["metric"]]
    clean(ax, theme)
    points = np.array([point[:6] for point in grid["points"]], dtype=np.float64)
    small = np.array([point[6] for point in grid["points"]], dtype=bool)
    value, said = scale * points[:, 4], scale * points[:, 5]
    low, high = float(min(value.min(), said.min())), float(max(value.max(), said.max()))
    ax.plot([low, high], [low, high], color=theme.soft, linewidth=1)
    for chosen, color, marker, label in (
        (small, theme.palette[9], "o", "fitted"),
        (~small, theme.palette[1], "^", "predicted"),
    ):
        ax.plot(said[chosen], value[chosen], marker, color=color, markersize=5, label=label)
    ax.set_xlabel(f"predicted {name}")
    ax.set_ylabel(f"measured {name}")
    ax.set_title(TITLES[grid["name"]], loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def surface() -> Figure | None:
    """Measured cells at all of the data, over layers and width."""
    words = "All of the data: measured (points), and the law fitted to the smaller cells (lines)"
    return _side_by_side(3.2, _lines_by_width, words)


def _lines_by_width(ax: Axes, grid: Row, theme: Theme) -> None:
    name, scale, _ = SHOWN[grid["metric"]]
    clean(ax, theme)
    points = np.array([point[:6] for point in grid["points"]], dtype=np.float64)
    points = points[points[:, 3] == points[:, 3].max()]
    layers = np.unique(points[:, 0])
    for place, depth in enumerate(layers):
        own = points[points[:, 0] == depth]
        widths = np.unique(own[:, 1])
        color = theme.palette[place]
        said = [scale * own[own[:, 1] == width, 5].mean() for width in widths]
        ax.plot(widths, said, color=color, linewidth=1.3)
        ax.plot(own[:, 1], scale * own[:, 4], "o", color=color, markersize=5, label=f"N = {depth:g}")
    ax.set_xscale("log", base=2)
    ticks = np.unique(points[:, 1])
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel("rank" if grid["name"] == "adapters" else "width")
    ax.set_ylabel(name)
    ax.set_title(TITLES[grid["name"]], loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=7)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "law-sequential": ("law", errors("badges", "markov")),
    "law-adapters": ("law", errors("adapters")),
    "law-corners": ("law", corners),
    "law-verdicts": ("law", verdicts),
    "law-entropy": ("law", entropy),
    "law-readings": ("law", readings),
    "law-published": ("law", published),
    "law-predicted": ("law", picture("law_predicted", "The law: measured against predicted")),
    "law-surface": ("law", picture("law_surface", "The law over layers and width")),
}
"""Marker -> the results it needs, and what makes it."""

PICTURES: dict[str, Callable[[], Figure | None]] = {"law_predicted": predicted, "law_surface": surface}
"""File name -> what draws it."""
