"""What may leave a client of its audit: a status, and two shares in steps of a twentieth; with noise, if asked for.

Everything else of an audit stays. Both shares are made so that a bound on what one example can do to them is known:

- *distinct*: different examples over all of them. Only exact copies count: one example more may connect two groups of
  near ones, or part them, and then moves many.
- *regularity*: `folklora.data.audit.quality.regularity_of_blocks`, a mean over blocks.

With ``epsilon``, Laplace noise is added to each. Neighbours differ in one example that is another one; how many there
are is known to everybody, as it is in a federation. Replaced, an example

- changes the number of different examples by at most one: of n, *distinct* moves by at most ``1 / n``;
- is in one of k blocks, whose regularity is between 0 and 1: *regularity* moves by at most ``1 / k``.

Each share has half of ``epsilon``, so the noise has the scales ``2 / (n epsilon)`` and ``2 / (k epsilon)``. Rounding,
drawing back between 0 and 1, and the status are computed from what is noisy already. The guarantee is that of one
release: asked again, noise is drawn again and epsilons add up. Noise is that of floating-point numbers and not hardened
against attacks on their last digits (Mironov 2012), of which rounding leaves none. Sample and aggregate is Nissim,
Raskhodnikova and Smith's (2007); the rest is ours [recon].
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from folklora.data.audit.duplicates import Duplicates
from folklora.data.audit.measure import Measure
from folklora.data.audit.quality import bounded
from folklora.errors import DataError
from folklora.randomness import secret_generator

Status = Literal["thin", "repetitive", "noisy", "fine"]

FEW = 64
"""Fewer examples are thin."""
REPETITIVE = 0.8
"""Where fewer of them are different, they are repetitive."""
NOISY = 0.975
"""From this regularity on they are noise; rounded, 1."""
STEP = 0.05
EPSILONS = 1e-6, 1e6
"""Below nothing but noise would be said, above there would be none."""

STATUSES: dict[Status, str] = {
    "thin": f"fewer than {FEW} examples: too few to say more",
    "repetitive": f"fewer than {REPETITIVE:.0%} of the examples are different",
    "noisy": f"the order of words is as good as random: a regularity of {NOISY:g} or more",
    "fine": "not few, not copies, not random order",
}
"""What each means; of several the first."""


@dataclass(frozen=True)
class Release:
    """What may leave.

    Attributes
    ----------
    status, distinct, regularity
        See the module's text; both shares between 0 and 1, in steps of `STEP`.
    examples, blocks
        n and k.
    epsilon
        None: no noise was added.
    sensitivity, scale
        Of *distinct* and *regularity*: by how much one example moves it at most, and the noise's scale (0: none).
    """

    status: Status
    distinct: float
    regularity: float
    examples: int
    blocks: int
    epsilon: float | None
    sensitivity: tuple[float, float]
    scale: tuple[float, float]


def release(
    exact: Duplicates, regularities: Sequence[Measure], epsilon: float | None = None, secret: int | None = None
) -> Release:
    """What may leave of some examples.

    Parameters
    ----------
    exact, regularities
        Their exact copies, and the regularity of each block (`folklora.data.audit.quality.regularities`).
    secret
        Seeds the noise; default: drawn from the system. Noise that others can compute protects nobody.

    Raises
    ------
    DataError
        There are no examples, or ``epsilon`` is not within `EPSILONS`.
    """
    n, k = exact.examples, len(regularities)
    if not n:
        raise DataError("no examples; allowed: at least one")
    require_epsilon(epsilon)
    shares = 1.0 - exact.share, float(np.mean([bounded(each) for each in regularities]))
    sensitivity = 1 / n, 1 / k
    scale = (0.0, 0.0) if epsilon is None else (2 * sensitivity[0] / epsilon, 2 * sensitivity[1] / epsilon)
    random = secret_generator(secrets.randbits(128) if secret is None else secret, "audit/release")
    told = [value + (random.laplace(scale=width) if width else 0.0) for value, width in zip(shares, scale, strict=True)]
    distinct, regularity = (min(1.0, max(0.0, value)) for value in told)
    return Release(
        _status(n, distinct, regularity), _rounded(distinct), _rounded(regularity), n, k, epsilon, sensitivity, scale
    )


def require_epsilon(epsilon: float | None) -> None:
    """Refuse an epsilon that is none; None asks for no noise."""
    low, high = EPSILONS
    if epsilon is not None and not low <= epsilon <= high:
        raise DataError(f"epsilon = {epsilon:g}; allowed: a number above 0, from {low:g} to {high:g}")


def _status(examples: int, distinct: float, regularity: float) -> Status:
    if examples < FEW:
        return "thin"
    if distinct < REPETITIVE:
        return "repetitive"
    return "noisy" if regularity >= NOISY else "fine"


def _rounded(value: float) -> float:
    return round(round(value / STEP) * STEP, 2)
