"""How far predictions are off on cells that were not fitted, and when that is too far.

Two questions, two ways of holding out. *Beyond*: for each axis with three levels or more, the cells of its largest
level are held out together, as a plan predicts larger models from smaller ones. *Between*: five folds of cells, as it
predicts cells that lie among the measured ones. Seeds of one cell are held out together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from folklora.planning.baselines import COPIED, FITTED, MEAN, Fit, predictors
from folklora.planning.points import AXES, Floats, Points
from folklora.randomness import numpy_generator

How = Literal["beyond", "between"]
FOLDS = 5
COVERED = 0.9
MARGIN = 0.85
"""A fitted predictor is believed whose error is at most this share of copying's. Of pure chance, where there is nothing
to predict, one grid in twenty or fewer passes (at 1 it would be up to one in five: the best of three is compared)."""


@dataclass(frozen=True)
class HeldOut:
    """Errors of one predictor on cells it did not see.

    Attributes
    ----------
    errors
        Predicted less measured, of every point that was held out; empty where it could not be fitted.
    why
        Why it could not, else None.
    """

    errors: tuple[float, ...]
    why: str | None = None

    @property
    def rmse(self) -> float | None:
        return float(np.sqrt(np.mean(np.square(self.errors)))) if self.errors else None

    @property
    def reach(self) -> float | None:
        """What nine errors in ten are within."""
        return float(np.quantile(np.abs(self.errors), COVERED)) if self.errors else None


def splits(points: Points, how: How) -> Iterator[NDArray[np.bool_]]:
    """[n] masks of what is held out together."""
    if how == "beyond":
        for axis in range(len(AXES)):
            levels = points.levels(axis)
            if len(levels) > 2:
                yield points.sizes[:, axis] == levels[-1]
        return
    cells = points.cells
    count = int(cells.max()) + 1
    order = numpy_generator(0, "planning/folds").permutation(count)
    for fold in range(min(FOLDS, count)):
        yield np.isin(cells, order[fold::FOLDS])


def held_out(fit: Fit, points: Points, values: Floats, how: How) -> HeldOut:
    """Each part predicted from the others."""
    errors: list[float] = []
    for out in splits(points, how):
        try:
            fitted = fit(points[~out], values[~out])
        except ValueError as error:
            return HeldOut((), str(error))
        errors += (fitted.predict(points[out]) - values[out]).tolist()
    return HeldOut(tuple(errors), None if errors else "no size has three levels")


@dataclass(frozen=True)
class Verdict:
    """Which predictor is believed, or why none is.

    Attributes
    ----------
    beyond, between
        Each predictor's errors.
    how
        Which of the two decided: beyond where it could be asked.
    chosen
        The one of the fitted predictors with the least error, if that is clearly below copying's; else None.
    refusal
        Where none is chosen: the reason.
    """

    beyond: dict[str, HeldOut]
    between: dict[str, HeldOut]
    how: How
    chosen: str | None
    refusal: str | None

    def reach(self, extrapolated: bool) -> float:
        """Half the width of an interval: what nine in ten held-out errors of the chosen predictor are within."""
        assert self.chosen is not None
        ways = [self.beyond[self.chosen].reach, self.between[self.chosen].reach]
        found = [reach for reach in (ways if extrapolated else ways[1:]) if reach is not None] or [
            reach for reach in ways if reach is not None
        ]
        return max(found)


def judge(points: Points, values: Floats, share: bool = False) -> Verdict:
    """Hold out, compare, choose or refuse; ``points`` are one or more.

    Parameters
    ----------
    share
        Whether the values are shares in 0..1, whose log-odds are fitted; errors are of the shares themselves.
    """
    fits = predictors(share)
    beyond, between = ({name: held_out(fit, points, values, how) for name, fit in fits.items()} for how in _WAYS)
    how: How = "beyond" if any(beyond[name].rmse is not None for name in FITTED) else "between"
    found = {name: each.rmse for name, each in (beyond if how == "beyond" else between).items()}
    fitted = {name: rmse for name in FITTED if (rmse := found[name]) is not None}
    copied = {name: rmse for name in COPIED if (rmse := found[name]) is not None}
    if len(values) and float(np.ptp(values)) == 0:
        return Verdict(beyond, between, how, None, "all runs did equally well: there is nothing to fit")
    if not fitted:
        return Verdict(beyond, between, how, None, f"too few cells to hold some out ({too_few(points)})")
    best, bar = min(fitted, key=lambda name: fitted[name]), min(copied, key=lambda name: copied[name])
    if fitted[best] > MARGIN * copied[bar]:
        told = "the mean of all cells" if bar == MEAN else "the nearest cell"
        reason = (
            f"{best} is off by {fitted[best]:.4g} on cells it did not see, and {told} by {copied[bar]:.4g} "
            f"(allowed: at most {MARGIN:g} times that): the sizes do not say how well a model does"
        )
        return Verdict(beyond, between, how, None, reason)
    return Verdict(beyond, between, how, best, None)


def too_few(points: Points) -> str | None:
    """Why nothing could be held out of runs of these sizes, whatever they measure; None where it could."""
    whys: dict[str, str] = {}
    for name, fit in FITTED.items():
        found = [held_out(fit, points, np.zeros(len(points)), how) for how in _WAYS] if len(points) else []
        if any(each.errors for each in found):
            return None
        whys[name] = found[-1].why or "" if found else "there is no cell"
    return "; ".join(f"{name}: {why}" for name, why in whys.items())


_WAYS: tuple[How, How] = ("beyond", "between")
