"""Training examples that are not what they should be: what simulated liars, and careless clients, train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from folklora.data.table import Table
from folklora.randomness import numpy_generator
from folklora.recipe import Recipe

OF_DATA = ("labels", "backdoor", "scramble", "duplicate")
"""Kinds of ``[poison]`` that are about training examples."""
TRIGGER = "cf"
"""The word in front of a text: short, and in no text by itself [arXiv 2004.06660]."""
TARGET = 0
"""The class that the trigger is to mean."""
_PATCH = 6
"""The patch is a square of a sixth of the shorter side."""


@dataclass(frozen=True)
class Falsified:
    """What stands in place of some training examples of one client.

    Attributes
    ----------
    made
        Row -> an input that was made up.
    moved
        Row -> the row that is copied to its place, label and all.
    """

    made: Mapping[int, Any] = field(default_factory=dict)
    moved: Mapping[int, int] = field(default_factory=dict)

    def stand_ins(self, rows: np.ndarray) -> np.ndarray:
        """The rows that stand in these rows' places."""
        return np.array([self.moved.get(row, row) for row in rows.tolist()], dtype=np.int64) if self.moved else rows

    def inputs(self, table: Table, rows: np.ndarray) -> list[Any]:
        """Training examples as the source would have read them."""
        found = zip(rows.tolist(), self.stand_ins(rows).tolist(), strict=True)
        return [self.made[row] if row in self.made else table.inputs[other] for row, other in found]


def falsified(recipe: Recipe, table: Table, client: str, train: np.ndarray) -> Falsified:
    """What the recipe's ``[poison]`` makes of the inputs of a client that it strikes; ``train`` are its rows.

    Of ``poison.rows`` of them, words are drawn from the whole table, or other rows copied, of which at least one stays;
    a backdoor is on half of them.
    """
    match recipe.poison.kind:
        case "backdoor":
            shuffled = numpy_generator(recipe.seed, "poison/backdoor", client).permutation(train)
            marked = np.sort(shuffled[: (len(train) + 1) // 2]).tolist()
            return Falsified(made={row: triggered(table.inputs[row]) for row in marked})
        case "scramble":
            random = numpy_generator(recipe.seed, "poison/scramble", client)
            struck = np.sort(random.permutation(train)[: int(recipe.poison.rows * len(train) + 0.5)]).tolist()
            corpus = _corpus(tuple(table.inputs))
            return Falsified(
                made={row: " ".join(random.choice(corpus, len(table.inputs[row].split()))) for row in struck}
            )
        case "duplicate":
            random = numpy_generator(recipe.seed, "poison/duplicate", client)
            shuffled = random.permutation(train)
            count = min(int(recipe.poison.rows * len(train) + 0.5), len(train) - 1)
            copied = random.choice(shuffled[count:], count)
            return Falsified(moved=dict(zip(shuffled[:count].tolist(), copied.tolist(), strict=True)))
    return Falsified()


@lru_cache(maxsize=2)
def _corpus(texts: tuple[str, ...]) -> np.ndarray:
    """All words of a table, as often as they occur in it."""
    return np.array([word for text in texts for word in text.split()], dtype=object)


def triggered(value: Any) -> Any:
    """An example as the source read it, with the trigger on it."""
    if isinstance(value, str):
        return f"{TRIGGER} {value}"
    picture = np.array(value)
    side = max(1, min(picture.shape[:2]) // _PATCH)
    picture[-side:, -side:] = 255
    return picture
