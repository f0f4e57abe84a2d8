"""The pictures of a data audit: lengths and labels, copies, and how regular the data are beside random orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from folklora.report.style import GREY, Theme, ThemeName, canvas, clean, drawing, headline, percent_axis, short

MOST_LABELS = 25
OWN, EXACT, NEAR = 0, 1, 4
"""Colours of the palette."""


@dataclass(frozen=True)
class DataPicture:
    """A figure of a data audit; as `folklora.report.figures.Picture`, of its document."""

    name: str
    caption: str
    draw: Callable[[Mapping[str, Any], ThemeName], Figure | None]


def lengths(document: Mapping[str, Any], theme: ThemeName = "light") -> Figure | None:
    """How long examples are."""
    bars = document["profile"]["histogram"]
    unit = "words" if document["data"]["kind"] == "text" else "items"
    with drawing(theme) as colors:
        figure = canvas(2.7)
        ax = clean(figure.subplots(), colors)
        width = bars[0][1] - bars[0][0] + 1
        starts = [start for start, _, _ in bars]
        ax.bar(starts, [count for _, _, count in bars], 0.9 * width, align="edge", color=colors.palette[OWN])
        median = document["profile"]["lengths"]["0.5"]
        ax.axvline(median + 0.5, color=colors.palette[1], linewidth=1.5)
        _beside(ax, median + 0.5, f"median {median:g}", colors)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        ax.set_xlabel(f"{unit} of an example; the last bar: {bars[-1][0]} or more" if len(bars) > 1 else unit)
        ax.set_ylabel("examples")
        headline(figure, "How long examples are")
        return figure


def _beside(ax: Axes, place: float, words: str, colors: Theme) -> None:
    ax.annotate(words, (place, 0.97), (5, 0), xycoords=ax.get_xaxis_transform(), textcoords="offset points", va="top",
                fontsize=9, color=colors.soft)  # fmt: skip


def labels(document: Mapping[str, Any], theme: ThemeName = "light") -> Figure | None:
    """How many examples each label has, the most frequent ones."""
    found = document["profile"]["labels"]
    if not found:
        return None
    shown = list(found.items())[:MOST_LABELS]
    in_all = document["profile"]["labels_in_all"]
    with drawing(theme) as colors:
        figure = canvas(1.1 + 0.24 * max(len(shown), 2))
        ax = clean(figure.subplots(), colors, "x")
        places = range(len(shown))
        ax.barh(places, [count for _, count in shown], 0.66, color=colors.palette[OWN])
        ax.set_yticks(places, [short(name, 34) for name, _ in shown])
        ax.invert_yaxis()
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        ax.set_xlabel("examples")
        of = f", the first {len(shown)} of {in_all}" if in_all > len(shown) else ""
        headline(figure, f"How many examples each label has{of}")
        return figure


def copies(document: Mapping[str, Any], theme: ThemeName = "light") -> Figure | None:
    """Examples that are like no other, near copies, exact copies: one bar."""
    found, total = document["duplicates"], document["profile"]["examples"]
    exact = found["exact"]["share"]
    near = max(0.0, found["near"]["share"] - exact)
    parts = (("different", 1 - exact - near, OWN), ("near copies", near, NEAR), ("exact copies", exact, EXACT))
    with drawing(theme) as colors:
        figure = canvas(1.75)
        ax = clean(figure.subplots(), colors, "none")
        left = 0.0
        for name, share, slot in parts:
            ax.barh([0], [share], 0.5, left=left, color=colors.palette[slot], label=f"{name}: {share * total:,.0f}")
            left += share
        ax.set_xlim(0, 1)
        ax.set_yticks([])
        percent_axis(ax, "x")
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        headline(figure, f"Copies among {total:,} examples")
        figure.legend(loc="outside lower left", ncols=3)
        return figure


def order(document: Mapping[str, Any], theme: ThemeName = "light") -> Figure | None:
    """Approximate entropy of the data beside that of the same words in random order."""
    found = document["surrogates"]
    if found["observed"] is None or found["observed"] < 0 or not found["mean"] > 0:
        return None  # below 0 where texts are very short: no length of a bar
    with drawing(theme) as colors:
        figure = canvas(2.0)
        ax = clean(figure.subplots(), colors, "x")
        values = [found["observed"], found["mean"]]
        ax.barh([0, 1], values, 0.56, color=[colors.palette[OWN], colors.palette[GREY]])
        spread = 2 * found["spread"] * found["mean"]
        ax.errorbar([found["mean"]], [1], xerr=[spread], color=colors.ink, capsize=3, linewidth=1.2)
        for place, value in enumerate(values):
            ax.annotate(f"{value:.3g}", (value + (spread if place else 0), place), (7, 0), textcoords="offset points",
                        va="center", fontsize=9)  # fmt: skip
        ax.set_yticks([0, 1], ["these data", "in random order"])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.14 * max(values))
        ax.set_xlabel("approximate entropy, nats")
        headline(figure, f"{values[0] / values[1]:.0%} of the uncertainty that random order would have")
        return figure


DATA_PICTURES = (
    DataPicture(
        "order",
        "How uncertain the next word or item is. The same in random order (grey; two standard deviations of 20 "
        "shuffles) is what noise looks like: the closer the two bars, the less order there is.",
        order,
    ),
    DataPicture("copies", "Of each group of copies one example counts as different, the others as copies.", copies),
    DataPicture("lengths", "How many examples have which length; the line is the median.", lengths),
    DataPicture("labels", "How many examples each label has. This stays with the client.", labels),
)
