"""How regular sequences of symbols are, by counting what is repeated exactly; all entropies in nats.

Everything takes `Tokens`, or what `Tokens.of` takes (ids or words of one sequence). Where there are several sequences
(`Tokens.offsets`), an m-gram lies within one of them: the last word of a text and the first of the next are no pair.
A sequence shorter than what is counted adds nothing. Ids are names, so two are the same or they are not: a distance
between them, as in the tolerance ``r`` that approximate and sample entropy have for real numbers, would depend on the
numbering. With ``0 <= r < 1`` on integers those are what is computed here.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from folklora.data.audit.measure import Measure
from folklora.data.audit.tokens import Ints, Tokens
from folklora.randomness import numpy_generator

_LEAST_BYTES = 200


@dataclass(frozen=True)
class Regularity(Measure):
    """Approximate entropy as a share of what the same tokens have in random order.

    Attributes
    ----------
    value
        Approximate entropy over the mean of its surrogates. About 1: the order says nothing that can be seen at this
        length. Lower: more regular. None where that cannot be measured.
    spread
        Standard deviation of the surrogates over their mean: how far off 1 chance brings a ``value``. Where there is
        order the value itself varies more than that from sample to sample.
    observed, surrogate
        The approximate entropy of the sequence, and the mean of its surrogates, in nats.
    """

    spread: float | None = None
    observed: float | None = None
    surrogate: float | None = None


def shannon(tokens: Tokens | ArrayLike) -> Measure:
    """Entropy of single symbols, order aside (plug-in: too low by about ``(symbols - 1) / 2n``); 0 for one symbol."""
    tokens = Tokens.of(tokens)
    return Measure(_entropy(_occurrences(tokens.codes))) if len(tokens) else Measure(None, "there are no tokens")


def approximate_entropy(tokens: Tokens | ArrayLike, m: int = 1) -> Measure:
    """Approximate entropy (Pincus 1991) with exact match; O(n log n).

    ``Phi^m - Phi^(m+1)`` with ``Phi^m = mean_i ln C_i^m``, where ``C_i^m`` is the share of the m-grams that equal the
    i-th, itself among them. That is the plug-in entropy of (m+1)-grams less that of m-grams: how uncertain a token is
    after the m before it. Of several sequences all m-grams and all (m+1)-grams count that lie within one. A sequence's
    last m-gram is thus one of the former without a successor, as in the paper, which shows where sequences are very
    short: the value may then be below 0 (fifty times the text "a b" gives -ln 2). It is kept because the entropy of
    m = 1 is then the same for every order of the tokens, which is what makes `regularity` sharp.

    Returns
    -------
    Measure
        Not measurable where no m-gram occurs twice: it is then a constant of the length, whatever the content.
    """
    shorter, longer = _counts(Tokens.of(tokens), m)
    if not longer.size:
        return Measure(None, f"no sequence is longer than {m}")
    if shorter.max() == 1:
        return Measure(None, f"no {_gram(m)} occurs twice")
    return Measure(_entropy(longer) - _entropy(shorter))


def regularity(tokens: Tokens | ArrayLike, m: int = 1, shuffles: int = 20, seed: int = 0) -> Regularity:
    """`approximate_entropy` over its mean for ``shuffles`` random orders of the same tokens.

    Tokens are shuffled over all sequences, whose lengths stay: a surrogate has the words of the corpus in its texts, at
    random. The same data and seed give the same number.

    Returns
    -------
    Regularity
        Not measurable where approximate entropy is not, where there is one symbol, or where no (m+1)-gram occurs twice
        in any order.

    Notes
    -----
    The ratio takes away most of the bias that a short sequence gives to entropy, not all: order that is not repeated
    yet cannot be seen, so it falls as more is read (Banking77: .80 at 2000 words, .66 at 100,000). Compare what is of
    one length, and of one kind: clean texts of two sorts differ by more than some noise does.

    Texts all of whose words are drawn at random from their corpus are told from natural ones from 200 to 500 words on,
    not where a part of the texts is so, and not well at 100 where texts are as varied as GoEmotions'. What is left of
    the order, ``1 - value``, goes as the square of the share of natural texts where these are many and short, because a
    pair counts where it is met twice; with few long texts, which repeat themselves, rather as the share.
    ``docs/audit.md`` has figures.
    """
    tokens = Tokens.of(tokens)
    found = approximate_entropy(tokens, m)
    if found.value is None:
        return Regularity(None, found.why)
    if tokens.symbols == 1:
        return Regularity(None, "there is one symbol, so no other order")
    random = numpy_generator(seed, "audit/surrogates")
    surrogates = np.empty(shuffles)
    repeated = _counts(tokens, m)[1].max() > 1
    for i in range(shuffles):
        shorter, longer = _counts(Tokens(random.permutation(tokens.codes), tokens.offsets), m)
        surrogates[i] = _entropy(longer) - _entropy(shorter)
        repeated |= longer.max() > 1
    mean = float(surrogates.mean())
    if mean <= 0 or not repeated:
        return Regularity(None, f"too short: in no order does a {_gram(m + 1)} occur twice")
    return Regularity(found.value / mean, None, float(surrogates.std(ddof=1)) / mean, found.value, mean)


def sample_entropy(tokens: Tokens | ArrayLike, m: int = 1) -> Measure:
    """Sample entropy (Richman and Moorman 2000) with exact match; O(n log n).

    ``-ln(A / B)``: of the pairs of equal m-grams that both have a successor, ``A`` also have the same one.

    Returns
    -------
    Measure
        Not measurable where ``A`` or ``B`` is 0.
    """
    tokens = Tokens.of(tokens)
    longer = tokens.grams(m + 1)
    if not longer.size:
        return Measure(None, f"no sequence is longer than {m}")
    # The m-grams that have a successor are the (m+1)-grams without their last token.
    b, a = _pairs(tokens.grams(m, followed=True)), _pairs(longer)
    if not b:
        return Measure(None, f"no {_gram(m)} that goes on occurs twice")
    return Measure(float(np.log(b / a))) if a else Measure(None, f"no {_gram(m + 1)} occurs twice")


def compression_ratio(texts: Sequence[str] | Tokens) -> Measure:
    """Bytes that zlib (level 9) makes of the data, over the bytes that they are.

    Texts are joined by line feeds, in UTF-8. Tokens are their codes (in the order of first appearance, so the ids' own
    numbers do not matter), little-endian, in the fewest of 1, 2, 4 or 8 bytes that hold them all, without the offsets.
    zlib sees no repeat further apart than 32 KiB, and another zlib may give slightly another number.

    Returns
    -------
    Measure
        Not measurable below 200 bytes, where zlib's own header and tables weigh too much.
    """
    if isinstance(texts, Tokens):
        data = texts.codes.astype(np.min_scalar_type(max(texts.symbols - 1, 0)).newbyteorder("<")).tobytes()
    else:
        data = "\n".join(texts).encode("utf-8", "surrogatepass")
    if len(data) < _LEAST_BYTES:
        return Measure(None, f"{len(data)} bytes are fewer than {_LEAST_BYTES}")
    return Measure(len(zlib.compress(data, 9)) / len(data))


def _gram(m: int) -> str:
    return {1: "token", 2: "pair of tokens"}.get(m, f"run of {m} tokens")


def _entropy(counts: Ints) -> float:
    """Plug-in entropy of what was counted, in nats."""
    total = counts.sum()
    return float(np.log(total) - (counts * np.log(counts)).sum() / total)


def _occurrences(grams: Ints) -> Ints:
    """How often each number occurs, of those that do."""
    if not grams.size:
        return np.zeros(0, dtype=np.int64)
    if grams.max() <= 4 * grams.size:
        counts = np.bincount(grams)
        return counts[counts > 0]
    ordered = np.sort(grams)
    return np.diff(np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])))


def _counts(tokens: Tokens, m: int) -> tuple[Ints, Ints]:
    """How often each m-gram and each (m+1)-gram occurs, as `approximate_entropy` counts them."""
    return _occurrences(tokens.grams(m)), _occurrences(tokens.grams(m + 1))


def _pairs(grams: Ints) -> int:
    counts = _occurrences(grams)
    return int((counts * (counts - 1)).sum()) // 2
