"""What privacy costs, beside closed forms; that no run goes beyond its budget, and that everybody is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from folklora.errors import RecipeError
from folklora.federation.budget import AWAY, Budget, begun, resolved_noise
from folklora.federation.inspect import inspect
from folklora.federation.run import resume, run
from folklora.federation.setup import prepare

DELTA = 1e-5
CLIENTS = ("0", "1", "2", "3")
HIDDEN = ("method.name=fedit", "data.limit=80", "privacy.unit=client")


def gaussian_epsilon(*noises: float) -> float:
    """Of Gaussian releases of these multipliers together: one of the root of the sum of 1 / z^2 (arXiv 1805.06530)."""
    mu = math.sqrt(sum(1 / z**2 for z in noises))

    def excess(epsilon: float) -> float:
        lower = math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
        return float(norm.cdf(mu / 2 - epsilon / mu) - lower - DELTA)

    return float(brentq(excess, 0.0, 500.0))


def budget(recipe: Any) -> Budget:
    setup = prepare(recipe)
    return Budget(recipe, setup.method, setup.sizes)


def line(round: int, took_part: str, failed: dict[str, str] | None = None) -> dict[str, Any]:
    return {"round": round, "participants": list(took_part), "failed": failed or {}}


def test_central_noise_costs_every_round_whoever_comes(tiny_recipe: Any) -> None:
    found = budget(tiny_recipe(*HIDDEN, "privacy.noise=2.0"))
    lines = [line(0, ""), line(1, "0123"), line(2, "0"), line(3, "", dict.fromkeys(CLIENTS, AWAY))]
    spent = found.spent(lines)
    assert spent["epsilon"] == pytest.approx(gaussian_epsilon(2.0, 2.0, 2.0), rel=2e-3)
    assert (spent["unit"], spent["delta"], spent["noise"]) == ("client", DELTA, 2.0)
    assert found.spent([])["epsilon"] == 0.0


def test_being_drawn_by_chance_is_amplified_as_the_library_says(tiny_recipe: Any) -> None:
    dp = pytest.importorskip("dp_accounting")
    found = budget(tiny_recipe(*HIDDEN, "privacy.noise=1.5", "train.participation=0.25"))
    theirs = dp.pld.PLDAccountant()
    theirs.compose(dp.PoissonSampledDpEvent(0.25, dp.GaussianDpEvent(1.5)), 4)
    epsilon = found.spent([line(r, "01") for r in (1, 2, 3, 4)])["epsilon"]
    assert epsilon == pytest.approx(theirs.get_epsilon(DELTA), rel=5e-3)
    assert epsilon < 0.7 * gaussian_epsilon(*[1.5] * 4)


def test_noise_of_their_own_costs_clients_what_they_sent_also_in_vain(tiny_recipe: Any) -> None:
    found = budget(tiny_recipe(*HIDDEN, "privacy.noise=3.0", "privacy.placement=client", "train.participation=0.5"))
    lines = [
        line(1, "01"),
        line(2, "0", {"2": "did not answer"}),
        line(3, "1", {"0": "dropped out (simulated)"}),
        line(4, "3", {"0": AWAY}),
    ]
    assert begun(lines) == {"0": 3, "1": 2, "2": 1, "3": 1}
    assert found.spent(lines)["epsilon"] == pytest.approx(gaussian_epsilon(3.0, 3.0, 3.0), rel=2e-3)


def test_who_drops_out_takes_a_share_of_the_noise_along(tiny_recipe: Any) -> None:
    found = budget(tiny_recipe(*HIDDEN, "privacy.noise=3.0", "privacy.placement=shares"))
    gone = {"2": "did not answer", "3": "did not answer"}
    lines = [line(1, "0123"), line(2, "01", gone), line(3, "123", {"0": AWAY})]
    # Of four shares, four, two and three arrived; client 1 is in all three sums.
    expected = gaussian_epsilon(3.0, 3.0 * math.sqrt(2 / 4), 3.0 * math.sqrt(3 / 4))
    assert found.spent(lines)["epsilon"] == pytest.approx(expected, rel=2e-3)
    alone = found.spent([line(1, "0123"), line(2, "0", gone), line(3, "3")])["epsilon"]
    assert alone == pytest.approx(gaussian_epsilon(3.0, 3.0 / 2), rel=2e-3)


@pytest.mark.parametrize(
    "how",
    [(), ("train.participation=0.5",), ("privacy.placement=shares",)],
    ids=["central", "by chance", "shares"],
)
def test_noise_is_found_that_spends_the_budget_over_all_rounds(tiny_recipe: Any, how: tuple[str, ...]) -> None:
    recipe = tiny_recipe(*HIDDEN, "privacy.epsilon=4.0", "train.rounds=5", *how)
    found = budget(recipe)
    planned = found.spent(found.planned(5))
    assert 0.99 * 4 <= planned["epsilon"] <= 4
    assert planned["noise"] == resolved_noise(recipe, found.method)
    assert found.affordable() == 5
    if how == ("privacy.placement=shares",):
        central = tiny_recipe(*HIDDEN, "privacy.epsilon=4.0", "train.rounds=5")
        assert planned["noise"] == resolved_noise(central, found.method)


def test_a_clients_own_noise_is_found_for_the_rounds_it_is_drawn_in(tiny_recipe: Any) -> None:
    half = ("privacy.placement=client", "train.participation=0.5", "train.rounds=6", "privacy.epsilon=4.0")
    found = budget(tiny_recipe(*HIDDEN, *half))
    turns = begun(found.planned(6))
    assert turns.total() == 12
    noise = found.spent([])["noise"]
    assert gaussian_epsilon(*[noise] * max(turns.values())) == pytest.approx(4.0, rel=0.01)


def test_the_run_stops_before_the_budget_is_exceeded_and_stays_so(
    tiny_recipe: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], folklora: Callable[..., Any]
) -> None:
    recipe = tiny_recipe(*HIDDEN, "privacy.noise=1.0", "privacy.epsilon=8.0", "train.rounds=6")
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    ran = folklora("run", path, "--out", tmp_path / "run")
    assert ran.code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rounds = next(k for k in range(1, 7) if gaussian_epsilon(*[1.0] * (k + 1)) > 8.0)
    assert summary["row"]["rounds"] == rounds
    assert summary["stopped_early"] is True
    beyond = gaussian_epsilon(*[1.0] * (rounds + 1))
    assert summary["stopped"] == f"round {rounds + 1} would bring epsilon to {beyond:.4g}, beyond privacy.epsilon = 8"
    spent = summary["privacy"]
    assert spent["epsilon"] == pytest.approx(gaussian_epsilon(*[1.0] * rounds), rel=2e-3)
    assert (spent["budget"], spent["placement"], spent["clip"]) == (8.0, "server", 1.0)
    assert "epsilon 4.38 (delta 1e-05)" in ran.err
    assert summary["row"]["epsilon"] == spent["epsilon"]
    assert resume(tmp_path / "run") == summary
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["privacy"]["epsilon"] == spent["epsilon"]
    report = folklora("report", tmp_path / "run")
    assert report.code == 0
    assert (tmp_path / "run" / "figures" / "privacy.png").stat().st_size > 1000
    page = (tmp_path / "run" / "report.html").read_text()
    assert "would bring epsilon to" in page
    inspected = folklora("inspect", path)
    assert f"noise 1, epsilon {gaussian_epsilon(*[1.0] * 6):.3g}" in " ".join(inspected.out.split())
    assert inspect(recipe)["privacy"]["rounds"] == rounds


def test_a_sum_that_lost_its_noise_is_not_taken(tiny_recipe: Any, tmp_path: Path) -> None:
    """All shares together spend the budget: the first drop-out would exceed it, and the run halts there."""
    dropping = ("privacy.placement=shares", "privacy.epsilon=4.0", "train.rounds=6", "train.failures=0.2")
    recipe = tiny_recipe(*HIDDEN, *dropping)
    summary = run(recipe, tmp_path / "run")
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "beyond privacy.epsilon = 4" in summary["stopped"]
    assert summary["row"]["rounds"] < 6
    assert all(each["privacy"]["epsilon"] <= 4 for each in lines[1:])


@pytest.mark.parametrize("unit", ["client", "example"])
def test_noise_that_is_next_to_nothing_is_refused_or_has_a_price(tiny_recipe: Any, unit: str) -> None:
    least = tiny_recipe("method.name=fedit", "data.limit=80", f"privacy.unit={unit}", "privacy.noise=1e-12")
    found = budget(least)
    assert 1e20 < found.spent(found.planned(2))["epsilon"] < math.inf
    with pytest.raises(RecipeError, match=r"privacy\.noise = 1e-200"):
        tiny_recipe(f"privacy.unit={unit}", "privacy.noise=1e-200")


def test_a_method_that_sends_nothing_costs_nothing(tiny_recipe: Any, tmp_path: Path) -> None:
    summary = run(tiny_recipe(*HIDDEN, "method.name=local", "privacy.epsilon=1.0"), tmp_path / "run")
    assert summary["privacy"]["epsilon"] == 0.0
