"""`data.shots`: a few of each class to train on, and all else as it was."""

from __future__ import annotations

import numpy as np
import pytest

from folklora.data.partition import partition
from folklora.data.split import few, part, split
from folklora.data.table import Table
from folklora.errors import RecipeError
from folklora.recipe import Recipe
from folklora.sections import DataSection

LABELS = np.repeat(np.arange(4), [60, 50, 40, 10])
TABLE = Table([f"text {i}" for i in range(160)], LABELS, ("a", "b", "c", "d"), None)


def section(shots: int | None) -> DataSection:
    return DataSection(clients=4, partition="dirichlet", alpha=0.5, shots=shots)


def test_at_most_so_many_of_each_class_are_trained_on_and_tests_stay() -> None:
    whole = partition(TABLE, section(None), 1)
    for shots in (1, 3, 1000):
        found = partition(TABLE, section(shots), 1)
        assert list(found) == list(whole)
        for client, own in found.items():
            np.testing.assert_array_equal(own.test, whole[client].test)
            np.testing.assert_array_equal(own.validation, whole[client].validation)
            assert set(own.train) <= set(whole[client].train)
            assert own.train.tolist() == sorted(own.train.tolist())
            had = np.bincount(LABELS[whole[client].train], minlength=4)
            np.testing.assert_array_equal(np.bincount(LABELS[own.train], minlength=4), np.minimum(had, shots))


def test_fewer_shots_are_some_of_the_more_and_follow_from_the_seed() -> None:
    one, five = (partition(TABLE, section(shots), 1) for shots in (1, 5))
    assert all(set(one[client].train) <= set(five[client].train) for client in one)
    own = split(LABELS, np.arange(160), 0.1, 0.2, 0, "ann")
    drawn = [few(own, LABELS, 3, *of).train.tolist() for of in ((0, "ann"), (0, "ann"), (1, "ann"), (0, "bob"))]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[3]


def test_all_shots_are_drawn_alike() -> None:
    own = split(LABELS, np.arange(160), 0.1, 0.2, 0, "ann")
    times = np.zeros(160)
    for seed in range(400):
        times[few(own, LABELS, 2, seed, "ann").train] += 1
    for each in range(4):
        rows = own.train[LABELS[own.train] == each]
        share = 2 / len(rows)
        np.testing.assert_allclose(times[rows] / 400, share, atol=5 * (share * (1 - share) / 400) ** 0.5)


@pytest.mark.parametrize("shots", [0, -1, 2.5, "few"])
def test_shots_that_cannot_be(shots: object) -> None:
    with pytest.raises(RecipeError, match=r"data\.shots = "):
        Recipe.parse({"data": {"shots": shots}})


def test_shots_do_not_go_with_drift() -> None:
    with pytest.raises(RecipeError, match=r'data.shots = 3 with drift.kind = "labels"; allowed: one of them'):
        Recipe.parse({"data": {"shots": 3}, "drift": {"kind": "labels"}})


def test_a_recipe_says_it_again() -> None:
    recipe = Recipe.parse({"data": {"shots": 3}})
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_toml(Recipe.parse({}).to_toml()).data.shots is None


# -- data.train_share --------------------------------------------------------------------------------------------------


def test_a_share_is_trained_on_and_tests_stay() -> None:
    parts = {s: partition(TABLE, DataSection(clients=4, alpha=0.5, train_share=s), 1) for s in (1e-6, 0.25, 0.5, 1.0)}
    whole = partition(TABLE, section(None), 1)
    for client, all_of in whole.items():
        count = len(all_of.train)
        np.testing.assert_array_equal(parts[1.0][client].train, all_of.train)
        for share, found in parts.items():
            np.testing.assert_array_equal(found[client].test, all_of.test)
            np.testing.assert_array_equal(found[client].validation, all_of.validation)
            assert len(found[client].train) == max(1, int(share * count + 0.5))
        assert set(parts[1e-6][client].train) <= set(parts[0.25][client].train) <= set(parts[0.5][client].train)
    own = split(LABELS, np.arange(160), 0.1, 0.2, 0, "ann")
    drawn = [part(own, 0.3, *of).train.tolist() for of in ((0, "ann"), (0, "ann"), (1, "ann"), (0, "bob"))]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[3]


@pytest.mark.parametrize("share", [0.0, 1.5, "half"])
def test_shares_that_cannot_be(share: object) -> None:
    with pytest.raises(RecipeError, match=r"data\.train_share = "):
        Recipe.parse({"data": {"train_share": share}})


def test_a_share_does_not_go_with_drift() -> None:
    with pytest.raises(RecipeError, match=r'data\.train_share = 0\.5 with drift\.kind = "labels"'):
        Recipe.parse({"data": {"train_share": 0.5}, "drift": {"kind": "labels"}})
