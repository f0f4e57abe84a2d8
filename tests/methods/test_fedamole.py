"""FedAMoLE: means over holders, assignments from embeddings, bytes of what is held; without domains it is FedIT."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from folklora.adapters.mixture import blocks_of
from folklora.errors import MethodError, RecipeError
from folklora.federation.codec import encode
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.federation.traffic import forecast
from folklora.methods import build, check_options
from folklora.methods.contract import Message
from folklora.methods.fedamole import FedAMoLE
from folklora.sections import MessageSection

Federations = Callable[..., Any]
SITES = ("layer.0.query", "layer.1.value")
RANK = 3
FIVE = (RANK,) * 5
kinds = pytest.mark.parametrize("experts", ["lora", "cores"])


def holdings(fed: Any, site: str) -> dict[str, list[int]]:
    return {client: fed.method.held(fed.state, client, site).tolist() for client in fed.clients}


def blocks(fed: Any, tensors: Any, site: str) -> dict[str, np.ndarray]:
    """Of a client or a message: [1 + n, ...] of each kind of an expert's tensors."""
    names = [f"{factor}/{site}" for factor in fed.method.adapter.expert_kinds]
    return {name: blocks_of(name, tensors[name], RANK).double().numpy() for name in names}


# -- who holds what --------------------------------------------------------------------------------------------------


@kinds
def test_the_first_assignment_is_even_and_known_to_both_ends(federation: Federations, experts: str) -> None:
    fed = federation("fedamole", {"experts": experts}, FIVE)
    assert fed.method.count == 15
    for site in SITES:
        told = holdings(fed, site)
        assert sorted(map(len, told.values())) == [6] * 5
        counts = np.bincount(np.concatenate(list(told.values())), minlength=15)
        assert counts.tolist() == [2] * 15
        for client, own in fed.clients.items():
            assert own.tensors[f"live/{site}"].tolist() == [1.0] * 6 + [0.0] * 2
            for name, found in blocks(fed, own.tensors, site).items():
                assert not found[7:].any()
                for slot, expert in enumerate(told[client]):  # an expert is the same wherever it is
                    for other, theirs in told.items():
                        if expert in theirs:
                            seat = 1 + theirs.index(expert)
                            same = blocks(fed, fed.clients[other].tensors, site)[name][seat]
                            np.testing.assert_array_equal(found[1 + slot], same)
    layers = [holdings(fed, site) for site in SITES]
    assert layers[0] != layers[1]


@kinds
def test_experts_choose_the_clients_that_look_for_them(federation: Federations, experts: str) -> None:
    """The oracle: embeddings and softmax by hand; nothing that a holder may be swapped for scores higher."""
    fed = federation("fedamole", {"experts": experts}, FIVE).begin()
    before = {site: holdings(fed, site) for site in SITES}
    messages = fed.step(1)
    for site in SITES:
        tokens, sums, counts = [], np.zeros((15, RANK)), np.zeros(15)
        for client, own in fed.clients.items():
            x = own.data.inputs[f"input/{site}"].double().numpy()
            t = own.tensors[f"T/{site}"].double().numpy()
            a = own.tensors[f"A/{site}"].double().numpy()
            down = blocks(fed, own.tensors, site)[f"A/{site}"] @ x if experts == "lora" else None
            if down is None:
                down, t = blocks(fed, own.tensors, site)[f"E/{site}"] @ (a @ x), t @ a
            tokens.append(t @ x)
            np.testing.assert_allclose(messages[client].tensors[f"token/{site}"].numpy(), t @ x, rtol=1e-4, atol=1e-5)
            for slot, expert in enumerate(before[site][client]):
                sums[expert] += down[1 + slot]
                counts[expert] += 1
        scores = sums / counts[:, None] @ np.stack(tokens).T / math.sqrt(RANK)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        held = fed.method.assigned(fed.state, site).numpy()
        assert (held.sum(1) == 2).all()
        assert held.sum(0).min() >= 2
        assert held.sum(0).max() <= 8
        total = (p * held).sum()
        for expert in range(15):
            for one, other in product(np.flatnonzero(held[expert]), np.flatnonzero(~held[expert])):
                swapped = held.copy()
                swapped[expert, one], swapped[expert, other] = False, True
                if swapped.sum(0).min() >= 2 and swapped.sum(0).max() <= 8:
                    assert (p * swapped).sum() <= total + 1e-6


