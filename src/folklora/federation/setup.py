"""From a recipe to everything a run needs: data, clients, backbone, task, method.

Loading is cached within a process, because `compare` runs many methods over the same data and the same backbone; a file
that changed on disk since is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.backbones import tasks
from folklora.backbones.task import Task
from folklora.data.partition import Split, partition
from folklora.data.sources import Table, load
from folklora.errors import RecipeError
from folklora.federation.budget import Budget
from folklora.federation.guarantees import refuse_unsound
from folklora.federation.sealing import refuse_unmixable
from folklora.federation.secrecy import refuse_unmaskable
from folklora.methods import build, check_options
from folklora.methods.base import Method
from folklora.methods.contract import Context
from folklora.privacy import example
from folklora.randomness import derive
from folklora.recipe import Recipe
from folklora.sections import EMBEDDED_NAMES, AdapterSection, DataSection, Form, ModelSection
from folklora.training.generation import refuse_speechless
from folklora.training.prediction import features


@dataclass(frozen=True)
class FederatedData:
    """Examples, who holds which, and the common test set if there is one."""

    table: Table
    splits: Mapping[str, Split]
    test: Table | None


@dataclass(frozen=True)
class Setup:
    """A recipe made real.

    Attributes
    ----------
    encoded, test_encoded
        Every example of the table and of the common test set, as the task encodes them.
    frozen_features
        [n, width] float32: the frozen backbone's features of every example; computed once, when first asked for.
    """

    recipe: Recipe
    data: FederatedData
    task: Task
    method: Method
    encoded: list[Any]
    test_encoded: list[Any]
    frozen_features: Callable[[], Tensor]

    @property
    def ranks(self) -> Mapping[str, int]:
        return self.method.context.ranks

    def sizes(self, client: str) -> dict[str, int]:
        """How many examples a client has in each split."""
        split = self.data.splits[client]
        return {part: len(getattr(split, part)) for part in ("train", "validation", "test")}

    def examples(self, indices: np.ndarray) -> tuple[list[Any], np.ndarray]:
        return [self.encoded[i] for i in indices], self.data.table.labels[indices]


def validate(recipe: Recipe) -> None:
    """Everything that can be refused before data or a model is touched."""
    check_options(recipe.method.name, recipe.method.options)


def refuse_too_few(recipe: Recipe, clients: int) -> None:
    """Raises RecipeError if a round never has as many clients as it needs."""
    sampled = recipe.train.sampled(clients)
    if recipe.engine.min_clients > sampled:
        raise RecipeError(
            f"engine.min_clients = {recipe.engine.min_clients}, of {clients} clients {sampled} are sampled a round; "
            f"allowed: at most {sampled}"
        )


def prepare(recipe: Recipe) -> Setup:
    """Load what the recipe names; the cheap refusals come first."""
    validate(recipe)
    _forget_changed_files(recipe)
    data = federated_data(recipe.data, recipe.seed, recipe.form)
    refuse_too_few(recipe, len(data.splits))
    ranks = client_ranks(recipe, list(data.splits))
    task = task_of(recipe, data.table.classes)
    method = build(recipe.method.name, recipe.method.options, context(recipe, task, ranks))
    key = (recipe.model, _key(recipe.adapter), recipe.data, recipe.seed, recipe.form)
    example.refuse(recipe, method)
    refuse_unsound(recipe, method)
    refuse_unmaskable(recipe, method)
    refuse_unmixable(recipe, method)
    encoded, test_encoded = _encode(*key)
    setup = Setup(recipe, data, task, method, encoded, test_encoded, partial(_compute_features, *key))
    Budget(recipe, method, setup.sizes).refuse_if_empty()
    return setup


def context(recipe: Recipe, task: Task, ranks: Mapping[str, int]) -> Context:
    """What a method may know on either side."""
    backbone = task.backbone
    norms = {
        f"norm/{n}.{part}": t
        for n, pair in backbone.norms.items()
        for part, t in zip(("weight", "bias"), pair, strict=True)
    }
    return Context(
        seed=recipe.seed,
        ranks=ranks,
        sites=backbone.sites,
        alpha=recipe.adapter.alpha,
        dropout=recipe.adapter.dropout,
        classes=task.classes,
        width=task.width,
        head=task.head_shapes(),
        norms=norms,
        rounds=recipe.train.rounds,
        learning_rate=recipe.train.lr,
        batch_size=recipe.train.batch_size,
        local_epochs=recipe.train.local_epochs,
        optimizer=recipe.train.optimizer,
        weight=backbone.weight,
        momentum=recipe.train.momentum,
        promote=recipe.adapter.promote,
        promote_share=recipe.adapter.promote_share,
    )


def client_ranks(recipe: Recipe, clients: list[str]) -> dict[str, int]:
    """Client id -> rank at the start: by device class, one number for all, or the recipe's list in the clients' order.

    Classes get their shares of the clients, rounded by largest remainder; who is in which follows from the seed and the
    clients' ids.
    """
    classes = recipe.adapter.device_ranks
    if classes is not None:
        shares = recipe.adapter.device_shares or [1 / len(classes)] * len(classes)
        counts = largest_remainder([share * len(clients) for share in shares])
        dealt = [rank for rank, count in zip(classes, counts, strict=True) for _ in range(count)]
        order = sorted(clients, key=lambda client: derive(recipe.seed, "device", client))
        ranks = dict(zip(order, dealt, strict=True))
        return {client: ranks[client] for client in clients}
    rank = recipe.adapter.rank
    if isinstance(rank, int):
        return dict.fromkeys(clients, rank)
    if len(rank) != len(clients):
        raise RecipeError(
            f"adapter.rank lists {len(rank)} ranks for {len(clients)} clients; allowed: one number, or one a client"
        )
    return dict(zip(clients, rank, strict=True))


_last_seen: dict[str, tuple[tuple[str, int, int], ...]] = {}


def _forget_changed_files(recipe: Recipe) -> None:
    """Empty the caches if a file they were filled from has another size or time than then."""
    changed = False
    for name in (recipe.data.source, recipe.data.test, recipe.model.name):
        if name is None or name in EMBEDDED_NAMES:
            continue
        path = Path(name)
        files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
        found = [(str(file), file.stat()) for file in files if file.is_file()]
        now = tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in found)
        changed |= _last_seen.get(name, now) != now
        _last_seen[name] = now
    if changed:
        tasks.forget()
        for cached in (federated_data, _encode, _compute_features):
            cached.cache_clear()


def largest_remainder(parts: Sequence[float]) -> list[int]:
    """Whole numbers near ``parts`` with the same sum, which must be whole; of equal remainders the first rounds up."""
    counts = [int(part + 1e-9) for part in parts]  # 0.3 * 10 may be a little below 3
    missing = round(sum(parts)) - sum(counts)
    for i in sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i], i))[:missing]:
        counts[i] += 1
    return counts


@lru_cache(maxsize=4)
def federated_data(section: DataSection, seed: int, form: Form = "text") -> FederatedData:
    table, test = load(section, seed, form)
    return FederatedData(table, partition(table, section, seed), test)


def task_of(recipe: Recipe, classes: Sequence[str]) -> Task:
    """The recipe's task for examples of these classes."""
    task = tasks.build_task(recipe.model, recipe.adapter, recipe.form, classes)
    if recipe.eval.generate:
        refuse_speechless(task)
    return task


# A rank list is not hashable; what the caches depend on is the model, the targets and the data.
def _key(adapter: AdapterSection) -> AdapterSection:
    return AdapterSection(targets=adapter.targets, norm=adapter.norm, tower=adapter.tower)


@lru_cache(maxsize=4)
def _encode(
    model: ModelSection, adapter: AdapterSection, data: DataSection, seed: int, form: Form
) -> tuple[list[Any], list[Any]]:
    found = federated_data(data, seed, form)
    task = tasks.build_task(model, adapter, form, found.table.classes)
    return task.encode(found.table.inputs), task.encode(found.test.inputs) if found.test else []


@lru_cache(maxsize=4)
def _compute_features(model: ModelSection, adapter: AdapterSection, data: DataSection, seed: int, form: Form) -> Tensor:
    encoded, _ = _encode(model, adapter, data, seed, form)
    task = tasks.build_task(model, adapter, form, federated_data(data, seed, form).table.classes)
    return torch.from_numpy(features(task, encoded))
