"""Labels of a batch from the gradient of a linear head.

The gradient of the mean cross-entropy with respect to a head's bias is ``mean(p - y)``: of a single example exactly the
label's entry is negative (iDLG, arXiv 2001.02610). Of a batch, every class with a negative entry is there; the rest are
counted off, the most negative entry first, each label taking its pull away (LLG, arXiv 2105.09369: the pull is the mean
of the negative entries' sum over the batch, times 1 + 1 / classes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors


def labels_of(gradient: Tensors, count: int) -> Tensor | None:
    """[count] int64, sorted; None where the gradient of no head was sent, or says nothing.

    A head's weight serves where there is no bias: its row of a label is ``-(1 - p)`` times the features, and sums are
    read as features were positive on the whole [recon].
    """
    signal = gradient.get("head/bias")
    if signal is None and (weight := gradient.get("head/weight")) is not None:
        signal = weight.sum(1)
    if signal is None or not bool(signal.any()):
        return None
    left = signal.detach().double().cpu().clone()
    pull = float(-left[left < 0].sum()) / count * (1 + 1 / len(left))
    present = left.argsort()[: min(count, int((left < 0).sum()))]
    left[present] += pull
    found = present.tolist()
    while len(found) < count:
        first = int(left.argmin())
        found.append(first)
        left[first] += pull
    return torch.tensor(sorted(found))
