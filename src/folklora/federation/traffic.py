"""What a method sends, before anything runs: the byte counts of messages of the agreed shapes, encoded for real."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from folklora.adapters.lowrank import Site, kind
from folklora.federation.codec import encode
from folklora.federation.compression import Compression
from folklora.federation.sealing import ASKED, Sealing
from folklora.federation.secrecy import exchange_bytes, masked_bytes
from folklora.methods import METHODS, build
from folklora.methods.base import Method
from folklora.methods.contract import Context, Message
from folklora.privacy.ckks import ID
from folklora.sections import MessageSection


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round: the message as encoded, and the values alone."""

    up: int
    down: int


def per_round(method: Method, client: str, section: MessageSection | str, counts: Tensor | None = None) -> Traffic:
    """Mean over two rounds, since some methods alternate, of one client's messages.

    ``section`` is the recipe's ``[message]``, or its ``dtype`` alone; ``counts`` as in `Method.typical_upload`.
    """
    section = MessageSection.model_validate({"dtype": section}) if isinstance(section, str) else section
    compression = Compression(section, method)
    up, down = _two_rounds(method, client, counts)
    return Traffic(
        sum(compression.bytes_up(message) for message in up if message is not None) // 2,
        sum(compression.bytes_down(message) for message in down if message is not None) // 2,
    )


@dataclass(frozen=True)
class Forecast:
    """What a run will count, as in the rows of `compare`: mean bytes of a client, in a round and once, both ways."""

    up: float
    down: float
    once: float


def forecast(
    method: Method, counts: Mapping[str, Tensor], section: MessageSection, *, masked: int = 0, sealed: bool = False
) -> Forecast:
    """A run's traffic if every client takes part in every round, stays, and keeps its rank and its data.

    Where fewer are sampled, a client's turn costs more: it catches up with what it missed before it trains.

    Parameters
    ----------
    counts
        Each client's training examples of each class, [classes].
    masked
        How many clients mask their uploads together in a round; 0: nobody does.
    sealed
        Whether uploads and replies are encrypted (``secure.kind = "ckks"``).
    """
    compression = Compression(section, method)
    rounds = method.rounds()
    beside_up, beside_down = exchange_bytes(masked) if masked and rounds else (0, 0)
    wire = Sealing(method) if sealed else compression
    up = down = once = 0.0
    known: dict[Any, tuple[int, int, int]] = {}
    for client, count in counts.items():
        # Messages of clients of one rank and of equal shapes weigh the same; sketches also depend on who holds what.
        alike = (method.context.ranks[client], *(tuple(method.expected(r, {}, client).items()) for r in (1, 2)))
        if method.condenses:
            alike = (*alike, tuple(count.tolist()))
        if alike not in known:
            ups, downs = _two_rounds(method, client, count)
            sizes_up = [_bytes_up(message, wire, masked) if message else 0 for message in ups]
            sizes_down = [wire.bytes_down(message) if message else 0 for message in downs]
            # Factors that alternate go up by turns; replies stay what they are once all factors are known.
            known[alike] = (
                sum(size * times for size, times in zip(sizes_up, (rounds - rounds // 2, rounds // 2), strict=False)),
                sum(size * times for size, times in zip(sizes_down, (1, rounds - 1), strict=False)),
                _weight(method.typical_welcome(client), section),
            )
        whole_up, whole_down, welcome = known[alike]
        up, down = up + whole_up, down + whole_down
        sketch = _weight(method.typical_sketch(client, count), section)
        once += welcome + sketch
        up += sketch * sum(map(method.refreshes, range(1, rounds + 1)))
        if sealed and rounds:  # which key it has
            up, down = up + ID, down + len(ASKED)
    turns = max(1, rounds) * len(counts)
    return Forecast(up / turns + beside_up, down / turns + beside_down, once / len(counts))


def _bytes_up(message: Message, wire: Compression | Sealing, masked: int) -> int:
    if masked:
        return masked_bytes(sum(tensor.numel() for tensor in message.tensors.values()))
    return wire.bytes_up(message)


def _weight(message: Message | None, section: MessageSection) -> int:
    return len(encode(message, section.dtype)) if message else 0


def _two_rounds(
    method: Method, client: str, counts: Tensor | None = None
) -> tuple[list[Message | None], list[Message | None]]:
    """What goes up and comes down in rounds 1 and 2."""
    rounds = (1, 2) if method.rounds() else ()
    ups = [method.typical_upload(r, client, counts) for r in rounds]
    return ups, [method.typical_reply(r, client) for r in rounds]


def describe_methods(d_in: int, d_out: int, rank: int, clients: int = 10) -> list[dict[str, Any]]:
    """Every method in one line: name, paper, what travels, and payload bytes per adapted layer and round in float32.

    Among so many clients: what comes down grows with them where all their factors are stacked.
    """
    described = []
    for name, cls in METHODS.items():
        context = Context(
            seed=0,
            ranks={str(i): rank for i in range(clients)},
            sites=(Site("layer", d_in, d_out),),
            alpha=float(rank),
            dropout=0.0,
            classes=2,
            width=d_in,
            head={"head/weight": (2, d_in), "head/bias": (2,)},
            norms={},
            rounds=1,
            learning_rate=1e-3,
            batch_size=1,
            local_epochs=1,
            optimizer="adamw",
            weight=lambda site: torch.eye(d_out, d_in),
        )
        method = build(name, {}, context)
        up, down = _two_rounds(method, "0")
        described.append(
            {
                "name": name,
                "title": cls.title,
                "paper": cls.paper,
                "travels": sorted({kind(name) for message in up if message is not None for name in message.tensors}),
                "once": method.once,
                "mixed_ranks": cls.mixed_ranks,
                "global_model": cls.has_global_model,
                "needs_head": cls.needs_head,
                "bytes_per_layer_up": 0.0 if method.condenses else _factor_bytes(up),  # data are of no layer
                "bytes_per_layer_down": _factor_bytes(down),
            }
        )
    return described


def _factor_bytes(messages: list[Message | None]) -> float:
    """Bytes of what belongs to the adapted layers, without head and norms: mean over the rounds. In float32, but for
    what the method sends in a form of its own."""
    total = 0
    for message in (m for m in messages if m is not None):
        for name, tensor in message.tensors.items():
            if kind(name) not in {"head", "norm"}:
                own = message.encodings.get(name)
                total += 4 * tensor.numel() if own is None else _own_bytes(tensor, own)
    return total / max(1, len(messages))


def _own_bytes(tensor: torch.Tensor, own: str) -> int:
    """What a tensor adds to a message that holds nothing but its name."""
    nothing = torch.zeros((0,) * tensor.dim(), dtype=torch.int32)
    return len(encode(Message({"x": tensor}, {}, {"x": own}))) - len(encode(Message({"x": nothing})))
