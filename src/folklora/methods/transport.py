"""Data similarity of CE-LoRA: optimal transport between the Gaussian mixtures of two clients' classes.

CE-LoRA (arXiv 2503.23869) compares clients by their mixtures and optimal transport [paper]. The distance between two
mixtures is MW2 of Delon and Desolneux (arXiv 1907.05254): transport restricted to the components. Between two clients,
transport over (class, class) pairs with class proportions as masses and MW2 as ground cost, and the similarity
exp(-D / median D), are [recon].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from folklora.data.mixtures import ClassMixtures

# Enough for a thousand classes a side; POT warns if it is ever reached.
_ITERATIONS = 1_000_000


def mixture_distances(left: ClassMixtures, right: ClassMixtures) -> Tensor:
    """MW2 between every class of one client and every class of another (arXiv 1907.05254).

    ``MW2^2 = min_P sum_gh P_gh W2^2(N_g, N_h)`` over plans P between the components' weights. For diagonal covariances
    the Gaussian W2 (Bures) is plain Euclid: ``W2^2 = ||m - m'||^2 + ||sqrt(v) - sqrt(v')||^2``.

    Parameters
    ----------
    left, right
        Mixtures of M and M' classes over features of one width, in the same space.

    Returns
    -------
    Tensor
        ``[M, M']`` float64, in feature units (not squared).
    """
    points, others = _points([left, right])
    return _mixture_distances(left, right, points, others)


def data_distances(clients: Sequence[ClassMixtures]) -> Tensor:
    """Distance between every two clients' data: optimal transport over their classes.

    ``D_ij = min_P sum_cc' P_cc' MW2(c, c')`` with the class proportions of i and j as masses. Class ids play no part:
    two clients with other labels are near when their features are. A metric on clients, as MW2 is one on mixtures.

    A client without any usable class (each of its classes has a single example) cannot be placed: its distance to
    every other is infinite [recon].

    Parameters
    ----------
    clients
        One :class:`~folklora.data.mixtures.ClassMixtures` a client, over features of one width.

    Returns
    -------
    Tensor
        ``[N, N]`` float64, symmetric, zero diagonal.
    """
    import ot

    placed = [i for i, client in enumerate(clients) if len(client.classes)]
    points = _points([clients[i] for i in placed])
    masses = [(clients[i].counts / clients[i].counts.sum()).numpy() for i in placed]
    distances = torch.full((len(clients), len(clients)), float("inf"), dtype=torch.float64).fill_diagonal_(0)
    for a, i in enumerate(placed):
        for b, j in enumerate(placed[:a]):
            cost = _mixture_distances(clients[i], clients[j], points[a], points[b]).numpy()
            distance = float(ot.emd2(masses[a], masses[b], cost, numItermax=_ITERATIONS))
            distances[i, j] = distances[j, i] = distance
    return distances


def similarity(distances: Tensor) -> Tensor:
    """``S = exp(-D / median of the off-diagonal D)`` [recon]: scale-free, 1 for equal data, 1/e at the median.

    Infinite distances (clients without a usable class) stay out of the median and give 0: such a client is like nobody
    but itself. A median of 0 gives 1 at every finite distance; a single client gives [[1]].

    Parameters
    ----------
    distances
        ``[N, N]`` symmetric, non-negative, zero diagonal; infinite entries allowed.

    Returns
    -------
    Tensor
        ``[N, N]`` float64 in [0, 1], ones on the diagonal.
    """
    d = distances.double()
    pairs = d[tuple(torch.triu_indices(len(d), len(d), offset=1))]
    pairs = pairs[pairs.isfinite()]
    # NumPy's median: the mean of the middle two, where torch takes the lower.
    scale = float(np.median(pairs.numpy())) if len(pairs) else 0.0
    return torch.exp(-d / scale) if scale > 0 else d.isfinite().double()


def _mixture_distances(left: ClassMixtures, right: ClassMixtures, points: Tensor, others: Tensor) -> Tensor:
    """:func:`mixture_distances` from the :func:`_points` of both sides."""
    ground = _squared_distances(points, others).view(*left.weights.shape, *right.weights.shape)
    ground = ground.transpose(1, 2).contiguous()  # [M, M', G, G']
    # Where a side has one component the plan is forced: the product of the weights.
    cost = torch.einsum("ag,abgh,bh->ab", left.weights, ground, right.weights)
    several = ((left.weights > 0).sum(1) > 1).unsqueeze(1) & ((right.weights > 0).sum(1) > 1)
    masses, other, blocks, solve = list(left.weights.numpy()), list(right.weights.numpy()), ground.numpy(), _solver()
    values = [solve(masses[a], other[b], blocks[a, b]) for a, b in several.nonzero().tolist()]
    cost[several] = torch.tensor(values, dtype=torch.float64)
    return cost.clamp_(min=0).sqrt_()


def _points(clients: Sequence[ClassMixtures]) -> list[Tensor]:
    """Per client ``[M G, 2 d]``: means beside standard deviations, so that Euclid between rows is W2 of components.

    All about one centre: the smaller the norms, the less is lost when a matrix product takes their difference.
    """
    points = [torch.cat([client.means, client.variances.sqrt()], dim=2).flatten(0, 1) for client in clients]
    if not points:
        return []
    centre = torch.stack([rows.mean(0) for rows in points]).mean(0)
    return [rows - centre for rows in points]


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances between rows by one matrix product; what is below its rounding is exactly 0."""
    norms = left.square().sum(1).unsqueeze(1) + right.square().sum(1)
    squared = torch.addmm(norms, left, right.T, alpha=-2)
    return torch.where(squared > left.shape[1] * torch.finfo(torch.float64).eps * norms, squared, 0.0)


@cache
def _solver() -> Callable[[np.ndarray, np.ndarray, np.ndarray], float]:
    """The exact transport cost of one small problem: masses ``[G]``, ``[G']`` and ground cost ``[G, G']`` to a number.

    POT's public ``emd2`` spends 80 us on checks around a network simplex of 3 us, and a federation has a hundred
    thousand such problems. Its inner function is private: it is used only if it solves a known problem in this
    version of POT, and problem by problem only if it reports the optimum.
    """
    import ot

    def public(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> float:
        return float(ot.emd2(a, b, cost))

    try:
        from ot.lp.emd_wrap import emd_c

        def private(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> float:
            _, value, _, _, status = emd_c(a, b, cost, 10_000, 1)
            return float(value) if status == 1 else public(a, b, cost)

        known = private(np.array([0.25, 0.75]), np.array([0.5, 0.5]), np.array([[0.0, 1.0], [2.0, 0.0]]))
        return private if abs(known - 0.5) < 1e-12 else public
    except Exception:  # whatever a private function of another version does, the public one stands
        return public
