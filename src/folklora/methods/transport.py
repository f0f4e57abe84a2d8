"""Data similarity of CE-LoRA: optimal transport between the Gaussian mixtures of two clients' classes.

CE-LoRA (arXiv 2503.23869) compares clients by their mixtures and optimal transport [paper]. The distance between two
mixtures is MW2 of Delon and Desolneux (arXiv 1907.05254): transport restricted to the components. Between two clients,
transport over (class, class) pairs with class proportions as masses and MW2 as ground cost, and the similarity
exp(-D / median D), are [recon].

All of it is exact. N clients are N^2 / 2 transport problems, so it is for about a thousand clients;
`folklora.methods.embedding` is for more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from folklora.data.mixtures import ClassMixtures

# Enough for a thousand classes a side; POT warns if it is ever reached.
_ITERATIONS = 1_000_000
_EPS = torch.finfo(torch.float64).eps
_BLOCK = 4_000_000
"""Numbers in a block of the matrix of all components by all components: 32 MB."""
_CHUNK = 2048
"""Small problems solved side by side: their 21 candidates stay in the processor's cache."""


@dataclass(frozen=True)
class Atoms:
    """Every component of some clients' mixtures as one weighted point each, so that W2 between components is Euclid.

    For diagonal covariances the Gaussian W2 (Bures) is ``W2^2 = ||m - m'||^2 + ||sqrt(v) - sqrt(v')||^2``.

    Attributes
    ----------
    points
        ``[R, 2 d]`` float64: mean beside standard deviation, less ``centre``: only differences mean anything, and the
        smaller the norms, the less is lost when a matrix product takes them.
    weights
        ``[R]``: within the class.
    owner
        ``[R]`` int64, ascending: which class of all clients', 0 ... T - 1.
    components
        ``[T]``: of each class.
    masses
        For each client, ``[M]``: proportions of its classes.
    centre
        ``[2 d]``.
    """

    points: Tensor
    weights: Tensor
    owner: Tensor
    components: Tensor
    masses: list[Tensor]
    centre: Tensor

    @classmethod
    def of(cls, clients: Sequence[ClassMixtures], centre: Tensor | None = None) -> Atoms:
        """Of clients with at least one class each; about their own mean unless a centre ``[2 d]`` is given."""
        real = [client.weights > 0 for client in clients]
        points = torch.cat(
            [
                torch.cat([client.means[mask], client.variances[mask].sqrt()], dim=1)
                for client, mask in zip(clients, real, strict=True)
            ]
        )
        components = torch.cat([mask.sum(1) for mask in real])
        centre = points.mean(0) if centre is None else centre
        return cls(
            points=points - centre,
            weights=torch.cat([client.weights[mask] for client, mask in zip(clients, real, strict=True)]),
            owner=torch.arange(len(components)).repeat_interleave(components),
            components=components,
            masses=[client.counts / client.counts.sum() for client in clients],
            centre=centre,
        )

    def shares(self) -> Tensor:
        """[R]: the share of its client's examples that each point stands for."""
        return self.weights * torch.cat(self.masses)[self.owner]

    def sizes(self) -> list[int]:
        """How many points each client has."""
        return [int(part.sum()) for part in self.components.split([len(mass) for mass in self.masses])]

    def classes(self, first: int, last: int) -> Atoms:
        """Those of classes ``first`` to ``last`` (not included); masses are left out."""
        here = slice(int(self.components[:first].sum()), int(self.components[:last].sum()))
        owner = self.owner[here] - first
        return Atoms(self.points[here], self.weights[here], owner, self.components[first:last], [], self.centre)

    def of_class(self, which: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Row of each component of the given classes, and its weight, both ``[m, width]``; padding weighs nothing."""
        slot = torch.arange(width)
        size = self.components[which, None]
        rows = (self.components.cumsum(0) - self.components)[which, None] + slot.minimum(size - 1)
        return rows, torch.where(slot < size, self.weights[rows], 0.0)


def mixture_distances(left: ClassMixtures, right: ClassMixtures) -> Tensor:
    """MW2 between every class of one client and every class of another (arXiv 1907.05254).

    ``MW2^2 = min_P sum_gh P_gh W2^2(N_g, N_h)`` over plans P between the components' weights.

    Parameters
    ----------
    left, right
        Mixtures of M and M' classes over features of one width, in the same space.

    Returns
    -------
    Tensor
        ``[M, M']`` float64, in feature units (not squared).
    """
    both = Atoms.of([left, right])
    split, total = len(left.classes), len(left.classes) + len(right.classes)
    return _class_distances(both.classes(0, split), both.classes(split, total))


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
    distances = torch.full((len(clients), len(clients)), float("inf"), dtype=torch.float64).fill_diagonal_(0)
    placed = [i for i, client in enumerate(clients) if len(client.classes)]
    if not placed:
        return distances
    atoms = Atoms.of([clients[i] for i in placed])
    masses = [mass.numpy() for mass in atoms.masses]
    # Where each client's classes end, and its components.
    ends = np.cumsum([0, *(len(mass) for mass in masses)])
    heights = np.cumsum([0, *atoms.components.tolist()])[ends]
    solve = solver()
    found = np.zeros((len(placed), len(placed)))
    first = 0
    # POT's solver lets go of the interpreter, so its threads do run side by side.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while first < len(placed):
            # Rows of as many clients as a block holds, columns of all clients up to the last of them.
            last = first + 1
            while last < len(placed) and (heights[last + 1] - heights[first]) * heights[last + 1] <= _BLOCK:
                last += 1
            rows, columns = atoms.classes(ends[first], ends[last]), atoms.classes(0, ends[last])
            cost = _class_distances(rows, columns).numpy()

            def row(i: int, cost: np.ndarray = cost, offset: int = ends[first]) -> None:
                own = cost[ends[i] - offset : ends[i + 1] - offset]
                for j in range(i):
                    block = np.ascontiguousarray(own[:, ends[j] : ends[j + 1]])
                    found[i, j], _ = solve(masses[i], masses[j], block)

            list(pool.map(row, range(first, last)))
            first = last
    where = torch.tensor(placed)
    distances[where[:, None], where] = torch.from_numpy(found + found.T)
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
    return similar(distances.double(), median_distance(distances.double()))


def similar(distances: Tensor, scale: float) -> Tensor:
    """``exp(-D / scale)``, float64 of any shape; where the scale is 0, 1 at every finite distance."""
    return torch.exp(-distances / scale) if scale > 0 else distances.isfinite().double()


def distances_to(client: ClassMixtures, others: Sequence[ClassMixtures]) -> Tensor:
    """``[N]`` float64: `data_distances` of one client to each of some others."""
    distances = torch.full((len(others),), float("inf"), dtype=torch.float64)
    if not len(client.classes):
        return distances
    solve, own = solver(), (client.counts / client.counts.sum()).numpy()
    for i, other in enumerate(others):
        if len(other.classes):
            cost = np.ascontiguousarray(mixture_distances(client, other).numpy())
            distances[i], _ = solve(own, (other.counts / other.counts.sum()).numpy(), cost)
    return distances


def median_distance(distances: Tensor) -> float:
    """The median of the finite distances ``[N, N]`` between two different clients; 0 where there are none."""
    pairs = distances[tuple(torch.triu_indices(len(distances), len(distances), offset=1))]
    pairs = pairs[pairs.isfinite()]
    # NumPy's median: the mean of the middle two, where torch takes the lower.
    return float(np.median(pairs.numpy())) if len(pairs) else 0.0


def _class_distances(left: Atoms, right: Atoms) -> Tensor:
    """MW2 between all classes of either side: [M, M']."""
    ground = _squared_distances(left.points, right.points)
    # Where a side has one component the plan is forced: the product of the weights.
    cost = ground
    if len(cost) > len(left.components):
        pooled = cost.new_zeros(len(left.components), cost.shape[1])
        cost = pooled.index_add_(0, left.owner, cost * left.weights[:, None])
    if cost.shape[1] > len(right.components):
        pooled = cost.new_zeros(len(cost), len(right.components))
        cost = pooled.index_add_(1, right.owner, cost * right.weights)
    some, others = ((side.components > 1).nonzero().squeeze(1) for side in (left, right))
    if len(some) and len(others):
        width = max(3, int(left.components.max()), int(right.components.max()))
        rows, a = left.of_class(some, width)
        columns, b = right.of_class(others, width)
        blocks = ground.index_select(0, rows.flatten()).index_select(1, columns.flatten())
        blocks = blocks.view(*rows.shape, *columns.shape).transpose(1, 2).reshape(-1, width, width)
        solve = _three_by_three if width == 3 else _one_by_one
        values = [
            solve(a[part // len(others)], b[part % len(others)], blocks[part])
            for part in torch.arange(len(blocks)).split(_CHUNK)
        ]
        cost[some[:, None], others] = torch.cat(values).view(len(some), len(others))
    return cost.clamp_(min=0).sqrt_()


def _three_by_three(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
    """Exact transport costs of n problems of size 3 x 3, padded where smaller: masses [n, 3] twice, cost [n, 3, 3].

    By duality the cost is the largest value of ``sum_i a_i u_i + sum_j b_j min_i (c_ij - u_i)``. Only differences of u
    matter: u_3 = 0. The function is concave and linear between the lines ``u_i - u_k = c_ij - c_kj``, nine in three
    directions, so it is largest where two of them cross: 21 points, for those of one j meet in one.
    """
    a, b = a.T[:, None], b.T[:, None]  # [3, 1, n]
    c = cost.permute(1, 2, 0).contiguous()  # [3, 3, n]
    first, second, between = c[0] - c[2], c[1] - c[2], c[0] - c[1]  # [3, n]: u_1, u_2, u_1 - u_2
    left, right = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    one, other = left[left != right], right[left != right]
    u1 = torch.cat([first[left], first[one], second[one] + between[other]])  # [21, n]
    u2 = torch.cat([second[right], first[one] - between[other], second[one]])
    value = (a[0] * u1).addcmul_(a[1], u2)
    for j in range(3):
        least = c[0, j] - u1
        torch.minimum(least, c[1, j] - u2, out=least)
        torch.minimum(least, c[2, j], out=least)
        value.addcmul_(b[j], least)
    best = value.amax(0)
    # What is below the rounding of these sums is exactly 0: equal mixtures are at distance 0.
    return torch.where(best > 16 * _EPS * c.amax((0, 1)), best, 0.0)


def _one_by_one(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
    """Transport costs of problems of any size, one after the other; padding weighs nothing."""
    solve = solver()
    problems = zip(a.numpy(), b.numpy(), cost.numpy(), strict=True)
    values = [solve(p, q, c)[0] for p, q, c in problems]
    return torch.tensor(values, dtype=torch.float64)


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances between rows by one matrix product; what is below its rounding is exactly 0."""
    norms = left.square().sum(1).unsqueeze(1) + right.square().sum(1)
    squared = torch.addmm(norms, left, right.T, alpha=-2)
    return squared.masked_fill_(squared <= norms.mul_(left.shape[1] * _EPS), 0.0)


@cache
def solver() -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[float, np.ndarray]]:
    """The exact transport of one small problem: masses ``[G]``, ``[G']``, ground cost ``[G, G']`` to cost and plan.

    POT's public ``emd2`` spends 80 us on checks around a network simplex of 3 to 20 us, and a federation has a hundred
    thousand such problems. Its inner function is private: it is used only if it solves a known problem in this
    version of POT, and problem by problem only if it reports the optimum.
    """
    import ot

    def public(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> tuple[float, np.ndarray]:
        plan, log = ot.emd(a, b, cost, numItermax=_ITERATIONS, log=True)
        return float(log["cost"]), plan

    try:
        from ot.lp.emd_wrap import emd_c

        def private(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> tuple[float, np.ndarray]:
            plan, value, _, _, status = emd_c(a, b, cost, _ITERATIONS, 1)
            return (float(value), plan) if status == 1 else public(a, b, cost)

        a, b = np.array([0.25, 0.75]), np.array([0.5, 0.5])
        known, plan = private(a, b, np.array([[0.0, 1.0], [2.0, 0.0]]))
        right = abs(known - 0.5) < 1e-12 and np.allclose(plan, [[0.25, 0.0], [0.25, 0.5]])
        return private if right else public
    except Exception:  # whatever a private function of another version does, the public one stands
        return public
