"""Centres of updates that a few liars cannot move far: pure functions of stacked rows, [n, P] float64 -> [P].

None of them needs data of the server's own, and none knows who lies; f of n rows may be anything at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_STEPS = 1000
_ENOUGH = 1e-12
"""A step of the geometric median this small beside the median distance of rows is the last one."""


def fewest(rule: str, liars: int) -> int:
    """How many rows a rule needs to withstand so many liars."""
    return {"krum": 2 * liars + 3, "multikrum": 2 * liars + 3}.get(rule, 2 * liars + 1 if rule == "trimmed" else 1)


def centre(rule: str, rows: Tensor, liars: int) -> Tensor:
    """The recipe's rule.

    Parameters
    ----------
    rows
        One update a client.
    liars
        f, for the rules that want to know (trimmed, krum, multikrum).

    Raises
    ------
    ValueError
        If there are fewer rows than `fewest`.
    """
    if len(rows) < fewest(rule, liars):
        raise ValueError(f"{rule} of {len(rows)} rows, {liars} of them liars; allowed: {fewest(rule, liars)} or more")
    rules: dict[str, Callable[[Tensor, int], Tensor]] = {
        "median": lambda rows, _: median(rows),
        "trimmed": trimmed_mean,
        "krum": krum,
        "multikrum": multikrum,
        "geometric": lambda rows, _: geometric_median(rows),
    }
    return rules[rule](rows, liars)


def median(rows: Tensor) -> Tensor:
    """Of each number by itself (arXiv 1803.01498); of an even count, the mean of the two in the middle."""
    ordered, n = rows.sort(dim=0).values, len(rows)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(rows: Tensor, liars: int) -> Tensor:
    """Of each number by itself: the mean without the f largest and the f smallest (arXiv 1803.01498)."""
    return rows.sort(dim=0).values[liars : len(rows) - liars].mean(dim=0)


def krum_scores(rows: Tensor, liars: int) -> Tensor:
    """[n]: the squared distances of a row to its n - f - 2 nearest others, summed (arXiv 1703.02757)."""
    squared = torch.stack([(rows - row).square().sum(dim=1) for row in rows])
    squared.fill_diagonal_(math.inf)
    return squared.sort(dim=1).values[:, : len(rows) - liars - 2].sum(dim=1)


def krum(rows: Tensor, liars: int) -> Tensor:
    """The row with the lowest score, of equals the first."""
    return rows[int(krum_scores(rows, liars).argmin())]


def multikrum(rows: Tensor, liars: int) -> Tensor:
    """The mean of the n - f rows with the lowest scores."""
    kept = krum_scores(rows, liars).sort(stable=True).indices[: len(rows) - liars]
    return rows[kept.sort().values].mean(dim=0)


def geometric_median(rows: Tensor) -> Tensor:
    """The point with the least sum of distances to all rows (RFA, arXiv 1912.13445), by Weiszfeld's iteration.

    As Vardi and Zhang mended it (PNAS 2000): it also leaves a row that it has landed on, where that is not the median.
    Start and stop are by medians: beside the distance of one liar who says 1e38, all others would be one point.
    """
    point = median(rows)
    spread = float((rows - point).norm(dim=1).median())
    for _ in range(_STEPS):
        away = (rows - point).norm(dim=1)
        there = away <= 1e-14 * spread
        if bool(there.all()):
            break
        weights = torch.where(there, 0.0, 1 / away.clamp(min=torch.finfo(rows.dtype).tiny))
        target = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        pull = float(weights.sum() * (target - point).norm())  # of all rows that are not where the point is
        held = float(there.sum())
        share = 1.0 if held and pull <= held else held / pull if held else 0.0
        moved = (1 - share) * (target - point)
        point = point + moved
        if float(moved.norm()) <= _ENOUGH * spread:
            break
    return point
