"""Does a Performance Law predict the larger model? Sequential recommendation by layers, width and share of the data.

    python benchmarks/sequential.py --data ../shared/data --runs runs/sequential
    python benchmarks/sequential.py --seed 0 --only markov
    python benchmarks/sequential.py --list                     # what is done and what is left
    python benchmarks/sequential.py --collect                  # only rewrite the results from the runs

A SASRec-style model (`sasrec.py`) on badges of Stack Overflow and on a chain of known entropy (`sequences.py`):
N in 1, 2, 4, 8 layers, d in 16, 32, 64, 128, a quarter, half and all of the training users. Beside them, for one size
of model, chains with more chance in them and so another entropy. Every cell takes the same
number of steps, so what a share changes is how much there is to learn from and not how long. Validation chooses the
step; test is read once a cell. The laws are fitted in `law.py`, from ``results/sequential.json``. Any number of
processes can share ``--runs``: kill them at any time, what is finished is reused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _common import environment, finish
from resumable import Row, Store, arguments, keep, kept, work
from sasrec import Training, scores, train
from sequences import PADDING, Sequences, badges, markov

LAYERS = (1, 2, 4, 8)
WIDTHS = (16, 32, 64, 128)
SHARES = (0.25, 0.5, 1.0)
SETTINGS = ("badges", "markov")
CHANCES = {f"markov, chance {chance:g}": chance for chance in (0.25, 0.4, 0.55, 0.7, 0.85)}
"""Chains of other entropies, for one size of model: does D' take entropy as it should?"""
ONE = (2, 32)
SEEDS = 3


@dataclass(frozen=True)
class Cell:
    """One model."""

    setting: str
    layers: int
    width: int
    share: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.setting}; {self.layers} layers; width {self.width}; {self.share:g} of the data; seed {self.seed}"

    def folder(self, runs: Path) -> Path:
        return (
            runs
            / self.setting.replace(", chance ", "-")
            / f"N{self.layers}-d{self.width}-D{round(100 * self.share)}-seed{self.seed}"
        )

    @property
    def cost(self) -> float:
        """Roughly, in relation to others."""
        return self.layers * self.width**1.5


@cache
def sequences_of(setting: str, data: Path) -> Sequences:
    if setting == "badges":
        return badges(data / "so_badges" / "sequences.tsv")
    return markov(CHANCES[setting]) if setting in CHANCES else markov()


def play(cell: Cell, data: Path, given: Training) -> Row:
    """Train one model and read the test users once."""
    found = sequences_of(cell.setting, data)
    started = time.process_time()
    model, validation, step = train(found, cell.share, cell.layers, cell.width, cell.seed, given)
    seconds = time.process_time() - started
    part = found.part(cell.share, cell.seed)
    return {
        "setting": cell.setting,
        "layers": cell.layers,
        "width": cell.width,
        "share": cell.share,
        "seed": cell.seed,
        "users": len(part),
        "tokens": int((part != PADDING).sum()),
        "parameters": sum(each.numel() for each in model.parameters()),
        "step": step,
        "validation": {key: round(value, 6) for key, value in validation.items()},
        "test": {key: round(value, 6) for key, value in scores(model, found.test).items()},
        "cpu_seconds": round(seconds, 1),
    }


@dataclass
class Grid:
    """Where runs and results lie, and what is asked for."""

    store: Store
    data: Path
    settings: Sequence[str]
    seeds: Sequence[int]
    given: Training

    def plan(self) -> Iterator[Cell]:
        """One seed of everything before the next, the small models first."""
        for seed in self.seeds:
            whole = [each for each in self.settings if each in SETTINGS]
            cells = [Cell(*sizes, seed) for sizes in product(whole, LAYERS, WIDTHS, SHARES)]
            cells += [Cell(each, *ONE, part, seed) for each in self.settings if each in CHANCES for part in SHARES]
            yield from sorted(cells, key=lambda cell: (cell.cost, cell.share, cell.setting))

    def finished(self, cell: Cell) -> Row | None:
        return kept(cell.folder(self.store.runs))

    def left(self) -> list[Cell]:
        return [cell for cell in self.plan() if self.finished(cell) is None]

    def run_one(self, cell: Cell, path: Path) -> str:
        row = play(cell, self.data, self.given)
        keep(path, row)
        return ", ".join(f"{key} {value:.4f}" for key, value in row["validation"].items())

    def collect(self) -> None:
        """Rewrite ``sequential.json`` from the cells on disk; rows of settings and seeds not asked for now stay."""
        with self.store.locked():
            before = self.store.load("sequential")
            rows = {_key(row): row for row in before.get("rows", [])}
            rows |= {_key(row): row for cell in self.plan() if (row := self.finished(cell)) is not None}
            document = {
                "environment": environment(torch.device("cpu"), torch.float32),
                "training": asdict(self.given),
                "rows": [rows[key] for key in sorted(rows)],
            }
            self.store.write("sequential", document)


def _key(row: Mapping[str, Any]) -> tuple[str, int, float, int, int]:
    return row["setting"], row["seed"], row["share"], row["layers"], row["width"]


def main() -> None:
    parser = arguments(__doc__, "sequential", threads=1)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds so_badges/")
    parser.add_argument("--only", default="", help="settings whose name holds one of these, with commas")
    parser.add_argument("--seed", default="", help="only these seeds, with commas")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runs, data = given.runs.resolve(), given.data.resolve()
    wanted = [each for each in (*SETTINGS, *CHANCES) if any(text in each for text in given.only.split(","))]
    chosen = [each for each in wanted if each != "badges" or (data / "so_badges" / "sequences.tsv").exists()]
    seeds = [int(text) for text in given.seed.split(",") if text] or list(range(SEEDS))
    grid = Grid(Store(runs, given.results), data, chosen, seeds, Training())
    failed: dict[str, str] = {}
    if not (given.list or given.collect):
        failed = work(grid.left, lambda cell: cell.folder(runs), grid.run_one, grid.collect, runs)
    if not given.list:
        grid.collect()
    finish("sequential", [cell.label for cell in grid.left()], failed, listed=given.list)


if __name__ == "__main__":
    main()
