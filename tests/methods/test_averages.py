"""What `Method.averages` promises: the server's step takes nothing of the uploads but their weighted mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from folklora.methods import METHODS
from folklora.methods.aggregation import weighted_mean
from folklora.methods.contract import Message

Federations = Callable[..., Any]
AVERAGING = ("fedit", "ffa", "fedsa", "rolora", "federa", "loraxs", "fedsb", "fedlpp", "ditto", "apfl", "folklora")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in AVERAGING),
    ("celora", {"similarity": "size"}),
    ("celora", {"similarity": "size", "basis": "frozen", "head": "shared"}),
    ("fedit", {"fedopt": "adam"}),
    ("ffa", {"proximal": 0.1}),
    ("folklora", {"fedopt": "yogi"}),
]
OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((name, {}, {}) for name in METHODS if name not in AVERAGING),
    ("celora", {"similarity": "uniform"}, {}),
    ("celora", {"similarity": "size", "basis": "aligned"}, {}),
    ("fedit", {"scaffold": True}, {"optimizer": "sgd"}),
]


def what_is_said(fed: Any) -> list[Any]:
    """All that the server's state can be seen by: the next replies, and the model of everybody."""
    replies = [fed.method.reply(fed.state, client) for client in fed.clients]
    return [reply.tensors if reply else {} for reply in replies]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_a_server_that_is_given_the_mean_alone_says_the_same(
    federation: Federations, name: str, options: dict[str, Any]
) -> None:
    fed, blind = (federation(name, options, ranks=(3, 3, 3)).begin() for _ in range(2))
    assert fed.method.averages
    for round in (1, 2, 3):
        for each in (fed, blind):
            each.train(round)
        messages, unseen = fed.messages(round), blind.messages(round)
        fed.state = fed.method.server(round, fed.state, messages)
        mean = weighted_mean([m.tensors for m in unseen.values()], blind.method.weights(unseen))
        examples = sum(m.numbers["examples"] for m in unseen.values())
        blind.state = blind.method.server(round, blind.state, {"bob": Message(mean, {"examples": examples})})
        for seen, told in zip(what_is_said(fed), what_is_said(blind), strict=True):
            assert seen.keys() == told.keys()
            assert seen
            for key, tensor in seen.items():
                torch.testing.assert_close(told[key], tensor, rtol=1e-4, atol=1e-5)
        for each in (fed, blind):
            each.deliver()


@pytest.mark.parametrize(("name", "options", "other"), OTHERS, ids=str)
def test_others_do_not_promise_it(
    federation: Federations, name: str, options: dict[str, Any], other: dict[str, Any]
) -> None:
    assert not federation(name, options, ranks=(3, 3, 3), **other).method.averages


@pytest.mark.parametrize("name", ["celora", "folklora"])
def test_nor_does_anybody_with_ranks_of_several_sizes(federation: Federations, name: str) -> None:
    fed = federation(name, {"similarity": "size"}, ranks=(2, 5, 3))
    assert not fed.method.averages
