"""Pictures of who the clients are: who holds which classes, and who is like whom."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from folklora.report.reading import Run
from folklora.report.style import WIDTH, Theme, ThemeName, canvas, clean, drawing, headline, pale, short

MOST_CLIENTS = 100  # rows of the partition picture


def partition(run: Run, theme: ThemeName = "light") -> Figure | None:
    """Training examples of each client and class as a heat map, the sizes of each client's splits beside it."""
    if run.counts is None or not _has_classes(run):
        return None
    lines = min(len(run.clients), MOST_CLIENTS)
    with drawing(theme) as colors:
        figure = canvas(_height(lines))
        heat, beside = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
        clean(heat, colors, "none")
        counts = np.ma.masked_equal(run.counts[:lines], 0)  # none of a class: empty, not a pale colour
        norm = PowerNorm(0.5, vmin=0, vmax=max(1, run.counts.max()))  # a few large classes must not hide the rest
        image = heat.imshow(counts, aspect="auto", cmap=colors.heat, norm=norm, interpolation="nearest")
        bar = figure.colorbar(image, ax=heat, location="top", aspect=50, pad=0.02, shrink=0.6, anchor=(0, 0))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8.5)
        bar.ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        bar.set_label("training examples of a class", fontsize=9)
        _name_classes(heat, run.classes)
        _grid_cells(heat, len(run.classes), lines, colors)
        _split_bars(figure, beside, run, colors, ticks=3)
        _name_clients(heat, run)
        headline(figure, f"Who holds what{_cut(run)}")
        return figure


def sizes(run: Run, theme: ThemeName = "light") -> Figure | None:
    """The sizes of each client's splits, where it is not known which classes they hold, or there are none."""
    if run.counts is not None and _has_classes(run):
        return None
    with drawing(theme) as colors:
        figure = canvas(_height(min(len(run.clients), MOST_CLIENTS)))
        ax = figure.add_subplot()
        _split_bars(figure, ax, run, colors, ticks=8)
        _name_clients(ax, run)
        headline(figure, f"Who holds how much{_cut(run)}")
        return figure


def _has_classes(run: Run) -> bool:
    return len(run.classes) > 1


def similarity(run: Run, theme: ThemeName = "light") -> Figure | None:
    """What the method knows of the clients: similarities and aggregation weights, as heat maps side by side."""
    return _side_by_side(run, run.insights, theme)


def similarity_before(run: Run, theme: ThemeName = "light") -> Figure | None:
    """What it knew of them when the data of some were about to change."""
    return _side_by_side(run, run.insights_before, theme)


def _side_by_side(run: Run, insights: Mapping[str, np.ndarray], theme: ThemeName) -> Figure | None:
    if not insights:
        return None
    columns = {1: 1, 2: 2, 3: 3, 4: 2}[len(insights)]
    lines = -(-len(insights) // columns)
    count = len(run.clients)
    titles = {
        "similarity/data": "Similarity of data",
        "similarity/model": "Similarity of models",
        "similarity/mixed": "Mixed similarity",
        "weights": "Weights",
    }
    with drawing(theme) as colors:
        side = {1: 4.4, 2: 3.5, 3: 2.7}[columns]
        figure = canvas(side * lines + 0.35, width=WIDTH if columns > 1 else 5.2, gap=0.09)
        for position, (name, matrix) in enumerate(insights.items(), start=1):
            ax = clean(figure.add_subplot(lines, columns, position), colors, "none")
            # A client is always most similar to itself: shown, the diagonal would flatten all the rest.
            hidden = np.eye(count, dtype=bool) & (name != "weights") & (count > 1)
            shown = np.ma.masked_invalid(np.ma.masked_array(matrix, hidden))
            # A client's own weight is often the greatest by far; under a root the others still differ.
            norm = PowerNorm(0.5, vmin=0) if name == "weights" else Normalize()
            image = ax.imshow(shown, cmap=colors.heat, interpolation="nearest", norm=norm)
            bar = figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0, labelsize=8)
            bar.ax.yaxis.set_major_locator(MaxNLocator(5))
            differ = shown.count() > 0 and np.ptp(shown.compressed()) >= 0.02  # else two digits tell nothing
            if count <= 10 and columns < 3 and (differ or count == 1):
                _write_cells(ax, image, shown)
            _grid_cells(ax, count, count, colors)
            ax.set_title(titles[name], fontsize=10.5)
            if count <= 20:
                names = [short(client, 9) for client in run.clients]
                turned = max(map(len, names)) > 2
                ax.set_xticks(range(count), names, fontsize=8, rotation=90 if turned else 0)
                ax.set_yticks(range(count), names, fontsize=8)
            else:
                ax.set_xticks([])
                ax.set_yticks([])
            ax.set_xlabel("from client" if name == "weights" else "client")
            ax.set_ylabel("to client" if name == "weights" else "client")
        return figure


def _height(clients: int) -> float:
    return float(np.clip(0.27 * clients + 1.5, 2.2, 9.5))


def _cut(run: Run) -> str:
    count = len(run.clients)
    return f" (the first {MOST_CLIENTS} of {count} clients)" if count > MOST_CLIENTS else ""


def _split_bars(figure: Figure, ax: Axes, run: Run, theme: Theme, ticks: int) -> None:
    clean(ax, theme, "x")
    clients = run.clients[:MOST_CLIENTS]
    left = np.zeros(len(clients))
    for split, share in (("train", 1.0), ("validation", 0.55), ("test", 0.28)):
        values = np.array([getattr(run.examples[client], split) for client in clients])
        color = pale(theme.palette[0], theme, share)
        ax.barh(np.arange(len(clients)), values, 0.72, left=left, color=color, label=split)
        left += values
    figure.legend(loc="outside upper right", ncols=3, fontsize=8.5, borderaxespad=0.3)
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    ax.set_xlabel("examples")


def _name_clients(ax: Axes, run: Run) -> None:
    names = [short(client) for client in run.clients[:MOST_CLIENTS]]
    step = 1 if len(names) <= 50 else 5
    ax.set_yticks(range(0, len(names), step), names[::step], fontsize=9 if len(names) <= 35 else 7.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_ylabel("client")


def _name_classes(ax: Axes, classes: tuple[str, ...]) -> None:
    if len(classes) <= 25:
        names = [short(name) for name in classes]
        turned = len(names) * max(map(len, names), default=0) > 60
        ax.set_xticks(range(len(names)), names, rotation=45 if turned else 0, ha="right" if turned else "center")
        ax.set_xlabel("class")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        ax.set_xlabel(f"class, by number (0 to {len(classes) - 1})")


def _grid_cells(ax: Axes, columns: int, lines: int, theme: Theme) -> None:
    """Thin lines between cells while they are large enough to be told apart."""
    for side in ax.spines.values():
        side.set_visible(False)
    if columns <= 100 and lines <= 40:
        ax.vlines(np.arange(columns + 1) - 0.5, -0.5, lines - 0.5, color=theme.grid, linewidth=0.6)
        ax.hlines(np.arange(lines + 1) - 0.5, -0.5, columns - 0.5, color=theme.grid, linewidth=0.6)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(lines - 0.5, -0.5)


def _write_cells(ax: Axes, image: AxesImage, matrix: np.ma.MaskedArray) -> None:
    for (line, column), value in np.ma.ndenumerate(matrix):  # passes over what is masked
        red, green, blue, _ = image.to_rgba(np.array([[value]]))[0, 0]
        bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.55
        text = f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"
        ink = "#10151c" if bright else "#ffffff"
        ax.text(column, line, text, ha="center", va="center", fontsize=7.5, color=ink)
