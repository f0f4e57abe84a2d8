"""How well the Performance Law predicts, beside rivals that know nothing of it; from results that are there.

    python benchmarks/law.py --data ../shared/data

Fits what `sequential.py` and `adapter_sizes.py` measured, and trains nothing. *Largest*: fitted to the cells in which
no size is at its largest level, asked about all others. *Beyond* and *between*: `folklora.planning.heldout`, over all
cells. Fitted to validation scores, as `folklora plan` is; of the largest cell the test score is told, too. Also:
how regular each data set is, which reading of D' in the law goes with it, and what of the published fit is identified.
Unfinished grids are fitted as far as they are; how many cells there are is said.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, environment, publish
from scipy.optimize import least_squares
from scipy.stats import spearmanr
from sequences import PADDING
from sequential import CHANCES, ONE, sequences_of

from folklora.data.audit.entropy import regularity, shannon
from folklora.data.audit.matches import entropy_rate
from folklora.data.audit.tokens import Tokens
from folklora.planning.baselines import LAW, LINEAR, MEAN, PREDICTORS, LogOdds, Predictor, predictors
from folklora.planning.heldout import MARGIN, held_out, judge
from folklora.planning.law import Law
from folklora.planning.points import Floats, Points

Row = dict[str, Any]
LAST = "markov"  # whose chain has the least chance
SHARES = ("ndcg", "accuracy")
"""Metrics in 0..1, of which the log-odds are fitted."""
AS_IS = "law, of the share itself"
"""As published: beside ours, which fits the log-odds of shares."""


def load(name: str, results: Path) -> list[Row]:
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


# -- data --------------------------------------------------------------------------------------------------------------


@cache
def measured(setting: str, share: float, seed: int, data: Path) -> Row:
    """How regular the training part is; nats."""
    found = sequences_of(setting, data)
    part = found.part(share, seed)
    tokens = Tokens.joined([row[row != PADDING].tolist() for row in part])
    ratio, rate = regularity(tokens), entropy_rate(tokens)
    return {
        "setting": setting,
        "share": share,
        "seed": seed,
        "tokens": len(tokens),
        "approximate_entropy": ratio.observed,
        "regularity": ratio.value,
        "shannon": shannon(tokens).value,
        "entropy_rate": rate.value,
        "known": found.entropy,
    }


DEFINITIONS = {
    "tokens": lambda of: of["tokens"],
    "tokens x approximate entropy": lambda of: of["tokens"] * of["approximate_entropy"],
    "tokens / approximate entropy": lambda of: of["tokens"] / of["approximate_entropy"],
    "tokens x regularity": lambda of: of["tokens"] * of["regularity"],
    "tokens / regularity": lambda of: of["tokens"] / of["regularity"],
    "approximate entropy alone": lambda of: of["approximate_entropy"],
    "the chain's true entropy alone": lambda of: of["known"],
}
"""Readings of D', and what has no tokens in it."""


def entropies(rows: Sequence[Row], metric: str, data: Path) -> Row | None:
    """One size of model on chains of several entropies: each chain predicted from the others, by reading of D'.

    In the published form, of the metric itself: the question is the paper's.
    None before all chains are there.
    """
    kept = [row for row in rows if (row["layers"], row["width"]) == ONE and row["setting"] in (*CHANCES, LAST)]
    chains = sorted({row["setting"] for row in kept})
    if len(chains) <= len(CHANCES):
        return None
    values = np.array([row["validation"][metric] for row in kept])
    names = np.array([row["setting"] for row in kept])
    told = [measured(row["setting"], row["share"], row["seed"], data) for row in kept]

    def left_out(sizes: Floats, asked: Sequence[str] = (LAW, LINEAR)) -> float | None:
        """By the first predictor that the levels of D' are enough for."""
        points = Points(np.stack([np.ones_like(sizes), np.ones_like(sizes), sizes], 1))
        for predictor in asked:
            errors: list[float] = []
            try:
                for chain in chains:
                    out = names == chain
                    found = PREDICTORS[predictor](points[~out], values[~out]).predict(points[out])
                    errors += (found - values[out]).tolist()
            except ValueError:
                continue
            return float(np.sqrt(np.mean(np.square(errors))))
        return None

    readings = []
    for name, size in DEFINITIONS.items():
        sizes = np.array([size(each) for each in told], dtype=np.float64)
        rank = float(spearmanr(sizes, values).statistic)
        readings.append({"reading": name, "rmse": left_out(sizes), "spearman": rank})
    mean = left_out(np.array([each["tokens"] for each in told], dtype=np.float64), [MEAN])
    return {"metric": metric, "chains": len(chains), "runs": len(kept), "mean": mean, "readings": readings}


