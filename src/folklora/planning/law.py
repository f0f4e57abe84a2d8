"""The Performance Law (arXiv 2412.00430), fitted to measured models.

The form is the paper's [paper, code]: each size adds a logarithm, and a power that fades as the size grows::

    metric = c + w1 (ln N + p1 / N^q1) + w2 (ln d + p2 / d^q2) + w3 (ln D' + p3 / D'^q3)

N layers, d width, D' the data: tokens, times or over their entropy. In the authors' form w3 is 1, c is 0 and p1 is p2,
and their code holds one data set in a fit, so that D' is a constant in it: seven parameters to 24 points, of which D'
is not identified (any value fits as well). Ours [recon]: a pooled fit over several amounts of data, of which D' is
measured, with c, w3 and each p fitted; and no more of the form than an axis can bear. With two levels of a size it is
``w ln x``; with three the power joins in at q = 1; from four on q is fitted. An axis with one level is left out.

Given the exponents the law is linear, so only they are searched (variable projection), from several starts within
bounds; the best is kept, and each exponent's range among the starts that end within 1 % of it says how well it is
known. The sizes are counted in units of the smallest that was measured: p is in those units.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares

from folklora.planning.points import AXES, Floats, Points

BOUNDS = (0.25, 4.0)
"""Of an exponent: below, a power cannot be told from a logarithm; above, it is gone after one doubling."""
STARTS = (0.4, 1.0, 2.5)
ALIKE = 1.01
"""Starts that end within this factor of the best sum of squares fit as well."""


@dataclass(frozen=True)
class Term:
    """``weight ln x + power x^-exponent`` of one size; x is counted in ``unit``.

    Attributes
    ----------
    exponent
        None where there are too few levels for a power.
    known
        The lowest and the highest exponent that fit as well; None where it was not fitted.
    """

    axis: int
    unit: float
    weight: float
    power: float = 0.0
    exponent: float | None = None
    known: tuple[float, float] | None = None

    def __str__(self) -> str:
        x = f"{AXES[self.axis]}/{self.unit:g}"
        power = "" if self.exponent is None else f" {self.power:+.4g} ({x})^-{self.exponent:.2f}"
        return f"{self.weight:+.4g} ln({x}){power}"


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes
    ----------
    parameters
        How many numbers were fitted.
    residual
        Root of the mean square of what is left in-sample, by degrees of freedom.
    """

    constant: float
    terms: tuple[Term, ...]
    parameters: int
    residual: float

    def predict(self, points: Points) -> Floats:
        """[n] the metric."""
        found = np.full(len(points), self.constant)
        for term in self.terms:
            x = points.sizes[:, term.axis] / term.unit
            found += term.weight * np.log(x)
            if term.exponent is not None:
                found += term.power * x**-term.exponent
        return found

    def __str__(self) -> str:
        return " ".join([f"{self.constant:.4g}", *map(str, self.terms)])


def shape(points: Points) -> list[tuple[int, int]]:
    """The axes that a fit has terms of, and with how many parameters each: 1, 2 or 3."""
    levels = [len(points.levels(axis)) for axis in range(len(AXES))]
    return [(axis, min(3, count - 1)) for axis, count in enumerate(levels) if count > 1]


def fit_law(points: Points, values: Floats) -> Law:
    """Least squares; the same points give the same law.

    Raises
    ------
    ValueError
        Fewer cells than parameters, or nothing that differs; the message says which.
    """
    terms = shape(points)
    parameters = 1 + sum(count for _, count in terms)
    cells = len(np.unique(points.cells))
    if not terms:
        raise ValueError("all runs are of one size")
    if cells <= parameters:
        raise ValueError(f"{cells} cells for {parameters} parameters")
    units = points.sizes.min(0)
    x = points.sizes / units
    free = [axis for axis, count in terms if count == 3]

    def design(exponents: dict[int, float]) -> Floats:
        columns = [np.ones(len(x))]
        for axis, count in terms:
            columns.append(np.log(x[:, axis]))
            if count > 1:
                columns.append(x[:, axis] ** -exponents.get(axis, 1.0))
        return np.stack(columns, 1)

    def solved(exponents: dict[int, float]) -> tuple[Floats, Floats]:
        matrix = design(exponents)
        weights = np.linalg.lstsq(matrix, values, rcond=1e-10)[0].astype(np.float64)
        return weights, matrix @ weights - values

    def left(logs: Floats) -> Floats:
        return solved(dict(zip(free, np.exp(logs), strict=True)))[1]

    found: list[tuple[float, tuple[float, ...]]] = []
    if free:
        bounds = (np.full(len(free), np.log(BOUNDS[0])), np.full(len(free), np.log(BOUNDS[1])))
        for start in product(STARTS, repeat=len(free)):
            ended = least_squares(left, np.log(start), bounds=bounds, x_scale=1.0)
            found.append((2 * float(ended.cost), tuple(np.exp(ended.x).tolist())))
    else:
        found.append((float((solved({})[1] ** 2).sum()), ()))
    squares, best = min(found)
    alike = np.array([exponents for each, exponents in found if each <= ALIKE * squares + 1e-18])
    exponents = dict(zip(free, best, strict=True))
    weights = solved(exponents)[0].tolist()
    constant, rest = weights[0], weights[1:]
    made = []
    for axis, count in terms:
        weight, *power = (rest.pop(0) for _ in range(min(count, 2)))
        known = None
        if axis in exponents:
            column = alike[:, free.index(axis)]
            known = (float(column.min()), float(column.max()))
        exponent = exponents.get(axis, 1.0) if count > 1 else None
        made.append(Term(axis, float(units[axis]), weight, power[0] if power else 0.0, exponent, known))
    degrees = max(1, len(values) - parameters)
    return Law(constant, tuple(made), parameters, float(np.sqrt(squares / degrees)))
