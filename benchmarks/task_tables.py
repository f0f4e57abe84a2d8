"""The tables of `tasks.py`'s results, from ``results/tasks.json`` alone; marks as in `accuracy_tables`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accuracy_tables import COUNTS, Column, bytes_cells
from table_parts import NOT_RUN, Row, label, load, markdown, picture, spread

from folklora.backbones.metric import KNOWN, Metric, metric_of

UNTRAINED = "local:train.rounds=0"
SIGNS = {UNTRAINED: "*checkpoint as it is*"}


def scores(document: dict[str, Any], name: str) -> tuple[Metric, dict[str, dict[int, float]]]:
    """What a task is judged by, and by variant that has any: seed -> its mean over clients."""
    rows: list[Row] = [row for row in document["rows"] if row["task"] == name]
    metric = metric_of(rows[0] if rows else {})
    of: dict[str, dict[int, float]] = {variant: {} for variant in document["tasks"][name]["variants"]}
    for row in rows:
        of.setdefault(row["variant"], {})[row["seed"]] = row[f"{metric.name}_mean"]
    return metric, {variant: seeds for variant, seeds in of.items() if seeds}


def task(name: str) -> Callable[[], str]:
    """One task: what each method reaches, for the mean client and the worst tenth, and what it sends."""

    def table() -> str:
        document = load("tasks")
        told = document["tasks"].get(name)
        rows: list[Row] = [row for row in document["rows"] if row["task"] == name]
        if told is None or not rows:
            return NOT_RUN
        metric, found_scores = scores(document, name)
        planned = document["seeds"]
        of = {variant: [row for row in rows if row["variant"] == variant] for variant in told["variants"]}
        judged = Column.of({v: {s: metric.merit(x) for s, x in seeds.items()} for v, seeds in found_scores.items()})
        besides = [m for key, m in KNOWN.items() if key != metric.name and f"{key}_mean" in rows[0]]
        lines = []
        for variant, found in of.items():
            if not found:
                continue
            shown = judged.mark(variant, spread((row[f"{metric.name}_mean"] for row in found), metric.number, planned))
            worst = spread((row[f"{metric.name}_worst_tenth"] for row in found), metric.number, planned)
            more = [spread((row[f"{m.name}_mean"] for row in found), m.number, planned) for m in besides]
            rate = "-" if variant in SIGNS else f"{found[0]['lr']:g}"
            lines.append([SIGNS.get(variant) or label(variant), shown, worst, *more, rate, *bytes_cells(found)])
        counts = "-" if judged.difference is None else metric.number(judged.difference)
        lines.append([COUNTS, counts, *[""] * (len(besides) + 5)])
        header = ["method", f"{metric.words}{metric.unit}", "worst tenth", *(f"{m.words}{m.unit}" for m in besides)]
        done, all_ = len(rows), planned * len(told["variants"])
        note = f"\n*Partial: {done} of {all_} runs are done.*\n" if done < all_ else ""
        return markdown([*header, "lr", "up, client and round", "down", "once"], lines) + note

    return table


def settings() -> str:
    """What the recipes are, as they were run."""
    lines = [
        [
            name,
            f"`{told['recipe']}`",
            told["task"],
            told["split"],
            str(_clients(name) or "-"),
            str(told["examples"] or "all"),
            str(told["rounds"]),
            str(told["batch"]),
        ]
        for name, told in load("tasks")["tasks"].items()
    ]
    header = ["task", "recipe", "kind", "split", "clients", "examples", "rounds", "batch"]
    return markdown(header, lines, left=4)


def _clients(name: str) -> int | None:
    return next((row["clients"] for row in load("tasks")["rows"] if row["task"] == name), None)


def checkpoints() -> str:
    """What the pretrainings say of themselves: size, length, and quality on held-out data."""
    lines = []
    for name, quality in load("tasks")["checkpoints"].items():
        size = f"{quality['parameters'] / 1e6:.1f} M"
        for data, found in quality["heldout"].items():
            taken = f"{quality['steps']:,} in {quality['seconds'] / 60:.0f} min"
            lines.append([name, size, taken, data, _told(found)])
    return markdown(["checkpoint", "parameters", "steps", "held-out data", "quality"], lines, left=1)


def _told(found: dict[str, Any]) -> str:
    if "bits_per_byte" in found:
        return f"{found['bits_per_byte']:.2f} bits a byte, perplexity {found['perplexity']:.1f} a token"
    shares = {key: value for key, value in found.items() if isinstance(value, float)}
    return ", ".join(f"{key.replace('_', ' ')} {100 * value:.1f} %" for key, value in shares.items())


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "tasks-checkpoints": ("tasks", checkpoints),
    "tasks-settings": ("tasks", settings),
    "tasks-picture": ("tasks", picture("tasks", "Every method on every task")),
    "tasks-fashion": ("tasks", task("fashion, Dirichlet 0.5")),
    "tasks-emoji": ("tasks", task("emoji by group")),
    "tasks-shakespeare": ("tasks", task("shakespeare by role")),
    "tasks-dolly": ("tasks", task("dolly by category")),
    "tasks-dolly-dirichlet": ("tasks", task("dolly, Dirichlet 0.5")),
}
"""Marker -> the results it needs, and what makes it."""
