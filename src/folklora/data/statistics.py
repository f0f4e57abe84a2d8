"""Class statistics of one client's features: counts, means and the pooled within-class covariance.

What a linear discriminant head needs, and no more. Statistics of several clients merge exactly into those of the union
of their examples, so a head computed from the merged statistics is the head a central party would have computed.

CE-LoRA (arXiv 2503.23869) sends a mixture per class (:mod:`folklora.data.mixtures`); sending these statistics beside or
instead of it is ours [recon].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folklora.errors import MessageError


@dataclass(frozen=True)
class ClassStatistics:
    """Sufficient statistics of labelled features under "one Gaussian a class, one covariance for all".

    Attributes
    ----------
    counts
        ``[C]`` float64, examples of each class; not whole numbers once noise was added.
    means
        ``[C, d]`` float64, class means; a zero row where a class is absent (its count is 0).
    scatter
        ``[d, d]`` float64, within-class scatter pooled over classes and divided by the number of examples ``n``:
        ``1/n sum_i (x_i - mu_{y_i})(x_i - mu_{y_i})'``. Zero when there are no examples.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> ClassStatistics:
        """Statistics of one client's examples.

        Parameters
        ----------
        features
            ``[n, d]`` floating point; ``n`` may be 0.
        labels
            ``[n]`` integers in ``[0, classes)``.
        classes
            Number of classes ``C`` of the task, present here or not.
        """
        x, y = labelled(features, labels, classes)
        counts = torch.bincount(y, minlength=classes).double()
        means = x.new_zeros(classes, x.shape[1]).index_add_(0, y, x) / counts.clamp(min=1).unsqueeze(1)
        residuals = x - means[y]
        return cls(counts, means, residuals.T @ residuals / max(len(x), 1))

    @classmethod
    def merge(cls, parts: Sequence[ClassStatistics]) -> ClassStatistics:
        """Exactly the statistics of the union of the parts' examples.

        A part's scatter is around *its own* class means. Around the pooled means it grows by what lies between the
        parts: ``n S = sum_k n_k S_k + sum_k sum_c n_kc (mu_kc - mu_c)(mu_kc - mu_c)'``.

        Raises
        ------
        ValueError
            No parts, or parts of different classes or widths.
        """
        if not parts:
            raise ValueError("nothing to merge: no class statistics given")
        if len({part.means.shape for part in parts}) > 1:
            raise ValueError(f"class statistics differ in shape: {sorted({tuple(p.means.shape) for p in parts})}")
        counts = torch.stack([part.counts for part in parts]).sum(0)
        sums = torch.stack([part.counts.unsqueeze(1) * part.means for part in parts]).sum(0)
        means = torch.where(counts.unsqueeze(1) > 0, sums / counts.unsqueeze(1), 0.0)
        total = torch.zeros_like(parts[0].scatter)
        for part in parts:
            shift = part.counts.sqrt().unsqueeze(1) * (part.means - means)
            total += part.counts.sum() * part.scatter + shift.T @ shift
        n = counts.sum()
        return cls(counts, means, total / n if n > 0 else total)

    def without(self, part: ClassStatistics) -> ClassStatistics:
        """The inverse of `merge`: of the examples that are not the part's, where those of the part are among these.

        Rounding on the way, or noise, may leave less than nothing: a class with less than half an example is absent,
        and the scatter is made positive semi-definite.
        """
        counts = self.counts - part.counts
        counts = torch.where(counts < 0.5, 0.0, counts)
        sums = self.counts.unsqueeze(1) * self.means - part.counts.unsqueeze(1) * part.means
        means = torch.where(counts.unsqueeze(1) > 0, sums / counts.unsqueeze(1), 0.0)
        total = self.counts.sum() * self.scatter - part.counts.sum() * part.scatter
        for n, of in ((counts, means), (part.counts, part.means)):
            shift = n.sqrt().unsqueeze(1) * (of - self.means)
            total = total - shift.T @ shift
        n = counts.sum()
        return ClassStatistics(counts, means, positive_part(total / n) if n > 0 else torch.zeros_like(total))

    def to_tensors(self) -> dict[str, Tensor]:
        """The message: present classes only, and one triangle of the symmetric scatter.

        Returns
        -------
        dict
            ``classes`` ``[M]`` int32; ``counts`` ``[M]`` int32, or float32 when they carry noise; ``means`` ``[M, d]``
            float32; ``scatter`` ``[d (d + 1) / 2]`` float32, upper triangle with the diagonal, row by row.
        """
        present = torch.nonzero(self.counts > 0).squeeze(1)
        rows, columns = torch.triu_indices(len(self.scatter), len(self.scatter))
        return {
            "classes": present.int(),
            "counts": wire_counts(self.counts[present]),
            "means": self.means[present].float(),
            "scatter": self.scatter[rows, columns].float(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], classes: int, d: int) -> ClassStatistics:
        """Read a message of :meth:`to_tensors`, for a task of ``classes`` classes and features of width ``d``.

        Rules, for what noise and quantisation do to honest numbers: a count that is not positive makes its class
        absent; a scatter with negative eigenvalues is replaced by the nearest positive semi-definite matrix.

        Raises
        ------
        MessageError
            A tensor is missing, unknown, of another shape or kind, not finite; or ids are out of range or not
            strictly increasing.
        """
        refuse_unknown(tensors, {"classes", "counts", "means", "scatter"})
        ids = class_ids(tensors, classes)
        counts = take(tensors, "counts", (len(ids),)).clamp(min=0)
        means = take(tensors, "means", (len(ids), d))
        upper = take(tensors, "scatter", (d * (d + 1) // 2,))
        rows, columns = torch.triu_indices(d, d)
        scatter = upper.new_zeros(d, d)
        scatter[rows, columns] = upper
        scatter[columns, rows] = upper
        # Rounding to float32 alone moves an eigenvalue by at most eps * trace: only more than that is worth an eigh.
        slack = torch.finfo(torch.float32).eps * scatter.trace().clamp(min=0) * torch.eye(d, dtype=torch.float64)
        if scatter.any() and torch.linalg.cholesky_ex(scatter + slack).info:
            scatter = positive_part(scatter)
        result = cls(upper.new_zeros(classes), upper.new_zeros(classes, d), scatter)
        result.counts[ids] = counts
        result.means[ids] = torch.where(counts.unsqueeze(1) > 0, means, 0.0)
        return result


def oracle_approximating_shrinkage(scatter: Tensor, n: float) -> float:
    """Shrinkage of a covariance towards its mean variance that minimises the expected squared error, for Gaussians.

    Chen, Wiesel, Eldar, Hero 2010 (arXiv 0907.4698, eq. 23) without its terms 2/d, as scikit-learn computes it:
    ``g = (tr(S^2) + tr(S)^2) / ((n + 1)(tr(S^2) - tr(S)^2 / d))``, at most 1.

    Parameters
    ----------
    scatter
        ``[d, d]`` covariance S (divided by n).
    n
        Number of examples behind it.
    """
    squares, trace = float(scatter.square().sum()), float(scatter.trace())
    excess = (n + 1) * (squares - trace**2 / scatter.shape[0])
    return min((squares + trace**2) / excess, 1.0) if excess > 0 else 1.0


def labelled(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Features as float64 and labels as int64, both on the CPU (there sums are reproducible); shapes checked."""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)} are not [n, d] and [n]")
    x, y = features.detach().cpu().double(), labels.detach().cpu().long()
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"labels lie in [{int(y.min())}, {int(y.max())}], outside [0, {classes})")
    return x, y


def positive_part(matrix: Tensor) -> Tensor:
    """The nearest positive semi-definite matrix of a symmetric one: its negative eigenvalues set to 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0)) @ vectors.T


def wire_counts(counts: Tensor) -> Tensor:
    """Counts as int32 when they are whole numbers, float32 when they carry noise."""
    return counts.int() if bool((counts == counts.round()).all()) else counts.float()


def refuse_unknown(tensors: Mapping[str, Tensor], known: set[str]) -> None:
    """Raise :class:`MessageError` when a sketch holds a tensor nobody asked for."""
    if unknown := sorted(set(tensors) - known):
        raise MessageError(f"sketch holds unknown tensors {unknown}; expected {sorted(known)}")


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], integer: bool = False) -> Tensor:
    """One tensor of a sketch on the CPU as float64 (int64 if ``integer``), or :class:`MessageError`.

    A negative number in ``shape`` lets that axis be any length.
    """
    if name not in tensors:
        raise MessageError(f"sketch lacks the tensor {name!r}")
    tensor = tensors[name]
    fits = tensor.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits:
        raise MessageError(f"sketch tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype == torch.bool or tensor.is_complex() or (integer and tensor.is_floating_point()):
        raise MessageError(f"sketch tensor {name!r} has dtype {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise MessageError(f"sketch tensor {name!r} holds NaN or infinite values")
    return tensor.detach().cpu().to(torch.int64 if integer else torch.float64)


def class_ids(tensors: Mapping[str, Tensor], classes: int) -> Tensor:
    """The ``classes`` of a sketch, ``[M]`` int64, strictly increasing in ``[0, classes)``, or :class:`MessageError`."""
    ids = take(tensors, "classes", (-1,), integer=True)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < classes:
        raise MessageError(f"sketch names classes in [{int(ids.min())}, {int(ids.max())}], outside [0, {classes})")
    if bool((ids[1:] <= ids[:-1]).any()):
        raise MessageError("sketch names a class twice or out of order")
    return ids
