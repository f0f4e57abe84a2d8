"""Runs of the tiny recipe, and what of a run directory must not depend on how it came to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from folklora.data.partition import to_json
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Progress, Rounds, Silent
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup, prepare
from folklora.recipe import Recipe


@dataclass
class Played:
    """A run that was played in this process, with everything it consists of."""

    setup: Setup
    directory: RunDirectory
    engine: LocalEngine
    rounds: Rounds
    summary: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        return without_seconds(self.summary["row"])

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [without_seconds(line) for line in self.directory.metrics()]


def without_seconds(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if not name.startswith("seconds")}


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Played]:
    """``play(recipe, engine)`` -> the run played to its end in a directory of its own, by an engine made of a setup."""
    count = iter(range(1000))

    def make(
        recipe: Recipe,
        engine: Callable[[Setup], LocalEngine] = LocalEngine,
        *,
        clients: Callable[[list[str]], list[str]] = list,
        progress: Progress | None = None,
    ) -> Played:
        setup = prepare(recipe)
        partition = to_json(setup.data.table, setup.data.splits)
        directory = RunDirectory.create(tmp_path / f"play-{next(count)}", recipe, partition)
        made = engine(setup)
        ids = clients(list(setup.data.splits))
        rounds = Rounds(recipe, directory, made, setup.method, ids, progress or Silent())
        return Played(setup, directory, made, rounds, rounds.play())

    return make


@pytest.fixture(scope="session")
def facts() -> Callable[[Path], dict[str, Any]]:
    """``facts(run)`` -> all a finished run says, but for seconds: two runs of one recipe must agree in every bit."""

    def read(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {
            file.relative_to(path).as_posix(): file.read_bytes()
            for folder in ("clients", "server")
            for file in sorted((path / folder).rglob("*"))
            if file.is_file()
        }
        for name in ("recipe.toml", "partition.json", "insight.safetensors"):
            if (path / name).exists():
                found[name] = (path / name).read_bytes()
        summary = json.loads((path / "summary.json").read_text())
        found["summary"] = {**summary, "row": without_seconds(summary["row"])}
        lines = (path / "metrics.jsonl").read_text().splitlines()
        found["metrics"] = [without_seconds(json.loads(line)) for line in lines]
        checkpoint = json.loads((path / "checkpoint.json").read_text())
        for name in ("sha256", "metrics_bytes"):  # they depend on how many digits seconds have
            del checkpoint[name]
        del checkpoint["digests"]["metrics.jsonl"]
        found["checkpoint"] = checkpoint
        return found

    return read
