"""How every picture looks: two themes, a colour-blind-safe palette, colours that stay with a method's name."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from folklora.backbones.metric import Metric
from folklora.report.tables import human_bytes

ThemeName = Literal["light", "dark"]
LineStyle = Literal["-"] | tuple[float, Sequence[float]]
DASHED: LineStyle = (0, (5, 3))
DOTTED: LineStyle = (0, (2, 1))
WIDTH = 7.6  # inches; at 10 points the text is as large as the page's own
DPI = 170


@dataclass(frozen=True)
class Theme:
    """The colours of one theme; `palette` holds the same hues in both."""

    paper: str
    ink: str
    soft: str
    grid: str
    heat: LinearSegmentedColormap
    palette: tuple[str, ...]


@dataclass(frozen=True)
class Mark:
    """Colour, marker and line of a method: colour alone must not carry the meaning."""

    color: str
    marker: str
    line: LineStyle = "-"


def _scale(*colors: str) -> LinearSegmentedColormap:
    """From few to many: the first colour still stands out from the paper, which means none."""
    return LinearSegmentedColormap.from_list("heat", colors)


# Okabe and Ito's hues (jfly.uni-koeln.de/color), deepened for thin lines on white and lightened for the dark page.
THEMES: dict[ThemeName, Theme] = {
    "light": Theme(
        paper="#ffffff",
        ink="#1c2430",
        soft="#5d6878",
        grid="#e4e8ee",
        heat=_scale("#d3ebe0", "#7cc8c4", "#3595c0", "#1c5d99", "#13315c"),
        palette=(
            *("#0072b2", "#d55e00", "#009e73", "#b8578f", "#c98a00", "#3ba3dc"),
            *("#882255", "#7f8a1f", "#5b4bb5", "#77808c"),
        ),
    ),
    "dark": Theme(
        paper="#171c24",
        ink="#e6eaf0",
        soft="#9aa6b6",
        grid="#2b3340",
        heat=_scale("#1e3a5c", "#23649a", "#3a9bc1", "#7fd0c4", "#e2f6e6"),
        palette=(
            *("#4fa8e0", "#ff8a4c", "#2cc79a", "#e59ac6", "#f2b53a", "#8ccbf5"),
            *("#d0648f", "#c4cc5a", "#a395f2", "#a0a8b4"),
        ),
    ),
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", "h")
GREY = 9  # the last colour: what takes part without the others, and what is only a reference
# A taste, not a registry: a method that is not named here gets the colour its name hashes to.
TASTE = ("celora", "fedit", "folklora", "rolora", "ffa", "fedsa", "sketch", "flora", "fedex")

# Names of clients and classes come in any script; the first of these that is installed fills what DejaVu lacks.
FALLBACK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "Hiragino Sans")


@cache
def _fonts() -> list[str]:
    installed = set(get_font_names())
    return ["DejaVu Sans", *[name for name in FALLBACK if name in installed][:1]]


@contextmanager
def drawing(theme: ThemeName) -> Iterator[Theme]:
    """Matplotlib set up for a theme; figures are built and saved inside."""
    colors = THEMES[theme]
    settings: Any = {  # the stubs list every key as a literal
        "figure.facecolor": colors.paper,
        "axes.facecolor": colors.paper,
        "savefig.facecolor": colors.paper,
        "text.color": colors.ink,
        "text.parse_math": False,  # a `$` in a client's name is a dollar
        "axes.edgecolor": colors.grid,
        "axes.labelcolor": colors.soft,
        "axes.titlecolor": colors.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 9,
        "axes.labelsize": 9.5,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": colors.grid,
        "xtick.color": colors.grid,
        "ytick.color": colors.grid,
        "xtick.labelcolor": colors.soft,
        "ytick.labelcolor": colors.soft,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "font.family": _fonts(),
        "font.size": 9.5,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 2,
        "lines.solid_capstyle": "round",
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A glyph that no installed font has is drawn as a box; that is no reason to trouble the terminal.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield colors


def canvas(height: float, width: float = WIDTH, gap: float = 0.04) -> Figure:
    """An empty figure of `width` x `height` inches, `gap` around each part; use it inside `drawing`."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=gap, h_pad=gap))


def headline(figure: Figure, text: str) -> None:
    """The title of a figure, at its left edge."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11.5, fontweight="bold")


def clean(ax: Axes, theme: Theme, grid: Literal["x", "y", "none"] = "y") -> Axes:
    """Light grid in one direction, no tick marks; ticks made later keep the theme's colours."""
    ax.tick_params(length=0, labelcolor=theme.soft, labelsize=9)
    if grid != "none":
        ax.grid(axis=grid, color=theme.grid, linewidth=0.8)
    for side in ax.spines.values():
        side.set_color(theme.grid)
    return ax


