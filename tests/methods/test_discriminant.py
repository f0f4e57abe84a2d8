"""The closed-form head against scikit-learn, and its rules at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from folklora.data.statistics import ClassStatistics, oracle_approximating_shrinkage
from folklora.errors import MethodError
from folklora.methods.discriminant import linear_discriminant


def examples(n: int, d: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size=n, p=rng.dirichlet(np.full(classes, 3.0)))
    mixing = rng.normal(size=(d, d)) / d**0.5
    return rng.normal(size=(classes, d))[labels] + rng.normal(size=(n, d)) @ mixing, labels


def statistics(features: np.ndarray, labels: np.ndarray, classes: int) -> ClassStatistics:
    return ClassStatistics.of(torch.from_numpy(features), torch.from_numpy(labels), classes)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7, 1.0])
def test_matches_sklearn_lda(shrinkage: float) -> None:
    features, labels = examples(400, 12, 5, 0)
    weight, bias = linear_discriminant(statistics(features, labels, 5), shrinkage)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None).fit(features, labels)
    points = np.random.default_rng(1).normal(size=(500, 12))
    ours = points @ weight.double().numpy().T + bias.double().numpy()
    theirs = reference.decision_function(points)
    assert (ours.argmax(1) == theirs.argmax(1)).all()
    np.testing.assert_allclose(ours - ours[:, :1], theirs - theirs[:, :1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "d"), [(200, 5), (30, 40), (5, 3), (50, 1)])
def test_shrinkage_matches_sklearn_oas(n: int, d: int) -> None:
    features, labels = examples(n, d, 3, n)
    got = statistics(features, labels, 3)
    residuals = features - got.means.numpy()[labels]
    covariance, shrinkage = oas(residuals, assume_centered=True)
    np.testing.assert_allclose(got.scatter.numpy(), residuals.T @ residuals / n, rtol=1e-10, atol=1e-12)
    if d > 1:  # with one feature every shrinkage is the same covariance; scikit-learn says 0
        assert abs(oracle_approximating_shrinkage(got.scatter, n) - shrinkage) < 1e-12
    weight, _ = linear_discriminant(got)
    present = got.counts > 0
    want = np.linalg.solve(covariance, got.means.numpy()[present].T).T
    np.testing.assert_allclose(weight.numpy()[present], want, rtol=1e-4, atol=1e-5)


def test_merged_clients_give_the_central_head() -> None:
    features, labels = examples(300, 6, 4, 3)
    parts = [statistics(features[i::3], labels[i::3], 4) for i in range(3)]
    central = linear_discriminant(statistics(features, labels, 4))
    for got, want in zip(linear_discriminant(ClassStatistics.merge(parts)), central, strict=True):
        torch.testing.assert_close(got, want)


def test_an_unseen_class_is_neutral_and_least_likely() -> None:
    features, labels = examples(300, 6, 3, 4)
    known = statistics(features, labels, 3)
    wider = statistics(features, labels, 5)
    weight, bias = linear_discriminant(wider)
    seen, seen_bias = linear_discriminant(known)
    torch.testing.assert_close(weight[:3], seen)
    torch.testing.assert_close(bias[:3], seen_bias)
    shares = known.counts.float() / 300
    torch.testing.assert_close(weight[3:], (shares @ seen).expand(2, -1))  # Sigma^-1 of the mean of all examples
    middle = torch.from_numpy(features.mean(0)).float()
    want = -0.5 * weight[3] @ middle + np.log(0.5 / 300)
    torch.testing.assert_close(bias[3:], want.expand(2))
    predictions = (torch.from_numpy(features).float() @ weight.T + bias).argmax(1)
    assert (predictions < 3).all()


def test_noisy_counts_below_one_keep_unseen_classes_last() -> None:
    counts = torch.tensor([0.2, 3.0, 0.0], dtype=torch.float64)
    same = ClassStatistics(counts, torch.zeros(3, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    _, bias = linear_discriminant(same)
    assert bias.argsort().tolist() == [2, 0, 1]


def test_who_says_that_it_has_very_many_examples_stops_nobody() -> None:
    """Shrinkage is next to nothing with so many, and the covariance of the few that there are is singular."""
    honest = statistics(*examples(6, 12, 3, 0), 3)
    weight, bias = linear_discriminant(ClassStatistics(honest.counts * 1e15, honest.means, honest.scatter))
    assert bool(weight.isfinite().all() and bias.isfinite().all())
    with pytest.raises(MethodError, match="singular"):  # as chosen, or not at all
        linear_discriminant(honest, 0.0)


def test_degenerate_statistics() -> None:
    empty = ClassStatistics.of(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 2)
    assert all(not t.any() for t in linear_discriminant(empty))
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    weight, bias = linear_discriminant(ClassStatistics.of(points, torch.arange(3), 3))
    assert (points @ weight.T + bias).argmax(1).tolist() == [0, 1, 2]
    near = torch.tensor([[1.9, 0.0], [2.1, 0.0]])
    assert (near @ weight.T + bias).argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize(("shrinkage", "complaint"), [(0.0, "singular"), (-0.1, "not in"), (1.5, "not in")])
def test_impossible_shrinkage_is_refused(shrinkage: float, complaint: str) -> None:
    features, labels = examples(10, 20, 2, 5)
    with pytest.raises(MethodError, match=complaint):
        linear_discriminant(statistics(features, labels, 2), shrinkage)
