"""Differentially private release of a client's class statistics or mixtures: one Gaussian mechanism, one message.

CE-LoRA (arXiv 2503.23869) sends mixtures of private features in the clear, and its authors attack them [code]; this
release is ours [recon]. The guarantee is (epsilon, delta)-differential privacy for one example: neighbouring data sets
differ by one example added or removed. It covers one release; what a client sends later is not in it.

Sensitivity
-----------
Every feature x is clipped to ``||x|| <= R``. The query sums, over examples, three blocks:

- ``e_y`` (which class): norm 1;
- ``x / R`` in the row of class y, zero in all other rows: norm <= 1;
- the second moments: ``x x' / R^2`` with Frobenius norm ``||x||^2 / R^2 <= 1``, sent as its upper triangle with
  off-diagonal entries times sqrt(2), which keeps that norm; or only the squares ``x_i^2 / R^2``, whose norm
  ``sqrt(sum x_i^4) / R^2 <= ||x||^2 / R^2 <= 1``.

One example more or less changes the whole vector by exactly its own term, of norm ``<= sqrt(1 + 1 + 1)``, and an
example of norm R reaches it: the L2 sensitivity is sqrt(3). Each block has the same share, and so the same noise beside
the most that one example can move it. Everything after the noise is post-processing.

Limits
------
- Noise is float64 Gaussian from a generator that is not cryptographic, and is not hardened against attacks on
  floating-point rounding (Mironov 2012). The generator must be seeded by a secret of the client: noise that others can
  derive from the recipe's seed protects nobody.
- The noise grows with the width d while the features do not: project first
  (:func:`folklora.data.mixtures.projection`). With tens of examples a class and d in the hundreds, what is left at
  epsilon near 1 is noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from folklora.data.mixtures import ClassMixtures
from folklora.data.statistics import ClassStatistics, labelled, positive_part
from folklora.errors import MethodError

SENSITIVITY = math.sqrt(3)
"""L2 sensitivity of :func:`query` when one example is added or removed."""

VARIANCE_FLOOR = 1e-5
"""Least variance of a released Gaussian, beside the clip: ``1e-5 R^2 / d`` (CE-LoRA's reg_covar at unit scale)."""


def noise_multiplier(epsilon: float, delta: float) -> float:
    """Least noise per unit of L2 sensitivity: the analytic Gaussian mechanism (Balle and Wang, arXiv 1805.06530).

    Raises
    ------
    MethodError
        ``epsilon`` is not positive and finite, ``delta`` not in (0, 1), or ``dp-accounting`` is not installed.
    """
    if not (0 < epsilon < math.inf and 0 < delta < 1):
        raise MethodError(f"epsilon = {epsilon}, delta = {delta}: epsilon must be positive, delta between 0 and 1")
    try:
        from dp_accounting import get_sigma_gaussian
    except ImportError as error:
        raise MethodError("a private release needs dp-accounting: pip install 'folklora[privacy]'") from error
    with np.errstate(divide="ignore"):  # its search passes over log(0), and means it
        return float(get_sigma_gaussian(epsilon, delta))


def query(features: Tensor, labels: Tensor, classes: int, clip: float, diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What gets noise: counts ``[C]``, sums ``[C, d]``, second moments, each scaled to sensitivity 1.

    The second moments are ``[d (d + 1) / 2]``, or ``[d]`` with ``diagonal``; module docstring for scales and proof.

    Raises
    ------
    MethodError
        ``clip`` is not positive and finite.
    """
    if not 0 < clip < math.inf:
        raise MethodError(f"clip = {clip} must be a positive number")
    x, y = labelled(features, labels, classes)
    x = x / x.norm(dim=1, keepdim=True).clamp(min=clip)
    counts = torch.bincount(y, minlength=classes).double()
    sums = x.new_zeros(classes, x.shape[1]).index_add_(0, y, x)
    if diagonal:
        return counts, sums, x.square().sum(0)
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1])
    return counts, sums, (x.T @ x)[rows, columns] * torch.where(rows == columns, 1.0, math.sqrt(2))


def release_statistics(
    features: Tensor,
    labels: Tensor,
    classes: int,
    clip: float,
    epsilon: float,
    delta: float,
    generator: np.random.Generator,
) -> ClassStatistics:
    """Class statistics that are (epsilon, delta)-differentially private for each example.

    A class whose noisy count is below ``max(1/2, 3 sd of that noise)`` is suppressed: absent classes hardly ever pass.
    Means are drawn back into the ball of radius ``clip``, the covariance to the nearest positive semi-definite one.
    Examples of suppressed classes stay in the covariance without a mean of their own: it errs on the wide side.

    Parameters
    ----------
    features, labels, classes
        As in :meth:`ClassStatistics.of`.
    clip
        R, in feature units; chosen without looking at private data (normalised embeddings: 1).
    epsilon, delta
        The guarantee; ``delta`` well below ``1 / n``.
    generator
        Seeded by a secret of this client: `folklora.randomness.secret_generator`.

    Raises
    ------
    MethodError
        As :func:`noise_multiplier` and :func:`query`.
    """
    raw = _release(features, labels, classes, clip, epsilon, delta, generator, diagonal=False)
    return ClassStatistics(raw.counts, raw.means, positive_part(raw.scatter))


def release_mixtures(
    features: Tensor,
    labels: Tensor,
    classes: int,
    clip: float,
    epsilon: float,
    delta: float,
    generator: np.random.Generator,
) -> ClassMixtures:
    """One Gaussian a class, (epsilon, delta)-differentially private for each example.

    As :func:`release_statistics`, with squares in place of full second moments. All classes share the variances: the
    squares of one class alone would carry the same noise over far fewer examples. Variances are at least
    ``VARIANCE_FLOOR * clip^2 / d``.
    """
    raw = _release(features, labels, classes, clip, epsilon, delta, generator, diagonal=True)
    floor = VARIANCE_FLOOR * clip**2 / raw.means.shape[1]
    scatter = torch.diag(raw.scatter.diagonal().clamp(min=floor))
    return ClassMixtures.from_statistics(ClassStatistics(raw.counts, raw.means, scatter))


def _release(
    features: Tensor,
    labels: Tensor,
    classes: int,
    clip: float,
    epsilon: float,
    delta: float,
    generator: np.random.Generator,
    diagonal: bool,
) -> ClassStatistics:
    """Noisy statistics with a covariance (or only its diagonal) that may still have negative eigenvalues.

    Nothing private is touched after the noise.
    """
    deviation = SENSITIVITY * noise_multiplier(epsilon, delta)
    counts, sums, moments = (
        exact + deviation * torch.from_numpy(generator.standard_normal(tuple(exact.shape)))
        for exact in query(features, labels, classes, clip, diagonal)
    )
    n = max(float(counts.sum()), 1.0)
    kept = counts >= max(0.5, 3 * deviation)
    counts = torch.where(kept, counts, 0.0)
    means = torch.where(kept.unsqueeze(1), sums / counts.unsqueeze(1), 0.0)
    d = means.shape[1]
    # n_c mu_c mu_c' of a noisy mean is too large by deviation^2 / n_c on the diagonal, on average: known, so taken out.
    excess = deviation**2 * float((1 / counts[kept]).sum())
    between = (counts.unsqueeze(1) * means).T @ means - excess * torch.eye(d, dtype=torch.float64)
    within = (torch.diag(moments) if diagonal else _symmetric(moments, d)) - between
    means = means / means.norm(dim=1, keepdim=True).clamp(min=1.0)
    return ClassStatistics(counts, clip * means, clip**2 * within / n)


def _symmetric(moments: Tensor, d: int) -> Tensor:
    """The ``[d, d]`` matrix behind the triangle of :func:`query`."""
    rows, columns = torch.triu_indices(d, d)
    matrix = moments.new_zeros(d, d)
    matrix[rows, columns] = torch.where(rows == columns, moments, moments / math.sqrt(2))
    matrix[columns, rows] = matrix[rows, columns]
    return matrix
