"""CE-LoRA's formulas, recomputed in NumPy from the messages the server saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes

from folklora.data.mixtures import ClassMixtures, projection
from folklora.data.statistics import ClassStatistics
from folklora.methods import build
from folklora.methods.celora import procrustes
from folklora.methods.contract import Message
from folklora.methods.transport import data_distances, similarity
from folklora.randomness import derive

SITES = ("layer.0.query", "layer.1.value")
ALPHA = 6.0  # of the federation in conftest
Messages = dict[str, Message]


# -- oracles -----------------------------------------------------------------------------------------------------------


def scaled_cores(messages: Messages, most: int) -> np.ndarray:
    """``s_k C_k`` zero-padded to the largest rank: [K, L, r, r]."""
    out = np.zeros((len(messages), len(SITES), most, most))
    for k, message in enumerate(messages.values()):
        for layer, site in enumerate(SITES):
            core = message.tensors[f"C/{site}"].double().numpy()
            out[k, layer, : len(core), : len(core)] = ALPHA / len(core) * core
    return out


def textbook_cka(cores: np.ndarray) -> np.ndarray:
    """tr(K H L H) / sqrt(tr(K H K H) tr(L H L H)) with K = C C', averaged over layers, in loops."""
    count, layers, r, _ = cores.shape
    h = np.eye(r) - 1 / r
    out = np.zeros((count, count))
    for i, j, layer in np.ndindex(count, count, layers):
        k, m = (cores[index, layer] @ cores[index, layer].T for index in (i, j))
        norms = np.trace(k @ h @ k @ h) * np.trace(m @ h @ m @ h)
        out[i, j] += np.trace(k @ h @ m @ h) / np.sqrt(norms) / layers
    return out


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def replied(fed: Any, client: str) -> np.ndarray:
    """The cores a client gets, scaled by its own alpha / r: [L, r, r]."""
    tensors = fed.method.reply(fed.state, client).tensors
    return np.stack([ALPHA / len(tensors[f"C/{s}"]) * tensors[f"C/{s}"].double().numpy() for s in SITES])


