"""What `drift.py` reads off a run, and what its table and picture make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import drift
import drift_tables
import pytest
import table_parts
from resumable import Store

CELL = drift.Cell(drift.SETTINGS[0], "folklora", 0)


def finished(path: Path, end: float) -> None:
    """A run of two clients, of which the second drifts in round 2."""
    path.mkdir(parents=True)
    lines = [
        {"round": r, "validation": {"clients": {"0": 0.5, "1": 0.1 * r}}, **({"drift": ["1"]} if r == 2 else {})}
        for r in (1, 2, 3)
    ]
    text = [json.dumps({"round": 0, "validation": None}), *map(json.dumps, lines)]
    (path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    row = dict.fromkeys(("bytes_up_per_client_round", "bytes_down_per_client_round", "bytes_once_per_client"), 1000.0)
    clients = {"0": {"accuracy": 0.6}, "1": {"accuracy": end}}
    (path / "summary.json").write_text(json.dumps({"row": row, "clients": clients}))


def test_a_run_is_told_by_who_drifted(tmp_path: Path) -> None:
    finished(tmp_path / "run", 0.9)
    row = drift.told(tmp_path / "run", CELL)
    assert (row["drifted"], row["others"]) == (0.9, 0.6)
    assert row["curves"]["drifted"] == [[1, 0.1], [2, 0.2], [3, pytest.approx(0.3)]]
    assert row["curves"]["others"] == [[1, 0.5], [2, 0.5], [3, 0.5]]


def test_runs_on_the_disk_become_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "runs", tmp_path / "results")
    names = ["folklora", f"folklora:refresh={drift.REFRESH}"]
    plan = drift.Drift(store, drift.SETTINGS[:1], names, range(2))
    assert len(plan.left()) == 4
    for cell in plan.left()[:3]:
        finished(plan.folder(cell), 0.7 if cell.seed else 0.9)
    plan.collect()
    assert [cell.label for cell in plan.left()] == [f"{drift.SETTINGS[0].name}: {names[1]}, seed 1"]
    document: dict[str, Any] = store.load("drift")
    assert [(row["variant"], row["seed"]) for row in document["rows"]] == [(names[0], 0), (names[0], 1), (names[1], 0)]
    store.write("drift", {**document, "change": 2})
    monkeypatch.setattr(table_parts, "RESULTS", store.results)
    table = drift_tables.drift()
    lines = table.splitlines()
    assert "| folklora | 10.0 ± 0.0 | 20.0 ± 0.0 | 80.0 ± 14.1 | 60.0 ± 0.0 |" in lines[2]
    assert "`refresh=3` | 10.0 | 20.0 | 90.0 | 60.0 |" in lines[3]
    figure = drift_tables.curves()
    assert figure is not None
    drawn = [line.get_label() for line in figure.axes[0].get_lines()]
    assert drawn[:2] == ["folklora", "folklora refresh=3"]


def test_every_variant_is_a_recipe_that_can_be(tmp_path: Path) -> None:
    plan = drift.Drift(Store(tmp_path, tmp_path), drift.SETTINGS, list(drift.VARIANTS), range(1))
    for cell in plan.plan():
        recipe = plan.recipe(cell)
        assert recipe.drift.round == drift.CHANGE
        assert recipe.train.rounds == drift.ROUNDS
