"""Ranks at equal bytes: against trying every rank."""

from __future__ import annotations

import math
from typing import Any

import equal_bytes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.federation.setup import prepare
from folklora.recipe import Recipe


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 1500))
def test_closest_is_the_closest_of_all_ranks_and_the_smallest_of_those(steps: list[int], budget: int) -> None:
    table = [sum(steps[: rank + 1]) for rank in range(len(steps))]
    found = equal_bytes.closest(lambda rank: table[rank - 1], budget, len(table))
    distances = [abs(size - budget) for size in table]
    assert abs(table[found - 1] - budget) == min(distances)


@pytest.fixture(scope="module")
def setup() -> Any:
    return prepare(Recipe.parse({"data": {"limit": 200, "clients": 4, "min_examples": 3}}))


@pytest.mark.parametrize("method", ["ffa", "fedsa", "rolora", "celora", "folklora", "loraxs"])
def test_an_entry_costs_what_the_budget_is_as_closely_as_any_rank_does(setup: Any, method: str) -> None:
    budget = equal_bytes.round_bytes(setup, "fedit")
    entry = equal_bytes.entry(setup, method, budget)
    assert entry is not None
    rank = int(entry.split("adapter.rank=")[1].split(":")[0])
    assert entry.endswith(f":adapter.alpha={2 * rank}")  # alpha / rank as in the recipe, 16 / 8
    distance = abs(equal_bytes.round_bytes(setup, entry) - budget)
    for other in (rank - 1, rank + 1):
        assert distance <= abs(equal_bytes.round_bytes(setup, f"{method}:adapter.rank={other}") - budget)


@pytest.mark.parametrize("method", ["local", "sketch", "fedit"])
def test_what_sends_nothing_or_costs_the_budget_anyway_needs_no_entry(setup: Any, method: str) -> None:
    assert equal_bytes.entry(setup, method, equal_bytes.round_bytes(setup, "fedit")) is None


def test_where_factors_alternate_the_whole_run_counts(setup: Any) -> None:
    """Up go the head and one factor, down comes the whole model from the second round on."""
    shapes = setup.method.adapter.shapes(8)
    a, b = (4 * sum(math.prod(shape) for name, shape in shapes.items() if name[0] == kind) for kind in "AB")
    head, rounds = 4 * sum(map(math.prod, setup.method.context.head.values())), setup.recipe.train.rounds
    up, down = head + (a + b) / 2, head + b + a * (rounds - 1) / rounds
    assert equal_bytes.round_bytes(setup, "rolora") == pytest.approx(up + down, rel=0.02)
    assert equal_bytes.round_bytes(setup, "fedit") == pytest.approx(2 * (head + a + b), rel=0.02)


def test_ranks_that_a_method_refuses_are_passed_over(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def even_only(_setup: Any, text: str) -> int:
        _, _, rank = text.partition("adapter.rank=")
        if int(rank or 8) % 2:
            raise equal_bytes.FolkLoraError("odd")
        return 10 * int(rank or 8)

    monkeypatch.setattr(equal_bytes, "round_bytes", even_only)
    assert equal_bytes.entry(setup, "fedit", 209) == "fedit:adapter.rank=20:adapter.alpha=40"