def test_who_was_never_heard_stays_in_the_game(federation: Federations) -> None:
    fed = federation("fedamole", {}, FIVE).begin()
    for round, who in ((1, ["ann", "bob"]), (2, ["bob", "cid"]), (3, ["ann", "dot"])):
        fed.deliver(who) if round > 1 else None
        fed.step(round, who)
        for site in SITES:
            told = holdings(fed, site)
            assert all(2 <= len(own) <= 8 for own in told.values())
            assert not fed.state[f"token/{site}"][4].any()  # eve
    reply = fed.method.reply(fed.state, "eve")
    fed.method.receive(fed.clients["eve"], reply)
    held = len(holdings(fed, SITES[0])["eve"])
    assert int(fed.clients["eve"].tensors[f"live/{SITES[0]}"].sum()) == held


@pytest.mark.parametrize("assignment", ["static", "random"])
def test_ablations_tell_nothing_of_the_data(federation: Federations, assignment: str) -> None:
    fed = federation("fedamole", {"assignment": assignment}, FIVE).begin()
    seen = [{site: holdings(fed, site) for site in SITES}]
    for round in (1, 2):
        messages = fed.step(round)
        assert not any(name.startswith(("token/", "embedding/")) for m in messages.values() for name in m.tensors)
        fed.deliver()
        seen.append({site: holdings(fed, site) for site in SITES})
    assert (seen[0] == seen[1] == seen[2]) == (assignment == "static")
    assert all(sorted(map(len, told.values())) == [6] * 5 for layers in seen for told in layers.values())


# -- averages --------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("weights", ["equal", "size"])
def test_every_expert_is_the_mean_of_its_holders(federation: Federations, experts: str, weights: str) -> None:
    fed = federation("fedamole", {"experts": experts, "weights": weights}, FIVE).begin()
    present, found = ["ann", "cid"], set()
    start = {name: tensor.clone() for name, tensor in fed.method._start.items()}
    before = {site: holdings(fed, site) for site in SITES}
    messages = fed.step(1, present)
    share = {client: fed.clients[client].examples if weights == "size" else 1 for client in present}
    for site in SITES:
        for factor in fed.method.adapter.expert_kinds:
            name = f"{factor}/{site}"
            sent = {client: blocks(fed, messages[client].tensors, site)[name] for client in present}
            common = np.average([s[0] for s in sent.values()], axis=0, weights=list(share.values()))
            np.testing.assert_allclose(fed.state[f"shared/{name}"].numpy(), common, rtol=1e-5, atol=1e-6)
            for expert in range(15):
                owners = [client for client in present if expert in before[site][client]]
                want = start[name][1 + expert].double().numpy()
                if owners:
                    theirs = [sent[c][1 + before[site][c].index(expert)] for c in owners]
                    want = np.average(theirs, axis=0, weights=[share[c] for c in owners])
                found.add(len(owners))
                np.testing.assert_allclose(fed.state[f"experts/{name}"][expert].numpy(), want, rtol=1e-5, atol=1e-6)
    assert found == {0, 1, 2}
    fed.deliver()
    for client, own in fed.clients.items():
        for site in SITES:
            now = holdings(fed, site)[client]
            for name, seated in blocks(fed, own.tensors, site).items():
                held = np.concatenate([fed.state[f"shared/{name}"][None], fed.state[f"experts/{name}"][now]])
                np.testing.assert_array_equal(seated[: 1 + len(now)], held)
                assert not seated[1 + len(now) :].any()


