"""What a method sends, before anything runs: the byte counts of messages of the agreed shapes, encoded for real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from folklora.adapters.lowrank import Shapes, Site
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
    shapes = [method.expected(round, client) for round in (1, 2)]
    up = sum(_bytes(s, dtype, examples=True) if s else 0 for s in shapes) // 2
    # A reply holds everything the server has: where factors alternate, both come back.
    together: Shapes = {name: shape for s in shapes for name, shape in s.items()}
    down = (_bytes(shapes[0], dtype, examples=False) + _bytes(together, dtype, examples=False)) // 2
    return Traffic(up, down)


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
        rounds = (1, 2) if method.rounds() else ()
        kinds = sorted(set().union(*(method.shared(round) for round in rounds)) - {"norm"})
        values = [sum(_numel(s) for n, s in method.expected(r, "0").items() if n[1] == "/") * 4 for r in rounds]
        described.append(
            {
                "name": name,
                "title": cls.title,
                "paper": cls.paper,
                "travels": kinds,
                "once": "class statistics" if method.options.start != "zero" else _once(method),
                "mixed_ranks": cls.mixed_ranks,
                "global_model": cls.has_global_model,
                "bytes_per_layer_up": sum(values) / len(values) if values else 0.0,
                "bytes_per_layer_down": sum(values) / len(values) if values else 0.0,
            }
        )
    return described


def _once(method: Method) -> str | None:
    return "class mixtures" if getattr(method.options, "uses_data", False) else None


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
