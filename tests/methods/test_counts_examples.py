"""Whether examples count, as a method says, beside what its server does with other numbers of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from folklora.methods import METHODS
from folklora.methods.contract import Message, State

SHARED = {"head": "shared", "head_start": "sketched"}
WITHOUT_A_HEAD_THAT_TRAVELS = ("sketch", "feddm", "fedaf")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    *((name, SHARED) for name in METHODS if name not in WITHOUT_A_HEAD_THAT_TRAVELS),
    *(
        ("celora", {"similarity": similarity, "head": head})
        for similarity in ("model", "uniform", "size")
        for head in ("private", "shared")
    ),
    ("folklora", {"similarity": "data"}),
    ("fedit", {"scaffold": True}),
    ("fedit", {"fedopt": "momentum"}),
    ("fedamole", {"weights": "size"}),
    ("fedawa", {"weights": "layer"}),
]


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def counted(messages: Mapping[str, Message], examples: list[int]) -> dict[str, Message]:
    return {
        client: Message(message.tensors, {**message.numbers, "examples": float(count)}, message.encodings)
        for (client, message), count in zip(messages.items(), examples, strict=True)
    }


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_a_method_says_whether_examples_count(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    # Without norms: some methods count examples for these alone.
    fed = federation(name, options, norms={}, optimizer="sgd").begin()
    method, differs = fed.method, False
    for round in range(1, 1 + min(2, method.rounds())):
        fed.train(round)
        if not (messages := fed.messages(round)):
            continue
        ends = [method.server(round, dict(fed.state), counted(messages, n)) for n in ([10, 20, 30], [10, 200, 3])]
        differs |= not same(*ends)
        fed.state = ends[0]
        fed.deliver()
    assert method.counts_examples == differs


def test_norms_are_weighed_where_factors_are_not(federation: Callable[..., Any]) -> None:
    for name in ("hetlora", "fedamole"):
        assert federation(name).method.counts_examples
        assert not federation(name, {"head": "private"}, norms={}).method.counts_examples
