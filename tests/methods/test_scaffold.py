"""SCAFFOLD on quadratics, where its optimum is known, and what lost messages do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.errors import MethodError
from folklora.federation.codec import check
from folklora.federation.member import Member
from folklora.federation.run import run
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.federation.traffic import per_round
from folklora.methods import METHODS, build
from folklora.methods.contract import Message
from folklora.training.cohort import CohortTrainer

LR, STEPS = 0.05, 20  # of `Federation.descend`
WITH = {"celora": {"similarity": "uniform"}, "fedlpp": {"block": 1}}  # one number a block: nothing is lost
TAKING = [(name, WITH.get(name, {})) for name in METHODS if "scaffold" in METHODS[name].combines]
taking = pytest.mark.parametrize(("name", "options"), TAKING, ids=str)
SGD: dict[str, Any] = {"optimizer": "sgd", "examples": (20,) * 5}


def play(
    fed: Any, rounds: int, who: Callable[[int], Sequence[str] | None], lost: Callable[[int], Sequence[str]]
) -> None:
    for round in range(1, rounds + 1):
        fed.deliver(who(round))
        fed.descend(round, who(round))
        messages = {i: m for i, m in fed.messages(round, who(round)).items() if i not in lost(round)}
        if messages:
            fed.state = fed.method.server(round, fed.state, messages)
    fed.deliver()


def everybody(round: int) -> None:
    return None


def nobody(round: int) -> list[str]:
    return []


def biases(fed: Any, quadratic: Callable[..., Any]) -> list[float]:
    """How far each shared tensor is from the minimum of the clients' mean, relative to the clients' spread."""
    kinds = fed.method.shared(1) | fed.method.shared(2)
    found = []
    for name, tensor in fed.clients["ann"].tensors.items():
        if name.partition("/")[0] in kinds:
            pairs = [quadratic(client, name, tensor.shape) for client in fed.clients]
            best = sum(h * a for h, a in pairs) / sum(h for h, _ in pairs)
            spread = torch.stack([a for _, a in pairs]).std(0).norm()
            found.append(float((tensor.double() - best).norm() / spread))
    return found


def controls(fed: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The server's c of each tensor, and the mean of the clients' own."""
    return {
        name.removeprefix("control/"): (
            tensor.double().numpy(),
            np.mean(
                [
                    c.notes.get(f"control/own/{name.removeprefix('control/')}", torch.zeros_like(tensor)).double()
                    for c in fed.clients.values()
                ],
                axis=0,
            ),
        )
        for name, tensor in fed.state.items()
        if name.startswith("control/")
    }


