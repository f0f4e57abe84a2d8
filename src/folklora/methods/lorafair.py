"""LoRA-FAIR: FedIT's mean of B is corrected until the product is near the mean of products. arXiv 2411.14961 (Bian et
al., ICCV 2025).

1. ``A_bar = sum_k p_k A_k``, ``B_bar = sum_k p_k B_k`` [paper]; what was meant is ``DW* = sum_k p_k B_k A_k``.
2. At each site, the server looks for a correction dB of B_bar that minimises
  ``1 - cos(DW*, (B_bar + dB) A_bar) + lambda ||dB||_F`` (`form = "cosine"`, lambda 0.01) [paper, but for a sign: it
  prints the similarity itself as what is minimised, which would turn the product away from DW*; we minimise one minus
  it], by SGD from dB = 0, 1000 steps of 0.01 [note: derived code].
3. ``A_bar`` and ``B_bar + dB`` go to all, and clients start their round from the pair they receive [paper]. Refining A
  as well is in the paper's ablation only, and was worse: not offered.

Two things to know of the published form. The cosine ignores scale, so how long ``B_bar + dB`` is follows from the path
of the descent, not from DW*; and its slope grows as 1 / ||B_bar A_bar||, so that early, while B is small, a step size
may be too large. We keep the best point of the path [recon], so that the objective never ends above its start; where a
cosine is not defined, dB stays zero [recon].

Ours beside the published, without either: `form = "least_squares"`, the minimiser of
``||DW* - (B_bar + dB) A_bar||_F^2 + lambda ||dB||_F^2``, which is
``dB = (DW* - B_bar A_bar) A_bar^T (A_bar A_bar^T + lambda I)^-1``.
Its product is never farther from DW* than FedIT's.

Nothing of size d_out x d_in is built. All that DW* is needed for is ``M = DW* A_bar^T = sum_k p_k B_k (A_k A_bar^T)``
[d_out, r] and its norm, a sum over the K r x K r Gram matrices of the factors. Every gradient lies in the columns of
``[B_bar, M]``, so descent in an orthonormal basis of these, 2 r numbers high whatever d_out is, is descent on dB; and
all sites descend together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from folklora.methods.base import Method
from folklora.methods.contract import Message, State
from folklora.methods.fedit import FedITOptions


class LoRAFAIROptions(FedITOptions):
    form: Literal["cosine", "least_squares"] = "cosine"
    lambda_: float = Field(0.01, ge=0, le=1e6, alias="lambda", description="weight of the correction's size")
    server_steps: int = Field(1000, ge=1, le=1_000_000, description="of the cosine form's descent")
    server_lr: float = Field(0.01, gt=0, le=1e6, description="of the cosine form's descent")

    @model_validator(mode="after")
    def _descent_has_a_form(self) -> LoRAFAIROptions:
        for key in ("server_steps", "server_lr"):
            if self.form == "least_squares" and key in self.model_fields_set:
                raise ValueError(
                    f'{key} = {getattr(self, key)} with form = "least_squares", which is solved in one step; '
                    'allowed: form = "cosine"'
                )
        return self


class LoRAFAIR(Method):
    """Mean of A, and a mean of B that is corrected for it; see the module's text."""

    name = "lorafair"
    title = "LoRA-FAIR (mean of B corrected)"
    paper = "arXiv:2411.14961"
    has_global_model = True
    takes_means = False
    travels = frozenset({"A", "B", "norm"})
    combines = frozenset({"proximal", "scaffold", "fedopt"})
    options_type = LoRAFAIROptions
    options: LoRAFAIROptions

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        state = super().server(round, state, messages)
        p = self.weights(messages)
        means = []
        for site in self.context.sites:
            a, b = (torch.stack([m.tensors[f"{f}/{site.name}"].double() for m in messages.values()]) for f in "AB")
            means.append(Means.of(p, a, b))
        lam = self.options.lambda_
        if self.options.form == "cosine":
            corrected = descend(means, lam, self.options.server_steps, self.options.server_lr)
        else:
            corrected = [least_squares(mean, lam) for mean in means]
        return {
            **state,
            **{f"global/B/{site.name}": b.float() for site, b in zip(self.context.sites, corrected, strict=True)},
        }