# -- laws --------------------------------------------------------------------------------------------------------------


def fitted(rows: Sequence[Row], name: str, metric: str, width: str, sizes: Sequence[float]) -> Row:
    """One grid and metric: errors of every predictor on what it did not see.

    Parameters
    ----------
    rows
        With ``layers``, ``width``'s key, a share under ``"share"``, and numbers under ``validation`` and ``test``.
    sizes
        D' of each row. A share of the data is one size, whatever part of them a seed drew: seeds of a cell are held
        out together.
    """
    drawn: dict[float, list[float]] = {}
    for row, size in zip(rows, sizes, strict=True):
        drawn.setdefault(row["share"], []).append(size)
    sizes = [float(np.mean(drawn[row["share"]])) for row in rows]
    triples = [(row["layers"], row[width], size) for row, size in zip(rows, sizes, strict=True)]
    points = Points.of(triples)
    values = np.array([row["validation"][metric] for row in rows])
    shares = np.array([row["share"] for row in rows])
    tops = [points.sizes[:, 0].max(), points.sizes[:, 1].max(), shares.max()]
    small = (points.sizes[:, 0] < tops[0]) & (points.sizes[:, 1] < tops[1]) & (shares < tops[2])
    corner = (points.sizes[:, 0] == tops[0]) & (points.sizes[:, 1] == tops[1]) & (shares == tops[2])
    share = metric in SHARES
    verdict = judge(points, values, share)
    fits = predictors(share)
    beyond, between = dict(verdict.beyond), dict(verdict.between)
    if share:
        fits = {LAW: fits[LAW], AS_IS: PREDICTORS[LAW], **fits}
        beyond[AS_IS], between[AS_IS] = (held_out(fits[AS_IS], points, values, how) for how in ("beyond", "between"))
    told = []
    predicted: dict[str, Floats] = {}
    for each, fit in fits.items():
        predicted[each] = fit(points[small], values[small]).predict(points)
        errors = predicted[each][~small] - values[~small]
        told.append(
            {
                "name": each,
                "largest": _rmse(errors),
                "beyond": beyond[each].rmse,
                "between": between[each].rmse,
                "corner": float(predicted[each][corner].mean()) if corner.any() else None,
            }
        )
    whole, small_law = fits[LAW](points, values), fits[LAW](points[small], values[small])
    return {
        "name": name,
        "metric": metric,
        "cells": len({(row["layers"], row[width], row["share"]) for row in rows}),
        "seeds": len({row["seed"] for row in rows}),
        "fitted_to": int(small.sum()),
        "asked_about": int((~small).sum()),
        "range": [float(values.min()), float(values.max())],
        "between_seeds": _between_seeds(rows, metric, width),
        "chosen": verdict.chosen,
        "refusal": verdict.refusal,
        "predictors": told,
        "corner": {
            "sizes": [float(top) for top in tops],
            "validation": float(values[corner].mean()) if corner.any() else None,
            "test": float(np.mean([row["test"][metric] for row, at in zip(rows, corner, strict=True) if at]))
            if corner.any()
            else None,
        },
        "law": str(_law(whole)),
        "law_of_small": str(_law(small_law)),
        "exponents": [{"axis": t.axis, "value": t.exponent, "known": t.known} for t in _law(whole).terms],
        "in_sample_r2": 1
        - float(((whole.predict(points) - values) ** 2).sum() / ((values - values.mean()) ** 2).sum()),
        "points": [
            [*sizes, float(share), float(value), float(said), bool(small_one)]
            for sizes, share, value, said, small_one in zip(triples, shares, values, predicted[LAW], small, strict=True)
        ],
    }