def expected_mix(weights: np.ndarray, messages: Messages, most: int) -> np.ndarray:
    return np.einsum("ij,jlpq->ilpq", weights, scaled_cores(messages, most))


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (2, 5, 3, 4)])
@pytest.mark.parametrize("kind", ["data", "model", "both"])
@pytest.mark.parametrize(("lam", "temperature"), [(0.5, 0.5), (0.2, 0.05), (0.9, 3.0)])
def test_weights_and_cores_follow_the_formula(
    federation: Callable[..., Any], ranks: tuple[int, ...], kind: str, lam: float, temperature: float
) -> None:
    fed = federation("celora", {"similarity": kind, "lambda": lam, "temperature": temperature}, ranks=ranks).begin()
    s_data = np.zeros((4, 4))
    if kind != "model":
        mixtures = []
        for name, client in fed.clients.items():
            seed = derive(fed.method.context.seed, "mixture", name)
            mixtures.append(ClassMixtures.fit(*client.data.train, components=3, seed=seed))
        s_data = similarity(data_distances(mixtures)).numpy()
        np.testing.assert_allclose(fed.state["similarity/data"].numpy(), s_data, rtol=1e-4, atol=1e-5)
    for round in (1, 2):
        messages = fed.step(round)
        s_model = textbook_cka(scaled_cores(messages, max(ranks)))
        mixed = {"data": s_data, "model": s_model, "both": lam * s_data + (1 - lam) * s_model}[kind]
        weights = softmax(mixed / temperature)
        got = fed.state["weights"].double().numpy()
        np.testing.assert_allclose(got.sum(1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(got, weights, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(fed.state["similarity/mixed"].numpy(), mixed, rtol=1e-4, atol=1e-5)
        want = expected_mix(got, messages, max(ranks))
        for i, (client, rank) in enumerate(zip(fed.clients, ranks, strict=True)):
            np.testing.assert_allclose(replied(fed, client), want[i, :, :rank, :rank], rtol=1e-5, atol=1e-5)
        fed.deliver()


@pytest.mark.parametrize("kind", ["uniform", "size"])
@pytest.mark.parametrize("basis", ["private", "frozen"])
def test_plain_and_example_weighted_means(federation: Callable[..., Any], kind: str, basis: str) -> None:
    fed = federation("celora", {"similarity": kind, "basis": basis}, ranks=(2, 5, 3)).begin()
    messages = fed.step(1)
    p = np.full(3, 1 / 3) if kind == "uniform" else np.array([30, 12, 18]) / 60
    np.testing.assert_allclose(fed.state["weights"].numpy(), np.tile(p, (3, 1)), rtol=1e-6)
    want = np.einsum("j,jlpq->lpq", p, scaled_cores(messages, 5))
    for client, rank in zip(fed.clients, (2, 5, 3), strict=True):
        np.testing.assert_allclose(replied(fed, client), want[:, :rank, :rank], rtol=1e-5, atol=1e-6)
    assert not any(name.startswith("similarity/") for name in fed.state)


def test_lambda_runs_from_model_to_data(federation: Callable[..., Any]) -> None:
    for lam, kind in ((0.0, "model"), (1.0, "data")):
        mixed = federation("celora", {"similarity": "both", "lambda": lam}).begin()
        alone = federation("celora", {"similarity": kind}).begin()
        for fed in (mixed, alone):
            fed.step(1)
        for client in mixed.clients:
            np.testing.assert_array_equal(replied(mixed, client), replied(alone, client))


@pytest.mark.parametrize("kind", ["data", "model", "both"])
def test_temperature_runs_from_local_to_the_mean(federation: Callable[..., Any], kind: str) -> None:
    cold = federation("celora", {"similarity": kind, "temperature": 1e-6}).begin()
    hot = federation("celora", {"similarity": kind, "temperature": 1e6}).begin()
    messages = cold.step(1)
    hot.step(1)
    cores = scaled_cores(messages, 3)
    assert torch.equal(cold.state["weights"], torch.eye(3))
    for i, client in enumerate(cold.clients):
        np.testing.assert_allclose(replied(cold, client), cores[i], rtol=1e-6)
        np.testing.assert_allclose(replied(hot, client), cores.mean(0), rtol=1e-4, atol=1e-5)


def test_a_client_listens_most_to_its_like(federation: Callable[..., Any]) -> None:
    fed = federation("celora", {"similarity": "data", "temperature": 0.1}, ranks=(3, 3, 3)).begin()
    twins = {**{n: c.data for n, c in fed.clients.items()}, "cid": fed.clients["ann"].data}
    fed = federation("celora", {"similarity": "data", "temperature": 0.1}, ranks=(3, 3, 3), data=twins).begin()
    fed.step(1)
    weights = fed.state["weights"]
    assert weights[0, 2] > 5 * weights[0, 1]
    assert weights[2, 0] > 5 * weights[2, 1]


# -- bases -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 6), layers=st.integers(1, 3), seed=st.integers(0, 999))
def test_alignment_is_orthogonal_procrustes(r: int, layers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cores, reference = rng.normal(size=(4, layers, r, r)), rng.normal(size=(layers, r, r))
    got = procrustes(torch.from_numpy(cores), torch.from_numpy(reference)).numpy()
    for k, layer in np.ndindex(4, layers):
        core, goal = cores[k, layer], reference[layer]
        # SciPy rotates from the right: min ||X Q - Y||, so both are transposed.
        rotation = orthogonal_procrustes(core.T, goal.T)[0].T
        np.testing.assert_allclose(got[k, layer], rotation @ core, atol=1e-8)
        for _ in range(5):  # and no rotation drawn at random comes nearer
            other, _ = np.linalg.qr(rng.normal(size=(r, r)))
            assert np.linalg.norm(got[k, layer] - goal) <= np.linalg.norm(other @ core - goal) + 1e-9


@pytest.mark.parametrize("kind", ["uniform", "size", "model", "both"])
def test_aligned_cores_do_not_care_how_each_client_is_turned(federation: Callable[..., Any], kind: str) -> None:
    """Clients that hold one core, each in a frame of its own, each get their own back."""
    fed = federation("celora", {"basis": "aligned", "similarity": kind, "temperature": 5.0}).begin()
    rng = np.random.default_rng(0)
    common = {site: rng.normal(size=(3, 3)) for site in SITES}
    for client in fed.clients.values():
        for site in SITES:
            turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
            client.tensors[f"C/{site}"] = torch.from_numpy(turn @ common[site]).float()
    messages = fed.messages(1)
    fed.state = fed.method.server(1, fed.state, messages)
    for client, message in messages.items():
        for site in SITES:
            got = fed.method.reply(fed.state, client).tensors[f"C/{site}"]
            torch.testing.assert_close(got, message.tensors[f"C/{site}"], rtol=1e-5, atol=1e-5)
    plain = federation("celora", {"basis": "private", "similarity": "uniform"}).begin()
    plain.state = plain.method.server(1, plain.state, messages)
    got = plain.method.reply(plain.state, "ann").tensors[f"C/{SITES[0]}"]
    assert (got - messages["ann"].tensors[f"C/{SITES[0]}"]).norm() > 0.5  # without alignment they blur


def test_aligned_mix_is_the_weighted_mean_of_turned_cores(federation: Callable[..., Any]) -> None:
    fed = federation("celora", {"basis": "aligned"}, ranks=(2, 4, 3)).begin()
    messages = fed.step(1)
    cores, weights = scaled_cores(messages, 4), fed.state["weights"].double().numpy()
    for i, (client, rank) in enumerate(zip(fed.clients, (2, 4, 3), strict=True)):
        got = replied(fed, client)
        for layer in range(len(SITES)):
            want = np.zeros((4, 4))
            for j in range(3):
                # Where ranks differ part of the turn is free, but what it moves is cut off on the way down.
                turned = orthogonal_procrustes(cores[j, layer].T, cores[i, layer].T)[0].T @ cores[j, layer]
                want += weights[i, j] * turned
            np.testing.assert_allclose(got[layer], want[:rank, :rank], atol=1e-5)


def test_frozen_frames_are_orthonormal_common_nested_and_never_train(federation: Callable[..., Any]) -> None:
    fed = federation("celora", {"basis": "frozen"}, ranks=(2, 5, 3))
    widest = fed.clients["bob"].tensors
    for client in fed.clients.values():
        for site in SITES:
            a, b = client.tensors[f"A/{site}"], client.tensors[f"B/{site}"]
            torch.testing.assert_close(a @ a.T, torch.eye(client.rank), atol=1e-6, rtol=0)
            torch.testing.assert_close(b.T @ b, torch.eye(client.rank), atol=1e-6, rtol=0)
            assert torch.equal(a, widest[f"A/{site}"][: client.rank])
            assert torch.equal(b, widest[f"B/{site}"][:, : client.rank])
            assert a.is_contiguous()
            assert b.is_contiguous()
            assert not client.tensors[f"C/{site}"].any()
    assert fed.method.trained(1) == {"C", "head", "norm"}
    assert not torch.equal(widest[f"A/{SITES[0]}"][:, :7], widest[f"B/{SITES[1]}"].T)


def test_published_start(federation: Callable[..., Any]) -> None:
    fed = federation("celora", {"init_std": 0.5}, ranks=(4, 4))
    usual = federation("celora", ranks=(4, 4))
    for site in SITES:
        wide, narrow = (f.clients["ann"].tensors[f"A/{site}"] for f in (fed, usual))
        torch.testing.assert_close(wide, 500 * narrow)
        assert 0.5e-3 < float(narrow.std()) < 2e-3
        assert torch.equal(fed.clients["ann"].tensors[f"C/{site}"], torch.eye(4))
        assert not fed.clients["ann"].tensors[f"B/{site}"].any()


# -- who was there -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"basis": "aligned", "similarity": "uniform"}, {"similarity": "data"}])
def test_absent_clients_keep_their_mix_and_their_rows(federation: Callable[..., Any], options: dict[str, Any]) -> None:
    fed = federation("celora", options, ranks=(2, 5, 3, 4)).begin()
    assert all(fed.method.reply(fed.state, client) is None for client in fed.clients)
    fed.step(1, ["ann", "bob", "cid"])
    first, rows = replied(fed, "ann"), fed.state["weights"].clone()
    assert fed.method.reply(fed.state, "dot") is None  # a newcomer keeps what it has until it takes part
    assert torch.equal(rows[3], torch.eye(4)[3])
    before = fed.snapshot()["dot"]
    fed.deliver()
    assert all(torch.equal(t, before[key]) for key, t in fed.clients["dot"].tensors.items())
    fed.step(2, ["dot", "bob"])
    np.testing.assert_array_equal(replied(fed, "ann"), first)
    now = fed.state["weights"]
    assert torch.equal(now[[0, 2]], rows[[0, 2]])
    assert not now[1, [0, 2]].any()  # in round 2 nobody but bob and dot had a share
    assert not now[3, [0, 2]].any()
    torch.testing.assert_close(now.sum(1), torch.ones(4))


@pytest.mark.parametrize(("name", "options"), [("celora", {"similarity": "uniform"}), ("folklora", {})])
def test_one_core_for_all_reaches_newcomers_at_their_own_rank(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = federation(name, options, ranks=(2, 5, 3)).begin()
    messages = fed.step(1, ["ann", "cid"])  # the client of the largest rank is away
    weights = fed.state["weights"][0, [0, 2]].double().numpy()
    want = np.einsum("j,jlpq->lpq", weights, scaled_cores(messages, 5))
    for client, rank in zip(fed.clients, (2, 5, 3), strict=True):
        np.testing.assert_allclose(replied(fed, client), want[:, :rank, :rank], rtol=1e-5, atol=1e-6)
    fed.deliver()
    fed.step(2)  # and it can go on from there
    assert all(torch.isfinite(tensor).all() for tensor in fed.state.values())


def test_who_is_away_does_not_change_how_like_the_others_are(federation: Callable[..., Any]) -> None:
    """Zero rows count in the centring of CKA: padding goes to the rank of the federation, not of the round."""
    all_there = federation("celora", {"similarity": "model"}, ranks=(2, 2, 5)).begin()
    two = federation("celora", {"similarity": "model"}, ranks=(2, 2, 5)).begin()
    all_there.step(1)
    two.step(1, ["ann", "bob"])
    torch.testing.assert_close(two.state["similarity/model"][:2, :2], all_there.state["similarity/model"][:2, :2])


@pytest.mark.parametrize("missing", [["bob"], ["ann", "bob"], ["ann", "bob", "cid"]])
def test_without_its_sketch_a_client_is_like_itself_only(federation: Callable[..., Any], missing: list[str]) -> None:
    fed = federation("celora", {"similarity": "data", "temperature": 0.5}).begin(missing)
    s = fed.state["similarity/data"]
    for i, client in enumerate(fed.clients):
        if client in missing:
            assert torch.equal(s[i], torch.eye(3)[i])
            assert torch.equal(s[:, i], torch.eye(3)[i])
    there = [c.data for n, c in fed.clients.items() if n not in missing]
    seeds = [derive(0, "mixture", n) for n in fed.clients if n not in missing]
    fits = [ClassMixtures.fit(*d.train, components=3, seed=seed) for d, seed in zip(there, seeds, strict=True)]
    where = [i for i, n in enumerate(fed.clients) if n not in missing]
    np.testing.assert_allclose(s[where][:, where].numpy(), similarity(data_distances(fits)).numpy(), rtol=1e-4)
    fed.step(1)
    np.testing.assert_allclose(fed.state["weights"].numpy(), softmax(s.numpy() / 0.5), rtol=1e-5)


# -- sketches ----------------------------------------------------------------------------------------------------------


def test_without_components_mixtures_are_read_off_the_statistics(federation: Callable[..., Any]) -> None:
    fed = federation("celora", {"similarity": "data", "components": 0}).begin()
    own = [ClassStatistics.of(*client.data.train, 4) for client in fed.clients.values()]
    want = similarity(data_distances([ClassMixtures.from_statistics(s) for s in own]))
    np.testing.assert_allclose(fed.state["similarity/data"].numpy(), want.numpy(), rtol=1e-4)


def test_projected_mixtures(federation: Callable[..., Any]) -> None:
    fed = federation("celora", {"similarity": "data", "projection": 2}).begin()
    assert fed.sketches()["ann"].tensors["mixture/means"].shape[1] == 2
    matrix = projection(6, 2, 0)
    fits = []
    for name, client in fed.clients.items():
        features, labels = client.data.train
        fits.append(ClassMixtures.fit(features @ matrix.T, labels, components=3, seed=derive(0, "mixture", name)))
    np.testing.assert_allclose(
        fed.state["similarity/data"].numpy(), similarity(data_distances(fits)).numpy(), rtol=1e-4
    )
    whole = federation("celora", {"similarity": "data"}).begin()
    assert not torch.allclose(whole.state["similarity/data"], fed.state["similarity/data"], rtol=1e-3)


def test_a_private_sketch_takes_its_noise_from_the_clients_secret(federation: Callable[..., Any]) -> None:
    pytest.importorskip("dp_accounting")
    options = {"components": 0, "head": "sketched", "dp_epsilon": 8.0, "dp_clip": 4.0}
    many = (900, 700, 800)

    def sketch(seed: int, secret: int) -> dict[str, torch.Tensor]:
        fed = federation("celora", options, examples=many, seed=seed)
        fed.clients["ann"].secret = secret
        return fed.method.sketch(fed.clients["ann"]).tensors

    one = sketch(0, 1)
    assert all(torch.equal(one[name], tensor) for name, tensor in sketch(1, 1).items())
    assert not torch.equal(one["statistics/means"], sketch(0, 2)["statistics/means"])
    exact = federation("celora", {**options, "dp_epsilon": None}, examples=many).sketches()["ann"].tensors
    assert exact["statistics/counts"].dtype == torch.int32
    assert one["statistics/counts"].dtype == torch.float32
    noise = (one["statistics/counts"] - exact["statistics/counts"]).abs()
    assert bool((noise > 0).all())
    assert float(noise.max()) < 20


def test_a_federation_runs_on_private_sketches(federation: Callable[..., Any]) -> None:
    pytest.importorskip("dp_accounting")
    options = {"components": 0, "head": "sketched", "dp_epsilon": 8.0, "dp_clip": 6.0, "similarity": "both"}
    fed = federation("celora", options, examples=(900, 700, 800)).begin()
    s = fed.state["similarity/data"]
    assert torch.equal(s.diagonal(), torch.ones(3))
    assert bool(((s > 0) & (s <= 1)).all())
    features, labels = fed.clients["ann"].data.validation
    head = fed.clients["ann"].tensors
    right = (features @ head["head/weight"].T + head["head/bias"]).argmax(1) == labels
    assert float(right.float().mean()) > 0.6  # four classes far apart: the noisy head still tells them
    fed.step(1)
    # At this budget nothing survives, and the federation says so by an empty sketch instead of failing.
    starved = federation("celora", {**options, "dp_epsilon": 0.01}, examples=(30, 12, 18)).begin()
    starved.step(1)
    assert bool(torch.isfinite(starved.state["weights"]).all())


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("data", {"similarity/data", "similarity/mixed", "weights"}),
        ("model", {"similarity/model", "similarity/mixed", "weights"}),
        ("both", {"similarity/data", "similarity/model", "similarity/mixed", "weights"}),
        ("uniform", {"weights"}),
        ("size", {"weights"}),
    ],
)
def test_insight_is_over_all_clients_in_their_order(federation: Callable[..., Any], kind: str, shown: set[str]) -> None:
    fed = federation("celora", {"similarity": kind}, ranks=(3, 3, 3, 3)).begin()
    assert set(fed.method.insight(fed.state)) == shown & {"similarity/data"}
    fed.step(1, ["dot", "bob"])  # whatever the order of messages
    insight = fed.method.insight(fed.state)
    assert set(insight) == shown
    for name, matrix in insight.items():
        assert matrix.shape == (4, 4)
        if name.startswith("similarity/"):
            torch.testing.assert_close(matrix, matrix.T)
            torch.testing.assert_close(matrix.diagonal(), torch.ones(4))
        if name in {"similarity/model", "similarity/mixed"}:
            pairs = {(i, j) for i, j in matrix.nonzero().tolist() if i != j}
            assert pairs == {(1, 3), (3, 1)}
    if kind == "size":
        torch.testing.assert_close(insight["weights"][3], torch.tensor([0.0, 12, 0, 24]) / 36)


def test_folklora_is_celora_with_other_defaults(federation: Callable[..., Any], context: Callable[..., Any]) -> None:
    spelt = {"basis": "frozen", "similarity": "size", "components": 0, "head": "sketched", "head_start": "auto"}
    ours, theirs = federation("folklora").begin(), federation("celora", spelt).begin()
    for fed in (ours, theirs):
        fed.step(1)
        fed.deliver()
    for client in ours.clients:
        for key, tensor in ours.clients[client].tensors.items():
            assert torch.equal(tensor, theirs.clients[client].tensors[key])
    assert (
        build("folklora", {}, context()).options.model_dump() == build("celora", spelt, context()).options.model_dump()
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "class mixtures"),
        ({"components": 0}, "class statistics"),
        ({"head": "sketched"}, "class statistics and class mixtures"),
        ({"head": "sketched", "similarity": "size"}, "class statistics"),
        ({"similarity": "model"}, None),
        ({"lambda": 0.0}, None),
    ],
    ids=str,
)
def test_what_is_sent_once_is_called_by_its_name(
    federation: Callable[..., Any], options: dict[str, Any], said: str | None
) -> None:
    fed = federation("celora", options)
    assert fed.method.once == said
    sent = {name.partition("/")[0] for message in fed.sketches().values() for name in message.tensors}
    assert sent == {"class statistics": {"statistics"}, "class mixtures": {"mixture"}, None: set()}.get(
        said, {"statistics", "mixture"}
    )
