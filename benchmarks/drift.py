"""What data that change in mid-run do to federated clients, and what asking for their sketches again is worth.

    python benchmarks/drift.py                       # --runs runs/drift; what tells most comes first
    python benchmarks/drift.py --only snips --seed 0
    python benchmarks/drift.py --list                # what is done and what is left
    python benchmarks/drift.py --collect             # only rewrite the results from the runs

Half of the clients have other data from round 6 of 10 on (`folklora.data.drift`). Each method runs at the learning rate
that `accuracy.py` chose for it. Scores of rounds are on validation splits, a fifth of each client's examples here; test
data is read once, at the end. Where sketches are asked for again, it is after every third round: the change of round 6
is known in round 7. Any number of processes can share ``--runs``: kill them at any time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _common import environment, finish
from resumable import Row, Store, arguments, perform, work

from folklora.federation.run import run_name, variant
from folklora.recipe import Recipe

SEEDS = 3
CHANGE = 6
ROUNDS = 10
REFRESH = 3
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

VARIANTS: dict[str, str] = {
    "local": "1e-2",
    "fedit": "1e-2",
    "celora": "1e-2",
    f"celora:refresh={REFRESH}": "1e-2",
    "folklora": "3e-3",
    f"folklora:refresh={REFRESH}": "3e-3",
    "celora:similarity=data": "1e-2",
    f"celora:similarity=data:refresh={REFRESH}": "1e-2",
    "folklora:similarity=data": "3e-3",
    f"folklora:similarity=data:refresh={REFRESH}": "3e-3",
}
"""Entry of ``--methods`` -> learning rate."""


@dataclass(frozen=True)
class Setting:
    """What changes, in which data."""

    name: str
    data: dict[str, Any]
    kind: str

    def recipe(self, limit: int | None = None, rounds: int = ROUNDS) -> Recipe:
        data = {**self.data, "validation": 0.2, "clients": 10, "partition": "dirichlet"}
        return Recipe.parse(
            {
                "data": data if limit is None else {**data, "limit": limit, "min_examples": 5},
                "train": {"rounds": rounds, "batch_size": 16},
                "drift": {"kind": self.kind, "round": min(CHANGE, rounds), "share": 0.5},
            }
        )


SNIPS = {"source": str(DATA / "snips" / "train.jsonl"), "label": "intent", "limit": 700}
BANKING = {"source": "banking77", "limit": 1500}
SETTINGS = (
    Setting("banking77, labels shared out anew", {**BANKING, "alpha": 0.1}, "labels"),
    Setting("banking77, classes join in", {**BANKING, "alpha": 0.5}, "classes"),
    Setting("snips, labels shared out anew", {**SNIPS, "alpha": 0.1}, "labels"),
    Setting("snips, classes join in", {**SNIPS, "alpha": 0.5}, "classes"),
)


@dataclass(frozen=True)
class Cell:
    """One run."""

    setting: Setting
    variant: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.setting.name}: {self.variant}, seed {self.seed}"

    @property
    def entry(self) -> str:
        return f"{self.variant}:train.lr={VARIANTS[self.variant]}"


@dataclass
class Drift:
    """Where runs and results lie, and what is asked for; fewer examples and rounds are for trials of the harness."""

    store: Store
    settings: Sequence[Setting]
    variants: Sequence[str]
    seeds: Sequence[int]
    limit: int | None = None
    rounds: int = ROUNDS

    def recipe(self, cell: Cell) -> Recipe:
        return variant(cell.setting.recipe(self.limit, self.rounds), cell.entry, cell.seed)

    def folder(self, cell: Cell) -> Path:
        name = re.sub(r"[^\w.]+", "-", cell.setting.name).strip("-")
        return self.store.runs / name / run_name(cell.entry, cell.seed)

    def plan(self) -> Iterator[Cell]:
        """Seed by seed; the first setting and the shortest list of methods are at the front."""
        for seed in self.seeds:
            for setting in self.settings:
                yield from (Cell(setting, name, seed) for name in self.variants)

    def left(self) -> list[Cell]:
        return [cell for cell in self.plan() if not (self.folder(cell) / "summary.json").exists()]

    def run(self, cell: Cell, path: Path) -> str:
        perform(self.recipe(cell), path)
        row = told(path, cell)
        return f"drifted clients end at {100 * row['drifted']:.1f} %, the others at {100 * row['others']:.1f} %"

    def collect(self) -> None:
        """Rewrite ``drift.json`` from the runs on disk; rows not asked for now stay."""
        with self.store.locked():
            before = self.store.load("drift")
            rows = {(row["setting"], row["variant"], row["seed"]): row for row in before.get("rows", [])}
            for cell in self.plan():
                if (path := self.folder(cell) / "summary.json").exists():
                    rows[cell.setting.name, cell.variant, cell.seed] = told(path.parent, cell)
            places = {name: i for i, name in enumerate(s.name for s in SETTINGS)}
            names = {name: i for i, name in enumerate(VARIANTS)}
            ordered = sorted(rows.values(), key=lambda r: (places[r["setting"]], names[r["variant"]], r["seed"]))
            where = environment(torch.device("cpu"), torch.float32)
            told_of = {"change": CHANGE, "rounds": ROUNDS, "refresh": REFRESH, "seeds": SEEDS}
            self.store.write("drift", {"environment": where, **told_of, "rows": ordered})


def told(path: Path, cell: Cell) -> Row:
    """What a finished run says of those who drifted, and of the others: validation by round, test at the end."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    drifted = next(line["drift"] for line in lines if "drift" in line)
    scores = {line["round"]: line["validation"]["clients"] for line in lines if line["validation"]}
    test = {client: result["accuracy"] for client, result in summary["clients"].items()}
    groups = {"drifted": drifted, "others": [client for client in test if client not in drifted]}
    return {
        "setting": cell.setting.name,
        "variant": cell.variant,
        "seed": cell.seed,
        **{name: fmean(test[client] for client in group) for name, group in groups.items()},
        "curves": {
            name: [[round, fmean(of[client] for client in group)] for round, of in scores.items()]
            for name, group in groups.items()
        },
        "bytes_up": summary["row"]["bytes_up_per_client_round"],
        "bytes_down": summary["row"]["bytes_down_per_client_round"],
        "bytes_once": summary["row"]["bytes_once_per_client"],
    }


def main() -> None:
    parser = arguments(__doc__, "drift")
    parser.add_argument("--only", default="", help="settings whose name holds one of these, with | between them")
    parser.add_argument("--methods", default=",".join(VARIANTS), help="some of them, with commas")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--limit", type=int, help="examples, for a trial")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="for a trial")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = [name for name in given.methods.split(",") if name]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise SystemExit(f"--methods {unknown[0]!r}; allowed: {', '.join(VARIANTS)}")
    only = [text for text in given.only.split("|") if text]
    settings = [s for s in SETTINGS if not only or any(text in s.name for text in only)]
    settings = [s for s in settings if s.data["source"] == "banking77" or Path(s.data["source"]).exists()]
    seeds = range(SEEDS) if given.seed is None else [given.seed]
    store = Store(given.runs.resolve(), given.results)
    drift = Drift(store, settings, names, seeds, given.limit, given.rounds)
    failed: dict[str, str] = {}
    if not given.list and not given.collect:
        failed = work(drift.left, drift.folder, drift.run, drift.collect, store.runs)
    if not given.list:
        drift.collect()
    finish("drift", [cell.label for cell in drift.left()], failed, listed=given.list)


if __name__ == "__main__":
    main()
