"""Match lengths against two loops, and the entropy rate of processes whose rate is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.data.audit.matches import entropy_rate, match_lengths
from folklora.data.audit.tokens import Tokens

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=14), min_size=1, max_size=4)


def matched_by_hand(sequences: list[list[int]]) -> list[int]:
    """The longest prefix of each rest that an earlier rest has, too."""
    rests = [s[i:] for s in sequences for i in range(len(s))]

    def common(a: list[int], b: list[int]) -> int:
        return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    return [max((common(rest, earlier) for earlier in rests[:i]), default=0) for i, rest in enumerate(rests)]


@given(SEQUENCES)
def test_match_lengths_are_those_of_two_loops(sequences):
    assert match_lengths(Tokens.joined(sequences)).tolist() == matched_by_hand(sequences)


@given(SEQUENCES)
def test_the_rate_is_its_formula(sequences):
    tokens = Tokens.joined(sequences)
    found = entropy_rate(tokens)
    if tokens.symbols == len(tokens):
        assert found.value is None
    else:
        terms = [(length + 1) / math.log(i + 1) for i, length in enumerate(matched_by_hand(sequences), 1)]
        assert found.value == pytest.approx(len(terms) / sum(terms))


def test_one_symbol_over_and_over_has_matches_that_overlap():
    assert match_lengths(Tokens.of([7] * 6)).tolist() == [0, 5, 4, 3, 2, 1]
    assert entropy_rate([7] * 5000).value < 0.01


def test_a_whole_copy_is_found_at_any_length():
    random = np.random.default_rng(0)
    half = random.integers(10**9, size=3000)
    assert match_lengths(Tokens.of(np.concatenate([half, half])))[3000] == 3000


@pytest.mark.parametrize(("symbols", "low", "high"), [(2, 0.86, 0.95), (22, 0.76, 0.86)])
def test_rate_of_independent_symbols(symbols, low, high):
    """ln of the number of symbols; the estimator is known to be low, by about a tenth to a quarter at this length."""
    found = entropy_rate(np.random.default_rng(0).integers(symbols, size=20_000)).value
    assert low < found / math.log(symbols) < high


def test_rate_of_a_markov_chain_is_near_the_true_one_and_far_from_the_entropy_of_its_symbols():
    random = np.random.default_rng(0)
    n, states, noise = 20_000, 22, 0.3
    x, state = [], 0
    for jump, to in zip((random.random(n) < noise).tolist(), random.integers(states, size=n).tolist(), strict=True):
        state = to if jump else (state + 1) % states
        x.append(state)
    stay, leave = 1 - noise + noise / states, noise / states
    rate = -(stay * math.log(stay) + (states - 1) * leave * math.log(leave))
    assert entropy_rate(x).value == pytest.approx(rate, rel=0.15)
    assert rate < 0.5 * math.log(states)


@pytest.mark.parametrize(("ids", "why"), [([], "there are no tokens"), ([1, 2, 3], "no token occurs twice")])
def test_what_cannot_be_measured_says_why(ids, why):
    assert entropy_rate(ids).why == why
