"""The entropy rate of a sequence, from how far each of its places repeats an earlier one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from folklora.data.audit.measure import Measure
from folklora.data.audit.tokens import Ints, Tokens


def entropy_rate(tokens: Tokens | ArrayLike) -> Measure:
    """Entropy rate in nats a token (Kontoyiannis, Algoet, Suhov and Wyner 1998), with a growing window.

    ``[mean_i Lambda_i / ln(i + 1)]^-1`` where ``Lambda_i``, ``i = 1 .. n``, is the length of the shortest piece that
    begins at ``i`` and begins nowhere before it; the two may overlap, and neither leaves its sequence.

    Returns
    -------
    Measure
        Not measurable where nothing is repeated.

    Notes
    -----
    It converges slowly, and from below where symbols are many: of the true rate it gives about .73 and .83 for 22
    equally likely symbols at 1000 and 100,000 tokens, .6 and .74 for 1000 of them, .9 for a chain of 22 that is left at
    random in 30 % of the steps. Ends of sequences cut matches short, which pulls the other way: the same chain cut into
    pieces of 12 tokens gives 1.08 at 1000 tokens and 1.29 at 100,000. ``docs/audit.md`` has figures.
    """
    tokens = Tokens.of(tokens)
    if tokens.symbols == len(tokens):
        return Measure(None, "no token occurs twice" if len(tokens) else "there are no tokens")
    longest = match_lengths(tokens)
    return Measure(float(1 / np.mean((longest + 1) / np.log(np.arange(2, len(longest) + 2)))))


def match_lengths(tokens: Tokens) -> Ints:
    """``[n]`` longest match of what begins at each token with what begins at any earlier one, exactly; O(n log n).

    The two may overlap, and neither leaves its sequence.
    """
    # Each sequence ends with a symbol of its own, so what runs over an end is like nothing else.
    text = np.insert(tokens.codes + tokens.sequences, tokens.offsets[1:], np.arange(tokens.sequences))
    ranks = _ranks(text)
    before, after = _earlier_neighbours(np.argsort(ranks[-1]))
    return np.maximum(_common(ranks, before), _common(ranks, after))[text >= tokens.sequences]


def _ranks(text: Ints) -> list[Ints]:
    """Where the pieces of 1, 2, 4, ... symbols that begin at each place come in sorted order; equal ones are equal.

    In the last all are different: it is the inverse of the suffix array (prefix doubling, Manber and Myers 1993).
    """
    size, ranks = int(text.max()) + 1, [text]
    while size < len(text):
        step = 2 ** (len(ranks) - 1)
        beyond = np.zeros_like(text)
        beyond[:-step] = ranks[-1][step:] + 1
        found, rank = np.unique(ranks[-1] * (size + 1) + beyond, return_inverse=True)
        size = len(found)
        ranks.append(rank)
    return ranks


def _earlier_neighbours(order: Ints) -> tuple[Ints, Ints]:
    """For each place of a suffix array's text, the nearest before and behind it in sorted order that begin earlier.

    Where there is none it is the text's length. All places are strung in sorted order and the last of the text is taken
    out again and again: its neighbours are then all that begin earlier.
    """
    n = len(order)
    closed = np.concatenate([[n], order, [n]])
    before, after = np.empty(n + 1, dtype=np.int64), np.empty(n + 1, dtype=np.int64)
    after[closed[:-1]], before[closed[1:]] = closed[1:], closed[:-1]
    left, right = before.tolist(), after.tolist()
    for place in range(n - 1, -1, -1):
        right[left[place]], left[right[place]] = right[place], left[place]
    return np.array(left[:n]), np.array(right[:n])


def _common(ranks: list[Ints], other: Ints) -> Ints:
    """How many symbols what begins at each place has in common with what begins at ``other`` of it."""
    n = len(other)
    here, there = np.arange(n), np.minimum(other, n - 1)
    length = np.zeros(n, dtype=np.int64)
    for level in range(len(ranks) - 1, -1, -1):
        same = (ranks[level][here] == ranks[level][there]) & (other < n)
        step = np.where(same, 2**level, 0)
        length += step
        here, there = here + step, there + step
    return length
