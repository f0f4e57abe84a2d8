"""A Gaussian mixture per class of one client's features: CE-LoRA's one-off sketch of a client's data.

CE-LoRA (arXiv 2503.23869) fits a mixture per class on the frozen backbone's features and sends its parameters once,
before round 1 [paper]. Diagonal covariances, three components, ``reg_covar`` 1e-5, 200 iterations, k-means start, and
classes with a single example skipped are the authors' settings [code]. The rule for small classes, seeds per class,
the message layout and the shared projection are ours [recon].
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from folklora.data.statistics import ClassStatistics, class_ids, labelled, refuse_unknown, take, wire_counts
from folklora.errors import MessageError
from folklora.randomness import derive, torch_generator


@dataclass(frozen=True)
class ClassMixtures:
    """Gaussian mixtures with diagonal covariance, one for each class that is present.

    Attributes
    ----------
    classes
        ``[M]`` int64, strictly increasing ids of the present classes; ``M`` may be 0.
    counts
        ``[M]`` float64, positive: examples of each class.
    weights
        ``[M, G]`` float64; a row sums to 1. A class with fewer than ``G`` components is padded at the end: weight 0.
    means, variances
        ``[M, G, d]`` float64; padding holds zeros.
    """

    classes: Tensor
    counts: Tensor
    weights: Tensor
    means: Tensor
    variances: Tensor

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Tensor,
        components: int = 3,
        reg_covar: float = 1e-5,
        max_iter: int = 200,
        seed: int = 0,
    ) -> ClassMixtures:
        """Fit a mixture to each class by expectation-maximisation from a k-means start.

        A class of ``n_c`` examples gets ``min(components, n_c // 2)`` components: two examples for each at least
        [recon]; a class of one example is skipped [code]. The seed of a class derives from ``seed`` and its id alone,
        so its mixture does not depend on the other classes.

        Parameters
        ----------
        features
            ``[n, d]`` floating point.
        labels
            ``[n]`` non-negative integers.
        components
            Most components of a class, ``G``.
        reg_covar
            Added to every variance, in squared feature units.
        max_iter
            Most iterations; a mixture that has not converged by then is used as it is.
        seed
            A seed derived for this client, see :func:`folklora.randomness.derive`.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits  # comes with scikit-learn

        if components < 1:
            raise ValueError(f"a mixture needs at least one component, got {components}")
        x, y = labelled(features, labels, int(labels.max()) + 1 if len(labels) else 0)
        ids, sizes = y.unique(return_counts=True)
        ids, sizes = ids[sizes > 1], sizes[sizes > 1]
        m, d = len(ids), x.shape[1]
        weights, means = x.new_zeros(m, components), x.new_zeros(m, components, d)
        variances = torch.zeros_like(means)
        for row, (label, size) in enumerate(zip(ids.tolist(), sizes.tolist(), strict=True)):
            g = min(components, size // 2)
            mixture = GaussianMixture(
                n_components=g,
                covariance_type="diag",
                reg_covar=reg_covar,
                max_iter=max_iter,
                init_params="kmeans",
                random_state=derive(seed, f"mixture/{label}") % 2**32,
            )
            # One thread: k-means sums in the order of its threads, and on so few examples more of them only wait.
            with threadpool_limits(1), warnings.catch_warnings():
                # Repeated examples leave k-means without g distinct centres, and EM may not settle in max_iter steps:
                # both are expected of a client's small class, and the result is a mixture all the same.
                warnings.simplefilter("ignore", ConvergenceWarning)
                mixture.fit(x[y == label].numpy())
            weights[row, :g] = torch.from_numpy(mixture.weights_)
            means[row, :g] = torch.from_numpy(mixture.means_)
            variances[row, :g] = torch.from_numpy(mixture.covariances_)
        return cls(ids, sizes.double(), weights, means, variances)

    @classmethod
    def blank(cls, counts: Tensor, components: int, d: int) -> ClassMixtures:
        """Of the shape that `fit` gives to so many examples of each class, ``counts`` ``[C]``; centred at zero."""
        ids = torch.nonzero(counts > 1).squeeze(1)
        own = (counts[ids] // 2).clamp(max=components)
        weights = (torch.arange(components) < own.unsqueeze(1)) / own.unsqueeze(1).double()
        means = torch.zeros(len(ids), components, d, dtype=torch.float64)
        return cls(ids, counts[ids].double(), weights, means, means)

    @classmethod
    def from_statistics(cls, statistics: ClassStatistics) -> ClassMixtures:
        """One Gaussian a class, with the diagonal of the pooled covariance: class statistics read as mixtures [recon].

        A class of one example stays: its variance is the pooled one.
        """
        ids = torch.nonzero(statistics.counts > 0).squeeze(1)
        variances = statistics.scatter.diagonal().clamp(min=0).expand(len(ids), 1, -1).clone()
        means = statistics.means[ids].unsqueeze(1)
        return cls(ids, statistics.counts[ids], means.new_ones(len(ids), 1), means, variances)

    def to_tensors(self) -> dict[str, Tensor]:
        """The message: real components only, class after class.

        Returns
        -------
        dict
            ``classes`` and ``components`` ``[M]`` int32; ``counts`` ``[M]`` int32, or float32 when they carry noise;
            ``weights`` ``[T]``, ``means`` and ``variances`` ``[T, d]`` float32 with ``T = sum(components)``.
        """
        real = self.weights > 0
        return {
            "classes": self.classes.int(),
            "counts": wire_counts(self.counts),
            "components": real.sum(1).int(),
            "weights": self.weights[real].float(),
            "means": self.means[real].float(),
            "variances": self.variances[real].float(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], classes: int, d: int, components: int = 3) -> ClassMixtures:
        """Read a message of :meth:`to_tensors`.

        Parameters
        ----------
        tensors
            What arrived.
        classes, d
            Number of classes of the task and width of the features.
        components
            Most components of a class that were agreed on (it bounds what is allocated).

        Raises
        ------
        MessageError
            A tensor is missing, unknown, of another shape or kind, not finite; ids are out of range or not strictly
            increasing; a class has no component or too many; weights are not a distribution; a variance is negative.
            A class whose (noisy) count is not positive is no error: it is dropped.
        """
        refuse_unknown(tensors, {"classes", "counts", "components", "weights", "means", "variances"})
        ids = class_ids(tensors, classes)
        counts = take(tensors, "counts", (len(ids),))
        sizes = take(tensors, "components", (len(ids),), integer=True)
        if bool(((sizes < 1) | (sizes > components)).any()):
            raise MessageError(f"sketch has a class with {sizes.tolist()} components, allowed is 1 to {components}")
        total = int(sizes.sum())
        flat = {name: take(tensors, name, (total, d)) for name in ("means", "variances")}
        flat_weights = take(tensors, "weights", (total,))
        real = torch.arange(int(sizes.max()) if len(sizes) else 1) < sizes.unsqueeze(1)
        weights = torch.zeros(real.shape, dtype=torch.float64).masked_scatter_(real, flat_weights)
        if bool((flat_weights <= 0).any()) or bool(((weights.sum(1) - 1).abs() > 1e-2).any()):
            raise MessageError("sketch weights of a class are not positive numbers that sum to 1")
        if bool((flat["variances"] < 0).any()):
            raise MessageError("sketch holds a negative variance")
        means, variances = (
            torch.zeros(*real.shape, d, dtype=torch.float64).masked_scatter_(real.unsqueeze(2), flat[name])
            for name in ("means", "variances")
        )
        # float16 on the wire rounds weights: whatever the sum is now, masses must be exact for optimal transport.
        weights = weights / weights.sum(1, keepdim=True)
        kept = counts > 0
        return cls(ids[kept], counts[kept], weights[kept], means[kept], variances[kept])


def projection(d: int, p: int, seed: int) -> Tensor:
    """Random orthonormal rows, ``[p, d]`` float32: features are sketched as ``features @ projection.T`` [recon].

    Everyone derives the same matrix from the recipe's seed, so it costs no bytes; it stands where CE-LoRA's authors
    offer a PCA [code], which would have to be agreed on and sent. Uniform over the orthonormal frames.
    """
    if not 1 <= p <= d:
        raise ValueError(f"cannot project {d} dimensions to {p}")
    gaussian = torch.randn(d, p, generator=torch_generator(seed, "projection"), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # The sign of R's diagonal is the library's choice: without it, two machines could disagree.
    return (q * r.diagonal().sign()).T.float().contiguous()
