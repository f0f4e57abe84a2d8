"""RAVAN: heads that do not see each other, gains that never travel, and every head the mean of those who trained it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folklora.adapters.lowrank import Site, Tensors
from folklora.adapters.peft import fold
from folklora.errors import MessageError, MethodError, RecipeError
from folklora.federation.codec import check, decode, encode
from folklora.federation.local import LocalEngine
from folklora.federation.run import run
from folklora.federation.setup import prepare
from folklora.federation.traffic import per_round
from folklora.methods import build, check_options
from folklora.methods.aggregation import aggregation_error
from folklora.methods.contract import Client, Context, Message
from folklora.methods.ravan import gains_of
from folklora.methods.work import Trained

Federations = Callable[..., Any]
PARTIAL: dict[str, Any] = {"heads": 3, "budget": [1, 3, 2]}
SITES = ("layer.0.query", "layer.1.value")


def by_head(fed: Any, tensors: Tensors, heads: int) -> list[np.ndarray]:
    """The oracle: ``alpha / (h r) sum_i g_i B_i H_i A_i``, head by head, H_i cut out of C by hand."""
    dense = []
    for site in SITES:
        a, b, core, gain = (tensors[f"{kind}/{site}"].double().numpy() for kind in ("A", "B", "C", "gain"))
        r = len(a) // heads
        parts = [slice(i * r, (i + 1) * r) for i in range(heads)]
        whole = sum(gain[i] * b[:, part] @ core[part, part] @ a[part] for i, part in enumerate(parts))
        dense.append(fed.method.context.alpha / len(a) * whole)
    return dense


def sent(tensors: Tensors, site: str, heads: int) -> np.ndarray:
    """``g_i H_i`` of a client's tensors, [h, r, r]."""
    core, gain = tensors[f"C/{site}"].double().numpy(), tensors[f"gain/{site}"].double().numpy()
    r = len(core) // heads
    return np.stack([gain[i] * core[i * r : (i + 1) * r, i * r : (i + 1) * r] for i in range(heads)])


def start_of(fed: Any) -> None:
    """Trained once by everybody and delivered, so that no head is zero any more."""
    fed.begin().step(1)
    fed.deliver()


# -- the frame -------------------------------------------------------------------------------------------------------


