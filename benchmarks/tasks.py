"""Methods on the tasks beside text classification: text generation (dolly, shakespeare) and pictures (emoji, fashion).

    python benchmarks/tasks.py                                  # after `make models`; --runs runs/tasks
    python benchmarks/tasks.py --only "emoji,fashion" --methods fedit,celora
    python benchmarks/tasks.py --list                           # what is done and what is left
    python benchmarks/tasks.py --collect                        # only rewrite the results from the runs

Each task is a shipped recipe. The learning rate of every method is chosen by the validation split of seed 0 from one
grid, which goes on where the best is at its end; the run that won is that seed's result, and the other seeds run at its
rate. Test data is read once, at the end of each run. As in `accuracy.py` any number of processes can share ``--runs``:
kill them at any time, what is finished is reused and what was begun goes on. Runs of another checkpoint or other data
lie apart and are never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _common import environment, finish
from accuracy import AT_ONE_RANK
from resumable import Row, Store, arguments, perform, work

from folklora.backbones.metric import metric_of
from folklora.federation.run import run_name, variant
from folklora.methods import METHODS as REGISTRY
from folklora.recipe import Recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SEEDS = 3
LADDER = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1")
GRID = ("1e-3", "3e-3", "1e-2")
"""Rates of the ladder that are tried in any case."""
FEW = ("local", "fedit", "ffa", "fedsa", "celora")
SAME = {*AT_ONE_RANK, "folklora"}
"""What is FedIT where all ranks are equal, and CE-LoRA where the task has no head of its own."""
REST = tuple(name for name, method in REGISTRY.items() if not method.needs_head and name not in {*FEW, *SAME})
METHODS = (*FEW, *REST, "folklora:basis=frozen")
UNTRAINED = "local:train.rounds=0"
"""The checkpoint as it comes: what all methods start from."""


@dataclass(frozen=True)
class Task:
    """A recipe, and what is another in it.

    Generation is left to `folklora run`: it costs more than the training does, and says little of models this small.
    """

    name: str
    file: str
    changes: tuple[str, ...] = ()
    methods: tuple[str, ...] = METHODS

    def recipe(self) -> Recipe:
        return Recipe.read(RECIPES / self.file, ["eval.generate=[]", *self.changes])

    def made_of(self) -> str:
        """In short what its results rest on beside the methods: the recipe, the weights, the examples."""
        # Without what is as by default: a key that is new since says nothing of these runs.
        document = self.recipe().model_dump(mode="json", exclude_defaults=True)
        files = Path(document["model"].pop("name")) / "model.safetensors", Path(document["data"].pop("source"))
        told = [document, *(_digest(file) for file in files)]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


NEW = 'model.template="Question: {}\\nAnswer: "'
"""Prompts in a format that the checkpoint never met: it was pretrained on such texts, little else is left."""
SHORT = (NEW, "train.rounds=3", "train.batch_size=2", "model.max_length=96")
"""The language models' runs are made shorter than their recipes: there are hundreds of them, of half a minute each."""
DOLLY = (*SHORT, "data.limit=480")

TASKS = (
    Task("fashion, Dirichlet 0.5", "fashion.toml"),
    Task("emoji by group", "emoji.toml"),
    Task("shakespeare by role", "shakespeare.toml", (*SHORT, "data.min_examples=80")),
    Task("dolly by category", "dolly.toml", DOLLY),
    Task(
        "dolly, Dirichlet 0.5",
        "dolly.toml",
        (*DOLLY, "data.partition=dirichlet", "data.clients=8", "data.alpha=0.5"),
        (*FEW, "folklora:basis=frozen"),
    ),
)


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Cell:
    """One run: a variant of a task, as `folklora compare --methods` takes it, at a learning rate and with a seed."""

    task: Task
    variant: str
    rate: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.task.name}: {self.variant}, lr {self.rate}, seed {self.seed}"

    @property
    def entry(self) -> str:
        return f"{self.variant}:train.lr={self.rate}"

    def folder(self, runs: Path) -> Path:
        name = re.sub(r"[^\w.]+", "-", self.task.name).strip("-")
        return runs / f"{name}-{self.task.made_of()}" / run_name(self.entry, self.seed)


