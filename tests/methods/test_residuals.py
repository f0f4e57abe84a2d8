"""Changes to everybody's frozen weights arrive everywhere, once: absence, lost replies, refused uploads, resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.adapters.lowrank import Site, Tensors
from folklora.federation.codec import decode, encode
from folklora.federation.traffic import per_round
from folklora.methods.aggregation import aggregation_error
from folklora.methods.contract import Client, Message
from folklora.methods.residuals import ResidualLog, merged

# Wide enough that the stack of three clients of rank 2 weighs less than dense, and that of three rounds more.
WIDE = (Site("layer.0.query", 40, 30), Site("layer.1.value", 24, 50))
METHODS = [("flora", {}), ("fedex", {})]
both = pytest.mark.parametrize(("name", "options"), METHODS, ids=["flora", "fedex"])
IDS = ("ann", "bob", "cid", "dot", "eve")


def wide(federation: Callable[..., Any], name: str, options: dict[str, Any], count: int = 3, rank: int = 2) -> Any:
    return federation(name, options, ranks=(rank,) * count, sites=WIDE).begin()


def target(fed: Any, messages: dict[str, Message]) -> list[np.ndarray]:
    """What everybody should end with: the dense mean, by examples, of what the senders trained."""
    n = np.array([message.numbers["examples"] for message in messages.values()])
    updates = [fed.dense(fed.clients[client].tensors) for client in messages]
    return [np.einsum("k,kij->ij", n / n.sum(), np.stack(site)) for site in zip(*updates, strict=True)]


def assert_model(fed: Any, client: str, want: list[np.ndarray]) -> None:
    for got, expected in zip(fed.dense(fed.clients[client].tensors), want, strict=True):
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


def changes(reply: Message) -> dict[str, torch.Tensor]:
    return {name: t for name, t in reply.tensors.items() if name.startswith(("up/", "down/", "base/"))}


def rounds_of(reply: Message) -> set[int]:
    return {int(name.split("/")[1]) for name in changes(reply)}


# -- who was away ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("away", [1, 2, 3, 6])
def test_an_absent_client_ends_where_the_others_are(
    federation: Callable[..., Any], name: str, options: dict[str, Any], away: int
) -> None:
    fed = wide(federation, name, options)
    for round in range(1, 1 + away):
        fed.deliver(["ann", "bob"])
        want = target(fed, fed.step(round, ["ann", "bob"]))
    # cid has missed every round so far; ann has everything but the last one.
    assert min(rounds_of(fed.method.reply(fed.state, "ann"))) == away
    fed.deliver()
    for client in fed.clients:
        assert_model(fed, client, want)
    # And goes on with the others from there.
    want = target(fed, fed.step(away + 1))
    fed.deliver()
    for client in fed.clients:
        assert_model(fed, client, want)


@both
def test_nobody_is_sent_more_than_the_dense_sum(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = wide(federation, name, options)
    kinds, logged = [], []
    for round in range(1, 12):
        fed.deliver(["ann", "bob"])
        fed.step(round, ["ann", "bob"])
        sent = changes(fed.method.reply(fed.state, "cid"))
        for site in WIDE:
            numbers = sum(t.numel() for key, t in sent.items() if key.endswith(site.name))
            assert 0 < numbers <= site.d_in * site.d_out
        kinds.append({key.partition("/")[0] for key in sent})
        logged.append(sum(t.numel() for key, t in fed.state.items() if key.startswith(("log/up/", "log/down/"))))
    assert kinds[0] == {"up", "down"}
    assert kinds[-1] == {"base"}
    assert max(logged) < sum(site.d_in * site.d_out for site in WIDE)


@both
def test_the_log_forgets_what_everybody_has(federation: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    fed = wide(federation, name, options)
    for round in range(1, 5):
        fed.deliver()
        fed.step(round)
        logged = {int(key.split("/")[2]) for key in fed.state if key.startswith("log/up/")}
        assert logged == {round}
        assert all(rounds_of(fed.method.reply(fed.state, client)) == {round} for client in fed.clients)


# -- what is said twice, or not heard --------------------------------------------------------------------------------


@both
def test_a_reply_that_comes_twice_counts_once(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = wide(federation, name, options)
    for round in range(1, 4):
        want = target(fed, fed.step(round))
        fed.deliver()
        once, notes = fed.snapshot(), {name: dict(client.notes) for name, client in fed.clients.items()}
        fed.deliver()
        for client in fed.clients:
            assert_model(fed, client, want)
            assert all(torch.equal(t, once[client][key]) for key, t in fed.clients[client].tensors.items())
            assert all(torch.equal(t, notes[client][key]) for key, t in fed.clients[client].notes.items())


@both
def test_a_refused_upload_counts_nothing_twice(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    """bob receives and trains in every round, but what he sends is refused in rounds 2 and 3."""
    fed = wide(federation, name, options)
    want: list[np.ndarray] = []
    for round in range(1, 6):
        fed.deliver()
        if want:
            assert_model(fed, "bob", want)
        fed.train(round)
        messages = fed.messages(round)
        if round in {2, 3}:
            del messages["bob"]
        want = target(fed, messages)
        fed.state = fed.method.server(round, fed.state, messages)
        if round == 3:
            # The server cannot know what bob received since round 1, and sends it again; ann gets the last change only.
            assert rounds_of(fed.method.reply(fed.state, "bob")) == {1, 2, 3}
            assert rounds_of(fed.method.reply(fed.state, "ann")) == {3}
    fed.deliver()
    for client in fed.clients:
        assert_model(fed, client, want)


@both
@pytest.mark.parametrize("dtype", ["int4", "int8", "float16"])
def test_bases_do_not_drift_apart_however_narrow_the_messages(
    federation: Callable[..., Any], name: str, options: dict[str, Any], dtype: str
) -> None:
    fed = wide(federation, name, options)
    for round in range(1, 5):
        fed.step(round)
        for client in fed.clients:
            reply = decode(encode(fed.method.reply(fed.state, client), dtype))
            fed.method.receive(fed.clients[client], reply)
    for client in fed.clients.values():
        for site in WIDE:
            assert torch.equal(client.tensors[f"base/{site.name}"], fed.state[f"log/base/{site.name}"])


@both
def test_a_preview_leaves_the_client_alone(federation: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    """Validation asks a copy of the client what it would be; the copy shares tensors, and nothing may write to them."""
    fed = wide(federation, name, options)
    fed.step(1)
    fed.deliver()
    fed.step(2)
    client = fed.clients["ann"]
    before = {key: tensor.clone() for key, tensor in client.tensors.items()}
    shadow = Client(**{**vars(client), "tensors": dict(client.tensors), "notes": dict(client.notes)})
    fed.method.receive(shadow, fed.method.reply(fed.state, "ann"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in client.tensors.items())
    assert int(client.notes["version"]) == 1
    assert int(shadow.notes["version"]) == 2


def through_a_checkpoint(tensors: Tensors) -> Tensors:
    return safetensors.torch.load(safetensors.torch.save(tensors))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), method=st.sampled_from(METHODS), seed=st.integers(0, 99))
def test_whatever_happens_everybody_ends_with_the_dense_mean(
    federation: Callable[..., Any], data: st.DataObject, method: tuple[str, dict[str, Any]], seed: int
) -> None:
    """Any mix of absence, replies that are lost or repeated, refused uploads, and restarts from a checkpoint."""
    name, options = method
    count = data.draw(st.integers(1, 4))
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count)) if name == "flora" else [2] * count
    fed = federation(name, options, ranks=ranks, sites=WIDE, seed=seed).begin()
    some = st.sets(st.sampled_from(IDS[:count]))
    want = None
    for round in range(1, 1 + data.draw(st.integers(1, 6))):
        sampled, twice, lost, refused = (sorted(data.draw(some)) for _ in range(4))
        working = [client for client in sampled if client not in lost]
        for who in (working, [client for client in twice if client in working]):
            fed.deliver(who) if who else None
        if want is not None:
            for client in working:
                assert_model(fed, client, want)
        if working:
            fed.train(round, working)
            messages = {c: m for c, m in fed.messages(round, working).items() if c not in refused}
            if messages:
                want = target(fed, messages)
                trained = [dict(fed.clients[client].tensors) for client in messages]
                fed.state = fed.method.server(round, fed.state, messages)
                error = error_of(fed, list(messages), trained, messages)
                assert error < 1e-5
        if data.draw(st.booleans()):
            fed.state = through_a_checkpoint(fed.state) if fed.state else {}
            for client in fed.clients.values():
                client.tensors = through_a_checkpoint(client.tensors)
                client.notes = through_a_checkpoint(client.notes)
    if want is not None:
        fed.deliver()
        common = fed.method.global_model(fed.state, "ann", dict(fed.clients["ann"].tensors))
        assert common is not None
        for client in fed.clients:
            assert_model(fed, client, want)
        for got, expected in zip(fed.dense(common), want, strict=True):
            assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


def error_of(fed: Any, senders: Sequence[str], trained: list[Tensors], messages: dict[str, Message]) -> float:
    """The run's own measure, on copies that receive what is waiting for them."""
    received = []
    for client in senders:
        shadow = Client(**{**vars(fed.clients[client]), "tensors": dict(fed.clients[client].tensors)})
        shadow.notes = dict(shadow.notes)
        fed.method.receive(shadow, fed.method.reply(fed.state, client))
        received.append(shadow.tensors)
    mixing = fed.method.mixing(fed.state, messages)
    return aggregation_error(fed.method.adapter, trained, received, mixing)