def _law(fitted: Predictor) -> Law:
    found = fitted.fitted if isinstance(fitted, LogOdds) else fitted
    assert isinstance(found, Law)
    return found


def _rmse(errors: Floats) -> float | None:
    return float(np.sqrt(np.mean(np.square(errors)))) if len(errors) else None


def _between_seeds(rows: Sequence[Row], metric: str, width: str) -> float | None:
    """Standard deviation of the runs of one cell, pooled: no prediction can be nearer than that."""
    cells: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        cells.setdefault((row["layers"], row[width], row["share"]), []).append(row["validation"][metric])
    several = [np.var(values, ddof=1) for values in cells.values() if len(values) > 1]
    return float(np.sqrt(np.mean(several))) if several else None


def published(rows: Sequence[Row], metric: str) -> list[Row]:
    """The authors' fit of one amount of data, from three starts of D: what D becomes, and how well it all fits.

    ``w1 (ln N + p1 / N^w3) + w2 (ln d + p1 / d^w4) + ln D + p2 / D^w5``, all but N and d fitted.
    """
    kept = [row for row in rows if row["share"] == 1]
    n, d = (np.array([row[key] for row in kept], dtype=np.float64) for key in ("layers", "width"))
    values = np.array([row["validation"][metric] for row in kept])

    def left(w: Floats) -> Floats:
        layers, width = w[0] * (np.log(n) + w[2] / n ** w[3]), w[1] * (np.log(d) + w[2] / d ** w[4])
        found: Floats = layers + width + np.log(w[5]) + w[6] / w[5] ** w[7] - values
        return found

    lower = np.array([-np.inf, -np.inf, -np.inf, 0.05, 0.05, 1e-6, -np.inf, 0.05])
    upper = np.array([np.inf, np.inf, np.inf, 5.0, 5.0, 1e6, np.inf, 5.0])
    found = []
    for start in (1.0, 5.0, 50.0):
        ended = least_squares(
            left, np.array([0.1, 0.1, 0.1, 1, 1, start, 0.1, 1]), bounds=(lower, upper), max_nfev=4000
        )
        squares = float((ended.fun**2).sum())
        r2 = 1 - squares / float(((values - values.mean()) ** 2).sum())
        found.append({"start": start, "data": float(ended.x[5]), "in_sample_r2": r2, "cells": len(kept)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds so_badges/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    data = given.data.resolve()
    sequential = load("sequential", given.results)
    document: dict[str, Any] = {"environment": environment(torch.device("cpu"), torch.float32), "margin": MARGIN}
    grids = []
    for setting, metric in product(("badges", "markov"), ("ndcg", "accuracy", "loss")):
        rows = [row for row in sequential if row["setting"] == setting]
        if len(rows) >= 20:
            told = [measured(setting, row["share"], row["seed"], data) for row in rows]
            grids.append(fitted(rows, setting, metric, "width", [t["tokens"] / t["regularity"] for t in told]))
    adapters = [_as_sequential(row) for row in load("adapter_sizes", given.results)]
    if len(adapters) >= 20:
        grids.append(fitted(adapters, "adapters", "accuracy", "rank", [row["train_examples"] for row in adapters]))
    document["grids"] = grids
    document["data"] = [
        measured(setting, share, 0, data)
        for setting in sorted({row["setting"] for row in sequential})
        for share in sorted({row["share"] for row in sequential if row["setting"] == setting})
    ]
    found = [entropies(sequential, metric, data) for metric in ("ndcg", "accuracy", "loss")]
    document["entropy"] = [each for each in found if each is not None]
    document["published"] = {
        setting: published([row for row in sequential if row["setting"] == setting], "ndcg")
        for setting in ("badges", "markov")
        if sum(row["setting"] == setting and row["share"] == 1 for row in sequential) >= 8
    }
    publish("law", document)


def _as_sequential(row: Mapping[str, Any]) -> Row:
    return {
        **row,
        "share": row["data"],
        "validation": {"accuracy": row["validation"]},
        "test": {"accuracy": row["test"]},
    }


if __name__ == "__main__":
    main()