def percent_axis(ax: Axes, axis: Literal["x", "y"] = "y") -> None:
    """Fractions written as per cent."""
    (ax.yaxis if axis == "y" else ax.xaxis).set_major_formatter(
        FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%")
    )


def score_axis(ax: Axes, metric: Metric, axis: Literal["x", "y"] = "y", *, whole: bool = False) -> None:
    """Scores as they are read: shares as per cent. ``whole``: from nothing, of a share up to all."""
    if metric.percent:
        percent_axis(ax, axis)
    if whole:
        limits = ax.set_ylim if axis == "y" else ax.set_xlim
        limits(0, 1 if metric.percent else None)


def bytes_axis(ax: Axes, axis: Literal["x", "y"] = "y") -> None:
    """Byte counts written with their units; ``50.0 KB`` on a tick is ``50 KB``."""

    def write(value: float, _position: int) -> str:
        number, unit = human_bytes(value).split(" ")
        return f"{float(number):g} {unit}"

    (ax.yaxis if axis == "y" else ax.xaxis).set_major_formatter(FuncFormatter(write))


def round_axis(ax: Axes, rounds: Sequence[int], bars: bool = False) -> None:
    """Whole rounds on the x axis; a few bars stand in the middle rather than fill the page."""
    low, high = min(rounds), max(rounds)
    if high - low < 12:
        ax.set_xticks(range(low, high + 1))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    if bars:
        pad = 0.6 + max(0.0, (4 - (high - low)) / 2)
    else:
        pad = 0.6 if low == high else 0.02 * (high - low)
    ax.set_xlim(low - pad, high + pad)
    ax.set_xlabel("round")


def pale(color: str, theme: Theme, share: float) -> str:
    """The colour thinned with paper to `share`: unlike alpha, nothing shines through."""
    red, green, blue = share * np.array(to_rgb(color)) + (1 - share) * np.array(to_rgb(theme.paper))
    return to_hex((float(red), float(green), float(blue)))


def short(name: str, length: int = 18) -> str:
    """A name of a client or a class, fit for an axis: one line, printable, not too long."""
    line = "".join(letter if letter.isprintable() else " " for letter in name).strip()
    return line if len(line) <= length else line[: length - 1] + "…"


def title(name: str, length: int = 30) -> str:
    """A method or variant fit for a picture; a long one keeps its end, where variants of one method differ."""
    line = short(name, len(name))
    half = (length - 1) // 2
    return line if len(line) <= length else f"{line[: length - 1 - half]}…{line[-half:]}"


def marks(names: Iterable[str], theme: Theme) -> dict[str, Mark]:
    """The mark of each method or variant: by its name, and different within one picture.

    A name without a preferred colour takes the one it hashes to, or the next free one, plain methods before variants.
    When all are taken, colours are shared with another marker and a dotted line; the grey of the reference never is.
    """
    result: dict[str, Mark] = {}
    uses = [0] * GREY
    for name in sorted(set(names), key=lambda name: (_preferred(name) is None, ":" in name, name)):
        slot = _preferred(name)
        if slot == GREY:
            result[name] = Mark(theme.palette[GREY], MARKERS[GREY])
            continue
        if slot is None:
            start = zlib.crc32(name.encode())
            slot = min(((start + step) % GREY for step in range(GREY)), key=uses.__getitem__)
        shared = uses[slot]
        uses[slot] += 1
        result[name] = Mark(theme.palette[slot], MARKERS[(slot + 4 * shared) % GREY], DOTTED if shared else "-")
    return result


def _preferred(name: str) -> int | None:
    plain = name.lower().replace("-", "").replace("_", "")
    if plain == "local":
        return GREY
    plain = plain if plain in TASTE else plain.removesuffix("lora")
    return TASTE.index(plain) if plain in TASTE else None


def spread_apart(places: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """The nearest places (least squares) in the same order that are at least `gap` apart: for labels beside lines.

    Subtracting ``i * gap`` from the i-th place turns the condition into "not decreasing", which pooling of adjacent
    violators solves exactly.
    """
    order = np.argsort(places, kind="stable")
    pools: list[tuple[float, int]] = []
    for index, place in enumerate(np.asarray(places, dtype=float)[order]):
        mean, size = place - index * gap, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    result = np.empty(len(places))
    result[order] = np.repeat([m for m, _ in pools], [n for _, n in pools]) + gap * np.arange(len(places))
    return result


def png(figure: Figure, theme: ThemeName) -> bytes:
    """The figure as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    with drawing(theme):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
