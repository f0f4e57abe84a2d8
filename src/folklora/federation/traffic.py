"""What a method sends, before anything runs: the byte counts of messages of the agreed shapes, encoded for real."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from folklora.adapters.lowrank import Shapes, Site, kind
from folklora.federation.codec import encode
from folklora.methods import METHODS, build
from folklora.methods.base import Context, Message, Method


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round: the message as encoded, and the values alone."""

    up: int
    down: int


def _bytes(shapes: Shapes, dtype: str, *, examples: bool) -> int:
    if not shapes:
        return 0
    numbers = {"examples": 1.0} if examples else {}
    return len(encode(Message({name: torch.zeros(shape) for name, shape in shapes.items()}, numbers), dtype))


def per_round(method: Method, client: str, dtype: str) -> Traffic:
    """Mean over two rounds, since some methods alternate; exact for what is sent and for replies of those shapes."""
    if method.rounds() == 0:
        return Traffic(0, 0)
    up, down = _two_rounds(method, client)
    return Traffic(
        sum(_bytes(shapes, dtype, examples=True) for shapes in up) // 2,
        sum(_bytes(shapes, dtype, examples=False) for shapes in down) // 2,
    )


def _two_rounds(method: Method, client: str) -> tuple[list[Shapes], list[Shapes]]:
    """What goes up and comes down in rounds 1 and 2; where factors alternate, a reply holds all the server has."""
    first, second = (method.expected(round, client) for round in (1, 2))
    return [first, second], [first, {**first, **second}]


def describe_methods(d_in: int, d_out: int, rank: int) -> list[dict[str, Any]]:
    """Every method in one line: name, paper, what travels, and payload bytes per adapted layer and round in float32."""
    described = []
    for name, cls in METHODS.items():
        context = Context(
            seed=0,
            ranks={"0": rank},
            sites=(Site("layer", d_in, d_out),),
            alpha=float(rank),
            dropout=0.0,
            classes=2,
            width=d_in,
            norms={},
            rounds=1,
            learning_rate=1e-3,
            batch_size=1,
        )
        method = build(name, {}, context)
        up, down = _two_rounds(method, "0") if method.rounds() else ([], [])
        described.append(
            {
                "name": name,
                "title": cls.title,
                "paper": cls.paper,
                "travels": sorted({kind(name) for shapes in up for name in shapes}),
                "once": "class statistics" if method.options.start != "zero" else _once(method),
                "mixed_ranks": cls.mixed_ranks,
                "global_model": cls.has_global_model,
                "bytes_per_layer_up": _factor_bytes(up),
                "bytes_per_layer_down": _factor_bytes(down),
            }
        )
    return described


def _once(method: Method) -> str | None:
    return "class mixtures" if getattr(method.options, "uses_data", False) else None


def _factor_bytes(rounds: list[Shapes]) -> float:
    """Float32 bytes of the factors A, B, C, without the head: mean over the rounds."""
    factors = [math.prod(s) for shapes in rounds for name, s in shapes.items() if kind(name) in {"A", "B", "C"}]
    return 4 * sum(factors) / max(1, len(rounds))