@dataclass(frozen=True)
class Means:
    """What a correction at one site needs to know; all float64.

    Attributes
    ----------
    b
        B_bar [d_out, r].
    m
        ``DW* A_bar^T`` [d_out, r].
    gram
        ``A_bar A_bar^T`` [r, r].
    size
        ``||DW*||_F``.
    """

    b: Tensor
    m: Tensor
    gram: Tensor
    size: Tensor

    @classmethod
    def of(cls, p: Tensor, a: Tensor, b: Tensor) -> Means:
        """From weights [K], all A_k [K, r, d_in] and all B_k [K, d_out, r]."""
        mean_a, mean_b = (torch.einsum("k,kij->ij", p, factors) for factors in (a, b))
        wide, tall = (p[:, None, None] * a).flatten(0, 1), b.transpose(0, 1).flatten(1)  # DW* = tall @ wide
        # <B_k, B_l> times <A_k, A_l>, summed: the squared norm of DW*, of which rounding may leave less than nothing.
        size = ((tall.T @ tall) * (wide @ wide.T)).sum().clamp(min=0).sqrt()
        return cls(mean_b, tall @ (wide @ mean_a.T), mean_a @ mean_a.T, size)


def least_squares(mean: Means, lam: float) -> Tensor:
    """``B_bar + dB`` [d_out, r] nearest to DW* in Frobenius norm, with ``lam ||dB||^2`` for the correction."""
    ridge = mean.gram + lam * torch.eye(len(mean.gram), dtype=torch.float64)
    # The pseudo-inverse: without a ridge, rows of A_bar that depend on each other leave many minimisers.
    return mean.b + (mean.m - mean.b @ mean.gram) @ torch.linalg.pinv(ridge, hermitian=True)


def descend(means: list[Means], lam: float, steps: int, lr: float) -> list[Tensor]:
    """``B_bar + dB`` [d_out, r] of each site: the best point of gradient descent on the cosine form from dB = 0."""
    rank = len(means[0].gram)
    bases, starts, targets = [], [], []
    for mean in means:
        basis, coordinates = torch.linalg.qr(torch.cat([mean.b, mean.m], dim=1))
        bases.append(basis)
        # A layer narrower than 2 r has a smaller basis; rows of zeros stay zero.
        coordinates = F.pad(coordinates, (0, 0, 0, 2 * rank - len(coordinates)))
        starts.append(coordinates[:, :rank])
        targets.append(coordinates[:, rank:])
    start, target = torch.stack(starts), torch.stack(targets)  # [L, 2 r, r]
    gram, size = torch.stack([m.gram for m in means]), torch.stack([m.size for m in means])
    x, best = start, start
    lowest = torch.full_like(size, torch.inf)
    for _ in range(steps + 1):
        value, slope = _cosine_form(x, start, target, gram, size, lam)
        better = value < lowest
        best, lowest = torch.where(better[:, None, None], x, best), torch.where(better, value, lowest)
        x = x - lr * slope
    return [basis @ found[: basis.shape[1]] for basis, found in zip(bases, best, strict=True)]


def _cosine_form(
    x: Tensor, start: Tensor, target: Tensor, gram: Tensor, size: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """``1 - cos + lam ||x - start||`` of each site [L], and its gradient [L, 2 r, r]; a norm's is 0 at zero."""
    seen = x @ gram
    norms = size * (x * seen).sum((1, 2)).clamp(min=0).sqrt()  # ||DW*|| ||X A_bar||
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    cosine = (x * target).sum((1, 2)) * inverse
    shift = x - start
    length = torch.linalg.vector_norm(shift, dim=(1, 2))
    pull = torch.where(length > 0, lam / length, 0.0)
    along = (size.square() * inverse.square() * cosine)[:, None, None] * seen
    slope = along - inverse[:, None, None] * target + pull[:, None, None] * shift
    return 1 - cosine + lam * length, slope