def test_one_domain_expert_that_all_hold_is_fedit_on_it(federation: Federations) -> None:
    """Both experts are then means over everybody, by examples, as FedIT's factors are."""
    options = {"domain_experts": 1, "holders": 5, "min_experts": 1, "weights": "size", "balance": 0.0}
    fed, plain = federation("fedamole", options, FIVE).begin(), federation("fedit", {}, FIVE).begin()
    for round in (1, 2, 3):
        fed.step(round)
        sent = {}
        for client, own in fed.clients.items():
            factors = {f"{f}/{site}": blocks(fed, own.tensors, site)[f"{f}/{site}"][1] for f in "AB" for site in SITES}
            tensors = {name: torch.from_numpy(factor).float() for name, factor in factors.items()}
            others = {name: t for name, t in own.tensors.items() if name.startswith(("head/", "norm/"))}
            sent[client] = Message({**tensors, **others}, {"examples": own.examples})
        plain.state = plain.method.server(round, plain.state, sent)
        fed.deliver()
        for client, own in fed.clients.items():
            reply = plain.method.reply(plain.state, client).tensors
            for site in SITES:
                for name, found in blocks(fed, own.tensors, site).items():
                    np.testing.assert_allclose(found[1], reply[name].numpy(), rtol=1e-6, atol=1e-6)
            for name in ("head/weight", "norm/ln.bias"):
                torch.testing.assert_close(own.tensors[name], reply[name])


# -- bytes -----------------------------------------------------------------------------------------------------------


@kinds
def test_what_travels_is_what_is_held(federation: Federations, experts: str) -> None:
    fed = federation("fedamole", {"experts": experts}, FIVE).begin()
    for round in (1, 2):
        for client, message in fed.step(round).items():
            numbers = 0
            for site, (d_in, d_out) in zip(SITES, ((10, 12), (8, 7)), strict=True):
                held = int(fed.clients[client].tensors[f"live/{site}"].sum())
                each = RANK * (d_in + d_out) if experts == "lora" else RANK**2
                numbers += (1 + held) * each + RANK * (d_in if experts == "lora" else RANK) + RANK * (1 + held)
            head_and_norm = 4 * 6 + 4 + 2 * 5
            assert sum(tensor.numel() for tensor in message.tensors.values()) == numbers + head_and_norm
        fed.deliver()


def test_the_forecast_of_all_clients_is_exact_on_average(federation: Federations) -> None:
    """Experts move from client to client, but there are as many places as before."""
    fed = federation("fedamole", {}, FIVE, rounds=3).begin()
    told = forecast(fed.method, {client: torch.ones(4) for client in fed.clients}, MessageSection())
    up = down = 0
    for round in (1, 2, 3):
        up += sum(len(encode(message, "float32")) for message in fed.step(round).values())
        down += sum(len(encode(fed.method.reply(fed.state, client), "float32")) for client in fed.clients)
        fed.deliver()
    # Each tensor is padded to whole words by its header at most.
    assert told.up == pytest.approx(up / 15, rel=2e-3)
    assert told.down == pytest.approx(down / 15, rel=2e-3)


