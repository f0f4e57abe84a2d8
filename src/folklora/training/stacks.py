"""Between one client's tensors (own rank, shapes as in the papers) and stacks of K clients (common rank, leading axis).

In a stack B stands transposed, [K, r, d_out], and ranks below the common one are padded with zeros, which training
leaves at zero (see `folklora.adapters.layers.SiteStack`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import LowRank, Tensors, kind
from folklora.backbones.batch import Batch


def to_stack(name: str, tensor: Tensor, rank: int) -> Tensor:
    """One client's tensor as it lies in a stack of common rank ``rank``."""
    tensor = tensor.detach()
    match kind(name):
        case "A":
            return F.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        case "B":
            return F.pad(tensor.T, (0, 0, 0, rank - tensor.shape[1]))
        case "C":
            missing = rank - tensor.shape[0]
            return F.pad(tensor, (0, missing, 0, missing))
        case _:
            return tensor


def from_stack(name: str, tensor: Tensor, rank: int) -> Tensor:
    """The inverse of `to_stack`: a contiguous CPU copy at the client's own rank."""
    tensor = tensor.detach()
    match kind(name):
        case "A":
            tensor = tensor[:rank]
        case "B":
            tensor = tensor[:rank].T
        case "C":
            tensor = tensor[:rank, :rank]
    return tensor.to("cpu", copy=True).contiguous()


def stack(clients: Sequence[Tensors], rank: int, device: torch.device) -> Tensors:
    """All tensors of K clients stacked; every client must have the same names."""
    return {
        name: torch.stack([to_stack(name, client[name], rank) for client in clients]).to(device) for name in clients[0]
    }


def plug(
    adapter: LowRank,
    stacks: Mapping[str, Tensor],
    scales: Tensor,
    batch: Batch,
    device: torch.device,
    depth: Sequence[int] | None = None,
) -> Bank:
    """The bank that makes a backbone run ``batch`` with these stacks; sites without factors run frozen."""
    owners, real = batch.token_clients().to(device), (batch.segments.reshape(-1) >= 0).to(device)
    sites = {
        site.name: adapter.plug_site(site, stacks, scales, owners, real)
        for site in adapter.sites
        if f"A/{site.name}" in stacks
    }
    norms = {
        name.removeprefix("norm/").removesuffix(".weight"): (tensor, stacks[name.removesuffix("weight") + "bias"])
        for name, tensor in stacks.items()
        if kind(name) == "norm" and name.endswith(".weight")
    }
    return Bank(sites, norms, batch.token_offsets, owners, depth=depth)


class Plugging:
    """Banks for the forward passes of one step, as a task asks for them, and what their adapters add to its losses."""

    def __init__(self, plug: Callable[[Batch], Bank]) -> None:
        self.plug = plug
        self.banks: list[Bank] = []

    def __call__(self, batch: Batch) -> Bank:
        self.banks.append(self.plug(batch))
        return self.banks[-1]

    def penalised(self, losses: Tensor) -> Tensor:
        """Each client's loss, [K], with what its adapter minimises beside it; the very same where that is nothing."""
        for bank in self.banks:
            if (penalty := bank.penalty) is not None:
                losses = losses + penalty
        return losses
