"""`benchmarks/law.py`: what it fits and what it asks about; and its tables, from rows made up here."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import law
import law_tables
import numpy as np
import pytest
import table_parts
from scipy.special import expit

LEVELS = ((1, 2, 4, 8), (16, 32, 64, 128), (0.25, 0.5, 1.0))


def rows(seeds: int) -> list[dict[str, Any]]:
    """In the log-linear form of log-odds, with 0.001 of chance between seeds; test is 0.01 below validation."""
    random = np.random.default_rng(0)
    found = []
    for (layers, width, share), seed in product(product(*LEVELS), range(seeds)):
        value = expit(-1.2 + 0.05 * np.log(layers) + 0.15 * np.log(width) + 0.1 * np.log(share))
        value += 0.001 * random.standard_normal()
        row = {"layers": layers, "width": width, "share": share, "seed": seed}
        found.append({**row, "validation": {"accuracy": value}, "test": {"accuracy": value - 0.01}})
    return found


def test_the_largest_are_predicted_from_those_that_are_largest_in_nothing() -> None:
    given = rows(2)
    found = law.fitted(given, "badges", "accuracy", "width", [1e5 * row["share"] for row in given])
    assert (found["cells"], found["seeds"]) == (48, 2)
    assert found["fitted_to"] == 2 * 3 * 3 * 2
    assert found["asked_about"] == 2 * 48 - found["fitted_to"]
    assert found["between_seeds"] == pytest.approx(0.001, rel=0.25)
    told = {each["name"]: each for each in found["predictors"]}
    assert told["log-linear"]["largest"] < 0.003 < told["nearest cell"]["largest"]
    truth = expit(-1.2 + 0.05 * np.log(8) + 0.15 * np.log(128))
    assert told["log-linear"]["corner"] == pytest.approx(truth, abs=0.003)
    assert found["corner"]["validation"] == pytest.approx(truth, abs=0.003)
    assert found["corner"]["test"] == pytest.approx(found["corner"]["validation"] - 0.01)
    assert found["chosen"] in ("law", "log-linear", "log-quadratic")


def test_seeds_whose_data_differ_a_little_are_one_cell() -> None:
    given = rows(3)
    same = law.fitted(given, "badges", "accuracy", "width", [1e5 * row["share"] for row in given])
    sizes = [1e5 * row["share"] * (1 + 1e-3 * (row["seed"] - 1)) for row in given]
    found = law.fitted(given, "badges", "accuracy", "width", sizes)
    for one, other in zip(same["predictors"], found["predictors"], strict=True):
        assert one == pytest.approx(other)


def test_an_unfinished_grid_says_so() -> None:
    given = [row for row in rows(1) if row["width"] < 128]
    found = law.fitted(given, "markov", "accuracy", "width", [1e5 * row["share"] for row in given])
    assert found["cells"] == 36
    assert found["between_seeds"] is None
    assert found["corner"]["sizes"] == [8.0, 64.0, 1.0]


def test_the_published_fit_finds_another_d_from_every_start() -> None:
    found = law.published(rows(1), "accuracy")
    assert max(each["in_sample_r2"] for each in found) - min(each["in_sample_r2"] for each in found) < 0.01
    ends = [each["data"] for each in found]
    assert max(ends) > 2 * min(ends)


def test_tables_are_made_of_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)
    for table in (name for name in law_tables.TABLES if name not in ("law-predicted", "law-surface")):
        assert law_tables.TABLES[table][1]() == table_parts.NOT_RUN
    given = rows(1)
    grid = law.fitted(given, "badges", "accuracy", "width", [1e5 * row["share"] for row in given])
    document = {"grids": [grid], "data": [], "entropy": [], "published": {"badges": law.published(given, "accuracy")}}
    (tmp_path / "law.json").write_text(json.dumps(document, allow_nan=False))
    shown = law_tables.TABLES["law-sequential"][1]()
    assert "badges: accuracy" in shown
    assert "48 of 48 cells, 1 seed; the largest: fitted to 18 runs, asked about 30" in shown
    assert shown.count("**") == 6  # the least of each column
    assert f"{100 * grid['corner']['test']:.2f}" in law_tables.TABLES["law-corners"][1]()
    assert law_tables.TABLES["law-adapters"][1]() == table_parts.NOT_RUN
    assert law_tables.TABLES["law-published"][1]().count("badges") == 3
