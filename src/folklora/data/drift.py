"""Clients whose data change in mid-run: what some of them have from a later round on. Simulated, seeded.

A row keeps its part for good: whatever was once trained on is never tested on, and the other way round, in nobody's
hands. So what a federation learned before the change leaks into no score after it.

- ``labels``: those clients put their examples together, and the partition's own scheme (``dirichlet``, ``pathological``
  or ``shards``; over labels, or the values of ``data.by``) shares them out anew. Whoever got nothing of a part is given
  one example of it by the client that has most.
- ``classes``: those clients begin without some of their classes: as many, drawn by the seed, as make up at most half of
  their examples. Later they have all. Nobody's examples change hands, and a client whose classes cannot be divided
  so is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from folklora.data.partition import deal
from folklora.data.split import Split, split
from folklora.data.table import ONE_CLASS, Table
from folklora.errors import DataError
from folklora.randomness import derive, numpy_generator
from folklora.sections import DataSection, DriftSection

_LEAST = 3
"""Examples that can be split into three parts."""


def drifted(
    table: Table, splits: Mapping[str, Split], data: DataSection, section: DriftSection, seed: int
) -> tuple[dict[str, Split], dict[str, Split]]:
    """Who has what at first, and what those have later whose data change.

    Parameters
    ----------
    splits
        As `folklora.data.partition.partition` made them.

    Returns
    -------
    first
        All clients in their order.
    later
        Those whose data change, in the same order; empty with ``kind = "none"``.

    Raises
    ------
    DataError
        Too few clients could change as the section says.
    """
    if section.kind == "none":
        return dict(splits), {}
    wanted = max(1, int(section.share * len(splits) + 0.5))
    order = sorted(splits, key=lambda client: derive(seed, "drift", client))
    if section.kind == "labels":
        if wanted < 2:
            raise DataError(
                f"drift.share = {section.share:g} of {len(splits)} clients is one, which has nobody to exchange "
                'examples with; allowed: a share of two or more, or drift.kind = "classes"'
            )
        chosen = set(order[:wanted])
        drifting = [client for client in splits if client in chosen]
        return dict(splits), _shared_anew(table, {c: splits[c] for c in drifting}, data, seed)
    if table.classes == ONE_CLASS:
        raise DataError('drift.kind = "classes", and the examples have no labels; allowed: "labels" with data.by')
    found: dict[str, tuple[Split, Split]] = {}
    for client in order:
        if len(found) == wanted:
            break
        if (both := _with_new_classes(table, splits[client], data, seed, client)) is not None:
            found[client] = both
    if len(found) < wanted:
        raise DataError(
            f"drift.share = {section.share:g}: {wanted} clients are to begin without some of their classes, and "
            f"{len(found)} have enough; allowed: a smaller share, or a partition with more classes a client"
        )
    first = {client: found[client][0] if client in found else own for client, own in splits.items()}
    return first, {client: found[client][1] for client in splits if client in found}


def _shared_anew(table: Table, splits: Mapping[str, Split], data: DataSection, seed: int) -> dict[str, Split]:
    names = [field.name for field in fields(Split)]
    held = [(i, getattr(own, name)) for own in splits.values() for i, name in enumerate(names)]
    rows = np.concatenate([of for _, of in held])
    part = np.concatenate([np.full(len(of), i) for i, of in held])
    order = np.argsort(rows)
    rows, part = rows[order], part[order]
    try:
        shares = deal(table.only(rows), data.model_copy(update={"clients": len(splits)}), derive(seed, "drift"))
    except DataError as error:
        raise DataError(f"drift: {error}") from None
    parts = [[share[part[share] == i] for i in range(len(names))] for share in shares.values()]
    for i in range(len(names)):
        _leave_nobody_without([own[i] for own in parts], parts, i)
    return {
        client: Split(**{name: np.sort(rows[own[i]]) for i, name in enumerate(names)})
        for client, own in zip(splits, parts, strict=True)
    }


def _leave_nobody_without(held: Sequence[np.ndarray], parts: list[list[np.ndarray]], i: int) -> None:
    """Whoever has no example of a part is given one by the client that has most of it."""
    for client, own in enumerate(held):
        if not len(own):
            giver = max(range(len(parts)), key=lambda other: len(parts[other][i]))
            parts[client][i], parts[giver][i] = parts[giver][i][-1:], parts[giver][i][:-1]


def _with_new_classes(
    table: Table, own: Split, data: DataSection, seed: int, client: str
) -> tuple[Split, Split] | None:
    """A client's split without some of its classes, and the whole; None where they cannot be divided."""
    whole = np.concatenate([own.train, own.validation, own.test])
    labels = table.labels[whole]
    present, sizes = np.unique(labels, return_counts=True)
    new: list[int] = []
    count = 0
    for place in numpy_generator(seed, "drift/classes", client).permutation(len(present)):
        if 2 * (count + sizes[place]) <= len(whole):
            new.append(int(present[place]))
            count += int(sizes[place])
    if count < _LEAST:
        return None
    late = np.isin(labels, new)
    # Each by itself, so that all classes are in all parts as far as they reach.
    first, joining = (
        split(table.labels, whole[rows], data.validation, data.test_fraction, seed, client, table.pictures)
        for rows in (~late, late)
    )
    both = {f.name: np.sort(np.concatenate([getattr(first, f.name), getattr(joining, f.name)])) for f in fields(Split)}
    return first, Split(**both)
