"""The sliced Wasserstein distance, differentiable: distributions compared along directions, where sorting is enough.

Along one direction optimal transport pairs the smallest with the smallest: ``W2^2 = mean_i (x_(i) - y_(i))^2``. The
sliced distance is the mean over directions of the unit sphere (Rabin et al. 2011; Bonneel et al. 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor


def directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, width] unit vectors, uniform on the sphere."""
    drawn = torch.randn(count, width, generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True).clamp(min=1e-12)


def sliced_wasserstein(x: Tensor, y: Tensor, along: Tensor) -> Tensor:
    """The square of the sliced 2-Wasserstein distance of two point sets, ``[n, d]`` and ``[n, d]``.

    Parameters
    ----------
    y
        ``[1, d]`` too: then all mass lies in one point, and the distance is that of every point of x to it.
    along
        Directions [p, d], see `directions`.

    Returns
    -------
    Tensor
        A scalar, differentiable in both.

    Raises
    ------
    ValueError
        For sets of other sizes.
    """
    if len(y) not in {1, len(x)}:
        raise ValueError(f"{len(x)} points and {len(y)}; allowed: as many, or one")
    ours, theirs = (torch.sort(points @ along.T, dim=0).values for points in (x, y))
    return (ours - theirs).square().mean()
