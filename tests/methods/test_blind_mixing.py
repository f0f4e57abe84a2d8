"""What `Method.blind_mixing` promises: the server's step is a mix with weights that no upload has a part in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from folklora.adapters.lowrank import kind
from folklora.methods import METHODS
from folklora.methods.contract import Message

Federations = Callable[..., Any]
AVERAGING = ("fedit", "ffa", "fedsa", "rolora", "federa", "loraxs", "fedsb", "ditto", "apfl", "folklora")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in AVERAGING),
    ("fedit", {"proximal": 0.1}),
    ("celora", {"similarity": "data"}),
    ("celora", {"similarity": "data", "head": "shared", "temperature": 0.05}),
    ("celora", {"similarity": "data", "components": 0, "dp_epsilon": 5.0}),
    ("celora", {"similarity": "both", "lambda": 1.0, "basis": "frozen"}),
    ("celora", {"similarity": "uniform", "head": "shared"}),
    ("celora", {"similarity": "size"}),
    ("folklora", {"similarity": "data", "head": "shared", "head_start": "sketched"}),
]
OTHERS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *((name, {}, {}, f'method.name = "{name}"') for name in METHODS if name not in (*AVERAGING, "celora")),
    ("celora", {}, {}, 'method.similarity = "both"'),
    ("celora", {"similarity": "model"}, {}, 'method.similarity = "model"'),
    ("celora", {"similarity": "both", "lambda": 0.99}, {}, 'method.similarity = "both"'),
    ("celora", {"similarity": "data", "basis": "aligned"}, {}, 'method.basis = "aligned"'),
    ("folklora", {}, {"ranks": (2, 5, 3)}, "adapter.rank = [2, 3, 5]"),
    ("fedit", {"fedopt": "momentum"}, {}, 'method.fedopt = "momentum"'),
    ("folklora", {"fedopt": "adam"}, {}, 'method.fedopt = "adam"'),
    ("fedit", {"scaffold": True}, {"optimizer": "sgd"}, "method.scaffold = true"),
    ("folklora", {"scaffold": True}, {"optimizer": "sgd"}, "method.scaffold = true"),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_replies_are_the_uploads_mixed_so(federation: Federations, name: str, options: dict[str, Any]) -> None:
    fed = federation(name, options, ranks=(3, 3, 3, 3)).begin(missing=["dot"])
    method, everybody = fed.method, list(fed.clients)
    assert method.must_read is None
    had: dict[str, dict[str, Any]] = {client: {} for client in everybody}
    for round, who in ((1, everybody), (2, everybody[1:]), (3, everybody[:2])):
        fed.train(round, who)
        messages = fed.messages(round, who)
        weights = method.weights(messages)
        # What it is asked with: numbers of examples, and not one tensor.
        rows = method.blind_mixing(fed.state, who, weights)
        assert torch.allclose(rows.sum(-1), torch.ones(1, dtype=rows.dtype))
        fed.state = method.server(round, fed.state, messages)
        for client in everybody:
            for tensor in messages[who[0]].tensors:
                wanted = rows if kind(tensor) in method.travels else weights
                if wanted.dim() == 2 and client not in who:
                    continue  # it keeps what it had
                row = wanted if wanted.dim() == 1 else wanted[who.index(client)]
                stacked = torch.stack([messages[other].tensors[tensor].double() for other in who])
                had[client][tensor] = torch.einsum("k,k...->...", row.double(), stacked)
            told = method.reply(fed.state, client)
            assert told.tensors.keys() == had[client].keys()
            assert not told.numbers
            for tensor, found in told.tensors.items():
                torch.testing.assert_close(found.double(), had[client][tensor], rtol=1e-5, atol=1e-6)
        fed.deliver()


@pytest.mark.parametrize(("name", "options", "other", "what"), OTHERS, ids=str)
def test_others_say_what_they_have_to_read(
    federation: Federations, name: str, options: dict[str, Any], other: dict[str, Any], what: str
) -> None:
    found = federation(name, options, **other).method.must_read
    assert found is not None
    assert found[0] == what
    assert found[1]


def test_one_client_gets_its_own(federation: Federations) -> None:
    fed = federation("celora", {"similarity": "data"}).begin()
    weights = fed.method.weights({"bob": Message({}, {"examples": 12.0})})
    assert fed.method.blind_mixing(fed.state, ["bob"], weights).tolist() == [[1.0]]