def grid(variant: str, merits: Mapping[str, float]) -> tuple[str, ...]:
    """The rates to be tried, as far as the merits of those that were tell.

    While the best is the highest rate tried (or as good as any, where nothing was learned yet), the next higher one is
    tried, too; while it is the lowest, the next lower one.
    """
    if variant == UNTRAINED:
        return GRID[:1]
    low, high = LADDER.index(GRID[0]), LADDER.index(GRID[-1]) + 1
    while merits.keys() >= set(LADDER[low:high]):
        own = [merits[rate] for rate in LADDER[low:high]]
        if own[-1] >= max(own) and high < len(LADDER):
            high += 1
        elif own[0] > max(own[1:]) and low:
            low -= 1
        else:
            break
    return LADDER[low:high]


@dataclass
class Tasks:
    """Where runs and results lie; what has been read of them."""

    bench: Store  # its files, and the lock on them
    tasks: Sequence[Task]
    methods: Sequence[str] = ()  # none: each task's own
    read: dict[Path, Row] = field(default_factory=dict)
    held: dict[str, Any] = field(init=False)  # ``tasks.json`` as it was last read: runs are not kept for ever

    def __post_init__(self) -> None:
        self.held = self.bench.load("tasks")

    def variants(self, task: Task) -> tuple[str, ...]:
        return (UNTRAINED, *(self.methods or task.methods))

    def finished(self, cell: Cell) -> Row | None:
        path = cell.folder(self.bench.runs)
        if path not in self.read:
            if not (path / "summary.json").exists():
                return None
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            self.read[path] = {**summary["row"], "clients": len(summary["clients"])}
        return self.read[path]

    def _told(self, task: Task) -> dict[str, Any]:
        """What was collected of a task as it is now."""
        told: dict[str, Any] = self.held.get("tasks", {}).get(task.name, {})
        return told if told.get("made_of") == task.made_of() else {}

    def _collected(self, cell: Cell) -> bool:
        """Whether all that the tables need of a run was collected before."""
        told, rate = self._told(cell.task), float(cell.rate)
        rows = (row for row in self.held.get("rows", []) if told and row["task"] == cell.task.name)
        if any((row["variant"], row["seed"], row["lr"]) == (cell.variant, cell.seed, rate) for row in rows):
            return True
        known = cell.rate in told.get("validation", {}).get(cell.variant, {})
        return cell.seed == 0 and known and self.chosen(cell.task, cell.variant) != cell.rate

    def validation(self, task: Task, variant: str) -> dict[str, float]:
        """Rate -> the merit of its validation score, of the runs that are done."""
        found = dict(self._told(task).get("validation", {}).get(variant, {}))
        for rate in LADDER:
            if (row := self.finished(Cell(task, variant, rate, 0))) is not None:
                found[rate] = metric_of(row).merit(row["validation_mean"])
        return found

    def chosen(self, task: Task, variant: str) -> str | None:
        found = self.validation(task, variant)
        rates = grid(variant, found)
        return max(rates, key=found.__getitem__) if found.keys() >= set(rates) else None

    def plan(self) -> Iterator[Cell]:
        """All runs: the rates of seed 0 of every task first, then the other seeds at the rates that are chosen."""
        tried = [
            (task, name, grid(name, self.validation(task, name))) for task in self.tasks for name in self.variants(task)
        ]
        for further in (False, True):  # what is beyond the grid comes last
            for task, name, rates in tried:
                yield from (Cell(task, name, rate, 0) for rate in rates if (rate not in GRID) == further)
        for seed in range(1, SEEDS):
            for task in self.tasks:
                for name in self.variants(task):
                    yield Cell(task, name, self.chosen(task, name) or "", seed)

    def left(self) -> list[Cell]:
        cells = self.plan()
        return [cell for cell in cells if not cell.rate or (self.finished(cell) is None and not self._collected(cell))]

    def ready(self) -> list[Cell]:
        """What is left and whose rate is known."""
        return [cell for cell in self.left() if cell.rate]

    def collect(self) -> None:
        """Rewrite ``tasks.json`` from the runs on disk; rows of tasks and methods not asked for now stay."""
        with self.bench.locked():
            before = self.held = self.bench.load("tasks")
            rows = {(row["task"], row["variant"], row["seed"]): row for row in before.get("rows", [])}
            told = dict(before.get("tasks", {}))
            for task in self.tasks:
                made_of = task.made_of()
                if told.get(task.name, {}).get("made_of") != made_of:
                    rows = {key: row for key, row in rows.items() if key[0] != task.name}
                    told[task.name] = {**_described(task), "made_of": made_of, "variants": [], "validation": {}}
                here = told[task.name]
                for name in self.variants(task):
                    here["variants"] = list(dict.fromkeys([*here["variants"], name]))
                    merits = self.validation(task, name)
                    here["validation"] = {**here["validation"], name: merits} if merits else here["validation"]
                    rate = self.chosen(task, name)
                    if rate:  # another one may have won since
                        own = (task.name, name)
                        rows = {k: row for k, row in rows.items() if k[:2] != own or row["lr"] == float(rate)}
                    for seed in range(SEEDS) if rate else ():
                        if (row := self.finished(Cell(task, name, rate, seed))) is not None:
                            known = {"task": task.name, "variant": name, "lr": float(rate)}
                            rows[task.name, name, seed] = {**row, **known}
            order = {task.name: place for place, task in enumerate(TASKS)}
            where = environment(torch.device("cpu"), torch.float32)
            checkpoints = before.get("checkpoints", {}) | _checkpoints(self.tasks)
            document = {
                "environment": where,
                "grid": GRID,
                "ladder": LADDER,
                "seeds": SEEDS,
                "checkpoints": checkpoints,
            }
            told = {name: told[name] for name in order if name in told}  # what is listed no more is shown no more
            kept = [row for row in rows.values() if row["task"] in order]
            self.bench.write("tasks", {**before, **document, "tasks": told, "rows": kept})


