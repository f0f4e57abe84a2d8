"""What a law has to beat: predictors that know nothing of it. Each has `predict(points)`, as `Law` does.

Shares (accuracies) are fitted on their log-odds [recon; the paper fits them as they are], where they have no end:
otherwise a law that saw accuracies below one half predicts more than all. What is copied needs no scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import expit, logit

from folklora.planning.law import fit_law, shape
from folklora.planning.points import Floats, Points


class Predictor(Protocol):
    def predict(self, points: Points) -> Floats: ...


Fit = Callable[[Points, Floats], Predictor]
"""Raises ValueError where there are too few cells, or too few that differ."""
CERTAIN = 1e-3


@dataclass(frozen=True)
class Mean:
    """The same of every model."""

    value: float

    def predict(self, points: Points) -> Floats:
        return np.full(len(points), self.value)


@dataclass(frozen=True, eq=False)
class Nearest:
    """What the nearest measured cell had, by doublings of each size; the mean where several are as near."""

    points: Points
    values: Floats

    def predict(self, points: Points) -> Floats:
        away = ((points.logs[:, None] - self.points.logs[None]) ** 2).sum(-1)
        near = away <= away.min(1, keepdims=True) + 1e-9
        return (near * self.values).sum(1) / near.sum(1)


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A polynomial of the logarithms of the sizes, by least squares."""

    axes: tuple[tuple[int, int], ...]
    degree: int
    centre: Floats
    weights: Floats

    def predict(self, points: Points) -> Floats:
        return _monomials(points.logs - self.centre, self.axes, self.degree) @ self.weights


def _monomials(logs: Floats, axes: tuple[tuple[int, int], ...], degree: int) -> Floats:
    columns = [np.ones(len(logs)), *(logs[:, axis] for axis, _ in axes)]
    if degree > 1:
        columns += [logs[:, axis] ** 2 for axis, levels in axes if levels > 1]
        names = [axis for axis, _ in axes]
        columns += [logs[:, a] * logs[:, b] for place, a in enumerate(names) for b in names[:place]]
    return np.stack(columns, 1)


def fit_mean(points: Points, values: Floats) -> Mean:
    if not len(points):
        raise ValueError("there is no cell")
    return Mean(float(values.mean()))


def fit_nearest(points: Points, values: Floats) -> Nearest:
    if not len(points):
        raise ValueError("there is no cell")
    return Nearest(points, values)


def _fit_polynomial(points: Points, values: Floats, degree: int) -> Polynomial:
    axes = tuple(shape(points))
    if not axes:
        raise ValueError("all runs are of one size")
    centre = points.logs.mean(0)
    matrix = _monomials(points.logs - centre, axes, degree)
    cells = len(np.unique(points.cells))
    if cells <= matrix.shape[1]:
        raise ValueError(f"{cells} cells for {matrix.shape[1]} parameters")
    weights = np.linalg.lstsq(matrix, values, rcond=1e-10)[0].astype(np.float64)
    return Polynomial(axes, degree, centre, weights)


def fit_linear(points: Points, values: Floats) -> Polynomial:
    """``c + sum a ln x``: a plain scaling law."""
    return _fit_polynomial(points, values, 1)


def fit_quadratic(points: Points, values: Floats) -> Polynomial:
    """Squares and products of the logarithms beside them; no square where an axis has two levels."""
    return _fit_polynomial(points, values, 2)


@dataclass(frozen=True)
class LogOdds:
    """A share in 0..1, by what was fitted to ``ln(p / (1 - p))``."""

    fitted: Predictor

    def predict(self, points: Points) -> Floats:
        found: Floats = expit(self.fitted.predict(points))
        return found


def on_log_odds(fit: Fit) -> Fit:
    """The same fit for shares; 0 and 1, which have no odds, count as `CERTAIN` away from themselves."""

    def fit_shares(points: Points, values: Floats) -> LogOdds:
        return LogOdds(fit(points, logit(np.clip(values, CERTAIN, 1 - CERTAIN))))

    return fit_shares


LAW, QUADRATIC, LINEAR, NEAREST, MEAN = "law", "log-quadratic", "log-linear", "nearest cell", "mean"

FITTED: dict[str, Fit] = {LAW: fit_law, QUADRATIC: fit_quadratic, LINEAR: fit_linear}
"""Those that say more of a size than that it is near another one."""
COPIED: dict[str, Fit] = {NEAREST: fit_nearest, MEAN: fit_mean}
PREDICTORS: dict[str, Fit] = {**FITTED, **COPIED}
OF_SHARES: dict[str, Fit] = {**{name: on_log_odds(fit) for name, fit in FITTED.items()}, **COPIED}


def predictors(share: bool) -> dict[str, Fit]:
    """Of a metric that is a share in 0..1, or of any other."""
    return OF_SHARES if share else PREDICTORS
