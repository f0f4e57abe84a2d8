"""Losses and retrieval on pairs of a picture and its caption, for many clients at once.

Each client's pictures meet its own captions only. Two pairs of one client with the same caption, or the same picture
(of which data sets often have several captions), are no mistake for each other: each leaves the other out, in losses as
in retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.backbones.slopes import felt


def contrastive_losses(logits: Tensor, real: Tensor, twins: Tensor, *, sigmoid: bool) -> Tensor:
    """Mean loss of each client's pairs, [K].

    CLIP (arXiv 2103.00020): cross-entropy of each picture over the captions and of each caption over the pictures,
    averaged. SigLIP (arXiv 2303.15343): every picture with every caption is a pair or is not, and their log-likelihoods
    are summed and divided by the number of pictures.

    Parameters
    ----------
    logits
        [K, n, n]: picture i of a client with its caption j.
    real
        [K, n]: which of the n places each client fills.
    twins
        [K, n, n]: different pairs with the same caption or picture.
    """
    logits, counts = felt(logits), real.sum(1)
    absent = ~(real[:, :, None] & real[:, None, :])
    own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    if sigmoid:
        likelihoods = F.logsigmoid(torch.where(own, logits, -logits))
        return -likelihoods.masked_fill(absent | twins, 0).sum((1, 2)) / counts
    logits = logits.masked_fill((absent & ~own) | twins, -torch.inf)  # a place that nobody fills meets only itself
    by_picture = logits.log_softmax(2).diagonal(dim1=1, dim2=2)
    by_caption = logits.log_softmax(1).diagonal(dim1=1, dim2=2)
    return -((by_picture + by_caption) / 2).masked_fill(~real, 0).sum(1) / counts


def places(offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where each client's pairs lie, padded to the longest: indices [K, n] and whether a place is filled [K, n].

    Places that are not filled name the client's own first pair: what is not finite stays with whose it is.
    """
    starts = torch.tensor(offsets[:-1])
    counts = torch.tensor(offsets).diff()
    number = torch.arange(int(counts.max()))
    real = number < counts[:, None]
    return torch.where(real, starts[:, None] + number, starts[:, None]), real


def retrieved(queries: np.ndarray, found: np.ndarray, names: Sequence[np.ndarray], rows: int = 1024) -> int:
    """How many queries find their own: the candidate with the highest cosine has one of their names.

    Parameters
    ----------
    queries, found
        [n, p] embeddings of length one; row i of both is a pair.
    names
        Each [n]: one equal where captions are, one where pictures are.
    rows
        Queries compared at a time.
    """
    right = 0
    for start in range(0, len(queries), rows):
        nearest = (queries[start : start + rows] @ found.T).argmax(1)
        own = [each[nearest] == each[start : start + rows] for each in names]
        right += int(np.any(own, axis=0).sum())
    return right