@taking
def test_it_finds_the_optimum_that_fedavg_misses(
    federation: Callable[..., Any], quadratic: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    rounds = 50 if name == "rolora" else 25
    plain, corrected = federation(name, options, **SGD).begin(), federation(name, {**options, "scaffold": True}, **SGD)
    for fed in (plain, corrected.begin()):
        play(fed, rounds, everybody, nobody)
    assert min(biases(plain, quadratic)) > 0.02
    assert max(biases(corrected, quadratic)) < 1e-4
    for c, mean in controls(corrected).values():
        np.testing.assert_allclose(c, mean, atol=1e-5)


@pytest.mark.parametrize("name", ["fedit", "folklora"])
def test_with_some_absent_and_some_messages_lost_it_still_does(
    federation: Callable[..., Any], quadratic: Callable[..., Any], name: str
) -> None:
    """Whoever trained but was not heard must not remember it, or c is wrong for good."""
    fed = federation(name, {"scaffold": True}, ranks=(3,) * 5, **SGD).begin()
    random = np.random.default_rng(1)
    drawn = {r: list(random.choice(list(fed.clients), 3, replace=False)) for r in range(1, 200)}
    unheard = {r: drawn[r][:1] if random.random() < 0.4 else [] for r in drawn}
    unheard[7] = drawn[7]  # a round of which nothing arrives
    play(fed, 120, drawn.__getitem__, unheard.__getitem__)
    for c, mean in controls(fed).values():
        np.testing.assert_allclose(c, mean, atol=1e-5)
    assert max(biases(fed, quadratic)) < 2e-3


def test_the_first_rounds_against_the_paper(federation: Callable[..., Any], quadratic: Callable[..., Any]) -> None:
    """Algorithm 1 with option II in NumPy, one number of each tensor, clients that come and go."""
    fed = federation("fedit", {"scaffold": True}, ranks=(3,) * 5, **SGD).begin()
    where = {name: tuple(n // 2 for n in t.shape) for name, t in fed.clients["ann"].tensors.items()}
    x = {name: float(t[where[name]]) for name, t in fed.clients["ann"].tensors.items()}
    c = dict.fromkeys(x, 0.0)
    own = {client: dict.fromkeys(x, 0.0) for client in fed.clients}
    for round, who in enumerate((["ann", "bob", "eve"], ["bob", "cid"], ["ann", "bob"], list(fed.clients)), start=1):
        fed.deliver(who)
        fed.descend(round, who)
        fed.state = fed.method.server(round, fed.state, fed.messages(round, who))
        for name, spot in where.items():
            ys, moves = [], []
            for client in who:
                h, a = (float(t[spot]) for t in quadratic(client, name, fed.clients["ann"].tensors[name].shape))
                y = x[name]
                for _ in range(STEPS):
                    y -= LR * (h * (y - a) + c[name] - own[client][name])
                new = own[client][name] - c[name] + (x[name] - y) / (STEPS * LR)
                moves.append(new - own[client][name])
                ys.append(y)
                own[client][name] = new
            x[name] += np.mean(np.array(ys) - x[name])
            c[name] += len(who) / 5 * np.mean(moves)
            assert float(fed.state[f"global/{name}"][spot]) == pytest.approx(x[name], rel=1e-4, abs=1e-5)
            assert float(fed.state[f"control/{name}"][spot]) == pytest.approx(c[name], rel=1e-4, abs=1e-4)
    fed.deliver()
    for client, controls_ in own.items():
        for name, spot in where.items():
            got = float(fed.clients[client].notes[f"control/own/{name}"][spot])
            assert got == pytest.approx(controls_[name], rel=1e-4, abs=1e-4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_c_is_the_mean_of_what_clients_hold_whatever_gets_lost(
    federation: Callable[..., Any], data: st.DataObject
) -> None:
    count, rank = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    fed = federation("rolora", {"scaffold": True}, ranks=(rank,) * count, **SGD).begin()
    some = st.lists(st.sampled_from(list(fed.clients)), unique=True)
    for round in range(1, data.draw(st.integers(1, 5)) + 1):
        who = data.draw(some) or list(fed.clients)
        fed.deliver(who)
        fed.descend(round, who, steps=data.draw(st.integers(1, 4)))
        lost = data.draw(some)
        messages = {i: m for i, m in fed.messages(round, who).items() if i not in lost}
        if data.draw(st.booleans()):
            fed.deliver(data.draw(some))  # an old reply once more, after training
        if messages:
            fed.state = fed.method.server(round, fed.state, messages)
    fed.deliver()
    for c, mean in controls(fed).values():
        np.testing.assert_allclose(c, mean, atol=1e-4)


@taking
def test_a_reply_twice_or_a_look_ahead_changes_nothing(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = federation(name, {**options, "scaffold": True}, **SGD).begin()
    for round in (1, 2):
        fed.deliver()
        fed.descend(round)
        fed.state = fed.method.server(round, fed.state, fed.messages(round))
    client = fed.clients["bob"]
    reply = fed.method.reply(fed.state, "bob")
    before = (dict(client.tensors), dict(client.notes))
    shadow = type(client)(**{**vars(client), "tensors": dict(client.tensors), "notes": dict(client.notes)})
    fed.method.receive(shadow, reply)
    assert (client.tensors, client.notes) == before
    fed.method.receive(client, reply)
    once = (dict(client.tensors), {key: tensor.clone() for key, tensor in client.notes.items()})
    assert any(key.startswith("control/own/") for key in once[1])
    assert not any(key.startswith("control/sent/") for key in once[1])
    fed.method.receive(client, reply)
    assert client.tensors.keys() == once[0].keys() == before[0].keys()
    assert client.notes.keys() == once[1].keys()
    assert all(torch.equal(client.notes[key], tensor) for key, tensor in once[1].items())
    assert not any(key.startswith("control") for key in client.tensors)


@taking
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_travels_is_expected_and_forecast(
    federation: Callable[..., Any], name: str, options: dict[str, Any], dtype: str
) -> None:
    fed = federation(name, {**options, "scaffold": True}, **SGD).begin()
    plain = federation(name, options, **SGD)
    for round in (1, 2):
        fed.descend(round)
        for client, message in fed.messages(round).items():
            shapes = fed.method.expected(round, fed.state, client)
            check(message, shapes, ("examples",))
            own = {key for key in shapes if not key.startswith("control/")}
            assert own == set(plain.method.expected(round, {}, client))
            assert set(shapes) - own == {f"control/{key}" for key in own}
        fed.state = fed.method.server(round, fed.state, fed.messages(round))
        fed.deliver()
    again = federation(name, {**options, "scaffold": True}, **SGD).begin()
    for client, weighed in again.weigh(dtype, again.descend).items():
        assert per_round(fed.method, client, dtype) == weighed
    model = fed.method.global_model(fed.state, "ann", dict(fed.clients["ann"].tensors))
    assert model is None or set(model) == set(fed.clients["ann"].tensors)


def test_increments_continue_nothing_that_was_told(federation: Callable[..., Any]) -> None:
    """Compressed, dc is compared with zero, not with the c that came down by the same name."""
    fed = federation("fedit", {"scaffold": True}, **SGD).begin()
    for round in (1, 2):
        fed.deliver()
        fed.descend(round)
        fed.state = fed.method.server(round, fed.state, fed.messages(round))
    message, told = fed.messages(2)["ann"], fed.method.reply(fed.state, "ann").tensors
    known = fed.method.known(3, "ann", told, message)
    for name in message.tensors:
        assert torch.equal(known[name], torch.zeros_like(told[name]) if name.startswith("control/") else told[name])
        assert told[name].any()


def test_clients_count_alike(federation: Callable[..., Any]) -> None:
    fed = federation("fedit", {"scaffold": True}, optimizer="sgd").begin()
    fed.descend(1)
    messages = fed.messages(1)
    state = fed.method.server(1, fed.state, messages)
    want = torch.stack([m.tensors["head/weight"].double() for m in messages.values()]).mean(0)
    torch.testing.assert_close(state["global/head/weight"].double(), want, rtol=1e-6, atol=1e-6)
    mixing = fed.method.mixing(state, messages)
    torch.testing.assert_close(mixing, torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_it_needs_plain_steps_and_one_rank(context: Callable[..., Any]) -> None:
    scaffold = {"scaffold": True}
    build("fedit", scaffold, context(optimizer="sgd"))
    with pytest.raises(MethodError, match=r'train.optimizer = "adamw" .* allowed: "sgd" with momentum = 0'):
        build("fedit", scaffold, context())
    with pytest.raises(MethodError, match=r"train.momentum = 0.9; allowed"):
        build("fedit", scaffold, context(optimizer="sgd", momentum=0.9))
    with pytest.raises(MethodError, match=r"adapter.rank has \[2, 3\]; allowed: one rank"):
        build("folklora", scaffold, context((2, 3), optimizer="sgd"))


def test_a_message_without_control_variates_is_not_what_was_agreed(federation: Callable[..., Any]) -> None:
    fed = federation("fedit", {"scaffold": True}, **SGD).begin()
    fed.descend(1)
    honest = fed.messages(1)["ann"]
    without = Message({n: t for n, t in honest.tensors.items() if not n.startswith("control/")}, honest.numbers)
    with pytest.raises(Exception, match="control/"):
        check(without, fed.method.expected(1, fed.state, "ann"), ("examples",))


def test_a_real_run(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Half of the clients a round; what the run directory holds adds up."""
    settings_ = ("train.optimizer=sgd", "train.lr=0.5", "train.rounds=3", "train.participation=0.5")
    plain = run(tiny_recipe("method.name=fedit", *settings_), tmp_path / "plain")["row"]
    row = run(tiny_recipe("method.name=fedit", "method.scaffold=true", *settings_), tmp_path / "run")["row"]
    assert 1.9 < row["bytes_up_per_client_round"] / plain["bytes_up_per_client_round"] < 2.1
    assert 1.9 < row["bytes_down_per_client_round"] / plain["bytes_down_per_client_round"] < 2.1
    directory = RunDirectory.open(tmp_path / "run")
    checkpoint = directory.checkpoint()
    state = directory.tensors(checkpoint, checkpoint.server)
    clients = [directory.tensors(checkpoint, name) for name in checkpoint.clients.values()]
    names = [name for name in state if name.startswith("control/")]
    assert len(names) > 4
    for name in names:
        rest = name.removeprefix("control/")
        parts = [
            c[key].double()
            for c in clients
            for key in (f"notes/control/{k}/{rest}" for k in ("own", "sent"))
            if key in c
        ]
        assert len(parts) >= 4
        torch.testing.assert_close(state[name].double(), sum(parts) / len(clients), rtol=1e-4, atol=1e-6)
        assert state[name].any()


def test_control_variates_are_gradients_whatever_the_heads_rate(tiny_recipe: Callable[..., Any]) -> None:
    """One step from one start: a head that moved a tenth of the way says the same of its gradient."""
    found = []
    for more in ((), ("train.head_lr=0.05",)):
        options = ("method.scaffold=true", "train.optimizer=sgd", "train.lr=0.5", "train.batch_size=1000", *more)
        setup = prepare(tiny_recipe("method.name=fedit", *options))
        member = Member(setup, "0")
        trainer = CohortTrainer(setup.task, setup.method.adapter, setup.recipe.train, setup.recipe.seed)
        start = dict(member.client.tensors)
        member.finish(1, list(trainer.fit(member.jobs(1))))
        moved = float((member.client.tensors["head/weight"] - start["head/weight"]).norm())
        found.append((moved, {n: t for n, t in member.client.notes.items() if n.startswith("control/sent/")}))
    (whole, plain), (tenth, slow) = found
    assert tenth == pytest.approx(whole / 10, rel=1e-4)
    for name, control in plain.items():
        torch.testing.assert_close(slow[name], control, rtol=1e-4, atol=1e-7)
