"""What `privacy.py` runs and keeps, and what its tables and pictures make of it, with attacks that only take notes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import privacy
import privacy_cells
import privacy_figures
import privacy_tables
import pytest
import table_parts

from folklora.errors import AttackError
from folklora.methods import METHODS
from folklora.privacy.attacks import ATTACKS
from folklora.privacy.attacks.run import Plan
from folklora.recipe import Recipe

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`told`: the share of tokens that an attack on a batch finds; `fails`: attacks that cannot be."""
    found = SimpleNamespace(attacked=[], ran=[], fails=set(), results=tmp_path / "results", told=lambda p: 1 / p.batch)

    def attack(recipe: Recipe, plan: Plan) -> dict[str, Any]:
        if plan.attack in found.fails:
            raise AttackError("it cannot be")
        found.attacked.append((plan.attack, plan.method, plan.batch, recipe.seed))
        one = {"mean": found.told(plan), "control": 0.0, "gain": found.told(plan), "higher": True, "values": [1.0]}
        names = (
            "token_recall",
            "rouge_l",
            "exact_match",
            "mse",
            "psnr",
            "ssim",
            "perceptual",
            "hit",
            "auc_pooled_loss",
        )
        victim = {"client": "3", "original": [PIXEL], "recovered": [PIXEL], "control": [PIXEL]}
        document = {"metrics": dict.fromkeys(names, one), "victims": [victim] * 4, "knowledge": {}}
        return {**document, "bytes": 10, "seconds": 1.0, "unmatched": []}

    def perform(recipe: Recipe, path: Path) -> dict[str, Any]:
        found.ran.append((recipe.method.name, recipe.privacy.epsilon, recipe.seed))
        path.mkdir(parents=True)
        row = {"accuracy_mean": 0.5 if recipe.privacy.epsilon else 0.8, "seed": recipe.seed}
        (path / "summary.json").write_text(json.dumps({"row": row}))
        spent = (
            {"unit": "example", "epsilon": recipe.privacy.epsilon, "delta": 1e-5} if recipe.privacy.epsilon else None
        )
        (path / "metrics.jsonl").write_text(json.dumps({"round": 1, "privacy": spent}) + "\n")
        return row

    def run(*given: str) -> dict[str, Any]:
        base = ["privacy.py", "--runs", str(tmp_path / "runs"), "--results", str(found.results), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*base, *given])
        with pytest.raises(SystemExit) as left:
            privacy.main()
        found.status = left.value.code
        return json.loads((found.results / "privacy.json").read_text())

    found.run = run
    monkeypatch.setattr(privacy, "attack", attack)
    monkeypatch.setattr(privacy, "perform", perform)
    monkeypatch.setattr(table_parts, "RESULTS", found.results)
    return found


