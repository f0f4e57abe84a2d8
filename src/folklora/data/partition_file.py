"""``partition.json``: who has which examples, written by a run and read back with nothing trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from folklora.data.split import Split, histogram
from folklora.data.table import ONE_CLASS, Table, fingerprint
from folklora.errors import DataError

Indices = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]


class _Parts(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    train: Indices
    validation: Indices
    test: Indices


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    classes: Annotated[list[str], Field(min_length=1)]  # one where examples have no labels
    clients: Annotated[dict[str, _Parts], Field(min_length=1)]
    counts: dict[str, list[Annotated[int, Field(ge=0)]]]
    later_clients: dict[str, _Parts] = {}
    later_counts: dict[str, list[Annotated[int, Field(ge=0)]]] = {}


def to_json(table: Table, clients: Mapping[str, Split], later: Mapping[str, Split] | None = None) -> str:
    """``partition.json``: the fingerprint of the table, its classes, every client's split and its training labels.

    What those clients have ``later`` whose data change (`folklora.data.drift`) stands beside it in the same way.
    """
    document = {"fingerprint": fingerprint(table), "classes": table.classes, **_listed(table, clients)}
    if later:
        document |= {f"later_{name}": of for name, of in _listed(table, later).items()}
    return json.dumps(document, ensure_ascii=False) + "\n"


def _listed(table: Table, clients: Mapping[str, Split]) -> dict[str, Any]:
    splits = {
        client: {part: getattr(of, part).tolist() for part in ("train", "validation", "test")}
        for client, of in clients.items()
    }
    return {"clients": splits, "counts": {c: histogram(table, of.train).tolist() for c, of in clients.items()}}


def from_json(
    text: str, examples: int | None = None
) -> tuple[str, tuple[str, ...], dict[str, Split], dict[str, Split]]:
    """Read what `to_json` wrote: the fingerprint, the classes, the clients in their order, and what some have later.

    Parameters
    ----------
    examples
        The number of examples in the table, if known; indices must be below it.

    Raises
    ------
    DataError
        The text is not a partition, an example is out of range or in two places, or counts contradict the splits.
    """
    try:
        document = _Document.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f" {part}:" for part in first["loc"])
        raise DataError(f"partition.json:{where} {first['msg']}; allowed: what `partition` wrote") from None
    if len(set(document.classes)) < len(document.classes):
        raise DataError("partition.json: classes: a name occurs twice; allowed: each once")
    if len(document.classes) < 2 and tuple(document.classes) != ONE_CLASS:
        raise DataError(f"partition.json: classes: only one; allowed: two or more, or {ONE_CLASS[0]!r} without labels")
    clients = _splits(document.clients, examples)
    _check_counts(document, "counts", document.clients)
    later = _splits(document.later_clients, examples)
    _check_counts(document, "later_counts", document.later_clients)
    if strange := next((client for client in later if client not in clients), None):
        raise DataError(f"partition.json: later_clients: no client {strange!r}; allowed: some of `clients`")
    return document.fingerprint, tuple(document.classes), clients, later


def _splits(listed: Mapping[str, _Parts], examples: int | None) -> dict[str, Split]:
    clients = {}
    seen: dict[int, str] = {}
    for client, parts in listed.items():
        for name, indices in parts:
            for index in indices:
                if examples is not None and index >= examples:
                    raise DataError(
                        f"partition.json: client {client!r}, {name}: example {index} of {examples}; allowed: 0 to "
                        f"{examples - 1}"
                    )
                if index in seen:
                    raise DataError(
                        f"partition.json: client {client!r}, {name}: example {index} is also in {seen[index]}; "
                        "allowed: each example once"
                    )
                seen[index] = f"client {client!r}, {name}"
        arrays = {name: np.array(indices, dtype=np.int64) for name, indices in parts}
        clients[client] = Split(**arrays)
    return clients


def _check_counts(document: _Document, key: str, clients: Mapping[str, _Parts]) -> None:
    """Counts are there for reports, which do not have the table: they must fit the splits and the classes."""
    told: dict[str, list[int]] = getattr(document, key)
    if list(told) != list(clients):
        raise DataError(f"partition.json: {key}: not those of `clients`; allowed: the same ones in the same order")
    for client, counts in told.items():
        if len(counts) != len(document.classes):
            raise DataError(
                f"partition.json: {key}: client {client!r} has {len(counts)} numbers; allowed: "
                f"{len(document.classes)}, one a class"
            )
        if sum(counts) != len(clients[client].train):
            raise DataError(
                f"partition.json: {key}: client {client!r} has {sum(counts)} examples; allowed: "
                f"{len(clients[client].train)}, as many as in its train"
            )
