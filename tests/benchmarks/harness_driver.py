"""Processes of `accuracy.py` whose runs cost nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import accuracy
from settings import settings

from folklora.recipe import Recipe

ROW = {"accuracy_mean": 0.5, "validation_mean": 0.5, "seconds_total": 2.0, "rounds": 5}


def leave(recipe: Recipe, path: Path) -> dict[str, Any]:
    """What a finished run leaves on disk."""
    path.mkdir(parents=True, exist_ok=True)
    row = {**ROW, "method": recipe.method.name, "seed": recipe.seed}
    line = {"bytes_up": 30, "bytes_down": 10, "validation": {"mean": 0.25}}
    (path / "recipe.toml").write_text(recipe.to_toml())
    (path / "partition.json").write_text(json.dumps({"clients": {"0": {}, "1": {}}}))
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "validation": None}) + "\n")
    (path / "summary.json").write_text(json.dumps({"row": row}))
    return row


def bench(runs: Path, results: Path) -> accuracy.Bench:
    """Over Banking77 alone, with a rate for every method."""
    results.mkdir(parents=True, exist_ok=True)
    tuned = dict.fromkeys((*accuracy.PLAIN, *accuracy.OPTIONS), "1e-2")
    made = {"seed": accuracy.TUNING_SEED, "examples": accuracy.TUNING_EXAMPLES}
    tuning = {**made, "settings": list(accuracy.TUNING_SETTINGS), "validation": {}, "chosen": tuned}
    if not (results / "tuning.json").exists():
        (results / "tuning.json").write_text(json.dumps(tuning))
    return accuracy.Bench(runs, results, settings(runs / "no-data", runs))


def process(folder: Path, seconds: float = 0.0, hang: str = "") -> None:
    """One of several over ``folder``: every run takes ``seconds`` and is logged when it is done.

    From a run of the method ``hang`` the process never comes back.
    """

    def perform(recipe: Recipe, path: Path) -> dict[str, Any]:
        if recipe.method.name == hang:
            (folder / "hanging").touch()
            time.sleep(600)
        time.sleep(seconds)
        row = leave(recipe, path)
        with (folder / "log").open("a") as file:
            file.write(f"{os.getpid()} {path.name}\n")
        return row

    accuracy.perform = perform
    made = bench(folder / "runs", folder / "results")
    cells = accuracy.filtered(accuracy.plan(made.found, {}), "banking77 dirichlet 0.5; methods", "0", "")
    assert not accuracy.work(made, cells, accuracy.Pace([]))
