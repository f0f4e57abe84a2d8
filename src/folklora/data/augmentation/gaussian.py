"""A Gaussian a class, one covariance for all: the plainest way to more examples. Ours [recon]."""

from __future__ import annotations

import torch
from torch import Tensor

from folklora.data.statistics import ClassStatistics, oracle_approximating_shrinkage

Labelled = tuple[Tensor, Tensor]
"""Features [n, d] float32 and labels [n] int64."""


def per_class(real: Labelled, classes: int, count: int, generator: torch.Generator) -> Labelled:
    """Draws from the classes of a client as its own examples describe them; see `draws`.

    Parameters
    ----------
    real
        The client's examples.
    classes
        Of the task.
    count
        Draws of each class that the client has.
    """
    return draws(ClassStatistics.of(*real, classes), real[1], count, generator)


def draws(statistics: ClassStatistics, labels: Tensor, count: int, generator: torch.Generator) -> Labelled:
    """So many features of each class in ``labels`` that the statistics know, from ``N(mu_c, Sigma)``.

    ``Sigma = (1 - g) S + g tr(S)/d I`` is the unbiased within-class covariance S, shrunk by
    `oracle_approximating_shrinkage` for its n - C degrees of freedom (n examples, C classes). Where there are none, one
    example a class, nobody knows how far examples lie apart, and nothing is drawn.

    Returns
    -------
    Labelled
        Ordered by class; empty where nothing can be drawn.
    """
    width = statistics.means.shape[1]
    known = torch.unique(labels)
    known = known[statistics.counts[known] > 0]
    present = statistics.counts > 0
    freedom = float(statistics.counts.sum()) - int(present.sum())
    if freedom < 1 or not len(known) or float(statistics.scatter.trace()) <= 0:
        return torch.zeros(0, width), torch.zeros(0, dtype=torch.int64)
    scatter = statistics.scatter * (float(statistics.counts.sum()) / freedom)
    shrinkage = oracle_approximating_shrinkage(scatter, freedom)
    sigma = (1 - shrinkage) * scatter
    sigma.diagonal().add_(shrinkage * scatter.trace() / width)
    values, vectors = torch.linalg.eigh(sigma)  # unlike Cholesky's, this factor needs no full rank
    factor = vectors * values.clamp(min=0).sqrt()
    drawn = known.repeat_interleave(count)
    noise = torch.randn(len(drawn), width, generator=generator, dtype=torch.float64)
    return (statistics.means[drawn] + noise @ factor.T).float(), drawn