def test_every_cell_is_another_one_and_can_be() -> None:
    cells = list(privacy_cells.cells())
    assert len({(cell.part, cell.name) for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.method.partition(":")[0] in METHODS
        if isinstance(cell, privacy_cells.Attacked):
            assert cell.plan.attack in ATTACKS
    assert {cell.seed for cell in cells} == set(privacy_cells.SEEDS)
    from folklora.methods import check_options

    for entry in {cell.method for cell in cells if cell.setting == "banking77"}:
        recipe = privacy_cells.Defended("", "banking77", entry, 0).recipe
        check_options(recipe.method.name, recipe.method.options)


def test_what_is_done_is_not_done_again_and_what_fails_is_told(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.fails = {"mixture"}
    bench.run("--only", "span by rank,once,epsilon;", "--seed", "0")
    assert bench.status == 1
    assert "it cannot be" in capsys.readouterr().err
    first = (list(bench.attacked), list(bench.ran))
    assert first[0]
    assert first[1]
    bench.fails = set()
    document = bench.run("--only", "span by rank,once,epsilon;", "--seed", "0")
    assert bench.status == 0
    assert {name for name, *_ in bench.attacked[len(first[0]) :]} == {"mixture"}
    assert bench.ran == first[1]
    epsilons = {row["row"]["privacy"]["epsilon"] for row in document["rows"] if row.get("row", {}).get("privacy")}
    assert epsilons == set(privacy_cells.EPSILONS)


def test_rows_whose_runs_are_gone_stay_and_are_not_measured_again(bench: SimpleNamespace, tmp_path: Path) -> None:
    before = bench.run("--only", "once,utility; banking77", "--seed", "0")
    shutil.rmtree(tmp_path / "runs")
    bench.attacked.clear()
    bench.ran.clear()
    after = bench.run("--only", "once,utility; banking77", "--seed", "0,1")
    assert {seed for *_, seed in (*bench.attacked, *bench.ran)} == {1}
    assert [row for row in after["rows"] if row["seed"] == 0] == before["rows"]
    assert len(after["rows"]) == 2 * len(before["rows"])


def test_rows_of_another_plan_retire_and_come_back(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench.run("--only", "utility; banking77", "--seed", "0")["rows"]
    shutil.rmtree(tmp_path / "runs")
    shorter = {**privacy_cells.SETTINGS, "banking77": ("banking77.toml", ("data.limit=500",))}
    with monkeypatch.context() as other:
        other.setattr(privacy_cells, "SETTINGS", shorter)
        document = bench.run("--collect")
        assert document["rows"] == []
        assert document["retired"] == rows
    document = bench.run("--collect")
    assert document["rows"] == rows
    assert document["retired"] == []


def test_rows_of_another_recipe_are_measured_again(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run("--only", "utility; banking77", "--seed", "0")
    shutil.rmtree(tmp_path / "runs")
    recipes = tmp_path / "recipes"
    shutil.copytree(privacy_cells.RECIPES, recipes)
    text = (recipes / "banking77.toml").read_text()
    (recipes / "banking77.toml").write_text(text.replace("rank = 8", "rank = 4"))
    monkeypatch.setattr(privacy_cells, "RECIPES", recipes)
    bench.ran.clear()
    bench.run("--only", "utility; banking77", "--seed", "0")
    assert len(bench.ran) == len(privacy_cells.METHODS)


def test_what_is_asked_for_again_is_measured_again(bench: SimpleNamespace, tmp_path: Path) -> None:
    bench.run("--only", "span by rank,once", "--seed", "0")
    shutil.rmtree(tmp_path / "runs")
    bench.attacked.clear()
    bench.run("--only", "span by rank,once", "--seed", "0", "--again", "mixture on")
    assert {name for name, *_ in bench.attacked} == {"mixture"}


def test_results_of_other_times_are_no_obstacle(bench: SimpleNamespace) -> None:
    bench.results.mkdir()
    (bench.results / "privacy.json").write_text(json.dumps({"rows": [{"part": "span", "seed": 0}]}))
    bench.run("--only", "once", "--seed", "0")
    assert bench.status == 0


def test_a_curve_with_a_gap_keeps_its_places(bench: SimpleNamespace) -> None:
    document = bench.run("--only", "local steps", "--seed", "0")
    rows = [row for row in document["rows"] if (row["variant"], row["steps"]) != ("fedit", 1)]
    (bench.results / "privacy.json").write_text(json.dumps({**document, "rows": rows}))
    figure = privacy_figures.steps()
    assert figure is not None
    lines = {line.get_label(): line.get_xdata() for line in figure.axes[0].get_lines()}
    assert list(lines["fedit"]) == [2, 4, 8]


def test_tables_and_pictures_are_what_was_measured(bench: SimpleNamespace) -> None:
    bench.run("--seed", "0")
    lines = privacy_tables.TABLES["privacy-ranks"][1]().splitlines()
    assert "| celora `rank=8` `alpha=16` | 100 (0) | 50 (0) | 25 (0) |" in lines
    span = privacy_tables.TABLES["privacy-span"][1]()
    assert "exact gradient, its own factors known, batch 4" in span
    assert "20 victims" not in span
    assert "4 victims for each number" in span
    epsilon = privacy_tables.TABLES["privacy-epsilon"][1]().splitlines()
    assert epsilon[0].startswith("| method | no noise | epsilon 8 | epsilon 3 | epsilon 1 | tokens told at epsilon 8")
    assert epsilon[2].startswith("| fedit | 80.0 | 50.0 | 50.0 | 50.0 | 100 (0)")
    heads = privacy_tables.TABLES["privacy-heads"][1]().splitlines()
    assert "| 64 | 8 | 4 x 4 | 100 (0) | 50 (0) | 25 (0) | 100 (0) | 50 (0) | 25 (0) |" in heads
    every = privacy_tables.TABLES["privacy-methods"][1]().splitlines()
    assert "| fedit | 100 (0) | 100 (0) | - | 80.0 |" in every
    assert "| ravan | 100 (0) | 100 (0) | - | 80.0 |" in every
    for name, (_, table) in privacy_tables.TABLES.items():
        assert "|" in table(), name
    for name, draw in privacy_figures.PICTURES.items():
        assert draw() is not None, name


def test_sentences_are_quoted_so_that_a_table_holds_them() -> None:
    assert privacy_tables._quoted(["a | b\n<c>"], 40) == "a \\| b &lt;c>"
    assert privacy_tables._quoted(["x" * 50], 40) == "x" * 39 + "…"
    assert privacy_tables._quoted([""], 40) == privacy_tables._quoted([], 40) == "*nothing*"


def test_several_seeds_show_their_spread() -> None:
    rows = [{"metrics": {"found": {"mean": mean, "control": control}}} for mean, control in ((0.5, 0.0), (1.0, 0.1))]
    assert privacy_tables.share(rows, "found") == "75 ± 35 (5)"
    assert privacy_tables.measured(rows, "found", 2) == "0.75 ± 0.35 (0.05)"
    assert privacy_tables.share(rows[:1], "found") == "50 (0)"
    assert privacy_tables.share(rows, "other") == "-"


def test_nothing_measured_is_said(bench: SimpleNamespace) -> None:
    assert all(table_parts.NOT_RUN in table() for _, table in privacy_tables.TABLES.values())
    assert all(draw() is None for draw in privacy_figures.PICTURES.values())
