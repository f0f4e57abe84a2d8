"""Counts of examples, by hand."""

import math

import numpy as np
import pytest

from folklora.data.audit.profile import QUANTILES, profile
from folklora.data.audit.tokens import Tokens


def test_counts():
    found = profile(Tokens.words(["a b a", "", "c", "a d e f"]), ["x", "y", "x", 3])
    assert (found.examples, found.empty, found.tokens, found.vocabulary) == (4, 1, 8, 6)
    assert found.lengths == {q: np.quantile([3, 0, 1, 4], q) for q in QUANTILES}
    assert found.mean_length.value == 2
    assert found.once.value == 5 / 6
    assert list(found.labels.items()) == [("x", 2), ("3", 1), ("y", 1)]
    assert found.effective_labels.value == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))


def test_equal_labels_count_as_many_as_they_are_and_one_as_one():
    tokens = Tokens.joined([[1], [2], [3], [4]])
    assert profile(tokens, [0, 1, 2, 3]).effective_labels.value == pytest.approx(4)
    assert profile(tokens, ["a"] * 4).effective_labels.value == pytest.approx(1)


def test_nothing_is_no_number():
    found = profile(Tokens.joined([]), [])
    assert (found.examples, found.lengths, found.labels) == (0, {}, {})
    assert found.mean_length.why == "there are no examples"
    assert found.once.why == "there are no tokens"
    assert found.effective_labels.why == "there are no labels"
    assert profile(Tokens.joined([[1]])).labels is None


def test_labels_of_other_examples_are_refused():
    with pytest.raises(ValueError, match="2 labels for 1 examples"):
        profile(Tokens.joined([[1]]), ["a", "b"])
