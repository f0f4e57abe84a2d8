"""Many models as rows of one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors


class Rows:
    """The trained numbers of K slots as one [K, P] matrix, with a named leaf tensor [K, ...] into each column range.

    The leaves' gradients are views of one [K, P] matrix too: clipping and the optimiser are then a few whole-matrix
    operations, however many tensors a method trains.
    """

    def __init__(self, values: Tensor, shapes: dict[str, torch.Size], grads: Tensor | None = None) -> None:
        self.values = values
        self.grads = torch.zeros_like(values) if grads is None else grads
        self.leaves: Tensors = {}
        self.columns: dict[str, slice] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + shape.numel()
            self.columns[name] = slice(start, stop)
            leaf = values[:, start:stop].view(-1, *shape).requires_grad_()
            leaf.grad = self.grads[:, start:stop].view(-1, *shape)
            self.leaves[name] = leaf
            start = stop
