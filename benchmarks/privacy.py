"""What messages leak, and what defences cost: `folklora attack` and private runs, by method, batch, rank and steps.

    python benchmarks/privacy.py                                # --runs runs/privacy; pictures after `make models`
    python benchmarks/privacy.py --only "span,membership" --seed 0
    python benchmarks/privacy.py --list                         # what is done and what is left
    python benchmarks/privacy.py --collect                      # only rewrite the results from the runs

What is measured stands in `privacy_cells.py`. As in `accuracy.py` any number of processes can share ``--runs``: kill
them at any time, what is finished is reused and what was begun goes on. The most telling cells come first, so a partial
page is worth reading; rows whose runs are gone stay as they were collected. Victims, batches and compute of an attack
are the same for every method.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import environment, finish
from privacy_cells import Attacked, Cell, Defended, cells
from resumable import Store, arguments, perform, work

from folklora.privacy.attacks.run import attack

SHOWN = 2
"""Victims of each attack whose texts or pictures are kept for the page."""


@dataclass
class Privacy:
    """Where runs and results lie; what has been read of them."""

    bench: Store  # its files, and the lock on them
    cells: list[Cell]
    again: Sequence[str] = ()  # cells whose label holds one of these are measured anew, whatever is held of them
    read: dict[Path, dict[str, Any]] = field(default_factory=dict)
    held: dict[str, dict[str, Any]] = field(init=False)

    def path(self, cell: Cell) -> Path:
        return self.bench.runs / cell.place

    def __post_init__(self) -> None:
        self._load()

    def _load(self) -> dict[str, Any]:
        """What was collected before, by cell: runs are not kept for ever."""
        before = self.bench.load("privacy")
        rows = [*before.get("retired", []), *before.get("rows", [])]
        self.held = {row["cell"]: row for row in rows if "cell" in row}
        return before

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """What the page shows of a cell: from its files, or as it was collected of the same recipe; None until it is
        finished."""
        path = self.path(cell)
        if path not in self.read:
            file = path / ("result.json" if isinstance(cell, Attacked) else "summary.json")
            if not file.exists():
                held = self.held.get(cell.place)
                fits = held is not None and held.get("recipe") == cell.made_of
                return held if fits and not any(text in cell.label for text in self.again) else None
            document = json.loads(file.read_text(encoding="utf-8"))
            found = document if isinstance(cell, Attacked) else _row(document, path)
            self.read[path] = {**cell.told(), **_short(cell, found), "cell": cell.place, "recipe": cell.made_of}
        return self.read[path]

    def left(self) -> list[Cell]:
        return [cell for cell in self.cells if self.row(cell) is None]

    def collect(self) -> None:
        """Rewrite ``privacy.json`` from the runs on disk and what it held before.

        Rows of what is not planned any more stay as ``retired``, in no table; ``environment`` is that of the latest
        row that was measured.
        """
        with self.bench.locked():
            before = self._load()
            rows = [row for cell in self.cells if (row := self.row(cell)) is not None]
            kept = {row["cell"] for row in rows}
            retired = [row for place, row in self.held.items() if place not in kept]
            where = environment(torch.device("cpu"), torch.float32) if self.read else before.get("environment")
            planned = {
                part: sum(c.part == part for c in self.cells) for part in dict.fromkeys(c.part for c in self.cells)
            }
            document = {"environment": where, "planned": planned, "retired": retired, "rows": rows}
            self.bench.write("privacy", document)


def _row(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's row, with what it spent."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    spent = [line["privacy"] for line in lines if line.get("privacy")]
    return {**summary["row"], "privacy": spent[-1] if spent else None}


def _short(cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    if isinstance(cell, Defended):
        return {"row": found}
    kept = {key: found[key] for key in ("knowledge", "bytes", "seconds", "unmatched")}
    metrics = {
        name: {key: m[key] for key in ("mean", "control", "gain", "higher") if key in m}
        for name, m in found["metrics"].items()
    }
    return {**kept, "metrics": metrics, "victims": found["victims"][: SHOWN if cell.gallery else 0]}


def run_one(cell: Cell, path: Path) -> str:
    if isinstance(cell, Defended):
        perform(cell.recipe, path)
        return ""
    document = attack(cell.recipe, cell.plan)
    path.mkdir(parents=True, exist_ok=True)
    part = path / f".{os.getpid()}.part"
    part.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    part.replace(path / "result.json")
    return ""


def _chosen(found: Iterator[Cell], only: list[str], seeds: list[int]) -> list[Cell]:
    return [
        cell
        for cell in found
        if (not only or any(text in cell.label for text in only)) and (not seeds or cell.seed in seeds)
    ]


def main() -> None:
    parser = arguments(__doc__, "privacy")
    parser.add_argument("--again", default="", help="measure anew what is held of these, as --only names them")
    parser.add_argument("--only", default="", help="cells whose label holds one of these, with commas")
    parser.add_argument("--seed", default="", help="only these seeds, with commas")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bench = Store(given.runs.resolve(), given.results)
    every = list(cells())
    only, seeds, again = ([t for t in text.split(",") if t] for text in (given.only, given.seed, given.again))
    failed: dict[str, str] = {}
    if not (given.list or given.collect):
        chosen = Privacy(bench, _chosen(iter(every), only, [int(seed) for seed in seeds]), again)
        failed = work(chosen.left, chosen.path, run_one, Privacy(bench, every).collect, bench.runs)
    privacy = Privacy(bench, every)
    if not given.list:
        privacy.collect()
    left = privacy.left()
    finish("privacy", [cell.label for cell in left], failed, listed=given.list)


if __name__ == "__main__":
    main()
