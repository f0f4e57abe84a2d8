"""Entropies against their definitions, `antropy`, EntropyHub, and what can be said in closed form."""

import math
import zlib

import antropy
import EntropyHub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.data.audit.entropy import approximate_entropy, compression_ratio, regularity, sample_entropy, shannon
from folklora.data.audit.measure import Measure
from folklora.data.audit.tokens import Tokens, words
from folklora.data.sources import load
from folklora.sections import DataSection

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=10), min_size=1, max_size=4)


def grams(sequences: list[list[int]], m: int) -> list[tuple[int, ...]]:
    return [tuple(s[i : i + m]) for s in sequences for i in range(len(s) - m + 1)]


def phi(sequences: list[list[int]], m: int) -> float:
    """As the paper writes it: the mean over i of ln of the share of j that match."""
    found = grams(sequences, m)
    return sum(math.log(sum(a == b for b in found) / len(found)) for a in found) / len(found)


@given(SEQUENCES, st.integers(1, 3))
def test_approximate_entropy_is_its_definition(sequences, m):
    found = approximate_entropy(Tokens.joined(sequences), m)
    if not grams(sequences, m + 1) or len(set(grams(sequences, m))) == len(grams(sequences, m)):
        assert found.value is None
    else:
        assert found.value == pytest.approx(phi(sequences, m) - phi(sequences, m + 1), abs=1e-12)


@given(SEQUENCES, st.integers(1, 3))
def test_sample_entropy_is_its_definition(sequences, m):
    followed = [(s[i : i + m], s[i + m]) for s in sequences for i in range(len(s) - m)]
    pairs = [(p, q) for i, p in enumerate(followed) for q in followed[:i]]
    b = sum(p[0] == q[0] for p, q in pairs)
    a = sum(p == q for p, q in pairs)
    found = sample_entropy(Tokens.joined(sequences), m)
    if a == 0:
        assert found.value is None
    else:
        assert found.value == pytest.approx(math.log(b / a), abs=1e-12)


@pytest.mark.parametrize("symbols", [2, 5, 12])
@pytest.mark.parametrize("m", [2, 3])  # antropy takes no 1
def test_antropy_agrees(symbols, m):
    x = np.random.default_rng(symbols).integers(symbols, size=700)
    settings = {"order": m, "tolerance": 0.5, "metric": "chebyshev"}
    assert approximate_entropy(x, m).value == pytest.approx(antropy.app_entropy(x.astype(float), **settings), abs=1e-9)
    assert sample_entropy(x, m).value == pytest.approx(antropy.sample_entropy(x.astype(float), **settings), abs=1e-9)


@pytest.mark.parametrize("symbols", [2, 5, 12])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_entropyhub_agrees(symbols, m):
    x = np.random.default_rng(symbols).integers(symbols, size=700)
    assert approximate_entropy(x, m).value == pytest.approx(EntropyHub.ApEn(x, m=m, r=0.5)[0][-1], abs=1e-9)
    assert sample_entropy(x, m).value == pytest.approx(EntropyHub.SampEn(x, m=m, r=0.5)[0][-1], abs=1e-9)


def test_a_history_without_repeats_is_not_measurable_where_others_give_a_constant():
    for content in (np.arange(50), np.arange(50)[::-1] * 7):
        assert abs(antropy.app_entropy(content.astype(float), order=2, tolerance=0.5)) == pytest.approx(
            0.0206, abs=1e-4
        )
        assert approximate_entropy(content, 2) == Measure(None, "no pair of tokens occurs twice")
        assert str(approximate_entropy(content, 2)) == "not measurable: no pair of tokens occurs twice"
        assert regularity(content).why == "no token occurs twice"
        assert sample_entropy(content).why == "no token that goes on occurs twice"


@pytest.mark.parametrize(
    ("measure", "why"),
    [
        (approximate_entropy([]), "no sequence is longer than 1"),
        (approximate_entropy([1, 1], 2), "no sequence is longer than 2"),
        (approximate_entropy(Tokens.joined([[1], [1], [1]])), "no sequence is longer than 1"),
        (regularity([]), "no sequence is longer than 1"),
        (regularity([4, 4, 4, 4]), "there is one symbol, so no other order"),
        (regularity([*range(200), 0]), "too short: in no order does a pair of tokens occur twice"),
        (sample_entropy([1, 2, 1, 3]), "no pair of tokens occurs twice"),
        (shannon([]), "there are no tokens"),
        (compression_ratio(["short"]), "5 bytes are fewer than 200"),
    ],
)
def test_what_cannot_be_measured_says_why(measure, why):
    assert (measure.value, measure.why) == (None, why)


