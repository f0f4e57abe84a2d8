"""The pictures of `accuracy.py`'s results, from ``results/accuracy.json`` alone; and those of `privacy_figures.py`.

python benchmarks/figures.py            # rewrite docs/figures/*.png
python benchmarks/figures.py --check    # exit 1 if one is out of date
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import depth_tables
import drift_tables
import experts_tables
import law_tables
import newcomers_tables
import privacy_figures
import quality_tables
import serving_tables
import shots_tables
import table_parts
import task_figures
from accuracy_tables import MAIN, Results, accuracy_results, bought_results, equal_rank
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from method_marks import kind, name

from folklora.report.ranking import Scores, complete, rank_difference, ranking
from folklora.report.style import (
    Theme,
    bytes_axis,
    canvas,
    clean,
    drawing,
    headline,
    pale,
    percent_axis,
    png,
    spread_apart,
)

LINE = 0.175  # inches that a label needs


def accuracy_against_bytes(results: Results, setting: str) -> Figure | None:
    """Test accuracy of every method against all that a client moved in the run; up is better, left is cheaper."""
    points = []
    for variant in results.variants("methods", [setting]):
        values = list(results.values(variant, setting).values())
        if values:
            points.append((results.moved(variant, setting) or 0.0, values, variant))
    if not points:
        return None
    points.sort(key=lambda point: statistics.fmean(point[1]))
    with drawing("light") as theme:
        height = max(4.0, LINE * len(points) + 1.3)
        figure = canvas(height, 8.6)
        ax = clean(figure.add_subplot(), theme)
        sent = [moved for moved, _, _ in points if moved]
        nothing = min(sent, default=1.0) / 4  # a log axis has no zero: what sends nothing stands left of all others
        ax.set_xscale("log")
        families: dict[str, tuple[str, str]] = {}
        means = [statistics.fmean(values) for _, values, _ in points]
        for (moved, values, variant), mean in zip(points, means, strict=True):
            family, color, marker = kind(variant, theme)
            families[family] = (color, marker)
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            ax.errorbar(moved or nothing, mean, error, color=pale(color, theme, 0.45), linewidth=1.1, zorder=2)
            ax.plot(
                moved or nothing,
                mean,
                marker=marker,
                color=color,
                markersize=7,
                markeredgecolor=theme.paper,
                linestyle="none",
                zorder=3,
            )
        left = nothing if len(sent) < len(points) else min(sent)
        ax.set_xlim(left / 1.6, max(sent, default=10.0) * 1.7)
        _frontier(ax, theme, [moved or nothing for moved, _, _ in points], means)
        percent_axis(ax)
        low, high = min(sent, default=1.0) / 2, ax.get_xlim()[1]
        steps = (1, 3) if high / low < 1000 else (1,)
        ticks = [step * 10.0**power for power in range(2, 10) for step in steps if low < step * 10.0**power < high]
        bytes_axis(ax, "x")
        ax.xaxis.set_major_locator(FixedLocator([nothing, *ticks] if len(sent) < len(points) else ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        written = ax.xaxis.get_major_formatter()
        ax.xaxis.set_major_formatter(lambda value, at: "nothing" if value == nothing else written(value, at))
        ax.set_xlabel("moved by a client in the whole run, both ways, one-off included (log scale)")
        ax.set_ylabel("test accuracy, mean over clients")
        ends = []
        most = max(len(values) for _, values, _ in points)
        for (moved, values, variant), mean in zip(points, means, strict=True):
            missing = f" ({len(values)} of {results.seeds})" if len(values) < most else ""
            ends.append((moved or nothing, mean, variant, f"{name(variant)}  {100 * mean:.1f}{missing}"))
        _labels(ax, theme, ends, height)
        _legend(ax, theme, families)
        partial = f", {most} of {results.seeds} seeds" if most < results.seeds else ""
        headline(figure, f"What a byte buys: {setting}{partial}")
        return figure


def _frontier(ax: Axes, theme: Theme, moved: Sequence[float], means: Sequence[float]) -> None:
    """The best accuracy for that many bytes or fewer."""
    order = sorted(range(len(moved)), key=lambda i: (moved[i], -means[i]))
    best: list[int] = []
    for i in order:
        if not best or means[i] > means[best[-1]]:
            best.append(i)
    x = [moved[i] for i in best] + [ax.get_xlim()[1]]
    y = [means[i] for i in best] + [means[best[-1]]]
    ax.step(x, y, where="post", color=theme.soft, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)


def _labels(ax: Axes, theme: Theme, points: Sequence[tuple[float, float, str, str]], height: float) -> None:
    """Names in a column at the right, in the order of accuracy, each tied to its point."""
    low, high = ax.get_ylim()
    places = spread_apart([(mean - low) / (high - low) for _, mean, _, _ in points], LINE / (height - 0.9))
    places = places + min(0.0, 1.0 - places.max()) if len(places) else places
    for (x, mean, variant, text), place in zip(points, places, strict=True):
        color = kind(variant, theme)[1]
        ax.annotate(
            text,
            (x, mean),
            (1.05, float(place)),
            textcoords="axes fraction",
            va="center",
            color=color,
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": pale(color, theme, 0.35),
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkB": 5,
            },
        )


def _legend(ax: Axes, theme: Theme, families: dict[str, tuple[str, str]]) -> None:
    handles = [Line2D([], [], color=c, marker=m, linestyle="none", markersize=7) for c, m in families.values()]
    handles.append(Line2D([], [], color=theme.soft, linestyle=(0, (4, 3)), linewidth=1.1))
    below = -0.55 / ax.figure.get_figheight()  # under the axis' own title
    ax.legend(
        handles,
        [*families, "the best for so many bytes"],
        loc="upper center",
        bbox_to_anchor=(0.5, below),
        ncols=2,
        fontsize=8.5,
        borderaxespad=0.3,
    )


def mean_ranks(scores: Scores, what: str) -> Figure | None:
    """Mean rank of every method with its bootstrap interval; the band holds who is level with the first."""
    if len(scores.methods) < 2:
        return None
    places = ranking(scores)
    with drawing("light") as theme:
        figure = canvas(0.24 * len(places) + 1.35, 7.6)
        ax = clean(figure.add_subplot(), theme, "x")
        difference = rank_difference(scores)
        if difference is not None:
            band = ax.axvspan(places[0].mean, places[0].mean + difference, color=pale(theme.palette[0], theme, 0.10))
            band.set_zorder(0)
        for row, place in enumerate(places):
            color = theme.palette[0] if place.level else theme.palette[9]
            if place.low is not None and place.high is not None:
                ax.plot([place.low, place.high], [row, row], color=pale(color, theme, 0.55), linewidth=2.2)
            ax.plot(place.mean, row, "o", color=color, markersize=7, markeredgecolor=theme.paper)
            right = place.mean if place.high is None else place.high
            ax.annotate(
                f"{place.mean:.1f}", (right, row), (7, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        ax.set_yticks(range(len(places)), [name(place.method) for place in places], color=theme.ink, fontsize=9)
        ax.set_ylim(len(places) - 0.4, -0.6)
        ax.set_xlim(0.5, len(places) + 1.2)
        step = max(1, round(len(places) / 8))
        ax.set_xticks([1, *range(1 + step, len(places) + 1, step)])
        settings, blocks = table_parts.counted(len(set(scores.settings)), "setting"), len(scores.values)
        ax.set_xlabel(f"mean rank (1 is best) over {settings}, {blocks} blocks of setting and seed")
        told = [Line2D([], [], color=theme.palette[0], marker="o", markersize=7, linewidth=2.2)]
        words = ["level with the first (shaded: Tukey, 95 %)"]
        if not all(place.level for place in places):
            told.append(Line2D([], [], color=theme.palette[9], marker="o", markersize=7, linewidth=2.2))
            words.append("behind the first")
        ax.legend(told, words, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, fontsize=8.5)
        headline(figure, f"Mean ranks {what}, 95 % bootstrap intervals")
        return figure


def pictures(results: Results) -> dict[str, Callable[[], Figure | None]]:
    """File name -> what draws it, or None where there is nothing to draw yet."""
    found: dict[str, Callable[[], Figure | None]] = {
        "bytes-banking77": lambda: accuracy_against_bytes(results, MAIN[0]),
        "bytes-snips": lambda: accuracy_against_bytes(results, MAIN[3]),
        "bytes-sgd": lambda: accuracy_against_bytes(results, "sgd by service"),
    }
    for file, values, what in (
        ("mean-ranks", equal_rank(results), "at equal rank"),
        ("mean-ranks-bytes", bought_results(results), "at FedIT's bytes"),
    ):
        if values:
            scores = complete(values)
            found[file] = lambda scores=scores, what=what: mean_ranks(scores, what)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--to", type=Path, default=table_parts.FIGURES)
    parser.add_argument("--results", type=Path, default=table_parts.RESULTS)
    arguments = parser.parse_args()
    table_parts.RESULTS = arguments.results
    stale = []
    others = {**privacy_figures.PICTURES, **newcomers_tables.PICTURES}
    others |= {**depth_tables.PICTURES, **drift_tables.PICTURES, **experts_tables.PICTURES, **shots_tables.PICTURES}
    others |= {**law_tables.PICTURES, **task_figures.PICTURES}
    others |= {**quality_tables.PICTURES, **serving_tables.PICTURES}
    for file, draw in {**pictures(accuracy_results()), **others}.items():
        figure, path = draw(), arguments.to / f"{file}.png"
        if figure is None:
            continue
        drawn = png(figure, "light")
        if not path.exists() or path.read_bytes() != drawn:
            stale.append(path.name)
            if not arguments.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(drawn)
    print(f"{'out of date' if arguments.check else 'drawn'}: {', '.join(stale) or 'nothing'}", file=sys.stderr)
    raise SystemExit(1 if arguments.check and stale else 0)


if __name__ == "__main__":
    main()
