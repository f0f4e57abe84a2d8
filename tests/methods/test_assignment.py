"""Assignments of experts to clients against all assignments that there are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folklora.errors import MethodError
from folklora.methods.assignment import assign, dealt, refuse_infeasible

SMALL = [(3, 2, 1, 1, 3), (4, 3, 2, 2, 3), (5, 3, 1, 1, 2), (3, 4, 2, 1, 2), (4, 4, 3, 3, 3), (2, 5, 3, 1, 2)]


def everything(experts: int, clients: int, holders: int, least: int, most: int) -> Iterator[Tensor]:
    for chosen in product(list(combinations(range(clients), holders)), repeat=experts):
        held = torch.zeros(experts, clients, dtype=torch.bool)
        for expert, who in enumerate(chosen):
            held[expert, list(who)] = True
        if bool(((held.sum(0) >= least) & (held.sum(0) <= most)).all()):
            yield held


@pytest.mark.parametrize(("experts", "clients", "holders", "least", "most"), SMALL)
@pytest.mark.parametrize("seed", range(3))
def test_no_assignment_scores_higher(
    experts: int, clients: int, holders: int, least: int, most: int, seed: int
) -> None:
    scores = torch.rand(experts, clients, generator=torch.Generator().manual_seed(seed))
    found = assign(scores, holders, least, most)
    possible = list(everything(experts, clients, holders, least, most))
    assert any(torch.equal(found, other) for other in possible)
    best = max(float((scores * other).sum()) for other in possible)
    assert float((scores * found).sum()) == pytest.approx(best, abs=1e-6)


def test_the_bounds_bind() -> None:
    """Everybody would like the first client: it takes as many as it may, and the last one gets what it must have."""
    scores = torch.tensor([0.9, 0.08, 0.02]).repeat(6, 1)
    assert assign(scores, 1, 1, 4).sum(0).tolist() == [4, 1, 1]
    assert assign(scores, 2, 2, 5).sum(0).tolist() == [5, 5, 2]


@pytest.mark.parametrize("scores", [torch.zeros(30, 10), torch.full((30, 10), 0.1), torch.eye(30)[:, :10]])
def test_equal_scores_are_no_trouble(scores: Tensor) -> None:
    found = assign(scores, 2, 2, 8)
    assert bool((found.sum(1) == 2).all())
    assert 2 <= int(found.sum(0).min()) <= int(found.sum(0).max()) <= 8


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 8), st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.integers(0, 9)
)
def test_whatever_is_not_refused_can_be_dealt_and_assigned(
    experts: int, clients: int, holders: int, least: int, most: int, seed: int
) -> None:
    if holders > clients or not least * clients <= experts * holders <= most * clients:
        with pytest.raises(MethodError, match="allowed: ") as caught:
            refuse_infeasible(experts, clients, holders, least, most)
        assert "\n" not in str(caught.value)
        return
    refuse_infeasible(experts, clients, holders, least, most)
    random = torch.Generator().manual_seed(seed)
    even = dealt(experts, clients, holders, random)
    best = assign(torch.rand(experts, clients, generator=random), holders, least, most)
    for held in (even, best):
        assert bool((held.sum(1) == holders).all())
        assert bool(((held.sum(0) >= least) & (held.sum(0) <= most)).all())
    assert int(even.sum(0).max() - even.sum(0).min()) <= 1


def test_dealing_is_by_chance_and_repeats() -> None:
    deal = lambda seed: dealt(30, 10, 2, torch.Generator().manual_seed(seed))
    assert torch.equal(deal(1), deal(1))
    assert not torch.equal(deal(1), deal(2))
    together = deal(1).float().T @ deal(1).float()
    together.fill_diagonal_(0)
    assert int((together > 0).sum(1).min()) >= 3  # nobody shares its experts with the same neighbour only


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((30, 10, 11, 2, 8), "method.holders = 11 of 10 clients; allowed: 1 to 10"),
        ((9, 10, 2, 2, 8), "at least method.min_experts = 2 have 20; allowed: method.domain_experts = 10 to 40, or"),
        ((41, 10, 2, 2, 8), "at most method.max_experts = 8 have 80; allowed: method.domain_experts = 10 to 40, or"),
        ((5, 3, 2, 3, 3), "allowed: another max_experts or holders"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(numbers: tuple[int, int, int, int, int], said: str) -> None:
    with pytest.raises(MethodError) as caught:
        refuse_infeasible(*numbers)
    assert said in str(caught.value)
