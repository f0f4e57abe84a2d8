"""Which tokens of one position belong to the same text? The second layer tells: attention mixes within a text alone.

DAGER (arXiv 2405.15586) tests whole sentences in the second layer's span. Here a batch as it stands gives that layer's
inputs, and what they leave unexplained of the rows that were sent says how wrong it is; tokens, and ends of texts, are
exchanged between two texts as long as that falls [recon]. So it works beyond the rank of what was sent, as long as the
batch has fewer tokens than the space of the rows has dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.privacy.attacks.first_inputs import Plug, look, plug_of
from folklora.privacy.attacks.replica import Replica
from folklora.privacy.attacks.rowspan import Space

SWEEPS = 4
"""Times that all positions are gone through at most."""
AT_ONCE = 64
"""Texts of one forward pass, about."""

Texts = list[list[int]]


class Assembly:
    """See the module's text.

    Parameters
    ----------
    before
        The client's model as the attacker believes it: the first layer's adapters change what the second is given.
    site
        An adapted layer behind the first attention.
    spaces
        What was sent of it, and of the layers that share its input.
    """

    def __init__(
        self, replica: Replica, before: Tensors, site: str, spaces: Sequence[Space], dtype: torch.dtype
    ) -> None:
        self.backbone: Any = replica.backbone
        self.plugged: Plug = plug_of(replica, before)
        self.site = site
        self.spaces = spaces
        self.dtype = dtype

    def improved(self, texts: Texts, free: Tensor) -> Texts:
        """The texts with tokens exchanged between them, only at the positions that are ``free`` [texts, longest]."""
        if not self.spaces or len(texts) < 2 or sum(map(len, texts)) >= min(s.rows.shape[1] for s in self.spaces):
            return texts
        best = self._unexplained([texts])[0]
        for _ in range(SWEEPS):
            before = best
            for place in range(free.shape[1]):
                rows = free[:, place].nonzero().squeeze(1).tolist()
                tried = [other for pair in combinations(rows, 2) for other in _exchanged(texts, *pair, place, free)]
                if not tried:
                    continue
                left = self._unexplained(tried)
                least = min(range(len(left)), key=left.__getitem__)
                if left[least] < best:
                    best, texts = left[least], tried[least]
            if best == before:
                break
        return texts

    def _unexplained(self, batches: Sequence[Texts]) -> list[float]:
        """Of each batch of the same lengths: the share of the rows' norm that its inputs leave."""
        found: list[float] = []
        size = len(batches[0])
        for start in range(0, len(batches), max(1, AT_ONCE // size)):
            part = batches[start : start + max(1, AT_ONCE // size)]
            batch = self.backbone.batch([[text for texts in part for text in texts]], "never")
            (inputs,) = look(self.backbone, batch, (self.site,), self.dtype, self.plugged)
            owners = batch.segments.reshape(-1).div(size, rounding_mode="floor")
            found += [self._left(inputs[owners == number]) for number in range(len(part))]
        return found

    def _left(self, inputs: Tensor) -> float:
        rest, whole = 0.0, 0.0
        for space in self.spaces:
            rows = space.rows.double()
            basis = torch.linalg.qr(space.of(inputs).double().T).Q
            rest += float((rows - rows @ basis @ basis.T).square().sum())
            whole += float(rows.square().sum())
        return (rest / whole) ** 0.5


def _exchanged(texts: Texts, i: int, j: int, place: int, free: Tensor) -> list[Texts]:
    """Two texts with this position exchanged, and with all from it on that are free in both."""
    both = (free[i] & free[j]).nonzero().squeeze(1).tolist()
    found: list[Texts] = []
    for places in ([place], [p for p in both if p >= place]):
        one, other = list(texts[i]), list(texts[j])
        for p in places:
            one[p], other[p] = other[p], one[p]
        if one != texts[i] and (not found or len(places) > 1):
            found.append([one if k == i else other if k == j else text for k, text in enumerate(texts)])
    return found
