"""What `tasks.py` runs, chooses and keeps, with runs that only write down what they were asked for."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import table_parts
import task_tables
import tasks
from accuracy import AT_ONE_RANK

from folklora.federation.run import variant
from folklora.federation.setup import validate
from folklora.methods import METHODS
from folklora.recipe import Recipe

BEST = {"local": 3e-3, "fedit": 1e-2, "celora": 3e-3}
START = {"local": 2.0, "fedit": 1.5, "celora": 1.0}
RECIPE = """
[model]
name = "model"
task = "causal-lm"
[data]
source = "data.jsonl"
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Runs the harness on one task, of which `fails` cannot be run; `asked` are the runs it performed."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "few.toml").write_text(RECIPE)
    found = SimpleNamespace(asked=[], fails=set(), folder=tmp_path, results=tmp_path / "results")

    def perform(recipe: Recipe, path: Path) -> dict[str, object]:
        method, rate = recipe.method.name, recipe.train.lr
        if method in found.fails:
            raise RuntimeError("broken")
        found.asked.append((method if recipe.train.rounds else "as it is", rate, recipe.seed))
        # The further from its own best rate, the larger the loss; the smaller, the better.
        value = START[method] + abs(math.log(rate / BEST[method])) + 0.01 * recipe.seed
        value = 7 + 0.01 * recipe.seed if recipe.train.rounds == 0 else value
        row = {"metric": "loss", "higher": False, "loss_mean": value, "loss_worst_tenth": value + 1, "rounds": 1}
        row |= dict.fromkeys(("bytes_up_per_client_round", "bytes_down_per_client_round", "bytes_once_per_client"), 8.0)
        row |= {"seed": recipe.seed, "validation_mean": value, "perplexity_mean": 9.0}
        path.mkdir(parents=True)
        (path / "summary.json").write_text(json.dumps({"row": row, "clients": {"a": {}, "b": {}}}))
        return row

    def run(*given: str) -> dict[str, object]:
        base = ["tasks.py", "--runs", str(tmp_path / "runs"), "--results", str(found.results), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*base, "--methods", ",".join(BEST), *given])
        with pytest.raises(SystemExit) as left:
            tasks.main()
        found.status = left.value.code
        file = found.results / "tasks.json"
        return json.loads(file.read_text()) if file.exists() else {}

    found.run = run
    monkeypatch.setattr(tasks, "RECIPES", tmp_path)
    monkeypatch.setattr(tasks, "TASKS", (tasks.Task("few", "few.toml"),))
    monkeypatch.setattr(tasks, "perform", perform)
    tasks._digest.cache_clear()
    return found


def test_every_run_of_the_plan_is_a_recipe_that_its_method_takes() -> None:
    for task in tasks.TASKS:
        for method in task.methods:
            validate(variant(task.recipe(), f"{method}:train.lr=1e-3", 0))
    named = {method.partition(":")[0] for method in tasks.METHODS}
    assert named == {name for name, of in METHODS.items() if not of.needs_head} - set(AT_ONE_RANK)


