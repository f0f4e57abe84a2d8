"""Zero padding and replication padding against their definitions in NumPy, and ranks that are promoted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from folklora.errors import MethodError
from folklora.federation.codec import check
from folklora.federation.run import client_model
from folklora.federation.setup import prepare
from folklora.methods import build
from folklora.methods.aggregation import aggregation_error
from folklora.methods.contract import Message
from folklora.methods.owners import owners_mean
from folklora.methods.padding import Replication

SITES = ("layer.0.query", "layer.1.value")
ALPHA = 6.0  # of the federation in conftest
EXAMPLES = (30, 12, 18, 24, 9)
PADDING = pytest.mark.parametrize("name", ["zeropad", "replication"])
Messages = Mapping[str, Message]


# -- oracles -----------------------------------------------------------------------------------------------------------


def scaled(message: Message, site: str) -> tuple[np.ndarray, np.ndarray]:
    """A_k and s_k B_k, float64."""
    a, b = (message.tensors[f"{factor}/{site}"].double().numpy() for factor in "AB")
    return a, ALPHA / len(a) * b


def zero_padded(messages: Messages, p: np.ndarray, site: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    factors = [scaled(message, site) for message in messages.values()]
    mean_a = sum(w * np.pad(a, ((0, most - len(a)), (0, 0))) for w, (a, _) in zip(p, factors, strict=True))
    mean_b = sum(w * np.pad(b, ((0, 0), (0, most - b.shape[1]))) for w, (_, b) in zip(p, factors, strict=True))
    return mean_a, mean_b


def replicated(messages: Messages, p: np.ndarray, site: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The paper's three steps: mean of the highest, fill the others from it, mean of all."""
    factors = [scaled(message, site) for message in messages.values()]
    top = [(w, a, b) for w, (a, b) in zip(p, factors, strict=True) if len(a) == most]
    total = sum(w for w, _, _ in top)
    a_h, b_h = sum(w * a for w, a, _ in top) / total, sum(w * b for w, _, b in top) / total
    filled = [(np.vstack([a, a_h[len(a) :]]), np.hstack([b, b_h[:, len(a) :]])) for a, b in factors]
    return tuple(sum(w * f[i] for w, f in zip(p, filled, strict=True)) for i in (0, 1))  # type: ignore[return-value]


def shares(count: int) -> np.ndarray:
    n = np.array(EXAMPLES[:count], dtype=float)
    return n / n.sum()


def tail(fed: Any, tensors: Mapping[str, torch.Tensor], start: int) -> list[np.ndarray]:
    """What the pairs from ``start`` on add to each site's weight."""
    a, b = ({s: tensors[f"{f}/{s}"].double().numpy() for s in SITES} for f in "AB")
    return [ALPHA / len(a[s]) * b[s][:, start:] @ a[s][start:] for s in SITES]


# -- the means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "oracle"), [("zeropad", zero_padded), ("replication", replicated)])
@pytest.mark.parametrize("ranks", [(2, 5, 3), (5, 2, 5, 2, 2), (3, 3, 3), (1, 7)])
def test_the_means_are_those_of_the_definition(
    federation: Callable[..., Any], name: str, oracle: Callable[..., Any], ranks: tuple[int, ...]
) -> None:
    fed = federation(name, ranks=ranks).begin()
    for round in (1, 2, 3):
        messages = fed.step(round)
        for site in SITES:
            mean_a, mean_b = oracle(messages, shares(len(ranks)), site, max(ranks))
            for client, rank in zip(fed.clients, ranks, strict=True):
                reply = fed.method.reply(fed.state, client).tensors
                np.testing.assert_allclose(reply[f"A/{site}"].numpy(), mean_a[:rank], rtol=1e-5, atol=1e-6)
                got = ALPHA / rank * reply[f"B/{site}"].double().numpy()
                np.testing.assert_allclose(got, mean_b[:, :rank], rtol=1e-5, atol=1e-6)
        fed.deliver()


@pytest.mark.parametrize("name", ["zeropad", "replication", "hafl"])
def test_at_one_rank_all_of_them_are_fedit(federation: Callable[..., Any], name: str) -> None:
    plain, fed = federation("fedit").begin(), federation(name).begin()
    for round in (1, 2, 3):
        who = ["ann", "cid"] if round == 2 else None
        for each in (plain, fed):
            each.step(round, who)
            each.deliver()
        for client in fed.clients:
            for key, tensor in plain.clients[client].tensors.items():
                torch.testing.assert_close(fed.clients[client].tensors[key], tensor, rtol=1e-6, atol=1e-7)
    assert fed.method.mixing(fed.state, fed.messages(4)).equal(plain.method.mixing(plain.state, plain.messages(4)))


