"""Clients that join when all rounds are over: the start that the server makes of their sketch, against other starts.

    python benchmarks/newcomers.py --data ../shared/data --runs runs/newcomers
    python benchmarks/newcomers.py --only "banking77 dirichlet 0.5" --seed 0
    python benchmarks/newcomers.py --list                      # what is done and what is left
    python benchmarks/newcomers.py --collect                   # only rewrite the results from the runs

A fifth of the clients of the accuracy table's settings takes part in no round (``newcomers.share``); who they are
follows from the seed, so all variants hold back the same. *Local training from zero* is `local` with everybody in it:
the newcomers' own results are read out of that run. *Then trained* is a start with which the newcomer trains at home as
long as `local` does, and chooses its head for that. Learning rates are those of the accuracy table (``tuning.json``).
Test data is read once, at the end of each run, and once by what is trained further. Any number of processes can share
``--runs``: kill them at any time, what is finished is reused and what was begun goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, environment, finish
from accuracy import rate_of
from resumable import Row, Store, arguments, perform, work
from settings import Setting, settings

from folklora.federation.local import LocalEngine
from folklora.federation.newcomers import settle_in
from folklora.federation.run import run_name, variant
from folklora.federation.rundir import RunDirectory
from folklora.federation.sampling import newcomers
from folklora.federation.setup import prepare
from folklora.methods import build
from folklora.recipe import Recipe

SHARE = 0.2
SEEDS = 3
SETTINGS = ("banking77 dirichlet 0.5", "banking77 dirichlet 0.1", "snips dirichlet 0.1")
LOCAL = "local"
STARTS = ("folklora", "fedit", "sketch", "folklora:similarity=data", "celora:basis=frozen:head=sketched")
"""What the server has for a newcomer: one core and a head, one model, a head alone, cores mixed by its data."""
TRAINED = ("folklora", "fedit")
"""Starts from which newcomers also train at home."""
AFTERWARDS = "newcomers-trained.json"


@dataclass(frozen=True)
class Cell:
    """One run, or (``trained``) what newcomers make of one at home."""

    setting: Setting
    variant: str
    rate: str
    seed: int
    trained: bool = False

    @property
    def label(self) -> str:
        then = ", then trained" if self.trained else ""
        return f"{self.setting.name}; {self.variant}{then}; seed {self.seed}"

    @property
    def entry(self) -> str:
        """As `folklora compare --methods` takes it."""
        share = "" if self.variant == LOCAL else f":newcomers.share={SHARE}"
        return f"{self.variant}{share}:train.lr={self.rate}"

    def recipe(self) -> Recipe:
        return variant(self.setting.recipe(self.seed), self.entry, self.seed)

    def folder(self, runs: Path) -> Path:
        return runs / re.sub(r"[^\w.]+", "-", self.setting.name).strip("-") / run_name(self.entry, self.seed)


@dataclass
class Newcomers:
    """Where runs and results lie, and what is asked for."""

    store: Store
    found: Sequence[Setting]
    seeds: Sequence[int]
    rates: Mapping[str, str]

    def plan(self) -> Iterator[Cell]:
        """Of each seed the most telling first: the start, what it is compared with, and only then its relatives."""
        for seed in self.seeds:
            for name in (*STARTS[:2], LOCAL, *STARTS[2:]):
                for setting in self.found:
                    if (rate := rate_of(name, self.rates)) is not None:
                        cell = Cell(setting, name, rate, seed)
                        yield cell
                        if name in TRAINED:
                            yield replace(cell, trained=True)

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell left on the disk."""
        path = cell.folder(self.store.runs) / (AFTERWARDS if cell.trained else "summary.json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def left(self) -> list[Cell]:
        return [cell for cell in self.plan() if self.finished(cell) is None]

    def ready(self) -> list[Cell]:
        """What is left and does not wait for the run it goes on from."""
        return [c for c in self.left() if not c.trained or self.finished(replace(c, trained=False)) is not None]

    def collect(self) -> None:
        """Rewrite ``newcomers.json``; rows of settings and seeds not asked for now stay."""
        with self.store.locked():
            before = self.store.load("newcomers")
            rows: dict[tuple[Any, ...], Row] = {_key(row): row for row in before.get("rows", [])}
            for cell in self.plan():
                if (summary := self.finished(cell)) is not None:
                    row = _row(cell, summary)
                    rows[_key(row)] = row
            order = [(name, trained, start) for name in SETTINGS for trained in (False, True) for start in _ORDER]
            kept = [key for key in rows if key[:3] in order]
            kept.sort(key=lambda key: (order.index(key[:3]), key[3]))
            document = {"environment": environment(torch.device("cpu"), torch.float32), "share": SHARE, "seeds": SEEDS}
            self.store.write("newcomers", {**document, "rows": [rows[key] for key in kept]})


_ORDER = (*STARTS, LOCAL)


def _key(row: Row) -> tuple[Any, ...]:
    return row["setting"], row["trained"], row["variant"], row["seed"]


def _row(cell: Cell, summary: Mapping[str, Any]) -> Row:
    """Each newcomer's accuracy and test examples, and the mean of those who took part."""
    if cell.variant == LOCAL:
        late = newcomers(SHARE, cell.seed, list(summary["clients"]))
        joined = {client: summary["clients"][client] for client in late}
        others = [result["accuracy"] for client, result in summary["clients"].items() if client not in late]
        moved = {"bytes_up": 0.0, "bytes_down": 0.0}
    else:
        told = summary["newcomers"]
        joined, others = told["clients"], [result["accuracy"] for result in summary["clients"].values()]
        moved = {way: told[f"{way}_per_client"] for way in ("bytes_up", "bytes_down")}
    return {
        "setting": cell.setting.name,
        "variant": cell.variant,
        "trained": cell.trained,
        "seed": cell.seed,
        "lr": float(cell.rate),
        "newcomers": {client: result["accuracy"] for client, result in joined.items()},
        "test_examples": {client: result["examples"]["test"] for client, result in joined.items()},
        "others": sum(others) / len(others),
        **moved,
    }


def train_at_home(path: Path) -> dict[str, Any]:
    """The summary of a run whose newcomers have trained by themselves, from their start, as long as its rounds were."""
    directory = RunDirectory.open(path)
    recipe, checkpoint = directory.recipe, directory.checkpoint()
    assert checkpoint is not None
    setup = prepare(recipe)
    assert setup.joining is not None
    # What is chosen for a start is chosen for the training ahead.
    context = replace(setup.joining.context, rounds=recipe.train.rounds)
    setup = replace(setup, joining=build(recipe.method.name, recipe.method.options, context))
    engine, state = LocalEngine(setup), directory.tensors(checkpoint, checkpoint.server)
    for client in setup.newcomers:
        settle_in(setup, state, engine.members[client], checkpoint.round)
    for round in range(1, recipe.train.rounds + 1):
        for upload in engine.train(round, setup.newcomers):
            if upload.failure is not None:
                raise RuntimeError(f"client {upload.client}: {upload.failure}")
    (scores,) = engine.scores(setup.newcomers, [("test", {})])
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    for client, result in summary["newcomers"]["clients"].items():
        result["accuracy"] = scores[client].value
    return summary


def run_one(cell: Cell, path: Path) -> str:
    if not cell.trained:
        perform(cell.recipe(), path)
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    else:
        summary = train_at_home(path)
        RunDirectory(path).write(AFTERWARDS, json.dumps(summary, allow_nan=False).encode())
    row = _row(cell, summary)
    return f"newcomers {100 * sum(row['newcomers'].values()) / len(row['newcomers']):.1f} %"


def main() -> None:
    parser = arguments(__doc__, "newcomers")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds snips/")
    parser.add_argument("--only", default="", help="settings whose name holds one of these, with commas")
    parser.add_argument("--seed", default="", help="only these seeds, with commas")
    parser.add_argument("--limit", type=int, help="examples of each setting, for trying the harness out")
    parser.add_argument("--rounds", type=int, help="likewise")
    given = parser.parse_args()
    if (given.limit or given.rounds) and given.results.resolve() == RESULTS:
        parser.error("--limit and --rounds are for trials; give them --results and --runs of their own")
    torch.set_num_threads(given.threads)
    runs = given.runs.resolve()
    known = settings(given.data.resolve(), runs)
    only = [text for text in given.only.split(",") if text]
    names = [name for name in SETTINGS if name in known and (not only or any(text in name for text in only))]
    seeds = [int(text) for text in given.seed.split(",") if text] or list(range(SEEDS))
    chosen = [known[name].shortened(given.limit, given.rounds) for name in names]
    rates = Store(runs, RESULTS).load("tuning")["chosen"]
    all_ = Newcomers(Store(runs, given.results), chosen, seeds, rates)
    failed: dict[str, str] = {}
    if not (given.list or given.collect):
        failed = work(all_.ready, lambda cell: cell.folder(runs), run_one, all_.collect, runs)
    if not given.list:
        all_.collect()
    finish("newcomers", [cell.label for cell in all_.left()], failed, listed=given.list)


if __name__ == "__main__":
    main()
