"""What a run that is over says: where it stands, how well it did on validation, what it cost.

The test split is never looked at: a plan chooses, and what chooses must not be what is reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from folklora.adapters.lowrank import kind
from folklora.backbones.metric import Metric, metric_of
from folklora.data.audit.entropy import regularity
from folklora.data.audit.quality import tokens_of
from folklora.data.split import histogram
from folklora.data.table import fingerprint
from folklora.errors import RunError
from folklora.federation.run import Summary, read_summary
from folklora.federation.rundir import RunDirectory
from folklora.federation.secrecy import parties
from folklora.federation.setup import data_of, prepare
from folklora.federation.traffic import forecast
from folklora.planning.axes import Cell, cell_of, layers_of, recipe_of
from folklora.recipe import Recipe
from folklora.sections import AdapterSection


@dataclass(frozen=True)
class Observation:
    """One finished run.

    Attributes
    ----------
    value
        Mean validation score over the clients, in the task's metric.
    seconds
        Of all its rounds, where it ran.
    """

    cell: Cell
    seed: int
    value: float
    seconds: float
    run: str


@dataclass(frozen=True)
class Cost:
    """What a combination asks of each client; known without a run.

    Attributes
    ----------
    parameters
        Numbers that a client trains: adapter, head, norms.
    bytes
        Of a client and round, both ways; what travels once is spread over the rounds.
    tokens
        Of all clients' training examples, each counted once.
    """

    parameters: int
    bytes: float
    tokens: int


def cost_of(recipe: Recipe) -> Cost:
    """Without training: see `Cost`."""
    setup = prepare(recipe)
    method, splits = setup.method, setup.data.splits
    owned = method.initial(max(setup.clients, key=lambda client: setup.ranks[client]))
    counts = {c: torch.from_numpy(histogram(setup.data.table, splits[c].train)) for c in setup.clients}
    masked = parties(recipe, len(setup.clients)) if recipe.secure.kind == "masks" else 0
    traffic = forecast(method, counts, recipe.message, masked=masked, sealed=recipe.secure.kind == "ckks")
    return Cost(
        sum(tensor.numel() for name, tensor in owned.items() if kind(name) != "base"),
        traffic.up + traffic.down + traffic.once / max(1, method.rounds()),
        sum(len(setup.encoded[i]) for client in setup.clients for i in splits[client].train),
    )


@dataclass(frozen=True)
class Data:
    """How regular the clients' training texts are, all together (`folklora.data.audit.entropy.regularity`).

    Attributes
    ----------
    ratio
        Approximate entropy over that of the same words in random order; None where it cannot be measured.
    why
        Where it cannot: the reason.
    """

    ratio: float | None
    why: str | None


@lru_cache(maxsize=8)
def _regularity(document: str) -> Data:
    recipe = Recipe.from_toml(document)
    if recipe.form != "text":
        return Data(None, f"examples are of the form {recipe.form}")
    data = data_of(recipe)
    rows = [int(i) for split in data.splits.values() for i in split.train]
    found = regularity(tokens_of([data.table.inputs[i] for i in rows]))
    return Data(found.value, found.why)


def regularity_of(recipe: Recipe) -> Data:
    """Of a recipe's training texts; adapters do not matter."""
    return _regularity(recipe.model_copy(update={"adapter": AdapterSection()}).to_toml())


def observe(path: Path, summary: Summary, cell: Cell, seed: int) -> Observation:
    """From a finished run's summary.

    Raises
    ------
    RunError
        If it has no validation score, or is damaged.
    """
    row: Any = summary.get("row") if isinstance(summary, dict) else None
    if not isinstance(row, dict) or not isinstance(row.get("metric", ""), str):
        raise RunError(f"{path}: summary.json is not what a run writes; allowed: one that no one changed")
    found: dict[str, Any] = {"validation score": row.get("validation_mean"), "time": row.get("seconds_total")}
    for what, value in found.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RunError(f"{path}: the run has no {what} that is a number; allowed: runs that were validated")
    value, seconds = found.values()
    return Observation(cell, seed, float(value), float(seconds), path.name)


def metric_in(summary: Summary) -> Metric:
    """What a run was judged by; of one that `observe` has read."""
    return metric_of(summary["row"])


def read_runs(paths: Sequence[Path], recipe: Recipe) -> list[tuple[Observation, Metric]]:
    """Finished runs of the same recipe but for what is planned: rank, targets, share of the data, seed.

    Raises
    ------
    RunError
        A folder without a finished run, or of another recipe (the first key that differs is named), or with adapters
        in other layers than the topmost ones, or on other examples than the recipe's sources have now.
    """
    found = []
    for path in {path.resolve(): path for path in paths}.values():  # a run is one, however often it is named
        directory = RunDirectory.open(path)
        if not directory.finished:
            raise RunError(f"{path}: the run is not finished; allowed: `folklora resume {path}` first")
        if key := _differs(directory.recipe, recipe):
            raise RunError(
                f"{path}: {key} is not the recipe's; allowed: runs that differ in adapter.rank, adapter.targets, "
                "data.train_share and seed alone"
            )
        cell = cell_of(directory.recipe)
        if layers_of(directory.recipe) != layers_of(recipe_of(cell, recipe, recipe.seed)):
            raise RunError(
                f"{path}: adapts other layers than the topmost {cell.layers} of the recipe's; allowed: runs that adapt "
                "the topmost ones, as `folklora plan` begins them"
            )
        _refuse_other_examples(directory, recipe_of(cell, recipe, directory.recipe.seed))
        summary = read_summary(directory)
        found.append((observe(path, summary, cell, directory.recipe.seed), metric_in(summary)))
    return found


def _refuse_other_examples(directory: RunDirectory, own: Recipe) -> None:
    """A source of the same name may hold something else. Of members that brought their own data nothing is known."""
    path = directory.path / "partition.json"
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise RunError(f"{path}: cannot be read; allowed: what a run writes") from None
    theirs = document.get("fingerprint") if isinstance(document, dict) else None
    if theirs is not None and theirs != fingerprint(data_of(own).table):
        raise RunError(
            f"{directory.path}: its examples are not those of the recipe's data.source; allowed: runs on the same"
        )


def _differs(one: Recipe, other: Recipe) -> str | None:
    a, b = _kept(one), _kept(other)
    for section, value in a.items():
        if value == b[section]:
            continue
        if not isinstance(value, dict):
            return section
        keys = [key for key in {**value, **b[section]} if value.get(key) != b[section].get(key)]
        return f"{section}.{keys[0]}"
    return None


def _kept(recipe: Recipe) -> dict[str, Any]:
    document = recipe.model_dump(exclude={"seed", "track"})
    for section, keys in (
        ("adapter", ("rank", "targets", "device_ranks", "device_shares")),
        ("data", ("train_share",)),
    ):
        for key in keys:
            del document[section][key]
    for section, key in (("data", "source"), ("data", "test"), ("model", "name")):
        if document[section][key]:
            document[section][key] = Path(document[section][key]).name  # a run may have been begun elsewhere
    return document


def as_row(observation: Observation) -> dict[str, Any]:
    """For a document."""
    return asdict(observation)
