"""What may leave of an audit: what it says, what one example can do to it, and the noise that hides that."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from folklora.data.audit.duplicates import exact_duplicates
from folklora.data.audit.measure import Measure
from folklora.data.audit.quality import BLOCK, bounded, regularities
from folklora.data.audit.release import FEW, NOISY, REPETITIVE, STATUSES, Release, release
from folklora.errors import DataError


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    starts = random.integers(30, size=count)
    return [f"t{i} " + " ".join(f"w{(start + step) % 40}" for step in range(8)) for i, start in enumerate(starts)]


def told(examples: list[str], epsilon: float | None = None, secret: int | None = None) -> Release:
    return release(exact_duplicates(examples), regularities(examples), epsilon, secret)


def exact(examples: list[str]) -> tuple[float, float]:
    found = regularities(examples)
    return len(set(examples)) / len(examples), float(np.mean([bounded(each) for each in found]))


def test_without_noise_it_is_what_was_measured_rounded() -> None:
    some = texts(300) + texts(100)
    found, wanted = told(some), exact(some)
    assert found.distinct == pytest.approx(wanted[0], abs=0.0251)
    assert found.regularity == pytest.approx(wanted[1], abs=0.0251)
    for value in (found.distinct, found.regularity):
        assert value * 20 == pytest.approx(round(value * 20))
    assert (found.examples, found.blocks, found.epsilon, found.scale) == (400, 400 // BLOCK, None, (0.0, 0.0))
    assert told(some) == found


@pytest.mark.parametrize("count", [40, 200, 700])
def test_one_example_moves_it_no_further_than_is_said(count: int) -> None:
    """The worst of many replacements, copies and nonsense among them."""
    some = texts(count)
    sensitivity, before = told(some).sensitivity, exact(some)
    assert sensitivity == (1 / count, 1 / max(1, count // BLOCK))
    random = np.random.default_rng(1)
    for _ in range(15):
        place = int(random.integers(count))
        other = ["", some[(place + 1) % count], "w1 " * 400, " ".join(f"x{i}" for i in range(200))][random.integers(4)]
        after = exact([*some[:place], other, *some[place + 1 :]])
        for one, two, most in zip(before, after, sensitivity, strict=True):
            assert abs(one - two) <= most + 1e-12


def test_noise_is_laplace_of_the_scale_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folklora.data.audit.release._rounded", lambda value: value)
    n, k, epsilon = 4000, 20, 2.0
    measured = exact_duplicates(["a", "a", *map(str, range(n - 2))]), [Measure(0.5)] * k
    drawn = [release(*measured, epsilon, secret) for secret in range(2000)]
    assert drawn[0].scale == pytest.approx((2 / (n * epsilon), 2 / (k * epsilon)))
    found = np.array([each.regularity for each in drawn])
    inner = found[(found > 0) & (found < 1)]
    scale = 2 / (k * epsilon)
    low, high = (stats.laplace.cdf(end, 0.5, scale) for end in (0.0, 1.0))
    uniform = (stats.laplace.cdf(inner, 0.5, scale) - low) / (high - low)
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    distinct = np.array([each.distinct for each in drawn]) - (1 - 1 / n)
    below = distinct[distinct < 0]
    assert len(below) == pytest.approx(1000, abs=80)
    assert stats.kstest(-below / drawn[0].scale[0], "expon").pvalue > 0.01


def test_noise_is_drawn_anew_unless_its_secret_is_known() -> None:
    some = texts(40)
    assert told(some, 1.0, secret=5) == told(some, 1.0, secret=5)
    assert len({told(some, 0.5).regularity for _ in range(20)}) > 2


def test_status_is_of_the_noisy_numbers_alone() -> None:
    measured = exact_duplicates([str(i) for i in range(FEW)]), [Measure(0.5)]
    found = [release(*measured, 0.2, secret) for secret in range(200)]
    assert {each.status for each in found} >= {"fine", "noisy"}
    for each in found:
        assert each.status in STATUSES
        if each.regularity == 1:
            assert each.status == "noisy" or each.distinct <= REPETITIVE


@pytest.mark.parametrize(
    ("count", "different", "regularity", "status"),
    [
        (FEW - 1, 1, 1.0, "thin"),
        (FEW, FEW // 2, 1.0, "repetitive"),
        (FEW, FEW, NOISY, "noisy"),
        (FEW, FEW, 0.9, "fine"),
        (FEW, FEW, None, "noisy"),
    ],
)
def test_the_first_status_that_holds(count: int, different: int, regularity: float | None, status: str) -> None:
    examples = [str(i % different) for i in range(count)]
    measure = Measure(None, "too short") if regularity is None else Measure(regularity)
    assert release(exact_duplicates(examples), [measure]).status == status


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 1e-320, 2e6, math.inf, math.nan])
def test_an_epsilon_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(DataError, match="epsilon = .*; allowed: a number above 0"):
        told(texts(5), epsilon)


def test_nothing_is_released_of_nothing() -> None:
    with pytest.raises(DataError, match="no examples"):
        told([])
