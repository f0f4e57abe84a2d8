"""Weighted means by way of whole numbers modulo 2^32."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.errors import MessageError
from folklora.privacy.fixedpoint import Grid

NUMBERS = st.floats(-8, 8, allow_nan=False, width=32)


@given(st.data(), st.integers(1, 40))
def test_the_mean_is_off_by_no_more_than_is_said(data: st.DataObject, parties: int) -> None:
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=parties))
    vectors = [np.array(data.draw(st.lists(NUMBERS, min_size=3, max_size=3))) for _ in weights]
    grid = Grid(8.0, parties, max(weights))
    total = np.zeros(4, dtype=np.uint32)
    for vector, weight in zip(vectors, weights, strict=True):
        words, clipped = grid.words(vector, weight)
        assert words.dtype == np.uint32
        assert not clipped
        total += words
    mean, weight = grid.mean(total)
    assert weight == sum(weights)
    wanted = sum(w * v for w, v in zip(weights, vectors, strict=True)) / sum(weights)
    assert np.abs(mean - wanted).max() <= grid.error(len(weights), weight) * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("parties", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("sign", [-1, 1])
def test_as_many_of_the_largest_as_there_may_be_do_not_overflow(parties: int, sign: int) -> None:
    grid = Grid(2.0, parties, (2**32 - 1) // parties)
    words, _ = grid.words(np.array([sign * 2.0]), grid.weight)
    total = np.zeros(2, dtype=np.uint32)
    for _ in range(parties):
        total += words
    mean, weight = grid.mean(total)
    assert weight == parties * grid.weight
    assert mean[0] == pytest.approx(sign * 2.0, abs=grid.error(parties, weight))


def test_what_lies_beyond_the_range_is_clipped_and_counted() -> None:
    grid = Grid(1.0, 2, 1)
    words, clipped = grid.words(np.array([-3.0, -1.0, 0.5, 1.0, 1.5]), 1)
    mean, _ = grid.mean(words)
    assert clipped == 2
    np.testing.assert_allclose(mean, [-1, -1, 0.5, 1, 1], atol=grid.error(1, 1))


def test_equal_weights_are_as_exact_as_the_text_says() -> None:
    for parties in (2, 50, 1000):
        assert Grid(8.0, parties, 1).error(parties, parties) < 1.001 * 8.0 * parties / 2**32


def test_weights_whose_sum_does_not_fit_are_refused() -> None:
    with pytest.raises(MessageError, match="4294967296 examples among 1 members; allowed: 1 to 4294967295"):
        Grid(1.0, 1, 2**32)
    with pytest.raises(MessageError, match="allowed: 1 to 85899345"):
        Grid(1.0, 50, 85899346)
    with pytest.raises(MessageError):
        Grid(1.0, 50, 0)
