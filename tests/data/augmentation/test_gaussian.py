"""Draws from class Gaussians, against the moments they should have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import oas

from folklora.data.augmentation.gaussian import draws, per_class
from folklora.data.augmentation.sketch import packed, shapes, unpacked
from folklora.data.statistics import ClassStatistics
from folklora.errors import MessageError

CLASSES, WIDTH = 5, 4


def examples(labels: list[int], seed: int = 0, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels)
    mixing = torch.randn(width, width, generator=random)
    return torch.randn(CLASSES, width, generator=random)[y] + torch.randn(len(y), width, generator=random) @ mixing, y


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_moments_are_those_of_the_shrunk_pooled_covariance() -> None:
    """The oracle: numpy's residuals around class means, scikit-learn's shrinkage at their degrees of freedom."""
    x, y = examples([0] * 4 + [1] * 7 + [3] * 5)
    residuals = np.concatenate([x[y == c].double().numpy() - x[y == c].double().numpy().mean(0) for c in (0, 1, 3)])
    freedom = len(y) - 3
    # OAS takes residuals' second moment and their number: rows scaled so that both are what they should be.
    r = np.linalg.qr(residuals)[1]
    rows = np.zeros((freedom, WIDTH))
    rows[:WIDTH] = r
    sigma, _ = oas(rows, assume_centered=True)
    made, labels = per_class((x, y), CLASSES, 40_000, generator())
    assert labels.tolist() == [0] * 40_000 + [1] * 40_000 + [3] * 40_000
    for c in (0, 1, 3):
        own = made[labels == c].double().numpy()
        error = 5 * np.sqrt(np.diag(sigma) / len(own))
        np.testing.assert_array_less(np.abs(own.mean(0) - x[y == c].double().numpy().mean(0)), error)
        # An entry's standard error is at most sqrt(2) times the variances' geometric mean, over the root of n.
        scale = np.sqrt(np.outer(np.diag(sigma), np.diag(sigma)))
        np.testing.assert_array_less(np.abs(np.cov(own.T) - sigma) / scale, 5 * np.sqrt(2 / len(own)))


def test_the_same_generator_draws_the_same_bits() -> None:
    data = examples([0, 0, 2, 2, 2])
    one, other = (per_class(data, CLASSES, 3, generator(4))[0] for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, per_class(data, CLASSES, 3, generator(5))[0])


def test_one_example_of_each_class_says_nothing_of_their_spread() -> None:
    made, labels = per_class(examples([0, 2, 4]), CLASSES, 3, generator())
    assert made.shape == (0, WIDTH)
    assert len(labels) == 0


def test_everybody_knows_a_spread_that_a_client_does_not() -> None:
    pooled = ClassStatistics.of(*examples([0, 0, 1, 1, 1, 4]), CLASSES)
    own = torch.tensor([1, 2, 1])  # nobody has told of class 2
    made, labels = draws(pooled, own, 3, generator())
    assert labels.tolist() == [1, 1, 1]
    assert made.shape == (3, WIDTH)
    assert made.dtype == torch.float32


def test_more_dimensions_than_examples() -> None:
    made, _ = per_class(examples([0, 0, 1, 1], width=50), CLASSES, 5, generator())
    assert bool(torch.isfinite(made).all())
    assert made.std(0).min() > 0


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 4], [2] * 5])
def test_shared_statistics_arrive_as_they_left(labels: list[int]) -> None:
    statistics = ClassStatistics.of(*examples(labels), CLASSES)
    tensors = packed(statistics)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes(CLASSES, WIDTH)
    read = unpacked(tensors, CLASSES, WIDTH)
    assert torch.equal(read.counts, statistics.counts)
    torch.testing.assert_close(read.means, statistics.means, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(read.scatter, statistics.scatter, rtol=1e-6, atol=1e-6)


def test_shared_statistics_that_cannot_be_are_refused() -> None:
    honest = packed(ClassStatistics.of(*examples([0, 0, 1, 1]), CLASSES))
    for name, tensor in honest.items():
        for lie in (tensor[:-1], tensor.double() * float("nan")):
            with pytest.raises(MessageError):
                unpacked({**honest, name: lie}, CLASSES, WIDTH)
        with pytest.raises(MessageError):
            unpacked({other: honest[other] for other in honest if other != name}, CLASSES, WIDTH)
    with pytest.raises(MessageError):
        unpacked({}, CLASSES, WIDTH)
