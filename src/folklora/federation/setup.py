"""From a recipe to everything a run needs: data, clients, backbone, task, method.

Loading is cached within a process, because `compare` runs many methods over the same data and the same backbone; a file
that changed on disk since is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.backbones import tasks
from folklora.backbones.task import Task
from folklora.data.drift import drifted
from folklora.data.partition import partition
from folklora.data.sources import Table, load
from folklora.data.split import Split
from folklora.data.table import encoded
from folklora.errors import RecipeError
from folklora.federation.budget import Budget
from folklora.federation.depths import Depths, depths_of, refuse_fixed
from folklora.federation.guarantees import refuse_unsound
from folklora.federation.sampling import newcomers
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
from folklora.training.network import network_of
from folklora.training.prediction import features


@dataclass(frozen=True)
class FederatedData:
    """Examples, who holds which, and the common test set if there is one; ``later`` is what those clients have from
    ``drift.round`` on whose data change."""

    table: Table
    splits: Mapping[str, Split]
    test: Table | None
    later: Mapping[str, Split] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """A recipe made real.

    Attributes
    ----------
    encode
        Every example of the table and of the common test set, as the task encodes them; done once, when first asked
        for: who only hands a model on asks for none.
    frozen_features
        [n, width] float32: the frozen backbone's features of every example, in as many steps as are named (default:
        the backbone's); computed once, when first asked for.
    joining
        The method as the recipe's newcomers have it, and the server when it answers them; None: there are none.
    depths
        How often clients apply a shared block; None: as often as the backbone does.
    """

    recipe: Recipe
    data: FederatedData
    task: Task
    method: Method
    encode: Callable[[], tuple[list[Any], list[Any]]]
    frozen_features: Callable[..., Tensor]
    joining: Method | None = None
    depths: Depths | None = None

    @cached_property
    def encoded(self) -> list[Any]:
        return self.encode()[0]

    @cached_property
    def test_encoded(self) -> list[Any]:
        return self.encode()[1]

    @property
    def clients(self) -> tuple[str, ...]:
        """Those who take part in rounds."""
        return self.method.context.clients

    @property
    def newcomers(self) -> tuple[str, ...]:
        """Those who take part in none."""
        return () if self.joining is None else self.joining.context.clients[len(self.clients) :]

    @property
    def ranks(self) -> Mapping[str, int]:
        """Of all of them."""
        return (self.joining or self.method).context.ranks

    def steps(self, client: str) -> int | None:
        """How often a client applies a shared block, or may; None: as often as the backbone does."""
        return None if self.depths is None else self.depths.most[client]

    def method_of(self, client: str) -> Method:
        """The method as this client has it."""
        return self.method if self.joining is None or client in self.method.context.ranks else self.joining

    def split(self, client: str, round: int) -> Split:
        """What a client has in a round; 0 is before the first."""
        later = self.data.later if round >= self.recipe.drift.round else {}
        return later.get(client, self.data.splits[client])

    def sizes(self, client: str, round: int = 0) -> dict[str, int]:
        """How many examples a client has in each split."""
        split = self.split(client, round)
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


def prepare(recipe: Recipe, *, encoding: bool = True) -> Setup:
    """Load what the recipe names; the cheap refusals come first.

    ``encoding`` says whether examples are encoded now, so that one that cannot be is told of before work starts; else
    they are when they are needed.
    """
    validate(recipe)
    _forget_changed_files(recipe)
    data = data_of(recipe)
    ranks = client_ranks(recipe, list(data.splits))
    refuse_too_few(recipe, len(ranks) - len(joining_late(recipe, list(ranks))))
    task = task_of(recipe, data.table.classes)
    method, joining = build_methods(recipe, task, ranks)
    _refuse_late_change(recipe, method)
    depths = client_depths(recipe, task, list(ranks))
    key = (recipe.model, _key(recipe.adapter), recipe.data, recipe.seed, recipe.form, steps_of(recipe))
    example.refuse(recipe, method)
    refuse_fixed(recipe, method)
    refuse_unsound(recipe, method)
    refuse_unmaskable(recipe, method)
    refuse_unmixable(recipe, method)
    setup = Setup(recipe, data, task, method, partial(_encode, *key), partial(_compute_features, *key), joining, depths)
    if encoding:
        setup.encode()
    Budget(recipe, method, setup.sizes).refuse_if_empty()
    return setup


def _refuse_late_change(recipe: Recipe, method: Method) -> None:
    if recipe.drift.kind != "none" and recipe.drift.round > method.rounds():
        raise RecipeError(
            f'drift.round = {recipe.drift.round}, and method.name = "{method.name}" plays {method.rounds()} rounds; '
            "allowed: a round that is played"
        )


def joining_late(recipe: Recipe, clients: Sequence[str]) -> tuple[str, ...]:
    """The recipe's newcomers among these clients.

    Raises
    ------
    RecipeError
        If nobody would be one, or everybody; or the server could make nothing for them.
    """
    share = recipe.newcomers.share
    if not share:
        return ()
    found = newcomers(share, recipe.seed, clients)
    if not 0 < len(found) < len(clients):
        allowed = f"a share that is 1 to {len(clients) - 1} of them" if len(clients) > 1 else "two clients or more"
        raise RecipeError(
            f"newcomers.share = {share:g} of {len(clients)} clients is {'everybody' if found else 'nobody'}; "
            f"allowed: 0, or {allowed}"
        )
    if recipe.secure.kind == "ckks":
        raise RecipeError(
            f'newcomers.share = {share:g} with secure.kind = "ckks": a server that cannot read what it has makes no '
            'start of it; allowed: secure.kind = "none" or "masks"'
        )
    return found


def build_methods(recipe: Recipe, task: Task, ranks: Mapping[str, int]) -> tuple[Method, Method | None]:
    """The method of those who take part in rounds, and as newcomers have it, if there are any.

    Newcomers stand behind the others in their method's context, which has no rounds: they are in none. The server made
    nothing wider than the widest of the others, so they are as wide as that at most.
    """
    late = joining_late(recipe, list(ranks))
    theirs = {client: rank for client, rank in ranks.items() if client not in late}
    agreed = context(recipe, task, theirs)
    method = build(recipe.method.name, recipe.method.options, agreed)
    if not late:
        return method, None
    most = max(theirs.values())
    everybody = {**theirs, **{client: min(ranks[client], most) for client in late}}
    joining = replace(agreed, ranks=everybody, rounds=0)
    return method, build(recipe.method.name, recipe.method.options, joining)


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
        head_rate=recipe.train.head_rate,
        batch_size=recipe.train.batch_size,
        local_epochs=recipe.train.local_epochs,
        optimizer=recipe.train.optimizer,
        weight=backbone.weight,
        momentum=recipe.train.momentum,
        promote=recipe.adapter.promote,
        promote_share=recipe.adapter.promote_share,
        newcomers=recipe.newcomers.share > 0,
        network=network_of(task),
    )


def client_ranks(recipe: Recipe, clients: list[str]) -> dict[str, int]:
    """Client id -> rank at the start: by device class, one number for all, or the recipe's list in the clients' order.

    Classes get their shares of the clients, rounded by largest remainder; who is in which follows from the seed and the
    clients' ids.
    """
    classes = recipe.adapter.device_ranks
    if classes is not None:
        return _dealt("adapter.device_ranks", classes, recipe.adapter.device_shares, recipe.seed, clients)
    rank = recipe.adapter.rank
    if isinstance(rank, int):
        return dict.fromkeys(clients, rank)
    if len(rank) != len(clients):
        raise RecipeError(
            f"adapter.rank lists {len(rank)} ranks for {len(clients)} clients; allowed: one number, or one a client"
        )
    return dict(zip(clients, rank, strict=True))


def client_depths(recipe: Recipe, task: Task, clients: list[str]) -> Depths | None:
    """How often each client applies a shared block; classes of devices are dealt as ranks are."""
    section = recipe.depth
    dealt = None
    if section.device_steps:
        dealt = _dealt("depth.device_steps", section.device_steps, section.device_shares, recipe.seed, clients)
    return depths_of(recipe, task.backbone, clients, None if dealt is None else list(dealt.values()))


def _dealt(
    key: str, classes: Sequence[int], shares: Sequence[float] | None, seed: int, clients: list[str]
) -> dict[str, int]:
    """Client -> what its class of devices has; ``key`` lists the classes."""
    counts = largest_remainder([share * len(clients) for share in shares or [1 / len(classes)] * len(classes)])
    if 0 in counts:
        raise RecipeError(
            f"{key}: of {len(clients)} clients nobody is in the class of {classes[counts.index(0)]}; "
            "allowed: shares that give every class a client"
        )
    dealt = [each for each, count in zip(classes, counts, strict=True) for _ in range(count)]
    order = sorted(clients, key=lambda client: derive(seed, "device", client))
    found = dict(zip(order, dealt, strict=True))
    return {client: found[client] for client in clients}


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


def data_of(recipe: Recipe) -> FederatedData:
    """The recipe's data, and what its ``[drift]`` makes of them."""
    data = federated_data(recipe.data, recipe.seed, recipe.form)
    if recipe.drift.kind == "none":
        return data
    first, later = drifted(data.table, data.splits, recipe.data, recipe.drift, recipe.seed)
    return replace(data, splits=first, later=later)


