"""FLoRA's stacks against dense sums, and what a round starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.adapters.lowrank import LowRank, Site, Tensors
from folklora.methods import build
from folklora.methods.contract import Message


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    shape=st.tuples(st.integers(5, 60), st.integers(5, 60)),
    alpha=st.sampled_from([1.0, 6.0, 16.0]),
    seed=st.integers(0, 999),
)
def test_one_round_of_mixed_ranks_is_the_dense_sum(
    context: Callable[..., Any], ranks: list[int], shape: tuple[int, int], alpha: float, seed: int
) -> None:
    """sum_k p_k (alpha / r_k) B_k A_k, as NumPy sees it; every client has its own s_k."""
    rng = np.random.default_rng(seed)
    sites = (Site("s", *shape),)
    names = [f"c{k}" for k in range(len(ranks))]
    method = build("flora", {}, context(dict(zip(names, ranks, strict=True)), sites=sites, alpha=alpha))
    examples = rng.integers(1, 100, size=len(ranks))
    messages, want = {}, np.zeros(shape[::-1])
    for name, rank, n in zip(names, ranks, examples, strict=True):
        a = rng.normal(size=(rank, shape[0])).astype(np.float32)
        b = rng.normal(size=(shape[1], rank)).astype(np.float32)
        want += n / examples.sum() * alpha / rank * (b.astype(np.float64) @ a)
        messages[name] = Message({"A/s": torch.from_numpy(a), "B/s": torch.from_numpy(b)}, {"examples": float(n)})
    state = method.server(1, method.begin({}), messages)
    reply = method.reply(state, names[0])
    assert reply is not None
    if "base/1/s" in reply.tensors:
        got = reply.tensors["base/1/s"].double().numpy()
        assert sum(ranks) * sum(shape) >= shape[0] * shape[1]
    else:
        got = (reply.tensors["up/1/s"].double() @ reply.tensors["down/1/s"].double()).numpy()
        assert reply.tensors["up/1/s"].shape[1] == sum(ranks)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_only_a_is_weighted(federation: Callable[..., Any]) -> None:
    """B_1 ... B_K stand beside each other as they were sent."""
    fed = federation("flora", ranks=(2, 1), sites=(Site("s", 30, 40),)).begin()
    messages = fed.step(1)
    sent = [message.tensors for message in messages.values()]
    up, down = fed.state["log/up/1/s"], fed.state["log/down/1/s"]
    assert torch.equal(up, torch.cat([tensors["B/s"] for tensors in sent], dim=1))
    p, s = np.array([30, 12]) / 42, np.array([6 / 2, 6 / 1])
    want = torch.cat([p[k] * s[k] * tensors["A/s"].double() for k, tensors in enumerate(sent)]).float()
    torch.testing.assert_close(down, want, rtol=1e-6, atol=0)


def starts_of(fed: Any, round: int) -> list[Tensors]:
    """The tensors each client's training would begin with."""
    works = [fed.method.work(round, client) for client in fed.clients.values()]
    return [work.tensors for (work,) in works]


def test_every_round_starts_from_a_common_fresh_adapter(federation: Callable[..., Any]) -> None:
    fed = federation("flora", ranks=(3, 3, 3)).begin()
    starts = []
    for round in (1, 2, 3, 4):
        tensors = starts_of(fed, round)
        assert all(torch.equal(t["A/layer.0.query"], tensors[0]["A/layer.0.query"]) for t in tensors)
        assert all(not t[f"B/{site.name}"].any() for t in tensors for site in fed.method.context.sites)
        assert set(tensors[0]) == set(fed.clients["ann"].tensors)
        starts.append(tensors[0]["A/layer.0.query"])
        fed.step(round)
        fed.deliver()
    assert all(not torch.allclose(starts[i], starts[j]) for i in range(4) for j in range(i))
    bound = 1 / np.sqrt(10)
    assert all(float(a.abs().max()) <= bound for a in starts)
    assert all(float(a.abs().max()) > bound / 2 for a in starts)


def test_whoever_trained_for_nothing_begins_again_where_the_others_are(federation: Callable[..., Any]) -> None:
    """Not where its refused training ended; in the first round too, when there is nothing to receive yet."""
    fed = federation("flora", {"head": "private"}).begin()
    for round in (1, 3):
        common = fed.dense(starts_of(fed, round)[1])
        fed.train(round, ["ann"])
        assert fed.clients["ann"].tensors["B/layer.0.query"].any()
        if round > 1:
            fed.deliver()
        ann, bob, _ = starts_of(fed, round + 1)
        for key, tensor in ann.items():
            assert torch.equal(tensor, bob[key]) or key.startswith(("head/", "norm/"))
        assert all(np.array_equal(got, want) for got, want in zip(fed.dense(ann), common, strict=True))
        fed.step(round + 1)
        fed.deliver()


def test_an_upload_is_told_apart_from_the_start_of_its_round(federation: Callable[..., Any]) -> None:
    """Compression sends differences: to what every client drew for this round, and to the common head."""
    fed = federation("flora", ranks=(2, 5, 3)).begin()
    told: Tensors = {}
    for round in (1, 2):
        starts = dict(zip(fed.clients, starts_of(fed, round), strict=True))
        fed.train(round)
        messages = fed.messages(round)
        for client, message in messages.items():
            known = fed.method.known(round, client, told, message)
            for key in message.tensors:
                if key.startswith("B/"):
                    assert key not in known  # counts from zero, which is where it starts, and is not remembered
                else:
                    assert torch.equal(known[key], starts[client][key])
        fed.state = fed.method.server(round, fed.state, messages)
        told = fed.method.reply(fed.state, "ann").tensors
        fed.deliver()


def test_after_the_merge_a_lone_client_computes_what_it_trained(federation: Callable[..., Any]) -> None:
    fed = federation("flora", ranks=(3,)).begin()
    for round in (1, 2, 3):
        fed.step(round)
        before = fed.dense(fed.clients["ann"].tensors)
        fed.deliver()
        for got, want in zip(fed.dense(fed.clients["ann"].tensors), before, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert not fed.clients["ann"].tensors["B/layer.0.query"].any()


def test_the_global_model_has_the_rank_of_whoever_lends_its_tensors(federation: Callable[..., Any]) -> None:
    fed = federation("flora", ranks=(2, 5, 3)).begin()
    fed.step(1)
    fed.deliver()
    models = [fed.method.global_model(fed.state, name, dict(c.tensors)) for name, c in fed.clients.items()]
    adapter: LowRank = fed.method.adapter
    assert [adapter.rank(model) for model in models] == [2, 5, 3]
    products = [fed.dense(model) for model in models]
    for site in range(2):
        assert all(np.array_equal(product[site], products[0][site]) for product in products)
        assert np.abs(products[0][site]).max() > 0.1


@pytest.mark.parametrize("head", ["private", "sketched"])
def test_a_head_that_stays_home_is_not_in_the_reply(federation: Callable[..., Any], head: str) -> None:
    fed = federation("flora", {"head": head}).begin()
    fed.step(1)
    before = fed.snapshot()
    fed.deliver()
    assert not any(key.startswith("head/") for key in fed.method.reply(fed.state, "ann").tensors)
    for client in fed.clients.values():
        assert torch.equal(client.tensors["head/weight"], before[client.id]["head/weight"])
