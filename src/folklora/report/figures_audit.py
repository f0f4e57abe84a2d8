"""The picture of an audit: what a client owns and what of it leaves, and the bytes that left, by what they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from folklora.report.style import GREY, Theme, ThemeName, canvas, clean, drawing, headline
from folklora.report.tables import human_bytes

LEAVES, ONCE = 1, 4
"""Colours of the palette: what leaves in rounds, what leaves once; what stays is grey."""

NAMES = {
    "A": "factors A",
    "B": "factors B",
    "C": "cores C",
    "H": "heads H",
    "gain": "gains",
    "head": "task head",
    "norm": "LayerNorms",
    "index": "choices",
    "control": "control variates",
    "statistics": "class statistics",
    "mixtures": "class mixtures",
    "gradients": "weight gradients",
}


@dataclass(frozen=True)
class AuditPicture:
    """A figure of the audit; as `folklora.report.figures.Picture`, of its document."""

    name: str
    caption: str
    draw: Callable[[Mapping[str, Any], ThemeName], Figure | None]


def left(document: Mapping[str, Any], theme: ThemeName = "light") -> Figure | None:
    """Numbers that a client owns, by kind and whether they leave; beside them the bytes that left all clients."""
    owned = sorted(document["owned"], key=lambda entry: (not entry["leaves"], -entry["numbers"]))
    lines = [line for line in document["left"]["lines"] if line["bytes"]]
    if not owned and not lines:
        return None
    with drawing(theme) as colors:
        figure = canvas(1.25 + 0.34 * max(len(owned), len(lines), 2))
        panels = figure.subplots(1, bool(owned) + bool(lines), squeeze=False)[0]
        places = iter(panels)
        if owned:
            tones = [colors.palette[LEAVES if entry["leaves"] else GREY] for entry in owned]
            values = [entry["numbers"] for entry in owned]
            _bars(next(places), _names(owned), values, tones, [f"{value:,}" for value in values], colors)
            panels[0].set_xlabel("numbers that a client owns")
        if lines:
            tones = [colors.palette[ONCE if line["often"].startswith("once") else LEAVES] for line in lines]
            values = [line["bytes"] for line in lines]
            _bars(next(places), _names(lines), values, tones, [human_bytes(value) for value in values], colors)
            panels[-1].set_xlabel("bytes that left all clients together")
        headline(figure, "What leaves a client, and what stays")
        marks = {"leaves in each round": LEAVES, "leaves once": ONCE, "stays at home": GREY}
        figure.legend(
            handles=[Patch(color=colors.palette[slot], label=words) for words, slot in marks.items()],
            loc="outside lower left",
            ncols=3,
        )
        return figure


def _names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [NAMES.get(entry["kind"], entry["kind"]) for entry in entries]


def _bars(
    ax: Axes, names: Sequence[str], values: Sequence[int], tones: Sequence[str], told: Sequence[str], colors: Theme
) -> None:
    """Bars from the top, on a scale where a core is still seen beside a factor a thousand times its size."""
    clean(ax, colors, "none")
    places = range(len(names))
    ax.barh(places, values, 0.62, color=tones)
    ax.set_xscale("log")
    ax.set_xlim(min(values) / 3, max(values) * 12)
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.minorticks_off()
    for place, value, text in zip(places, values, told, strict=True):
        ax.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=9)


AUDIT_PICTURES = (
    AuditPicture(
        "audit",
        "Left: the numbers that a client owns, by kind; right: the bytes that have left all clients, by what they "
        "were. Both scales are logarithmic: a bar twice as long is many times as much.",
        left,
    ),
)
