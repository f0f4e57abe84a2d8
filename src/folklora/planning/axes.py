"""What is planned: ranks, adapted layers, shares of the data; and the recipe of each combination.

For adapters N is the number of adapted layers and d is the rank: our extension of the law, not the paper's [recon].
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from folklora.errors import RecipeError, no_such
from folklora.federation.setup import data_of, task_of
from folklora.recipe import Recipe

RANK, LAYERS, DATA = "adapter.rank", "layers", "data"
KEYS = (RANK, LAYERS, DATA)
MOST_CELLS = 10_000


@dataclass(frozen=True, order=True)
class Cell:
    """One combination.

    Attributes
    ----------
    layers
        The topmost so many of the layers that the recipe adapts.
    rank
        Of every client.
    data
        Share of each client's training examples.
    """

    layers: int
    rank: int
    data: float

    @property
    def label(self) -> str:
        return f"layers-{self.layers}__rank-{self.rank}__data-{self.data:g}"

    @property
    def sizes(self) -> tuple[int, int, float]:
        return self.layers, self.rank, self.data


@dataclass(frozen=True)
class Axes:
    """Levels of each size, rising."""

    layers: tuple[int, ...]
    rank: tuple[int, ...]
    data: tuple[float, ...]

    def cells(self) -> list[Cell]:
        return [Cell(*sizes) for sizes in product(self.layers, self.rank, self.data)]

    def small(self) -> list[Cell]:
        """The cells without the largest level of a size that has three levels or more: what a plan is fitted to."""
        kept = [levels[:-1] if len(levels) > 2 else levels for levels in (self.layers, self.rank, self.data)]
        return Axes(*kept).cells()  # type: ignore[arg-type]


def parse_axes(texts: Sequence[str], recipe: Recipe) -> Axes:
    """``["adapter.rank=1,2,4", "layers=1,3,6", "data=0.25,0.5,1"]``; what is not named is as the recipe has it.

    Raises
    ------
    RecipeError
        Another name, a level that cannot be, the same twice.
    """
    given: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, sign, rest = text.partition("=")
        key = key.strip()
        if not sign:
            raise RecipeError(f"--axes {text!r}; allowed: NAME=LEVEL,LEVEL,... such as adapter.rank=1,2,4")
        if key not in KEYS:
            raise RecipeError(f"--axes {key}: {no_such('axis', key, KEYS)}")
        if key in given:
            raise RecipeError(f"--axes {key} is given twice; allowed: all its levels in one, with commas")
        given[key] = _levels(key, rest)
    sites = layers_of(recipe)
    if max(given.get(LAYERS, (1,))) > len(sites):
        raise RecipeError(
            f"--axes layers={max(given[LAYERS])}: the recipe adapts {len(sites)} layers; allowed: 1 to {len(sites)}"
        )
    rank = recipe.adapter.rank
    if RANK not in given and (not isinstance(rank, int) or recipe.adapter.device_ranks):
        raise RecipeError("--axes without adapter.rank, and the recipe has several ranks; allowed: adapter.rank=...")
    cells = math.prod(len(levels) for levels in given.values())
    if cells > MOST_CELLS:
        raise RecipeError(f"--axes: {cells:,} combinations; allowed: at most {MOST_CELLS:,}")
    return Axes(
        given.get(LAYERS, (max(1, len(sites)),)),
        given.get(RANK, (rank,)),
        given.get(DATA, (recipe.data.train_share,)),
    )


def _levels(key: str, text: str) -> tuple[Any, ...]:
    what = "shares above 0, at most 1" if key == DATA else "whole numbers from 1 to 4096"
    found: list[float | int] = []
    for word in text.split(","):
        try:
            value = float(word) if key == DATA else int(word)
        except ValueError:
            raise RecipeError(f"--axes {key}={text}: {word.strip()!r}; allowed: {what}") from None
        if not (0 < value <= 1 if key == DATA else 1 <= value <= 4096):
            raise RecipeError(f"--axes {key}={text}: {word.strip()!r}; allowed: {what}")
        found.append(value)
    if len(set(found)) < len(found):
        raise RecipeError(f"--axes {key}={text} names a level twice; allowed: each once")
    return tuple(sorted(found))


# -- layers of a backbone ----------------------------------------------------------------------------------------------

_NUMBERED = re.compile(r"(.*?\.)??(\d+)\.(.+)")


def layers_of(recipe: Recipe) -> dict[str, list[str]]:
    """The layers that the recipe adapts, from the lowest: ``encoder.layer.3.`` -> the names behind it.

    A layer is what stands before the first number in a site's name, and the number. Sites without one are in none.
    """
    return _layers([site.name for site in task_of(recipe, data_of(recipe).table.classes).backbone.sites])


def _layers(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if (match := _NUMBERED.fullmatch(name)) is not None:
            found.setdefault((match[1] or "", int(match[2])), []).append(match[3])
    return {f"{stack}{number}.": found[stack, number] for stack, number in sorted(found)}


def recipe_of(cell: Cell, recipe: Recipe, seed: int) -> Recipe:
    """The recipe of one combination.

    Raises
    ------
    RecipeError
        If fewer layers are asked for, and the backbone's cannot be told apart.
    """
    layers = layers_of(recipe)
    changes: dict[str, Any] = {"rank": cell.rank, "device_ranks": None, "device_shares": None}
    if cell.layers < len(layers):
        stacks = {name.rstrip(".").rpartition(".")[0] for name in layers}
        if len(stacks) > 1:
            raise RecipeError(
                f"layers = {cell.layers}: the adapted layers are of several towers ({', '.join(sorted(stacks))}); "
                'allowed: adapter.tower = "image" or "text", or adapter.targets within one of them'
            )
        top = list(layers)[-cell.layers :]
        rest = list(dict.fromkeys(name for layer in top for name in layers[layer]))
        each = "|".join(re.escape(layer) for layer in top)
        changes["targets"] = f"(?:{each})(?:{'|'.join(map(re.escape, rest))})"
    document = recipe.model_dump()
    document["seed"] = seed
    document["adapter"].update(changes)
    document["data"]["train_share"] = cell.data
    return Recipe.parse(document, where=cell.label)


def cell_of(recipe: Recipe) -> Cell:
    """Where a finished run stands, by how many layers it adapts; RecipeError where its clients have several ranks."""
    rank = recipe.adapter.rank
    if not isinstance(rank, int) or recipe.adapter.device_ranks or recipe.adapter.promote:
        raise RecipeError("its clients have several ranks; allowed: runs with one rank for all")
    return Cell(max(1, len(layers_of(recipe))), rank, recipe.data.train_share)