def test_heads_are_orthogonal_to_each_other_and_common_to_all(federation: Federations) -> None:
    fed = federation("ravan", {"heads": 3}, ranks=(2, 2, 2))
    ann = fed.clients["ann"].tensors
    for site in SITES:
        a, b = ann[f"A/{site}"].double(), ann[f"B/{site}"].double()
        torch.testing.assert_close(a @ a.T, torch.eye(6).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(b.T @ b, torch.eye(6).double(), rtol=0, atol=1e-6)
        for client in fed.clients.values():
            assert torch.equal(client.tensors[f"A/{site}"], ann[f"A/{site}"])
            assert torch.equal(client.tensors[f"B/{site}"], ann[f"B/{site}"])


@pytest.mark.parametrize(("rank", "heads"), [(1, 4), (2, 3), (3, 2), (4, 1), (7, 1)])
def test_four_heads_or_as_many_as_fit(federation: Federations, rank: int, heads: int) -> None:
    assert federation("ravan", ranks=(rank, rank)).method.heads == heads


def test_training_moves_heads_and_gains_and_nothing_between_heads(federation: Federations) -> None:
    fed = federation("ravan", {"heads": 3}, ranks=(2, 2, 2)).begin()
    fed.train(1)
    for client in fed.clients.values():
        for site in SITES:
            core = client.tensors[f"C/{site}"].clone()
            for i in range(3):
                block = core[2 * i : 2 * i + 2, 2 * i : 2 * i + 2]
                assert bool((block != 0).all())
                block.zero_()
            assert not core.any()
            assert bool((client.tensors[f"gain/{site}"] != 1).all())
        for got, want in zip(fed.dense(client.tensors), by_head(fed, client.tensors, 3), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-9)
        update = fed.method.adapter.update(client.tensors, SITES[0]).numpy()
        np.testing.assert_allclose(update, by_head(fed, client.tensors, 3)[0], atol=1e-9)


def test_as_many_bytes_reach_a_higher_rank(federation: Federations) -> None:
    """Four heads of rank 1 against one core of rank 2, on the wire: the same but for one more dimension to name."""
    many = federation("ravan", {"heads": 4, "head": "private"}, ranks=(1, 1)).begin()
    one = federation("folklora", {"head": "private", "head_start": "zero"}, ranks=(2, 2)).begin()
    sizes = []
    for fed in (many, one):
        fed.train(1)
        message = fed.method.send(1, fed.clients["ann"])
        cores = Message({n: t for n, t in message.tensors.items() if n[0] in "HC"}, message.numbers)
        sizes.append(len(encode(cores)))
        assert sum(t.numel() for t in cores.tensors.values()) == 2 * 4
    assert sizes[0] == sizes[1] + 4 * len(SITES)
    assert [np.linalg.matrix_rank(f.dense(f.clients["ann"].tensors)[0]) for f in (many, one)] == [4, 2]


def test_one_head_without_a_gain_is_folklora(federation: Federations) -> None:
    ours = federation("ravan", {"heads": 1, "gains": "fixed", "head": "private"}).begin()
    theirs = federation("folklora", {"head": "private", "head_start": "zero"}).begin()
    for round in (1, 2):
        for fed in (ours, theirs):
            fed.step(round)
            fed.deliver()
        for name, client in theirs.clients.items():
            for key in (f"{factor}/{site}" for factor in "ABC" for site in SITES):
                torch.testing.assert_close(ours.clients[name].tensors[key], client.tensors[key], rtol=1e-6, atol=1e-6)
            assert not any(bool((ours.clients[name].tensors[f"gain/{site}"] != 1).any()) for site in SITES)


# -- the mean --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gains", ["trained", "fixed"])
def test_every_round_gives_the_dense_mean(federation: Federations, gains: str) -> None:
    fed = federation("ravan", {"heads": 3, "gains": gains}, ranks=(2, 2, 2)).begin()
    n = np.array([client.examples for client in fed.clients.values()], dtype=float)
    for round in range(1, 4):
        messages = fed.step(round)
        assert all(not key.startswith(("C/", "gain/", "index/")) for m in messages.values() for key in m.tensors)
        trained = list(fed.snapshot().values())
        updates = [by_head(fed, tensors, 3) for tensors in trained]
        fed.deliver()
        received = list(fed.snapshot().values())
        for site in range(2):
            want = np.average([update[site] for update in updates], axis=0, weights=n)
            for tensors in received:
                assert np.linalg.norm(by_head(fed, tensors, 3)[site] - want) < 1e-6 * np.linalg.norm(want)
        mixing = fed.method.mixing(fed.state, messages)
        assert aggregation_error(fed.method.adapter, trained, received, mixing) < 1e-6
        assert all(bool((tensors[f"gain/{site}"] == 1).all()) for tensors in received for site in SITES)


def brute_force(fed: Any, round: int, who: list[str], heads: int) -> dict[str, np.ndarray]:
    """One round by hand: each head's mean over those of ``who`` whose message holds it; others stay."""
    before = {site: sent(fed.clients["ann"].tensors, site, heads) for site in SITES}
    messages = fed.step(round, who)
    want = {}
    for site in SITES:
        want[site] = before[site].copy()
        for i in range(heads):
            owners = [k for k in who if i in fed.clients[k].notes.get(f"index/{site}", torch.arange(heads)).tolist()]
            for k in who:
                moved = np.abs(sent(fed.clients[k].tensors, site, heads)[i] - before[site][i]).max() > 1e-9
                assert moved == (k in owners)  # nobody trains what it does not send
            total = sum(fed.clients[k].examples for k in owners)
            if owners:
                parts = [fed.clients[k].examples * sent(fed.clients[k].tensors, site, heads)[i] for k in owners]
                want[site][i] = sum(parts) / total
    assert set(messages) == set(who)
    return want


@pytest.mark.parametrize("score", ["gradient", "weight", "random"])
def test_a_head_is_the_mean_of_those_who_trained_it(federation: Federations, score: str) -> None:
    fed = federation("ravan", {**PARTIAL, "score": score}, ranks=(2, 2, 2)).begin()
    for round, who in enumerate((["ann", "bob", "cid"], ["ann", "cid"], ["ann"], ["bob", "cid"]), start=1):
        want = brute_force(fed, round, who, 3)
        fed.deliver()
        fed.deliver()  # the same reply twice
        for client in fed.clients.values():
            for site in SITES:
                np.testing.assert_allclose(sent(client.tensors, site, 3), want[site], atol=1e-6)
                assert bool((client.tensors[f"gain/{site}"] == 1).all())


def test_a_head_nobody_trained_stays(federation: Federations) -> None:
    fed = federation("ravan", {"heads": 3, "budget": 1, "score": "random"}, ranks=(2,)).begin()
    fed.step(1)
    reply = fed.method.reply(fed.state, "ann").tensors
    (index,) = fed.clients["ann"].notes[f"index/{SITES[0]}"].tolist()
    assert [bool(core.any()) for core in reply[f"H/{SITES[0]}"]] == [i == index for i in range(3)]
    fed.deliver()
    fed.step(2)
    (second,) = fed.clients["ann"].notes[f"index/{SITES[0]}"].tolist()
    again = fed.method.reply(fed.state, "ann").tensors
    for i in set(range(3)) - {second}:
        assert torch.equal(again[f"H/{SITES[0]}"][i], reply[f"H/{SITES[0]}"][i])


def test_partial_heads_have_no_single_mixing(federation: Federations) -> None:
    fed = federation("ravan", PARTIAL, ranks=(2, 2, 2)).begin()
    assert fed.method.mixing(fed.state, fed.step(1)) is None


# -- which heads -----------------------------------------------------------------------------------------------------


def chosen(fed: Any, round: int) -> dict[str, list[list[int]]]:
    for client in fed.clients.values():
        fed.method.work(round, client)
    return {n: [c.notes[f"index/{site}"].tolist() for site in SITES] for n, c in fed.clients.items()}


def test_the_heads_of_the_largest_gradient_train(federation: Federations) -> None:
    fed = federation("ravan", {"heads": 3, "budget": 2}, ranks=(2, 2, 2)).begin()
    picks = chosen(fed, 1)
    for client in fed.clients.values():
        for site, got in zip(SITES, picks[client.id], strict=True):
            a, b = (client.tensors[f"{factor}/{site}"].double().numpy() for factor in "AB")
            gradient = client.data.gradients[f"grad/{site}"].double().numpy()
            # By the chain rule through the stacked product, a perturbation of H_i at a time.
            norms = []
            for i in range(3):
                partial = np.zeros((2, 2))
                for p in range(2):
                    for q in range(2):
                        core = np.zeros((6, 6))
                        core[2 * i + p, 2 * i + q] = 1.0
                        partial[p, q] = (gradient * (b @ core @ a)).sum()
                norms.append(np.linalg.norm(partial))
            assert got == sorted(np.argsort(norms)[1:].tolist())


def test_the_score_is_taken_under_the_clients_own_head(federation: Federations) -> None:
    fed = federation("ravan", {"heads": 3, "budget": 2, "score_examples": 7}, ranks=(2, 2, 2)).begin()
    start_of(fed)
    client = fed.clients["bob"]
    asked: list[tuple[Tensors, int]] = []
    honest = client.data.gradients

    def spy(head: Tensors, examples: int) -> Tensors:
        asked.append((head, examples))
        return honest

    client.data.weight_gradients = spy
    fed.method.work(2, client)
    ((head, examples),) = asked
    assert examples == 7
    assert set(head) == {"head/weight", "head/bias"}
    assert all(torch.equal(head[name], client.tensors[name]) and head[name].any() for name in head)


def test_the_heads_of_the_largest_weight_train(federation: Federations) -> None:
    fed = federation("ravan", {"heads": 3, "budget": 1, "score": "weight"}, ranks=(2, 2, 2))
    start_of(fed)
    for i, client in enumerate(fed.clients.values()):
        for site in SITES:
            client.tensors[f"C/{site}"][2 * i, 2 * i + 1] = 50.0
            client.tensors[f"gain/{site}"][(i + 1) % 3] = 0.1
    assert chosen(fed, 2) == {"ann": [[0], [0]], "bob": [[1], [1]], "cid": [[2], [2]]}


@pytest.mark.parametrize("score", ["gradient", "weight", "random"])
def test_ties_are_broken_by_seed_client_and_round(federation: Federations, score: str) -> None:
    made = lambda **other: federation("ravan", {"heads": 6, "budget": 3, "score": score}, ranks=(1, 1, 1), **other)
    seen = []
    for fed in (made(), made(), made(seed=1)):
        for client in fed.clients.values():
            client.data.gradients = {n: torch.zeros_like(t) for n, t in client.data.gradients.items()}
        seen.append([chosen(fed, round) for round in (1, 2)])
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert seen[0][0] != seen[0][1]
    assert seen[0][0]["ann"] != seen[0][0]["bob"]
    for picks in seen[0][0].values():
        assert all(len(set(heads)) == 3 and heads == sorted(heads) for heads in picks)
    everything = {i for both in seen[0] + seen[2] for picks in both.values() for heads in picks for i in heads}
    assert everything == set(range(6))


# -- the wire --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_partial_messages_are_what_is_expected_and_forecast(federation: Federations, dtype: str) -> None:
    fed = federation("ravan", PARTIAL, ranks=(2, 2, 2)).begin()
    for round in (1, 2):
        fed.train(round)
        messages = {n: decode(encode(fed.method.send(round, c), dtype)) for n, c in fed.clients.items()}
        for (name, message), budget in zip(messages.items(), (1, 3, 2), strict=True):
            check(message, fed.method.expected(round, fed.state, name), ("examples",))
            fed.method.check_update(round, fed.state, name, message)
            assert message.tensors[f"H/{SITES[0]}"].shape == (budget, 2, 2)
            assert (f"index/{SITES[0]}" in message.tensors) == (budget < 3)
        fed.state = fed.method.server(round, fed.state, messages)
        fed.deliver()
    for name, weighed in federation("ravan", PARTIAL, ranks=(2, 2, 2)).begin().weigh(dtype).items():
        assert per_round(fed.method, name, dtype) == weighed


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ([0, 3], "allowed: 0 to 2"),
        ([-1, 0], "allowed: 0 to 2"),
        ([1, 1], "names a head twice"),
        ([2**31 - 1, 0], "0 to 2"),
    ],
)
def test_an_index_that_cannot_be_is_refused(federation: Federations, index: list[int], complaint: str) -> None:
    fed = federation("ravan", PARTIAL, ranks=(2, 2, 2)).begin()
    fed.train(1)
    message = fed.messages(1)["cid"]
    message.tensors[f"index/{SITES[1]}"] = torch.tensor(index, dtype=torch.int32)
    check(message, fed.method.expected(1, fed.state, "cid"), ("examples",))
    with pytest.raises(MessageError, match=complaint):
        fed.method.check_update(1, fed.state, "cid", message)


