"""What is held out, what is then believed, and what is refused."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from folklora.planning.baselines import LAW, LINEAR, MEAN, NEAREST, PREDICTORS, QUADRATIC, fit_mean, predictors
from folklora.planning.heldout import held_out, judge, splits, too_few
from folklora.planning.points import Points

SIZES = list(product((1, 2, 4), (16, 32, 64, 128), (1e5, 2e5)))
GRID = Points.of(SIZES)


def test_the_largest_level_of_each_axis_with_three_is_held_out_together() -> None:
    outs = [{SIZES[i] for i in np.flatnonzero(mask)} for mask in splits(GRID, "beyond")]
    assert outs == [{s for s in SIZES if s[0] == 4}, {s for s in SIZES if s[1] == 128}]


def test_folds_take_each_cell_once_with_all_its_seeds() -> None:
    twice = Points.of(SIZES * 2)
    masks = list(splits(twice, "between"))
    assert len(masks) == 5
    assert (np.sum(masks, 0) == 1).all()
    for mask in masks:
        assert (mask[: len(SIZES)] == mask[len(SIZES) :]).all()


def test_errors_are_predicted_less_measured() -> None:
    points, values = Points.of([(1, 1, 1), (2, 1, 1), (4, 1, 1)]), np.array([1.0, 2.0, 6.0])
    found = held_out(fit_mean, points, values, "beyond")
    assert found.errors == (1.5 - 6.0,)
    assert found.rmse == pytest.approx(4.5)
    assert held_out(fit_mean, Points.of([(1, 1, 1), (2, 1, 1)]), values[:2], "beyond").why == "no size has three levels"


def test_the_law_is_believed_where_it_made_the_numbers() -> None:
    grid = Points.of(product((1, 2, 4, 8), (16, 32, 64, 128), (1e5, 2e5)))
    n, d, tokens = grid.sizes.T
    verdict = judge(grid, 0.1 * np.log(n) - 0.3 / n + 0.05 * np.log(d) - 8 / d + 0.02 * np.log(tokens))
    assert (verdict.chosen, verdict.how, verdict.refusal) == (LAW, "beyond", None)
    least = verdict.beyond[LAW].rmse
    assert least is not None
    for rival in (QUADRATIC, LINEAR, NEAREST, MEAN):
        rmse = verdict.beyond[rival].rmse
        assert rmse is None or rmse > least
    assert verdict.reach(False) <= verdict.reach(True)


def test_the_better_of_the_fitted_is_taken() -> None:
    values = (GRID.logs[:, 0] + 0.4 * GRID.logs[:, 1]) ** 2  # sizes that help each other: a square, and no law
    assert judge(GRID, values).chosen == QUADRATIC


def test_chance_is_refused_and_says_why() -> None:
    refused = 0
    for seed in range(40):
        verdict = judge(GRID, 0.8 + 0.01 * np.random.default_rng(seed).standard_normal(len(GRID)))
        refused += verdict.chosen is None
        if verdict.chosen is None:
            assert verdict.refusal is not None
            assert "on cells it did not see" in verdict.refusal
    assert refused >= 35


def test_what_does_not_differ_and_what_is_too_little() -> None:
    same = judge(GRID, np.full(len(GRID), 0.5))
    assert same.refusal == "all runs did equally well: there is nothing to fit"
    few = Points.of([(1, 1, 1), (2, 2, 1), (4, 4, 1)])
    refusal = judge(few, np.array([0.1, 0.2, 0.3])).refusal
    assert refusal is not None
    assert refusal.startswith("too few cells to hold some out (law: ")
    assert too_few(few)
    assert too_few(Points.of([]))
    assert too_few(GRID) is None


def test_shares_are_fitted_on_their_log_odds_and_errors_are_of_the_shares() -> None:
    grid = Points.of(product((1, 2, 4, 8), (16, 32, 64, 128), (1e5, 2e5)))
    n, d, tokens = grid.sizes.T
    odds = np.exp(1 + 0.9 * np.log(n) - 0.6 / n + 0.7 * np.log(d / 16) + 0.2 * np.log(tokens / 1e5))
    shares = odds / (1 + odds)
    largest = (n == 8) | (d == 128)
    own, raw = (
        fits[LAW](grid[~largest], shares[~largest]).predict(grid[largest]) for fits in (predictors(True), PREDICTORS)
    )
    assert own == pytest.approx(shares[largest], abs=1e-3)
    assert raw.max() > 1.05  # what the share itself would be predicted to be
    told = judge(grid, shares, share=True)
    assert told.chosen == LAW
    out = next(splits(grid, "beyond"))
    by_hand = predictors(True)[LAW](grid[~out], shares[~out]).predict(grid[out]) - shares[out]
    assert told.beyond[LAW].errors[: int(out.sum())] == pytest.approx(by_hand)
    assert told.beyond[NEAREST].errors == held_out(PREDICTORS[NEAREST], grid, shares, "beyond").errors


def test_none_and_all_have_no_odds_and_are_fitted_nevertheless() -> None:
    shares = np.clip(0.6 * GRID.logs[:, 0] + 0.2 * (GRID.logs[:, 1] - np.log(16)), 0, 1)
    assert {0.0, 1.0} <= set(shares.tolist())
    for name in (LAW, QUADRATIC, LINEAR):
        found = predictors(True)[name](GRID, shares).predict(GRID)
        assert np.isfinite(found).all()
        assert found.min() >= 0
        assert found.max() <= 1
