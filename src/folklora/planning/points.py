"""What a law sees of a run: how deep, how wide, how much data, and how well it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

AXES = ("layers", "width", "data")
"""N, d and D' in the law, in the order of the columns of `Points`."""


@dataclass(frozen=True, eq=False)
class Points:
    """Models, measured or to be predicted.

    Attributes
    ----------
    sizes
        [n, 3] positive: layers, width, data (`AXES`).
    """

    sizes: Floats

    @classmethod
    def of(cls, sizes: Iterable[tuple[float, float, float]]) -> Points:
        """Raises ValueError for sizes that are not positive and finite."""
        found = np.array(list(sizes), dtype=np.float64).reshape(-1, len(AXES))
        if not (np.isfinite(found) & (found > 0)).all():
            raise ValueError("sizes must be positive and finite")
        return cls(found)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Points:
        return Points(self.sizes[rows])

    @property
    def logs(self) -> Floats:
        """[n, 3] natural logarithms."""
        return np.log(self.sizes)

    def levels(self, axis: int) -> Floats:
        """The different sizes along an axis, rising."""
        return np.unique(self.sizes[:, axis])

    @property
    def cells(self) -> NDArray[np.int64]:
        """[n]: which points are of the same sizes; runs that differ in their seed are one cell."""
        return np.unique(self.sizes, axis=0, return_inverse=True)[1].reshape(-1)
