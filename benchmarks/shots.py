"""Few examples of each class at each client: a head fitted to real features alone, and with made-up ones beside them.

    python benchmarks/shots.py --data ../shared/data --runs runs/shots
    python benchmarks/shots.py --only snips --seed 0,1
    python benchmarks/shots.py --list                          # what is done and what is left
    python benchmarks/shots.py --collect                       # only rewrite the results from the runs

Twenty clients, `data.shots` of 1, 5 and 10, every ``method.augment``, on the frozen backbone's features and before any
round: what `folklora run` does with ``method.name = "sketch"`` and ``head_start = "fitted"``, without carrying tokens
through the backbone again each time. Features are computed once, into ``--runs``. All kinds of a cell have the same
clients, shots and test examples, so differences are paired. Test data is read once a cell. Any number of processes can
share ``--runs``: kill them at any time, what is finished is reused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, finish
from resumable import Row, Store, arguments, keep, kept, work
from torch import Tensor

from folklora.data.augmentation.choose import KINDS, Augmenter
from folklora.data.augmentation.sketch import unpacked
from folklora.data.partition import partition
from folklora.data.sources import fingerprint, load
from folklora.data.split import Split
from folklora.data.table import Table
from folklora.federation.codec import decode, encode
from folklora.federation.setup import context, task_of
from folklora.methods import build
from folklora.methods.contract import Client
from folklora.methods.fitting import fitted_head
from folklora.recipe import Recipe
from folklora.training.prediction import features

SEEDS = 10
SHOTS = (1, 5, 10)
AUTO = "auto"
CLIENTS = {"clients": 20}


@dataclass(frozen=True)
class Setting:
    """Who holds which classes: of each of them at least ten examples to train on."""

    name: str
    data: tuple[tuple[str, Any], ...]

    def recipe(self, seed: int, shots: int | None) -> Recipe:
        few = {} if shots is None else {"shots": shots}
        method = {"name": "sketch", "head_start": "fitted", "augment": AUTO}
        return Recipe.parse({"seed": seed, "data": {**dict(self.data), **CLIENTS, **few}, "method": method})


def settings(data: Path) -> list[Setting]:
    """Snips only where it is."""
    found = [
        Setting("banking77, 10 classes a client", (("partition", "pathological"), ("classes_per_client", 10))),
    ]
    if (source := data / "snips" / "train.jsonl").exists():
        own = (("source", str(source)), ("label", "intent"), ("partition", "iid"))
        found.append(Setting("snips, all 7 classes", own))
    return found


@dataclass(frozen=True)
class Cell:
    """All kinds at one number of shots, with one seed."""

    setting: Setting
    shots: int
    seed: int

    @property
    def label(self) -> str:
        return f"{self.setting.name}; {self.shots} shots; seed {self.seed}"

    def folder(self, runs: Path) -> Path:
        return runs / self.setting.name.partition(",")[0] / f"shots-{self.shots}-seed-{self.seed}"


@dataclass(frozen=True)
class Source:
    """A whole data set and the frozen backbone's features of it, [n, d]."""

    table: Table
    features: Tensor


@dataclass(frozen=True)
class Own:
    """A client's shots, as a method may see them."""

    source: Source
    split: Split

    def features(self, split: str) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(getattr(self.split, split))
        return self.source.features[rows], torch.from_numpy(self.source.table.labels)[rows]


@cache
def source_of(setting: Setting, runs: Path) -> Source:
    recipe = setting.recipe(0, None)
    table, _ = load(recipe.data, 0, recipe.form)
    task = task_of(recipe, table.classes)
    told = hashlib.sha256(f"{fingerprint(table)} {task.backbone.digest}".encode()).hexdigest()[:16]
    path = runs / f"features-{told}.npy"
    if not path.exists():
        found = features(task, task.encode(table.inputs))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        with temporary.open("wb") as file:
            np.save(file, found)
        temporary.replace(path)
    return Source(table, torch.from_numpy(np.load(path)))


