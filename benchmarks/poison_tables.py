"""The table of `poison.py`'s results, from ``results/poison.json`` alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from table_parts import Row, label, load, markdown, percent


def poison() -> str:
    """Variants by attack and share of liars: how the honest do, and what a backdoor and the weights say."""
    rows: list[Row] = load("poison")["rows"]
    cases = sorted({(row["attack"], row["share"]) for row in rows if row["share"]}, key=lambda c: (c[0], c[1]))
    backdoors = [share for attack, share in cases if attack == "backdoor"]
    weights = max((share for _, share in cases), default=0.0)
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        line = [label(variant), _percent(_of(own, "none", 0.0), "honest_mean")]
        line += [_percent(_of(own, attack, share), "honest_mean") for attack, share in cases]
        line += [_percent(_of(own, "backdoor", share), "backdoor") for share in backdoors]
        told = [row for row in own if row["share"] == weights and row["weight_of_liars"] is not None]
        line.append(f"{statistics.fmean(row['weight_of_liars'] for row in told):.2f}" if told else "-")
        lines.append(line)
    header = ["method", "no liars", *(f"{attack}, {share:.0%}" for attack, share in cases)]
    header += [f"backdoor's success, {share:.0%}" for share in backdoors]
    header.append(f"weight given to {weights:.0%} of liars (1: as to others)")
    seeds = sorted({row["seed"] for row in rows})
    note = f"Accuracy of the honest clients' own models, %; seed{'s' if len(seeds) > 1 else ''} "
    return markdown(header, lines) + f"\n*{note}{', '.join(map(str, seeds))}.*\n"


def _of(rows: Sequence[Row], attack: str, share: float) -> list[Row]:
    return [row for row in rows if row["attack"] == attack and row["share"] == share]


def _percent(rows: Sequence[Row], key: str) -> str:
    return percent(row[key] for row in rows if row[key] is not None)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {"poison": ("poison", poison)}
"""Marker -> the results it needs, and what makes it."""
