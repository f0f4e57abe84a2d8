"""A shared block in fewer and longer steps: what it costs in accuracy, what it saves in time, and what travels.

    python benchmarks/depth.py --runs runs/depth               # after `make models`
    python benchmarks/depth.py --only fedit --seed 0
    python benchmarks/depth.py --time                          # only measure time, on one thread
    python benchmarks/depth.py --list                          # what is done and what is left
    python benchmarks/depth.py --collect                       # only rewrite the results from the runs

Banking77, ten clients of unequal label mix, fine-tuned by federated LoRA on `models/tiny-albert`, whose one block is
applied T = 6 times: over depths (each minibatch draws its number of steps K), at full depth alone, and at half of it
alone; and on the first layers of MiniLM, which have weights of their own, fine-tuned in the same way. As many layers as
steps cost the same time, so the two are compared at equal K. Where ``models/tiny-albert-full`` is there (made as
tiny-albert is, with ``examples/distil_shared_depth.py --full-depth-alone``), it is fine-tuned at full depth, too: a
block that never saw another depth. The model of each run is then tested once at every K that
it can be run at, and the one over depths also at the K that each client chooses on its own validation split. Learning
rates are chosen on validation data, with a seed and examples of their own. Any number of processes can share
``--runs``: kill them at any time, what is finished is reused and what was begun goes on.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, finish, spread
from resumable import Row, Store, arguments, keep, kept, perform, work

from folklora.backbones.loading import find, pretrained, tokenizer_of
from folklora.data.sources import load
from folklora.federation.answers import pool_of
from folklora.federation.depth_choice import at_depth
from folklora.federation.run import ClientModel, client_models
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import task_of
from folklora.recipe import Recipe
from folklora.training.prediction import features

MODELS = Path(__file__).resolve().parents[1] / "models"
SHARED, AT_FULL = "tiny-albert", "tiny-albert-full"
"""Distilled over depths; and, if it is there, at full depth alone."""
SEEDS = 3
TUNING_SEED = 100
RATES = ("1e-3", "3e-3", "1e-2")
METHODS = {"fedit": {"name": "fedit", "head_start": "sketched"}, "folklora": {"name": "folklora"}}
FULL = 6
TRAIN = (3, 4, 6)
DATA = {"source": "banking77", "clients": 10, "partition": "dirichlet", "alpha": 0.5, "limit": 1500, "test_limit": 2000}
TUNING = {**DATA, "limit": 800, "test_limit": 100}
PAIRS = 15
BATCHES = (1, 32)
TEXTS = 32


@dataclass(frozen=True)
class Variant:
    """A backbone and how often its block is applied in training.

    Attributes
    ----------
    layers
        The first so many of MiniLM's; None: the shared block.
    depth
        The recipe's ``[depth]``.
    shared
        The folder of the shared block, in ``models``.
    """

    name: str
    layers: int | None = None
    depth: tuple[tuple[str, Any], ...] = ()
    shared: str = SHARED

    @property
    def steps(self) -> tuple[int, ...]:
        """What a model of it is tested at."""
        if self.layers is not None:
            return (self.layers,)
        return tuple(range(1, FULL + 1))


OVER = Variant("shared block, over depths", depth=(("train", TRAIN),))
VARIANTS = (
    OVER,
    Variant("shared block, at 6 alone"),
    Variant("shared block, at 3 alone", depth=(("steps", 3),)),
    *(Variant(f"MiniLM, first {layers} layers", layers) for layers in (3, 2, 4, 6)),
    *(
        (Variant("shared block, distilled at 6 alone too", shared=AT_FULL),)
        if (MODELS / AT_FULL / "quality.json").exists()
        else ()
    ),
)


@dataclass(frozen=True)
class Cell:
    """One run; without a rate, at the one that was chosen."""

    method: str
    variant: Variant
    seed: int
    rate: str | None = None

    @property
    def label(self) -> str:
        return f"{self.method}; {self.variant.name}; " + (f"rate {self.rate}" if self.rate else f"seed {self.seed}")

    def folder(self, runs: Path) -> Path:
        variant = re.sub(r"\W+", "-", self.variant.name)
        return runs / self.method / variant / (f"tuning-{self.rate}" if self.rate else f"seed-{self.seed}")


def shallow(layers: int, folder: Path) -> Path:
    """The first layers of MiniLM as a model of its own, written once."""
    path = folder / f"minilm-{layers}"
    if not path.exists():
        from transformers import AutoModel

        model = pretrained("minilm", AutoModel, unused="pooler.")
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
        temporary = folder / f".minilm-{layers}.{os.getpid()}"
        model.save_pretrained(temporary)
        tokenizer_of("minilm").save_pretrained(temporary)
        try:
            temporary.replace(path)
        except OSError:  # another process was first
            if not path.exists():
                raise
    return path


def backbone_of(variant: Variant, runs: Path) -> str:
    if variant.layers is None:
        return find(str(MODELS / variant.shared))
    return find("minilm") if variant.layers == FULL else str(shallow(variant.layers, runs / "models"))


def recipe_of(cell: Cell, rate: str, runs: Path) -> Recipe:
    return Recipe.parse(
        {
            "seed": cell.seed,
            "model": {"name": backbone_of(cell.variant, runs), "pooling": "mean"},
            "data": TUNING if cell.rate else DATA,
            "method": METHODS[cell.method],
            "depth": dict(cell.variant.depth),
            "train": {"rounds": 5, "batch_size": 16, "lr": float(rate)},
        }
    )


# -- accuracy ----------------------------------------------------------------------------------------------------------


def scores(models: Mapping[str, ClientModel], split: str, round: int) -> dict[str, float]:
    """Client -> the accuracy of its model on its examples of this split."""
    setup = next(iter(models.values())).setup
    asked, owned = [], {}
    for client in models:
        examples, labels = setup.examples(getattr(setup.split(client, round), split))
        owned[client] = slice(len(asked), len(asked) + len(examples)), labels
        asked += [(client, example) for example in examples]
    answers = pool_of(models).answers(asked)
    return {client: setup.task.score(answers[own], labels).value for client, (own, labels) in owned.items()}


def measured(cell: Cell, path: Path) -> Row:
    """What the finished run's models reach at every number of steps, mean over clients."""
    models = client_models(path)
    checkpoint = RunDirectory.open(path).checkpoint()
    assert checkpoint is not None  # it is finished
    shared = cell.variant.layers is None
    found: dict[str, dict[int, dict[str, float]]] = {"validation": {}, "test": {}}
    for steps in cell.variant.steps:
        stepping = {c: replace(model, steps=steps) if shared else model for c, model in models.items()}
        for split, each in found.items():
            each[steps] = scores(stepping, split, checkpoint.round + 1)
    row: Row = {
        split: {str(steps): round(float(np.mean(list(own.values()))), 6) for steps, own in each.items()}
        for split, each in found.items()
    }
    if cell.variant == OVER:
        chosen = {client: at_depth(path, model, "auto").steps for client, model in models.items()}
        own = [found["test"][steps][client] for client, steps in chosen.items() if steps is not None]
        row["auto"] = {"steps": list(chosen.values()), "test": round(float(np.mean(own)), 6)}
    return row


