"""Copies, found by hashes, against all pairs compared one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.data.audit.duplicates import exact_duplicates, near_duplicates
from folklora.data.audit.tokens import words


def shingles(text: str, shingle: int) -> frozenset[tuple[str, ...]]:
    found = words(text)
    return frozenset(tuple(found[i : i + shingle]) for i in range(max(len(found) - shingle + 1, 1)))


def connected(n: int, edges: list[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    labels = list(range(n))
    for a, b in edges:
        labels = [labels[a] if label == labels[b] else label for label in labels]
    groups = [tuple(i for i in range(n) if labels[i] == label) for label in dict.fromkeys(labels)]
    return tuple(group for group in groups if len(group) > 1)


def near_by_hand(texts: list[str], threshold: float, shingle: int) -> tuple[tuple[int, ...], ...]:
    sets = [shingles(text, shingle) for text in texts]
    index = [
        (i, j)
        for i, one in enumerate(sets)
        for j, other in enumerate(sets[:i])
        if len(one & other) / len(one | other) >= threshold
    ]
    return connected(len(texts), index)


def corpus(n: int) -> list[str]:
    """Texts, and some of them again with a word or two changed."""
    random = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(60)]
    texts = [[vocabulary[i] for i in random.integers(60, size=random.integers(1, 14))] for _ in range(n)]
    for source in random.integers(n, size=n // 2):
        changed = list(texts[source])
        for place in random.integers(len(changed), size=random.integers(0, 3)):
            changed[place] = vocabulary[random.integers(60)]
        texts.append(changed)
    return [" ".join(text) for text in texts]


@pytest.mark.parametrize("shingle", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 1.0])
def test_groups_are_those_of_all_pairs(threshold, shingle):
    texts = corpus(300)
    expected = near_by_hand(texts, threshold, shingle)
    assert len(expected) > 5
    found = near_duplicates(texts, threshold, shingle)
    assert found.groups == expected
    assert found.copies == sum(len(group) - 1 for group in expected)
    assert found == near_duplicates(texts, threshold, shingle)


@settings(max_examples=60)
@given(st.lists(st.text("ab ", max_size=9), max_size=8), st.integers(1, 4))
def test_short_and_empty_texts(texts, shingle):
    assert near_duplicates(texts, 0.6, shingle).groups == near_by_hand(texts, 0.6, shingle)


@given(st.lists(st.sampled_from(["A b", "a  B", "a b!", "", " ", "c"]), max_size=8))
def test_exact_copies_are_the_same_text_but_for_case_and_white_space(texts):
    keys = [" ".join(text.lower().split()) for text in texts]
    pairs = [(i, j) for i, one in enumerate(keys) for j, other in enumerate(keys[:i]) if one == other]
    found = exact_duplicates(texts)
    assert found.groups == connected(len(texts), pairs)
    assert found.share == (found.copies / len(texts) if texts else 0)
    # What is the same is near.
    near = near_duplicates(texts).groups
    assert all(any(set(group) <= set(other) for other in near) for group in found.groups)


def test_sequences_of_ids():
    rows = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [], [9], []]
    assert exact_duplicates(rows).groups == ((0, 2), (4, 6))
    assert near_duplicates(rows, 0.6).groups == ((0, 2, 3), (4, 6))  # four pairs of six
    assert near_duplicates(rows, 0.7).groups == ((0, 2), (4, 6))
    assert near_duplicates(rows, 1.0, shingle=1).groups == ((0, 1, 2), (4, 6))


def test_many_copies_of_one_text_are_one_group():
    texts = ["the very same words"] * 3000 + ["quite another one"]
    assert [len(group) for group in near_duplicates(texts).groups] == [3000]
    assert near_duplicates(texts).share == pytest.approx(2999 / 3001)


@pytest.mark.parametrize("threshold", [0, 0.05, 1.1, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates(["a", "b"], threshold)


def test_nothing_and_one():
    for examples in ([], ["one"]):
        assert near_duplicates(examples).groups == exact_duplicates(examples).groups == ()
        assert near_duplicates(examples).share == 0
