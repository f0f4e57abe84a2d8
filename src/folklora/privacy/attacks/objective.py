"""How far a guessed gradient is from the one that was seen; all of them are zero where both agree.

Each takes the tensors of both by name and gives a scalar that can be differentiated. Every tensor counts alike,
whatever its size: a query's gradient tells the order of words and may be a thousandth of a head's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors

TINY = 1e-20


def norm(tensors: Tensors) -> Tensor:
    """L2, over all tensors."""
    return torch.sqrt(sum((t.square().sum() for t in tensors.values()), torch.tensor(TINY)))


def squared(guessed: Tensors, seen: Tensors) -> Tensor:
    """``|g'_l - g_l|^2 / (|g'_l|^2 + |g_l|^2)``, the mean over tensors: no small one of them outweighs the others."""
    return _mean(
        (guessed[name] - tensor).square().sum() / (guessed[name].square().sum() + tensor.square().sum())
        for name, tensor in _telling(seen).items()
    )


def cosine(guessed: Tensors, seen: Tensors) -> Tensor:
    """``1 - cos(g'_l, g_l)``, the mean over tensors."""
    return _mean(
        1 - (guessed[name] * tensor).sum() / ((guessed[name].square().sum() + TINY).sqrt() * tensor.norm())
        for name, tensor in _telling(seen).items()
    )


def tag(guessed: Tensors, seen: Tensors, alpha: float) -> Tensor:
    """`squared`, and alpha times ``|g'_l - g_l|_1 / (|g'_l|_1 + |g_l|_1)``, the mean over tensors."""
    absolute = _mean(
        (guessed[name] - tensor).abs().sum() / (guessed[name].abs().sum() + tensor.abs().sum())
        for name, tensor in _telling(seen).items()
    )
    return squared(guessed, seen) + alpha * absolute


def _telling(seen: Tensors) -> Tensors:
    """Tensors that are not all zero: a factor whose partner is zero has no gradient, whatever the data."""
    return {name: tensor for name, tensor in seen.items() if bool(tensor.any())}


def _mean(parts: Iterable[Tensor]) -> Tensor:
    found = list(parts)
    return torch.stack(found).mean() if found else torch.tensor(0.0)


def total_variation(pictures: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, of pictures [count, channels, height, width]."""
    across = (pictures[..., :, 1:] - pictures[..., :, :-1]).abs().mean()
    down = (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().mean()
    return across + down


def signed(tensors: Tensors, width: float = 0.1) -> Tensors:
    """What AdamW's first step makes of a gradient, nearly its sign: ``g / sqrt(g^2 + (width rms(g))^2)``.

    The step itself has no slope anywhere; this has, and differs from it for small numbers alone.
    """
    found = {}
    for name, tensor in tensors.items():
        rms = tensor.detach().square().mean().sqrt()
        found[name] = tensor / torch.sqrt(tensor.square() + (width * rms).square() + TINY)
    return found
