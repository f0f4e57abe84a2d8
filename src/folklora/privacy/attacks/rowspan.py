"""Row spans of what was sent, and how far a candidate lies from them: the algebra of the span attack.

Nothing here knows of models. A gradient whose rows are sums of some inputs spans a subspace of these inputs' own; a
candidate that is one of them lies in it, up to what rounding, noise and the optimiser have added.
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

FALL = 30.0
"""A singular value so many times the next one is taken for the last that means something."""
SLACK = 10.0
"""Residuals may be so many times what the noise explains."""
FARTHEST = 0.1
"""Residuals above it are no sign of anything, whatever the noise."""
ROUNDING = 2**-20
"""Residuals below it are all the same: candidates are known in float32."""


@dataclass(frozen=True)
class RowSpan:
    """A subspace of R^n.

    Attributes
    ----------
    basis
        ``[k, n]`` float64 with orthonormal rows; k may be 0.
    values
        All singular values of the matrix it comes from, descending.
    noise
        The largest one that was left out, or the rounding floor, beside the smallest one kept: about the sine of the
        angle by which the subspace may be turned. 1 where k is 0.
    """

    basis: Tensor
    values: Tensor
    noise: float

    @property
    def dimensions(self) -> int:
        return len(self.basis)

    @property
    def everything(self) -> bool:
        """Whether the subspace is the whole space, in which every candidate lies."""
        return self.dimensions == self.basis.shape[1]


@dataclass(frozen=True)
class Space:
    """Rows in the space of the inputs, or of what a factor ``[n, d]`` makes of them."""

    rows: Tensor
    factor: Tensor | None = None

    def of(self, inputs: Tensor) -> Tensor:
        inputs = inputs.float()
        return inputs if self.factor is None else inputs @ self.factor.T.float()


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and right singular vectors as rows, float64.

    LAPACK's fast driver does not always converge where many values are next to zero; its slow one then does.
    """
    matrix = matrix.double()
    try:
        _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the stubs forget it
        _, found, vectors = scipy.linalg.svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd")
        values, rows = torch.from_numpy(found), torch.from_numpy(vectors)
    return values, rows


def row_span(matrix: Tensor, least: int = 0, most: int | None = None, epsilon: float = 2**-23) -> RowSpan:
    """The row span of a noisy matrix, its rank chosen by the largest gap between singular values.

    Singular values below the rounding floor ``values[0] * epsilon`` count as zero. Of the ranks from
    ``least`` to ``most`` the one is taken behind which the values fall most, if they fall by `FALL`; a matrix without
    such a gap has as many dimensions as it may have.

    Parameters
    ----------
    matrix
        ``[m, n]``.
    least, most
        What is known of the number of distinct inputs; ``most`` is at most ``min(m, n)`` whatever it is.
    epsilon
        Relative precision of the numbers in the matrix.
    """
    values, rows = decomposed(matrix)
    if not len(values) or float(values[0]) == 0 or not bool(torch.isfinite(values).all()):
        return RowSpan(rows[:0], values, 1.0)
    floor = float(values[0]) * epsilon
    usable = int((values > floor).sum())
    most = usable if most is None else min(usable, most)
    least = max(1, min(least, most))
    following = torch.cat([values[1:], values.new_zeros(1)]).clamp(min=floor)
    falls = (values / following)[least - 1 : most]
    # The last value of all has nothing behind it to fall to: that the matrix ends is no sign of its rank.
    if usable == len(values) == most:
        falls = falls[:-1]
    best = int(falls.argmax()) if len(falls) else -1
    rank = least + best if best >= 0 and float(falls[best]) >= FALL else most
    noise = float(following[rank - 1] / values[rank - 1]) if rank < len(values) else floor / float(values[rank - 1])
    return RowSpan(rows[:rank], values, min(1.0, noise))


def residuals(candidates: Tensor, span: RowSpan) -> Tensor:
    """Sine of the angle between each candidate ``[..., n]`` and the subspace: 0 inside, 1 orthogonal to it."""
    x = candidates.to(span.basis.dtype)
    squares = x.square().sum(-1)
    inside = (x @ span.basis.T).square().sum(-1)
    return (1 - inside / squares.clamp(min=torch.finfo(x.dtype).tiny)).clamp(min=0).sqrt()


def random_like(span: RowSpan, generator: torch.Generator) -> RowSpan:
    """A random subspace of as many dimensions: how near candidates lie to it is chance."""
    drawn = torch.randn(span.basis.T.shape, generator=generator, dtype=span.basis.dtype)
    return RowSpan(torch.linalg.qr(drawn).Q.T.contiguous(), span.values, 1.0)


def inside(scores: Tensor, noise: float, chance: float, most: int) -> Tensor:
    """Which residuals are those of inputs, and not of candidates that happen to lie near.

    They are no larger than `SLACK` times what noise explains, nor than `FARTHEST`, smaller than half of what ``chance``
    gives, at most ``most``, and below the widest gap between the logarithms of those that are left.
    """
    flat = scores.flatten().double().clamp(min=ROUNDING)
    near = flat.topk(min(most + 1, len(flat)), largest=False).values
    allowed = min(SLACK * max(noise, ROUNDING), FARTHEST, 0.5 * chance)
    count = min(int((near <= allowed).sum()), len(near) - 1)
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = int((near.log().diff())[:count].argmax())
    return scores <= float((near[last] * near[last + 1]).sqrt())
