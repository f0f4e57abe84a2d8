"""A classification head in closed form from class statistics: linear discriminant analysis with shrinkage.

Not part of CE-LoRA: ours [recon], built on the statistics its clients send once anyway. From merged statistics
(:meth:`folklora.data.statistics.ClassStatistics.merge`) it is the head a central party would have computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from folklora.data.statistics import ClassStatistics, oracle_approximating_shrinkage
from folklora.errors import MethodError


def linear_discriminant(statistics: ClassStatistics, shrinkage: float | None = None) -> tuple[Tensor, Tensor]:
    """Weights and biases whose logits are the log posteriors of Gaussian classes with one covariance.

    ``w_c = Sigma^-1 mu_c`` and ``b_c = -1/2 mu_c' Sigma^-1 mu_c + log(n_c / n)``, with
    ``Sigma = (1 - g) S + g tr(S)/d I``, S the pooled within-class covariance and g the shrinkage. The same head as
    scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=g)``: it averages the shrunk covariances of the
    classes by their priors, and with priors n_c / n the shrinkage of the average is the average of the shrunk ones.

    A class that nobody has gets the mean of all examples as its mean, and half an example as its count (half the
    smallest count if that is below 1, after noise): it takes part in the softmax without a preference of its own and
    never wins over a class as near [recon]. With no examples at all, weights and biases are zero; with no spread at all
    (S = 0) Sigma is the identity, the nearest-mean rule [recon].

    Parameters
    ----------
    statistics
        Counts, means and covariance, see :class:`~folklora.data.statistics.ClassStatistics`.
    shrinkage
        Intensity g in [0, 1]; ``None`` is :func:`~folklora.data.statistics.oracle_approximating_shrinkage` at n = all
        examples, and ten times as much until the covariance is not singular.

    Returns
    -------
    weight, bias
        ``[C, d]`` and ``[C]`` float32; computed in float64.

    Raises
    ------
    MethodError
        Shrinkage outside [0, 1], or the covariance is singular at this shrinkage.
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise MethodError(f"shrinkage = {shrinkage} is not in [0, 1]")
    counts, means, scatter = statistics.counts.double(), statistics.means.double(), statistics.scatter.double()
    n, d = float(counts.sum()), scatter.shape[0]
    if n <= 0:
        return torch.zeros_like(means, dtype=torch.float32), torch.zeros_like(counts, dtype=torch.float32)
    unseen = counts <= 0
    means = torch.where(unseen.unsqueeze(1), counts @ means / n, means)
    counts = torch.where(unseen, 0.5 * min(1.0, float(counts[~unseen].min())), counts)
    identity = torch.eye(d, dtype=torch.float64)
    scale = float(scatter.trace()) / d
    g = oracle_approximating_shrinkage(scatter, n) if shrinkage is None else shrinkage
    sigma = (1 - g) * scatter + g * scale * identity if scale > 0 else identity
    factor, failed = torch.linalg.cholesky_ex(sigma)
    while failed and shrinkage is None and g < 1:  # whoever says that it has very many examples, which is its own word
        g = min(1.0, max(10 * g, 1e-12))
        factor, failed = torch.linalg.cholesky_ex((1 - g) * scatter + g * scale * identity)
    if failed:
        raise MethodError(f"the covariance of the features is singular at shrinkage = {shrinkage}: choose more")
    weight = torch.cholesky_solve(means.T, factor).T
    bias = -0.5 * (weight * means).sum(1) + torch.log(counts / n)
    return weight.float(), bias.float()
