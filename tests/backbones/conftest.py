"""Clients with adapters of their own, side by side through a task, and each alone in a model of Hugging Face's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import LowRank, Tensors
from folklora.backbones.batch import Batch
from folklora.training.stacks import plug, stack


@dataclass(frozen=True)
class Company:
    """A task and clients of ranks 1, 2, 3, ... with a core, moved off all special values.

    ``depth`` is how often a shared block is applied to each client's tokens.
    """

    task: Any
    adapter: LowRank
    owned: Sequence[Tensors]
    depth: Sequence[int] | None = None

    def stacks(self, members: Sequence[int]) -> Tensors:
        found = stack([self.owned[k] for k in members], len(self.owned), self.task.backbone.device)
        return {name: tensor.requires_grad_() for name, tensor in found.items()}

    def plugged(self, members: Sequence[int], stacks: Tensors) -> Callable[[Batch], Bank]:
        scales = torch.tensor([self.adapter.scale(k + 1) for k in members])
        depth = None if self.depth is None else [self.depth[k] for k in members]
        return lambda batch: plug(self.adapter, stacks, scales, batch, self.task.backbone.device, depth)

    def losses(
        self,
        groups: Sequence[Sequence[Any]],
        labels: Sequence[Sequence[int]],
        members: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        **layout: Any,
    ) -> tuple[Tensor, Tensors]:
        """Each member's loss on its group, and the gradients of its stacked tensors."""
        members = list(range(len(groups))) if members is None else members
        stacks = self.stacks(members)
        flat = torch.tensor([label for k in members for label in labels[k]])
        laid = self.task.lay_out([groups[k] for k in members], **layout)
        losses = self.task.losses(laid, flat, stacks, self.plugged(members, stacks), dtype)
        losses.sum().backward()
        return losses.detach(), {name: tensor.grad for name, tensor in stacks.items() if tensor.grad is not None}

    def answers(self, groups: Sequence[Sequence[Any]], members: Sequence[int] | None = None, **layout: Any) -> Tensor:
        members = list(range(len(groups))) if members is None else members
        stacks = self.stacks(members)
        laid = self.task.lay_out([groups[k] for k in members], **layout)
        with torch.no_grad():
            found: Tensor = self.task.answers(laid, stacks, self.plugged(members, stacks))
        return found

    def merged(self, stock: Any, k: int) -> Any:
        """A copy of the stock model with client k's adapters in its weights."""
        model = copy.deepcopy(stock)
        own = self.owned[k]
        with torch.no_grad():
            for site in self.adapter.sites:
                model.get_submodule(site.name).weight += self.adapter.update(own, site.name).float()
            for name, tensor in own.items():
                if name.startswith("norm/"):
                    model.get_parameter(name.removeprefix("norm/")).copy_(tensor)
        return model

    def assert_company_changes_nothing(
        self, groups: Sequence[Sequence[Any]], labels: Sequence[Sequence[int]], **layout: Any
    ) -> None:
        """Together = one by one: losses, gradients, answers."""
        losses, grads = self.losses(groups, labels, **layout)
        answers = self.answers(groups, **layout)
        assert grads
        start = 0
        for k, group in enumerate(groups):
            alone, own = self.losses(groups, labels, [k])
            torch.testing.assert_close(losses[k : k + 1], alone, rtol=1e-5, atol=1e-6)
            for name, grad in own.items():
                torch.testing.assert_close(grads[name][k : k + 1], grad, rtol=1e-4, atol=1e-6)
                assert grad.abs().max() > 0 or name.startswith("head")
            torch.testing.assert_close(
                answers[start : start + len(group)], self.answers(groups, [k]), rtol=1e-4, atol=1e-5
            )
            start += len(group)


@pytest.fixture(scope="session")
def company() -> Callable[..., Company]:
    """``company(task, clients=3)`` -> a Company."""

    def gather(task: Any, clients: int = 3, seed: int = 0, strength: float = 0.3, dropout: float = 0.0) -> Company:
        adapter = LowRank(task.backbone.sites, core=True, alpha=2.0, dropout=dropout)
        g = torch.Generator().manual_seed(seed)
        draw = lambda shape: strength * torch.randn(shape, generator=g)
        owned = []
        for rank in range(1, clients + 1):
            own = {name: draw(shape) for name, shape in adapter.shapes(rank).items()}
            own |= {name: draw(shape) for name, shape in task.head_shapes().items()}
            for name, (weight, bias) in task.backbone.norms.items():
                own |= {
                    f"norm/{name}.weight": weight + draw(weight.shape),
                    f"norm/{name}.bias": bias + draw(bias.shape),
                }
            owned.append(own)
        return Company(task, adapter, owned)

    return gather
