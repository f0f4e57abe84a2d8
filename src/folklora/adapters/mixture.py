"""Mixtures of low-rank experts: every token chooses among the experts that its client holds. arXiv 2411.19128.

One adapted layer computes ``y = W0 x + s E_0(x) + s sum_e p_e E_e(x)``: expert 0 is shared and always on, of the others
a token takes the ``top`` ones. Scores are ``<embedding of x under e, W_t x> / sqrt(r)``; p is their softmax over the
client's own experts, of which the largest are kept and made to sum to one. Two kinds of experts:

- `Mixture`: ``E_e(x) = B_e A_e x``, embedding ``A_e x``, ``W_t x = T x`` with T [r, d_in];
- `CoreMixture`: ``E_e(x) = B C_e A x`` between factors that all experts share, embedding ``C_e A x``, ``W_t x = T A x``
  with T [r, r].

How many experts a client holds differs, so its tensors have ``slots``: those in use come first, ``live/<site>`` says
which they are. What lies in the others is never used and gets no gradient. Experts of one client, and of all clients of
a batch, are one grouped product down and one up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from folklora.adapters.grouped import Offsets, grouped_linear, grouped_matmul
from folklora.adapters.layers import SiteAdapter
from folklora.adapters.lowrank import LowRank, Shapes, Site, Tensors, kind
from folklora.errors import RunError


@dataclass
class Router:
    """Which of its client's experts each token takes, and how much of each.

    Attributes
    ----------
    live
        [K, slots]: 1 where the client holds an expert.
    owners
        [T]: the client of each token.
    real
        [T] bool: which tokens are no padding.
    balance
        Weight of the load balance in the loss.
    """

    live: Tensor
    owners: Tensor
    real: Tensor
    top: int
    balance: float

    def __call__(self, embeddings: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gates [T, slots] float32, and the load balance [K] where gradients are wanted.

        Parameters
        ----------
        embeddings
            [T, slots, r].
        wanted
            [T, r]: ``W_t x``.
        """
        held = self.live[self.owners] > 0
        scores = (embeddings.float() * wanted.float()[:, None]).sum(-1) / math.sqrt(wanted.shape[-1])
        # Not minus infinity: who holds no expert has gates of zero, not of nothing.
        scores = scores.masked_fill(~held, torch.finfo(scores.dtype).min)
        p = torch.softmax(scores, dim=-1) * held
        picks = scores.topk(min(self.top, scores.shape[1]), dim=-1).indices
        best = p.gather(1, picks)
        shares = best / best.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        gates = torch.zeros_like(p).scatter(1, picks, shares)
        if not (self.balance and torch.is_grad_enabled()):
            return gates, None
        return gates, self._load(p, torch.zeros_like(p).scatter(1, picks, 1.0) * held)

    def narrowed(self, tokens: Tensor, live: Tensor) -> Router:
        """For some of the tokens; those of clients that are done count as little as padding."""
        return replace(self, owners=self.owners[tokens], real=self.real[tokens] & live)

    def _load(self, p: Tensor, taken: Tensor) -> Tensor:
        """``balance * n sum_e P_e f_e`` of each client: n experts, P the mean of p, f the shares of what was taken."""
        sums = p.new_zeros(2, *self.live.shape)
        mean, share = (
            part.index_add(0, self.owners, each * self.real[:, None])
            for part, each in zip(sums, (p, taken), strict=True)
        )
        mean = mean / mean.sum(1, keepdim=True).clamp_min(1e-6)  # of a client without a token: zero
        share = share / share.sum(1, keepdim=True).clamp_min(1.0)
        return self.balance * self.live.sum(1) * (mean * share).sum(1)