@given(st.lists(st.sampled_from([2, 5]), min_size=1, max_size=6), st.integers(0, 10**6))
def test_with_two_ranks_replication_is_the_mean_over_owners(ranks: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    has = torch.arange(max(ranks))[None] < torch.tensor(ranks)[:, None]
    values = torch.randn(len(ranks), max(ranks), 4, generator=random, dtype=torch.float64) * has[..., None]
    weights = torch.rand(len(ranks), generator=random, dtype=torch.float64) + 0.1
    weights /= weights.sum()
    before = torch.randn(max(ranks), 4, generator=random, dtype=torch.float64)
    got = Replication.combine(Replication.__new__(Replication), values, weights, has, before)
    torch.testing.assert_close(got, owners_mean(values, weights, has, before))


def test_with_three_ranks_it_is_not(federation: Callable[..., Any]) -> None:
    """The clients of the middle rank own their rows, but the lowest copy those of the highest."""
    fed = federation("replication", ranks=(2, 5, 3)).begin()
    messages = fed.step(1)
    a = {client: message.tensors[f"A/{SITES[0]}"].double() for client, message in messages.items()}
    n_ann, n_bob, n_cid = 30, 12, 18
    third = fed.state[f"global/A/{SITES[0]}"][2].double()
    torch.testing.assert_close(third, ((n_ann + n_bob) * a["bob"][2] + n_cid * a["cid"][2]) / 60, rtol=1e-5, atol=1e-6)
    owners = (n_bob * a["bob"][2] + n_cid * a["cid"][2]) / (n_bob + n_cid)
    assert (third - owners).norm() > 0.05


def test_zero_padding_shrinks_what_few_own_and_replication_does_not(federation: Callable[..., Any]) -> None:
    """The published effect: the owner's own work comes back as p^2 of itself, or as it was."""
    distance = {}
    for name in ("zeropad", "replication"):
        fed = federation(name, ranks=(2, 2, 5)).begin()
        fed.step(1)
        trained = fed.snapshot()["cid"]
        before = tail(fed, trained, 2)
        fed.deliver()
        after = tail(fed, fed.clients["cid"].tensors, 2)
        p = 18 / 60
        for was, is_now in zip(before, after, strict=True):
            kept = p**2 if name == "zeropad" else 1.0
            np.testing.assert_allclose(is_now, kept * was, rtol=1e-4, atol=1e-6)
        pairs = zip(fed.dense(fed.clients["cid"].tensors), fed.dense(trained), strict=True)
        distance[name] = sum(np.linalg.norm(got - own) / np.linalg.norm(own) for got, own in pairs)
    assert distance["replication"] < 0.8 * distance["zeropad"]


def test_over_rounds_zero_padding_loses_the_tail_though_nothing_argues_against_it(
    federation: Callable[..., Any],
) -> None:
    """Clients that do not train any more: each round of zero padding multiplies the tail by p^2 again."""
    left = {}
    for name in ("zeropad", "replication"):
        fed = federation(name, ranks=(2, 2, 5)).begin()
        fed.train(1)
        start = np.linalg.norm(tail(fed, fed.clients["cid"].tensors, 2)[0])
        for round in (1, 2, 3):
            fed.state = fed.method.server(round, fed.state, fed.messages(round))
            fed.deliver()
        left[name] = np.linalg.norm(tail(fed, fed.clients["cid"].tensors, 2)[0]) / start
    assert left["zeropad"] == pytest.approx((18 / 60) ** 6, rel=1e-3)
    assert left["replication"] == pytest.approx(1.0, rel=1e-5)


@PADDING
def test_a_client_alone_keeps_its_function_at_every_rank(federation: Callable[..., Any], name: str) -> None:
    """One client is local training; and whoever is wider gets the same function, at its own scale."""
    for alone in ("ann", "bob", "cid"):
        fed = federation(name, ranks=(2, 5, 3)).begin()
        for round in (1, 2):
            fed.step(round, [alone])
            own = fed.dense(fed.clients[alone].tensors)
            fed.deliver()
            for client, rank in zip(fed.clients, (2, 5, 3), strict=True):
                if round == 1 and rank >= fed.clients[alone].rank:  # later, rows that nobody trains may be there
                    for got, want in zip(fed.dense(fed.clients[client].tensors), own, strict=True):
                        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
            for got, want in zip(fed.dense(fed.clients[alone].tensors), own, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@PADDING
def test_rows_that_nobody_of_the_round_owns_stay(federation: Callable[..., Any], name: str) -> None:
    fed = federation(name, ranks=(2, 5, 3)).begin()
    start = fed.clients["bob"].tensors[f"A/{SITES[0]}"].clone()
    fed.step(1, ["ann"])
    fed.deliver()
    # They are not zero in both factors: a client that comes later can still train them.
    assert torch.equal(fed.clients["bob"].tensors[f"A/{SITES[0]}"][2:], start[2:])
    assert not fed.clients["bob"].tensors[f"B/{SITES[0]}"][:, 2:].any()
    fed.step(2)
    known = fed.state
    fed.deliver()
    fed.step(3, ["ann", "cid"])
    for site in SITES:
        assert torch.equal(fed.state[f"global/A/{site}"][3:], known[f"global/A/{site}"][3:])
        assert torch.equal(fed.state[f"global/B/{site}"][:, 3:], known[f"global/B/{site}"][:, 3:])
        assert not torch.equal(fed.state[f"global/A/{site}"][:3], known[f"global/A/{site}"][:3])


@PADDING
def test_starts_are_nested_and_fedits(federation: Callable[..., Any], name: str) -> None:
    fed, plain = federation(name, ranks=(2, 5, 3)), federation("fedit", ranks=(5, 5, 5))
    for client in fed.clients.values():
        for site in SITES:
            wide = plain.clients[client.id].tensors[f"A/{site}"]
            assert torch.equal(client.tensors[f"A/{site}"], wide[: client.rank])
            assert not client.tensors[f"B/{site}"].any()


@PADDING
def test_the_global_model_is_the_widest(federation: Callable[..., Any], name: str) -> None:
    fed = federation(name, ranks=(2, 5, 3)).begin()
    fed.step(1)
    fed.deliver()
    model = fed.method.global_model(fed.state, "ann", dict(fed.clients["ann"].tensors))
    widest = fed.clients["bob"].tensors
    assert model.keys() == widest.keys()
    assert all(torch.equal(model[key], tensor) for key, tensor in widest.items())


@PADDING
def test_the_error_is_against_the_dense_mean(federation: Callable[..., Any], name: str) -> None:
    fed = federation(name, ranks=(2, 5, 3)).begin()
    messages = fed.step(1)
    trained = fed.snapshot()
    target = [sum(p * u[i] for p, u in zip(shares(3), map(fed.dense, trained.values()), strict=True)) for i in (0, 1)]
    fed.deliver()
    gaps = [
        np.linalg.norm(got - want) / np.linalg.norm(want)
        for tensors in fed.snapshot().values()
        for got, want in zip(fed.dense(tensors), target, strict=True)
    ]
    error = aggregation_error(
        fed.method.adapter,
        list(trained.values()),
        list(fed.snapshot().values()),
        fed.method.mixing(fed.state, messages),
    )
    assert error == pytest.approx(np.mean(gaps), rel=1e-5)
    assert error > 0.05


# -- promotion ---------------------------------------------------------------------------------------------------------

PROMOTION = {"promote": 5, "promote_share": 0.34}


@PADDING
def test_promotion_changes_no_function(federation: Callable[..., Any], name: str) -> None:
    fed = federation(name, ranks=(2, 2, 2), **PROMOTION).begin()
    fed.step(1)
    fed.deliver()
    before = {client: fed.dense(tensors) for client, tensors in fed.snapshot().items()}
    fed.state = fed.method.validated(1, fed.state, {"ann": 0.5, "bob": 0.9, "cid": 0.7})
    assert [fed.method.rank(fed.state, client) for client in fed.clients] == [2, 5, 2]
    fed.deliver()
    for client, tensors in fed.snapshot().items():
        rank = 5 if client == "bob" else 2
        for site in SITES:
            assert tensors[f"A/{site}"].shape[0] == tensors[f"B/{site}"].shape[1] == rank
        for got, want in zip(fed.dense(tensors), before[client], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    grown = fed.clients["bob"].tensors
    start = federation(name, ranks=(5,)).clients["ann"].tensors
    for site in SITES:  # the new rows can be trained: A is the common start, B zero
        assert torch.equal(grown[f"A/{site}"][2:], start[f"A/{site}"][2:])
        assert not grown[f"B/{site}"][:, 2:].any()
    fed.deliver()  # twice is once
    assert all(torch.equal(fed.clients["bob"].tensors[key], tensor) for key, tensor in grown.items())


@PADDING
def test_a_promoted_client_sends_and_gets_more_from_then_on(federation: Callable[..., Any], name: str) -> None:
    fed = federation(name, ranks=(2, 2, 2), **PROMOTION).begin()
    fed.step(1)
    fed.state = fed.method.validated(1, fed.state, {"ann": 0.5, "bob": 0.5, "cid": 0.4})  # a tie: the first of both
    fed.state = safetensors.torch.load(safetensors.torch.save(fed.state))  # as after a resume
    fed.deliver()
    for round in (2, 3):
        messages = fed.step(round)
        for client, message in messages.items():
            rank = 5 if client == "ann" else 2
            assert message.tensors[f"A/{SITES[0]}"].shape == (rank, 10)
            check(message, fed.method.expected(round, fed.state, client), ("examples",))
        oracle = zero_padded if name == "zeropad" else replicated
        mean_a, mean_b = oracle(messages, shares(3), SITES[0], 5)
        np.testing.assert_allclose(fed.state[f"global/A/{SITES[0]}"].numpy(), mean_a, rtol=1e-5, atol=1e-6)
        widest = fed.method.reply(fed.state, "ann").tensors[f"B/{SITES[0]}"].double().numpy()
        np.testing.assert_allclose(ALPHA / 5 * widest, mean_b, rtol=1e-5, atol=1e-6)
        # Only the first validation promotes.
        assert fed.method.validated(round, fed.state, {"cid": 1.0}) is fed.state
        fed.deliver()
    assert fed.state["promoted"].tolist() == [0]


@pytest.mark.parametrize(
    ("share", "validated", "expected"),
    [(0.1, 5, 1), (0.34, 3, 1), (0.5, 5, 3), (1.0, 4, 4), (0.1, 1, 1), (0.2, 5, 1), (0.29, 5, 1), (0.31, 5, 2)],
)
def test_how_many_are_promoted(context: Callable[..., Any], share: float, validated: int, expected: int) -> None:
    method = build("replication", {}, context((2,) * 5, promote=4, promote_share=share))
    accuracies = {client: 0.1 * i for i, client in enumerate(method.context.clients[:validated])}
    state = method.validated(1, {}, accuracies)
    best = list(range(validated))[::-1][:expected]
    assert state["promoted"].tolist() == best
    assert state["ranks"].tolist() == [4 if i in best else 2 for i in range(5)]
    assert build("replication", {}, context((2,) * 5)).validated(1, {}, accuracies) == {}


def test_methods_whose_ranks_stay_refuse_a_promotion(context: Callable[..., Any]) -> None:
    for name in ("fedit", "celora", "local", "hafl"):
        with pytest.raises(MethodError, match=rf"'{name}' keeps the ranks .* adapter.promote = 5; allowed: .*repli"):
            build(name, {}, context((2, 2), promote=5))
    for name in ("zeropad", "replication", "hetlora"):
        build(name, {}, context((2, 2), promote=7))
        with pytest.raises(
            MethodError, match="adapter.promote = 8 exceeds the smallest adapted layer; allowed: 1 to 7"
        ):
            build(name, {}, context((2, 2), promote=8))


# -- real runs ---------------------------------------------------------------------------------------------------------


def test_a_run_with_a_promotion_counts_its_bytes_and_can_be_resumed(
    tiny_recipe: Callable[..., Any], tmp_path: Path, resumed: Callable[[Any], dict[str, Any]]
) -> None:
    recipe = tiny_recipe(
        "method.name=replication", "adapter.rank=2", "adapter.promote=6", "adapter.promote_share=0.25", "train.rounds=3"
    )
    resumed(recipe)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    accuracies = lines[1]["validation"]["clients"]
    (best,) = [c for c, up in lines[2]["bytes_up_clients"].items() if up > 1.2 * lines[1]["bytes_up_clients"][c]]
    assert accuracies[best] == max(accuracies.values())
    for line in lines[2:]:
        for client, up in line["bytes_up_clients"].items():
            sites = prepare(recipe).method.context.sites
            more = sum(4 * (6 - 2) * (site.d_in + site.d_out) for site in sites) if client == best else 0
            assert up == lines[1]["bytes_up_clients"][client] + more
    for client in accuracies:
        assert client_model(tmp_path / "whole", client).rank == (6 if client == best else 2)


def test_a_recipe_whose_ranks_a_method_cannot_have_is_one_line(tiny_recipe: Callable[..., Any]) -> None:
    for override in ("adapter.promote=8", "adapter.device_ranks=[2,4]"):
        with pytest.raises(MethodError) as caught:
            prepare(tiny_recipe("method.name=fedit", override))
        assert "\n" not in str(caught.value)
        assert "fedit" in str(caught.value)
        assert "allowed" in str(caught.value)
    ranks = prepare(tiny_recipe("method.name=replication", "adapter.device_ranks=[2,4]")).ranks
    assert sorted(ranks.values()) == [2, 2, 4, 4]