def test_a_measure_has_a_value_or_a_reason():
    with pytest.raises(ValueError, match="either"):
        Measure(None)
    with pytest.raises(ValueError, match="either"):
        Measure(1.0, "why")
    with pytest.raises(ValueError, match="m must be 1"):
        approximate_entropy([1, 1], 0)


def test_pairs_do_not_cross_sequences():
    ab = [["a", "b"]] * 50
    # Within: always b behind a. Across: "b a" would be seen, too.
    assert approximate_entropy(Tokens.joined(ab)).value == pytest.approx(-math.log(2))
    assert sample_entropy(Tokens.joined(ab)).value == 0.0
    one = Tokens.of(["a", "b"] * 50)
    assert approximate_entropy(one).value == pytest.approx(0, abs=1e-3)


def markov(states: int, noise: float, n: int, random: np.random.Generator) -> np.ndarray:
    """A cycle that is left for a state drawn at random with probability ``noise``."""
    x = np.empty(n, dtype=np.int64)
    state = 0
    for i, (jump, to) in enumerate(zip(random.random(n) < noise, random.integers(states, size=n), strict=True)):
        state = to if jump else (state + 1) % states
        x[i] = state
    return x


def test_regularity_is_one_for_independent_symbols_and_the_rate_over_the_entropy_for_a_chain():
    random = np.random.default_rng(0)
    chance = regularity(random.integers(22, size=20_000))
    assert chance.value == pytest.approx(1, abs=4 * chance.spread)
    chain = regularity(markov(22, 0.3, 100_000, random))
    stay, leave = 0.7 + 0.3 / 22, 0.3 / 22
    rate = -(stay * math.log(stay) + 21 * leave * math.log(leave))
    assert chain.value == pytest.approx(rate / math.log(22), abs=0.01)
    assert chain.spread < 0.001
    assert chain.value == pytest.approx(chain.observed / chain.surrogate)


def test_regularity_is_the_same_for_other_names_and_the_same_seed():
    random = np.random.default_rng(1)
    x = markov(9, 0.4, 500, random)
    named = np.array([f"item {i}" for i in random.permutation(9)], dtype=object)[x]
    assert regularity(x) == regularity(named)
    assert regularity(x) != regularity(x, seed=1)


def test_surrogates_keep_the_words_of_the_corpus_and_the_lengths_of_its_texts():
    """Texts of one word repeated: shuffled within each nothing would change, over all of them everything does."""
    texts = Tokens.joined([[i] * 10 for i in range(30)])
    found = regularity(texts)
    assert found.value < 0.05
    shuffled = np.random.default_rng(0).permutation(texts.codes)
    assert found.surrogate == pytest.approx(approximate_entropy(Tokens(shuffled, texts.offsets)).value, rel=0.05)


def test_shannon():
    assert shannon(["a", "b", "a", "b"]).value == pytest.approx(math.log(2))
    assert shannon([3, 3, 3]).value == 0
    assert shannon([1, 1, 1, 2]).value == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_compression_takes_bytes_that_are_said():
    texts = ["Wo ist meine Karte?", "Où est ma carte ?"] * 10
    raw = "\n".join(texts).encode()
    assert compression_ratio(texts).value == len(zlib.compress(raw, 9)) / len(raw)
    ids = np.random.default_rng(0).integers(1000, 1300, size=1000)
    named = compression_ratio(Tokens.of(ids))
    assert named == compression_ratio(Tokens.of([f"n{i}" for i in ids]))
    _, first, codes = np.unique(ids, return_index=True, return_inverse=True)
    renumbered = np.argsort(np.argsort(first))[codes].astype("<u2").tobytes()  # more than 256 symbols: two bytes each
    assert named.value == len(zlib.compress(renumbered, 9)) / 2000
    assert compression_ratio(Tokens.of([0, 1] * 500)).value < 0.03
    assert compression_ratio(["\ud800" * 200]).value < 0.2  # half a character, as broken exports have them


def test_texts_of_a_client_are_told_from_the_same_words_at_random():
    """Eighty sentences, about a thousand words: the size of a small client."""
    table, _ = load(DataSection(), seed=0)
    random = np.random.default_rng(0)
    natural = [words(table.inputs[i]) for i in random.permutation(len(table.inputs))[:80]]
    pool = [word for text in table.inputs for word in words(text)]
    scrambled = [random.choice(pool, len(text)).tolist() for text in natural]
    one, other, half = (regularity(Tokens.joined(each)) for each in (natural, scrambled, natural[:40] + scrambled[40:]))
    assert one.value < 1 - 10 * one.spread
    assert other.value == pytest.approx(1, abs=4 * other.spread)
    assert 0 < (1 - half.value) / (1 - one.value) < 0.45  # as the square of the share, so about a quarter