@dataclass
class MixtureStack(SiteAdapter):
    """The experts of K clients at one site; B as in `folklora.adapters.layers.SiteStack`."""

    a: Tensor  # [K, (1 + slots) r, d_in]
    b: Tensor  # [K, (1 + slots) r, d_out]
    t: Tensor  # [K, r, d_in]
    scale: Tensor  # [K]
    router: Router

    def delta(self, x: Tensor, offsets: Offsets, mask: Tensor | None) -> Tensor:
        """``s (B_0 A_0 x + sum_e p_e B_e A_e x)``, [T, d_out]; dropout spares the router [code]."""
        rank = self.t.shape[1]
        seen = grouped_linear(x, torch.cat([self.a, self.t], dim=1).to(x.dtype), offsets)
        down, wanted = seen[:, :-rank], seen[:, -rank:]
        gates, self.penalty = self.router(down[:, rank:].unflatten(1, (-1, rank)), wanted)
        if mask is not None:
            down = grouped_linear(x * mask.to(x.dtype), self.a.to(x.dtype), offsets)
        weights = torch.cat([gates.new_ones(len(gates), 1), gates], dim=1).repeat_interleave(rank, dim=1)
        up = self.b * self.scale[:, None, None]
        return grouped_matmul(down * weights.to(x.dtype), up.to(x.dtype), offsets)

    def narrowed(self, tokens: Tensor, live: Tensor) -> SiteAdapter:
        return replace(self, router=self.router.narrowed(tokens, live))


@dataclass
class CoreMixtureStack(SiteAdapter):
    """The same with experts that are cores."""

    a: Tensor  # [K, r, d_in]
    b: Tensor  # [K, r, d_out]
    cores: Tensor  # [K, 1 + slots, r, r]
    t: Tensor  # [K, r, r]
    scale: Tensor  # [K]
    router: Router

    def delta(self, x: Tensor, offsets: Offsets, mask: Tensor | None) -> Tensor:
        """``s B (C_0 + sum_e p_e C_e) A x``, [T, d_out]; dropout spares the router."""
        rank = self.t.shape[1]
        a, cores = self.a.to(x.dtype), self.cores.flatten(1, 2)
        seen = grouped_linear(grouped_linear(x, a, offsets), torch.cat([cores, self.t], dim=1).to(x.dtype), offsets)
        turned, wanted = seen[:, :-rank].unflatten(1, (-1, rank)), seen[:, -rank:]
        gates, self.penalty = self.router(turned[:, 1:], wanted)
        if mask is not None:
            dropped = grouped_linear(x * mask.to(x.dtype), a, offsets)
            turned = grouped_linear(dropped, cores.to(x.dtype), offsets).unflatten(1, (-1, rank))
        mixed = turned[:, 0] + (gates[..., None].to(x.dtype) * turned[:, 1:]).sum(1)
        up = self.b * self.scale[:, None, None]
        return grouped_matmul(mixed, up.to(x.dtype), offsets)

    def narrowed(self, tokens: Tensor, live: Tensor) -> SiteAdapter:
        return replace(self, router=self.router.narrowed(tokens, live))