def play(cell: Cell, runs: Path) -> Row:
    """Sketch, welcome and fit of every client; what each head says of the client's test examples."""
    source = source_of(cell.setting, runs)
    recipe = cell.setting.recipe(cell.seed, cell.shots)
    table, classes = source.table, len(source.table.classes)
    splits = partition(table, recipe.data, cell.seed)
    agreed = context(recipe, task_of(recipe, table.classes), dict.fromkeys(splits, 1))
    method = build(recipe.method.name, recipe.method.options, agreed)
    owned = {client: Own(source, split) for client, split in splits.items()}
    sent = {}
    for client, own in owned.items():
        message = method.sketch(Client(client, 1, len(own.split.train), {}, own, 0))  # type: ignore[arg-type]
        assert message is not None
        sent[client] = encode(message)
    state = method.begin({client: decode(data) for client, data in sent.items()})
    welcome = method.welcome(state, "0")
    assert welcome is not None
    shared = unpacked(decode(encode(welcome)).tensors, classes, agreed.width)
    accuracy: dict[str, list[float]] = {kind: [] for kind in (*KINDS, AUTO)}
    chosen = []
    for client, own in owned.items():
        augmenter = Augmenter(own.features("train"), classes, cell.seed, client, shared)
        x, y = own.features("test")
        for kind, found in accuracy.items():
            taken, head = fitted_head(augmenter, kind)
            right = (x @ head["head/weight"].T + head["head/bias"]).argmax(1) == y
            found.append(round(float(right.double().mean()), 6))
            if kind == AUTO:
                chosen.append(taken)
    return {
        "setting": cell.setting.name,
        "shots": cell.shots,
        "seed": cell.seed,
        "train_examples": [len(own.split.train) for own in owned.values()],
        "test_examples": [len(own.split.test) for own in owned.values()],
        "statistics_up": sum(map(len, sent.values())) / len(sent),
        "statistics_down": len(encode(welcome)),
        "accuracy": accuracy,
        "chosen": {kind: chosen.count(kind) for kind in KINDS},
    }


@dataclass
class Shots:
    """Where runs and results lie, and what is asked for."""

    store: Store
    found: Sequence[Setting]
    seeds: Sequence[int]

    def plan(self) -> Iterator[Cell]:
        """One seed of everything before the next."""
        for seed in self.seeds:
            for shots in SHOTS:
                for setting in self.found:
                    yield Cell(setting, shots, seed)

    def finished(self, cell: Cell) -> Row | None:
        return kept(cell.folder(self.store.runs))

    def left(self) -> list[Cell]:
        return [cell for cell in self.plan() if self.finished(cell) is None]

    def run_one(self, cell: Cell, path: Path) -> str:
        row = play(cell, self.store.runs)
        keep(path, row)
        return ", ".join(f"{kind} {100 * np.mean(values):.1f}" for kind, values in row["accuracy"].items())

    def collect(self) -> None:
        """Rewrite ``shots.json`` from the cells on disk; rows of settings and seeds not asked for now stay."""
        with self.store.locked():
            before = self.store.load("shots")
            rows = {_key(row): row for row in before.get("rows", [])}
            rows |= {_key(row): row for cell in self.plan() if (row := self.finished(cell)) is not None}
            where = environment(torch.device("cpu"), torch.float32)
            document = {"environment": where, "seeds": SEEDS, "rows": [rows[key] for key in sorted(rows)]}
            self.store.write("shots", document)


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["setting"], row["shots"], row["seed"]


def main() -> None:
    parser = arguments(__doc__, "shots")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds snips/")
    parser.add_argument("--only", default="", help="cells whose label holds one of these, with commas")
    parser.add_argument("--seed", default="", help="only these seeds, with commas")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runs = given.runs.resolve()
    only = [text for text in given.only.split(",") if text]
    known = settings(given.data.resolve())
    chosen = [setting for setting in known if not only or any(text in setting.name for text in only)]
    seeds = [int(text) for text in given.seed.split(",") if text] or list(range(SEEDS))
    shots = Shots(Store(runs, given.results), chosen, seeds)
    failed: dict[str, str] = {}
    if not (given.list or given.collect):
        failed = work(shots.left, lambda cell: cell.folder(runs), shots.run_one, shots.collect, runs)
    if not given.list:
        shots.collect()
    finish("shots", [cell.label for cell in shots.left()], failed, listed=given.list)


if __name__ == "__main__":
    main()