def task_of(recipe: Recipe, classes: Sequence[str]) -> Task:
    """The recipe's task for examples of these classes."""
    task = tasks.build_task(recipe.model, recipe.adapter, recipe.form, classes, steps_of(recipe))
    if recipe.eval.generate:
        refuse_speechless(task)
    return task


def steps_of(recipe: Recipe) -> int | None:
    """How often the recipe has a shared block applied where no client says otherwise; None: as the model does."""
    return recipe.depth.steps if isinstance(recipe.depth.steps, int) else None


# A rank list is not hashable; what the caches depend on is the model, the targets and the data.
def _key(adapter: AdapterSection) -> AdapterSection:
    return AdapterSection(targets=adapter.targets, norm=adapter.norm, tower=adapter.tower)


@lru_cache(maxsize=4)
def _encode(
    model: ModelSection, adapter: AdapterSection, data: DataSection, seed: int, form: Form, steps: int | None
) -> tuple[list[Any], list[Any]]:
    found = federated_data(data, seed, form)
    task = tasks.build_task(model, adapter, form, found.table.classes, steps)
    return encoded(task.encode, found.table), encoded(task.encode, found.test) if found.test else []


@lru_cache(maxsize=4)
def _compute_features(
    model: ModelSection,
    adapter: AdapterSection,
    data: DataSection,
    seed: int,
    form: Form,
    steps: int | None,
    depth: int | None = None,
) -> Tensor:
    examples, _ = _encode(model, adapter, data, seed, form, steps)
    task = tasks.build_task(model, adapter, form, federated_data(data, seed, form).table.classes, steps)
    return torch.from_numpy(features(task, examples, depth=depth))
