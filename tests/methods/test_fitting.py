"""The fitted head against scikit-learn, and what its rules say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from folklora.data.augmentation.choose import Augmenter
from folklora.data.statistics import ClassStatistics
from folklora.methods import fitting
from folklora.methods.fitting import fit_head, fitted_head
from folklora.methods.heads import ABSENT

CLASSES, WIDTH = 6, 5
Labelled = tuple[Tensor, Tensor]


def population(counts: dict[int, int], seed: int = 0) -> Labelled:
    random = torch.Generator().manual_seed(seed)
    labels = torch.tensor([c for c, n in counts.items() for _ in range(n)])
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    return 3 + centres[labels] + torch.randn(len(labels), WIDTH, generator=random), labels


def nothing() -> Labelled:
    return torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)


def fit(real: Labelled, generated: Labelled | None = None, heads: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    return fit_head(real, generated or nothing(), CLASSES, heads, torch.Generator().manual_seed(seed))


def by_sklearn(x: np.ndarray, y: np.ndarray, weights: np.ndarray, probe: np.ndarray, ridge: float) -> np.ndarray:
    """Probabilities of the ridge optimum: scikit-learn minimises ``C sum_i w_i CE_i + ||W||^2 / 2``."""
    model = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=5000).fit(x, y, weights / weights.sum())
    return np.asarray(model.predict_proba(probe))


def probabilities(weight: Tensor, bias: Tensor, probe: Tensor, known: list[int]) -> np.ndarray:
    return (probe @ weight.T + bias)[:, known].softmax(1).numpy()


def test_it_is_ridge_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "STEPS", 500)
    monkeypatch.setattr(fitting, "RIDGE", 0.05)
    real, probe = population({0: 5, 2: 9, 5: 4}), population({0: 4, 2: 4, 5: 4}, 1)[0]
    generated = population({0: 20, 2: 20, 5: 20}, 2)
    centre = real[0].double().mean(0)
    scale = (real[0].double() - centre).square().mean().sqrt()

    def scaled(x: Tensor) -> np.ndarray:
        return ((x.double() - centre) / scale).numpy()

    for made, weights in (
        (nothing(), np.ones(18)),
        # The 20 made-up examples of a class weigh what its real ones weigh.
        (generated, np.concatenate([np.ones(18), np.repeat([5 / 20, 9 / 20, 4 / 20], 20)])),
    ):
        x, y = scaled(torch.cat([real[0], made[0]])), torch.cat([real[1], made[1]]).numpy()
        want = by_sklearn(x, y, weights, scaled(probe), 0.05)
        np.testing.assert_allclose(probabilities(*fit(real, made), probe, [0, 2, 5]), want, atol=2e-3)


def test_several_heads_without_made_up_examples_are_one() -> None:
    """They see the same, so the ensemble is each of them; its share of the loss only weakens the ridge."""
    real, probe = population({0: 6, 1: 6}), population({0: 4, 1: 4}, 1)[0]
    one, many = (probabilities(*fit(real, heads=heads), probe, [0, 1]).argmax(1) for heads in (1, 5))
    np.testing.assert_array_equal(one, many)


def test_a_class_without_examples_never_wins_and_starts_as_other_starts_have_it() -> None:
    weight, bias = fit(population({1: 3, 4: 8}))
    absent = [0, 2, 3, 5]
    assert not weight[absent].any()
    assert bias[absent].tolist() == [ABSENT] * 4
    probe = 50 * torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(0))
    assert set((probe @ weight.T + bias).argmax(1).tolist()) <= {1, 4}


def test_a_single_class_wins_everywhere() -> None:
    weight, bias = fit(population({3: 4}))
    assert not weight.any()
    assert bias.argmax() == 3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_scale_and_place_of_features_do_not_matter(scale: float) -> None:
    real, (probe, _) = population({0: 5, 2: 5}), population({0: 20, 2: 20}, 1)
    want = probabilities(*fit(real), probe, [0, 2])
    moved = scale * (real[0] + 10), real[1]
    np.testing.assert_allclose(probabilities(*fit(moved), scale * (probe + 10), [0, 2]), want, atol=1e-2)


def test_equal_features_of_all_examples() -> None:
    weight, bias = fit((torch.ones(6, WIDTH), torch.tensor([0, 0, 0, 0, 1, 1])))
    assert bool(torch.isfinite(weight).all())
    assert bias.argmax() == 0


@pytest.mark.parametrize("augment", ["none", "gaussian", "sketch", "gan", "auto"])
def test_heads_repeat_to_the_bit(augment: str) -> None:
    real = population({0: 3, 2: 4, 3: 2})
    pooled = ClassStatistics.merge([ClassStatistics.of(*d, CLASSES) for d in (real, population({0: 9, 2: 9}, 3))])
    given: Any = [tensor.clone() for tensor in real]
    one, two = (fitted_head(Augmenter(real, CLASSES, 0, "ann", pooled), augment) for _ in range(2))
    assert one[0] == two[0]
    for name in ("head/weight", "head/bias"):
        assert torch.equal(one[1][name], two[1][name])
        assert one[1][name].dtype == torch.float32
        assert not one[1][name].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(given, real, strict=True))
    if augment != "auto":
        assert one[0] == augment


def test_auto_is_what_was_chosen() -> None:
    augmenter = Augmenter(population({0: 3, 2: 4, 3: 2}), CLASSES, 0, "ann")
    chosen, head = fitted_head(augmenter, "auto")
    _, as_given = fitted_head(augmenter, chosen)
    assert torch.equal(head["head/weight"], as_given["head/weight"])