@dataclass(frozen=True)
class Mixture(LowRank):
    """Experts that are pairs of factors of their own: A [(1 + slots) r, d_in], B [d_out, (1 + slots) r].

    A client's rank is that of its stacked factors, ``(1 + slots) r``; its scale is that of one expert, ``alpha / r``.
    """

    slots: int = 1
    top: int = 2
    balance: float = 0.0

    @property
    def factors(self) -> tuple[str, ...]:
        return ("A", "T", "B", "live")

    @property
    def expert_kinds(self) -> tuple[str, ...]:
        """The kinds whose tensors are blocks, one an expert (`blocks_of`)."""
        return ("A", "B")

    def stacked(self, rank: int) -> int:
        """The rank of a client whose experts have this one."""
        return (1 + self.slots) * rank

    def scale(self, rank: int) -> float:
        return self.alpha * self.stacked(1) / rank

    def shapes(self, rank: int) -> Shapes:
        own = rank // self.stacked(1)
        found: Shapes = {}
        for site in self.sites:
            found |= {f"A/{site.name}": (rank, site.d_in), f"T/{site.name}": (own, site.d_in)}
            found |= {f"B/{site.name}": (site.d_out, rank), f"live/{site.name}": (self.slots,)}
        return found

    def plug_site(
        self, site: Site, stacks: Mapping[str, Tensor], scales: Tensor, owners: Tensor, real: Tensor
    ) -> SiteAdapter:
        name = site.name
        router = Router(stacks[f"live/{name}"], owners, real, self.top, self.balance)
        return MixtureStack(stacks[f"A/{name}"], stacks[f"B/{name}"], stacks[f"T/{name}"], scales, router)

    def embeddings(self, tensors: Tensors, site: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of one input x [d_in]: ``W_t x`` [r], and what each of the client's live experts makes of it, [n, r]."""
        rank = len(tensors[f"T/{site}"])
        held = int(tensors[f"live/{site}"].sum())
        down = blocks_of("A", tensors[f"A/{site}"], rank)[1 : 1 + held]
        return tensors[f"T/{site}"] @ x, down @ x

    def core_of(self, tensors: Tensors, site: str) -> Tensor:
        raise self.not_linear()

    def update(self, tensors: Tensors, site: str) -> Tensor:
        raise self.not_linear()

    def not_linear(self) -> RunError:
        return RunError(
            "a mixture of experts is another matrix for every token, and no LoRA adapter or checkpoint of the base "
            "model can hold it; allowed: `folklora predict` on the run itself, or a method with one adapter, such as "
            "'folklora'"
        )

    def refuse_folding(self) -> None:
        raise self.not_linear()


@dataclass(frozen=True)
class CoreMixture(Mixture):
    """Experts that are cores E [1 + slots, r, r] between one A [r, d_in] and one B [d_out, r]; T is [r, r]."""

    @property
    def factors(self) -> tuple[str, ...]:
        return ("A", "E", "T", "B", "live")

    @property
    def expert_kinds(self) -> tuple[str, ...]:
        return ("E",)

    def stacked(self, rank: int) -> int:
        return rank

    def shapes(self, rank: int) -> Shapes:
        found: Shapes = {}
        for site in self.sites:
            name = site.name
            found |= {f"A/{name}": (rank, site.d_in), f"E/{name}": (1 + self.slots, rank, rank)}
            found |= {f"T/{name}": (rank, rank), f"B/{name}": (site.d_out, rank), f"live/{name}": (self.slots,)}
        return found

    def plug_site(
        self, site: Site, stacks: Mapping[str, Tensor], scales: Tensor, owners: Tensor, real: Tensor
    ) -> SiteAdapter:
        a, b, cores, t, live = (stacks[f"{factor}/{site.name}"] for factor in ("A", "B", "E", "T", "live"))
        return CoreMixtureStack(a, b, cores, t, scales, Router(live, owners, real, self.top, self.balance))

    def embeddings(self, tensors: Tensors, site: str, x: Tensor) -> tuple[Tensor, Tensor]:
        held = int(tensors[f"live/{site}"].sum())
        down = tensors[f"A/{site}"] @ x
        return tensors[f"T/{site}"] @ down, tensors[f"E/{site}"][1 : 1 + held] @ down


def blocks_of(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A tensor of experts as one block an expert: A [m, r, d_in], B [m, d_out, r], E [m, r, r]."""
    match kind(name):
        case "A":
            return tensor.unflatten(0, (-1, rank))
        case "B":
            return tensor.unflatten(1, (-1, rank)).transpose(0, 1)
        case _:
            return tensor


def joined(name: str, blocks: Tensor) -> Tensor:
    """The inverse of `blocks_of`, in memory of its own."""
    match kind(name):
        case "A":
            return blocks.flatten(0, 1).clone()
        case "B":
            return blocks.transpose(0, 1).flatten(1).clone()
        case _:
            return blocks.clone()
