"""Mixing in blocks against the dense formula in float64, and CE-LoRA beyond the clients whose matrix is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.data.mixtures import ClassMixtures
from folklora.methods import data_similarity
from folklora.methods.cka import gram_rows, linear_cka
from folklora.methods.embedding import LinearTransport, typical_distance
from folklora.methods.mixing import Embedded, Mixing, blocks
from folklora.randomness import derive, torch_generator

ALPHA = 6.0  # of the federation in conftest


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka(cores: np.ndarray) -> np.ndarray:
    """Textbook linear CKA with centring matrices, averaged over layers, in loops."""
    n, layers, r, _ = cores.shape
    h = np.eye(r) - 1 / r
    out = np.zeros((n, n))
    for i, j, layer in np.ndindex(n, n, layers):
        k, m = (h @ cores[index, layer] @ cores[index, layer].T @ h for index in (i, j))
        out[i, j] += (k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m) / layers
    return out


def dense(s: np.ndarray, temperature: float, values: np.ndarray) -> np.ndarray:
    powers = np.exp((s - s.max(1, keepdims=True)) / temperature)
    return powers / powers.sum(1, keepdims=True) @ values


def euclid(points: np.ndarray, placed: np.ndarray, scale: float) -> np.ndarray:
    """exp(-distance / scale) in loops; whoever is not placed is like itself only."""
    n = len(points)
    out = np.eye(n)
    for i, j in np.ndindex(n, n):
        if i != j and placed[i] and placed[j]:
            out[i, j] = math.exp(-np.linalg.norm(points[i] - points[j]) / scale) if scale else 1.0
    return out


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 24),
    block=st.integers(1, 30),
    r=st.integers(2, 5),
    layers=st.integers(1, 3),
    kind=st.sampled_from(["matrix", "points", "points, some missing", "one point", "model"]),
    lam=st.sampled_from([0.2, 0.5, 1.0]),
    temperature=st.sampled_from([1e-6, 0.02, 0.5, 100.0]),
    seed=st.integers(0, 999),
)
def test_blocks_give_the_dense_mix(
    n: int, block: int, r: int, layers: int, kind: str, lam: float, temperature: float, seed: int
) -> None:
    cores, points = random(n, layers, r, r, seed=seed), random(n, 3, seed=seed + 1)
    placed = torch.ones(n, dtype=torch.bool)
    if kind == "points, some missing":
        placed[::2] = False
    scale = 0.0 if kind == "one point" else 1.7
    s_data = euclid(points.numpy(), placed.numpy(), scale)
    lam = 0.0 if kind == "model" else lam
    data = {"matrix": torch.from_numpy(s_data), "model": None}.get(kind, Embedded(points, placed, scale))
    model = None if lam == 1 else gram_rows(cores)
    s = lam * s_data + ((1 - lam) * cka(cores.numpy()) if lam < 1 else 0)
    mixing = Mixing(temperature, lam, data, model, layers)
    values = cores.flatten(1)
    # At 1e-6 rounding of S by 1e-16 counts 1e-10.
    close = {"rtol": 1e-7, "atol": 1e-8}
    np.testing.assert_allclose(mixing.mix(values, block).numpy(), dense(s, temperature, values.numpy()), **close)
    np.testing.assert_allclose(mixing.similarity(mixing.everybody, mixing.everybody).numpy(), s, rtol=1e-9, atol=1e-12)
    for rows in blocks(n, block):
        np.testing.assert_allclose(
            mixing.weights(rows).numpy() @ values.numpy(), dense(s, temperature, values.numpy())[rows], **close
        )


def test_a_block_is_that_part_of_the_whole_wherever_it_lies() -> None:
    cores = random(9, 2, 4, 4)
    for data in (torch.from_numpy(euclid(random(9, 3).numpy(), np.ones(9), 1.0)), None):
        mixing = Mixing(0.5, 0.5 if data is not None else 0.0, data, gram_rows(cores), 2)
        whole = mixing.similarity(mixing.everybody, mixing.everybody)
        assert torch.equal(whole.diagonal(), torch.ones(9, dtype=torch.float64))
        for a, b, c, d in np.ndindex(9, 9, 9, 9):
            if a < b and c < d and (a + b + c + d) % 5 == 0:
                part = mixing.similarity(slice(a, b), slice(c, d))
                torch.testing.assert_close(part, whole[a:b, c:d], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole, linear_cka(cores), rtol=1e-12, atol=1e-14)


def test_the_exact_matrix_is_left_as_it_was() -> None:
    matrix = torch.full((4, 4), 0.5, dtype=torch.float64).fill_diagonal_(0.9)
    kept = matrix.clone()
    Mixing(0.5, 1.0, matrix, None, 2).mix(random(4, 8), block=3)
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize(("temperature", "bound"), [(0.5, 1e-6), (0.05, 3e-6)])
def test_float32_is_float64_but_for_rounding(temperature: float, bound: float) -> None:
    n = 300
    cores = random(6, 3, 8, 8)[torch.arange(n) % 6] + 0.5 * random(n, 3, 8, 8, seed=1)
    points = random(6, 20, seed=2)[torch.arange(n) % 6] + 0.5 * random(n, 20, seed=3)
    placed = torch.ones(n, dtype=torch.bool)

    def mix(dtype: torch.dtype, products: torch.dtype | None = None) -> torch.Tensor:
        rows = gram_rows(cores.to(dtype), dtype)
        assert rows.dtype == dtype
        mixing = Mixing(temperature, 0.5, Embedded(points.to(dtype), placed, 7.0), rows, 3)
        return mixing.mix(cores.flatten(1).to(dtype), 64, products).double()

    want = mix(torch.float64)
    spread = (want - want.mean(0)).norm()
    assert float((mix(torch.float32) - want).norm() / spread) < bound
    coarse = float((mix(torch.float32, torch.bfloat16) - want).norm() / spread)
    assert bound < coarse < 1e-2  # 8 bits


def test_a_lone_client_keeps_every_bit_at_any_precision() -> None:
    values = random(3, 12).float()
    mixing = Mixing(1e-3, 1.0, torch.eye(3), None, 1)
    torch.testing.assert_close(mixing.mix(values, 2, torch.bfloat16), values, rtol=1e-6, atol=1e-6)


def test_blocks_cover_once() -> None:
    assert [(b.start, b.stop) for b in blocks(7, 3, 3)] == [(3, 6), (6, 7)]
    assert list(blocks(0, 5)) == []


# -- CE-LoRA beyond the clients whose matrix is kept -------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients are many."""
    monkeypatch.setattr(data_similarity, "WHOLE", 2)


