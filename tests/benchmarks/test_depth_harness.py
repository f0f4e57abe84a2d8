"""What `depth.py` runs, chooses, measures and shows: real runs on a backbone of next to nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import depth
import depth_tables
import pytest
import table_parts

from folklora.federation.rescoring import evaluate
from folklora.federation.run import read_summary
from folklora.federation.rundir import RunDirectory

Play = Callable[..., dict[str, Any]]


@pytest.fixture
def play(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs the harness with FedIT alone; returns what it wrote."""
    source = tmp_path / "rows.csv"
    words = ("card", "lost", "my", "stolen", "help", "the")
    rows = [f"{words[i % 6]} {words[i % 5]} {words[i % 4]},label {i % 3}" for i in range(120)]
    source.write_text("\n".join(("text,label", *rows, "")), encoding="utf-8")
    data = {"source": str(source), "clients": 2}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / depth.SHARED).symlink_to(tiny_model("albert"))
    for name, value in (
        ("MODELS", tmp_path / "models"),
        ("DATA", data),
        ("TUNING", {**data, "limit": 60}),
        ("RATES", ("1e-3", "1e-2")),
        ("METHODS", {"fedit": {"name": "fedit"}}),
        ("PAIRS", 2),
        ("TEXTS", 4),
        ("VARIANTS", depth.VARIANTS[:2]),
    ):
        monkeypatch.setattr(depth, name, value)
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)

    def run(*given: str) -> dict[str, Any]:
        base = ["depth.py", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*base, *given])
        with pytest.raises(SystemExit) as left:
            depth.main()
        assert not left.value.code
        found: dict[str, Any] = json.loads((tmp_path / "depth.json").read_text())
        return found

    return run


def test_each_run_is_tested_at_every_depth(play: Play, tmp_path: Path) -> None:
    rows = play("--seed", "0")["rows"]
    assert [row["variant"] for row in rows] == ["shared block, at 6 alone", "shared block, over depths"]
    for row, variant in zip(rows, reversed(depth.VARIANTS), strict=True):
        tried = {
            rate: json.loads(
                (depth.Cell("fedit", variant, 100, rate).folder(tmp_path / "runs") / "row.json").read_text()
            )
            for rate in depth.RATES
        }
        assert row["rate"] == max(tried, key=lambda rate: tried[rate]["validation"])
        # At all steps it is what the run itself has said, and what is said of the run again.
        path = depth.Cell("fedit", variant, 0).folder(tmp_path / "runs")
        own = read_summary(RunDirectory.open(path))["row"]
        assert row["test"]["6"] == pytest.approx(own["accuracy_mean"], abs=1e-6)
        assert row["validation"]["6"] == pytest.approx(evaluate(path)["mean"], abs=1e-6)
        assert sorted(row["test"]) == list("123456")
        assert row["bytes_up"] == own["bytes_up_per_client_round"]
    assert set(rows[1]["auto"]["steps"]) <= {3, 4, 6}
    assert "auto" not in rows[0]
    table = depth_tables.accuracy("fedit")()
    assert "| shared block, over depths |" in table
    assert "*Partial: 1 of 3 seeds.*" in table

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("row.json")}
    assert play("--seed", "0")["rows"] == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_times_are_ratios_to_all_steps(play: Play) -> None:
    found = play("--time")["times"]
    assert [(row["steps"], row["batch"]) for row in found] == [(k, b) for k in range(1, 7) for b in (1, 32)]
    assert all(row["speed_up"]["min"] <= row["speed_up"]["median"] <= row["speed_up"]["max"] for row in found)
    assert "shared block, 3 steps" in depth_tables.times()


def test_nothing_is_shown_of_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)
    for made in (depth_tables.accuracy("fedit"), depth_tables.times, depth_tables.backbone):
        assert "Not run yet" in made()
    assert depth_tables.trade() is None
