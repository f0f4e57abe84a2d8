"""What a client's examples are worth: blocks, their regularity, and coarse steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.data.audit.entropy import regularity
from folklora.data.audit.measure import Measure
from folklora.data.audit.quality import (
    BLOCK,
    LEAST,
    blocks,
    bounded,
    copies,
    quality,
    quality_of,
    regularities,
    regularity_of_blocks,
    stepped,
    tokens_of,
    weighed,
)


def spoken(count: int, seed: int = 0, noise: float = 0.0) -> list[str]:
    """Texts of a Markov chain over 40 words; of a share of them every word is drawn at random."""
    random = np.random.default_rng(seed)
    following = random.integers(40, size=(40, 3))
    texts = []
    for _ in range(count):
        words = [int(random.integers(40))]
        for _ in range(int(random.integers(5, 15))):
            words.append(int(random.choice(following[words[-1]])))
        if random.random() < noise:
            words = random.integers(40, size=len(words)).tolist()
        texts.append(" ".join(f"w{word}" for word in words))
    return texts


@given(st.integers(0, 2000))
def test_blocks_hold_each_example_once_and_are_of_a_size(count: int) -> None:
    found = blocks(count)
    assert sorted(np.concatenate(found).tolist()) == list(range(count))
    assert len(found) == max(1, count // BLOCK)
    if count >= BLOCK:
        assert all(BLOCK <= len(block) < 2 * BLOCK for block in found)
    for one, other in zip(found, blocks(count), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_block_is_measured_without_its_copies() -> None:
    texts = spoken(100)
    (found,) = regularities(texts[:50] + texts[:50])
    (alone,) = regularities(texts[:50])
    shuffled = [texts[:50][i % 50] for i in blocks(100)[0]]
    left = set(range(100)) - {p for group in copies(shuffled).groups for p in group[1:]}
    assert found == regularity(tokens_of([shuffled[place] for place in sorted(left)]))
    assert len(left) <= 50
    assert found.value == pytest.approx(alone.value, abs=0.05)


def test_one_example_moves_one_block() -> None:
    """What the bound on a released regularity rests on."""
    texts = spoken(5 * BLOCK)
    before = regularities(texts)
    for place, text in ((3, "w1 w1 w1"), (400, texts[17]), (5 * BLOCK - 1, "")):
        after = regularities([*texts[:place], text, *texts[place + 1 :]])
        assert sum(one != other for one, other in zip(before, after, strict=True)) <= 1


def test_order_falls_with_noise_and_hardly_with_the_number_of_examples() -> None:
    worth = [1 - bounded(regularity_of_blocks(regularities(spoken(600, noise=share)))) for share in (0, 0.3, 0.6, 1)]
    assert worth[0] > 1.3 * worth[1] > 1.3 * worth[2] > 1.3 * worth[3]
    assert worth[3] < 0.02
    large = 1 - bounded(regularity_of_blocks(regularities(spoken(3000))))
    assert large == pytest.approx(worth[0], rel=0.1)
    whole = [1 - bounded(regularity(tokens_of(spoken(count)))) for count in (64, 3000)]
    assert whole[1] > 1.1 * whole[0]  # what blocks are for


def test_what_cannot_be_measured_counts_as_noise() -> None:
    assert bounded(Measure(None, "no token occurs twice")) == 1
    assert bounded(Measure(1.2)) == 1
    assert bounded(Measure(-0.1)) == 0
    nothing = regularity_of_blocks(regularities(["one two", "three four"]))
    assert nothing.value is None
    assert "twice" in str(nothing)
    assert regularity_of_blocks([Measure(0.5), Measure(None, "too short")]).value == 0.75
    assert quality(["one two", "three four"], "regularity") == LEAST


def test_the_parts_of_quality() -> None:
    texts = spoken(60)
    half = texts[:30] * 2
    assert copies(half).copies >= 30
    assert quality(half, "duplicates") == stepped(1 - copies(half).share)
    regular = regularity_of_blocks(regularities(half))
    assert quality(half, "regularity") == stepped(1 - bounded(regular))
    assert quality(half, "both") == stepped((1 - copies(half).share) * (1 - bounded(regular)))
    assert quality_of(0.5, Measure(0.5), "both") == 0.25
    assert quality_of(0.5, Measure(0.0), "duplicates") == 0.5
    assert quality_of(1.0, Measure(1.0), "both") == LEAST


def test_sequences_of_items_are_near_by_more_than_their_pairs() -> None:
    """Of two items there are four pairs: any two long sequences have the same."""
    random = np.random.default_rng(0)
    sequences = [random.integers(2, size=60).tolist() for _ in range(40)]
    assert copies(sequences).copies == 0
    assert copies([*sequences, sequences[3]]).groups == ((3, 40),)


@given(st.floats(0, 1))
def test_steps_are_coarse_and_never_nothing(value: float) -> None:
    found = stepped(value)
    assert LEAST <= found <= 1
    assert stepped(found) == found
    if value > LEAST:
        assert 2**-0.126 < found / value < 2**0.126  # half of a step
    assert 1 <= weighed(1, found) <= 1
    assert 1 <= weighed(100, found) <= 100


def test_there_are_no_more_values_than_is_said() -> None:
    assert len({stepped(value) for value in np.linspace(0, 1, 100_001)}) == 21
