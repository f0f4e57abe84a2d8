"""Centres that liars cannot move: beside brute force, scipy and numpy; and where a mean would be carried away."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import trim_mean

from folklora.privacy import robust

RULES = ("median", "trimmed", "krum", "multikrum", "geometric")


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_median_is_numpys(count: int) -> None:
    found = rows(count, 7)
    np.testing.assert_allclose(robust.median(found), np.median(found.numpy(), axis=0), atol=1e-15)


@pytest.mark.parametrize(("count", "liars"), [(5, 0), (5, 1), (9, 3), (11, 5)])
def test_the_trimmed_mean_is_scipys(count: int, liars: int) -> None:
    found = rows(count, 7)
    expected = trim_mean(found.numpy(), (liars + 1e-9) / count, axis=0)
    np.testing.assert_allclose(robust.trimmed_mean(found, liars), expected, atol=1e-12)


def krum_by_hand(found: np.ndarray, liars: int) -> list[float]:
    """Each row's score as the least sum over any n - f - 2 of the others."""
    n = len(found)
    distances = [[float(((a - b) ** 2).sum()) for b in found] for a in found]
    return [
        min(sum(distances[i][j] for j in some) for some in combinations([j for j in range(n) if j != i], n - liars - 2))
        for i in range(n)
    ]


@pytest.mark.parametrize(("count", "liars"), [(3, 0), (5, 1), (7, 2), (8, 2)])
def test_krum_takes_the_row_among_neighbours(count: int, liars: int) -> None:
    found = rows(count, 4, seed=count)
    scores = krum_by_hand(found.numpy(), liars)
    np.testing.assert_allclose(robust.krum_scores(found, liars), scores, rtol=1e-12)
    np.testing.assert_array_equal(robust.krum(found, liars), found[int(np.argmin(scores))])
    kept = np.argsort(scores)[: count - liars]
    np.testing.assert_allclose(robust.multikrum(found, liars), found[np.sort(kept)].mean(0), atol=1e-15)


@pytest.mark.parametrize("count", [3, 4, 9])
def test_the_geometric_median_is_where_scipy_finds_it(count: int) -> None:
    found = rows(count, 3, seed=count)

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(found.numpy() - point, axis=1).sum())

    start = found.mean(0).numpy()
    best = minimize(total, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20000})
    here = robust.geometric_median(found).numpy()
    assert total(here) <= best.fun + 1e-9
    np.testing.assert_allclose(here, best.x, atol=1e-4)


def test_the_geometric_median_leaves_a_row_that_it_started_on_and_stays_on_one_that_is_it() -> None:
    # The mean is the last row; the median is elsewhere.
    away = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(away.mean(0), away[4])
    here = robust.geometric_median(away)
    assert (away - here).norm(dim=1).sum() < (away - away[4]).norm(dim=1).sum() - 1e-3
    # Three rows of five are the same: no other point has a smaller sum.
    most = torch.tensor([[1.0, 2.0]] * 3 + [[9.0, 0.0], [0.0, -7.0]], dtype=torch.float64)
    torch.testing.assert_close(robust.geometric_median(most), most[0], atol=1e-6, rtol=0)
    same = torch.ones(4, 2, dtype=torch.float64)
    assert torch.equal(robust.geometric_median(same), same[0])


@pytest.mark.parametrize("lie", [-1e6, -1e20, 3e38])  # the last is about the largest that float32 carries
@pytest.mark.parametrize("rule", RULES)
def test_liars_move_a_mean_anywhere_and_these_hardly(rule: str, lie: float) -> None:
    honest = 1 + 0.1 * rows(8, 20)
    lies = torch.full((2, 20), lie, dtype=torch.float64)
    found = torch.cat([lies, honest])
    assert (robust.centre(rule, found, 2) - 1).norm() < 1.0
    assert (found.mean(0) - 1).norm() > 1e5


@pytest.mark.parametrize("rule", RULES)
def test_who_comes_first_changes_nothing(rule: str) -> None:
    found = rows(9, 5)
    torch.testing.assert_close(robust.centre(rule, found, 2), robust.centre(rule, found.flip(0), 2))


@pytest.mark.parametrize(("rule", "liars", "least"), [("krum", 2, 7), ("multikrum", 1, 5), ("trimmed", 2, 5)])
def test_too_few_rows_are_refused(rule: str, liars: int, least: int) -> None:
    robust.centre(rule, rows(least, 2), liars)
    with pytest.raises(ValueError, match=f"allowed: {least} or more"):
        robust.centre(rule, rows(least - 1, 2), liars)
