"""The pictures of compared runs: methods against each other, over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from folklora.backbones.metric import Metric
from folklora.report.reading import Comparison, Run
from folklora.report.style import (
    DASHED,
    ThemeName,
    bytes_axis,
    canvas,
    clean,
    drawing,
    headline,
    marks,
    pale,
    round_axis,
    score_axis,
    spread_apart,
    title,
)
from folklora.report.tables import Spread, by_variant, human_bytes


@dataclass(frozen=True)
class ComparePicture:
    """A figure of the comparison: the name of its file, one line on how to read it, and the function that draws it."""

    name: str
    caption: str
    draw: Callable[[Comparison, ThemeName], Figure | None]


@dataclass(frozen=True)
class Curve:
    """The validation score of a method, over seeds.

    Attributes
    ----------
    rounds
        [R] rounds at which every seed has been evaluated at least once, or is evaluated now.
    mean, std
        [R] score over seeds; the sample standard deviation is zero for a single seed.
    sent
        [R] bytes that a client has sent up to and including the round, the one-off bytes among them; mean over
        clients and seeds.
    """

    rounds: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    sent: np.ndarray


@dataclass(frozen=True)
class Level:
    """The one score of a method without rounds, over seeds; `remark` says so where it is not validation."""

    score: float
    remark: str


def sent_per_client(run: Run) -> dict[int, float]:
    """Round -> bytes that a client has sent so far (mean over all clients of the run), round 0 included."""
    rounds = [line.round for line in run.lines]
    total = np.cumsum([line.bytes_up for line in run.lines], dtype=float) / len(run.clients)
    return dict(zip(rounds, total.tolist(), strict=True))


def curve(runs: list[Run]) -> Curve | None:
    """The runs of one method as one curve; None where no round was evaluated.

    A run that stopped early keeps its model and sends nothing more: its last values stand for the later rounds.
    """
    tracks = []
    for run in runs:
        sent = sent_per_client(run)
        track = [(number, validation.mean, sent[number]) for number, validation in run.evaluated]
        if not track:
            return None
        tracks.append(np.array(track))
    rounds = np.unique(np.concatenate([track[:, 0] for track in tracks]))
    rounds = rounds[rounds >= max(track[0, 0] for track in tracks)]
    picks = [np.searchsorted(track[:, 0], rounds, side="right") - 1 for track in tracks]
    scores = np.stack([track[pick, 1] for track, pick in zip(tracks, picks, strict=True)])
    sent_so_far = np.stack([track[pick, 2] for track, pick in zip(tracks, picks, strict=True)])
    std = scores.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(rounds))
    return Curve(rounds, scores.mean(axis=0), std, sent_so_far.mean(axis=0))


def score_per_round(comparison: Comparison, theme: ThemeName = "light") -> Figure | None:
    """Validation score of every method, round by round, with the spread over seeds."""
    metric = comparison.metric
    curves, levels = _curves(comparison)
    if not curves:
        return None
    every = sorted({int(number) for each in curves.values() for number in each.rounds})
    with drawing(theme) as colors:
        style = marks([*curves, *levels], colors)
        height = max(3.8, 0.3 * (len(curves) + len(levels)) + 1.2)
        figure = canvas(height)
        ax = clean(figure.add_subplot(), colors)
        ends: list[tuple[float, float, str, str]] = []
        for name, each in curves.items():
            mark = style[name]
            flat = len(each.rounds) == 1 and len(every) > 1  # a method without rounds: its one value, all along
            if flat:
                ax.axhline(each.mean[0], color=mark.color, linewidth=1.5, linestyle=DASHED)
            else:
                ax.fill_between(
                    each.rounds, each.mean - each.std, each.mean + each.std, color=mark.color, alpha=0.15, linewidth=0
                )
                step = max(1, len(each.rounds) // 12)
                ax.plot(
                    each.rounds,
                    each.mean,
                    color=mark.color,
                    marker=mark.marker,
                    linestyle=mark.line,
                    markersize=5,
                    markevery=step,
                )
            ends.append((every[-1] if flat else each.rounds[-1], each.mean[-1], name, ""))
        for name, level in levels.items():
            ax.axhline(level.score, color=style[name].color, linewidth=1.5, linestyle=DASHED)
            ends.append((every[-1], level.score, name, level.remark))
        round_axis(ax, every)
        score_axis(ax, metric)
        low, high = ax.get_ylim()
        places = spread_apart([(y - low) / (high - low) for _, y, _, _ in ends], 0.185 / (height - 0.8))
        places -= max(0.0, places.max() - 1.0) if len(places) else 0.0
        for (x, y, name, remark), place in zip(ends, places, strict=True):
            ax.annotate(
                f"{title(name)} {metric.number(y)}{remark}",
                (x, y),
                (1.035, place),
                textcoords="axes fraction",
                va="center",
                color=style[name].color,
                fontweight="bold",
                fontsize=9,
                arrowprops={
                    "arrowstyle": "-",
                    "color": style[name].color,
                    "linewidth": 0.7,
                    "alpha": 0.6,
                    "relpos": (0, 0.5),
                    "shrinkB": 4,
                },
            )
        ax.set_ylabel(f"validation {metric.words}, mean over clients")
        headline(figure, f"{metric.words.capitalize()} per round")
        return figure


def score_per_byte(comparison: Comparison, theme: ThemeName = "light") -> Figure | None:
    """Validation score against the bytes a client has sent by then, the one-off bytes included."""
    metric = comparison.metric
    curves, levels = _curves(comparison)
    once = {name: _sent_in_all(comparison.finished_runs(name)) for name in levels}
    if not curves and not levels:
        return None
    with drawing(theme) as colors:
        style = marks([*curves, *levels], colors)
        figure = canvas(max(4.4, 0.41 * (len(curves) + len(levels)) + 0.6))
        ax = clean(figure.add_subplot(), colors)
        ax.set_xscale("log")
        entries: list[tuple[float, str, Line2D]] = []
        for name, each in curves.items():
            mark, sends = style[name], each.sent > 0
            if not sends.any():
                ax.axhline(each.mean[-1], color=mark.color, linewidth=1.8, linestyle=DASHED)
                handle = Line2D([], [], color=mark.color, linestyle=DASHED)
                text = f"{title(name)}  {metric.show(each.mean[-1])}\nsends nothing"
                entries.append((each.mean[-1], text, handle))
                continue
            x, mean, std = each.sent[sends], each.mean[sends], each.std[sends]
            ax.fill_between(x, mean - std, mean + std, color=mark.color, alpha=0.13, linewidth=0)
            ax.plot(
                x,
                mean,
                color=mark.color,
                marker=mark.marker,
                linestyle=mark.line,
                markersize=3.5,
                markevery=max(1, len(x) // 20),
            )
            ax.plot(x[-1], mean[-1], color=mark.color, marker=mark.marker, markersize=9, markeredgecolor=colors.paper)
            handle = Line2D([], [], color=mark.color, marker=mark.marker, linestyle=mark.line, markersize=7)
            text = f"{title(name)}  {metric.show(mean[-1])}\n{human_bytes(x[-1])} sent"
            entries.append((mean[-1], text, handle))
        for name, level in levels.items():
            mark = style[name]
            hollow: dict[str, Any] = {
                "color": mark.color,
                "marker": mark.marker,
                "markerfacecolor": colors.paper,
                "markersize": 9,
            }
            if once.get(name):
                ax.plot([once[name]], [level.score], linestyle="none", **hollow)
                handle, sent = Line2D([], [], linestyle="none", **hollow), f"{human_bytes(once[name])} sent"
            else:
                ax.axhline(level.score, color=mark.color, linewidth=1.8, linestyle=DASHED)
                handle, sent = Line2D([], [], color=mark.color, linestyle=DASHED), "sends nothing"
            text = f"{title(name)}  {metric.show(level.score)}{level.remark}\n{sent}"
            entries.append((level.score, text, handle))
        entries.sort(key=lambda entry: -entry[0])  # from above, as the curves end
        ax.legend(
            [handle for _, _, handle in entries],
            [text for _, text, _ in entries],
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            labelspacing=0.9,
        )
        if not any(each.sent.any() for each in curves.values()) and not any(once.get(name) for name in levels):
            ax.set_xlim(1, 10)
            ax.xaxis.set_major_locator(NullLocator())
            ax.xaxis.set_minor_locator(NullLocator())
        else:
            ax.margins(x=0.06)
            ax.xaxis.set_major_locator(FixedLocator(_log_ticks(*ax.get_xlim())))
            ax.xaxis.set_minor_locator(NullLocator())
            bytes_axis(ax, "x")
            ax.grid(axis="x", color=colors.grid, linewidth=0.8)
        score_axis(ax, metric)
        ax.set_xlabel("sent by a client so far, one-off uploads included (log scale)")
        ax.set_ylabel(f"validation {metric.words}, mean over clients")
        headline(figure, "What a byte buys")
        return figure


def final_scores(comparison: Comparison, theme: ThemeName = "light") -> Figure | None:
    """Final test score of each method, a dot for each seed, and the worst tenth of the clients."""
    groups = by_variant(comparison.rows)
    metric = comparison.metric
    key = f"{metric.name}_mean"
    means, worst = _spreads(comparison, key), _spreads(comparison, f"{metric.name}_worst_tenth")
    names = [name for name in groups if name in means]
    if not names:
        return None
    with drawing(theme) as colors:
        style = marks(groups, colors)
        figure = canvas(0.42 * len(names) + 1.3)
        ax = clean(figure.add_subplot(), colors, "x")
        for place, name in enumerate(names):
            color, mean = style[name].color, means[name]
            ax.barh(place, mean.mean, 0.62, color=pale(color, colors, 0.35))
            dots = [float(row[key]) for row in groups[name] if row.get(key) is not None]
            shift = np.linspace(-0.18, 0.18, len(dots)) if len(dots) > 1 else np.zeros(1)
            ax.plot(
                dots, place + shift, "o", color=color, markersize=5, markeredgecolor=colors.paper, markeredgewidth=0.7
            )
            drawn = [mean.mean, *dots]
            if name in worst:
                drawn.append(worst[name].mean)
                ax.plot([worst[name].mean] * 2, [place - 0.31, place + 0.31], color=color, linewidth=2.4)
            label = mean.show(metric.number)
            ax.annotate(label, (max(drawn), place), (9, 0), textcoords="offset points", va="center", fontweight="bold")
        ax.set_yticks(range(len(names)), [title(name) for name in names], color=colors.ink, fontsize=9.5)
        ax.set_ylim(len(names) - 0.5, -0.5)
        score_axis(ax, metric, "x", whole=True)
        ax.set_xlabel(f"test {metric.words}, mean over clients")
        headline(figure, f"Test {metric.words}")
        grey = colors.soft
        ax.legend(
            [
                Line2D([], [], color=grey, marker="o", markersize=5, linestyle="none"),
                Line2D([], [], color=grey, marker="|", markersize=11, markeredgewidth=2.4, linestyle="none"),
            ],
            ["one seed", "worst tenth of the clients"],
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=2,
            borderaxespad=0.2,
        )
        return figure


def client_profile(comparison: Comparison, theme: ThemeName = "light") -> Figure | None:
    """Test scores of the clients of each method, from the worst to the best served one, mean over seeds.

    Clients are matched by their place, not by their id: another seed is another partition, whose client 3 is somebody
    else.
    """
    metric = comparison.metric
    groups: dict[str, list[list[float]]] = {}
    for name in by_variant(comparison.rows):
        results = [run.results.values() for run in comparison.finished_runs(name) if run.results]
        if results:
            groups[name] = [[result.score for result in each] for each in results]
    if not groups:
        return None
    columns = min(3 if max(map(len, groups)) <= 20 else 2, len(groups))  # a title must fit over its panel
    lines = -(-len(groups) // columns)
    with drawing(theme) as colors:
        style = marks(by_variant(comparison.rows), colors)
        figure = canvas(1.75 * lines + 0.6)
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for ax in panels.flat[len(groups) :]:
            ax.set_visible(False)
        for ax, (name, seeds) in zip(panels.flat, groups.items(), strict=False):
            clean(ax, colors)
            count = max(map(len, seeds))
            places = np.linspace(*((0, 1) if metric.higher else (1, 0)), count)
            heights = np.mean([np.quantile(each, places) for each in seeds], axis=0)
            ax.bar(range(count), heights, 0.8 if count <= 50 else 1.0, color=style[name].color)
            ax.axhline(heights.mean(), color=colors.ink, linewidth=1, linestyle=(0, (4, 3)))
            ax.set_xticks([])
            ax.set_title(f"{title(name)} {metric.number(heights.mean())}", fontsize=9.5, color=style[name].color, pad=5)
        for ax in panels.flat[: len(groups)]:  # they share one scale, which the last bar may still widen
            score_axis(ax, metric, whole=True)
        for ax in panels[:, 0]:
            ax.set_ylabel(f"test {metric.words}")
        headline(figure, "Clients from the worst to the best served")
        return figure


def compare_pictures(metric: Metric) -> tuple[ComparePicture, ...]:
    """The pictures of runs that are judged by a metric."""
    better, unit = "Up" if metric.higher else "Down", " in per cent" if metric.percent else ""
    return (
        ComparePicture(
            f"{metric.name}-per-byte",
            f"{better} is better, left is cheaper. One-off uploads count from the first point on; a method that sends "
            f"nothing is a dashed line at its last {metric.words}.",
            score_per_byte,
        ),
        ComparePicture(
            f"{metric.name}-per-round",
            f"{better} is better. Line: mean over seeds. Band: ± one standard deviation over seeds. The number is the "
            f"last validation {metric.words}{unit}; a dashed line is a method without rounds.",
            score_per_round,
        ),
        ComparePicture(
            f"test-{metric.name}",
            f"A bar is the mean over seeds, the {'longer' if metric.higher else 'shorter'} the better; the upright "
            "stroke tells how the worst tenth of the clients fare.",
            final_scores,
        ),
        ComparePicture(
            "client-profile",
            "Each bar is a client's place, not a client: another seed is another partition. Dashed: mean. Flat is "
            "fair.",
            client_profile,
        ),
    )


def _curves(comparison: Comparison) -> tuple[dict[str, Curve], dict[str, Level]]:
    """Curves of the methods that were validated round by round, and the one level of those that never were."""
    curves: dict[str, Curve] = {}
    levels: dict[str, Level] = {}
    for name, rows in by_variant(comparison.rows).items():
        runs = comparison.finished_runs(name)
        each = curve(runs) if runs else None
        if each is not None:
            curves[name] = each
        elif (last := Spread.of(rows, "validation_mean")) is not None:
            levels[name] = Level(last.mean, "")
        elif (last := Spread.of(rows, f"{comparison.metric.name}_mean")) is not None:
            levels[name] = Level(last.mean, " (test)")
    return curves, levels


def _sent_in_all(runs: list[Run]) -> float:
    """Bytes a client has sent when all is done: mean over clients and runs."""
    totals = [[*sent_per_client(run).values()][-1:] for run in runs]
    return float(np.mean([total for each in totals for total in each] or [0.0]))


def _spreads(comparison: Comparison, key: str) -> dict[str, Spread]:
    spreads = {name: Spread.of(group, key) for name, group in by_variant(comparison.rows).items()}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within a positive range, as many as a log axis has room for."""
    steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 10 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
