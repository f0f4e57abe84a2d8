"""Products of many small matrices with the consecutive groups of rows of one big one.

K clients share a forward pass: their rows lie one behind the other in ``x [T, d]``, client k owning
``x[offsets[k]:offsets[k + 1]]``, and each client multiplies its rows with a matrix of its own. The three products below
are closed under differentiation (each one's gradients are the other two), so a backward pass, and a backward pass
through a backward pass, cost no other kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Offsets = Sequence[int]
"""K + 1 row numbers: group k is ``offsets[k]:offsets[k + 1]``; groups may be empty."""


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Offsets) -> Tensor:
    """``y_k = x_k W_k``: [T, p] by [K, p, q] -> [T, q]."""
    if not torch.is_grad_enabled():  # what stands around it costs a small product several times over
        return _matmul(x.contiguous(), weight, offsets)
    return _Matmul.apply(x, weight, offsets)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Offsets) -> Tensor:
    """``y_k = x_k W_k^T``: [T, p] by [K, q, p] -> [T, q]; as ``torch.nn.functional.linear``."""
    if not torch.is_grad_enabled():
        return _matmul(x.contiguous(), weight.transpose(1, 2), offsets)
    return _Linear.apply(x, weight, offsets)


def grouped_outer(x: Tensor, y: Tensor, offsets: Offsets) -> Tensor:
    """``W_k = x_k^T y_k``: [T, p] by [T, q] -> [K, p, q]."""
    return _Outer.apply(x, y, offsets)


def _equal(offsets: Offsets) -> bool:
    size = offsets[1] - offsets[0]
    return all(offsets[k + 1] - offsets[k] == size for k in range(len(offsets) - 1))


def _matmul(x: Tensor, weight: Tensor, offsets: Offsets) -> Tensor:
    groups = len(offsets) - 1
    if _equal(offsets):
        return torch.bmm(x.view(groups, -1, x.shape[1]), weight).view(x.shape[0], weight.shape[2])
    if x.is_cuda:
        return padded_matmul(x, weight, offsets)
    y = x.new_empty(x.shape[0], weight.shape[2])
    for k in range(groups):
        start, stop = offsets[k], offsets[k + 1]
        torch.mm(x[start:stop], weight[k], out=y[start:stop])
    return y


def _outer(x: Tensor, y: Tensor, offsets: Offsets) -> Tensor:
    groups = len(offsets) - 1
    if _equal(offsets):
        return torch.bmm(x.view(groups, -1, x.shape[1]).transpose(1, 2), y.view(groups, -1, y.shape[1]))
    if x.is_cuda:
        return padded_outer(x, y, offsets)
    out = x.new_empty(groups, x.shape[1], y.shape[1])
    for k in range(groups):
        start, stop = offsets[k], offsets[k + 1]
        torch.mm(x[start:stop].T, y[start:stop], out=out[k])
    return out


# Groups of unequal size as one batched product: on a GPU a hundred small kernels cost more than some rows of zeros.


def padded_matmul(x: Tensor, weight: Tensor, offsets: Offsets) -> Tensor:
    """`grouped_matmul`'s product, each group padded with zeros to the longest."""
    rows, places = _padding(tuple(offsets), x.device)
    return torch.bmm(_padded(x, rows), weight).flatten(0, 1)[places]


def padded_outer(x: Tensor, y: Tensor, offsets: Offsets) -> Tensor:
    """`grouped_outer`'s product, likewise."""
    rows, _ = _padding(tuple(offsets), x.device)
    return torch.bmm(_padded(x, rows).transpose(1, 2), _padded(y, rows))


def _padded(x: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[rows]


@lru_cache(maxsize=8)
def _padding(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[K, longest]: the rows of each group, padded with T, one past the last; [T]: where each row then lies."""
    starts = torch.tensor(offsets)
    sizes = starts.diff()
    longest = int(sizes.max())
    within = torch.arange(longest)
    rows = torch.where(within < sizes[:, None], starts[:-1, None] + within, offsets[-1])
    groups = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    places = groups * longest + torch.arange(offsets[-1]) - starts[groups]
    return rows.to(device), places.to(device)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.offsets = offsets
        return _matmul(x.contiguous(), weight, offsets)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx = grouped_linear(grad, weight, ctx.offsets) if ctx.needs_input_grad[0] else None
        dw = grouped_outer(x, grad, ctx.offsets) if ctx.needs_input_grad[1] else None
        return dx, dw, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.offsets = offsets
        return _matmul(x.contiguous(), weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx = grouped_matmul(grad, weight, ctx.offsets) if ctx.needs_input_grad[0] else None
        dw = grouped_outer(grad, x, ctx.offsets) if ctx.needs_input_grad[1] else None
        return dx, dw, None


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, y)
        ctx.offsets = offsets
        return _outer(x.contiguous(), y.contiguous(), offsets)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, y = ctx.saved_tensors
        dx = grouped_linear(y, grad, ctx.offsets) if ctx.needs_input_grad[0] else None
        dy = grouped_matmul(x, grad, ctx.offsets) if ctx.needs_input_grad[1] else None
        return dx, dy, None