def cores_of(messages: dict[str, Any], most: int) -> np.ndarray:
    out = np.zeros((len(messages), 2, most, most))
    for k, message in enumerate(messages.values()):
        for layer, site in enumerate(("layer.0.query", "layer.1.value")):
            core = message.tensors[f"C/{site}"].double().numpy()
            out[k, layer, : len(core), : len(core)] = ALPHA / len(core) * core
    return out


def replied(fed: Any, client: str) -> np.ndarray:
    tensors = fed.method.reply(fed.state, client).tensors
    return np.stack([ALPHA / len(t) * t.double().numpy() for name, t in tensors.items() if name.startswith("C/")])


@pytest.mark.parametrize("kind", ["data", "model", "both"])
def test_many_clients_are_mixed_by_their_points(federation: Callable[..., Any], few: None, kind: str) -> None:
    ranks = (2, 5, 3, 4, 3)
    fed = federation("celora", {"similarity": kind, "temperature": 0.2}, ranks=ranks).begin(["cid"])
    fits = {
        name: ClassMixtures.fit(*client.data.train, components=3, seed=derive(0, "mixture", name))
        for name, client in fed.clients.items()
        if name != "cid"
    }
    # As they are read from a message: float32.
    fits = {name: ClassMixtures.from_tensors(fit.to_tensors(), 4, 6, 3) for name, fit in fits.items()}
    order = torch.randperm(4, generator=torch_generator(0, "embedding/sample"))
    sample = [list(fits.values())[i] for i in order]
    points = np.zeros((5, 3))
    there = np.array([True, True, False, True, True])
    fitted = LinearTransport.fit(sample, 0)(list(fits.values())).numpy()
    points = np.zeros((5, fitted.shape[1]))
    points[there] = fitted
    s_data = euclid(points, there, typical_distance(torch.from_numpy(fitted), 0))
    for round, who in ((1, list(fed.clients)), (2, ["ann", "cid", "eve"])):
        messages = fed.step(round, who)
        where = [list(fed.clients).index(client) for client in who]
        scaled = cores_of(messages, 5)
        lam = {"data": 1.0, "model": 0.0, "both": 0.5}[kind]
        s = lam * s_data[np.ix_(where, where)] + (1 - lam) * cka(scaled)
        want = dense(s, 0.2, scaled.reshape(len(who), -1)).reshape(scaled.shape)
        for i, client in enumerate(who):
            rank = fed.clients[client].rank
            np.testing.assert_allclose(replied(fed, client), want[i, :, :rank, :rank], rtol=1e-4, atol=1e-4)
        assert fed.method.mixing(fed.state, messages) is None
        fed.deliver()


