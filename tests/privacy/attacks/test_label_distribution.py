from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from folklora.data.mixtures import ClassMixtures
from folklora.data.statistics import ClassStatistics
from folklora.errors import AttackError
from folklora.privacy.attacks.label_distribution import (
    distance,
    from_bias,
    from_sketch,
    from_weights,
    mixes,
    normalised,
    regressed,
    shares,
    top_recall,
)
from folklora.privacy.attacks.run import Plan, attack

LABELS = np.array([0, 0, 0, 2, 2, 4, 4, 4, 4])
TRUE = np.array([3, 0, 2, 0, 4]) / 9


def test_distances_and_recalls() -> None:
    assert shares(LABELS, 5).tolist() == TRUE.tolist()
    assert distance(TRUE, TRUE) == 0
    assert distance(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    assert distance(np.array([0.5, 0.5]), np.array([0.75, 0.25])) == 0.25
    assert top_recall(TRUE, TRUE) == 1
    assert top_recall(np.array([0.1, 0.5, 0, 0.4, 0]), TRUE) == pytest.approx(1 / 3)
    assert top_recall(np.array([0, 0, 0, 0, 1.0]), np.array([0, 0, 0, 0, 1.0])) == 1
    assert normalised(np.array([-1.0, 0])).tolist() == [0.5, 0.5]


def test_sketches_hold_counts_as_they_are() -> None:
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    statistics = ClassStatistics.of(features, torch.from_numpy(LABELS), 5).to_tensors()
    mixture = ClassMixtures.fit(features, torch.from_numpy(LABELS)).to_tensors()
    for prefix, tensors in (("statistics", statistics), ("mixture", mixture)):
        found = from_sketch({f"{prefix}/{name}": tensor for name, tensor in tensors.items()}, 5)
        assert found is not None
        np.testing.assert_allclose(found, TRUE)
    assert from_sketch({}, 5) is None


def test_one_step_of_a_zero_head_tells_the_shares() -> None:
    bias = torch.zeros(5, requires_grad=True)
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(features @ torch.zeros(6, 5) + bias, torch.from_numpy(LABELS)).backward()
    assert bias.grad is not None
    np.testing.assert_allclose(from_bias(0.37 * bias.grad.numpy(), np.full(5, 0.2)), TRUE, atol=1e-6)
    assert from_bias(np.zeros(5), TRUE).tolist() == TRUE.tolist()


def test_weights_point_at_those_that_are_alike() -> None:
    theirs = np.stack([TRUE, np.array([0, 1.0, 0, 0, 0]), np.array([0, 0, 0, 1.0, 0])])
    assert distance(from_weights(np.array([0.6, 0.2, 0.2]), theirs), TRUE) < 1e-9
    np.testing.assert_allclose(from_weights(np.array([0.1, 0.1, 0.1]), theirs), theirs.mean(0))


def test_a_regression_finds_shares_that_are_in_the_updates() -> None:
    rng = np.random.default_rng(0)
    answers = rng.dirichlet(np.ones(5), 60)
    directions = rng.normal(size=(5, 300))
    known = answers @ directions + 0.01 * rng.normal(size=(60, 300))
    asked = TRUE @ directions
    assert distance(regressed(known, answers, asked), TRUE) < 0.05
    assert distance(regressed(known, answers, rng.permutation(asked)), TRUE) > 0.1


def test_a_regression_on_noise_comes_to_the_mean() -> None:
    rng = np.random.default_rng(0)
    answers = rng.dirichlet(np.ones(5), 60)
    found = regressed(rng.normal(size=(60, 300)), answers, rng.normal(size=300))
    assert distance(found, answers.mean(0)) < 0.15


def test_mixes_are_of_public_rows_and_of_all_kinds() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    public = np.arange(0, 400, 2)
    chosen = mixes(labels, public, 30, 40, rng)
    assert all(len(rows) == 30 and np.isin(rows, public).all() for rows in chosen)
    largest = [shares(labels[rows], 5).max() for rows in chosen]
    assert min(largest) < 0.45
    assert max(largest) > 0.9


def labels(recipe: Any, **plan: Any) -> dict[str, Any]:
    found: dict[str, Any] = attack(recipe, Plan("labels", **{"victims": 3, "warmup": 0, "budget": 24, **plan}))
    return found["metrics"]


def test_sketches_give_labels_away_and_a_private_release_less(tiny_recipe: Callable[..., Any]) -> None:
    plain = labels(tiny_recipe("method.name=folklora"), budget=8)["label_distance_sketch"]
    assert plain["mean"] == 0
    assert plain["control"] > 0.2
    noisy = labels(tiny_recipe("method.name=folklora", "method.dp_epsilon=0.3"), budget=8)
    assert noisy["label_distance_sketch"]["mean"] > 0.05


@pytest.mark.parametrize("method", ["fedit", "folklora"])
def test_updates_give_labels_away(method: str, tiny_recipe: Callable[..., Any]) -> None:
    head = "method.head=private" if method == "folklora" else "method.head=shared"
    found = labels(tiny_recipe(f"method.name={method}", head))
    mine = found["label_distance_shadows"]
    assert mine["mean"] < mine["control"]
    assert mine["mean"] < found["prior_distance"]["mean"]
    assert not mine["higher"]
    assert ("label_distance_bias" in found) == (method == "fedit")


def test_a_row_of_weights_is_attacked_where_there_is_one(tiny_recipe: Callable[..., Any]) -> None:
    found = labels(tiny_recipe("method.name=celora"), warmup=1, budget=8)
    assert found["label_distance_weights"]["mean"] <= 1
    assert found["label_distance_sketch"]["mean"] < 0.05


def test_examples_without_labels_are_refused(tiny_speaker: Any, tiny_chats: Any) -> None:
    from folklora.recipe import Recipe

    recipe = Recipe.parse(
        {
            "model": {"name": str(tiny_speaker), "task": "causal-lm", "dtype": "float32"},
            "data": {"source": str(tiny_chats), "clients": 4, "partition": "iid"},
            "method": {"name": "fedit"},
        }
    )
    with pytest.raises(AttackError, match="no labels"):
        attack(recipe, Plan("labels", warmup=0))
