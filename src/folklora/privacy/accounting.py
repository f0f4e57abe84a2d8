"""What differential privacy costs: epsilon of Gaussian releases of random samples, and the noise for a budget.

A thin layer over Google's ``dp-accounting``, shared by all units of ``[privacy]``. Neighbouring data sets differ by one
unit (an example, or a client) added or removed. One *event* releases a sum of vectors of norm at most C, over units
that are each in it with probability q independently of all others (Poisson sampling), plus Gaussian noise of standard
deviation ``noise * C`` in every number. With q = 1 it is the plain Gaussian mechanism of L2 sensitivity C.

Composition is adaptive: what is asked next may depend on all that was released before. Two accountants:

- ``pld``: privacy loss distributions on a grid (connect-the-dots, arXiv 2207.04380). An upper bound, tight to about a
  thousandth where epsilon is above 0.1; exact where nothing is sampled.
- ``rdp``: Rényi differential privacy of the sampled Gaussian (arXiv 1908.10530). An upper bound that others can compute
  again with any tool, up to a third larger.

Beyond an epsilon of `LOOSE` both give the Rényi bound: the grid would become as long as epsilon is large, and so large
a number protects nobody anyway.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from folklora.errors import RecipeError

if TYPE_CHECKING:
    from dp_accounting import DpEvent

LOOSE = 1000.0
"""The epsilon beyond which only the Rényi bound is computed."""

PRECISION = 0.005
"""Noise is found so that it spends between 1 - this and 1 of the budget, never more than it."""

_SMALLEST, _LARGEST = 2.0**-6, 2.0**20
"""Between these a noise multiplier is looked for."""

_FEW_ORDERS = (1.5, 2, 3, 4, 6, 8, 16, 32, 64, 256)
"""Rényi orders of a bound that only says whether a better one is worth while."""


def event(noise: float, sampling: float) -> DpEvent:
    """One Gaussian release of a Poisson sample.

    Parameters
    ----------
    noise
        Standard deviation per unit of L2 sensitivity; 0 protects nothing, and costs an infinite epsilon.
    sampling
        q, the probability with which each unit is in the sample, in (0, 1].

    Raises
    ------
    RecipeError
        If a number is out of its range, or ``dp-accounting`` is not installed.
    """
    if not (0 <= noise < math.inf and 0 < sampling <= 1):
        raise RecipeError(
            f"noise = {noise:g}, sampling = {sampling:g}; allowed: noise of at least 0, a probability in (0, 1]"
        )
    dp = _library()
    if noise == 0:
        return dp.NonPrivateDpEvent()
    gaussian = dp.GaussianDpEvent(float(noise))
    return gaussian if sampling == 1 else dp.PoissonSampledDpEvent(float(sampling), gaussian)


def epsilon_spent(events: Sequence[tuple[DpEvent, int]], delta: float, accountant: str) -> float:
    """Epsilon at ``delta`` of all events together, each as often as it says; 0 if nothing happened.

    Parameters
    ----------
    events
        ``(event, times)``, in any order: of one unit of the same data.
    accountant
        "pld" or "rdp".

    Raises
    ------
    RecipeError
        If ``delta`` is not in (0, 1), the accountant is unknown, or ``dp-accounting`` is not installed.
    """
    if not 0 < delta < 1:
        raise RecipeError(f"delta = {delta:g}; allowed: between 0 and 1")
    if accountant not in ("pld", "rdp"):
        raise RecipeError(f'accountant = "{accountant}"; allowed: "pld", "rdp"')
    times: dict[Any, int] = {}
    for each, count in events:
        if count:
            times[each] = times.get(each, 0) + count
    return _epsilon(frozenset(times.items()), delta, accountant)


def noise_for(
    epsilon: float,
    delta: float,
    steps: int,
    sampling: float,
    accountant: str,
    other: Sequence[tuple[DpEvent, int]] = (),
) -> float:
    """The noise multiplier with which so many steps, and what else is released, spend at most (epsilon, delta).

    Parameters
    ----------
    steps
        How often a sample is released; at least 1.
    other
        What is released besides, such as a sketch.

    Raises
    ------
    RecipeError
        As `event` and `epsilon_spent`, and if no noise is enough because ``other`` spends the budget.
    """
    return _noise_for(float(epsilon), float(delta), max(1, steps), float(sampling), accountant, tuple(other))


def steps_within(
    epsilon: float,
    delta: float,
    noise: float,
    sampling: float,
    accountant: str,
    most: int,
    other: Sequence[tuple[DpEvent, int]] = (),
) -> int:
    """How many steps (epsilon, delta) affords beside what else is released, at most ``most``; 0 if not even one.

    Raises
    ------
    RecipeError
        As `event` and `epsilon_spent`.
    """
    once = event(noise, sampling)
    fits, fails = 0, max(0, most) + 1
    if epsilon_spent([(once, fails - 1), *other], delta, accountant) <= epsilon:
        return fails - 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if epsilon_spent([(once, middle), *other], delta, accountant) <= epsilon:
            fits = middle
        else:
            fails = middle
    return fits


@lru_cache(maxsize=4096)
def _noise_for(
    epsilon: float, delta: float, steps: int, sampling: float, accountant: str, other: tuple[tuple[DpEvent, int], ...]
) -> float:
    def spent(noise: float) -> float:
        return epsilon_spent([(event(noise, sampling), steps), *other], delta, accountant)

    alone = epsilon_spent(other, delta, accountant)
    low, high = _SMALLEST / 2, 2 * _LARGEST
    noise, before = min(max(_guess(epsilon, delta, steps, sampling), _SMALLEST), _LARGEST), None
    while alone < epsilon and low < _LARGEST:
        found = spent(noise)
        if found > epsilon:
            low = noise
        else:
            high = noise
        if (1 - PRECISION) * epsilon <= found <= epsilon or high <= max(_SMALLEST, low * (1 + 1e-4)):
            return high
        # Epsilon is nearly a power of the noise: aim at the middle of what is good enough, and halve where that fails.
        ratio = found / before[1] if before and before[1] else 0.0
        power = math.log(ratio) / math.log(noise / before[0]) if before and 0 < ratio < math.inf else -1.5
        way = math.log((1 - PRECISION / 2) * epsilon / found) / power if found and power else -math.inf
        aimed = noise * math.exp(min(way, 99.0))
        before = (noise, found)
        noise = aimed if low < aimed < high else math.sqrt(low * high)
        noise = min(max(noise, _SMALLEST), _LARGEST)
    raise RecipeError(
        f"epsilon = {epsilon:g} at delta = {delta:g} cannot be kept over {steps} steps with any noise"
        + (f": what else is released spends {alone:.3g}" if other else "")
        + "; allowed: a larger epsilon or delta, fewer rounds"
    )


def _guess(epsilon: float, delta: float, steps: int, sampling: float) -> float:
    """What the central limit of many small losses wants, Gaussian differential privacy [arXiv 1911.11607]."""
    with np.errstate(divide="ignore"):
        budget = steps * (sampling * float(_library().get_sigma_gaussian(min(epsilon, LOOSE), delta))) ** 2
    return math.sqrt(budget if sampling == 1 else 1 / math.log1p(1 / budget))


@lru_cache(maxsize=65536)
def _epsilon(events: frozenset[tuple[Any, int]], delta: float, accountant: str) -> float:
    if not events:
        return 0.0
    dp = _library()
    if any(isinstance(each, dp.NonPrivateDpEvent) for each, _ in events):
        return math.inf
    from dp_accounting import rdp

    # Sets have no order, and sums of floats should not depend on one.
    ordered = sorted(events, key=str)
    with _calm():
        renyi = rdp.RdpAccountant(None if accountant == "rdp" else _FEW_ORDERS)
        for each, count in ordered:
            renyi.compose(each, count)
        bound = float(renyi.get_epsilon(delta))
    if accountant == "rdp":
        return bound
    if bound > LOOSE:
        return _epsilon(events, delta, "rdp")
    # Gaussians that are not sampled are one: k of noise s are as one of s / sqrt(k).
    gaussians = [(each, count) for each, count in ordered if isinstance(each, dp.GaussianDpEvent)]
    plain = math.fsum(count / each.noise_multiplier**2 for each, count in gaussians)
    sampled = [(each, count) for each, count in ordered if isinstance(each, dp.PoissonSampledDpEvent)]
    if not sampled:
        with np.errstate(divide="ignore"):  # its search passes over log(0), and means it
            return float(dp.get_epsilon_gaussian(plain**-0.5, delta))
    # Fine beside the spread of the whole loss, and not so fine that a thousand clients take long.
    spread = plain + math.fsum(
        count * (each.sampling_probability / each.event.noise_multiplier) ** 2 for each, count in sampled
    )
    # A power of two, so that it stays the same from round to round, and what was computed with it can be used again.
    grid = 2.0 ** math.floor(math.log2(min(1e-3, max(1e-5, 2e-3 * math.sqrt(spread)))))
    parts = [_losses(each.event.noise_multiplier, each.sampling_probability, grid, count) for each, count in sampled]
    if plain:
        parts.append(_losses(plain**-0.5, 1.0, grid, 1))
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return min(bound, max(0.0, float(total.get_epsilon_for_delta(delta))))


def _losses(noise: float, sampling: float, grid: float, count: int) -> Any:
    """The distribution of the privacy loss of so many releases."""
    once = _loss(noise, sampling, grid)
    return once if count == 1 else once.self_compose(count)


@lru_cache(maxsize=256)
def _loss(noise: float, sampling: float, grid: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise, value_discretization_interval=grid, sampling_prob=sampling)


@contextmanager
def _calm() -> Iterator[None]:
    """Without a line for every Rényi order that does not converge and is left out: the bound holds without it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _library() -> ModuleType:
    try:
        import dp_accounting
    except ImportError as error:
        raise RecipeError("[privacy] needs dp-accounting: pip install 'folklora[privacy]'") from error
    module: ModuleType = dp_accounting
    return module
