"""The law and its rivals, against the formula that made the numbers and against other libraries."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import curve_fit
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import PolynomialFeatures

from folklora.planning.baselines import fit_linear, fit_mean, fit_nearest, fit_quadratic
from folklora.planning.law import BOUNDS, fit_law
from folklora.planning.points import Floats, Points

LAYERS, WIDTHS, DATA = (1, 2, 4, 8), (16, 32, 64, 128), (5e4, 1e5, 2e5)
GRID = Points.of(product(LAYERS, WIDTHS, DATA))


def formula(sizes: Floats) -> Floats:
    """Written out as published, with numbers of ours."""
    n, d, tokens = sizes.T
    layers = 0.02 * (np.log(n) - 0.5 / n**1.5)
    width = 0.05 * (np.log(d) - 30 / d**0.8)
    return 0.1 + layers + width + 0.03 * (np.log(tokens) + 2e4 / tokens)


def noisy(scale: float, seed: int = 0) -> Floats:
    return formula(GRID.sizes) + scale * np.random.default_rng(seed).standard_normal(len(GRID))


def test_what_made_the_numbers_is_found_and_carries_on() -> None:
    law = fit_law(GRID, formula(GRID.sizes))
    assert law.residual < 1e-6
    found = {term.axis: term for term in law.terms}
    assert found[0].exponent == pytest.approx(1.5, rel=1e-3)
    assert found[0].weight == pytest.approx(0.02, rel=1e-3)
    assert found[1].exponent == pytest.approx(0.8, rel=1e-3)
    assert found[1].power == pytest.approx(-0.05 * 30 / 16**0.8, rel=1e-3)
    assert found[2].exponent == 1.0  # three levels do not tell
    assert found[2].known is None
    beyond = Points.of([(16, 256, 4e5), (1, 512, 1e6)])
    np.testing.assert_allclose(law.predict(beyond), formula(beyond.sizes), rtol=1e-5)


def test_no_worse_than_scipy_from_where_the_numbers_came_from() -> None:
    values = noisy(0.004)

    def form(x: Floats, c: float, *rest: float) -> Floats:
        w1, a1, q1, w2, a2, q2, w3, a3 = rest
        n, d, tokens = x
        n, d, tokens = n, d / 16, tokens / 5e4
        found: Floats = (
            c + w1 * np.log(n) + a1 / n**q1 + w2 * np.log(d) + a2 / d**q2 + w3 * np.log(tokens) + a3 / tokens
        )
        return found

    lower, upper = [-np.inf] * 9, [np.inf] * 9
    for place in (3, 6):
        lower[place], upper[place] = BOUNDS
    start = [0.5, 0.02, -0.01, 1.5, 0.05, -0.15, 0.8, 0.03, 0.01]
    theirs, _ = curve_fit(form, GRID.sizes.T, values, p0=start, bounds=(lower, upper))
    law = fit_law(GRID, values)
    ours = ((law.predict(GRID) - values) ** 2).sum()
    assert ours <= ((form(GRID.sizes.T, *theirs) - values) ** 2).sum() * (1 + 1e-6)
    assert law.residual == pytest.approx(float(np.sqrt(ours / (len(values) - law.parameters))))
    assert law.parameters == 9


def test_starts_that_end_alike_say_how_well_an_exponent_is_known() -> None:
    law = fit_law(GRID, noisy(0.0))
    for term in law.terms[:2]:
        assert term.known is not None
        assert term.known[1] - term.known[0] < 0.01
    # Without a power in the numbers, every exponent is as good.
    flat = fit_law(GRID, 0.3 + 0.01 * GRID.logs[:, 0])
    unknown = flat.terms[0].known
    assert unknown is not None
    assert unknown[1] / unknown[0] > 2


@given(
    scale=st.tuples(*[st.floats(0.1, 1000)] * 3), lift=st.floats(-5, 5), stretch=st.floats(0.1, 10).map(lambda v: -v)
)
def test_units_do_not_matter(scale: tuple[float, ...], lift: float, stretch: float) -> None:
    grid = Points.of(product((1, 3, 6), (1, 2, 4), (0.25, 1)))
    values = np.random.default_rng(1).standard_normal(len(grid))
    other = Points(grid.sizes * np.array(scale))
    for fit in (fit_law, fit_linear, fit_quadratic, fit_nearest, fit_mean):
        mine = fit(grid, values).predict(Points(grid.sizes * 1.5))
        theirs = fit(other, lift + stretch * values).predict(Points(other.sizes * 1.5))
        np.testing.assert_allclose(lift + stretch * mine, theirs, atol=1e-6)


def test_no_more_of_the_form_than_an_axis_can_bear() -> None:
    two = Points.of(product((1, 2), (4,), (1.0, 2.0, 3.0)))
    law = fit_law(two, np.arange(6.0))
    assert [(term.axis, term.exponent) for term in law.terms] == [(0, None), (2, 1.0)]
    assert law.parameters == 4
    with pytest.raises(ValueError, match="all runs are of one size"):
        fit_law(Points.of([(1, 1, 1)] * 5), np.arange(5.0))
    with pytest.raises(ValueError, match="4 cells for 4 parameters"):
        fit_law(two[np.array([0, 1, 2, 3, 3, 3])], np.arange(6.0))  # seeds are no cells


@pytest.mark.parametrize("size", [0.0, -1.0, np.nan, np.inf])
def test_sizes_that_cannot_be(size: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Points.of([(1, size, 1)])


def test_rivals_are_what_they_are_called() -> None:
    values = noisy(0.01)
    asked = Points.of([(16, 256, 4e5), (3, 50, 7e4)])
    assert fit_mean(GRID, values).predict(asked).tolist() == [pytest.approx(values.mean())] * 2
    three = PolynomialFeatures(2)
    quadratic = LinearRegression().fit(three.fit_transform(GRID.logs), values)
    np.testing.assert_allclose(
        fit_quadratic(GRID, values).predict(asked), quadratic.predict(three.transform(asked.logs)), rtol=1e-6
    )
    linear = LinearRegression().fit(GRID.logs, values)
    np.testing.assert_allclose(fit_linear(GRID, values).predict(asked), linear.predict(asked.logs), rtol=1e-8)


def test_the_nearest_cell_is_so_by_doublings() -> None:
    points = Points.of([(1, 1, 1), (2, 1, 1), (8, 1, 1), (8, 1, 1)])
    nearest = fit_nearest(points, np.array([1.0, 2.0, 3.0, 5.0]))
    asked = Points.of([(1.3, 1, 1), (3, 9, 1), (100, 1, 1), (4, 1, 1)])
    assert nearest.predict(asked).tolist() == pytest.approx([1.0, 2.0, 4.0, (2 + 3 + 5) / 3])