@kinds
@pytest.mark.parametrize("options", [{}, {"max_experts": 16}, {"domain_experts": 4}])
def test_newcomers_have_the_adapter_of_those_who_play(
    context: Callable[..., Any], experts: str, options: dict[str, Any]
) -> None:
    """What they are scored with is plugged in as the others' is: as wide, and at the same scale."""
    both = {**options, "experts": experts}
    playing = build("fedamole", both, context((RANK,) * 2, newcomers=True))
    joining = build("fedamole", both, context(FIVE, newcomers=True, rounds=0))
    assert joining.adapter == playing.adapter
    assert joining.rank({}, "eve") == playing.rank({}, "ann")


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"domain_experts": 4}, "domain_experts = 4 at 2 clients each are 8 places, and 5 clients with at least"),
        ({"domain_experts": 30}, "5 clients with at most method.max_experts = 8 have 40; allowed: method.domain_exp"),
        ({"holders": 6}, "method.holders = 6 of 5 clients; allowed: 1 to 5"),
    ],
)
def test_infeasible_settings_are_refused(context: Callable[..., Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        build("fedamole", options, context(FIVE))


def test_private_examples_choose_no_experts(tiny_recipe: Callable[..., Any]) -> None:
    private = ("method.name=fedamole", "privacy.unit=example", "privacy.noise=1")
    with pytest.raises(RecipeError, match=r'assignment = "selected".*allowed: .*"static" or "random"'):
        prepare(tiny_recipe(*private))
    assert prepare(tiny_recipe(*private, "method.assignment=static")).method.name == "fedamole"


def test_infeasible_settings_are_refused_before_anything_runs(tiny_recipe: Callable[..., Any]) -> None:
    with pytest.raises(MethodError, match="allowed: method.domain_experts = 4 to 16"):
        prepare(tiny_recipe("method.name=fedamole", "method.domain_experts=3"))
    with pytest.raises(RecipeError, match="min_experts = 9 exceeds max_experts = 8"):
        check_options("fedamole", {"min_experts": 9})
    with pytest.raises(MethodError, match="one rank for all"):
        prepare(tiny_recipe("method.name=fedamole", "adapter.rank=[2, 3, 4, 4]"))


def test_a_reply_with_more_experts_than_there_is_room_for_is_refused(federation: Federations) -> None:
    fed = federation("fedamole", {"max_experts": 6}, FIVE).begin()
    fed.step(1)
    reply = fed.method.reply(fed.state, "ann")
    name = f"A/{SITES[0]}"
    long = {**reply.tensors, name: torch.zeros(8 * RANK, 10)}
    with pytest.raises(RuntimeError):
        fed.method.receive(fed.clients["ann"], Message(long))


@pytest.mark.parametrize("clients", range(1, 13))
@pytest.mark.parametrize(("least", "most"), [(2, 8), (6, 6), (1, 3), (7, 9)])
def test_defaults_fit_any_number_of_clients(context: Callable[..., Any], clients: int, least: int, most: int) -> None:
    ranks = {str(i): RANK for i in range(clients)}
    if least == most and (least * clients) % min(2, clients):
        return
    method = build("fedamole", {"min_experts": least, "max_experts": most}, context(ranks))
    assert isinstance(method, FedAMoLE)
    if clients == 10 and most == 8:
        assert (method.count, method.holders) == (30, 2)  # the authors' setting


# -- real runs -------------------------------------------------------------------------------------------------------


@kinds
def test_an_interrupted_run_is_the_uninterrupted_one(
    tiny_recipe: Callable[..., Any], resumed: Callable[..., Any], experts: str
) -> None:
    """With clients that are sampled, and some that drop out."""
    recipe = tiny_recipe(
        "method.name=fedamole",
        f"method.experts={experts}",
        "train.rounds=3",
        "train.participation=0.75",
        "train.failures=0.2",
        "train.optimizer_state=kept",
    )
    summary = resumed(recipe)
    assert summary["row"]["accuracy_mean"] >= 0
    assert summary["row"]["aggregation_error"] is None


def test_bytes_of_a_run_are_those_of_its_messages(tiny_recipe: Callable[..., Any], tmp_path: Any) -> None:
    from folklora.federation.run import run

    recipe = tiny_recipe("method.name=fedamole", "train.rounds=2")
    setup = prepare(recipe)
    told = forecast(setup.method, {c: torch.ones(setup.task.classes) for c in setup.clients}, recipe.message)
    row = run(recipe, tmp_path / "run")["row"]
    assert row["bytes_up_per_client_round"] == pytest.approx(told.up, rel=2e-3)
    assert row["bytes_down_per_client_round"] == pytest.approx(told.down, rel=2e-3)
    state = RunDirectory.open(tmp_path / "run")
    assert state.metrics()[-1]["failed"] == {}