@dataclass
class Depth:
    """Where runs and results lie, and what is asked for."""

    store: Store
    only: Sequence[str]
    seeds: Sequence[int]

    def plan(self) -> Iterator[Cell]:
        """Rates first; then one seed of everything before the next."""
        for method in METHODS:
            cells = [Cell(method, variant, TUNING_SEED, rate) for variant in VARIANTS for rate in RATES]
            cells += [Cell(method, variant, seed) for seed in self.seeds for variant in VARIANTS]
            yield from (cell for cell in cells if not self.only or any(text in cell.label for text in self.only))

    def finished(self, cell: Cell) -> Row | None:
        return kept(cell.folder(self.store.runs))

    def left(self) -> list[Cell]:
        return [cell for cell in self.plan() if self.finished(cell) is None]

    def ready(self) -> list[Cell]:
        """What is left and does not wait for its rate."""
        return [cell for cell in self.left() if self.rate(cell) is not None]

    def rate(self, cell: Cell) -> str | None:
        """A cell's learning rate: of its own variant, that of the best validation accuracy; None: not known yet."""
        if cell.rate is not None:
            return cell.rate
        tried = {rate: self.finished(replace(cell, seed=TUNING_SEED, rate=rate)) for rate in RATES}
        return max(tried, key=lambda rate: tried[rate]["validation"]) if all(tried.values()) else None  # type: ignore[index]

    def run_one(self, cell: Cell, path: Path) -> str:
        rate = self.rate(cell)
        assert rate is not None  # or it would not be ready
        own = perform(recipe_of(cell, rate, self.store.runs), path)
        row: Row = {"method": cell.method, "variant": cell.variant.name, "rate": rate, "seed": cell.seed}
        if cell.rate:
            row["validation"] = own["validation_mean"]
            words = f"validation {100 * row['validation']:.1f}"
        else:
            row |= {way: own[f"{way}_per_client_round"] for way in ("bytes_up", "bytes_down")}
            row |= measured(cell, path)
            words = ", ".join(f"K = {steps} {100 * value:.1f}" for steps, value in row["test"].items())
        keep(path, row)
        return words

    def collect(self, times: Sequence[Row] | None = None) -> None:
        """Rewrite ``depth.json`` from the cells on disk; what was not asked for now stays."""
        with self.store.locked():
            before = self.store.load("depth")
            rows = {_key(row): row for row in before.get("rows", [])}
            found = [row for cell in self.plan() if cell.rate is None and (row := self.finished(cell)) is not None]
            rows |= {_key(row): row for row in found}
            quality = MODELS / SHARED / "quality.json"
            document = {
                "environment": environment(torch.device("cpu"), torch.float32),
                "seeds": SEEDS,
                "trained": list(TRAIN),
                "backbone": json.loads(quality.read_text(encoding="utf-8")) if quality.exists() else None,
                "times": list(times) if times is not None else before.get("times", []),
            }
            self.store.write("depth", {**document, "rows": [rows[key] for key in sorted(rows)]})


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["method"], row["variant"], row["seed"]


