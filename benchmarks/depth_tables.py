"""The tables and the picture of `depth.py`'s results, from ``results/depth.json`` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from table_parts import NOT_RUN, Row, load, markdown, picture

from folklora.report.style import canvas, clean, drawing, headline
from folklora.report.tables import human_bytes

SHARED, MINILM = "shared block", "MiniLM"
SHOWN = ("2", "3", "4", "6")
"""Numbers of steps, or of layers."""


def rows_of(method: str) -> dict[str, list[Row]]:
    """Variant -> its rows, one a seed."""
    found: dict[str, list[Row]] = {}
    for row in (load("depth") or {"rows": []})["rows"]:
        if row["method"] == method:
            found.setdefault(row["variant"], []).append(row)
    return found


def percent(values: list[float]) -> str:
    """Mean over seeds, and the range."""
    found = 100 * np.array(values)
    return f"{found.mean():.1f} ({found.min():.1f} to {found.max():.1f})" if len(found) else "–"


def accuracy(method: str) -> Callable[[], str]:
    """What each variant reaches at each number of steps, and what travels."""

    def made() -> str:
        found = rows_of(method)
        if not found:
            return NOT_RUN
        lines, layers = [], [rows for name, rows in found.items() if name.startswith(MINILM)]
        for name, rows in found.items():
            if name.startswith(SHARED):
                cells = [percent([row["test"][steps] for row in rows]) for steps in SHOWN]
                lines.append([name, *cells, human_bytes(rows[0]["bytes_up"])])
        if layers:
            by_layer = {steps: rows for rows in layers for steps in rows[0]["test"]}
            cells = [percent([row["test"][steps] for row in by_layer.get(steps, [])]) for steps in SHOWN]
            moved = [human_bytes(by_layer[steps][0]["bytes_up"]) for steps in SHOWN if steps in by_layer]
            lines.append(["MiniLM's first K layers, a model each", *cells, " / ".join(moved)])
        planned, done = load("depth")["seeds"], min(map(len, found.values()))
        part = "" if done >= planned else f" *Partial: {done} of {planned} seeds.*"
        note = (
            "Test accuracy in per cent: mean over clients and seeds, and the seeds' range; on the right what a client "
            f"sends a round.{part}{_auto(found)}"
        )
        header = ["fine-tuned", *(f"K = {steps}" for steps in SHOWN), "up, client and round"]
        return markdown(header, lines) + "\n" + note + "\n"

    return made


def _auto(found: dict[str, list[Row]]) -> str:
    rows = [row for each in found.values() for row in each if "auto" in row]
    if not rows:
        return ""
    steps = [step for row in rows for step in row["auto"]["steps"]]
    reached = percent([row["auto"]["test"] for row in rows])
    return f' With `depth = "auto"`, over depths: {reached} with {np.mean(steps):.1f} steps a client.'


def times() -> str:
    """Milliseconds a text, and how many times as fast as all steps that is."""
    found = (load("depth") or {}).get("times", [])
    if not found:
        return NOT_RUN
    lines = []
    for kind in (SHARED, MINILM):
        for steps in sorted({row["steps"] for row in found if row["backbone"] == kind}):
            cells = []
            for batch in (1, 32):
                row = next(r for r in found if (r["backbone"], r["steps"], r["batch"]) == (kind, steps, batch))
                ms, times = row["milliseconds"]["median"], row["speed_up"]
                cells += [f"{ms:.2f}", f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"]
            words = f"{kind}, {steps} steps" if kind == SHARED else f"MiniLM's first {steps} layers"
            lines.append([words, *cells, f"{row['parameters'] / 1e6:.1f} M"])
    header = ["", "batch 1: ms a text", "speed-up", "batch 32: ms a text", "speed-up", "parameters"]
    note = (
        "One thread, float32, texts of Banking77 at their natural length. Speed-up over the shared block with all its "
        "steps: median of the ratios of neighbouring measurements, and their range."
    )
    return markdown(header, lines) + "\n" + note + "\n"


def backbone() -> str:
    """What the distilled backbone states of itself."""
    told: Any = (load("depth") or {}).get("backbone")
    if not told:
        return NOT_RUN
    held = told["heldout"]
    lines = []
    for steps in SHOWN:
        own = held[f"{steps} steps"]
        cosine = np.mean(list(own["cosine"].values()))
        lines.append(
            [f"K = {steps}", f"{cosine:.3f}", *(f"{100 * own['probe'][p]:.1f}" for p in ("nearest", "linear"))]
        )
    probe = held["teacher"]["probe"]
    lines.append(["MiniLM itself", "1", *(f"{100 * probe[p]:.1f}" for p in ("nearest", "linear"))])
    note = (
        f"After {told['steps']} updates, on {told['tokens']:,} tokens of other texts: cosine to MiniLM's embeddings on "
        "held-out texts (mean over four sources), and what probes on frozen embeddings of Banking77's training rows "
        "reach on a fifth of them, in per cent."
    )
    return markdown(["", "cosine", "five nearest", "linear"], lines) + "\n" + note + "\n"


def trade() -> Figure | None:
    """Accuracy against time a text."""
    document = load("depth") or {}
    found, timed = rows_of("fedit"), document.get("times", [])
    if not found or not timed:
        return None
    with drawing("light") as theme:
        figure = canvas(3.8, 7.6)
        ax = figure.subplots()
        clean(ax, theme)
        ms = {(r["backbone"], str(r["steps"])): r["milliseconds"]["median"] for r in timed if r["batch"] == 1}
        lines = {name: rows for name, rows in found.items() if name.startswith(SHARED)}
        for i, (name, rows) in enumerate(lines.items()):
            points = [(ms[SHARED, k], [row["test"][k] for row in rows], k) for k in SHOWN]
            _line(ax, theme.palette[i], name, points, aside=0.06 * (i - 1), told=name.endswith("over depths"))
        shallow = sorted((next(iter(r[0]["test"])), r) for name, r in found.items() if name.startswith(MINILM))
        points = [(ms[MINILM, k], [row["test"][k] for row in rows], k) for k, rows in shallow if (MINILM, k) in ms]
        if points:
            _line(ax, theme.palette[len(lines)], "MiniLM's first K layers", points, told=True)
        ax.set_xlabel("milliseconds a text, one at a time")
        ax.set_ylabel("test accuracy, per cent")
        ax.legend(frameon=False, fontsize=8)
        headline(figure, "Fewer steps of a shared block, and fewer layers (numbers: K)")
        return figure


def _line(
    ax: Any, colour: str, name: str, points: list[tuple[float, list[float], str]], *, aside: float = 0, told: bool
) -> None:
    """``aside``: so much to the right, in milliseconds, so that ranges do not hide each other."""
    x, means = [at + aside for at, _, _ in points], [100 * float(np.mean(values)) for _, values, _ in points]
    ax.plot(x, means, "o-", color=colour, label=name, markersize=5)
    for at, (_, values, k), mean in zip(x, points, means, strict=True):
        ax.plot([at, at], [100 * min(values), 100 * max(values)], color=colour, linewidth=1)
        if told:
            ax.annotate(k, (at, mean), textcoords="offset points", xytext=(5, 4), fontsize=8, color=colour)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "depth-fedit": ("depth", accuracy("fedit")),
    "depth-folklora": ("depth", accuracy("folklora")),
    "depth-times": ("depth", times),
    "depth-backbone": ("depth", backbone),
    "depth-picture": ("depth", picture("depth", "Test accuracy against time a text, by number of steps")),
}
"""Marker -> the results it needs, and what makes it."""

PICTURES: dict[str, Callable[[], Figure | None]] = {"depth": trade}
"""File name -> what draws it."""
