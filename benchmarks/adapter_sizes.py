"""Does a Performance Law predict the larger adapter? Rank by adapted layers by share of the data, on Banking77.

    python benchmarks/adapter_sizes.py --runs runs/adapter_sizes
    python benchmarks/adapter_sizes.py --seed 0,1
    python benchmarks/adapter_sizes.py --list                  # what is done and what is left
    python benchmarks/adapter_sizes.py --collect               # only rewrite the results from the runs

Rank in 1, 2, 4, 8, the topmost 1, 2, 3 or 6 layers of MiniLM, a quarter, half and all of each client's training
examples: runs of `folklora run` as `folklora plan` would begin them. Twenty of the classes and two clients, so that a
run takes seconds: with all classes and few steps every size is as bad. The laws are fitted in `law.py`, to validation
scores, from ``results/adapter_sizes.json``. Any number of processes can share ``--runs``: kill them at any time.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import environment, finish
from resumable import Row, Store, arguments, perform, work

from folklora.data.sources import load
from folklora.federation.run import read_summary
from folklora.federation.rundir import RunDirectory
from folklora.planning.axes import Axes, Cell, recipe_of
from folklora.recipe import Recipe
from folklora.sections import DataSection

AXES = Axes(layers=(1, 2, 3, 6), rank=(1, 2, 4, 8), data=(0.25, 0.5, 1.0))
SEEDS = 3
CLASSES = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"limit": 800, "clients": 2, "partition": "iid", "validation": 0.4, "test_fraction": 0.1},
    "method": {"name": "fedit"},
    "train": {"rounds": 4, "batch_size": 8, "lr": 5e-3, "evaluate_every": 4},
}


def recipe(runs: Path) -> Recipe:
    """Of all cells; the rows of the first classes, by name, are put into a file beside the runs."""
    path = runs / "banking20.csv"
    if not path.exists():
        table, _ = load(DataSection(), 0, "text")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            rows = zip(table.inputs, table.labels, strict=True)
            writer.writerows([text, table.classes[label]] for text, label in rows if label < CLASSES)
        temporary.replace(path)
    return Recipe.parse({**SETTINGS, "data": {**SETTINGS["data"], "source": str(path)}})


@dataclass(frozen=True)
class Run:
    """One combination with one seed."""

    cell: Cell
    seed: int

    @property
    def label(self) -> str:
        return f"{self.cell.label}-s{self.seed}"


@dataclass
class Grid:
    """Where runs and results lie, and which seeds are asked for."""

    store: Store
    seeds: Sequence[int]

    def plan(self) -> Iterator[Run]:
        """One seed of everything before the next, the small ones first."""
        for seed in self.seeds:
            for cell in sorted(AXES.cells(), key=lambda cell: (cell.data * (1 + cell.layers), cell.rank)):
                yield Run(cell, seed)

    def folder(self, run: Run) -> Path:
        return self.store.runs / run.label

    def finished(self, run: Run) -> Row | None:
        if not (self.folder(run) / "summary.json").exists():
            return None
        found = read_summary(RunDirectory.open(self.folder(run)))
        row, results = found["row"], found["clients"]
        return {
            "layers": run.cell.layers,
            "rank": run.cell.rank,
            "data": run.cell.data,
            "seed": run.seed,
            "train_examples": sum(each["examples"]["train"] for each in results.values()),
            "validation": row["validation_mean"],
            "test": row[f"{row['metric']}_mean"],
            "bytes_up_per_client_round": row["bytes_up_per_client_round"],
        }

    def left(self) -> list[Run]:
        return [run for run in self.plan() if self.finished(run) is None]

    def run_one(self, run: Run, path: Path) -> str:
        row = perform(recipe_of(run.cell, recipe(self.store.runs), run.seed), path)
        return f"validation {100 * row['validation_mean']:.1f}"

    def collect(self) -> None:
        """Rewrite ``adapter_sizes.json`` from the runs on disk; rows of seeds not asked for now stay."""
        with self.store.locked():
            before = self.store.load("adapter_sizes")
            rows = {_key(row): row for row in before.get("rows", [])}
            rows |= {_key(row): row for run in self.plan() if (row := self.finished(run)) is not None}
            document = {
                "environment": environment(torch.device("cpu"), torch.float32),
                "recipe": SETTINGS,
                "rows": [rows[key] for key in sorted(rows)],
            }
            self.store.write("adapter_sizes", document)


def _key(row: Mapping[str, Any]) -> tuple[int, float, int, int]:
    return row["seed"], row["data"], row["layers"], row["rank"]


def main() -> None:
    parser = arguments(__doc__, "adapter_sizes")
    parser.add_argument("--seed", default="", help="only these seeds, with commas")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runs = given.runs.resolve()
    seeds = [int(text) for text in given.seed.split(",") if text] or list(range(SEEDS))
    grid = Grid(Store(runs, given.results), seeds)
    failed: dict[str, str] = {}
    if not (given.list or given.collect):
        failed = work(grid.left, grid.folder, grid.run_one, grid.collect, runs)
    if not given.list:
        grid.collect()
    finish("adapter_sizes", [run.label for run in grid.left()], failed, listed=given.list)


if __name__ == "__main__":
    main()
