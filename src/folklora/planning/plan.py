"""`folklora plan`: measure small models, fit a law to them, and say which size is best under a budget.

What is chosen among are the combinations of ranks and layers at the largest share of the data; smaller shares are there
to be fitted to. Sizes are chosen by their predictions, also those that were measured: one run's luck is not a size's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.optimize import nnls

from folklora.backbones.metric import Metric, same_metric
from folklora.errors import PlanError
from folklora.federation.rounds import Progress
from folklora.federation.run import refuse_another_recipe, run_or_resume
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.planning.axes import Axes, Cell, recipe_of
from folklora.planning.baselines import LAW, PREDICTORS, LogOdds, predictors
from folklora.planning.heldout import Verdict, judge, too_few
from folklora.planning.law import Law
from folklora.planning.observations import (
    Cost,
    Data,
    Observation,
    as_row,
    cost_of,
    metric_in,
    observe,
    read_runs,
    regularity_of,
)
from folklora.planning.points import AXES, Floats, Points
from folklora.recipe import Recipe
from folklora.report.figures_plan import planned
from folklora.report.style import png

Measure = Literal["small", "all", "none"]
FILE, PICTURE = "plan.json", "plan.png"
FAR = 2.0
"""A size more than so many times the largest measured one is not predicted: nothing held out was so far away."""


@dataclass(frozen=True)
class Budget:
    """What a size may cost; None: no bound.

    Attributes
    ----------
    parameters
        Numbers that a client trains.
    bytes
        Of a client and round, both ways.
    seconds
        Of all rounds, on the machine that measured.
    """

    parameters: int | None = None
    bytes: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, most in asdict(self).items():
            if most is not None and not 0 < most < float("inf"):  # nor is NaN
                raise PlanError(f"budget-{name} = {most:g}; allowed: a finite number above 0")

    def allows(self, cost: Cost, seconds: float | None = None) -> bool:
        pairs = ((self.parameters, cost.parameters), (self.bytes, cost.bytes), (self.seconds, seconds))
        return all(most is None or asked is None or asked <= most for most, asked in pairs)

    def __str__(self) -> str:
        return ", ".join(f"{most:g} {name}" for name, most in asdict(self).items() if most is not None) or "no bound"


@dataclass(frozen=True)
class Candidates:
    """All cells of a plan with what they cost and how much data they are, in one order."""

    cells: tuple[Cell, ...]
    costs: dict[Cell, Cost]
    data: dict[Cell, Data]

    @classmethod
    def of(cls, cells: Sequence[Cell], recipe: Recipe) -> Candidates:
        """Raises FolkLoraError for what cannot be run at all, before anything is."""
        costs, data = {}, {}
        for cell in cells:
            made = recipe_of(cell, recipe, recipe.seed)
            costs[cell], data[cell] = cost_of(made), regularity_of(made)
        return cls(tuple(cells), costs, data)

    @property
    def unmeasurable(self) -> str | None:
        """Why the data's regularity is left out: that of one cell or more cannot be measured."""
        return next((each.why for each in self.data.values() if each.ratio is None), None)

    def points(self, cells: Sequence[Cell]) -> Points:
        """D' is tokens over the ratio of `Data`, or tokens alone where that cannot be measured.

        Of the two readings of the paper's D' the one under which data of less entropy are worth more: the other
        way round it went against what we measured (docs/plan.md). Within one data set it makes next to no difference.
        """
        ratios = {cell: 1.0 if self.unmeasurable else self.data[cell].ratio or 1.0 for cell in self.cells}
        return Points.of((cell.layers, cell.rank, self.costs[cell].tokens / ratios[cell]) for cell in cells)


