"""Private release: the sensitivity bound by brute force, the noise against its calibration, the limit without noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.data import release
from folklora.data.release import (
    SENSITIVITY,
    VARIANCE_FLOOR,
    noise_multiplier,
    query,
    release_mixtures,
    release_statistics,
)
from folklora.data.statistics import ClassStatistics
from folklora.errors import MethodError
from folklora.randomness import secret_generator

NO_NOISE = 1e9  # an epsilon


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny releases: on a busy machine, threads would spend the time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def secret(seed: int) -> np.random.Generator:
    return secret_generator(seed, "release")


def examples(n: int, d: int, classes: int, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator), torch.randint(0, classes, (n,), generator=generator)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 6),
    classes=st.integers(1, 4),
    seed=st.integers(0, 9999),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    clip=st.sampled_from([0.5, 1.0, 7.0]),
    diagonal=st.booleans(),
)
def test_no_example_moves_the_query_by_more_than_the_bound(
    n: int, d: int, classes: int, seed: int, scale: float, clip: float, diagonal: bool
) -> None:
    features, labels = examples(n, d, classes, seed, scale)
    whole = torch.cat([block.flatten() for block in query(features, labels, classes, clip, diagonal)])
    for i in range(n):
        rest = torch.arange(n) != i
        blocks = query(features[rest], labels[rest], classes, clip, diagonal)
        assert (whole - torch.cat([b.flatten() for b in blocks])).norm() <= SENSITIVITY * (1 + 1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_bound_is_reached(diagonal: bool) -> None:
    example = torch.tensor([[30.0, 0.0, 0.0]])
    blocks = query(example, torch.tensor([1]), 2, 2.0, diagonal)
    assert math.isclose(float(torch.cat([b.flatten() for b in blocks]).norm()), SENSITIVITY)


def test_triangle_keeps_the_frobenius_norm() -> None:
    features, labels = examples(1, 5, 1, 0, 0.1)
    norm = float(query(features, labels, 1, 1.0, False)[2].norm())
    assert math.isclose(norm, float(features.double().norm()) ** 2, rel_tol=1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (1.0, 1e-6), (8.0, 1e-3)])
def test_calibration_meets_the_analytic_condition_tightly(epsilon: float, delta: float) -> None:
    """Balle and Wang, theorem 8, written out: delta(sigma) = Phi(1/2s - es) - e^eps Phi(-1/2s - es)."""

    def phi(t: float) -> float:
        return 0.5 * math.erfc(-t / math.sqrt(2))

    def reached(s: float) -> float:
        return phi(0.5 / s - epsilon * s) - math.exp(epsilon) * phi(-0.5 / s - epsilon * s)

    sigma = noise_multiplier(epsilon, delta)
    assert math.isclose(reached(sigma), delta, rel_tol=1e-6)
    assert reached(0.99 * sigma) > delta


def test_noise_has_the_calibrated_deviation_in_every_block() -> None:
    """No noise hides: counts, sums and second moments rebuilt from many releases spread as they should."""
    n, d, clip, epsilon, delta = 1000, 3, 2.0, 2.0, 1e-5
    features, labels = examples(n, d, 2, 0, 0.4)
    exact = ClassStatistics.of(features, labels, 2)
    expected = SENSITIVITY * noise_multiplier(epsilon, delta)
    counts, sums, moments = [], [], []
    for seed in range(400):
        got = release_statistics(features, labels, 2, clip, epsilon, delta, secret(seed))
        counts.append(got.counts - exact.counts)
        noisy, clean = (s.counts.unsqueeze(1) * s.means for s in (got, exact))
        sums.append((noisy - clean) / clip)
        # Scatter times n is the noisy moments less n_c mu_c mu_c', up to terms far below the noise at this n.
        moments.append((got.counts.sum() * got.scatter - n * exact.scatter) / clip**2 + centre(got, clip, exact))
    off = torch.stack(moments)[:, 0, 1]
    on = torch.stack(moments).diagonal(dim1=1, dim2=2)
    for draws, want in (
        (torch.stack(counts), expected),
        (torch.stack(sums), expected),
        (on, expected),
        (off, expected / math.sqrt(2)),
    ):
        assert abs(float(draws.std()) / want - 1) < 0.1
        assert abs(float(draws.mean())) < 4 * want / draws.numel() ** 0.5


def centre(got: ClassStatistics, clip: float, exact: ClassStatistics) -> torch.Tensor:
    """What noisy means took out of the scatter beside what exact means would have, in the query's units."""
    outer = [(s.counts.unsqueeze(1) * s.means).T @ s.means / clip**2 for s in (got, exact)]
    return outer[0] - outer[1]