def _described(task: Task) -> dict[str, Any]:
    """What the tables tell of a task."""
    recipe = task.recipe()
    data, train = recipe.data, recipe.train
    split = f"by {data.by}" if data.partition == "natural" else f"{data.partition} {data.alpha:g}"
    told = {"recipe": task.file, "task": recipe.model.task, "split": split, "examples": data.limit}
    return {**told, "rounds": train.rounds, "batch": train.batch_size}


def _checkpoints(tasks: Sequence[Task]) -> dict[str, Any]:
    """How good they are before, as their pretraining states it beside them."""
    folders = {Path(task.recipe().model.name) for task in tasks}
    files = {folder.name: folder / "quality.json" for folder in sorted(folders)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def run_one(cell: Cell, path: Path) -> str:
    row = perform(variant(cell.task.recipe(), cell.entry, cell.seed), path)
    metric = metric_of(row)
    return f"{metric.words} {metric.show(row[metric.name + '_mean'])}"


def main() -> None:
    parser = arguments(__doc__, "tasks")
    parser.add_argument("--only", default="", help="tasks whose name holds one of these, with commas")
    parser.add_argument("--methods", default="", help="as `folklora compare --methods`; by default a task's own")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    only = [text for text in given.only.split(",") if text]
    chosen = [task for task in TASKS if not only or any(text in task.name for text in only)]
    methods = [name for name in given.methods.split(",") if name]
    bench = Store(given.runs.resolve(), given.results)
    try:
        tasks = Tasks(bench, chosen, methods)
        left = tasks.left()
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}; `make models` makes it") from None
    failed: dict[str, str] = {}
    if not (given.list or given.collect):
        failed = work(tasks.ready, lambda cell: cell.folder(bench.runs), run_one, tasks.collect, bench.runs)
    if not given.list:
        tasks.collect()
        left = tasks.left()
    finish("tasks", [cell.label for cell in left], failed, listed=given.list)


if __name__ == "__main__":
    main()
