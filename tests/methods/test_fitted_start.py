"""Heads that clients fit before the first round, as a method has them: what travels for it, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from folklora.data.augmentation.choose import Augmenter
from folklora.data.statistics import ClassStatistics
from folklora.errors import MessageError, MethodError
from folklora.federation.codec import encode
from folklora.methods.contract import Message
from folklora.methods.fitting import fitted_head
from folklora.methods.heads import ABSENT

AUGMENTS = ("none", "gaussian", "sketch", "gan", "auto")
METHODS = ("local", "sketch", "celora", "folklora", "fedsb", "ditto", "fedlpp")


def head_of(fed: Any, client: str) -> dict[str, torch.Tensor]:
    return {name: fed.clients[client].tensors[name] for name in ("head/weight", "head/bias")}


def options_of(name: str, augment: str) -> dict[str, Any]:
    head = {} if name in ("sketch", "celora", "folklora", "local") else {"head": "private"}
    return {"head_start": "fitted", "augment": augment, **head}


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("name", METHODS)
def test_clients_begin_with_what_they_fitted(federation: Callable[..., Any], name: str, augment: str) -> None:
    """The oracle pools by hand what everybody has."""
    fed = federation(name, options_of(name, augment)).begin()
    pooled = ClassStatistics.merge(
        [ClassStatistics.of(*client.data.features("train"), 4) for client in fed.clients.values()]
    )
    shared = pooled if augment in ("sketch", "auto") else None
    for client in fed.clients:
        real = fed.clients[client].data.features("train")
        _, want = fitted_head(Augmenter(real, 4, 0, client, shared), augment)
        for key, tensor in head_of(fed, client).items():
            torch.testing.assert_close(tensor, want[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_once_weighs_what_was_foretold(federation: Callable[..., Any], name: str, augment: str) -> None:
    """Statistics go up and down where features are made of them; else a client is told to begin, and nothing more."""
    fed = federation(name, options_of(name, augment))
    sketches = fed.sketches()
    fed.begin()
    shares = augment in ("sketch", "auto")
    assert fed.method.sends_statistics == shares or name == "celora"
    for client, own in fed.clients.items():
        counts = torch.bincount(own.data.features("train")[1], minlength=4)
        typical, sent = fed.method.typical_sketch(client, counts), sketches.get(client)
        assert (typical is None) == (sent is None)
        if sent is not None:
            assert typical is not None
            assert len(encode(typical)) == len(encode(sent))
            assert ("statistics/means" in sent.tensors) == fed.method.sends_statistics
        welcome = fed.method.welcome(fed.state, client)
        for dtype in ("float32", "float16", "int8"):
            assert len(encode(fed.method.typical_welcome(client), dtype)) == len(encode(welcome, dtype))
        assert any(key.startswith("augment/") for key in welcome.tensors) == shares
        assert not any(key.startswith("head/") for key in welcome.tensors)


def test_classes_of_others_start_where_they_cannot_win(federation: Callable[..., Any]) -> None:
    fed = federation("local", {"augment": "auto"}, ranks=(3, 3))
    own = fed.clients["ann"].data
    rows = own.train[1] != 2
    own.train = own.train[0][rows], own.train[1][rows]
    fed.begin()
    assert head_of(fed, "ann")["head/bias"][2] == ABSENT
    assert not head_of(fed, "ann")["head/weight"][2].any()


def test_a_sketch_that_is_missing_leaves_the_others_their_features(federation: Callable[..., Any]) -> None:
    fed = federation("local", {"augment": "sketch"}).begin(missing=["bob"])
    assert all(head_of(fed, client)["head/weight"].any() for client in fed.clients)
    with pytest.raises(MethodError, match="no client sent class statistics"):
        federation("local", {"augment": "sketch"}).begin(missing=("ann", "bob", "cid"))


def test_a_welcome_that_lacks_the_statistics_is_refused(federation: Callable[..., Any]) -> None:
    fed = federation("local", {"augment": "sketch"}).begin()
    with pytest.raises(MessageError):
        fed.method.settle(fed.clients["ann"], Message({}))


@pytest.mark.parametrize("name", ["local", "celora", "folklora"])
def test_private_examples_are_not_fitted_to(federation: Callable[..., Any], name: str) -> None:
    what, allowed = federation(name, {"head_start": "fitted"}).method.beside_training
    assert 'head_start = "fitted"' in what
    assert 'head_start = "zero"' in allowed


def test_without_augmentation_nothing_changes(federation: Callable[..., Any]) -> None:
    fed = federation("local", {"augment": "none"}).begin()
    assert fed.method.welcome(fed.state, "ann") is None
    assert not head_of(fed, "ann")["head/weight"].any()


def test_a_task_without_a_head_has_none_to_fit(context: Callable[..., Any]) -> None:
    from folklora.methods import build

    for options in ({"augment": "gan"}, {"head_start": "fitted"}):
        with pytest.raises(MethodError, match="the task has no head of its own"):
            build("local", options, context(classes=1, head={}))
