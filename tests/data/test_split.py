"""Splitting one client's examples: counted by hand, not by the code under test."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.data.partition import partition
from folklora.data.split import Split, histogram, split
from folklora.data.table import Table
from folklora.sections import DataSection


def make_table(sizes: list[int], groups: list[str] | None = None) -> Table:
    """Examples sorted by class, the worst order for a scheme that forgets to shuffle."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    classes = tuple(f"class {i:02d}" for i in range(len(sizes)))
    return Table([f"text {i}" for i in range(len(labels))], labels, classes, groups)


def everything(of: Split) -> list[int]:
    return [*of.train.tolist(), *of.validation.tolist(), *of.test.tolist()]


@settings(max_examples=200, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=3, max_size=120),
    validation=st.floats(0.01, 0.9),
    test=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**63 - 1),
)
def test_split_is_a_partition_in_proportion(labels: list[int], validation: float, test: float, seed: int) -> None:
    array = np.array(labels)
    indices = np.arange(len(array))
    of = split(array, indices, validation, test, seed, "c")
    assert sorted(everything(of)) == indices.tolist()
    assert min(len(of.train), len(of.validation), len(of.test)) >= 1
    n = len(array)
    if validation + test < 0.9 and n * (1 - validation - test) > 2:
        assert abs(len(of.test) - n * test) <= max(0.5, 1 - n * test) + 1e-9
        assert abs(len(of.validation) - n * validation) <= max(0.5, 1 - n * validation) + 1e-9
    for label in set(labels):
        members = (array == label).sum()
        in_test, in_validation = ((array[part] == label).sum() for part in (of.test, of.validation))
        assert abs(in_test - members * len(of.test) / n) < 1
        left = n - len(of.test)
        assert abs(in_validation - (members - in_test) * len(of.validation) / left) < 1


def test_split_of_a_client_depends_on_nothing_else() -> None:
    labels = np.tile(np.arange(4), 30)
    mine = np.arange(10, 70)
    base = split(labels, mine, 0.1, 0.2, 0, "a")
    assert (len(base.train), len(base.validation), len(base.test)) == (42, 6, 12)
    shuffled = split(labels, mine[::-1], 0.1, 0.2, 0, "a")
    assert everything(shuffled) == everything(base)
    assert everything(split(labels, mine, 0.1, 0.2, 1, "a")) != everything(base)
    assert everything(split(labels, mine, 0.1, 0.2, 0, "b")) != everything(base)


def test_rare_classes_reach_every_part_with_the_probability_of_its_fraction() -> None:
    labels = np.array([0] * 19 + [1])
    counts = np.zeros(3)
    for seed in range(600):
        of = split(labels, np.arange(20), 0.1, 0.2, seed, "c")
        counts += [19 in of.train, 19 in of.validation, 19 in of.test]
    np.testing.assert_allclose(counts / 600, [0.7, 0.1, 0.2], atol=0.07)  # more than three standard deviations


def test_the_order_of_examples_within_a_class_is_random() -> None:
    labels = np.zeros(100, dtype=np.int64)
    chosen = np.zeros(100)
    for seed in range(300):
        chosen[split(labels, np.arange(100), 0.1, 0.2, seed, "c").test] += 1
    assert 0 < chosen.min() <= chosen.max() < 120  # 60 each, a standard deviation of 7
    steps = np.diff(split(labels, np.arange(100), 0.1, 0.2, 0, "c").test)
    assert len(set(steps.tolist())) > 1  # not every fifth


def test_natural_client_splits_do_not_depend_on_other_clients() -> None:
    section = DataSection(partition="natural", by="w")
    one = partition(make_table([20, 20], ["a"] * 40), section, 0)
    two = partition(make_table([20, 20, 15], ["a"] * 40 + ["b"] * 15), section, 0)
    assert everything(one["a"]) == everything(two["a"])


def test_histogram_counts_every_class() -> None:
    table = make_table([2, 0, 3])
    assert histogram(table, np.array([0, 2, 3])).tolist() == [1, 0, 2]
    assert histogram(table, Split(np.array([0, 2]), np.array([1]), np.array([4]))).tolist() == [2, 0, 2]
