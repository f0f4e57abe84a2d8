"""What a low-rank adapter is: sites, factors, shapes, scaling and starting values.

One adapted linear layer computes ``y = W0 x + s B A x`` (LoRA, arXiv 2106.09685) or ``y = W0 x + s B C A x``
(tri-LoRA, CE-LoRA, arXiv 2503.23869) with A [r, d_in], C [r, r], B [d_out, r] and s = alpha / r. The tensors of all
sites of one client live in one flat dictionary under ``A/<site>``, ``C/<site>``, ``B/<site>``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from folklora.adapters.layers import SiteAdapter, SiteStack
from folklora.randomness import torch_generator

Tensors = dict[str, Tensor]
"""What a client owns, or a message carries: ``kind/rest`` -> tensor."""

Shapes = dict[str, tuple[int, ...]]


def kind(name: str) -> str:
    """The kind of a tensor name: ``A/encoder.layer.0...`` -> ``A``."""
    return name.partition("/")[0]


def select(tensors: Tensors, kinds: frozenset[str]) -> Tensors:
    """The tensors of the given kinds, in the order they stand."""
    return {name: tensor for name, tensor in tensors.items() if kind(name) in kinds}


@dataclass(frozen=True)
class Site:
    """One linear layer of the backbone that carries an adapter."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class LowRank:
    """The adapter of every client: where it sits, whether it has a core, how it is scaled.

    Ranks are not part of it: each client may have its own.
    """

    sites: tuple[Site, ...]
    core: bool
    alpha: float
    dropout: float = 0.0

    @property
    def factors(self) -> tuple[str, ...]:
        return ("A", "C", "B") if self.core else ("A", "B")

    def scale(self, rank: int) -> float:
        return self.alpha / rank

    def rank(self, tensors: Tensors) -> int:
        """The rank of a client that owns these tensors; methods may change it during a run."""
        return tensors[f"A/{self.sites[0].name}"].shape[0]

    def shapes(self, rank: int) -> Shapes:
        """Names and shapes of one client's factors, in the order data flows through them."""
        shape = {
            "A": lambda site: (rank, site.d_in),
            "C": lambda site: (rank, rank),
            "B": lambda site: (site.d_out, rank),
        }
        return {f"{factor}/{site.name}": shape[factor](site) for site in self.sites for factor in self.factors}

    def core_of(self, tensors: Tensors, site: str) -> Tensor:
        """What stands between B and A at one site, [r, r] float64: C with its heads' gains, or the identity."""
        rank = tensors[f"A/{site}"].shape[0]
        if f"C/{site}" not in tensors:
            return torch.eye(rank, dtype=torch.float64)
        core = tensors[f"C/{site}"].double()
        gain = tensors.get(f"gain/{site}")
        return core if gain is None else core * gain.double().repeat_interleave(rank // len(gain))[:, None]

    def update(self, tensors: Tensors, site: str) -> Tensor:
        """What a client adds to the frozen weight of one site, dense: ``s B C A + base``, [d_out, d_in] float64."""
        a, b = tensors[f"A/{site}"].double(), tensors[f"B/{site}"].double()
        dense = self.scale(len(a)) * b @ self.core_of(tensors, site) @ a
        base = tensors.get(f"base/{site}")
        return dense if base is None else dense + base.double()

    def plug_site(
        self, site: Site, stacks: Mapping[str, Tensor], scales: Tensor, owners: Tensor, real: Tensor
    ) -> SiteAdapter:
        """What runs at one site, of K clients' stacked tensors (`folklora.training.stacks`).

        Parameters
        ----------
        scales
            [K].
        owners, real
            [T]: the client of each token of the batch, and whether it is one rather than padding.
        """
        name = site.name
        core, gain, base = (stacks.get(f"{factor}/{name}") for factor in ("C", "gain", "base"))
        return SiteStack(stacks[f"A/{name}"], stacks[f"B/{name}"], core, scales, gain, base)

    def refuse_folding(self) -> None:
        """Raises RunError if no one matrix can be added to the frozen weight in this adapter's place."""

    def max_rank(self) -> int:
        """The largest rank that is still low: no factor may be taller than the layer it adapts."""
        return min(min(site.d_in, site.d_out) for site in self.sites)


def kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """LoRA's A as stock PEFT draws it: uniform in +-1/sqrt(d_in) (kaiming with a = sqrt 5)."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def gaussian(shape: tuple[int, ...], generator: torch.Generator, std: float) -> Tensor:
    """N(0, std^2)."""
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def orthonormal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Orthonormal along the short side: rows of an A [r, d_in], columns of a B [d_out, r]; uniform (Haar) on those."""
    rows, columns = shape
    q, r = torch.linalg.qr(torch.empty(max(shape), min(shape), dtype=torch.float64).normal_(generator=generator))
    q = q * torch.sign(torch.diagonal(r))  # without this, QR's sign convention would bias the draw
    return (q if rows >= columns else q.T).to(torch.float32).contiguous()


def factor_generator(seed: int, name: str, client: str = "") -> torch.Generator:
    """The generator of one factor's starting value; without a client it is common to all (and costs no byte)."""
    return torch_generator(seed, f"init/{name}", client)
