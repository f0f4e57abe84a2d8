"""Mixtures of experts (FedAMoLE), and the same of cores, beside one adapter a client: accuracy and bytes.

    python benchmarks/experts.py --runs runs/experts
    python benchmarks/experts.py --only "dirichlet 0.1" --seed 0
    python benchmarks/experts.py --list                      # what is done and what is left
    python benchmarks/experts.py --collect                   # only rewrite the results from the runs

Banking77 as in the accuracy table, ten clients. The learning rate of every method is chosen from one grid, by the
validation splits of seed 0; the run that won is that seed's result, and the other seeds run at its rate. Test data is
read once, at the end of each run. Any number of processes can share ``--runs``: kill them at any time, what is finished
is reused and what was begun goes on. Who holds which experts in the end is read out of the runs themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, environment, finish
from resumable import Row, Store, arguments, perform, work
from settings import Setting, settings

from folklora.federation.run import run_name, variant
from folklora.federation.rundir import RunDirectory
from folklora.recipe import Recipe

SEEDS = 3
GRID = ("1e-3", "3e-3", "1e-2", "3e-2")
SETTINGS = ("banking77 dirichlet 0.5", "banking77 dirichlet 0.1")
METHODS = ("fedamole", "fedit", "fedamole:experts=cores", "celora", "folklora")
ABLATIONS = (
    "fedamole:assignment=random",
    "fedamole:assignment=static",
    "fedamole:head=sketched:head_start=auto",
    "fedit:adapter.rank=56:adapter.alpha=112",
)
"""Experts that choose nobody; FolkLoRA's head on a mixture; one adapter of as many factors as a client's experts."""


@dataclass(frozen=True)
class Cell:
    """One run: a variant, as `folklora compare --methods` takes it, at a learning rate and with a seed."""

    setting: Setting
    variant: str
    rate: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.setting.name}; {self.variant}, lr {self.rate}; seed {self.seed}"

    @property
    def entry(self) -> str:
        return f"{self.variant}:train.lr={self.rate}"

    def recipe(self) -> Recipe:
        return variant(self.setting.recipe(self.seed), self.entry, self.seed)

    def folder(self, runs: Path) -> Path:
        return runs / re.sub(r"[^\w.]+", "-", self.setting.name).strip("-") / run_name(self.entry, self.seed)


@dataclass
class Experts:
    """Where runs and results lie, and what is asked for."""

    store: Store
    found: Sequence[Setting]
    seeds: Sequence[int]
    named: Sequence[str] = (*METHODS, *ABLATIONS)

    def finished(self, cell: Cell) -> Row | None:
        path = cell.folder(self.store.runs) / "summary.json"
        return json.loads(path.read_text(encoding="utf-8"))["row"] if path.exists() else None

    def validation(self, setting: Setting, name: str) -> dict[str, float]:
        """Rate -> validation accuracy, of the runs of seed 0 that are done."""
        rows = {rate: self.finished(Cell(setting, name, rate, 0)) for rate in GRID}
        return {rate: row["validation_mean"] for rate, row in rows.items() if row is not None}

    def chosen(self, setting: Setting, name: str) -> str | None:
        found = self.validation(setting, name)
        return max(found, key=found.__getitem__) if len(found) == len(GRID) else None

    def plan(self) -> Iterator[Cell]:
        """The rates of seed 0 first, of the methods before the ablations; then the other seeds, where a rate is
        known."""
        for names in (METHODS, ABLATIONS):
            for seed in self.seeds:
                for name in (each for each in names if each in self.named):
                    for setting in self.found:
                        rate = self.chosen(setting, name)
                        rates = GRID if seed == 0 else (rate,) if rate else ()
                        yield from (Cell(setting, name, each, seed) for each in rates)

    def left(self) -> list[Cell]:
        return [cell for cell in self.plan() if self.finished(cell) is None]

    def collect(self) -> None:
        """Rewrite ``experts.json``; rows of settings and seeds not asked for now stay."""
        with self.store.locked():
            before = self.store.load("experts")
            rows: dict[tuple[Any, ...], Row] = {_key(row): row for row in before.get("rows", [])}
            rates: dict[str, Any] = dict(before.get("validation", {}))
            for setting in self.found:
                for name in self.named:
                    if merits := self.validation(setting, name):
                        rates.setdefault(setting.name, {})[name] = merits
                    rate = self.chosen(setting, name)
                    for seed in self.seeds if rate else ():
                        cell = Cell(setting, name, rate, seed)
                        if (row := self.finished(cell)) is not None:
                            told = {"setting": setting.name, "variant": name, "lr": float(rate)}
                            held = holdings(cell.folder(self.store.runs)) if name.startswith("fedamole") else {}
                            rows[setting.name, name, seed] = {**row, **told, **held}
            order = [(s, name, seed) for s in SETTINGS for name in (*METHODS, *ABLATIONS) for seed in range(SEEDS)]
            document = {"environment": environment(torch.device("cpu"), torch.float32), "grid": GRID, "seeds": SEEDS}
            kept = [rows[key] for key in order if key in rows]
            self.store.write("experts", {**document, "validation": rates, "rows": kept})


def _key(row: Row) -> tuple[Any, ...]:
    return row["setting"], row["variant"], row["seed"]


def holdings(path: Path) -> dict[str, Any]:
    """Who holds which experts of the last adapted layer at the end, how many of any layer, and who shares with whom.

    ``assigned`` has the clients of each expert, ``experts_held`` the fewest and the most of a client in a layer,
    ``in_common`` [N, N] the shares of experts that two clients have in common, mean over layers, and ``alike`` its
    correlation with how much of their training labels they have in common.
    """
    directory = RunDirectory.open(path)
    checkpoint = directory.checkpoint()
    assert checkpoint is not None
    state = directory.tensors(checkpoint, checkpoint.server)
    layers = [tensor.numpy() for name, tensor in state.items() if name.startswith("assigned/")]
    held = [layer.sum(0) for layer in layers]
    common = np.mean([_overlap(layer.T) for layer in layers], axis=0)
    counts = json.loads((path / "partition.json").read_text(encoding="utf-8"))["counts"]
    labels = np.array(list(counts.values()), dtype=float)
    shares = labels / labels.sum(1, keepdims=True)
    alike = np.minimum(shares[:, None], shares[None]).sum(-1)
    pairs = np.triu_indices(len(common), 1)
    return {
        "assigned": [np.flatnonzero(expert).tolist() for expert in layers[-1]],
        "experts_held": [int(min(map(min, held))), int(max(map(max, held)))],
        "in_common": np.round(common, 3).tolist(),
        "alike": round(float(np.corrcoef(common[pairs], alike[pairs])[0, 1]), 3),
    }


def _overlap(held: np.ndarray) -> np.ndarray:
    """[N, N]: experts that two clients share, of all that either has; from [N, E]."""
    both = (held[:, None] & held[None]).sum(-1)
    return both / np.maximum(1, (held[:, None] | held[None]).sum(-1))


def main() -> None:
    parser = arguments(__doc__, "experts")
    parser.add_argument("--only", default="", help="settings whose name holds one of these, with commas")
    parser.add_argument("--seed", default="", help="only these seeds, with commas; rates are chosen by seed 0")
    parser.add_argument("--method", default="", help="only these variants, with commas; default: all")
    parser.add_argument("--limit", type=int, help="examples of each setting, for trying the harness out")
    parser.add_argument("--rounds", type=int, help="likewise")
    given = parser.parse_args()
    if (given.limit or given.rounds) and given.results.resolve() == RESULTS:
        parser.error("--limit and --rounds are for trials; give them --results and --runs of their own")
    torch.set_num_threads(given.threads)
    runs = given.runs.resolve()
    known = settings(Path("nowhere"), runs)  # Banking77 comes with the package
    only = [text for text in given.only.split(",") if text]
    names = [name for name in SETTINGS if not only or any(text in name for text in only)]
    seeds = [int(text) for text in given.seed.split(",") if text] or list(range(SEEDS))
    chosen = [known[name].shortened(given.limit, given.rounds) for name in names]
    variants = [name for name in (*METHODS, *ABLATIONS) if not given.method or name in given.method.split(",")]
    all_ = Experts(Store(runs, given.results), chosen, seeds, variants)

    def run_one(cell: Cell, path: Path) -> str:
        return f"accuracy {100 * perform(cell.recipe(), path)['accuracy_mean']:.1f} %"

    failed: dict[str, str] = {}
    if not (given.list or given.collect):
        failed = work(all_.left, lambda cell: cell.folder(runs), run_one, all_.collect, runs)
    if not given.list:
        all_.collect()
    finish("experts", [cell.label for cell in all_.left()], failed, listed=given.list)


if __name__ == "__main__":
    main()
