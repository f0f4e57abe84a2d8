"""The rank at which a method costs as much a round as another: traffic is predicted, as `folklora inspect` does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from folklora.adapters.lowrank import LowRank
from folklora.errors import FolkLoraError
from folklora.federation.run import variant
from folklora.federation.setup import Setup, context
from folklora.federation.traffic import forecast
from folklora.methods import build

BUDGET = "fedit"
"""Whose bytes a round, at the recipe's rank, the others get."""
ALIKE = 0.02
"""A method within two per cent of the budget as it is needs no second entry."""


def closest(bytes_at: Callable[[int], float], budget: float, largest: int) -> int:
    """The rank from 1 to ``largest`` whose bytes are closest to the budget; of two as close, the smaller.

    ``bytes_at`` does not decrease.
    """
    low, high = 1, largest
    while low < high:  # the smallest rank that reaches the budget, or the largest there is
        middle = (low + high) // 2
        low, high = (middle + 1, high) if bytes_at(middle) < budget else (low, middle)
    below = max(1, low - 1)
    return below if budget - bytes_at(below) <= abs(bytes_at(low) - budget) else low


def round_bytes(setup: Setup, text: str) -> float:
    """Mean bytes of one client and round, up and down, for an entry as `folklora compare --methods` takes it.

    Raises
    ------
    FolkLoraError
        If the method refuses the entry's rank or options.
    """
    recipe = variant(setup.recipe, text, setup.recipe.seed)
    assert isinstance(recipe.adapter.rank, int)
    found = context(recipe, setup.task, dict.fromkeys(setup.ranks, recipe.adapter.rank))
    method = build(recipe.method.name, recipe.method.options, found)
    # Of a whole run: where factors alternate, the first reply is lighter than all others.
    traffic = forecast(method, {next(iter(setup.ranks)): torch.ones(found.classes)}, recipe.message)
    return traffic.up + traffic.down


def entry(setup: Setup, text: str, budget: float) -> str | None:
    """A method's entry at the rank that costs about as much as the budget; the scaling alpha / rank stays.

    None where a rank changes nothing (nothing travels), or where the method costs that much anyway.
    """
    rank = setup.recipe.adapter.rank
    assert isinstance(rank, int)
    largest = LowRank(setup.task.backbone.sites, core=False, alpha=1.0).max_rank()

    @cache
    def at(candidate: int) -> tuple[float, int]:
        """Bytes, and the rank they belong to: the largest up to the candidate that the method takes."""
        for accepted in range(candidate, 0, -1):
            try:
                return round_bytes(setup, f"{text}:adapter.rank={accepted}"), accepted
            except FolkLoraError:  # its heads, say, do not divide this rank
                continue
        return 0, 0

    plain = round_bytes(setup, text)
    if abs(plain - budget) <= ALIKE * budget or plain == at(largest)[0]:
        return None
    found = at(closest(lambda candidate: at(candidate)[0], budget, largest))[1]
    scaling = setup.recipe.adapter.alpha / rank
    return f"{text}:adapter.rank={found}:adapter.alpha={scaling * found:g}" if found not in (0, rank) else None