# -- the log by itself -----------------------------------------------------------------------------------------------


def test_adding_factors_is_adding_their_product() -> None:
    rng = np.random.default_rng(0)
    base, up, down = rng.normal(size=(5, 7)), rng.normal(size=(5, 2)), rng.normal(size=(2, 7))
    got = merged(*(torch.tensor(x, dtype=torch.float32) for x in (base, up, down)))
    np.testing.assert_allclose(got.numpy(), base + up @ down, rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float32


def test_a_change_of_rank_zero_is_none(context: Callable[..., Any]) -> None:
    log = ResidualLog(context(sites=WIDE))
    nothing = {site.name: (torch.zeros(site.d_out, 0), torch.zeros(0, site.d_in)) for site in WIDE}
    state = log.extend({}, 1, ["ann"], nothing)
    assert log.missing(state, "bob") == {}
    assert log.latest(state) == 0
    assert log.typical(1, 0) == {}


def test_the_server_and_a_client_that_heard_all_agree_to_the_last_bit(context: Callable[..., Any]) -> None:
    made = context(sites=WIDE)
    log, rng = ResidualLog(made), torch.Generator().manual_seed(0)
    client = Client("ann", 3, 1, log.zeros(), None, 0)  # type: ignore[arg-type]
    state: Tensors = {}
    for round in range(1, 6):
        change = {s.name: (torch.randn(s.d_out, 2, generator=rng), torch.randn(2, s.d_in, generator=rng)) for s in WIDE}
        state = log.extend(state, round, ["ann"], change)
        assert log.receive(client, Message({**log.missing(state, "ann"), "head/bias": torch.ones(2)})).keys() == {
            "head/bias"
        }
        assert all(torch.equal(client.tensors[key], tensor) for key, tensor in log.total(state).items())


# -- what it costs ---------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("count", "kinds"), [(3, {"up", "down"}), (5, {"up", "down"}), (5, {"base"})])
def test_the_forecast_is_what_real_messages_weigh(
    federation: Callable[..., Any], name: str, options: dict[str, Any], count: int, kinds: set[str]
) -> None:
    """As factors, and where so many clients of so high a rank take part that the dense sum is smaller."""
    fed = wide(federation, name, options, count, rank=2 if kinds == {"up", "down"} else 6)
    for client, weighed in fed.weigh().items():
        assert {key.partition("/")[0] for key in changes(fed.method.reply(fed.state, client))} == kinds
        assert per_round(fed.method, client, "float32") == weighed
