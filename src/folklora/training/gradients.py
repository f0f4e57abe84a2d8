"""Gradients with respect to the frozen weights themselves, for methods whose adapter starts from one (Fed-SB)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from folklora.adapters.layers import Bank, SiteStack
from folklora.adapters.lowrank import Tensors
from folklora.backbones.batch import Batch
from folklora.backbones.task import Example, Task


def weight_gradients(
    task: Task,
    examples: Sequence[Example],
    labels: np.ndarray,
    head: Tensors,
    rows: int = 64,
    depth: int | None = None,
) -> Tensors:
    """``grad/<site>`` [d_out, d_in] float32: gradient of the mean loss with respect to each adapted layer's weight.

    Parameters
    ----------
    head
        The client's tensors of `Task.head_shapes`; under a zero head every gradient is zero.
    rows
        Examples of one pass. The result depends on it only where a loss compares examples with each other (captions).
    depth
        How often a shared block is applied; None: as often as the backbone does.
    """
    backbone = task.backbone
    device = backbone.device
    # What a client adds to the frozen weight has that weight's gradient, and no copy of the backbone must be thawed.
    bases = {
        site.name: torch.zeros(1, site.d_out, site.d_in, device=device, requires_grad=True) for site in backbone.sites
    }
    one = torch.ones(1, device=device)
    stacks = {
        site.name: SiteStack(
            torch.zeros(1, 1, site.d_in, device=device),
            torch.zeros(1, 1, site.d_out, device=device),
            None,
            one,
            base=bases[site.name],
        )
        for site in backbone.sites
    }
    heads = {name: tensor[None].to(device) for name, tensor in head.items()}

    def plugged(batch: Batch) -> Bank:
        owners = batch.token_clients().to(device)
        return Bank(stacks, {}, batch.token_offsets, owners, depth=backbone.depth.of([depth]))

    whole = task.counted(examples)
    for start in range(0, len(examples), rows):
        some, own = list(examples[start : start + rows]), torch.from_numpy(labels[start : start + rows])
        loss = task.losses(task.lay_out([some]), own, heads, plugged, torch.float32).sum()
        (loss * (task.counted(some) / whole)).backward()
    found: Tensors = {}
    for name, base in bases.items():
        found[f"grad/{name}"] = (torch.zeros_like(base[0]) if base.grad is None else base.grad[0]).cpu()
    return found
