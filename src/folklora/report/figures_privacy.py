"""The picture of what differential privacy has cost."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from folklora.report.reading import Run
from folklora.report.style import ThemeName, canvas, clean, drawing, headline, marks, round_axis


def epsilon(run: Run, theme: ThemeName = "light") -> Figure | None:
    """Epsilon after each round, and the budget, if there is one."""
    spent = [(line.round, line.privacy) for line in run.rounds if line.privacy is not None]
    points = [(number, each.epsilon) for number, each in spent if each.epsilon is not None]
    if not points:
        return None
    budget = run.section("privacy").get("epsilon")
    unit, delta = spent[-1][1].unit, spent[-1][1].delta
    with drawing(theme) as colors:
        color = marks([run.method], colors)[run.method].color
        figure = canvas(2.6)
        ax = clean(figure.add_subplot(), colors)
        rounds, values = np.array([number for number, _ in points]), np.array([value for _, value in points])
        ax.plot(rounds, values, color=color, marker="o" if len(points) <= 60 else "", markersize=4)
        ax.annotate(f"{values[-1]:.3g}", (rounds[-1], values[-1]), (8, 0), textcoords="offset points", color=color)
        if isinstance(budget, int | float):
            ax.axhline(budget, color=colors.ink, linewidth=1, linestyle=(0, (4, 3)))
            ax.annotate(f"budget {budget:g}", (rounds[0], budget), (0, 4), textcoords="offset points", fontsize=9)
        ax.set_ylim(0, 1.15 * max(values.max(), float(budget or 0.0), 1e-9))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        round_axis(ax, rounds.tolist())
        ax.set_ylabel("epsilon")
        at = f" at delta {delta:g}" if delta is not None else ""
        headline(figure, f"Privacy spent, for each {unit}{at}")
        return figure