def test_every_method_runs_all_seeds_at_the_rate_of_its_lowest_validation_loss(bench: SimpleNamespace) -> None:
    document = bench.run()
    assert bench.status == 0
    rows = {(row["variant"], row["seed"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 4 * 3
    for method, rate in BEST.items():
        assert [rows[method, seed]["lr"] for seed in range(3)] == [rate] * 3
        # All rates on seed 0, whose best is not run again; fedit's is the last of the grid, so the next one is tried.
        runs = [(r, s) for m, r, s in bench.asked if m == method]
        beyond = [(3e-2, 0)] if method == "fedit" else []
        assert runs == [(1e-3, 0), (3e-3, 0), (1e-2, 0), *beyond, (rate, 1), (rate, 2)]
    assert len(bench.asked) == 3 + 3 * (3 + 2) + 1
    assert document["tasks"]["few"]["validation"]["celora"]["3e-3"] == -1.0  # as a merit


@pytest.mark.parametrize(
    ("best", "tried"), [(1e-1, 5), (3e-2, 5), (1e-2, 4), (3e-3, 3), (1e-3, 4), (3e-4, 5), (1e-4, 5)]
)
def test_the_grid_goes_on_where_the_best_is_at_its_end(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, best: float, tried: int
) -> None:
    monkeypatch.setitem(BEST, "celora", best)
    rows = bench.run()["rows"]
    assert [row["lr"] for row in rows if row["variant"] == "celora"] == [best] * 3
    assert len([rate for method, rate, seed in bench.asked if method == "celora" and seed == 0]) == tried


def test_where_nothing_is_learned_higher_rates_are_tried() -> None:
    assert tasks.grid("ravan", {}) == tasks.GRID
    assert tasks.grid("ravan", dict.fromkeys(tasks.GRID, 0.1)) == (*tasks.GRID, "3e-2")
    assert tasks.grid("ravan", {**dict.fromkeys(tasks.GRID, 0.1), "3e-2": 0.0}) == (*tasks.GRID, "3e-2")
    assert tasks.grid(tasks.UNTRAINED, {}) == tasks.GRID[:1]


def test_what_is_done_is_not_run_again_but_for_another_checkpoint(bench: SimpleNamespace) -> None:
    first = bench.run()
    bench.asked.clear()
    assert bench.run()["rows"] == first["rows"]
    assert not bench.asked
    (bench.folder / "model" / "model.safetensors").write_bytes(b"other weights")
    tasks._digest.cache_clear()
    bench.run("--collect")
    assert not json.loads((bench.results / "tasks.json").read_text())["rows"]
    bench.run()
    assert len(bench.asked) == 19


def test_what_was_collected_is_not_run_again_where_its_runs_are_gone(bench: SimpleNamespace) -> None:
    before = bench.run()
    shutil.rmtree(bench.folder / "runs")
    bench.asked.clear()
    assert bench.run() == before
    assert bench.asked == []
    (bench.folder / "model" / "model.safetensors").write_bytes(b"other weights")
    tasks._digest.cache_clear()
    bench.run()
    assert bench.asked


def test_a_wider_grid_runs_what_is_new_and_drops_rows_of_the_rate_that_lost(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BEST, "fedit", 3e-2)
    ladder = tasks.LADDER
    monkeypatch.setattr(tasks, "LADDER", tasks.GRID)
    bench.run()
    shutil.rmtree(bench.folder / "runs")
    bench.asked.clear()
    monkeypatch.setattr(tasks, "LADDER", ladder[:-1])
    monkeypatch.setattr(tasks, "GRID", (*tasks.GRID, "3e-2"))
    rows = bench.run()["rows"]
    assert {(rate, seed) for method, rate, seed in bench.asked if method == "fedit"} == {(3e-2, s) for s in range(3)}
    assert {rate for method, rate, _ in bench.asked if method in {"local", "celora"}} == {3e-2}
    assert [row["lr"] for row in rows if row["variant"] == "fedit"] == [3e-2] * 3


def test_methods_and_results_of_other_sittings_stay(bench: SimpleNamespace) -> None:
    bench.run("--methods", "fedit")
    file = bench.results / "tasks.json"
    held = json.loads(file.read_text())
    held["tasks"]["gone"] = {"made_of": "x"}
    file.write_text(json.dumps({**held, "checkpoints": {"other": {"steps": 1}}}))
    document = bench.run("--methods", "celora")
    assert document["checkpoints"] == {"other": {"steps": 1}}
    assert list(document["tasks"]) == ["few"]  # what is listed no more is shown no more
    assert {row["variant"] for row in document["rows"]} == {tasks.UNTRAINED, "fedit", "celora"}


def test_one_method_that_fails_does_not_stop_the_others(bench: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    bench.fails = {"fedit"}
    document = bench.run()
    assert bench.status == 1
    assert {row["variant"] for row in document["rows"]} == {tasks.UNTRAINED, "local", "celora"}
    assert "few: fedit, lr 1e-3, seed 0: RuntimeError: broken" in capsys.readouterr().err


def test_the_list_runs_and_writes_nothing(bench: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    assert bench.run("--list") == {}
    assert not bench.asked
    assert "left: few: celora, lr 1e-2, seed 0" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(bench: SimpleNamespace) -> None:
    (bench.folder / "model" / "model.safetensors").unlink()
    bench.run()
    assert "model.safetensors" in bench.status
    assert "make models" in bench.status


def test_the_table_marks_the_lowest_loss(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run()
    monkeypatch.setattr(table_parts, "RESULTS", bench.results)
    lines = task_tables.task("few")().splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1] for line in lines[2:]}
    assert cells["celora"] == "**1.010 ± 0.010**"
    assert cells["fedit"] == "1.510 ± 0.010"
    assert cells["*checkpoint as it is*"] == "7.010 ± 0.010"
    assert "Partial" not in lines[-1]
