"""Slopes too small to move anything are nothing, before they reach a model's layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

LEAST = 1e-20
"""AdamW adds 1e-8 to the root it divides by, and no learning rate makes up for the other twelve digits."""


def felt(logits: Tensor) -> Tensor:
    """The logits as they are; on the way back, slopes of a smaller size than `LEAST` are exactly 0.

    What a model already tells with certainty has slopes that fall out of float32's normal range as they go back through
    its layers, and there a processor may take a hundred times as long for each product. A head that starts sure of
    itself, such as the sketched one, made a round several times as long. The mode in which a processor takes such
    numbers for 0 itself is a thread's own, so that results would depend on who does the sum.
    """
    if logits.requires_grad:
        logits.register_hook(_without_what_is_not_felt)
    return logits


def _without_what_is_not_felt(slopes: Tensor | None) -> Tensor | None:
    return None if slopes is None else F.hardshrink(slopes, LEAST)
