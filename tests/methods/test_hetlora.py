"""HetLoRA: norms and means against dense products, and ranks that clients prune themselves."""

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

from folklora.adapters.lowrank import LowRank, Site, Tensors
from folklora.errors import MessageError, RecipeError
from folklora.federation.codec import check, encode
from folklora.federation.run import client_model, run
from folklora.federation.setup import prepare
from folklora.methods import build, check_options
from folklora.methods.contract import Message
from folklora.methods.hetlora import HetLoRA
from folklora.methods.work import Trained

SITES = ("layer.0.query", "layer.1.value")
ALPHA = 6.0  # of the federation in conftest


def factors(message: Message, site: str, kept: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A_k and s_k B_k, float64, without a tail."""
    a, b = (message.tensors[f"{factor}/{site}"].double().numpy() for factor in "AB")
    return a[:kept], ALPHA / len(a) * b[:, :kept]


def norm(message: Message) -> float:
    """Of the dense update over both sites."""
    return float(np.sqrt(sum(np.linalg.norm(b @ a) ** 2 for a, b in (factors(message, site) for site in SITES))))


def train(fed: Any, round: int, client: str, change: Callable[[Tensors], Tensors]) -> Message:
    """One client's training by a rule of the test, and what it says."""
    own = fed.clients[client]
    fed.method.learned(round, own, {"": Trained({**own.tensors, **change(own.tensors)}, 1.0, 4, 0.04)})
    return fed.method.send(round, own)


def shrink_tail(kept: int, factor: float = 0.5) -> Callable[[Tensors], Tensors]:
    """Local training that leaves the pairs from ``kept`` on smaller, and the others larger."""

    def change(tensors: Tensors) -> Tensors:
        new = {}
        for site in SITES:
            new[f"A/{site}"] = tensors[f"A/{site}"].clone()
            new[f"A/{site}"][kept:] *= factor
            new[f"A/{site}"][:kept] *= 1.5
        return new

    return change


def ranks(fed: Any) -> list[int]:
    return [fed.method.rank(fed.state, client) for client in fed.clients]


# -- weights and means -------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(6, 9), st.integers(6, 9), st.integers(0, 10**6))
def test_the_norm_is_that_of_the_product_that_is_not_built(r: int, d_in: int, d_out: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    method = HetLoRA.__new__(HetLoRA)
    sites = (Site("x", d_in, d_out), Site("y", d_out, d_in))
    method.adapter = LowRank(sites, False, ALPHA)
    method.context = type("Sites", (), {"sites": sites})()
    tensors = {n: torch.randn(shape, generator=random) for n, shape in method.adapter.shapes(r).items()}
    dense = np.sqrt(sum(np.linalg.norm(method.adapter.update(tensors, site.name).numpy()) ** 2 for site in sites))
    assert float(method.update_norm(tensors)) == pytest.approx(dense, rel=1e-9)


@pytest.mark.parametrize("widths", [(2, 5, 3), (3, 3, 3), (4, 1, 6)])
def test_the_mean_is_zero_padded_and_weighted_by_norms(federation: Callable[..., Any], widths: tuple[int, ...]) -> None:
    fed = federation("hetlora", {"gamma": 1.0}, ranks=widths).begin()
    most = max(widths)
    for round in (1, 2, 3):
        messages = fed.step(round)
        norms = np.array([norm(message) for message in messages.values()])
        p = norms / norms.sum()
        mixing = fed.method.mixing(fed.state, messages)
        np.testing.assert_allclose(mixing.numpy(), np.tile(p, (3, 1)), rtol=1e-6)
        assert np.abs(p - np.array([30, 12, 18]) / 60).max() > 0.02
        for site in SITES:
            pairs = [factors(message, site) for message in messages.values()]
            mean_a = sum(w * np.pad(a, ((0, most - len(a)), (0, 0))) for w, (a, _) in zip(p, pairs, strict=True))
            mean_b = sum(w * np.pad(b, ((0, 0), (0, most - b.shape[1]))) for w, (_, b) in zip(p, pairs, strict=True))
            for client, rank in zip(fed.clients, widths, strict=True):
                reply = fed.method.reply(fed.state, client).tensors
                np.testing.assert_allclose(reply[f"A/{site}"].numpy(), mean_a[:rank], rtol=1e-5, atol=1e-6)
                got = ALPHA / rank * reply[f"B/{site}"].double().numpy()
                np.testing.assert_allclose(got, mean_b[:, :rank], rtol=1e-5, atol=1e-6)
        fed.deliver()


def test_the_same_update_weighs_the_same_at_any_rank(federation: Callable[..., Any]) -> None:
    """Rank 2 and rank 5 with one update: s B A counts, not B A."""
    fed = federation("hetlora", ranks=(2, 5)).begin()
    fed.train(1)
    narrow, wide = (fed.clients[client].tensors for client in ("ann", "bob"))
    for site in SITES:
        wide[f"A/{site}"][:2], wide[f"A/{site}"][2:] = narrow[f"A/{site}"], 1.0
        wide[f"B/{site}"][:, :2], wide[f"B/{site}"][:, 2:] = 5 / 2 * narrow[f"B/{site}"], 0.0
    torch.testing.assert_close(fed.method.mixing({}, fed.messages(1)), torch.full((2, 2), 0.5, dtype=torch.float64))


def test_updates_of_nothing_are_weighted_by_examples(federation: Callable[..., Any]) -> None:
    fed = federation("hetlora").begin()
    for client in fed.clients:
        train(fed, 1, client, lambda tensors: {})
    messages = fed.messages(1)
    np.testing.assert_allclose(fed.method.mixing({}, messages)[0].numpy(), np.array([30, 12, 18]) / 60)
    state = fed.method.server(1, fed.state, messages)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_the_head_is_averaged_by_examples(federation: Callable[..., Any]) -> None:
    fed = federation("hetlora", ranks=(2, 5, 3)).begin()
    messages = fed.step(1)
    heads = [message.tensors["head/weight"].double().numpy() for message in messages.values()]
    want = np.average(heads, axis=0, weights=[30, 12, 18])
    np.testing.assert_allclose(fed.method.reply(fed.state, "bob").tensors["head/weight"].numpy(), want, rtol=1e-5)


# -- pruning -----------------------------------------------------------------------------------------------------------


def trained(federation: Callable[..., Any], gamma: float = 0.7, widths: tuple[int, ...] = (4, 4, 4)) -> Any:
    """A federation after its first round: nobody can have pruned, because every tail began at zero."""
    fed = federation("hetlora", {"gamma": gamma}, ranks=widths).begin()
    fed.step(1)
    assert ranks(fed) == list(widths)
    fed.deliver()
    return fed


def test_a_tail_that_shrank_is_dropped_and_everybody_knows(federation: Callable[..., Any]) -> None:
    fed = trained(federation)  # floor(0.7 * 4) = 2
    wide = len(encode(fed.method.reply(fed.state, "bob")))
    fed.train(2, ["ann", "cid"])
    messages = fed.messages(2, ["ann", "cid"])
    messages = {"ann": messages["ann"], "bob": train(fed, 2, "bob", shrink_tail(2)), "cid": messages["cid"]}
    assert messages["bob"].tensors["index/rank"].tolist() == [2]
    for client, message in messages.items():
        check(message, fed.method.expected(2, fed.state, client), ("examples",))
        fed.method.check_update(2, fed.state, client, message)
    # The client computes without the tail at once, at the scale it trained with ...
    own = fed.dense(fed.clients["bob"].tensors)
    for site, update in zip(SITES, own, strict=True):
        a, b = factors(messages["bob"], site, 2)
        np.testing.assert_allclose(update, b @ a, rtol=1e-5, atol=1e-7)
    fed.state = fed.method.server(2, fed.state, messages)
    assert ranks(fed) == [4, 2, 4]
    # ... the mean leaves it out ...
    norms = np.array([norm(message) for message in messages.values()])
    for site in SITES:
        cut = {client: factors(message, site, 2 if client == "bob" else 4) for client, message in messages.items()}
        want = sum(
            w * np.pad(a, ((0, 4 - len(a)), (0, 0)))
            for w, (a, _) in zip(norms / norms.sum(), cut.values(), strict=True)
        )
        np.testing.assert_allclose(fed.state[f"global/A/{site}"].numpy(), want, rtol=1e-5, atol=1e-6)
    # ... and from then on everything is narrower.
    fed.state = safetensors.torch.load(safetensors.torch.save(fed.state))
    assert len(encode(fed.method.reply(fed.state, "bob"))) == wide - 4 * 2 * (10 + 12 + 8 + 7)
    fed.deliver()
    fed.deliver()
    assert fed.clients["bob"].tensors[f"A/{SITES[0]}"].shape == (2, 10)
    assert fed.clients["bob"].tensors[f"B/{SITES[1]}"].shape == (7, 2)
    assert fed.clients["ann"].tensors[f"A/{SITES[0]}"].shape == (4, 10)
    again = fed.step(3)["bob"]
    assert again.tensors[f"A/{SITES[0]}"].shape == (2, 10)
    check(again, fed.method.expected(3, fed.state, "bob"), ("examples",))


def test_a_pruned_client_gets_the_servers_pairs_at_its_new_scale(federation: Callable[..., Any]) -> None:
    fed = trained(federation)
    message = train(fed, 2, "bob", shrink_tail(2))
    own = fed.dense(fed.clients["bob"].tensors)
    fed.state = fed.method.server(2, fed.state, {"bob": message})
    fed.deliver(["bob"])
    for got, want in zip(fed.dense(fed.clients["bob"].tensors), own, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_a_tail_that_grew_stays(federation: Callable[..., Any]) -> None:
    fed = trained(federation)
    message = train(fed, 2, "bob", shrink_tail(2, factor=1.01))
    assert message.tensors["index/rank"].tolist() == [4]
    same = train(fed, 2, "ann", lambda tensors: {})  # neither grew nor fell
    assert same.tensors["index/rank"].tolist() == [4]
    assert message.tensors[f"B/{SITES[0]}"][:, 2:].any()


@pytest.mark.parametrize(
    ("gamma", "rank", "kept"),
    [(0.99, 1, 1), (0.99, 2, 1), (0.99, 6, 5), (0.5, 6, 3), (0.5, 5, 2), (0.1, 6, 1), (1.0, 6, 6)],
)
def test_floor_of_gamma_r_and_never_zero(federation: Callable[..., Any], gamma: float, rank: int, kept: int) -> None:
    fed = trained(federation, gamma, (rank, rank))
    message = train(fed, 2, "ann", shrink_tail(kept))
    assert message.tensors["index/rank"].tolist() == [kept]
    fed.state = fed.method.server(2, fed.state, {"ann": message})
    assert ranks(fed) == [kept, rank]


def test_ranks_shrink_round_after_round_to_one(federation: Callable[..., Any]) -> None:
    fed = trained(federation, gamma=0.99)
    seen = []
    for round in range(2, 8):
        rank = fed.method.rank(fed.state, "ann")
        message = train(fed, round, "ann", shrink_tail(max(1, rank - 1)))
        check(message, fed.method.expected(round, fed.state, "ann"), ("examples",))
        fed.method.check_update(round, fed.state, "ann", message)
        fed.state = fed.method.server(round, fed.state, {"ann": message})
        fed.deliver(["ann"])
        seen.append(fed.method.rank(fed.state, "ann"))
    assert seen == [3, 2, 1, 1, 1, 1]


def test_a_message_that_is_lost_changes_nobodys_rank(federation: Callable[..., Any]) -> None:
    fed = trained(federation)
    before = fed.method.reply(fed.state, "bob")
    train(fed, 2, "bob", shrink_tail(2))  # and the server never hears of it
    fed.step(2, ["ann", "cid"])
    assert ranks(fed) == [4, 4, 4]
    fed.deliver()
    assert fed.clients["bob"].tensors[f"A/{SITES[0]}"].shape == (4, 10)
    assert before is not None
    message = fed.step(3)["bob"]
    check(message, fed.method.expected(3, fed.state, "bob"), ("examples",))


@pytest.mark.parametrize("announced", [0, 3, 5, -1, 1])
def test_another_rank_than_agreed_is_refused(federation: Callable[..., Any], announced: int) -> None:
    fed = trained(federation)
    message = train(fed, 2, "bob", lambda tensors: {})
    lie = Message({**message.tensors, "index/rank": torch.tensor([announced], dtype=torch.int32)}, message.numbers)
    with pytest.raises(MessageError, match=rf"'index/rank' holds {announced}; allowed: 4, or 2 if pruned"):
        fed.method.check_update(2, fed.state, "bob", lie)
    fed.method.check_update(2, fed.state, "bob", message)


def test_a_promoted_client_may_prune_again(federation: Callable[..., Any]) -> None:
    fed = federation("hetlora", {"gamma": 0.5}, ranks=(2, 2), promote=6, promote_share=0.5).begin()
    fed.step(1)
    fed.state = fed.method.validated(1, fed.state, {"ann": 0.9, "bob": 0.1})
    assert ranks(fed) == [6, 2]
    fed.deliver()
    fed.step(2)
    fed.deliver()
    message = train(fed, 3, "ann", shrink_tail(3))
    fed.state = fed.method.server(3, fed.state, {"ann": message})
    assert ranks(fed) == [3, 2]
    assert fed.method.validated(3, fed.state, {"ann": 1.0, "bob": 0.0}) is fed.state


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"gamma": 0.0}, "method.gamma = 0.0: input should be greater than 0"),
        ({"gamma": 1.5}, "method.gamma = 1.5: input should be less than or equal to 1"),
        ({"gama": 0.5}, "unknown key `method.gama`; did you mean `gamma`?"),
    ],
)
def test_bad_options(options: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options("hetlora", dict(options))
    assert complaint in str(caught.value)


def test_the_published_gamma(context: Callable[..., Any]) -> None:
    assert build("hetlora", {}, context()).options.model_dump()["gamma"] == 0.99


def test_ranks_shrink_in_a_real_run(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Weight decay makes the tails fall."""
    recipe = tiny_recipe(
        "method.name=hetlora", "method.gamma=0.5", "adapter.rank=[4,6,4,2]", "train.weight_decay=50", "train.rounds=3"
    )
    run(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    up = [line["bytes_up_clients"] for line in lines[1:]]
    assert up[1] == up[0]  # in the first round no tail can fall: it began at zero
    widths = [client_model(tmp_path / "run", client).rank for client in "0123"]
    of_a_pair = 4 * sum(site.d_in + site.d_out for site in prepare(recipe).method.context.sites)
    shrunk = 0
    for client, rank, width in zip("0123", [4, 6, 4, 2], widths, strict=True):
        saved = up[1][client] - up[2][client]
        assert saved in {0, rank // 2 * of_a_pair}
        assert width in ({rank, rank // 2} if not saved else {rank // 2, max(1, rank // 4)})
        shrunk += bool(saved)
    assert shrunk
    assert all(line["aggregation_error"] < 2 for line in lines[1:])
