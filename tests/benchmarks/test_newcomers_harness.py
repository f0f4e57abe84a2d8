"""What `newcomers.py` runs and reads, with runs that only write down what they were asked for; and its training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import newcomers
import newcomers_tables
import numpy as np
import pytest
import table_parts

from folklora.federation.run import run
from folklora.federation.sampling import newcomers as late
from folklora.federation.setup import prepare
from folklora.recipe import Recipe

BANKING = "banking77 dirichlet 0.5"
CLIENTS = [str(i) for i in range(10)]
SCORE = {"folklora": 0.8, "fedit": 0.6, "local": 0.5, "sketch": 0.7, "celora": 0.4}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Runs the harness over Banking77; `asked` are the runs that it performed."""
    found = SimpleNamespace(asked=[], results=tmp_path / "results", fails=set())

    def result(value: float) -> dict[str, Any]:
        return {"accuracy": value, "examples": {"train": 8, "validation": 1, "test": 20}}

    def perform(recipe: Recipe, path: Path) -> None:
        name, share = recipe.method.name, recipe.newcomers.share
        if name in found.fails:
            raise RuntimeError("broken")
        found.asked.append((name, share, recipe.seed))
        held = late(0.2, recipe.seed, CLIENTS)
        joined = {c: result(SCORE[name] + 0.01 * int(c)) for c in held}
        others = {c: result(0.9) for c in CLIENTS if c not in held}
        path.mkdir(parents=True)
        told = {"clients": joined, "bytes_up_per_client": 1000.0, "bytes_down_per_client": 500.0}
        summary = {"clients": {**others, **({} if share else joined)}, **({"newcomers": told} if share else {})}
        (path / "summary.json").write_text(json.dumps(summary))

    def train_at_home(path: Path) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
        for each in summary["newcomers"]["clients"].values():
            each["accuracy"] += 0.1
        return summary

    def play(*given: str) -> dict[str, Any]:
        base = ["newcomers.py", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*base, "--results", str(found.results), "--only", BANKING, *given])
        with pytest.raises(SystemExit) as left:
            newcomers.main()
        found.status = left.value.code
        file = found.results / "newcomers.json"
        return json.loads(file.read_text()) if file.exists() else {}

    found.play = play
    monkeypatch.setattr(newcomers, "perform", perform)
    monkeypatch.setattr(newcomers, "train_at_home", train_at_home)
    monkeypatch.setattr(table_parts, "RESULTS", found.results)
    return found


def test_every_start_is_run_with_the_same_newcomers_held_back_and_local_with_nobody(bench: SimpleNamespace) -> None:
    document = bench.play()
    assert bench.status == 0
    assert sorted(bench.asked) == sorted(
        (name.partition(":")[0], 0.0 if name == "local" else 0.2, seed)
        for name in (*newcomers.STARTS, "local")
        for seed in range(3)
    )
    rows = {(row["variant"], row["trained"], row["seed"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 3 * (len(newcomers.STARTS) + 1 + len(newcomers.TRAINED))
    for (name, trained, seed), row in rows.items():
        held = late(0.2, seed, CLIENTS)
        value = SCORE[name.partition(":")[0]] + (0.1 if trained else 0)
        assert row["newcomers"] == pytest.approx({c: value + 0.01 * int(c) for c in held})
        assert (row["bytes_up"], row["bytes_down"]) == ((0, 0) if name == "local" else (1000, 500))
        assert row["others"] == pytest.approx(0.9)
    bench.asked.clear()
    assert bench.play() == document  # all of it is reused
    assert bench.asked == []


def test_what_fails_stops_nothing_and_is_left(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fails = {"fedit"}
    document = bench.play("--seed", "0")
    assert bench.status == 1
    assert {row["variant"] for row in document["rows"]} == {*newcomers.STARTS, "local"} - {"fedit"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"benchmark": "newcomers", "left": 2, "failed": 1}


def test_the_table_pairs_newcomers_with_themselves(bench: SimpleNamespace) -> None:
    bench.play()
    text = newcomers_tables.table(BANKING)()
    line = next(line for line in text.splitlines() if "a common core" in line)
    assert "+30.0 (+30.0 to +30.0)" in line
    assert "1.50 KB" in line
    assert "6 newcomers" in text
    assert newcomers_tables.table("snips dirichlet 0.1")() == table_parts.NOT_RUN
    assert newcomers_tables.starts() is not None


def test_the_interval_is_that_of_a_mean_of_paired_differences() -> None:
    draw = np.random.default_rng(1)
    zero = {(0, str(i)): float(v) for i, v in enumerate(draw.normal(0.5, 0.3, 400))}
    own = {key: value + float(g) for (key, value), g in zip(zero.items(), draw.normal(0.1, 0.05, 400), strict=True)}
    found = newcomers_tables.paired(own, zero)
    assert found is not None
    differences = np.array([own[key] - zero[key] for key in zero])
    half = 1.96 * differences.std(ddof=1) / 20
    assert found[0] == pytest.approx(differences.mean())
    assert found[1:] == pytest.approx((found[0] - half, found[0] + half), abs=0.15 * half)


@pytest.mark.parametrize("name", ["local", "folklora"])
def test_trained_at_home_from_nothing_is_local_training(
    tiny_recipe: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Of `local` the start is zero, and what follows is what everybody does who was never held back."""
    recipe = tiny_recipe("train.cohort=1", "newcomers.share=0.5", f"method.name={name}")
    run(recipe, tmp_path / "late")
    before = (tmp_path / "late" / "summary.json").read_bytes()
    found = newcomers.train_at_home(tmp_path / "late")["newcomers"]["clients"]
    assert (tmp_path / "late" / "summary.json").read_bytes() == before
    assert list(found) == list(prepare(recipe).newcomers)
    if name == "local":
        whole = run(tiny_recipe("train.cohort=1", "method.name=local"), tmp_path / "whole")
        for client, result in found.items():
            assert result["accuracy"] == pytest.approx(whole["clients"][client]["accuracy"])