def plan(
    recipe: Recipe,
    axes: Axes | None,
    out: str | Path,
    *,
    seeds: int = 1,
    measure: Measure = "small",
    finished: Sequence[Path] = (),
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, fit, predict; what is said is also in ``out/plan.json`` and, as a picture, ``out/plan.png``.

    Parameters
    ----------
    axes
        What is planned; None: the sizes of ``finished``.
    seeds
        How many runs of each measured cell, counted from the recipe's.
    measure
        Which cells are run: those without the largest level of any size, all, or none. What ``out`` has is reused.
    finished
        Runs that are there already.

    Raises
    ------
    PlanError
        Nothing is within the budget, or what was measured does not predict; runs and ``plan.json`` stay.
    """
    out, budget = Path(out), budget or Budget()
    read = read_runs(finished, recipe)
    axes = axes or _axes_of([each.cell for each, _ in read])
    asked = {"small": axes.small(), "all": axes.cells(), "none": []}[measure]
    candidates = Candidates.of(sorted({*axes.cells(), *(each.cell for each, _ in read)}), recipe)
    choices = [cell for cell in axes.cells() if cell.data == max(axes.data)]
    _refuse_over_budget(choices, candidates, budget)
    there = {(each.cell, each.seed) for each, _ in read}
    wanted = [(cell, seed) for s in range(seeds) for cell in asked if (cell, seed := recipe.seed + s) not in there]
    known = list(dict.fromkeys([*(each.cell for each, _ in read), *(cell for cell, _ in wanted)]))
    if why := too_few(candidates.points(known)):
        raise PlanError(f"{len(known)} cells are too few to fit and to check a law ({why}); allowed: more levels")
    if all(_far(cell, known) for cell in choices):
        raise PlanError(
            f"all that could be chosen is more than {FAR:g} times as large or as small as all that is measured, in one "
            "size or more; allowed: levels that are nearer"
        )
    read += _measured(recipe, wanted, out, progress)
    metric = same_metric((each.run, metric) for each, metric in read)
    observed = [each for each, _ in read]
    points = candidates.points([each.cell for each in observed])
    values = np.array([each.value for each in observed])
    verdict = judge(points, values, metric.percent)
    document: dict[str, Any] = {
        "metric": {"name": metric.name, "higher": metric.higher},
        "budget": asdict(budget),
        "share": max(axes.data),
        "data": {
            "entropy": "not used" if candidates.unmeasurable else "tokens over regularity",
            "why": candidates.unmeasurable,
        },
        "runs": [
            {**as_row(each), "cell": asdict(each.cell), "parameters": candidates.costs[each.cell].parameters}
            for each in observed
        ],
        "held_out": _table(verdict),
        "decided": verdict.how,
        "predictor": verdict.chosen,
        "refusal": verdict.refusal,
    }
    if verdict.chosen is not None:
        rows = _estimates(candidates, observed, points, values, verdict, budget, metric)
        document |= {"formula": _formula(verdict, points, values, metric), "cells": rows} | _choose(
            rows, choices, metric
        )
    RunDirectory(out).write(FILE, json.dumps(document, indent=1, allow_nan=False).encode())
    RunDirectory(out).write(PICTURE, png(planned(document), "light"))
    if verdict.refusal is not None:
        raise PlanError(f"no plan: {verdict.refusal}; {out / FILE} has what was measured")
    if document["best"] is None:
        raise PlanError(f"no cell that can be predicted is within {budget}; {out / FILE} has them all")
    return document


def _axes_of(cells: Sequence[Cell]) -> Axes:
    if not cells:
        raise PlanError("nothing is planned; allowed: --axes, or --from with finished runs")
    layers, rank, data = (tuple(sorted(set(levels))) for levels in zip(*(cell.sizes for cell in cells), strict=True))
    return Axes(layers, rank, data)


def _refuse_over_budget(choices: Sequence[Cell], candidates: Candidates, budget: Budget) -> None:
    costs = [candidates.costs[cell] for cell in choices]
    if not any(budget.allows(cost) for cost in costs):
        least = f"{min(cost.parameters for cost in costs):,} parameters, {min(cost.bytes for cost in costs):,.0f} bytes"
        raise PlanError(f"nothing planned is within {budget}; allowed: {least} or more")


def _measured(
    recipe: Recipe, wanted: Sequence[tuple[Cell, int]], out: Path, progress: Progress | None
) -> list[tuple[Observation, Metric]]:
    """Run what is not there, the refusals of all before the first."""
    runs = [(cell, seed, recipe_of(cell, recipe, seed), out / f"{cell.label}-s{seed}") for cell, seed in wanted]
    for _, _, made, path in runs:
        refuse_another_recipe(made, path)
        prepare(made)
    found = []
    for cell, seed, made, path in runs:
        if progress is not None:
            progress.run(path.name)
        summary = run_or_resume(made, path, progress)
        found.append((observe(path, summary, cell, seed), metric_in(summary)))
    return found


def _estimates(
    candidates: Candidates,
    observed: Sequence[Observation],
    points: Points,
    values: Floats,
    verdict: Verdict,
    budget: Budget,
    metric: Metric,
) -> list[dict[str, Any]]:
    """A row a cell: what it costs, what was measured, what is predicted and within what."""
    assert verdict.chosen is not None
    asked = candidates.points(candidates.cells)
    predicted = predictors(metric.percent)[verdict.chosen](points, values).predict(asked)
    least, most = (0.0, 1.0) if metric.percent else (-np.inf, np.inf)
    seconds = _seconds(candidates, observed)
    low, high = points.sizes.min(0), points.sizes.max(0)
    tried = np.array([len(points.levels(axis)) > 2 for axis in range(len(AXES))])  # else its largest was not held out
    rows = []
    for place, cell in enumerate(candidates.cells):
        cost, sizes = candidates.costs[cell], asked.sizes[place]
        beyond = (sizes < low * (1 - 1e-9)) | (sizes > high * (1 + 1e-9))
        outside = bool(beyond.any())
        far = _far(cell, [each.cell for each in observed])
        own = [each.value for each in observed if each.cell == cell]
        value, reach = float(predicted[place]), verdict.reach(outside)
        rows.append(
            {
                **asdict(cell),
                "parameters": cost.parameters,
                "bytes": cost.bytes,
                "tokens": cost.tokens,
                "regularity": candidates.data[cell].ratio,
                "seconds": round(float(seconds[place]), 3),
                "measured": float(np.mean(own)) if own else None,
                "spread": float(np.std(own, ddof=1)) if len(own) > 1 else None,
                "predicted": None if far else value,
                "low": None if far else max(value - reach, least),
                "high": None if far else min(value + reach, most),
                "extrapolated": outside,
                "untested": bool((beyond & ~tried).any()),
                "within_budget": budget.allows(cost, float(seconds[place])),
            }
        )
    return rows


def _far(cell: Cell, measured: Sequence[Cell]) -> bool:
    """Whether a size is more than `FAR` times off; of the data their share, as D' more than doubles with it."""
    sizes = np.array([each.sizes for each in measured], dtype=np.float64)
    own, slack = np.array(cell.sizes, dtype=np.float64), FAR * (1 + 1e-9)
    return bool(((own < sizes.min(0) / slack) | (own > sizes.max(0) * slack)).any())


def _seconds(candidates: Candidates, observed: Sequence[Observation]) -> Floats:
    """Of each cell: a start, so much a token, a token and layer, a token, layer and rank; never less than nothing."""
    features = np.array(
        [
            [1, cost.tokens, cost.tokens * cell.layers, cost.tokens * cell.layers * cell.rank]
            for cell in candidates.cells
            for cost in [candidates.costs[cell]]
        ],
        dtype=np.float64,
    )
    features /= features.max(0)
    rows = [candidates.cells.index(each.cell) for each in observed]
    weights, _ = nnls(features[rows], np.array([each.seconds for each in observed]))
    found: Floats = features @ weights
    for place, cell in enumerate(candidates.cells):
        if own := [each.seconds for each in observed if each.cell == cell]:
            found[place] = np.mean(own)
    return found


def _formula(verdict: Verdict, points: Points, values: Floats, metric: Metric) -> dict[str, Any] | None:
    """The law in numbers, where it is what predicts; ``of`` says on which scale."""
    if verdict.chosen != LAW:
        return None
    fitted = predictors(metric.percent)[LAW](points, values)
    of = metric.words
    if isinstance(fitted, LogOdds):
        fitted, of = fitted.fitted, f"log-odds of {of}"
    assert isinstance(fitted, Law)
    terms = [_plain(asdict(term)) for term in fitted.terms]
    return {"of": of, "text": str(fitted), **asdict(fitted), "terms": terms}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}


def _table(verdict: Verdict) -> dict[str, Any]:
    def told(name: str) -> dict[str, Any]:
        ways = {"beyond": verdict.beyond[name], "between": verdict.between[name]}
        return {how: {"rmse": found.rmse, "reach": found.reach, "why": found.why} for how, found in ways.items()}

    return {name: told(name) for name in PREDICTORS}


def _choose(rows: Sequence[dict[str, Any]], choices: Sequence[Cell], metric: Metric) -> dict[str, Any]:
    """The best within the budget, and the smallest whose interval reaches what the best is predicted to have."""
    sizes = [cell.sizes for cell in choices]
    able = [row for row in rows if row["within_budget"] and row["predicted"] is not None]
    able = [row for row in able if (row["layers"], row["rank"], row["data"]) in sizes]
    if not able:
        return {"best": None, "smallest_alike": None}
    merits = [metric.merit(row["predicted"]) for row in able]
    most = max(merits)
    best = min((row for row, merit in zip(able, merits, strict=True) if merit == most), key=lambda r: r["parameters"])
    optimistic = "high" if metric.higher else "low"
    alike = [row for row in able if metric.merit(row[optimistic]) >= most]
    return {"best": best, "smallest_alike": min(alike, key=lambda row: row["parameters"])}
