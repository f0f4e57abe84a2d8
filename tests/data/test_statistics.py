"""Class statistics: exact merging, and a message that survives the wire and refuses nonsense."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.data.statistics import ClassStatistics
from folklora.errors import MessageError


def examples(n: int, d: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = 5 * torch.randn(classes, d, generator=generator)
    return centres[labels] + torch.randn(n, d, generator=generator), labels


def equal(left: ClassStatistics, right: ClassStatistics, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(left.counts, right.counts)
    torch.testing.assert_close(left.means, right.means, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(left.scatter, right.scatter, rtol=tolerance, atol=tolerance)


def test_of_matches_the_definition_example_by_example() -> None:
    features, labels = examples(30, 4, 5, 0)
    labels[labels == 2] = 0  # class 2 is absent
    x, y = features.double().numpy(), labels.numpy()
    means = np.stack([x[y == c].mean(0) if (y == c).any() else np.zeros(4) for c in range(5)])
    scatter = sum(np.outer(a - means[c], a - means[c]) for a, c in zip(x, y, strict=True)) / 30
    got = ClassStatistics.of(features, labels, 5)
    np.testing.assert_array_equal(got.counts.numpy(), [(y == c).sum() for c in range(5)])
    np.testing.assert_allclose(got.means.numpy(), means, rtol=1e-12)
    np.testing.assert_allclose(got.scatter.numpy(), scatter, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 15), min_size=1, max_size=5),
    d=st.integers(1, 6),
    classes=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_merge_equals_the_union(sizes: list[int], d: int, classes: int, seed: int) -> None:
    parts = [examples(n, d, classes, seed + i) for i, n in enumerate(sizes)]
    union = ClassStatistics.of(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), classes)
    equal(ClassStatistics.merge([ClassStatistics.of(x, y, classes) for x, y in parts]), union)


def test_merge_refuses_nothing_and_mixed_shapes() -> None:
    with pytest.raises(ValueError, match="nothing"):
        ClassStatistics.merge([])
    with pytest.raises(ValueError, match="shape"):
        ClassStatistics.merge([ClassStatistics.of(*examples(5, d, 3, 0), 3) for d in (2, 3)])


def test_of_refuses_labels_out_of_range() -> None:
    features, labels = examples(5, 2, 3, 0)
    with pytest.raises(ValueError, match="outside"):
        ClassStatistics.of(features, labels + 3, 3)
    with pytest.raises(ValueError, match="outside"):
        ClassStatistics.of(features, labels - 3, 3)


def test_message_holds_present_classes_only_and_comes_back() -> None:
    features, labels = examples(40, 5, 3, 1)
    statistics = ClassStatistics.of(features, labels * 4, 12)
    message = statistics.to_tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in message.items()} == {
        "classes": ((3,), torch.int32),
        "counts": ((3,), torch.int32),
        "means": ((3, 5), torch.float32),
        "scatter": ((15,), torch.float32),
    }
    equal(ClassStatistics.from_tensors(message, 12, 5), statistics, 1e-5)


def test_noisy_counts_travel_as_floats_and_what_is_not_positive_is_absent() -> None:
    means = torch.ones(3, 2, dtype=torch.float64)
    counts = torch.tensor([2.5, 0.0, 1.0], dtype=torch.float64)
    message = ClassStatistics(counts, means, torch.eye(2, dtype=torch.float64)).to_tensors()
    assert message["counts"].dtype == torch.float32
    assert message["classes"].tolist() == [0, 2]
    message["counts"] = torch.tensor([2.5, -0.3])
    got = ClassStatistics.from_tensors(message, 3, 2)
    assert got.counts.tolist() == [2.5, 0.0, 0.0]
    assert got.means.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


def test_indefinite_scatter_becomes_the_nearest_covariance_and_a_singular_one_stays() -> None:
    message = ClassStatistics.of(*examples(40, 3, 3, 1), 3).to_tensors()
    message["scatter"] = torch.tensor([2.0, 0.0, 0.0, -1.0, 0.0, 3.0])
    got = ClassStatistics.from_tensors(message, 3, 3).scatter
    torch.testing.assert_close(got, torch.diag(torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64)))
    few = ClassStatistics.of(*examples(6, 20, 2, 3), 2)
    got = ClassStatistics.from_tensors(few.to_tensors(), 2, 20).scatter
    torch.testing.assert_close(got, few.scatter.float().double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("classes", torch.tensor([0, 1, 3]), "outside"),
        ("classes", torch.tensor([-1, 1, 2]), "outside"),
        ("classes", torch.tensor([0, 1, 1]), "twice"),
        ("classes", torch.tensor([0.0, 1.0, 2.0]), "dtype"),
        ("counts", torch.tensor([1, 2]), "shape"),
        ("counts", torch.tensor([1.0, 2.0, float("nan")]), "NaN"),
        ("means", torch.zeros(3, 5), "shape"),
        ("means", torch.full((3, 4), float("inf")), "infinite"),
        ("scatter", torch.zeros(4, 4), "shape"),
        ("scatter", None, "lacks"),
        ("extra", torch.zeros(1), "unknown"),
    ],
)
def test_from_tensors_refuses(name: str, value: torch.Tensor | None, complaint: str) -> None:
    features, labels = examples(40, 4, 3, 1)
    message: dict[str, torch.Tensor] = ClassStatistics.of(features, labels, 3).to_tensors()
    if value is None:
        del message[name]
    else:
        message[name] = value
    with pytest.raises(MessageError, match=complaint):
        ClassStatistics.from_tensors(message, 3, 4)
