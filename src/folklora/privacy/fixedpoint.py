"""Weighted vectors as whole numbers modulo 2^32, whose sum cannot overflow.

With n parties, numbers of at most R, weights of at most W, and K = (2^31 - 1) // n, a party of weight w makes of x the
whole number nearest to ``K * (w / W) * (x / R)``, x clipped to plus or minus R first. It is at most K, so n of them lie
in a signed word. Behind the vector stands w itself. From the sums q and w of some parties, ``q * R * W / (K * w)`` is
the weighted mean; each party's rounding moves it by at most half a step, so all of them together, m parties of weights
that sum to w, by at most

    m * R * W / (2 * K * w)    (equal weights: R / (2 K), which is below R * n / 2^32)

For n = 50 and R = 8 that is 1e-7, about the last digit of a float32 near 1. A number that is clipped is off by as much
as it was beyond R.

Where members add shares of noise (``privacy.placement = "shares"``), each share is rounded by itself, which an
accountant of real-valued noise does not count: a step, R * n / 2^31, has to be far below the noise, and R far above
it and all that it is added to: where the others' numbers are cut off, so is their noise
(`folklora.federation.secrecy` refuses the rest).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from folklora.errors import MessageError

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Grid:
    """The whole numbers that stand for numbers, the same at all parties.

    Attributes
    ----------
    range
        R: the largest magnitude.
    parties
        n: how many vectors are added at most.
    weight
        W: the largest weight.
    """

    range: float
    parties: int
    weight: int

    def __post_init__(self) -> None:
        if not 1 <= self.weight <= (2**32 - 1) // self.parties:
            raise MessageError(
                f"a weight of {self.weight} examples among {self.parties} members; allowed: "
                f"1 to {(2**32 - 1) // self.parties}, so that their sum fits"
            )

    @property
    def steps(self) -> int:
        """K."""
        return (2**31 - 1) // self.parties

    def words(self, values: Floats, weight: int) -> tuple[Words, int]:
        """A vector as words, its weight behind it; and how many of its numbers were clipped."""
        scale = self.steps * (weight / self.weight) / self.range
        whole = np.rint(np.clip(values, -self.range, self.range) * scale).astype(np.int64)
        return np.append(whole, weight).astype(np.uint32), int(np.count_nonzero(np.abs(values) > self.range))

    def mean(self, total: Words) -> tuple[Floats, int]:
        """The weighted mean and the sum of weights, of a sum of words."""
        weight = int(total[-1])
        whole = total[:-1].astype(np.int32).astype(np.float64)
        return whole * (self.range * self.weight / (self.steps * weight)), weight

    def error(self, parties: int, weight: int) -> float:
        """By how much the mean of so many parties, of this sum of weights, is off at most where nothing was clipped."""
        return parties * self.range * self.weight / (2 * self.steps * weight)
