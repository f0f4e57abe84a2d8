"""The tables and the picture of `serving.py`'s results, from ``results/serving.json`` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure
from table_parts import NOT_RUN, load, markdown

from folklora.report.style import canvas, clean, drawing, headline

RIVALS = {"switch": "switching", "mixed": "adapter_names", "merged": "merged copies"}
PRECISIONS = ("float32", "bfloat16")
NOT_HELD = "not held"
"""Merged float32 copies of many clients."""


def _cells() -> list[dict[str, Any]]:
    return (load("serving") or {"cells": []})["cells"]


def _range(found: Mapping[str, float] | None) -> str:
    return NOT_HELD if found is None else f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def ratios(precision: str) -> Callable[[], str]:
    """How much faster ours is than each rival in one precision."""

    def made() -> str:
        if not _cells():
            return NOT_RUN
        lines = []
        for cell in _cells():
            ms, faster = cell["ms_a_request"][precision]["ours"]["median"], cell["times_faster_than"][precision]
            shown = [_range(faster.get(rival)) for rival in RIVALS]
            lines.append([str(cell["clients"]), str(cell["batch"]), f"{ms:.1f}", *shown])
        header = [
            "clients",
            "asked together",
            "ms a request",
            *(f"times faster than {name}" for name in RIVALS.values()),
        ]
        return markdown(header, lines, left=0)

    return made


def merging() -> str:
    """What passes of one client alone would cost with adapters beside the layers."""
    lines = []
    for cell in _cells():
        found = [cell["times_faster_than"][precision].get("stacked") for precision in PRECISIONS]
        if any(found):
            shown = [_range(each) if each else "-" for each in found]
            lines.append([str(cell["clients"]), str(cell["batch"]), *shown])
    return markdown(["clients", "asked together", *PRECISIONS], lines, left=0) if lines else NOT_RUN


def agreement() -> str:
    """How far answers are from stock PEFT's, and how many labels are the same."""
    found = (load("serving") or {}).get("agreement")
    if not found:
        return NOT_RUN
    lines = []
    for name, told in found["arms"].items():
        precision, _, arm = name.partition(" ")
        if arm == "stacked":
            continue
        difference = f"{told['largest_logit_difference']:.0e}"
        lines.append([RIVALS.get(arm, arm), precision, f"{100 * told['same_labels']:.1f} %", difference])
    accuracy = load("serving").get("validation_accuracy")
    beside = (
        ""
        if accuracy is None
        else f" Validation accuracy of this run, ours: {100 * accuracy['float32']:.2f} % in float32, "
        f"{100 * accuracy['bfloat16']:.2f} % in bfloat16."
    )
    note = (
        f"\n{found['requests']} requests to a hundred clients, against stock PEFT switching in float32; logits have a "
        f"standard deviation of {found['logits_deviation']:.2g}.{beside}\n"
    )
    return markdown(["arm", "precision", "same labels", "largest difference of a logit"], lines, left=2) + note


def speeds() -> Figure | None:
    """Requests a second of every arm in bfloat16, by how many clients there are and how many are asked together."""
    cells = _cells()
    if not cells:
        return None
    batches = sorted({cell["batch"] for cell in cells})
    names = {"ours": "ours", **RIVALS}
    with drawing("light") as theme:
        figure = canvas(3.5, 8.6)
        axes = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
        for ax, batch in zip(axes, batches, strict=True):
            clean(ax, theme)
            own = [cell for cell in cells if cell["batch"] == batch]
            for i, (arm, words) in enumerate(names.items()):
                color = theme.palette[i]
                points = [
                    (at, cell["ms_a_request"]["bfloat16"][arm])
                    for at, cell in enumerate(own)
                    if arm in cell["ms_a_request"]["bfloat16"]
                ]
                for at, ms in points:
                    ax.plot([at, at], [1e3 / ms["max"], 1e3 / ms["min"]], color=color, linewidth=1.5, alpha=0.6)
                speeds = [1e3 / ms["median"] for _, ms in points]
                style = {"marker": "o", "linewidth": 2.2} if arm == "ours" else {"marker": "s", "linewidth": 1.4}
                ax.plot([at for at, _ in points], speeds, color=color, label=words, markersize=6, **style)
            ax.set_yscale("log")
            ax.set_xticks(range(len(own)), [str(cell["clients"]) for cell in own])
            ax.set_xlim(-0.3, len(own) - 0.7)
            ax.set_xlabel("clients")
            ax.set_title(f"{batch} asked together" if batch > 1 else "one at a time", loc="left", fontsize=10)
        ticks = [50, 100, 200, 500]
        axes[0].set_yticks(ticks, [str(tick) for tick in ticks])
        axes[0].minorticks_off()
        axes[0].set_ylabel("requests a CPU second (log scale)")
        axes[0].legend(frameon=False, fontsize=8.5)
        headline(figure, "Serving clients' classifiers, bfloat16, one thread: ours and tuned stock PEFT")
        return figure


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "serving-float32": ("serving", ratios("float32")),
    "serving-bfloat16": ("serving", ratios("bfloat16")),
    "serving-merging": ("serving", merging),
    "serving-agreement": ("serving", agreement),
}
"""Marker -> the results it needs, and what makes it."""

PICTURES: dict[str, Callable[[], Figure | None]] = {"serving": speeds}
"""File name -> what draws it."""
