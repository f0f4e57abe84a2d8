"""Condensed data beside models and sketches: bytes, accuracy at equal bytes, and what each gives away.

    python benchmarks/condensed.py                               # --runs runs/condensed; it may be killed at any time
    python benchmarks/condensed.py --variants "sketch,feddm:ipc=1" --seeds 1
    python benchmarks/condensed.py --list                        # what is done and what is left
    python benchmarks/condensed.py --collect                     # only rewrite the results from the runs

Banking77, ten clients. Methods train, or their servers do, at the rates that `accuracy.py` chose for them as they are
by default (``tuning.json``); one for which it chose none has a fixed rate that nobody tuned (``RATE``). A row has its
rate, the accuracy of the models that clients end with, the bytes of one client over the whole run, and an attack on
that run: `condensed` where made-up examples travel, `mixture` where a sketch does. As in `poison.py` any number of
processes can share ``--runs``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, environment, finish
from resumable import Store, arguments, perform, work

from folklora.federation.run import run_name, variant
from folklora.federation.rundir import RunDirectory
from folklora.methods import find
from folklora.privacy.attacks.run import Plan, attack
from folklora.recipe import Recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "banking77.toml"
CHANGES = ("data.limit=1500", "model.max_length=64", "train.rounds=5", "train.evaluate_every=5")
EMBEDDED = "space=embeddings:ipc=1:length=8:steps=50:server_steps=50:train.rounds=1"
"""Half an hour of a core a run: every step goes through the whole backbone, forwards and back."""
VARIANTS = (
    "sketch",
    "feddm:ipc=1",
    "feddm:ipc=3",
    "fedaf:ipc=1",
    "fedaf:ipc=3",
    "fedit",
    "folklora",
    "feddm:ipc=1:train.rounds=3",
    "fedaf:ipc=1:train.rounds=2",
    "fedit:message.dtype=int8:train.rounds=2",
    "feddm:ipc=10",
    "feddm:ipc=3:head_start=sketched",
    "feddm:ipc=3:init=public",
    f"feddm:{EMBEDDED}",
    f"fedaf:{EMBEDDED}",
    f"feddm:{EMBEDDED}:init=public",
)
RATE = "1e-2"
"""Where `accuracy.py` chose no rate for a method. It is not tuned."""
SEEDS = 3
VICTIMS = 4
SHOWN = ("hit", "single_hit", "summed_precision", "rank_quantile", "token_recall", "token_cosine")


@dataclass(frozen=True)
class Cell:
    """One run, and the attack on it."""

    variant: str
    seed: int
    rate: str

    @property
    def entry(self) -> str:
        return f"{self.variant}:train.lr={self.rate}"

    @property
    def label(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def attack(self) -> str | None:
        """What is asked of the run: the attack on what it sends beside a model."""
        method = self.variant.partition(":")[0]
        if find(method).condenses:
            return "condensed"
        return "mixture" if method in ("sketch", "folklora") else None

    def recipe(self, changes: Sequence[str]) -> Recipe:
        return variant(Recipe.read(RECIPE, [*CHANGES, *changes]), self.entry, self.seed)

    def folder(self, runs: Path) -> Path:
        return runs / run_name(self.entry, self.seed)


def plan(variants: Sequence[str], seeds: int, rates: dict[str, str]) -> list[Cell]:
    """All runs; one seed of everything first, the most telling variants first.

    ``rates`` are what was chosen for variants, or for their methods.
    """

    def rate(name: str) -> str:
        return rates.get(name) or rates.get(name.partition(":")[0], RATE)

    return [Cell(name, seed, rate(name)) for seed in range(seeds) for name in variants]


def row_of(cell: Cell, path: Path) -> dict[str, Any] | None:
    """What the results tell of a run; None until it and the attack on it are finished."""
    leak = path / "leak.json"
    if not (path / "summary.json").exists() or (cell.attack and not leak.exists()):
        return None
    row = json.loads((path / "summary.json").read_text(encoding="utf-8"))["row"]
    lines = RunDirectory.open(path).metrics()
    clients = len(json.loads((path / "summary.json").read_text(encoding="utf-8"))["clients"])
    found = {
        "variant": cell.variant,
        "seed": cell.seed,
        "rate": float(cell.rate),
        "accuracy_mean": row["accuracy_mean"],
        "accuracy_worst_tenth": row["accuracy_worst_tenth"],
        "accuracy_global": row["accuracy_global"],
        "bytes_up_a_round": row["bytes_up_per_client_round"],
        "bytes_down_a_round": row["bytes_down_per_client_round"],
        "bytes_once": row["bytes_once_per_client"],
        "bytes_of_a_client": sum(line["bytes_up"] + line["bytes_down"] for line in lines) / clients,
        "by_round": [line["validation"]["mean"] for line in lines if line["validation"]],
        "rounds": row["rounds"],
        "seconds": row["seconds_total"],
        "attack": cell.attack,
    }
    return found | ({"leak": json.loads(leak.read_text(encoding="utf-8"))} if cell.attack else {})


def examine(cell: Cell, path: Path) -> None:
    """Attack a finished run, once."""
    if cell.attack is None or (path / "leak.json").exists():
        return
    document = attack(path, Plan(cell.attack, victims=VICTIMS, budget=10))
    told = {name: document["metrics"][name] for name in SHOWN if name in document["metrics"]}
    temporary = path / ".leak.json.part"
    temporary.write_text(json.dumps(told, allow_nan=False), encoding="utf-8")
    temporary.replace(path / "leak.json")


def collect(bench: Store, cells: Sequence[Cell], changes: Sequence[str]) -> None:
    """Rewrite ``condensed.json`` from the runs on disk; rows that were not asked for now stay."""
    with bench.locked():
        before = bench.load("condensed")
        rows = {_key(row): row for row in before.get("rows", []) if before.get("changes") == [*CHANGES, *changes]}
        found = [row for cell in cells if (row := row_of(cell, cell.folder(bench.runs))) is not None]
        rows |= {_key(row): row for row in found}
        where = environment(torch.device("cpu"), torch.float32)
        document = {"environment": where, "recipe": RECIPE.name, "changes": [*CHANGES, *changes], "victims": VICTIMS}
        bench.write("condensed", {**document, "rows": [rows[key] for key in sorted(rows)]})


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["seed"]


def main() -> None:
    parser = arguments(__doc__, "condensed")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="as `folklora compare --methods`")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--set", action="append", default=[], help="key=value over the recipe, for trials")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bench = Store(given.runs.resolve(), given.results)
    chosen = Store(given.runs.resolve(), RESULTS).load("tuning").get("chosen", {})
    cells = plan(given.variants.split(","), given.seeds, chosen)

    def folder(cell: Cell) -> Path:
        return cell.folder(bench.runs)

    def missing() -> list[Cell]:
        return [cell for cell in cells if row_of(cell, folder(cell)) is None]

    def run_one(cell: Cell, path: Path) -> str:
        perform(cell.recipe(given.set), path)
        examine(cell, path)
        row = row_of(cell, path)
        assert row is not None
        return f"accuracy {row['accuracy_mean']:.1%}, {row['bytes_of_a_client'] / 1e6:.2f} MB a client"

    collecting = partial(collect, bench, cells, given.set)
    failed = {} if given.list or given.collect else work(missing, folder, run_one, collecting, bench.runs)
    if not given.list:
        collecting()
    finish("condensed", [cell.label for cell in missing()], failed, listed=given.list)


if __name__ == "__main__":
    main()
