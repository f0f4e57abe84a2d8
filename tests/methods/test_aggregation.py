"""The weighted mean and the aggregation error against NumPy and dense products in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folklora.adapters.lowrank import LowRank, Site, Tensors
from folklora.methods.aggregation import aggregation_error, weighted_mean


def random_factors(adapter: LowRank, rank: int, rng: np.random.Generator) -> Tensors:
    return {name: torch.from_numpy(rng.normal(size=shape)).float() for name, shape in adapter.shapes(rank).items()}


def dense(adapter: LowRank, tensors: Tensors, site: Site) -> np.ndarray:
    a, b = (tensors[f"{factor}/{site.name}"].double().numpy() for factor in "AB")
    middle = tensors[f"C/{site.name}"].double().numpy() if adapter.core else np.eye(len(a))
    return adapter.alpha / len(a) * (b @ middle @ a)


def brute_force(adapter: LowRank, trained: list[Tensors], received: list[Tensors], weights: Tensor) -> float:
    """The definition, with every d_out x d_in product built, client by client and layer by layer."""
    ratios = []
    for site in adapter.sites:
        updates = [dense(adapter, tensors, site) for tensors in trained]
        for i, tensors in enumerate(received):
            target = sum(float(w) * update for w, update in zip(weights[i], updates, strict=True))
            ratios.append(np.linalg.norm(dense(adapter, tensors, site) - target) / np.linalg.norm(target))
    return float(np.mean(ratios))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weighted_mean_is_numpys(count: int) -> None:
    rng = np.random.default_rng(count)
    shapes = {"A/x": (3, 4), "head/bias": (5,), "scalar": ()}
    arrays = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(count)]
    weights = rng.dirichlet(np.ones(count))
    messages = [{name: torch.tensor(array) for name, array in one.items()} for one in arrays]
    mean = weighted_mean(messages, torch.from_numpy(weights))
    assert list(mean) == list(shapes)
    for name, got in mean.items():
        want = np.average([one[name].astype(np.float64) for one in arrays], axis=0, weights=weights)
        assert got.dtype == torch.float32
        assert got.shape == shapes[name]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-7)


def test_weighted_mean_accumulates_in_float64() -> None:
    messages = [{"B/x": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]
    assert weighted_mean(messages, torch.full((3,), 1 / 3, dtype=torch.float64))["B/x"].item() == pytest.approx(1 / 3)


def test_the_mean_of_nothing_is_nothing() -> None:
    assert weighted_mean([], torch.zeros(0)) == {}


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=3),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    core=st.booleans(),
    common=st.booleans(),
    seed=st.integers(0, 999),
)
def test_error_is_the_dense_one(
    shapes: list[tuple[int, int]], ranks: list[int], core: bool, common: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    adapter = LowRank(tuple(Site(f"s{i}", *shape) for i, shape in enumerate(shapes)), core, alpha=3.0)
    trained = [random_factors(adapter, rank, rng) for rank in ranks]
    count = len(ranks)
    weights = torch.from_numpy(rng.dirichlet(np.ones(count), size=count))
    received = [random_factors(adapter, rank, rng) for rank in ranks]
    if common:
        weights, received = weights[:1].expand(count, -1), [received[0]] * count
    want = brute_force(adapter, trained, received, weights)
    assert aggregation_error(adapter, trained, received, weights) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("core", [False, True])
def test_the_same_reply_for_all_but_personal_weights_is_judged_client_by_client(core: bool) -> None:
    rng = np.random.default_rng(0)
    adapter = LowRank((Site("s", 6, 5),), core, alpha=2.0)
    trained = [random_factors(adapter, 2, rng) for _ in range(3)]
    received, weights = [trained[0]] * 3, torch.eye(3)
    want = brute_force(adapter, trained, received, weights)
    assert want > 0.1  # the first client alone, whose weights it is, would say 0
    assert aggregation_error(adapter, trained, received, weights) == pytest.approx(want, rel=1e-9)


def test_error_ignores_what_is_no_factor() -> None:
    rng = np.random.default_rng(0)
    adapter = LowRank((Site("s", 6, 5),), False, alpha=2.0)
    trained = [random_factors(adapter, 2, rng) for _ in range(3)]
    received = [random_factors(adapter, 2, rng)] * 3
    weights = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    heads = [{**tensors, "head/bias": torch.randn(2)} for tensors in received]
    assert aggregation_error(adapter, trained, heads, weights) == aggregation_error(adapter, trained, received, weights)


@pytest.mark.parametrize("core", [False, True])
def test_exact_aggregation_shows_zero(core: bool) -> None:
    rng = np.random.default_rng(1)
    adapter = LowRank((Site("s", 30, 20), Site("t", 7, 9)), core, alpha=4.0)
    common = random_factors(adapter, 3, rng)
    part = "C" if core else "B"
    own = [{n: torch.from_numpy(rng.normal(size=t.shape)) for n, t in common.items() if n[0] == part} for _ in range(4)]
    p = torch.from_numpy(rng.dirichlet(np.ones(4)))
    mean = {n: sum(w * o[n] for w, o in zip(p, own, strict=True)) for n in own[0]}
    trained = [{**common, **o} for o in own]
    error = aggregation_error(adapter, trained, [{**common, **mean}] * 4, p.expand(4, -1))  # type: ignore[dict-item]
    assert error < 1e-14


def test_fedits_error_is_the_covariance_of_its_factors() -> None:
    """sum p B A - (sum p B)(sum p A) = sum p (B - mean B)(A - mean A): the closed form of what FedIT loses."""
    rng = np.random.default_rng(2)
    adapter = LowRank((Site("s", 11, 8),), False, alpha=1.0)
    a, b, p = rng.normal(size=(4, 2, 11)), rng.normal(size=(4, 8, 2)), rng.dirichlet(np.ones(4))
    trained = [{"A/s": torch.from_numpy(x), "B/s": torch.from_numpy(y)} for x, y in zip(a, b, strict=True)]
    mean_a, mean_b = np.einsum("k,kij->ij", p, a), np.einsum("k,kij->ij", p, b)
    received = [{"A/s": torch.from_numpy(mean_a), "B/s": torch.from_numpy(mean_b)}] * 4
    target = np.einsum("k,kir,krj->ij", p, b, a)
    lost = np.einsum("k,kir,krj->ij", p, b - mean_b, a - mean_a)
    want = np.linalg.norm(lost) / np.linalg.norm(target)
    got = aggregation_error(adapter, trained, received, torch.from_numpy(p).expand(4, -1))
    assert got == pytest.approx(want, rel=1e-12)
    assert got > 0.1


def test_zero_targets() -> None:
    adapter = LowRank((Site("s", 6, 5),), False, alpha=2.0)
    rng = np.random.default_rng(3)
    start = {**random_factors(adapter, 2, rng), "B/s": torch.zeros(5, 2)}
    moved = random_factors(adapter, 2, rng)
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    assert aggregation_error(adapter, [start] * 2, [start] * 2, half) == 0.0
    assert aggregation_error(adapter, [start] * 2, [moved] * 2, half) == 1.0
    # Updates that cancel leave rounding, and rounding is no target.
    p = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    trained = [{**moved, "B/s": -2 * moved["B/s"]}, moved]
    received = [{**moved, **weighted_mean([{"B/s": t["B/s"]} for t in trained], p)}] * 2
    assert aggregation_error(adapter, trained, received, p.expand(2, -1)) == 0.0
    assert aggregation_error(adapter, trained, [moved] * 2, p.expand(2, -1)) == 1.0
    assert aggregation_error(adapter, [], [], torch.zeros(0, 0)) == 0.0
