"""Backbone layers that add the adapters of many clients at once.

Each layer wraps the frozen one and looks into a `Bank`, which says what is plugged in for the current batch: the
stacked factors of K clients and which rows belong to whom. An empty bank leaves the backbone exactly as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from folklora.adapters.grouped import Offsets, grouped_linear, grouped_matmul
from folklora.errors import BackboneError


class SiteAdapter:
    """What K clients have plugged in at one site: what it adds to the frozen layer's output, for each client's rows.

    ``penalty`` [K] is what the last `delta` wants added to each client's loss, if anything.
    """

    penalty: Tensor | None = None

    def delta(self, x: Tensor, offsets: Offsets, mask: Tensor | None) -> Tensor:
        """Of rows ``x [T, d_in]`` grouped by client -> [T, d_out]; ``mask`` is dropout's."""
        raise NotImplementedError

    def narrowed(self, tokens: Tensor, live: Tensor) -> SiteAdapter:
        """The same for some of the batch's tokens; see `Bank.narrowed`."""
        return self


@dataclass
class SiteStack(SiteAdapter):
    """The factors of K clients at one site, zero-padded to a common rank r.

    Zero padding is exact: a padded row of A meets a padded column of B, both receive zero gradients and stay zero.
    B is kept as [K, r, d_out] (the transpose of the paper's) because its gradient is several times faster that way.
    ``gain`` belongs to cores that are several heads on the diagonal (RAVAN): each head's rows are multiplied by its
    own. ``base`` is what a client adds to the frozen weight itself (stacked updates that were merged, FLoRA).
    """

    a: Tensor  # [K, r, d_in]
    b: Tensor  # [K, r, d_out]
    c: Tensor | None  # [K, r, r]
    scale: Tensor  # [K], s = alpha / rank of each client
    gain: Tensor | None = None  # [K, heads]; heads divide r
    base: Tensor | None = None  # [K, d_out, d_in]

    def delta(self, x: Tensor, offsets: Offsets, mask: Tensor | None) -> Tensor:
        """``s B C A x + base x`` for rows ``x [T, d_in]`` grouped by client -> [T, d_out]; dropout spares the base."""
        # C is folded into A before the big product: tri-LoRA then costs what LoRA costs.
        down = self.a if self.c is None else torch.bmm(self.c, self.a)
        if self.gain is not None:
            down = down * self.gain.repeat_interleave(down.shape[1] // self.gain.shape[1], dim=1)[:, :, None]
        up = self.b * self.scale[:, None, None]
        dropped = x if mask is None else x * mask.to(x.dtype)
        y = grouped_matmul(grouped_linear(dropped, down.to(x.dtype), offsets), up.to(x.dtype), offsets)
        return y if self.base is None else y + grouped_linear(x, self.base.to(x.dtype), offsets)


class Dropout(Protocol):
    """Where the masks of LoRA's dropout come from."""

    def __call__(self, site: str, width: int) -> Tensor | None:
        """The scaled keep-mask [T, d_in] of the next site, or None."""
        ...

    def state(self) -> Any:
        """What `restore` takes to give the masks from here on once more (gradient checkpointing)."""
        ...

    def restore(self, state: Any) -> None: ...

    def narrowed(self, tokens: Tensor, clients: Sequence[bool]) -> Dropout:
        """The masks of some of the batch's tokens from here on; clients that are not meant draw none."""
        ...


@dataclass
class Bank:
    """What is plugged into a backbone for the current batch.

    Attributes
    ----------
    sites
        Site name -> what is plugged in there; absent sites run frozen.
    norms
        LayerNorm name -> (weight [K, d], bias [K, d]).
    offsets
        Token rows of each client: client k owns rows ``offsets[k]:offsets[k + 1]`` of the flattened batch.
    token_clients
        [T], the client (stack index) of each token of the flattened batch.
    dropout
        Of what the adapters see; none by default.
    depth
        [K]: how often a shared block is applied to each client's tokens (`folklora.backbones.depth`); None: as often as
        the backbone does.
    weights
        Site name -> what runs in the place of the frozen layer's weight, [d_out, d_in]: of a single client, whose
        adapter is in it (`folklora.training.serving`).
    """

    sites: Mapping[str, SiteAdapter]
    norms: dict[str, tuple[Tensor, Tensor]]
    offsets: Offsets
    token_clients: Tensor
    dropout: Dropout | None = None
    depth: Sequence[int] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def narrowed(self, tokens: Tensor, clients: Sequence[bool]) -> Bank:
        """The same for some of the batch's tokens.

        Parameters
        ----------
        tokens
            [T'] on the CPU, ascending: which of the flattened batch.
        clients
            [K]: whose are still at work; others' may be among the tokens, and what becomes of those is thrown away.
        """
        kept = torch.zeros(self.offsets[-1] + 1, dtype=torch.int64)
        kept[tokens + 1] = 1
        offsets = kept.cumsum(0)[torch.tensor(self.offsets)].tolist()
        here = tokens.to(self.token_clients.device)
        owners = self.token_clients[here]
        live = torch.tensor(list(clients), device=owners.device)[owners]
        return Bank(
            {name: site.narrowed(here, live) for name, site in self.sites.items()},
            self.norms,
            offsets,
            owners,
            None if self.dropout is None else self.dropout.narrowed(tokens, clients),
            weights=self.weights,
        )

    @property
    def penalty(self) -> Tensor | None:
        """[K]: what the sites want added to each client's loss after a forward pass; None: nothing."""
        wanted = [site.penalty for site in self.sites.values() if site.penalty is not None]
        return torch.stack(wanted).sum(0) if wanted else None


class Socket:
    """The one place where a bank is plugged in; shared by all wrapped layers of a backbone."""

    def __init__(self) -> None:
        self.bank: Bank | None = None
        self.steps: int | None = None  # of a shared block, where the bank does not say; None: all of them


class AdaptedLinear(nn.Module):
    """A frozen linear layer (``nn.Linear``, or GPT-2's ``Conv1D``) plus the plugged-in adapters."""

    def __init__(self, base: nn.Module, name: str, socket: Socket) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.socket = socket

    def forward(self, x: Tensor) -> Tensor:
        bank = self.socket.bank
        if bank is not None and (merged := bank.weights.get(self.name)) is not None:
            return F.linear(x, merged, self.base.bias)  # type: ignore[arg-type]
        y: Tensor = self.base(x)
        if bank is None or self.name not in bank.sites:
            return y
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != bank.offsets[-1]:  # DeBERTa sends its relative positions through the query projection too
            raise BackboneError(
                f"adapter.targets: {self.name} is not applied to the batch's tokens alone and cannot carry adapters; "
                "give a regex that leaves it out"
            )
        mask = bank.dropout(self.name, x.shape[-1]) if bank.dropout else None
        return y + bank.sites[self.name].delta(flat, bank.offsets, mask).view(y.shape)


class AdaptedNorm(nn.Module):
    """A LayerNorm whose gain and shift may be each client's own."""

    def __init__(self, base: nn.LayerNorm, name: str, socket: Socket) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.socket = socket

    def forward(self, x: Tensor) -> Tensor:
        bank = self.socket.bank
        if bank is None or self.name not in bank.norms:
            y: Tensor = self.base(x)
            return y
        if x.numel() != len(bank.token_clients) * x.shape[-1]:  # DeBERTa norms its relative positions too
            raise BackboneError(
                f"adapter.norm = true: {self.name} is not applied to the batch's tokens alone and cannot be each "
                "client's own; allowed: adapter.norm = false"
            )
        weight, bias = (own.to(x.dtype)[bank.token_clients].view(x.shape) for own in bank.norms[self.name])
        return F.layer_norm(x, self.base.normalized_shape, None, None, self.base.eps) * weight + bias
