"""Data that are worth less: how well a client's audit tells of them, and what it helps to weigh clients by it.

    python benchmarks/quality.py --data ../shared/data --runs runs/quality
    python benchmarks/quality.py --only audit                    # the cheap half: no model, many seeds
    python benchmarks/quality.py --only fedit --seeds 1
    python benchmarks/quality.py --list                          # what is done and what is left
    python benchmarks/quality.py --collect                       # only rewrite the results from the runs

*audit*: twenty clients, six of which are struck: a share of their training examples are random words of the corpus
(``scramble``), copies of other examples (``duplicate``), copies in which one word in eight is another one (``near``),
or have another label (``labels``, which no audit of texts can see: the control). Every measure ranks the clients; AUC
is the probability that a client that is struck has a higher value than one that is not, so 0.5 tells nothing, and below
it faults lower the measure.

*runs*: ten clients on Banking77, half of them struck, with and without ``audit.weights``. Whoever is struck has its
faults among the training examples alone; accuracy is that of all clients on their own clean test examples. As in
`tasks.py` any number of processes can share ``--runs``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, finish
from resumable import Row, Store, arguments, keep, kept, perform, work

from folklora.data.audit.duplicates import exact_duplicates
from folklora.data.audit.entropy import compression_ratio, regularity, sample_entropy
from folklora.data.audit.matches import entropy_rate
from folklora.data.audit.quality import copies, regularities, regularity_of_blocks, tokens_of
from folklora.federation.falsified import falsified
from folklora.federation.poison import struck
from folklora.federation.run import run_name, variant
from folklora.federation.setup import data_of
from folklora.randomness import numpy_generator
from folklora.recipe import Recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "banking77.toml"
CHANGES = ("data.limit=2000", "model.max_length=64", "train.rounds=5", "train.evaluate_every=5")
SEEDS, AUDIT_SEEDS = 3, 10
ROWS = (0.1, 0.3, 0.5)
"""Shares of the training examples of a client that is struck."""
METHODS = ("fedit", "folklora")
KINDS = {"scramble": "regularity", "duplicate": "duplicates"}
"""Fault -> the weights that are meant for it."""
STRUCK, AUDITED_STRUCK = 0.5, 0.3
SWAPPED = 8


# -- what an audit tells -----------------------------------------------------------------------------------------------


MEASURES: dict[str, Callable[[Sequence[str]], float | None]] = {
    "regularity of blocks": lambda texts: regularity_of_blocks(regularities(texts)).value,
    "ratio to shuffled": lambda texts: regularity(tokens_of(texts)).value,
    "copies, near": lambda texts: copies(texts).share,
    "copies, exact": lambda texts: exact_duplicates(texts).share,
    "entropy rate": lambda texts: entropy_rate(tokens_of(texts)).value,
    "sample entropy": lambda texts: sample_entropy(tokens_of(texts)).value,
    "zlib ratio": lambda texts: compression_ratio(list(texts)).value,
}


@dataclass(frozen=True)
class Audits:
    """All measures of all clients of one setting, clean and struck in every way, with one seed."""

    setting: str
    source: tuple[str, ...]
    seed: int

    @property
    def label(self) -> str:
        return f"audit, {self.setting}, seed {self.seed}"

    def folder(self, runs: Path) -> Path:
        return runs / "audit" / f"{self.setting}-s{self.seed}"

    def recipe(self, kind: str, rows: float) -> Recipe:
        """``near`` is a duplicate, edited; labels are another matter than rows."""
        name = "duplicate" if kind == "near" else kind
        share = [f"poison.rows={rows}"] if kind != "labels" else []
        changes = ["data.clients=20", "data.partition=dirichlet", "data.alpha=1.0", *self.source, *share]
        return Recipe.parse({"seed": self.seed}, [*changes, f"poison.kind={name}", f"poison.share={AUDITED_STRUCK}"])

    def texts(self, kind: str, rows: float, client: str) -> list[str]:
        recipe = self.recipe(kind, rows)
        data = data_of(recipe)
        train = data.splits[client].train
        false = falsified(recipe, data.table, client, train)
        texts = false.inputs(data.table, train)
        if kind != "near":
            return texts
        random = numpy_generator(self.seed, "near", client)
        corpus = [word for text in data.table.inputs for word in text.split()]
        return [
            _edited(text, corpus, random) if row in false.moved else text
            for row, text in zip(train.tolist(), texts, strict=True)
        ]


def _edited(text: str, corpus: Sequence[str], random: np.random.Generator) -> str:
    words = text.split()
    for place in random.choice(len(words), max(1, len(words) // SWAPPED), replace=False):
        words[place] = corpus[random.integers(len(corpus))]
    return " ".join(words)


def measured(texts: Sequence[str]) -> dict[str, float | None]:
    return {name: measure(texts) for name, measure in MEASURES.items()}


def auc(bad: Sequence[float | None], good: Sequence[float | None]) -> float | None:
    """P(bad > good), ties half; None where something could not be measured."""
    if any(value is None for value in (*bad, *good)):
        return None
    one, other = np.array(bad, dtype=float)[:, None], np.array(good, dtype=float)
    return float((one > other).mean() + (one == other).mean() / 2)


def audited(cell: Audits) -> Row:
    recipe = cell.recipe("scramble", 1.0)
    data = data_of(recipe)
    clients = list(data.splits)
    bad = struck(recipe, clients)
    clean = {client: measured([data.table.inputs[row] for row in data.splits[client].train]) for client in clients}
    found = []
    for kind in ("scramble", "duplicate", "near", "labels"):
        for rows in ROWS if kind != "labels" else (1.0,):
            values = {client: measured(cell.texts(kind, rows, client)) for client in bad}
            told = {
                name: auc([values[c][name] for c in bad], [clean[c][name] for c in clients if c not in bad])
                for name in MEASURES
            }
            means = {name: _mean([values[c][name] for c in bad]) for name in MEASURES}
            found.append({"kind": kind, "rows": rows, "auc": told, "struck": means})
    means = {name: _mean([clean[c][name] for c in clients]) for name in MEASURES}
    examples = [len(split.train) for split in data.splits.values()]
    return {"setting": cell.setting, "seed": cell.seed, "train_examples": examples, "clean": means, "faults": found}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# -- what weights help -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run; without faults all kinds are one."""

    method: str
    kind: str
    rows: float
    weights: str
    seed: int

    @property
    def entry(self) -> str:
        told = f"audit.weights={self.weights}"
        if self.rows:
            told += f":poison.kind={self.kind}:poison.share={STRUCK:g}:poison.rows={self.rows:g}"
        return f"{self.method}:{told}"

    @property
    def label(self) -> str:
        fault = f"{self.kind} {self.rows:.0%}" if self.rows else "clean"
        return f"{self.method}, {fault}, weights {self.weights}, seed {self.seed}"

    def recipe(self, changes: Sequence[str]) -> Recipe:
        return variant(Recipe.read(RECIPE, [*CHANGES, *changes]), self.entry, self.seed)

    def folder(self, runs: Path) -> Path:
        return runs / run_name(self.entry, self.seed)