def test_nothing_of_size_n_by_n_is_kept(federation: Callable[..., Any], few: None) -> None:
    fed = federation("celora", {"projection": 2}, ranks=(3,) * 5).begin()
    fed.step(1)
    assert fed.method.insight(fed.state) == {}
    embedded = {"similarity/points", "similarity/placed", "similarity/scale"}
    assert set(fed.state) == {*embedded, "mixed/C", "mixed/known"}
    assert fed.state["mixed/C"].dtype == torch.float32


def test_a_small_round_of_many_clients_knows_its_weights(federation: Callable[..., Any], few: None) -> None:
    fed = federation("celora", {"basis": "frozen"}, ranks=(3,) * 5).begin()
    fed.step(1)
    absent = replied(fed, "bob")
    messages = fed.step(2, ["ann", "dot"])
    weights = fed.method.mixing(fed.state, messages).numpy()
    np.testing.assert_allclose(weights.sum(1), 1.0)
    scaled = cores_of(messages, 3)
    for i, client in enumerate(messages):
        want = np.einsum("j,jlpq->lpq", weights[i], scaled)
        np.testing.assert_allclose(replied(fed, client), want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(replied(fed, client), replied(fed, client))
    np.testing.assert_array_equal(replied(fed, "bob"), absent)


@pytest.mark.parametrize("missing", [["ann", "bob", "cid", "dot"], ["ann", "bob", "cid", "dot", "eve"]])
def test_many_clients_without_sketches_keep_to_themselves(
    federation: Callable[..., Any], few: None, missing: list[str]
) -> None:
    fed = federation("celora", {"similarity": "data", "temperature": 0.01}, ranks=(3,) * 5).begin(missing)
    messages = fed.step(1)
    scaled = cores_of(messages, 3)
    for i, client in enumerate(messages):
        np.testing.assert_allclose(replied(fed, client), scaled[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"basis": "aligned"}, {"similarity": "size"}, {"similarity": "uniform", "basis": "aligned"}]
)
def test_other_mixes_of_many_clients_are_those_of_few(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    whole = federation("celora", {**options, "lambda": 0.0}, ranks=(3,) * 5).begin()
    whole.step(1)
    monkeypatch.setattr(data_similarity, "WHOLE", 2)
    many = federation("celora", {**options, "lambda": 0.0}, ranks=(3,) * 5).begin()
    many.step(1)
    for client in whole.clients:
        np.testing.assert_allclose(replied(many, client), replied(whole, client), rtol=1e-4, atol=1e-5)