# -- time --------------------------------------------------------------------------------------------------------------


def times(runs: Path) -> list[Row]:
    """Milliseconds a text of every number of steps, and how many times as fast as all steps it is.

    Pairs: all steps, then fewer, then all again, so that whatever else the machine does meets both. Texts of Banking77
    at their natural length, already tokenised; the frozen backbone in float32, which is what a client's model costs
    whose adapter is merged into it.
    """

    def clock(variant: Variant, steps: int | None) -> tuple[Callable[[int], float], int]:
        recipe = recipe_of(Cell("fedit", variant, 0), RATES[0], runs)
        table, _ = load(recipe.data, 0, recipe.form)
        task = task_of(recipe, table.classes)
        examples = task.encode(table.inputs[:TEXTS])

        def taken(batch: int) -> float:
            started = time.perf_counter()
            for start in range(0, TEXTS, batch):
                features(task, examples[start : start + batch], depth=steps)
            return 1000 * (time.perf_counter() - started) / TEXTS

        taken(TEXTS)  # what is made at the first pass
        return taken, task.backbone.parameters

    found = []
    whole, _ = clock(VARIANTS[1], None)
    others = [(VARIANTS[1], steps) for steps in range(1, FULL + 1)]
    others += [(variant, None) for variant in VARIANTS if variant.layers is not None]
    for variant, steps in others:
        other, parameters = clock(variant, steps)
        for batch in BATCHES:
            pairs = [(whole(batch), other(batch)) for _ in range(PAIRS)]
            found.append(
                {
                    "backbone": "shared block" if variant.layers is None else "MiniLM",
                    "steps": steps or variant.layers,
                    "batch": batch,
                    "parameters": parameters,
                    "milliseconds": spread([own for _, own in pairs]),
                    "speed_up": spread([all_steps / own for all_steps, own in pairs]),
                }
            )
    return found


def main() -> None:
    parser = arguments(__doc__, "depth")
    parser.add_argument("--only", default="", help="cells whose label holds one of these, with commas")
    parser.add_argument("--seed", default="", help="only these seeds, with commas")
    parser.add_argument("--time", action="store_true", help="measure time on one thread; run nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1 if given.time else given.threads)
    runs = given.runs.resolve()
    only = [text for text in given.only.split(",") if text]
    seeds = [int(text) for text in given.seed.split(",") if text] or list(range(SEEDS))
    depth = Depth(Store(runs, given.results), only, seeds)
    failed: dict[str, str] = {}
    if not (given.list or given.collect or given.time):
        failed = work(depth.ready, lambda cell: cell.folder(runs), depth.run_one, depth.collect, runs)
    if not given.list:
        depth.collect(times(runs) if given.time else None)
    finish("depth", [cell.label for cell in depth.left()], failed, listed=given.list)


if __name__ == "__main__":
    main()