def test_indices_in_another_order_are_the_same_message(federation: Federations) -> None:
    fed = federation("ravan", PARTIAL, ranks=(2, 2, 2)).begin()
    fed.train(1)
    messages = fed.messages(1)
    turned = {n: Message(dict(m.tensors), m.numbers) for n, m in messages.items()}
    for site in SITES:
        for kind in ("H", "index"):
            turned["cid"].tensors[f"{kind}/{site}"] = turned["cid"].tensors[f"{kind}/{site}"].flip(0)
    states = [fed.method.server(1, fed.state, each) for each in (messages, turned)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"heads": 0}, "method.heads = 0"),
        ({"heads": 2, "budget": 3}, "budget = 3 exceeds heads = 2; allowed: 1 to 2"),
        ({"heads": 2, "budget": [1, 3, 2]}, "budget = 3 exceeds heads = 2; allowed: 1 to 2"),
        ({"budget": [1, 0]}, "method.budget"),
        ({"budget": 0}, "method.budget = 0"),
        ({"gains": "none"}, "method.gains = 'none': input should be 'trained' or 'fixed'"),
        ({"score": "loss"}, "method.score = 'loss': input should be 'gradient', 'weight' or 'random'"),
        ({"score_examples": 0}, "method.score_examples = 0"),
        ({"score": "random", "score_examples": 8}, 'score_examples = 8 with score = "random" changes nothing; allowed'),
    ],
)
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options("ravan", options)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"heads": 3}, r"method.heads = 3 of adapter.rank = 3 need 9 .* smallest adapted layer has 7; allowed: 1 to 2"),
        ({"budget": [1, 2]}, r"method.budget lists 2 numbers for 3 clients; allowed: one number, or one a client"),
        ({"budget": []}, r"method.budget lists 0 numbers for 3 clients"),
        ({"budget": [1, 2, 3]}, r"method.budget = 3 exceeds the heads there are; allowed: 1 to 2"),
    ],
)
def test_what_does_not_fit_the_layers_or_the_clients(
    context: Callable[..., Context], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(MethodError, match=complaint):
        build("ravan", options, context((3, 3, 3)))


# -- beyond ----------------------------------------------------------------------------------------------------------


def test_export_to_peft_is_the_same_function(federation: Federations) -> None:
    """Also of a client as its own training left it: gains are folded in."""
    fed = federation("ravan", {"heads": 3}, ranks=(2, 2, 2)).begin()
    fed.train(1)
    tensors = fed.clients["ann"].tensors
    folded = fold(tensors, fed.method.adapter)
    for site, want in zip(SITES, by_head(fed, tensors, 3), strict=True):
        got = fed.method.context.alpha / 6 * folded[f"B/{site}"].double() @ folded[f"A/{site}"].double()
        np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


@settings(max_examples=40)
@given(data=st.data())
def test_any_heads_ranks_budgets_and_weights(data: st.DataObject) -> None:
    rank, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    d_in, d_out = (data.draw(st.integers(rank * heads, rank * heads + 5)) for _ in range(2))
    budgets = data.draw(st.lists(st.integers(1, heads), min_size=1, max_size=4))
    examples = [data.draw(st.integers(1, 50)) for _ in budgets]
    seed = data.draw(st.integers(0, 99))
    ids = [f"client-{k}" for k in range(len(budgets))]
    context = Context(
        seed=seed,
        ranks=dict.fromkeys(ids, rank),
        sites=(Site("layer", d_in, d_out),),
        alpha=data.draw(st.floats(0.5, 32)),
        dropout=0.0,
        classes=2,
        width=3,
        head={"head/weight": (2, 3), "head/bias": (2,)},
        norms={},
        rounds=2,
        learning_rate=1e-3,
        batch_size=1,
        local_epochs=1,
        optimizer="adamw",
        weight=lambda site: torch.zeros(d_out, d_in),
    )
    method = build("ravan", {"heads": heads, "budget": budgets, "score": "random"}, context)
    clients = [Client(k, rank, n, method.initial(k), None, 0) for k, n in zip(ids, examples, strict=True)]  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(seed)
    server = np.zeros((heads, rank, rank))
    state = method.begin({})
    for round in (1, 2):
        messages, total, weight = {}, np.zeros_like(server), np.zeros(heads)
        for client in clients:
            (work,) = method.work(round, client)
            tensors = dict(work.tensors)
            for name in work.trained:
                if name in work.terms.masks:
                    noise = torch.randn(tensors[name].shape, generator=random)
                    tensors[name] = tensors[name] + noise * work.terms.masks[name]
            method.learned(round, client, {"": Trained(tensors, 1.0, 1, 0.1)})
            message = decode(encode(method.send(round, client)))  # type: ignore[arg-type]
            check(message, method.expected(round, state, client.id), ("examples",))
            method.check_update(round, state, client.id, message)
            messages[client.id] = message
            index = message.tensors.get("index/layer", torch.arange(heads)).tolist()
            assert len(set(index)) == len(index) == budgets[ids.index(client.id)]
            for i in index:
                total[i] += client.examples * sent(client.tensors, "layer", heads)[i]
                weight[i] += client.examples
        server = np.where(weight[:, None, None] > 0, total / np.maximum(weight, 1)[:, None, None], server)
        state = method.server(round, state, messages)
        for client in clients:
            method.receive(client, method.reply(state, client.id))  # type: ignore[arg-type]
            np.testing.assert_allclose(sent(client.tensors, "layer", heads), server, atol=1e-5)
            a, b = client.tensors["A/layer"].double().numpy(), client.tensors["B/layer"].double().numpy()
            dense = sum(
                b[:, i * rank : (i + 1) * rank] @ server[i] @ a[i * rank : (i + 1) * rank] for i in range(heads)
            )
            scale = context.alpha / (heads * rank)
            np.testing.assert_allclose(method.adapter.update(client.tensors, "layer").numpy(), scale * dense, atol=2e-4)


def test_an_interrupted_run_ends_as_one_that_was_not(
    tiny_recipe: Callable[..., Any], resumed: Callable[[Any], dict[str, Any]]
) -> None:
    """With weak clients, drop-outs and moments that are kept; scored by real gradients."""
    recipe = tiny_recipe(
        "method.name=ravan",
        "method.heads=3",
        "method.budget=[1,3,2,1]",
        "train.rounds=3",
        "train.failures=0.3",
        "train.optimizer_state=kept",
        "train.weight_decay=0.1",
    )
    assert resumed(recipe)["row"]["aggregation_error"] is None


def test_real_training_keeps_to_the_blocks_and_the_chosen_heads(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=ravan", "method.heads=3", "method.budget=2", "train.weight_decay=0.1")
    engine = LocalEngine(prepare(recipe))
    before = {client: dict(member.client.tensors) for client, member in engine.members.items()}
    uploads = {upload.client: upload for upload in engine.train(1, list(engine.members))}
    for client, member in engine.members.items():
        assert uploads[client].failure is None
        message = decode(uploads[client].data)  # type: ignore[arg-type]
        for site in engine.setup.method.context.sites:
            index = message.tensors[f"index/{site.name}"].tolist()
            core, gain = (member.client.tensors[f"{kind}/{site.name}"] for kind in ("C", "gain"))
            blocks: Tensor = torch.block_diag(*[torch.full((4, 4), float(i in index)) for i in range(3)])
            assert torch.equal(core != 0, blocks > 0)
            assert [bool(g != 1) for g in gain] == [i in index for i in range(3)]
            for kind in "AB":
                assert torch.equal(member.client.tensors[f"{kind}/{site.name}"], before[client][f"{kind}/{site.name}"])


def test_compression_sends_the_difference_to_the_heads_that_are_known(federation: Federations) -> None:
    fed = federation("ravan", PARTIAL, ranks=(2, 2, 2)).begin()
    fed.train(1)
    message = fed.messages(1)["cid"]
    known = fed.method.known(1, "cid", {}, message)
    for site in SITES:
        assert torch.equal(known[f"H/{site}"], torch.zeros_like(message.tensors[f"H/{site}"]))  # what heads start from
    fed.step(1)
    fed.deliver()
    told = fed.method.reply(fed.state, "cid").tensors
    fed.train(2)
    message = fed.messages(2)["cid"]
    known = fed.method.known(2, "cid", told, message)
    for site in SITES:
        index = message.tensors[f"index/{site}"].tolist()
        assert torch.equal(known[f"H/{site}"], torch.stack([told[f"H/{site}"][i] for i in index]))
    message.tensors[f"index/{SITES[0]}"] = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(MessageError, match="allowed: 0 to 2"):
        fed.method.known(2, "cid", told, message)


def test_a_compressed_run_of_weak_clients(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(
        "method.name=ravan", "method.heads=3", "method.budget=2", "message.top_k=0.5", "message.error_feedback=true"
    )
    run(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any(line["failed"] for line in lines)


# -- what an upload says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gains_are_found_behind_products(optimizer: str, size: float) -> None:
    """One step of torch's own optimiser on a loss of the products alone: what was multiplied is taken apart again."""
    generator, lr = torch.Generator().manual_seed(0), 0.05
    before = size * torch.randn(6, 4, 4, generator=generator)
    slope = torch.randn(6, 4, 4, generator=generator)
    cores, gains = before.clone().requires_grad_(), torch.ones(6, requires_grad=True)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    step = kind([cores, gains], lr=lr, weight_decay=0.0)
    (gains[:, None, None] * cores * slope).sum().backward()
    step.step()
    sent = (gains[:, None, None] * cores).detach()
    found = gains_of(sent, before, optimizer, lr)
    if optimizer == "sgd" or size == 1.0:
        torch.testing.assert_close(found, gains.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sent / found[:, None, None], cores.detach(), rtol=1e-4, atol=1e-5)
    else:  # small cores may hide a gain, and then hardly matter beside their moves
        read, moved = before - sent / found[:, None, None], before - cores.detach()
        assert float((read - moved).norm() / moved.norm()) < 0.03


def test_an_upload_is_read_as_the_cores_it_is_of(federation: Federations) -> None:
    fed = federation("ravan", {"heads": 3, "budget": 2, "gains": "fixed", "score": "random"}, ranks=(2, 2, 2))
    method, client = fed.method, next(iter(fed.clients.values()))
    before = dict(client.tensors)
    (work,) = method.work(1, client)
    moved = {
        name: tensor + work.terms.masks[name] if name.startswith("C/") else tensor for name, tensor in before.items()
    }
    method.learned(1, client, {"": Trained(moved, 0.0, 1, 1.0)})
    read = method.as_trained(dict(method.send(1, client).tensors), before)
    for site in method.context.sites:
        torch.testing.assert_close(read[f"C/{site.name}"], moved[f"C/{site.name}"])
    assert not any(name.startswith(("H/", "index/")) for name in read)
