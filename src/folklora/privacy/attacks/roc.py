"""How well scores tell members from others: the curve, and what can honestly be read off it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FALSE_POSITIVES = (1e-3, 1e-2)
"""Rates of false alarms at which true ones are reported (Carlini et al., arXiv 2112.03570)."""


@dataclass(frozen=True)
class Curve:
    """A receiver operating characteristic: rates at every threshold, from none accused to all.

    Attributes
    ----------
    positives, negatives
        How many examples are members, and how many are not.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    positives: int
    negatives: int

    @property
    def auc(self) -> float:
        """Probability that a member scores above another; ties count half."""
        return float(np.trapezoid(self.tpr, self.fpr))

    @property
    def balanced_accuracy(self) -> float:
        """At the best threshold, which the attacker would have to guess: an upper bound, above 0.5 by chance alone."""
        return float((1 + (self.tpr - self.fpr).max()) / 2)

    def measurable(self, rate: float) -> bool:
        """Whether one false alarm is no more than this rate allows."""
        return self.negatives * rate >= 1

    def tpr_at(self, rate: float) -> float:
        """The largest share of members accused while at most this share of the others is; NaN if not measurable."""
        return float(self.tpr[self.fpr <= rate].max()) if self.measurable(rate) else math.nan


def curve(scores: np.ndarray, members: np.ndarray) -> Curve:
    """Of scores [n], larger for members, and who is one, [n] bool.

    Raises
    ------
    ValueError
        If all are members, or none, or a score is not a number.
    """
    from sklearn.metrics import roc_curve

    positives = int(members.sum())
    if not 0 < positives < len(members) or np.isnan(scores).any():
        raise ValueError(f"{positives} of {len(members)} are members, and {int(np.isnan(scores).sum())} scores are NaN")
    fpr, tpr, _ = roc_curve(members, scores, drop_intermediate=False)
    return Curve(fpr, tpr, positives, len(members) - positives)
