"""What `inspect` forecasts, against what a run counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folklora.federation.inspect import inspect
from folklora.federation.run import run

RANKS = "adapter.rank=[2,6,3,3]"
RECIPES = {
    "nothing travels": ["method.name=local"],
    "class statistics": ["method.name=sketch"],
    "everything travels": ["method.name=fedit", "adapter.norm=true"],
    "factors alternate": ["method.name=rolora"],
    "cores of unequal rank, mixtures": ["method.name=celora", RANKS],
    "mixtures in a projection": ["method.name=celora", "method.components=2", "method.projection=5"],
    "statistics for two ends": ["method.name=folklora", "method.similarity=data", RANKS],
    "gradients and a head": ["method.name=fedsb", "method.head_start=sketched"],
    "a coarse copy": ["method.name=fedlpp", "method.head=shared", "method.head_start=sketched"],
    "other budgets": ["method.name=ravan", "method.heads=3", "method.budget=[1,3,2,1]"],
    "stacks of factors": ["method.name=flora", RANKS],
    "bits by importance": ["method.name=haflq", RANKS],
    "control variates": ["method.name=fedit", "method.scaffold=true", "train.optimizer=sgd"],
    "few bits": ["method.name=folklora", "message.dtype=int8", "message.top_k=0.5", RANKS],
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_traffic_is_what_the_run_counts(tiny_recipe: Callable[..., Any], tmp_path: Path, recipe: list[str]) -> None:
    made = tiny_recipe("train.rounds=3", "train.evaluate_every=2", *recipe)
    said, row = inspect(made)["method"], run(made, tmp_path / "run")["row"]
    assert said["rounds"] == row["rounds"]
    for key in ("bytes_up_per_client_round", "bytes_down_per_client_round", "bytes_once_per_client"):
        assert said[key] == pytest.approx(row[key], rel=1e-12), key
