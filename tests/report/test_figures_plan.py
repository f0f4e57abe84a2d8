"""The picture of a plan shows the numbers of its document."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from folklora.report.figures_plan import planned

RUNS = [
    {"cell": {"layers": n, "rank": r, "data": share}, "value": 0.5 + 0.01 * n * r * share, "parameters": 1000 * n * r}
    for n, r, share in product((1, 2), (1, 2), (0.5, 1.0))
]


@pytest.fixture
def document() -> dict[str, Any]:
    cells = [
        {
            "layers": n,
            "rank": r,
            "data": 1.0,
            "parameters": 1000 * n * r,
            "within_budget": n * r < 8,
            "predicted": p,
            "low": p - 0.02,
            "high": p + 0.03,
        }
        for n, r in product((1, 2), (1, 2, 4))
        for p in [0.5 + 0.011 * n * r]
    ]
    cells.append({**cells[-1], "rank": 64, "parameters": 128_000, "predicted": None, "low": None, "high": None})
    return {
        "metric": {"name": "accuracy", "higher": True},
        "budget": {"parameters": 6000, "bytes": None, "seconds": None},
        "share": 1.0,
        "runs": RUNS,
        "cells": cells,
        "decided": "beyond",
        "held_out": {
            name: {"beyond": {"rmse": error, "reach": error, "why": None}, "between": {"rmse": 9.0}}
            for name, error in (("law", 0.01), ("log-quadratic", None), ("nearest cell", 0.04))
        },
        "predictor": "law",
        "best": cells[2],
        "smallest_alike": cells[0],
    }


def test_lines_are_the_predictions_and_points_the_measurements(document: dict[str, Any]) -> None:
    sizes, errors = planned(document).axes
    lines = [line for line in sizes.lines if line.get_marker() == "None" and line.get_linewidth() == 1.5]
    assert lines[0].get_xdata() == pytest.approx([1000, 2000, 4000])
    assert lines[1].get_xdata() == pytest.approx([2000, 4000, 8000])  # what is too far is not shown
    assert lines[1].get_ydata() == pytest.approx([0.522, 0.544, 0.588])
    measured = [line for line in sizes.lines if line.get_markersize() == 4]
    assert [np.asarray(line.get_ydata()).tolist() for line in measured] == [[0.51, 0.52], [0.52, 0.54]]
    ringed = {line.get_label(): line.get_xydata().tolist() for line in sizes.lines if line.get_markersize() > 10}
    assert ringed == {"best": [[4000, 0.544]], "smallest that may be as good": [[1000, 0.511]]}
    told = [text.get_text() for text in sizes.get_legend().get_texts()]
    assert told == ["1 layer", "2 layers", *ringed, "over budget", "budget"]
    assert [bar.get_width() for bar in errors.patches] == pytest.approx([0.01, 0.04])
    assert [text.get_text().strip() for text in errors.texts] == ["1.0", "4.0"]


def test_refused_it_shows_what_was_measured_and_why(document: dict[str, Any]) -> None:
    for key in ("cells", "best", "smallest_alike"):
        del document[key]
    figure = planned({**document, "predictor": None, "budget": dict.fromkeys(document["budget"])})
    assert "no plan" in figure.get_suptitle()
    sizes, errors = figure.axes
    assert sizes.get_ylabel() == "accuracy (measured)"
    assert [len(line.get_xdata()) for line in sizes.lines if line.get_markersize() == 4] == [2, 2]
    assert len({bar.get_facecolor() for bar in errors.patches}) == 1


def test_what_is_drawn_is_the_share_that_is_chosen_among(document: dict[str, Any]) -> None:
    more = [{**run, "cell": {**run["cell"], "data": 2.0}} for run in RUNS]
    sizes, _ = planned({**document, "runs": [*RUNS, *more]}).axes
    assert "100 %" in sizes.get_xlabel()
    assert [len(line.get_xdata()) for line in sizes.lines if line.get_markersize() == 4] == [2, 2]
    of_none = planned({**document, "runs": more}).axes[0]
    assert of_none.get_ylabel() == "accuracy (predicted)"
    far = planned({**document, "budget": {**document["budget"], "parameters": 5_000_000}}).axes[0]
    assert far.get_xlim()[1] < 20_000
