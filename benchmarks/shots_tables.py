"""The table and the picture of `shots.py`'s results, from ``results/shots.json`` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from table_parts import NOT_RUN, Row, load, markdown, picture

from folklora.report.style import canvas, clean, drawing, headline
from folklora.report.tables import human_bytes

KINDS = {
    "none": "none: the real shots alone",
    "gaussian": "gaussian",
    "sketch": "sketch",
    "gan": "gan",
    "auto": "auto: as each client's cross-validation says",
}
NONE = "none"
RESAMPLES = 10_000


def rows_of(setting: str) -> dict[int, list[Row]]:
    """Shots -> its rows, one a seed."""
    found: dict[int, list[Row]] = {}
    for row in (load("shots") or {"rows": []})["rows"]:
        if row["setting"].startswith(setting):
            found.setdefault(row["shots"], []).append(row)
    return dict(sorted(found.items()))


def paired(rows: Sequence[Row], kind: str) -> tuple[float, float, float]:
    """Mean difference to `NONE` of the same clients, and its 95 % bootstrap interval.

    A resample draws seeds with replacement, and of each the clients.
    """
    differences = [np.array(row["accuracy"][kind]) - np.array(row["accuracy"][NONE]) for row in rows]
    random = np.random.default_rng(0)
    means = np.empty((len(differences), RESAMPLES))
    for own, each in zip(means, differences, strict=True):
        own[:] = each[random.integers(len(each), size=(RESAMPLES, len(each)))].mean(1)
    # A seed that is drawn twice has other clients each time.
    drawn = means[random.integers(len(means), size=means.shape), random.integers(RESAMPLES, size=means.shape)]
    low, high = np.quantile(drawn.mean(0), (0.025, 0.975))
    return float(np.mean([each.mean() for each in differences])), float(low), float(high)


def _gain(gap: Sequence[float]) -> str:
    return f"{100 * gap[0]:+.1f} ({100 * gap[1]:+.1f} to {100 * gap[2]:+.1f})"


def accuracy(setting: str) -> Callable[[], str]:
    """One setting: what each kind reaches, by shots, and its difference to the real shots alone."""

    def made() -> str:
        found = rows_of(setting)
        if not found:
            return NOT_RUN
        lines = []
        for kind, words in KINDS.items():
            cells = []
            for rows in found.values():
                mean = 100 * np.mean([row["accuracy"][kind] for row in rows])
                cells.append(f"{mean:.1f}" + ("" if kind == NONE else f", {_gain(paired(rows, kind))}"))
            lines.append([words, *cells])
        shots = [f"{n} shot{'s' if n > 1 else ''}" for n in found]
        planned, done = load("shots")["seeds"], [len(rows) for rows in found.values()]
        part = "" if min(done) >= planned else f" *Partial: {', '.join(map(str, done))} of {planned} seeds.*"
        some = next(iter(found.values()))[0]
        traffic = f"up {human_bytes(some['statistics_up'])}, down {human_bytes(some['statistics_down'])}"
        note = (
            "Test accuracy in per cent, mean over clients and seeds; behind it the difference to `none`, paired, with "
            f"its 95 % bootstrap interval. `sketch` and `auto` cost a client once, with one shot: {traffic}.{part}"
        )
        return markdown(["added", *shots], lines) + "\n" + note + "\n"

    return made


def choices() -> str:
    """What `auto` took, in shares of clients."""
    found = {row["setting"]: None for row in (load("shots") or {"rows": []})["rows"]}
    lines = []
    for setting in found:
        for shots, rows in rows_of(setting).items():
            total: Mapping[str, int] = {kind: sum(row["chosen"][kind] for row in rows) for kind in rows[0]["chosen"]}
            shares = [f"{100 * count / sum(total.values()):.0f} %" for count in total.values()]
            lines.append([setting, str(shots), *shares])
    if not lines:
        return NOT_RUN
    return markdown(["setting", "shots", *(kind for kind in KINDS if kind != "auto")], lines)


def differences() -> Figure | None:
    """What each kind adds to the real shots alone."""
    names = list(dict.fromkeys(row["setting"] for row in (load("shots") or {"rows": []})["rows"]))
    if not names:
        return None
    kinds = [kind for kind in KINDS if kind != NONE]
    with drawing("light") as theme:
        figure = canvas(3.6, 8.6)
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for ax, name in zip(axes, names, strict=True):
            clean(ax, theme)
            found = rows_of(name)
            ax.axhline(0, color=theme.palette[9], linewidth=1)
            for i, kind in enumerate(kinds):
                for at, rows in enumerate(found.values()):
                    mean, low, high = (100 * value for value in paired(rows, kind))
                    place = at + 0.17 * (i - (len(kinds) - 1) / 2)
                    ax.plot([place, place], [low, high], color=theme.palette[i], linewidth=2)
                    label = kind if at == 0 else None
                    ax.plot([place], [mean], "o", color=theme.palette[i], markersize=6, label=label)
            ax.set_xticks(range(len(found)), [str(shots) for shots in found])
            ax.set_xlabel("examples of each class")
            ax.set_title(name, loc="left", fontsize=10)
        axes[0].set_ylabel("points over the real shots alone")
        axes[0].legend(frameon=False, fontsize=8)
        headline(figure, "Made-up features: test accuracy over the real shots alone, 95 % paired intervals")
        return figure


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "shots-banking77": ("shots", accuracy("banking77")),
    "shots-snips": ("shots", accuracy("snips")),
    "shots-choices": ("shots", choices),
    "shots-picture": ("shots", picture("shots", "Made-up features: test accuracy over the real shots alone")),
}
"""Marker -> the results it needs, and what makes it."""

PICTURES: dict[str, Callable[[], Figure | None]] = {"shots": differences}
"""File name -> what draws it."""
