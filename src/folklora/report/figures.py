"""The pictures of one run: each function takes a `Run` and returns a figure, or None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from folklora.backbones.metric import ACCURACY, Metric
from folklora.report.figures_privacy import epsilon
from folklora.report.heatmaps import partition, similarity, similarity_before, sizes
from folklora.report.reading import Run
from folklora.report.style import (
    GREY,
    ThemeName,
    bytes_axis,
    canvas,
    clean,
    drawing,
    headline,
    marks,
    round_axis,
    score_axis,
    short,
    spread_apart,
)
from folklora.report.tables import human_seconds

MANY_ROUNDS = 60  # from here on bars become thinner than the gaps between them: areas instead
MANY_CLIENTS = 32  # from here on names no longer fit under bars

PHASES = {"train": 0, "evaluate": 4, "aggregate": 1, "checkpoint": 3, "sketch": 2}


@dataclass(frozen=True)
class Picture:
    """A figure of the report: the name of its file, one line on how to read it, and the function that draws it."""

    name: str
    caption: str
    draw: Callable[[Run, ThemeName], Figure | None]


def validation(run: Run, theme: ThemeName = "light") -> Figure | None:
    """Mean validation score per round, the band from worst tenth to best client; below it the training loss."""
    evaluated = run.evaluated
    if not evaluated:
        return None
    metric = run.metric or ACCURACY
    losses = [(line.round, line.train_loss) for line in run.rounds if line.train_loss is not None]
    with drawing(theme) as colors:
        color = marks([run.method], colors)[run.method].color
        figure = canvas(4.6 if losses else 3.4)
        grid = figure.add_gridspec(2 if losses else 1, 1, height_ratios=[3, 1] if losses else [1])
        ax = clean(figure.add_subplot(grid[0]), colors)
        rounds = np.array([number for number, _ in evaluated])
        mean = np.array([v.mean for _, v in evaluated])
        worst = np.array([np.nan if v.worst_tenth is None else v.worst_tenth for _, v in evaluated])
        best = np.array([max(v.clients.values(), key=metric.merit, default=np.nan) for _, v in evaluated])
        marker = "o" if len(rounds) <= MANY_ROUNDS else ""
        ax.fill_between(rounds, worst, best, color=color, alpha=0.16, linewidth=0)
        ax.plot(rounds, mean, color=color, marker=marker, markersize=4.5)
        ends = [(mean[-1], "mean", color)]
        if len(run.clients) > 1:
            ends += [(worst[-1], "worst tenth", colors.soft), (best[-1], "best", colors.soft)]
        if len(rounds) == 1:  # a band needs two rounds
            ax.vlines(rounds, worst, best, color=color, alpha=0.3, linewidth=6)
        drops = [line.round for line in run.rounds if line.failed]
        if drops:
            ax.plot(
                drops,
                np.full(len(drops), 0.03),
                "x",
                color=colors.palette[1],
                transform=ax.get_xaxis_transform(),
                markersize=5,
                markeredgewidth=1.6,
            )
        for changed in (line.round for line in run.rounds if line.drift):
            ax.axvline(changed - 0.5, color=colors.soft, linewidth=1, linestyle=(0, (2, 2)))
        score_axis(ax, metric)
        round_axis(ax, sorted({*rounds.tolist(), *(line.round for line in run.rounds)}))
        _label_ends(ax, metric, [end for end in ends if np.isfinite(end[0])], rounds[-1])
        ax.set_ylabel(f"validation {metric.words}")
        headline(figure, f"Validation {metric.words}" + (" and training loss" if losses else ""))
        if losses:
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
            below = clean(figure.add_subplot(grid[1], sharex=ax), colors)
            below.plot(*np.array(losses).T, color=colors.soft, marker=marker, markersize=3.5, linewidth=1.5)
            below.yaxis.set_major_locator(MaxNLocator(3))
            below.set_ylabel("training\nloss")
            below.set_xlabel("round")
            figure.align_ylabels()
        return figure


def client_scores(run: Run, theme: ThemeName = "light") -> Figure | None:
    """Test score of each client, best first, above the size of its training split."""
    if not run.results:
        return None
    metric = run.metric or ACCURACY
    order = sorted(run.results, key=lambda client: -metric.merit(run.results[client].score))
    scores = np.array([run.results[client].score for client in order])
    tuned = [run.results[client].tuned for client in order]
    trained_on = np.array([run.results[client].examples.train for client in order])
    places = np.arange(len(order))
    with drawing(theme) as colors:
        color = marks([run.method], colors)[run.method].color
        figure = canvas(4.4)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        clean(top, colors)
        clean(bottom, colors)
        _bars(top, places, scores, color)
        _bars(bottom, places, trained_on, colors.palette[GREY])
        if run.rounds and any(value is not None for value in tuned):
            values = [np.nan if value is None else value for value in tuned]
            top.plot(places, values, "D", color=colors.ink, markersize=4 if len(order) <= MANY_CLIENTS else 2)
            top.plot([], [], "D", color=colors.ink, markersize=4, label="tuned at home, before the last reply")
        top.axhline(scores.mean(), color=colors.ink, linewidth=1, linestyle=(0, (4, 3)))
        top.plot(
            [],
            [],
            color=colors.ink,
            linewidth=1,
            linestyle=(0, (4, 3)),
            label=f"mean over clients, {metric.show(scores.mean())}",
        )
        if len(order) <= 12:
            for place, value in zip(places, scores, strict=True):
                top.annotate(
                    metric.number(value),
                    (place, 0),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    color=colors.paper,
                    fontsize=9,
                )
            for place, size in zip(places, trained_on, strict=True):
                bottom.annotate(f"{size}", (place, size), (0, 2), textcoords="offset points", ha="center", fontsize=8.5)
            bottom.margins(y=0.28)
        top.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, borderaxespad=0.3)
        score_axis(top, metric, whole=True)
        top.set_ylabel(f"test {metric.words}")
        headline(figure, f"Each client's test {metric.words}")
        bottom.set_ylabel("train\nexamples")
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        pad = max(0.7, (5 - len(order)) / 2)  # three bars need not fill the page
        bottom.set_xlim(-pad, len(order) - 1 + pad)
        if len(order) <= MANY_CLIENTS:
            names = [short(client) for client in order]
            crowded = (len(order) - 1 + 2 * pad) * max(map(len, names)) > 75
            bottom.set_xticks(places, names, rotation=40 if crowded else 0, ha="right" if crowded else "center")
            bottom.set_xlabel("client")
        else:
            bottom.set_xticks([])
            bottom.set_xlabel(f"{len(order)} clients, best first")
        figure.align_ylabels()
        return figure


def seconds(run: Run, theme: ThemeName = "light") -> Figure | None:
    """Wall time of each round, stacked by phase."""
    lines = [line for line in run.lines if line.seconds]
    if not lines:
        return None
    phases = list(dict.fromkeys(phase for line in lines for phase in line.seconds))
    totals = {phase: sum(line.seconds.get(phase, 0.0) for line in lines) for phase in phases}
    phases.sort(key=lambda phase: -totals[phase])
    rounds = np.array([line.round for line in lines])
    values = np.array([[line.seconds.get(phase, 0.0) for line in lines] for phase in phases])
    others = iter(slot for slot in (5, 6, 7, 8, 9) * len(phases))
    with drawing(theme) as colors:
        tones = [colors.palette[PHASES[phase] if phase in PHASES else next(others)] for phase in phases]
        labels = [f"{short(phase)}, {human_seconds(totals[phase])} in all" for phase in phases]
        figure = canvas(3.2)
        ax = clean(figure.add_subplot(), colors)
        if len(rounds) > MANY_ROUNDS:
            ax.stackplot(rounds, values, colors=tones, labels=labels, step="mid")
        else:
            base = np.zeros(len(rounds))
            for value, tone, label in zip(values, tones, labels, strict=True):
                ax.bar(rounds, value, 0.75, bottom=base, color=tone, label=label)
                base += value
        round_axis(ax, rounds.tolist(), bars=True)
        ax.set_ylabel("seconds")
        headline(figure, "Time of each round")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), reverse=True)
        return figure


def traffic(run: Run, theme: ThemeName = "light") -> Figure | None:
    """Bytes of all clients together: once before the first round, and in each round."""
    if not sum(line.bytes_up + line.bytes_down for line in run.lines):
        return None
    once = run.once if run.once and run.once.bytes_up + run.once.bytes_down else None
    panels = ([[once]] if once else []) + ([list(run.rounds)] if run.rounds else [])
    with drawing(theme) as colors:
        figure = canvas(3.2)
        ratios = [1.4, 5] if len(panels) == 2 else [1]
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
        up, down = colors.palette[0], colors.palette[1]
        for ax, lines in zip(axes, panels, strict=True):
            clean(ax, colors)
            bytes_axis(ax)
            rounds = np.array([line.round for line in lines])
            sent = np.array([line.bytes_up for line in lines])
            received = np.array([line.bytes_down for line in lines])
            if len(rounds) > MANY_ROUNDS:
                ax.plot(rounds, sent, color=up, linewidth=1.5, label="up")
                ax.plot(rounds, received, color=down, linewidth=1.5, linestyle="--", label="down")
            else:
                ax.bar(rounds - 0.2, sent, 0.38, color=up, label="up, clients to server")
                ax.bar(rounds + 0.2, received, 0.38, color=down, label="down, server to clients")
            ax.set_ylim(0, max(1, 1.08 * max(sent.max(), received.max())))
            ax.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
            if lines == [once]:
                ax.set_xticks([-0.2, 0.2], ["up", "down"])
                side = 0.6 if run.rounds else 2.0
                ax.set_xlim(-side, side)
                ax.set_xlabel("once, before round 1")
            else:
                round_axis(ax, rounds.tolist(), bars=True)
        axes[0].set_ylabel("bytes, all clients together")
        nothing = "" if once or run.once is None else " (nothing is sent once, before round 1)"
        headline(figure, f"Traffic{nothing}")
        axes[-1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
        return figure


RUN_PICTURES = (
    Picture(
        "validation",
        "Line: mean over clients. Band: from the worst tenth of the clients to the best one; the narrower it is, the "
        "more evenly the clients are served. A cross at the bottom marks a round in which clients dropped out; from a "
        "dotted line on, some have other data.",
        validation,
    ),
    Picture(
        "clients",
        "A bar is how one client does on its own test split with the model it ends with, best first; a diamond, the "
        "model as its own last training left it, before the server's last reply. Below, how much it trained on.",
        client_scores,
    ),
    Picture(
        "partition",
        "Each line is a client, each column a class; an empty cell means that the client has none of the class. "
        "To the right, the sizes of its splits.",
        partition,
    ),
    Picture("sizes", "How many examples each client holds, and how they are split.", sizes),
    Picture(
        "similarity",
        "How alike the method holds the clients to be, the diagonal left out; in the weights, line i shows what "
        "client i's reply is mixed from.",
        similarity,
    ),
    Picture(
        "similarity-before",
        "The same before some clients' data changed: where the method follows, the last picture is another.",
        similarity_before,
    ),
    Picture(
        "privacy",
        "What differential privacy of training has cost by the end of each round, for the one that it cost most; the "
        "smaller epsilon, the less can be told of a single one.",
        epsilon,
    ),
    Picture(
        "seconds",
        "The height of a bar is the wall time of a round; its parts are the phases. Round 0 is what happens once, "
        "before the first.",
        seconds,
    ),
    Picture(
        "traffic",
        "Bytes of encoded messages, summed over clients; what is sent once has a scale of its own.",
        traffic,
    ),
)


def _bars(ax: Axes, places: np.ndarray, values: np.ndarray, color: str) -> None:
    if len(places) <= 4 * MANY_CLIENTS:
        ax.bar(places, values, 0.72, color=color)
    else:  # thinner than a pixel: one area
        ax.fill_between(places, values, step="mid", color=color, linewidth=0)


def _label_ends(ax: Axes, metric: Metric, ends: list[tuple[float, str, str]], last: float) -> None:
    """Names beside the last point of each line, never closer than a line of text."""
    places = spread_apart([value for value, _, _ in ends], 0.075 * float(np.ptp(ax.get_ylim())))
    for (value, text, color), place in zip(ends, places, strict=True):
        label = f"{text} {metric.number(value)}"
        ax.annotate(label, (last, place), (8, 0), textcoords="offset points", color=color, va="center")