def plan(seeds: int, rows: Sequence[float] = ROWS) -> Iterator[Cell]:
    """One seed of everything before the next, the largest faults first."""
    for seed in range(seeds):
        for share in (*sorted(rows, reverse=True), 0.0):
            for method in METHODS:
                for kind, meant in KINDS.items():
                    if not share and kind != "scramble":
                        continue
                    for weights in ("none", meant) if share else ("none", *KINDS.values()):
                        yield Cell(method, kind if share else "none", share, weights, seed)


def row_of(cell: Cell, path: Path) -> Row | None:
    """What the results tell of a run; None until it is finished."""
    if not (path / "summary.json").exists():
        return None
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    bad = summary.get("poison", {}).get("clients", [])
    of = {client: result["accuracy"] for client, result in summary["clients"].items()}
    return {
        "method": cell.method,
        "kind": cell.kind,
        "rows": cell.rows,
        "weights": cell.weights,
        "seed": cell.seed,
        "accuracy": float(np.mean(list(of.values()))),
        "clean_clients": float(np.mean([value for client, value in of.items() if client not in bad])),
        "struck_clients": float(np.mean([of[client] for client in bad])) if bad else None,
        "clients": of,
        "rounds": summary["row"]["rounds"],
        "seconds": summary["row"]["seconds_total"],
    }


