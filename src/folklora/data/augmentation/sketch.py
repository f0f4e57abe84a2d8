"""Everybody's class statistics at each client: means and covariance of classes as all clients together see them. Ours
[recon].

Clients send their class statistics once, the server merges them (`ClassStatistics.merge`) and sends what comes of it to
all. So every client learns the mean of every class, also of one that a single other client has: that is the price.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from folklora.data.statistics import ClassStatistics, take

PREFIX = "augment/"


def shapes(classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of `packed`."""
    each = {"counts": (classes,), "means": (classes, width), "scatter": (width * (width + 1) // 2,)}
    return {PREFIX + name: shape for name, shape in each.items()}


def packed(statistics: ClassStatistics) -> dict[str, Tensor]:
    """The statistics as they travel down: of the same shapes whoever has which class.

    ``augment/counts`` [C] int32, rounded where they carry noise; ``augment/means`` [C, d] and ``augment/scatter``
    [d (d + 1) / 2] float32.
    """
    rows, columns = torch.triu_indices(*statistics.scatter.shape)
    return {
        f"{PREFIX}counts": statistics.counts.round().clamp(max=2**31 - 1).int(),
        f"{PREFIX}means": statistics.means.float(),
        f"{PREFIX}scatter": statistics.scatter[rows, columns].float(),
    }


def unpacked(tensors: Mapping[str, Tensor], classes: int, width: int) -> ClassStatistics:
    """Read what `packed` wrote.

    Raises
    ------
    MessageError
        As `ClassStatistics.from_tensors`.
    """
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    counts, means = take(own, "counts", (classes,)), take(own, "means", (classes, width))
    present = torch.nonzero(counts > 0).squeeze(1)
    own |= {"classes": present, "counts": counts[present], "means": means[present]}
    return ClassStatistics.from_tensors(own, classes, width)
