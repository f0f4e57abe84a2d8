"""The picture of `tasks.py`'s results, from ``results/tasks.json`` alone: every method on every task side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from accuracy_tables import Column
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from method_marks import kind, name
from table_parts import load
from task_tables import UNTRAINED, scores

from folklora.backbones.metric import Metric
from folklora.report.ranking import complete, ranking
from folklora.report.style import Theme, canvas, clean, drawing, headline, pale, score_axis

Seeds = Mapping[int, float]

ROW = 0.21  # inches


def methods_by_task() -> Figure | None:
    """Each task's score by method, better to the right; the untrained checkpoint, and who is level with the best."""
    document = load("tasks")
    found = {task: scores(document, task) for task in (document or {"tasks": {}})["tasks"]}
    found = {task: (metric, of) for task, (metric, of) in found.items() if len(of.keys() - {UNTRAINED}) > 1}
    if not found:
        return None
    order = _best_first(found)
    with drawing("light") as theme:
        figure = canvas(ROW * len(order) + 1.5, 2.2 + 1.75 * len(found))
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for ax, (task, (metric, of)) in zip(panels, found.items(), strict=True):
            _panel(clean(ax, theme, "x"), theme, metric, of, order)
            ax.set_title(task.replace(", ", "\n").replace(" by ", "\nby "), fontsize=10)
            way = "" if metric.higher else ", less is better"
            ax.set_xlabel(f"{metric.words}{way}")
        panels[0].set_yticks(range(len(order)), [name(variant) for variant in order], color=theme.ink, fontsize=9)
        panels[0].set_ylim(len(order) - 0.4, -0.6)
        _legend(figure, theme, order)
        headline(figure, "Every method on every task: mean over clients, its mean and spread over seeds")
        return figure


def _best_first(found: Mapping[str, tuple[Metric, Mapping[str, Seeds]]]) -> list[str]:
    """By mean rank over the tasks that have them all; who is not in every task comes last."""
    results = {
        (variant, task, seed): metric.merit(value)
        for task, (metric, of) in found.items()
        for variant, seeds in of.items()
        for seed, value in seeds.items()
        if variant != UNTRAINED
    }
    first = [place.method for place in ranking(complete(results))]
    return [*first, *(v for v in dict.fromkeys(variant for variant, _, _ in results) if v not in first)]


def _panel(ax: Axes, theme: Theme, metric: Metric, of: Mapping[str, Seeds], order: list[str]) -> None:
    judged = Column.of({v: {seed: metric.merit(value) for seed, value in seeds.items()} for v, seeds in of.items()})
    if judged.best is not None and judged.difference is not None:
        best = statistics.fmean(of[judged.best].values())
        low, high = sorted((best, best - judged.difference if metric.higher else best + judged.difference))
        ax.axvspan(low, high, color=pale(theme.palette[0], theme, 0.10)).set_zorder(0)
    if UNTRAINED in of:
        ax.axvline(statistics.fmean(of[UNTRAINED].values()), color=theme.soft, linewidth=1.1, linestyle=(0, (4, 3)))
    for row, variant in enumerate(order):
        values = list(of.get(variant, {}).values())
        if not values:
            continue
        _, color, marker = kind(variant, theme)
        mean, error = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        ax.plot([mean - error, mean + error], [row, row], color=pale(color, theme, 0.45), linewidth=2)
        ax.plot(mean, row, marker, color=color, markersize=6.5, markeredgecolor=theme.paper)
    score_axis(ax, metric, "x")
    if not metric.higher:
        ax.invert_xaxis()


def _legend(figure: Figure, theme: Theme, order: list[str]) -> None:
    families = {family: (color, marker) for family, color, marker in (kind(variant, theme) for variant in order)}
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=color, marker=marker, linestyle="none", markersize=6.5)
        for color, marker in families.values()
    ]
    handles.append(Line2D([], [], color=theme.soft, linestyle=(0, (4, 3)), linewidth=1.1))
    handles.append(Patch(color=pale(theme.palette[0], theme, 0.10)))
    words = [*families, "the checkpoint as it is", "level with the best (Tukey, 95 %)"]
    figure.legend(handles, words, loc="outside lower left", ncols=3, fontsize=8.5)


PICTURES: dict[str, Callable[[], Figure | None]] = {"tasks": methods_by_task}
"""File name -> what draws it."""
