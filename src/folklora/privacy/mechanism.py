"""The Gaussian mechanism on a whole update: all its tensors as one vector, clipped in L2, and noise in every number.

A client's update is what it sends less what everybody knew before. Clipped to C, it moves a sum of updates by at most C
when it is replaced by nothing, so C is the sum's L2 sensitivity; noise of standard deviation z C in every number of the
sum is the Gaussian mechanism with multiplier z (`folklora.privacy.accounting`). Independent shares of sd z C / sqrt(m)
of m clients add up to the same. Everything is float64, so that rounding adds nothing to the norm.

The noise is Gaussian from a generator with a key of 128 bits (Philox), which is not cryptographic, and is not hardened
against attacks on floating-point rounding (Mironov 2012).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.randomness import secret_generator


def norm(update: Tensors) -> float:
    """L2 over all numbers of all tensors together: the same to the bit in whichever order they come, as they do from
    files."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for _, tensor in sorted(update.items())))


def clipped(update: Tensors, clip: float) -> Tensors:
    """The update, scaled down to norm ``clip`` where it is longer; float64."""
    size = norm(update)
    # A hair below, since the scaled numbers are rounded once more.
    scale = 1.0 if size <= clip else clip / size * (1 - 1e-12)
    return {name: tensor.double() * scale for name, tensor in update.items()}


def noise(like: Tensors, deviation: float, secret: int, purpose: str, client: str, round: int) -> Tensors:
    """Independent Gaussian numbers of that standard deviation for every number of ``like``; float64.

    They follow from the last four arguments and the tensors' names: asked again for the same round, a client sends the
    same noise, which repetition therefore cannot average out.
    """
    found: Tensors = {}
    for name, tensor in sorted(like.items()):
        generator = secret_generator(secret, f"{purpose}/{name}", client, round)
        found[name] = deviation * torch.from_numpy(generator.standard_normal(tuple(tensor.shape)))
    return found


def difference(tensors: Tensors, reference: Tensors) -> Tensors:
    """What floating tensors add to what was known of them (nothing: zero); float64."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {n: t.double() - reference[n].double() if n in reference else t.double() for n, t in floating.items()}


def applied(update: Tensors, reference: Tensors) -> Tensors:
    """The other way round: what was known, and an update; float32."""
    return {n: _sum(reference[n], t) if n in reference else t.float() for n, t in update.items()}


def added(one: Tensors, other: Tensors) -> Tensors:
    return {name: tensor + other[name] for name, tensor in one.items()}


def _sum(known: Tensor, update: Tensor) -> Tensor:
    return (known.double() + update).float()
