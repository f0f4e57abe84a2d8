"""FeDeRA: start LoRA from the weights' singular vectors. arXiv 2404.18848 (Yan et al.).

1. ``W0 = U Sigma V^T``; B starts as ``U_r Sigma_r^(1/2)`` and A as ``Sigma_r^(1/2) V_r^T`` [paper: the weights' SVD
  instead of random and zero; Sigma split evenly: recon].
2. The frozen weight is reduced by their product, so that the first model is the pretrained one [note]: here
  ``base = - s B0 A0``, which every client derives from its own backbone (no byte).
3. Singular values are divided by s first, so that ``s B0 A0`` is W0's leading part itself whatever alpha is [recon, as
  PEFT does for PiSSA].
4. Training and aggregation are FedIT's [paper].

A and B carry the weights' principal part and travel whole, so what few bits lose of them is large beside what was
learned: with ``message.dtype`` int8 or int4 choose another method.
"""

from __future__ import annotations

from folklora.adapters.lowrank import Tensors
from folklora.methods.contract import Context
from folklora.methods.fedit import FedIT
from folklora.methods.options import Options
from folklora.methods.svd import Principal


class FeDeRA(FedIT):
    """FedIT from the principal part of the frozen weights [paper]."""

    name = "federa"
    title = "FeDeRA (FedIT from the weights' SVD)"
    paper = "arXiv:2404.18848"

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.principal = Principal(context.weight, max(context.ranks.values()))

    def initial_factors(self, client: str, rank: int) -> Tensors:
        s = self.adapter.scale(rank)
        factors: Tensors = {}
        for site in self.context.sites:
            u, sigma, vt = self.principal(site.name)
            root = (sigma / s).sqrt()
            factors[f"A/{site.name}"] = (root[:, None] * vt).float()
            factors[f"B/{site.name}"] = (u * root).float()
        return factors

    def initial(self, client: str) -> Tensors:
        tensors = super().initial(client)
        for site in self.context.sites:
            # Of the rounded factors, so that they cancel to the last bit of float32.
            tensors[f"base/{site.name}"] = -self.adapter.update(tensors, site.name).float()
        return tensors
