"""The pictures of `privacy.py`'s results, from ``results/privacy.json`` alone; drawn by `figures.py`."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from privacy_tables import GRANTED, SENT, WORST, of, part, variants

from folklora.methods import METHODS
from folklora.report.style import canvas, clean, drawing, headline, percent_axis

SHOWN = 4
"""Victims in the gallery."""


def ranks() -> Figure | None:
    """Tokens told against the core's size, by batch: the worst case for a core."""
    rows = part("span by rank")
    if not rows:
        return None
    with drawing("light") as theme:
        methods = sorted({row["variant"].partition(":")[0] for row in rows})
        figure = canvas(3.4)
        axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for ax, method in zip(axes, methods, strict=True):
            clean(ax, theme)
            own = [row for row in rows if row["variant"].startswith(f"{method}:")]
            for i, batch in enumerate(sorted({row["batch"] for row in own})):
                told = {}
                for row in of(own, batch=batch):
                    told.setdefault(_rank(row["variant"]), []).append(row["metrics"]["token_recall"]["mean"])
                at = sorted(told)
                values = [statistics.fmean(told[rank]) for rank in at]
                ax.plot(at, values, marker="o", color=theme.palette[i], label=f"batch {batch}", linewidth=1.8)
            ax.set_xscale("log", base=2)
            ax.set_xticks(sorted({_rank(row["variant"]) for row in own}))
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
            ax.set_xlabel("rank r of the core")
            ax.set_title(method, loc="left", fontsize=10)
        percent_axis(axes[0])
        axes[0].set_ylim(-0.03, 1.03)
        axes[0].set_ylabel("tokens told exactly")
        lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        axes[0].legend(lines.values(), lines.keys(), frameon=False, fontsize=8, loc="upper left")
        headline(figure, "What a core's exact gradient tells of a text, by its size")
        return figure


def _rank(variant: str) -> int:
    return int(next(o for o in variant.split(":") if o.startswith("adapter.rank=")).partition("=")[2])


SENDING = {"A travels": "A", "B travels, A does not": "B", "cores travel": "C"}
"""In words, and the first of these that a method's messages hold."""


ASIDE = ("flora", "haflq", "apfl", "ravan")
"""Methods that stand apart from others of their kind, and are named too."""


def _sending(variant: str) -> str:
    travels = METHODS[variant.partition(":")[0]].travels
    return next((kinds for kinds in "AB" if kinds in travels), "C")


def trade() -> Figure | None:
    """Tokens told from what was really sent, against test accuracy."""
    # Of the one seed that all methods have.
    rows = [*of(part("span"), view=SENT[0], bases=SENT[1], batch=1, seed=0), *of(part("every method"), view=SENT[0])]
    reached = [*of(part("utility", "banking77"), seed=0), *part("every method reaches")]
    methods = [v for v in variants(rows) if of(reached, variant=v)]
    if not methods:
        return None
    named = dict.fromkeys((*variants(part("span")), *ASIDE), (6, 5)) | {"fedit": (-32, 2), "ffa": (-20, 5)}
    with drawing("light") as theme:
        figure = canvas(3.6, 6.0)
        ax = clean(figure.add_subplot(), theme)
        for i, (words, kinds) in enumerate(SENDING.items()):
            drawn = [method for method in methods if _sending(method) == kinds]
            x = [statistics.fmean(r["row"]["accuracy_mean"] for r in of(reached, variant=m)) for m in drawn]
            told = [of(rows, variant=method) for method in drawn]
            y = [statistics.fmean(row["metrics"]["token_recall"]["mean"] for row in own) for own in told]
            ax.plot(x, y, marker="o", markersize=7, linestyle="none", color=theme.palette[i], label=words)
            for method, *point in zip(drawn, x, y, strict=True):
                if method in named:
                    ax.annotate(method, point, xytext=named[method], textcoords="offset points", fontsize=8)
        ax.set_xlabel("test accuracy after the last round")
        ax.set_ylabel("tokens told, of what was sent")
        ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
        percent_axis(ax)
        ax.set_ylim(-0.03, 1.03)
        ax.margins(x=0.15)
        ax.legend(frameon=False, fontsize=8, loc="center right")
        headline(figure, "Leakage against accuracy (Banking77, one text a batch, one seed)")
        return figure


def steps() -> Figure | None:
    """Tokens told from what was really sent, against the number of local steps."""
    rows = part("local steps")
    if not rows:
        return None
    with drawing("light") as theme:
        figure = canvas(3.4, 6.0)
        ax = clean(figure.add_subplot(), theme)
        at = sorted({row["steps"] for row in rows})
        curves: dict[tuple[tuple[int, float], ...], list[str]] = {}
        for method in variants(rows):
            own = {n: of(rows, variant=method, steps=n) for n in at}
            told = {n: [r["metrics"]["token_recall"]["mean"] for r in each] for n, each in own.items() if each}
            curves.setdefault(tuple((n, statistics.fmean(each)) for n, each in told.items()), []).append(method)
        for colour, (points, methods) in zip(theme.palette, curves.items(), strict=False):
            # Methods that tell alike are one line.
            ax.plot(*zip(*points, strict=True), marker="o", color=colour, label=", ".join(methods), linewidth=1.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(at)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
        ax.set_xlabel("gradient steps of the client in the round")
        ax.set_ylabel("tokens told, of what was sent")
        percent_axis(ax)
        ax.set_ylim(-0.03, 1.03)
        ax.legend(frameon=False, fontsize=8, loc="center right")
        headline(figure, "Leakage against local steps (Banking77, one text a batch)")
        return figure


def gallery() -> Figure | None:
    """Pictures: originals, what each method's message gave away, and the control."""
    rows = [row for row in of(part("pictures"), view=WORST[0], bases=WORST[1]) if row["victims"]]
    if not rows:
        return None
    first = {row["variant"]: row for row in reversed(rows)}
    lines: list[tuple[str, list[str]]] = []
    for variant, row in reversed(list(first.items())):
        victims = row["victims"]
        if not lines:
            lines.append(("original", [p for v in victims for p in v["original"]][:SHOWN]))
        lines.append((variant, [p for v in victims for p in v["recovered"]][:SHOWN]))
    lines.append(("control", [p for v in next(iter(first.values()))["victims"] for p in v["control"]][:SHOWN]))
    with drawing("light"):
        figure = canvas(0.8 + 1.1 * len(lines[0][1]), 1.1 * len(lines))
        axes = figure.subplots(len(lines[0][1]), len(lines), squeeze=False)
        for column, (name, pictures) in enumerate(lines):
            for line, picture in enumerate(pictures):
                data = base64.b64decode(picture.partition(",")[2])
                axes[line, column].imshow(
                    np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), interpolation="nearest"
                )
            axes[0, column].set_title(name, fontsize=9)
        for ax in axes.flat:
            ax.axis("off")
        headline(figure, f"What a message gives away of a picture\n({GRANTED[WORST]})")
        return figure


PICTURES: dict[str, Callable[[], Figure | None]] = {
    "privacy-ranks": ranks,
    "privacy-accuracy": trade,
    "privacy-steps": steps,
    "privacy-gallery": gallery,
}
"""File -> what draws it."""
