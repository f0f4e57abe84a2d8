"""Sequences of symbols: names do not matter, bounds do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.data.audit.tokens import Tokens, normalised, words

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=5)


def grams_by_hand(sequences: list[list[int]], m: int, followed: bool) -> list[tuple[int, ...]]:
    return [tuple(s[i : i + m]) for s in sequences for i in range(len(s) - m + 1 - followed)]


@given(SEQUENCES, st.integers(1, 4), st.booleans())
def test_grams_are_equal_exactly_where_the_runs_are_and_lie_within_a_sequence(sequences, m, followed):
    found = Tokens.joined(sequences).grams(m, followed).tolist()
    expected = grams_by_hand(sequences, m, followed)
    assert len(found) == len(expected)
    numbers = dict(zip(expected, found, strict=True))
    assert len(set(numbers.values())) == len(numbers) == len(set(expected))
    assert [numbers[gram] for gram in expected] == found


def test_long_grams_of_many_symbols_do_not_overflow():
    symbols = 2**16  # to the fourth power that is 0 in 64 bits: the first of five would be lost
    found = Tokens.of(np.concatenate([np.arange(symbols), [7, 1, 2, 3, 4, 9, 1, 2, 3, 4, 7, 1, 2, 3, 4]])).grams(5)
    assert found[symbols] != found[symbols + 5]
    assert found[symbols] == found[symbols + 10]
    assert len(np.unique(found)) == len(found) - 1


@pytest.mark.parametrize(
    "ids",
    [
        [5, -3, 5, 2**80],
        np.array([7, 1, 7, 0], dtype=np.uint8),
        ["a", "b", "a", ""],
        np.array(["x", "yy", "x", "z"]),
        ("1", 1, "1", 2),
        "abac",
    ],
)
def test_ids_are_names(ids):
    tokens = Tokens.of(ids)
    assert tokens.codes.tolist() == [0, 1, 0, 2]
    assert (len(tokens), tokens.sequences, tokens.symbols) == (4, 1, 3)


@pytest.mark.parametrize(
    ("ids", "offsets", "said"),
    [
        ([1.0, 2.0], None, "integers or strings, not floating"),
        ([True, False], None, "not boolean"),
        ([None, 1], None, "integers or strings"),
        ([1, "a", 2.5], None, "integers or strings"),
        ([1, "a", True], None, "integers or strings"),
        ([[1, 2], [3, 4]], None, "1-D"),
        ([1, 2], [0, 1], "from 0 to 2"),
        ([1, 2], [1, 2], "from 0 to 2"),
        ([1, 2], [0, 2, 1, 2], "upwards"),
        ([1, 2], [0.0, 2.0], "integers"),
        ([1, 2], [], "integers"),
    ],
)
def test_what_is_no_sequence_is_refused(ids, offsets, said):
    with pytest.raises(ValueError, match=said):
        Tokens.of(ids, offsets)


def test_empty_sequences_stay():
    tokens = Tokens.joined([[], ["a"], [], ["b", "a"], []])
    assert tokens.lengths.tolist() == [0, 1, 0, 2, 0]
    assert tokens.grams(2).size == 1
    nothing = Tokens.joined([])
    assert (len(nothing), nothing.sequences, nothing.symbols) == (0, 0, 0)
    assert nothing.grams(3).size == 0


def test_words_of_a_text():
    assert words("  The ＣＡＴ's\u00a0owner—don’t ask_them 3.5 times!") == [
        "the", "cat's", "owner", "don’t", "ask", "them", "3", "5", "times",
    ]  # fmt: skip
    assert words("?! …") == []
    assert normalised(" Straße\n\tX ") == "strasse x"
    assert Tokens.words(["One two", "", "TWO"]).codes.tolist() == [0, 1, 1]


@pytest.mark.parametrize("ids", [[2**63 + 1, -1, 2**63 + 2], [2**63, 1, 2**63 + 1], [10**30, -(10**30), 3]])
def test_ids_beyond_64_bits_stay_themselves(ids: list[int]) -> None:
    assert Tokens.of([*ids, ids[0]]).codes.tolist() == [0, 1, 2, 0]
    assert Tokens.joined([ids, [ids[2]]]).codes.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("ids", [[2**63, 1.0], [1, 2.0], [2**63, None, -1], [True, False]])
def test_no_other_numbers_pass_as_ids(ids: list[object]) -> None:
    with pytest.raises(ValueError, match="ids must be integers or strings"):
        Tokens.of(ids)
