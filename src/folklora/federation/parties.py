"""The setups of a federation's two parties: a server that has no rows, and a member that has its own.

A server knows the labels (``data.classes``, or those of a ``data.source`` that it can read) and the common test set. A
member knows its rows: a file of its own, or, in a rehearsal, its client's share of a source that it agreed to. What the
server's recipe names is never opened because the server says so: not a file, not a backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from folklora.data.columns import listed
from folklora.data.sources import agreed_classes, load, load_test
from folklora.data.split import Split, own_split
from folklora.data.table import Table, encoded
from folklora.errors import BackboneError, DataError, RecipeError
from folklora.federation.depths import refuse_fixed
from folklora.federation.guarantees import refuse_unsound
from folklora.federation.sealing import refuse_unmixable
from folklora.federation.secrecy import refuse_unmaskable
from folklora.federation.setup import (
    FederatedData,
    Setup,
    build_methods,
    client_depths,
    client_ranks,
    federated_data,
    joining_late,
    refuse_too_few,
    task_of,
    validate,
)
from folklora.privacy import example
from folklora.privacy.ckks import Key
from folklora.recipe import Recipe
from folklora.sections import EMBEDDED_NAMES, TrackSection
from folklora.training.prediction import features


@dataclass(frozen=True)
class Own:
    """What a member brings: all its rows, and the backbone it agreed to.

    Attributes
    ----------
    data
        A file as ``data.source`` may be one, all rows of which are the member's; None: a rehearsal.
    text, label
        The file's columns; default: as the recipe has them.
    columns
        Others of them: the recipe's key, one of `folklora.sections.COLUMNS`, and the column's name in the file.
    rehearse
        Of a rehearsal: the source that the member agreed to read, beside those in the package. It has the name that the
        server's has; its folder may be another.
    model
        A backbone's folder; default: the embedded one.
    device
        Where to compute, as ``model.device``; default: as the recipe has it.
    key
        The members' common key, for runs that encrypt; who has one takes part in no other.
    """

    data: str | None = None
    text: str | None = None
    label: str | None = None
    rehearse: str | None = None
    model: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    device: str | None = None
    key: Key | None = None


def server_setup(recipe: Recipe, clients: Sequence[str]) -> Setup:
    """What the server of a network run needs.

    Raises
    ------
    FolkLoraError
        For anything in the recipe that cannot be; the cheap refusals come first.
    """
    validate(recipe)
    refuse_too_few(recipe, len(clients) - len(joining_late(recipe, clients)))
    ranks = client_ranks(recipe, list(clients))
    classes = agreed_classes(recipe.data, recipe.form)
    if classes is None:
        table, test = load(recipe.data.model_copy(update={"by": None}), recipe.seed, recipe.form)
        classes = table.classes
    else:
        test = load_test(recipe.data, recipe.seed, recipe.form)
    return _setup(recipe, ranks, _no_rows(classes), dict.fromkeys(clients, _NOTHING), test)


def for_members(recipe: Recipe) -> Recipe:
    """What members are told of a recipe: all that their work depends on, and not where the server has its files."""
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"name": _without_folder(recipe.model.name)}),
            "data": recipe.data.model_copy(update={"source": _without_folder(recipe.data.source), "test": None}),
            "track": TrackSection(),  # its address may hold a password
        }
    )


def _without_folder(name: str) -> str:
    """Never the name of what is in the package, unless that is meant."""
    return name if name in EMBEDDED_NAMES else f"./{Path(name).name}"


def member_setup(recipe: Recipe, client: str, clients: Sequence[str], classes: Sequence[str], own: Own) -> Setup:
    """What a member of a network run needs; ``recipe``, ``clients`` and ``classes`` are the server's words.

    Raises
    ------
    FolkLoraError
        If they cannot be, or the member's rows or backbone do not fit them.
    """
    validate(recipe)
    if client not in clients:
        raise RecipeError(f"the run has no member {client!r}; allowed: {listed(list(clients))}")
    ranks = client_ranks(recipe, list(clients))
    here = {"name": _backbone(recipe, own), "device": own.device or recipe.model.device}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=here)})
    table = _own_rows(recipe, classes, own) if own.data is not None else _share(recipe, client, classes, own)
    section = recipe.data
    if len(table) < section.min_examples:
        raise DataError(f"{own.data}: {len(table)} rows; allowed: data.min_examples = {section.min_examples} or more")
    rows = np.arange(len(table))
    parts = own_split(table, rows, section, recipe.seed, client)
    return _setup(recipe, ranks, table, {client: parts}, None)


def rowless_setup(recipe: Recipe, clients: Sequence[str], classes: Sequence[str], model: str) -> Setup:
    """What a trained model needs to be used, with a backbone that the one who uses it names."""
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": model})})
    ranks = client_ranks(recipe, list(clients))
    return _setup(recipe, ranks, _no_rows(classes), dict.fromkeys(clients, _NOTHING), None)


_NOTHING = Split(*(np.empty(0, dtype=np.int64) for _ in range(3)))


def _no_rows(classes: Sequence[str]) -> Table:
    return Table([], np.empty(0, dtype=np.int64), tuple(classes), None)


def _setup(
    recipe: Recipe, ranks: Mapping[str, int], table: Table, splits: Mapping[str, Split], test: Table | None
) -> Setup:
    task = task_of(recipe, table.classes)
    method, joining = build_methods(recipe, task, ranks)
    depths = client_depths(recipe, task, list(ranks))
    example.refuse(recipe, method)
    refuse_fixed(recipe, method)
    refuse_unsound(recipe, method)
    refuse_unmaskable(recipe, method)
    refuse_unmixable(recipe, method)
    own, tests = (encoded(task.encode, each) if each and each.inputs else [] for each in (table, test))
    frozen = cache(lambda depth=None: torch.from_numpy(features(task, own, depth=depth)))
    data = FederatedData(table, splits, test)
    return Setup(recipe, data, task, method, lambda: (own, tests), frozen, joining, depths)


def _backbone(recipe: Recipe, own: Own) -> str:
    """The backbone that the member agreed to."""
    if own.model is None and recipe.model.name != "minilm":
        raise BackboneError(
            "this run computes with another backbone than the embedded one; allowed: --model FOLDER, where it is here"
        )
    return own.model or "minilm"


def _own_rows(recipe: Recipe, classes: Sequence[str], own: Own) -> Table:
    section = recipe.data.model_copy(
        update={
            "source": own.data,
            "text": own.text or recipe.data.text,
            "label": own.label or recipe.data.label,
            **dict(own.columns),
            "classes": tuple(classes),
            "by": None,
            "limit": None,  # of a whole that nobody has
            "test": None,
        }
    )
    return load(section, recipe.seed, recipe.form)[0]


def _share(recipe: Recipe, client: str, classes: Sequence[str], own: Own) -> Table:
    """The rows of one client of the recipe's own partition, in their order."""
    theirs = recipe.data.source
    source = theirs if theirs in EMBEDDED_NAMES else own.rehearse
    if source is None or _without_folder(source) != _without_folder(theirs):
        raise DataError(
            "this run has no data in the package to rehearse with; allowed: --data FILE with this member's own rows, "
            f"or --rehearse SOURCE, the recipe's data.source, which is named {Path(theirs).name!r}"
        )
    # All rows of its share: it splits them itself.
    told = recipe.data.model_copy(update={"source": source, "test": None, "shots": None, "train_share": 1.0})
    data = federated_data(told, recipe.seed, recipe.form)
    if client not in data.splits:
        raise DataError(
            f"the partition of {source} has no client {client!r}; allowed: members named as its clients are: "
            f"{listed(list(data.splits))}"
        )
    if data.table.classes != tuple(classes):
        raise DataError(f"the labels of {source} are not those of the run; allowed: the server's data")
    mine = data.splits[client]
    rows = np.sort(np.concatenate([mine.train, mine.validation, mine.test]))
    return data.table.only(rows)