# -- both --------------------------------------------------------------------------------------------------------------


@dataclass
class Quality:
    """Where runs and results lie, and what is asked for."""

    store: Store
    data: Path
    changes: Sequence[str]
    seeds: int
    audit_seeds: int
    only: Sequence[str]

    def cells(self) -> list[Audits | Cell]:
        """Audits first: they take minutes."""
        settings: dict[str, tuple[str, ...]] = {"banking77": ()}
        if (snips := self.data / "snips" / "train.jsonl").exists():
            settings["snips"] = (f"data.source={snips}", "data.label=intent")
        audits = [Audits(name, source, seed) for seed in range(self.audit_seeds) for name, source in settings.items()]
        found: list[Audits | Cell] = [*audits, *plan(self.seeds)]
        return [cell for cell in found if not self.only or any(text in cell.label for text in self.only)]

    def finished(self, cell: Audits | Cell) -> Row | None:
        path = cell.folder(self.store.runs)
        if isinstance(cell, Cell):
            return row_of(cell, path)
        return kept(path)

    def left(self) -> list[Audits | Cell]:
        return [cell for cell in self.cells() if self.finished(cell) is None]

    def run_one(self, cell: Audits | Cell, path: Path) -> str:
        if isinstance(cell, Cell):
            perform(cell.recipe(self.changes), path)
            row = row_of(cell, path)
            assert row is not None
            return f"{row['accuracy']:.1%}"
        row = audited(cell)
        keep(path, row)
        told = {f"{f['kind']} {f['rows']:g}": f["auc"]["regularity of blocks"] for f in row["faults"]}
        return ", ".join(f"{name} {value}" for name, value in told.items())

    def collect(self) -> None:
        """Rewrite ``quality.json`` from what is on disk; what was not asked for now stays."""
        with self.store.locked():
            before = self.store.load("quality")
            changes = [*CHANGES, *self.changes]
            same = before.get("changes") == changes
            rows = {_key(row): row for row in before.get("rows", [])} if same else {}
            audits = {(row["setting"], row["seed"]): row for row in before.get("audits", [])}
            for cell in self.cells():
                if (row := self.finished(cell)) is None:
                    continue
                if isinstance(cell, Cell):
                    rows[_key(row)] = row
                else:
                    audits[(row["setting"], row["seed"])] = row
            document = {
                "environment": environment(torch.device("cpu"), torch.float32),
                "recipe": RECIPE.name,
                "changes": changes,
                "struck": {"runs": STRUCK, "audits": AUDITED_STRUCK},
                "seeds": {"runs": SEEDS, "audits": AUDIT_SEEDS},
                "audits": [audits[key] for key in sorted(audits)],
                "rows": [rows[key] for key in sorted(rows)],
            }
            self.store.write("quality", document)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["kind"], row["rows"], row["weights"], row["seed"]


def main() -> None:
    parser = arguments(__doc__, "quality")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds snips/")
    parser.add_argument("--only", default="", help="cells whose label holds one of these, with commas")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of runs")
    parser.add_argument("--audit-seeds", type=int, default=AUDIT_SEEDS)
    parser.add_argument("--set", action="append", default=[], help="key=value over the recipe, for trials")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    only = [text for text in given.only.split(",") if text]
    store = Store(given.runs.resolve(), given.results)
    bench = Quality(store, given.data.resolve(), given.set, given.seeds, given.audit_seeds, only)
    failed: dict[str, str] = {}
    if not (given.list or given.collect):
        folder = partial(lambda runs, cell: cell.folder(runs), store.runs)
        failed = work(bench.left, folder, bench.run_one, bench.collect, store.runs)
    if not given.list:
        bench.collect()
    finish("quality", [cell.label for cell in bench.left()], failed, listed=given.list)


if __name__ == "__main__":
    main()
