"""What `poison.py` runs and keeps, with runs that only write down what they were asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import poison
import pytest
import safetensors.torch
import torch

from folklora.recipe import Recipe


class Bench:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[Recipe] = []
        self.fails: set[str] = set()
        self.patch = monkeypatch
        monkeypatch.setattr(poison, "perform", self.perform)

    def perform(self, recipe: Recipe, path: Path) -> None:
        if recipe.robust.rule in self.fails:
            raise RuntimeError("broken")
        self.asked.append(recipe)
        clients = {str(i): {} for i in range(10)}
        liars = list(clients)[: round(10 * recipe.poison.share)]
        told: dict[str, Any] = {"clients": liars, "honest": {"accuracy_mean": 0.5, "accuracy_worst": 0.4}}
        if recipe.poison.kind == "backdoor":
            told["backdoor"] = {"success": 0.9, "control": 0.1}
        path.mkdir(parents=True)
        summary = {"row": {"rounds": 5, "seconds_total": 1.0}, "clients": clients, "poison": told}
        (path / "summary.json").write_text(json.dumps(summary))
        if recipe.method.name == "celora":  # every honest client gives liars half of their share
            weights = torch.zeros(10, 10)
            weights[:, : len(liars)] = 0.05
            safetensors.torch.save_file({"weights": weights}, path / "insight.safetensors")

    def run(self, *given: str) -> tuple[int, dict[str, Any]]:
        base = ["poison.py", "--runs", str(self.folder / "runs"), "--results", str(self.folder), "--threads", "1"]
        self.patch.setattr(sys, "argv", [*base, "--variants", "fedit,fedit:robust.rule=krum,celora", *given])
        with pytest.raises(SystemExit) as left:
            poison.main()
        file = self.folder / "poison.json"
        return int(left.value.code or 0), json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_every_attack_share_and_seed_runs_once_and_honest_runs_are_shared(bench: Bench) -> None:
    status, document = bench.run("--shares", "0,0.2", "--seeds", "2")
    assert status == 0
    assert len(bench.asked) == len(document["rows"]) == 2 * 3 * (1 + 4)
    assert {(r.poison.kind, r.poison.share) for r in bench.asked if not r.poison.share} == {("backdoor", 0.0)}
    for recipe in bench.asked:
        assert recipe.poison.scale == poison.ATTACKS[recipe.poison.kind]
        assert recipe.robust.byzantine == 0.3
    told = {(row["variant"], row["attack"], row["share"]): row for row in document["rows"]}
    assert told["celora", "sign", 0.2]["weight_of_liars"] == pytest.approx(0.5)
    assert told["fedit", "backdoor", 0.2]["backdoor"] == 0.9
    assert told["fedit", "none", 0.0]["weight_of_liars"] is None
    bench.run("--shares", "0,0.2", "--seeds", "2")
    assert len(bench.asked) == 30


def test_what_fails_is_told_and_the_rest_goes_on(bench: Bench) -> None:
    bench.fails = {"krum"}
    status, document = bench.run("--shares", "0.1", "--attacks", "sign", "--seeds", "1")
    assert status == 1
    assert [row["variant"] for row in document["rows"]] == ["celora", "fedit"]
    bench.fails = set()
    status, document = bench.run("--shares", "0.3", "--attacks", "noise", "--seeds", "1")
    assert status == 0
    assert len(document["rows"]) == 5  # rows that were not asked for now stay


def test_every_default_variant_is_one_that_a_recipe_allows() -> None:
    for cell in poison.plan(poison.VARIANTS, list(poison.ATTACKS), poison.SHARES, 1):
        recipe = cell.recipe(())
        assert (recipe.poison.kind, recipe.poison.share) == (cell.attack, cell.share)
