"""Epsilon beside closed forms and another library's accountant; noise and steps that a budget affords."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
from scipy.stats import norm

from folklora.errors import RecipeError
from folklora.privacy.accounting import PRECISION, epsilon_spent, event, noise_for, steps_within

DELTA = 1e-5
BOTH = pytest.mark.parametrize("accountant", ["pld", "rdp"])


def delta_of_gaussian(noise: float, epsilon: float) -> float:
    """Balle and Wang, arXiv 1805.06530, theorem 8, at sensitivity 1."""
    first = norm.cdf(1 / (2 * noise) - epsilon * noise)
    return float(first - math.exp(epsilon) * norm.cdf(-1 / (2 * noise) - epsilon * noise))


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("count", [1, 10])
def test_gaussians_are_the_analytic_gaussian_mechanism(noise: float, count: int) -> None:
    """k releases with noise s are one with noise s / sqrt(k)."""
    tight = epsilon_spent([(event(noise, 1.0), count)], DELTA, "pld")
    assert delta_of_gaussian(noise / math.sqrt(count), tight) == pytest.approx(DELTA, rel=1e-4)
    renyi = epsilon_spent([(event(noise, 1.0), count)], DELTA, "rdp")
    assert tight < renyi < 1.5 * tight


@pytest.mark.parametrize(("noise", "sampling", "count"), [(1.0, 0.1, 100), (0.8, 0.02, 500), (3.0, 0.5, 40)])
def test_samples_cost_what_opacus_says(noise: float, sampling: float, count: int) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    theirs = accountants.RDPAccountant()
    theirs.history = [(noise, sampling, count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        renyi = theirs.get_epsilon(DELTA)
        prv = accountants.PRVAccountant()
        prv.history = [(noise, sampling, count)]
        tight = prv.get_epsilon(DELTA)
    once = event(noise, sampling)
    assert epsilon_spent([(once, count)], DELTA, "rdp") == pytest.approx(renyi, rel=0.01)
    assert epsilon_spent([(once, count)], DELTA, "pld") == pytest.approx(tight, rel=0.01)


def test_one_sample_is_amplified_as_the_closed_form_says() -> None:
    """(epsilon, delta) of a release becomes (log(1 + q (e^epsilon - 1)), q delta) of a Poisson sample."""
    noise, q = 1.3, 0.2
    epsilon = epsilon_spent([(event(noise, 1.0), 1)], DELTA / q, "pld")
    amplified = math.log1p(q * math.expm1(epsilon))
    assert epsilon_spent([(event(noise, q), 1)], DELTA, "pld") == pytest.approx(amplified, rel=2e-3)


@BOTH
def test_more_noise_fewer_steps_rarer_samples_and_a_larger_delta_cost_less(accountant: str) -> None:
    cost = lambda noise=1.0, q=0.1, k=50, delta=DELTA: epsilon_spent([(event(noise, q), k)], delta, accountant)
    assert cost(noise=2.0) < cost() < cost(noise=0.7)
    assert cost(q=0.05) < cost() < cost(q=0.3) < cost(q=1.0)
    assert cost(k=0) == 0 < cost(k=1) < cost() < cost(k=51)
    assert cost(delta=1e-3) < cost()


@BOTH
def test_what_else_is_released_adds_up_in_any_order(accountant: str) -> None:
    steps, sketch = (event(1.0, 0.1), 50), (event(4.0, 1.0), 1)
    both = epsilon_spent([steps, sketch], DELTA, accountant)
    assert both == epsilon_spent([sketch, (steps[0], 20), (steps[0], 30)], DELTA, accountant)
    alone = [epsilon_spent([each], DELTA, accountant) for each in (steps, sketch)]
    # Less than basic composition, which would want 2 delta too.
    assert max(alone) < both < sum(alone)


def test_no_noise_and_hardly_any_noise() -> None:
    assert epsilon_spent([(event(0.0, 0.5), 1)], DELTA, "pld") == math.inf
    assert epsilon_spent([(event(0.0, 0.5), 0)], DELTA, "pld") == 0
    assert 1000 < epsilon_spent([(event(0.01, 0.5), 100)], DELTA, "pld") < math.inf


@BOTH
@pytest.mark.parametrize(
    ("epsilon", "steps", "sampling"), [(8.0, 60, 0.1), (0.5, 60, 0.1), (3.0, 5, 1.0), (200, 7, 0.3)]
)
def test_noise_spends_the_budget_and_no_more(accountant: str, epsilon: float, steps: int, sampling: float) -> None:
    noise = noise_for(epsilon, DELTA, steps, sampling, accountant)
    spent = epsilon_spent([(event(noise, sampling), steps)], DELTA, accountant)
    assert (1 - PRECISION) * epsilon <= spent <= epsilon


def test_noise_beside_a_sketch() -> None:
    sketch = (event(5.0, 1.0), 1)
    with_sketch = noise_for(1.5, DELTA, 60, 0.1, "pld", [sketch])
    assert with_sketch > noise_for(1.5, DELTA, 60, 0.1, "pld")
    spent = epsilon_spent([(event(with_sketch, 0.1), 60), sketch], DELTA, "pld")
    assert (1 - PRECISION) * 1.5 <= spent <= 1.5
    with pytest.raises(RecipeError, match=r"epsilon = 0\.7 .* what else is released spends 0\.72"):
        noise_for(0.7, DELTA, 60, 0.1, "pld", [sketch])


def test_a_budget_as_large_as_one_likes_ends_with_the_least_noise() -> None:
    noise = noise_for(1e6, DELTA, 60, 0.1, "pld")
    assert 0 < noise < 0.1


@BOTH
def test_steps_of_a_budget(accountant: str) -> None:
    cost = lambda k: epsilon_spent([(event(1.0, 0.1), k)], DELTA, accountant)
    count = steps_within(5.0, DELTA, 1.0, 0.1, accountant, most=1000)
    assert cost(count) <= 5.0 < cost(count + 1)
    assert steps_within(5.0, DELTA, 1.0, 0.1, accountant, most=7) == 7
    assert steps_within(cost(1) * 0.99, DELTA, 1.0, 0.1, accountant, most=1000) == 0
    assert steps_within(5.0, DELTA, 1.0, 0.1, accountant, most=0) == 0
    assert steps_within(5.0, DELTA, 1.0, 0.1, accountant, 1000, [(event(2.0, 1.0), 1)]) < count


def test_what_cannot_be_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for noise, sampling in ((-1.0, 0.5), (math.inf, 0.5), (math.nan, 0.5), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(RecipeError, match=r"noise = .*allowed"):
            event(noise, sampling)
    once = [(event(1.0, 0.5), 1)]
    with pytest.raises(RecipeError, match=r"delta = 0; allowed: between 0 and 1"):
        epsilon_spent(once, 0.0, "pld")
    with pytest.raises(RecipeError, match=r'accountant = "gdp"; allowed: "pld", "rdp"'):
        epsilon_spent(once, DELTA, "gdp")
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(RecipeError, match=r"pip install 'folklora\[privacy\]'"):
        event(1.0, 0.5)
