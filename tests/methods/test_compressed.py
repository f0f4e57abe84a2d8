"""Every method under every compression: it runs, absent clients and all, and without loss it is the method itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from folklora.federation.codec import decode, encode
from folklora.federation.compression import Compression, Uplink
from folklora.federation.traffic import per_round
from folklora.methods import METHODS
from folklora.methods.contract import Message
from folklora.sections import MessageSection

MIXED = sorted(name for name, cls in METHODS.items() if cls.mixed_ranks)
# So that it is known how many experts a client gets.
OPTIONS: dict[str, dict[str, Any]] = {"fedamole": {"min_experts": 6, "max_experts": 6}}
WIRES: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "top": {"top_k": 0.2},
    "feedback": {"dtype": "int4", "error_feedback": True},
    "all": {"dtype": "int8", "top_k": 0.1, "error_feedback": True},
}


class Compressed:
    """The federation of `conftest.py` with both ends of the wire in between, as `Member` and `Rounds` use them."""

    def __init__(self, fed: Any, wire: MessageSection) -> None:
        self.fed, self.method = fed, fed.method
        self.compression = Compression(wire, fed.method)
        self.uplinks = {name: Uplink(self.compression, name) for name in fed.clients}
        self.bytes: dict[tuple[int, str], int] = {}

    def over_the_wire(self, message: Message) -> Message:
        return decode(encode(message, self.compression.down))

    def begin(self) -> Compressed:
        sketches = {name: self.method.sketch(client) for name, client in self.fed.clients.items()}
        self.fed.state = self.method.begin({n: self.over_the_wire(m) for n, m in sketches.items() if m is not None})
        for name, client in self.fed.clients.items():
            welcome = self.method.welcome(self.fed.state, name)
            if welcome is not None:
                message = self.over_the_wire(welcome)
                self.method.settle(client, message)
                self.uplinks[name].settled(message)
        return self

    def round(self, round: int, who: list[str]) -> None:
        state = self.fed.state
        said: dict[str, list[Message | None]] = {}
        for name in who:
            reply = self.method.reply(state, name) if round > 1 else None
            said[name] = [self.method.welcome(state, name), reply]
            if reply is not None:
                message = self.over_the_wire(reply)
                self.method.receive(self.fed.clients[name], message)
                self.uplinks[name].received(message)
        self.fed.train(round, who)
        messages = {}
        for name in who:
            message = self.method.send(round, self.fed.clients[name])
            if message is None:
                continue
            data = self.uplinks[name].encode(round, message)
            self.bytes[round, name] = len(data)
            expected = self.method.expected(round, state, name)
            messages[name] = self.compression.read(round, name, data, expected, said[name])
            self.method.check_update(round, state, name, messages[name])
            self.uplinks[name].accepted()
            for key, tensor in messages[name].tensors.items():
                assert bool(torch.isfinite(tensor).all()), key
                if not tensor.is_floating_point():
                    assert torch.equal(tensor, message.tensors[key])
        if messages:
            self.fed.state = self.method.server(round, state, messages)


def ranks(name: str) -> tuple[int, ...]:
    return (2, 5, 3) if name in MIXED else (3, 3, 3)


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", METHODS)
def test_it_runs(federation: Callable[..., Any], name: str, wire: str, headless: bool) -> None:
    if headless and METHODS[name].needs_head:
        return
    section = MessageSection.model_validate(WIRES[wire])
    made = Compressed(federation(name, OPTIONS.get(name), ranks(name), headless=headless), section).begin()
    everyone = list(made.fed.clients)
    for round, who in ((1, everyone), (2, everyone[:2]), (3, everyone)):
        if round <= made.method.rounds():
            made.round(round, who)
    for tensor in made.fed.state.values():
        assert bool(torch.isfinite(tensor).all())
    first = everyone[0]
    if made.bytes:
        counts = torch.bincount(made.fed.clients[first].data.train[1], minlength=made.method.context.classes)
        assert per_round(made.method, first, section, counts).up == (made.bytes[1, first] + made.bytes[2, first]) // 2


def test_increments_count_from_zero(federation: Callable[..., Any]) -> None:
    """SCAFFOLD's dc: numbers that are not sent are zero, not what the server's c is."""
    section = MessageSection(top_k=0.1)
    fed = federation("fedit", {"scaffold": True}, optimizer="sgd")
    made = Compressed(fed, section).begin()
    made.round(1, list(fed.clients))
    made.round(2, list(fed.clients))
    sent = fed.method.send(2, fed.clients["ann"])
    read = made.uplinks["ann"].encode(2, sent)
    said = [None, fed.method.reply(fed.state, "ann")]
    arrived = made.compression.heard(said[1], sent.tensors)
    assert arrived["control/B/layer.0.query"].any()
    shapes = {name: tuple(tensor.shape) for name, tensor in sent.tensors.items()}
    travelled = decode(read, shapes=shapes).tensors["control/B/layer.0.query"]
    assert int((travelled != 0).sum()) == -(-travelled.numel() // 10)
    assert bool(torch.isin(travelled[travelled != 0], sent.tensors["control/B/layer.0.query"]).all())


def test_fresh_factors_continue_nothing(federation: Callable[..., Any]) -> None:
    section = MessageSection(top_k=0.2, error_feedback=True)
    made = Compressed(federation("flora", ranks=(2, 5, 3)), section).begin()
    made.round(1, list(made.fed.clients))
    assert {name.partition("/")[0] for name in made.uplinks["bob"].memory} == {"head", "norm"}


@pytest.mark.parametrize("head", [None, "shared", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_differences_without_loss_are_the_method_itself(
    federation: Callable[..., Any], name: str, head: str | None
) -> None:
    """float32 with feedback: all that is lost is rounding, so the server ends where it would have ended."""
    if METHODS[name].needs_head and head:
        return
    options = {"head": head, "head_start": "sketched"} if head == "shared" else {}
    options |= {"bits": 64.0, "block": 1} if name == "haflq" else {}  # what it sends without loss
    states = []
    for error_feedback in (False, True):
        section = MessageSection(error_feedback=error_feedback)
        made = Compressed(federation(name, options, ranks=ranks(name), headless=head == "none"), section).begin()
        for round, who in ((1, list(made.fed.clients)), (2, ["ann", "cid"]), (3, list(made.fed.clients))):
            if round <= made.method.rounds():
                made.round(round, who)
        states.append(made.fed.state)
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-4, atol=1e-5)
