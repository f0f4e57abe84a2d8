"""The picture of a plan: what each size is predicted to be worth and measured at, and how far predictions were off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from folklora.backbones.metric import Metric, metric_of
from folklora.report.style import GREY, MARKERS, Theme, ThemeName, canvas, clean, drawing, headline, pale, score_axis

Row = Mapping[str, Any]
BELIEVED, OTHER = 0, GREY
"""Colours of the palette: of the predictor that decides, of the others."""
TICKS = 6
APART = 0.006
"""Of the axis, by which intervals of different layers stand side by side."""


def planned(document: Mapping[str, Any], theme: ThemeName = "light") -> Figure:
    """Of ``plan.json``: sizes at the largest share of the data, beside errors on cells that were held out.

    Where predictions were refused the left half has what was measured alone.
    """
    metric = metric_of({"metric": document["metric"]["name"], "higher": document["metric"]["higher"]})
    with drawing(theme) as colors:
        figure = canvas(4.1, 9.4)
        sizes, errors = figure.subplots(1, 2, width_ratios=(1.9, 1))
        _sizes(sizes, document, metric, colors)
        _errors(errors, document, metric, colors)
        said = f"predicted by the {document['predictor']}" if document["predictor"] else "measured; no plan"
        headline(figure, f"Which size is worth its cost: validation {metric.words}, {said}")
        return figure


def _sizes(ax: Axes, document: Mapping[str, Any], metric: Metric, theme: Theme) -> None:
    """A line for each number of layers, over what a client trains; what was chosen is ringed."""
    share = document["share"]
    runs = [{**run, **run["cell"]} for run in document["runs"] if run["cell"]["data"] == share]
    cells = [row for row in document.get("cells") or () if row["data"] == share and row["predicted"] is not None]
    costs = sorted({_cost(row) for row in [*runs, *cells]}) or [1]
    gap = (costs[-1] / costs[0]) ** APART
    layers = sorted({row["layers"] for row in [*runs, *cells]})
    for place, count in enumerate(layers):
        color, marker = theme.palette[place % GREY], MARKERS[place % len(MARKERS)]
        asked = sorted((row for row in cells if row["layers"] == count), key=_cost)
        if asked:
            x, y = [_cost(row) for row in asked], [row["predicted"] for row in asked]
            ax.plot(x, y, color=color, linewidth=1.5, zorder=2)
            reach = np.array([[row["predicted"] - row["low"], row["high"] - row["predicted"]] for row in asked]).T
            aside = np.array(x) * gap ** (place - (len(layers) - 1) / 2)  # so that none hides another
            ax.errorbar(aside, y, reach, color=pale(color, theme, 0.45), linestyle="none", linewidth=1.2, zorder=1)
            for row in asked:
                face = theme.paper if row["within_budget"] else pale(color, theme, 0.3)
                ax.plot(_cost(row), row["predicted"], marker, color=color, markerfacecolor=face, markersize=6, zorder=3)
        own = [row for row in runs if row["layers"] == count]
        ax.plot([_cost(row) for row in own], [row["value"] for row in own], marker, color=color, markersize=4, zorder=4)
        line = 1.5 if cells else 0
        ax.plot(
            [], [], marker=marker, color=color, markersize=5, linewidth=line, label=f"{count} layer{'s' * (count > 1)}"
        )
    _marked(ax, document, cells, costs, theme)
    ax.set_xscale("log")
    ax.set_xlim(costs[0] / 1.2 / gap**2, costs[-1] * 1.2 * gap**2)
    ax.xaxis.set_major_locator(FixedLocator(_apart(costs)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"parameters that a client trains, at {100 * share:g} % of the data")
    ax.set_ylabel(
        f"{metric.words} ({'small, full: measured' if runs and cells else 'measured' if runs else 'predicted'})"
    )
    score_axis(ax, metric)
    clean(ax, theme)
    ax.tick_params(which="minor", length=0)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, handlelength=1.6, columnspacing=1.2)


def _marked(ax: Axes, document: Mapping[str, Any], cells: Sequence[Row], costs: Sequence[int], theme: Theme) -> None:
    """The best; the smallest that may be as good, where they are two; what is over the budget, and where that ends."""
    best, alike = document.get("best"), document.get("smallest_alike")
    named = [("best", best, "o", 12)] if best else []
    if alike and alike != best:
        named.append(("smallest that may be as good", alike, "s", 11))
    for words, row, marker, size in named:
        ring: dict[str, Any] = {
            "markerfacecolor": "none",
            "markeredgecolor": theme.ink,
            "markeredgewidth": 1.2,
            "linestyle": "none",
        }
        ax.plot(_cost(row), row["predicted"], marker, markersize=size, zorder=5, label=words, **ring)
    if any(not row["within_budget"] for row in cells):
        face = pale(theme.soft, theme, 0.3)
        ax.plot([], [], "o", color=theme.soft, markerfacecolor=face, linestyle="none", label="over budget")
    most = document["budget"]["parameters"]
    if most is not None and costs[0] <= most <= costs[-1]:
        ax.axvline(most, color=theme.soft, linewidth=1, linestyle=(0, (2, 2)), label="budget")


def _cost(row: Row) -> int:
    parameters: int = row["parameters"]
    return parameters


def _apart(costs: Sequence[int]) -> list[int]:
    """So many of them, evenly by their logarithms, that their numbers do not touch."""
    if len(costs) <= 1:
        return list(costs)
    wanted = np.geomspace(costs[0], costs[-1], TICKS)
    return sorted({min(costs, key=lambda cost: abs(np.log(cost / each))) for each in wanted})


def _errors(ax: Axes, document: Mapping[str, Any], metric: Metric, theme: Theme) -> None:
    """Root mean square errors of all predictors, held out in the way that decided."""
    how = document["decided"]
    found = {name: ways[how]["rmse"] for name, ways in document["held_out"].items()}
    shown = {name: error for name, error in found.items() if error is not None}
    chosen = document["predictor"]
    colors = [theme.palette[BELIEVED if name == chosen else OTHER] for name in shown]
    ax.barh(list(shown), list(shown.values()), 0.62, color=colors)
    ax.invert_yaxis()
    for name, error in shown.items():
        ax.annotate(f" {metric.number(error)}", (error, name), va="center", fontsize=9, color=theme.soft)
    ax.set_xlim(0, 1.18 * max(shown.values(), default=1.0) or 1.0)
    ax.set_xlabel("error on " + ("the largest sizes" if how == "beyond" else "sizes between") + ", held out")
    clean(ax, theme, "none")
    ax.tick_params(axis="x", labelbottom=False)
