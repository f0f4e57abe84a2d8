"""Class mixtures: what is fitted, what travels, what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.data.mixtures import ClassMixtures, projection
from folklora.data.statistics import ClassStatistics
from folklora.errors import MessageError

FIELDS = ("classes", "counts", "weights", "means", "variances")


def three_bumps(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0]])
    scales = torch.tensor([[0.5, 1.0], [1.0, 0.5], [0.2, 0.2]])
    which = torch.arange(n) % 3
    return centres[which] + scales[which] * torch.randn(n, 2, generator=generator)


def fitted(sizes: dict[int, int], d: int = 3, seed: int = 0, components: int = 3) -> ClassMixtures:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in sizes.items()])
    features = torch.randn(len(labels), d, generator=generator) + labels.unsqueeze(1)
    return ClassMixtures.fit(features, labels, components=components, seed=seed)


def test_fit_recovers_separate_bumps() -> None:
    got = ClassMixtures.fit(three_bumps(900), torch.full((900,), 4))
    assert got.classes.tolist() == [4]
    assert got.counts.tolist() == [900]
    order = got.means[0].sum(1).argsort()
    torch.testing.assert_close(got.weights[0], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0.01, atol=0)
    want = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0]], dtype=torch.float64)
    torch.testing.assert_close(got.means[0, order], want, rtol=0, atol=0.2)
    scales = torch.tensor([[0.5, 1.0], [1.0, 0.5], [0.2, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(got.variances[0, order].sqrt(), scales, rtol=0.15, atol=0)


def test_small_classes_get_fewer_components_and_singles_are_skipped() -> None:
    got = fitted({0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 7: 30})
    assert got.classes.tolist() == [1, 2, 3, 4, 5, 7]
    assert (got.weights > 0).sum(1).tolist() == [1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(got.weights.sum(1), torch.ones(6, dtype=torch.float64))
    assert (got.variances[got.weights > 0] >= 1e-5).all()


@pytest.mark.parametrize("components", [1, 3, 4])
def test_a_blank_one_is_as_large_as_a_fitted_one(components: int) -> None:
    sizes = {0: 1, 1: 2, 2: 3, 4: 5, 5: 8, 7: 30}
    counts = torch.tensor([sizes.get(label, 0) for label in range(9)])
    want = fitted(sizes, components=components).to_tensors()
    got = ClassMixtures.blank(counts, components, 3).to_tensors()
    assert {n: (t.shape, t.dtype) for n, t in got.items()} == {n: (t.shape, t.dtype) for n, t in want.items()}
    assert all(torch.equal(got[name], want[name]) for name in ("classes", "counts", "components"))


def test_a_class_does_not_depend_on_the_others() -> None:
    cloud = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))  # no bumps: the start decides
    labels, others = torch.full((40,), 5), torch.full((50,), 2)
    alone = [ClassMixtures.fit(cloud, labels, seed=seed).means[0] for seed in (3, 4)]
    both = ClassMixtures.fit(torch.cat([three_bumps(50), cloud]), torch.cat([others, labels]), seed=3)
    assert torch.equal(both.means[1], alone[0])
    assert not torch.allclose(alone[1], alone[0])


def test_repeated_examples_and_a_short_budget_stay_silent_and_finite() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ClassMixtures.fit(torch.ones(9, 2), torch.zeros(9, dtype=torch.long))
        ClassMixtures.fit(three_bumps(90, 5) / 50, torch.zeros(90, dtype=torch.long), max_iter=1)
    assert all(getattr(got, name).isfinite().all() for name in FIELDS)


@pytest.mark.parametrize("sizes", [{}, {0: 1, 2: 1}])
def test_a_client_without_a_usable_class_has_an_empty_sketch(sizes: dict[int, int]) -> None:
    labels = torch.tensor(list(sizes), dtype=torch.long)
    got = ClassMixtures.fit(torch.randn(len(labels), 3), labels)
    assert len(got.classes) == 0
    back = ClassMixtures.from_tensors(got.to_tensors(), 5, 3)
    assert back.means.shape[0] == 0
    assert back.means.shape[2] == 3


def test_from_statistics_is_one_gaussian_with_the_pooled_variances() -> None:
    features, labels = three_bumps(31), torch.arange(31) // 15 * 2  # class 4 has one example
    statistics = ClassStatistics.of(features, labels, 6)
    got = ClassMixtures.from_statistics(statistics)
    assert got.classes.tolist() == [0, 2, 4]
    assert got.counts.tolist() == [15, 15, 1]
    torch.testing.assert_close(got.means[2, 0], features[30].double())
    pooled = torch.cat([features[:15] - features[:15].mean(0), features[15:30] - features[15:30].mean(0)])
    torch.testing.assert_close(got.variances[1, 0], pooled.double().square().sum(0) / 31, rtol=1e-5, atol=0)


@settings(max_examples=15, deadline=None)
@given(sizes=st.dictionaries(st.integers(0, 9), st.integers(1, 12), max_size=4), components=st.integers(1, 4))
def test_message_comes_back(sizes: dict[int, int], components: int) -> None:
    sketch = fitted(sizes or {0: 1}, components=components)
    message = sketch.to_tensors()
    total = sum(min(components, n // 2) for n in (sizes or {0: 1}).values() if n > 1)
    assert message["means"].shape == message["variances"].shape == (total, 3)
    back = ClassMixtures.from_tensors(message, 10, 3, components)
    assert torch.equal(back.classes, sketch.classes)
    assert torch.equal(back.counts, sketch.counts)
    g = back.weights.shape[1]
    for name in ("weights", "means", "variances"):
        torch.testing.assert_close(getattr(back, name), getattr(sketch, name)[:, :g], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back.weights.sum(1), torch.ones(len(back.classes), dtype=torch.float64))


def test_masses_are_exact_after_half_precision() -> None:
    message = fitted({1: 16, 3: 9}).to_tensors()
    message["weights"] = torch.full((6,), 1 / 3).half()
    assert (message["weights"].double()[:3].sum() - 1).abs() > 1e-6
    back = ClassMixtures.from_tensors(message, 4, 3)
    torch.testing.assert_close(back.weights.sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_class_with_a_count_below_zero_is_dropped() -> None:
    message = fitted({1: 6, 3: 9}).to_tensors()
    message["counts"] = torch.tensor([-0.5, 8.7])
    assert ClassMixtures.from_tensors(message, 4, 3).classes.tolist() == [3]


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("classes", torch.tensor([1, 4]), "outside"),
        ("classes", torch.tensor([3, 1]), "twice or out of order"),
        ("components", torch.tensor([3, 0]), "components"),
        ("components", torch.tensor([1, 4]), "components"),
        ("components", torch.tensor([3, 2]), "shape"),
        ("weights", torch.tensor([0.5, 0.5, 0.5, 0.3, 0.3, 0.4]), "sum to 1"),
        ("weights", torch.tensor([1.5, -0.5, 0.0, 0.3, 0.3, 0.4]), "positive"),
        ("variances", -torch.ones(6, 3), "negative variance"),
        ("variances", torch.ones(6, 4), "shape"),
        ("means", torch.full((6, 3), float("nan")), "NaN"),
        ("extra", torch.zeros(1), "unknown"),
    ],
)
def test_from_tensors_refuses(name: str, value: torch.Tensor, complaint: str) -> None:
    message = fitted({1: 6, 3: 9}).to_tensors()
    message[name] = value
    with pytest.raises(MessageError, match=complaint):
        ClassMixtures.from_tensors(message, 4, 3)


def test_projection_is_shared_orthonormal_and_seeded() -> None:
    rows = projection(20, 6, seed=1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(6), rtol=0, atol=1e-6)
    assert torch.equal(rows, projection(20, 6, seed=1))
    assert not torch.equal(rows, projection(20, 6, seed=2))
    with pytest.raises(ValueError, match="project"):
        projection(4, 5, seed=0)


def test_projection_is_uniform_over_frames() -> None:
    """Haar measure: entries of the first row average to zero over seeds (a sign convention of QR would not)."""
    first = torch.stack([projection(3, 2, seed)[0] for seed in range(300)])
    assert first.mean(0).abs().max() < 4 / (3 * 300) ** 0.5
    assert (first.square().mean(0) - 1 / 3).abs().max() < 0.07