def test_without_noise_the_release_is_exact() -> None:
    features, labels = examples(200, 4, 3, 1)
    clip = float(features.norm(dim=1).max()) * 1.01
    exact = ClassStatistics.of(features, labels, 5)
    got = release_statistics(features, labels, 5, clip, NO_NOISE, 1e-5, secret(0))
    for name in ("counts", "means", "scatter"):
        torch.testing.assert_close(getattr(got, name), getattr(exact, name), rtol=1e-3, atol=1e-3)
    mixtures = release_mixtures(features, labels, 5, clip, NO_NOISE, 1e-5, secret(0))
    assert mixtures.classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(mixtures.means[:, 0], exact.means[:3], rtol=1e-3, atol=1e-3)
    pooled = exact.scatter.diagonal().expand(3, -1)
    torch.testing.assert_close(mixtures.variances[:, 0], pooled, rtol=1e-2, atol=0)


def test_features_are_clipped_to_the_ball() -> None:
    features, labels = examples(50, 4, 1, 2, 10.0)
    got = release_statistics(features, labels, 1, 1.5, NO_NOISE, 1e-5, secret(0))
    clipped = ClassStatistics.of(1.5 * torch.nn.functional.normalize(features, dim=1), labels, 1)
    torch.testing.assert_close(got.means, clipped.means, rtol=0, atol=1e-3)


def test_released_scatter_is_unbiased_by_noise_in_the_means() -> None:
    """Without its correction, n_c |noisy mean|^2 would take more from the scatter than the classes hold."""
    n, d, classes, epsilon, delta = 300, 8, 30, 20.0, 1e-3
    features, labels = examples(n, d, classes, 3, 0.1)[0], torch.arange(n) % classes
    exact = ClassStatistics.of(features, labels, classes).scatter.trace()
    traces = [
        release._release(features, labels, classes, 1.0, epsilon, delta, secret(s), diagonal=True).scatter.trace()
        for s in range(200)
    ]
    draws = torch.stack(traces)
    error = float(draws.std()) / len(draws) ** 0.5
    deviation = SENSITIVITY * noise_multiplier(epsilon, delta)
    bias = d * deviation**2 * float((1 / torch.bincount(labels)).sum()) / n
    assert bias > 8 * error, "the test could not see a missing correction"
    assert abs(float(draws.mean() - exact)) < 4 * error + 0.1 * bias


def test_absent_classes_hardly_ever_appear_and_present_ones_stay() -> None:
    features, labels = examples(300, 2, 2, 4)
    kept = torch.zeros(40)
    for seed in range(100):
        kept += release_statistics(features, labels, 40, 1.0, 1.0, 1e-5, secret(seed)).counts > 0
    assert kept[:2].tolist() == [100, 100]
    assert kept[2:].sum() / 3800 < 0.004  # one-sided 3 sd: 0.00135


def test_heavy_noise_still_gives_usable_numbers() -> None:
    features, labels = examples(30, 6, 2, 5)
    for seed in range(20):
        got = release_statistics(features, labels, 2, 1.0, 0.5, 1e-5, secret(seed))
        assert torch.linalg.eigvalsh(got.scatter).min() > -1e-9
        assert got.means.norm(dim=1).max() <= 1 + 1e-9
        mixtures = release_mixtures(features, labels, 2, 1.0, 0.5, 1e-5, secret(seed))
        assert (mixtures.variances >= VARIANCE_FLOOR / 6).all()


def test_noisy_means_stay_in_the_ball() -> None:
    features, labels = torch.nn.functional.normalize(examples(60, 160, 1, 8)[0] + 9, dim=1), torch.zeros(60).long()
    for seed in range(10):
        got = release_statistics(features, labels, 1, 1.0, 1.0, 1e-5, secret(seed))
        assert math.isclose(float(got.means.norm()), 1.0)  # at this noise every one of them would fall outside


def test_same_secret_same_release() -> None:
    features, labels = examples(30, 3, 2, 6)
    draws = [release_statistics(features, labels, 2, 1.0, 4.0, 1e-5, secret(s)).scatter for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("epsilon", "delta", "clip"), [(0, 1e-5, 1), (1, 0, 1), (1, 1, 1), (math.inf, 0.1, 1), (1, 0.1, 0)]
)
def test_impossible_guarantees_are_refused(epsilon: float, delta: float, clip: float) -> None:
    features, labels = examples(5, 3, 2, 7)
    with pytest.raises(MethodError):
        release_statistics(features, labels, 2, clip, epsilon, delta, secret(0))


def test_missing_accountant_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MethodError, match=r"folklora\[privacy\]"):
        noise_multiplier(1.0, 1e-5)
