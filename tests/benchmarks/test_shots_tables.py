"""The table of `benchmarks/shots.py`: paired differences and their intervals, from rows made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shots_tables
import table_parts

KINDS = ("none", "gaussian", "sketch", "gan", "auto")


def rows(seeds: int, clients: int, gain: float, shots: int = 1) -> list[dict[str, Any]]:
    """``sketch`` is better than ``none`` by a normal difference; the others are ``none``."""
    random = np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        none = random.uniform(0.5, 0.7, clients)
        accuracy = {kind: none.tolist() for kind in KINDS}
        accuracy["sketch"] = (none + gain + 0.1 * random.standard_normal(clients)).tolist()
        found.append(
            {
                "setting": "banking77, some",
                "shots": shots,
                "seed": seed,
                "accuracy": accuracy,
                "chosen": {"none": clients - 1, "gaussian": 0, "sketch": 1, "gan": 0},
                "statistics_up": 1000.0,
                "statistics_down": 2000,
            }
        )
    return found


def test_an_interval_is_that_of_the_mean_of_all_differences() -> None:
    """Seeds that differ in nothing but their clients: the normal interval, a little wider for drawing seeds too."""
    given = rows(10, 20, 0.05)
    differences = np.concatenate([np.subtract(r["accuracy"]["sketch"], r["accuracy"]["none"]) for r in given])
    mean, low, high = shots_tables.paired(given, "sketch")
    assert mean == pytest.approx(differences.mean())
    half = 1.96 * differences.std() / len(differences) ** 0.5
    assert half * 0.9 < mean - low < 2 * half
    assert half * 0.9 < high - mean < 2 * half
    assert shots_tables.paired(given, "gan") == (0.0, 0.0, 0.0)


def test_the_page_says_what_the_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    document = {"seeds": 10, "rows": [*rows(2, 4, 0.5), *rows(2, 4, 0.5, shots=5)]}
    (tmp_path / "shots.json").write_text(json.dumps(document))
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)
    table = shots_tables.accuracy("banking77")()
    assert "| added | 1 shot | 5 shots |" in table
    assert "*Partial: 2, 2 of 10 seeds.*" in table
    assert "+0.0 (+0.0 to +0.0)" in table
    assert "75 %" in shots_tables.choices()
    assert shots_tables.differences() is not None


def test_nothing_is_shown_of_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)
    assert "Not run yet" in shots_tables.accuracy("snips")()
    assert "Not run yet" in shots_tables.choices()
    assert shots_tables.differences() is None
