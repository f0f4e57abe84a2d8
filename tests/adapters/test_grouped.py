"""Grouped products against loops over groups; first and second derivatives by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folklora.adapters.grouped import grouped_linear, grouped_matmul, grouped_outer, padded_matmul, padded_outer

Product = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]

SIZES = {
    "one": (4,),
    "equal": (3, 3, 3),
    "unequal": (2, 5, 1),
    "first empty": (0, 3, 2),
    "middle empty": (2, 0, 3),
    "last empty": (3, 0),
    "all empty": (0, 0),
}


def bounds(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(sizes, initial=0))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def operands(product: Product, sizes: tuple[int, ...], p: int, q: int) -> tuple[Tensor, Tensor]:
    rows, groups = sum(sizes), len(sizes)
    second = {grouped_matmul: (groups, p, q), grouped_linear: (groups, q, p), grouped_outer: (rows, q)}[product]
    return draw(rows, p), draw(*second, seed=1)


def loops(product: Product, x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The definition, group by group."""
    pieces = list(x.split(list(sizes)))
    if product is grouped_outer:
        return torch.stack([piece.T @ other for piece, other in zip(pieces, y.split(list(sizes)), strict=True)])
    weights = list(y) if product is grouped_matmul else [weight.T for weight in y]
    return torch.cat([piece @ weight for piece, weight in zip(pieces, weights, strict=True)])


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), p=st.integers(1, 4), q=st.integers(1, 4))
def test_padded_to_the_longest_it_is_the_same(sizes: list[int], p: int, q: int) -> None:
    """What a GPU computes, whose loops over groups would be many small kernels."""
    bound = bounds(tuple(sizes))
    for product, padded in ((grouped_matmul, padded_matmul), (grouped_outer, padded_outer)):
        x, y = operands(product, tuple(sizes), p, q)
        torch.testing.assert_close(padded(x, y, bound), loops(product, x, y, tuple(sizes)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("product", [grouped_matmul, grouped_linear, grouped_outer])
@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), p=st.integers(1, 4), q=st.integers(1, 4))
def test_equals_loops_over_groups(product: Product, sizes: list[int], p: int, q: int) -> None:
    x, y = operands(product, tuple(sizes), p, q)
    got = product(x, y, bounds(tuple(sizes)))
    torch.testing.assert_close(got, loops(product, x, y, tuple(sizes)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("product", [grouped_matmul, grouped_linear, grouped_outer])
def test_first_and_second_derivatives(product: Product, sizes: tuple[int, ...]) -> None:
    x, y = (operand.requires_grad_() for operand in operands(product, sizes, 3, 2))
    function = lambda x, y: product(x, y, bounds(sizes))
    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))


@pytest.mark.parametrize("product", [grouped_matmul, grouped_linear, grouped_outer])
def test_only_the_gradients_asked_for(product: Product) -> None:
    for asked in (0, 1):
        pair = list(operands(product, (2, 3), 3, 2))
        pair[asked].requires_grad_()
        product(*pair, bounds((2, 3))).sum().backward()  # the sum's gradient is an expanded, non-contiguous one
        reference = [operand.detach().clone() for operand in pair]
        reference[asked].requires_grad_()
        loops(product, *reference, (2, 3)).sum().backward()
        torch.testing.assert_close(pair[asked].grad, reference[asked].grad)
        assert pair[1 - asked].grad is None


@pytest.mark.parametrize("sizes", [(3, 3), (2, 4)])
@pytest.mark.parametrize("product", [grouped_matmul, grouped_linear, grouped_outer])
def test_operands_need_not_be_contiguous(product: Product, sizes: tuple[int, ...]) -> None:
    x, y = operands(product, sizes, 3, 2)
    strided = [operand.transpose(-1, -2).contiguous().transpose(-1, -2) for operand in (x, y)]
    torch.testing.assert_close(product(*strided, bounds(sizes)), loops(product, x, y, sizes))


def test_a_group_of_no_rows_has_a_zero_outer_product_and_a_zero_gradient() -> None:
    x, y = operands(grouped_outer, (2, 0, 3), 3, 2)
    assert not grouped_outer(x, y, bounds((2, 0, 3)))[1].any()
    weight = draw(3, 3, 2).requires_grad_()
    grouped_matmul(x, weight, bounds((2, 0, 3))).sum().backward()
    assert weight.grad is not None
    assert not weight.grad[1].any()
    assert weight.grad[0].any()


def test_what_is_not_a_number_stays_in_its_group() -> None:
    for sizes in ((2, 2), (2, 3)):
        x, weight = operands(grouped_matmul, sizes, 3, 2)
        x[0] = torch.nan
        x.requires_grad_()
        weight.requires_grad_()
        y = grouped_matmul(x, weight, bounds(sizes))
        y.square().sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        assert y[2:].isfinite().all()
        assert x.grad[2:].isfinite().all()
        assert weight.grad[1].isfinite().all()
        assert not weight.grad[0].isfinite().any()
