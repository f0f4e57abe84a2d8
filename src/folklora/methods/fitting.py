"""A head that a client fits to its own features, real and generated ones, before the first round. Ours [recon]; the
multi-head loss is that of arXiv 2411.16567, by a review of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import Tensors
from folklora.data.augmentation.choose import Augmenter
from folklora.data.augmentation.gaussian import Labelled
from folklora.methods.heads import ABSENT
from folklora.randomness import torch_generator

RIDGE = 1e-3
"""Weight of the squared norm of a head, of features scaled to variance 1: chosen for real examples alone, on runs of
seeds that no table shows."""

HEADS, SHARE = 5, 0.5
"""Of the multi-head loss: how many, and lam, the ensemble's share."""

STEPS = 60


def fitted_head(augmenter: Augmenter, augment: str) -> tuple[str, Tensors]:
    """What was added (as given, or as `Augmenter.choose` says), and ``head/weight`` and ``head/bias`` fitted to it."""

    def fit(real: Labelled, generated: Labelled, kind: str) -> tuple[Tensor, Tensor]:
        random = torch_generator(augmenter.seed, "augment/heads", augmenter.client)
        heads = HEADS if kind == "gan" and len(generated[1]) else 1
        return fit_head(real, generated, augmenter.classes, heads, random)

    kind = augmenter.choose(fit) if augment == "auto" else augment
    weight, bias = fit(augmenter.real, augmenter.generated(kind), kind)
    return kind, {"head/weight": weight, "head/bias": bias}


def fit_head(
    real: Labelled, generated: Labelled, classes: int, heads: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ridge logistic regression over the classes that the client has.

    The generated examples of a class weigh together what its real ones do, so that classes stay as frequent as they
    are. With several heads, each sees a random half of the generated examples, and the loss is
    ``lam M CE(ensemble) + (1 - lam)/M sum_m CE(head m)``; what comes back is the ensemble, which is linear too.

    A class that the client has no example of gets a bias of `ABSENT`, below some class that it has.

    Parameters
    ----------
    real, generated
        Features [n, d] and labels [n]; the latter may be empty, and of no class that the former lack.

    Returns
    -------
    weight, bias
        [classes, d] and [classes] float32; computed in float64.
    """
    known, codes = torch.unique(real[1], return_inverse=True)
    weight, bias = real[0].new_zeros(classes, real[0].shape[1]), real[0].new_full((classes,), ABSENT)
    bias[known] = 0.0
    if len(known) < 2:
        return weight, bias
    x = torch.cat([real[0], generated[0]]).double()
    y = torch.cat([codes, torch.searchsorted(known, generated[1])])
    centre = real[0].double().mean(0)
    scale = (real[0].double() - centre).square().mean().sqrt().clamp(min=1e-12)
    x = (x - centre) / scale
    weights = _weights(codes, y[len(codes) :], heads, generator)
    w = torch.zeros(heads, len(known), x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(heads, len(known), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.einsum("nd,mcd->mnc", x, w) + b[:, None]
        each = F.cross_entropy(logits.flatten(0, 1), y.repeat(heads), reduction="none").view(heads, -1)
        whole = F.cross_entropy(logits.mean(0), y, reduction="none")
        loss = (1 - SHARE) / heads * (weights * each).sum() + SHARE * heads * (weights.mean(0) * whole).sum()
        loss = loss + RIDGE / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        fitted, shift = w.mean(0) / scale, b.mean(0)
        shift = shift - fitted @ centre
        # Only differences count among the client's classes; with logits of mean 0 one of them is above `ABSENT`.
        weight[known] = (fitted - fitted.mean(0)).float()
        bias[known] = (shift - shift.mean()).float()
    return weight, bias


def _weights(real: Tensor, generated: Tensor, heads: int, generator: torch.Generator) -> Tensor:
    """[heads, n]: each head's weights of all examples, which sum to 1."""
    counts = torch.bincount(real).double()
    seen = torch.ones(heads, len(generated), dtype=torch.float64)
    if heads > 1:
        seen = (torch.rand(heads, len(generated), generator=generator) < 0.5).double()
    among = torch.zeros(heads, len(counts), dtype=torch.float64).index_add_(1, generated, seen)
    own = seen * counts[generated] / among[:, generated].clamp(min=1)
    whole = torch.cat([torch.ones(heads, len(real), dtype=torch.float64), own], 1)
    return whole / whole.sum(1, keepdim=True)
