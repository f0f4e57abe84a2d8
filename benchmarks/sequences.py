"""Sequences of items for `sequential.py`: the badges of Stack Overflow's users, and a chain whose entropy is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from folklora.randomness import numpy_generator

LENGTH = 51  # the last events of a user: fifty are predicted, each from those before it
SYMBOLS = 50
USERS = {"train": 4000, "validation": 1000, "test": 1000}
LAGS = (0.55, 0.35)  # how much of the next item the last one decides, and the one before it
CHANCE = 0.1  # and what nothing decides
CONCENTRATION = 0.05  # of the Dirichlet distribution that a row of a transition matrix is drawn from
PADDING = -1


@dataclass(frozen=True)
class Sequences:
    """Other users in every split, so what is scored was never trained on.

    Attributes
    ----------
    train, validation, test
        [users, LENGTH] int64, the shorter ones filled with `PADDING` on the right.
    symbols
        Items are 0 to symbols - 1.
    entropy
        Nats an event, where it is known: no model's loss can be below it.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    symbols: int
    entropy: float | None

    def part(self, share: float, seed: int) -> np.ndarray:
        """A share of the training users; a smaller one is part of a larger one."""
        order = numpy_generator(seed, "sequences/part").permutation(len(self.train))
        return self.train[order[: round(share * len(self.train))]]


def badges(path: Path) -> Sequences:
    """Folds 1 to 3 of ``sequences.tsv`` are trained on, 4 validates, 5 tests.

    The folds overlap: a third of the rows are copies, items and times alike. Each user stays in the first fold that has
    it, so nobody who is tested was trained on.
    """
    folds: dict[int, list[list[int]]] = {}
    known: set[tuple[str, str]] = set()
    for line in sorted(path.read_text(encoding="utf-8").splitlines()[1:], key=lambda row: int(row.partition("\t")[0])):
        fold, items, times = line.split("\t")
        if (items, times) in known:
            continue
        known.add((items, times))
        folds.setdefault(int(fold), []).append([int(item) - 1 for item in items.split()][-LENGTH:])
    rows = {fold: _filled(found) for fold, found in folds.items()}
    train = np.concatenate([rows[1], rows[2], rows[3]])
    return Sequences(train, rows[4], rows[5], 1 + max(int(each.max()) for each in rows.values()), None)


def _filled(rows: list[list[int]]) -> np.ndarray:
    filled = np.full((len(rows), LENGTH), PADDING, dtype=np.int64)
    for row, items in zip(filled, rows, strict=True):
        row[: len(items)] = items
    return filled


def markov(chance: float = CHANCE) -> Sequences:
    """A mixture of two lags (Raftery's MTD model): p(c | a, b) = .55 P[b, c] + .35 Q[a, c] + .10 / symbols.

    With more chance, less of both lags.
    """
    scale = (1 - chance) / sum(LAGS)
    lags = [scale * lag for lag in LAGS]
    generator = numpy_generator(0, "sequences/markov")
    last, before = (generator.dirichlet(np.full(SYMBOLS, CONCENTRATION), SYMBOLS) for _ in LAGS)
    # [a, b, c]: what follows b after a
    chain = lags[0] * last[None] + lags[1] * before[:, None] + (1 - sum(lags)) / SYMBOLS
    pairs = np.full((SYMBOLS, SYMBOLS), SYMBOLS**-2)
    for _ in range(10_000):
        following = np.einsum("ab,abc->bc", pairs, chain)
        moved = float(np.abs(following - pairs).sum())
        pairs = following
        if moved < 1e-12:
            break
    entropy = -float(np.einsum("ab,abc,abc->", pairs, chain, np.log(chain)))
    users = sum(USERS.values())
    rows = np.empty((users, LENGTH), dtype=np.int64)
    first = generator.choice(SYMBOLS**2, users, p=pairs.ravel() / pairs.sum())
    rows[:, 0], rows[:, 1] = np.divmod(first, SYMBOLS)
    sums = chain.cumsum(-1)
    for at in range(2, LENGTH):
        drawn = generator.random(users)
        reached = sums[rows[:, at - 2], rows[:, at - 1]]
        rows[:, at] = np.minimum((reached < drawn[:, None]).sum(1), SYMBOLS - 1)
    ends = np.cumsum(list(USERS.values()))
    return Sequences(rows[: ends[0]], rows[ends[0] : ends[1]], rows[ends[1] :], SYMBOLS, entropy)
