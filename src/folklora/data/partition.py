"""How clients share the examples, and how each client splits its own.

The sharing is done by flwr-datasets' partitioners over an in-memory index, so the schemes mean what they mean there:
``iid``; ``dirichlet`` label skew (arXiv:1905.12022, without self-balancing); ``pathological``, a fixed number of
classes a client (arXiv:2102.02079); ``shards`` of label-sorted examples (arXiv:1602.05629); ``natural``, by the values
of a column. Where ``data.by`` names a column, the three in the middle take its values for classes: clients differ in
domain, not in label.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from folklora.data.table import ONE_CLASS, Table, fingerprint, sort_names
from folklora.errors import DataError
from folklora.randomness import derive, numpy_generator
from folklora.sections import DataSection

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

log = logging.getLogger(__name__)

Indices = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]


@dataclass(frozen=True)
class Split:
    """One client's examples: sorted int64 indices into the table, disjoint, none empty."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def __len__(self) -> int:
        return len(self.train) + len(self.validation) + len(self.test)


def partition(table: Table, section: DataSection, seed: int) -> dict[str, Split]:
    """Share the examples among clients and split each client's share.

    Ids are ``"0"``, ``"1"``, ... or, for ``natural``, the column's values in the order of `sort_names`. What remains
    in nobody's hands is logged as a warning: under ``natural`` the examples of clients with fewer than
    ``data.min_examples``, which are dropped (``data.clients`` has no meaning there); under ``pathological`` the classes
    (or values of ``data.by``) that no client was given; under ``shards`` fewer than ``clients * shards_per_client``
    examples, drawn at random, so that all shards are equal. Whatever clients differ in, each client's own split is
    stratified by label. Captions of one picture stay together (`pictures_of`), with one client and in one part of its
    split; under ``natural`` the column decides who has them.

    Raises
    ------
    DataError
        The examples cannot be shared like that; one line says what is allowed.
    """
    clients = _natural(table, section) if section.partition == "natural" else deal(table, section, seed)
    pictures = pictures_of(table)
    return {client: own_split(table, indices, section, seed, client, pictures) for client, indices in clients.items()}


def pictures_of(table: Table) -> np.ndarray | None:
    """``[n]`` int64: the first example with the same picture, where pictures have several captions; else None.

    Parted, a caption that was trained on would tell of a picture that is tested on.
    """
    if not table.inputs or not (isinstance(table.inputs[0], tuple) and isinstance(table.inputs[0][0], np.ndarray)):
        return None
    first: dict[tuple[tuple[int, ...], bytes], int] = {}
    seen = ((picture.shape, hashlib.sha256(picture.tobytes()).digest()) for picture, _ in table.inputs)
    found = np.array([first.setdefault(key, row) for row, key in enumerate(seen)], dtype=np.int64)
    return found if len(first) < len(found) else None


def own_split(
    table: Table, indices: np.ndarray, section: DataSection, seed: int, client: str, pictures: np.ndarray | None
) -> Split:
    """One client's examples as `[data]` has them: `split`, of which some are trained on (`few`, then `part`).

    ``pictures`` are the table's, as `pictures_of` gives them.
    """
    whole = split(table.labels, indices, section.validation, section.test_fraction, seed, client, pictures)
    return part(few(whole, table.labels, section.shots, seed, client), section.train_share, seed, client)


def split(
    labels: np.ndarray,
    indices: np.ndarray,
    validation: float,
    test: float,
    seed: int,
    client: str,
    pictures: np.ndarray | None = None,
) -> Split:
    """Split one client's examples into train, validation and test, stratified.

    Test and validation have ``round(n * fraction)`` examples, at least one each and leaving at least one to train.
    Each is a systematic sample of the examples ordered by class: equally spaced from a random start. So a part that
    takes a fraction f of the m examples of a class takes f m of them rounded up or down, and a class too small to reach
    every part lands in each with the probability that its fraction says; the test set stays unbiased. (The fraction
    that validation takes is that of what the test set has left.)

    Parameters
    ----------
    labels
        ``[n]`` labels of the whole table.
    indices
        The client's examples, at least 3, in any order.
    pictures
        ``[n]``: equal for examples that stay together, as `pictures_of` gives them. What is split and counted then are
        the pictures, each under the label of its first example.

    Raises
    ------
    DataError
        The examples are of fewer than 3 pictures.

    Returns
    -------
    Split
        A function of ``(seed, client)`` and the arguments alone: other clients do not matter.
    """
    if pictures is not None:
        indices = np.sort(indices)
        names, places = np.unique(pictures[indices], return_index=True)
        if len(names) < 3:
            raise DataError(
                f"client {client!r} has {len(indices)} captions of {len(names)} pictures; allowed: three pictures or "
                "more, since captions of one stay together and each of train, validation and test has one"
            )
        whole = split(labels, indices[places], validation, test, seed, client)
        together = (np.isin(pictures[indices], pictures[of]) for of in (whole.train, whole.validation, whole.test))
        return Split(*(indices[chosen] for chosen in together))
    count = len(indices)
    rng = numpy_generator(seed, "split", client)
    shuffled = rng.permutation(np.sort(indices))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = [max(1, int(count * fraction + 0.5)) for fraction in (test, validation)]
    while sum(sizes) > count - 1:  # roundings up may leave nothing to train on
        sizes[int(np.argmax(sizes))] -= 1
    parts = []
    for size in sizes:
        taken = ((np.arange(size) + rng.random()) * len(by_class) / size).astype(np.int64)
        taken = np.minimum(taken, len(by_class) - 1)  # a start just below 1 may round up to the end
        parts.append(by_class[taken])
        by_class = np.delete(by_class, taken)
    return Split(train=np.sort(by_class), validation=np.sort(parts[1]), test=np.sort(parts[0]))


def few(of: Split, labels: np.ndarray, shots: int | None, seed: int, client: str) -> Split:
    """The split with at most so many training examples of each class, drawn; None: with all of them.

    The draws of fewer shots are among those of more. What is not drawn is in no part.
    """
    if shots is None:
        return of
    shuffled = numpy_generator(seed, "shots", client).permutation(of.train)
    kept = [shuffled[labels[shuffled] == each][:shots] for each in np.unique(labels[of.train])]
    return Split(np.sort(np.concatenate(kept)), of.validation, of.test)


def part(of: Split, share: float, seed: int, client: str) -> Split:
    """The split with a share of its training examples, rounded and at least one, drawn whatever their labels.

    A smaller share is among a larger one. What is not drawn is in no part.
    """
    if share == 1:
        return of
    shuffled = numpy_generator(seed, "train_share", client).permutation(of.train)
    return Split(np.sort(shuffled[: max(1, int(share * len(of.train) + 0.5))]), of.validation, of.test)


def histogram(table: Table, examples: Split | np.ndarray) -> np.ndarray:
    """``[classes]`` int64 counts of a client's labels, over all three parts of a `Split`."""
    if isinstance(examples, Split):
        examples = np.concatenate([examples.train, examples.validation, examples.test])
    return np.bincount(table.labels[examples], minlength=len(table.classes))


# The schemes


def _natural(table: Table, section: DataSection) -> dict[str, np.ndarray]:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    if table.groups is None:
        raise DataError('partition = "natural" needs `by = "column"`, the column whose values are the clients')
    names = sort_names(table.groups)
    # Ranks instead of names: the library would order names its own way and strip trailing NULs.
    rank = {name: i for i, name in enumerate(names)}
    groups = np.array([rank[name] for name in table.groups])
    shares = _apply(NaturalIdPartitioner("group"), {"index": np.arange(len(table)), "group": groups})
    clients = {name: share for name, share in zip(names, shares, strict=True) if len(share) >= section.min_examples}
    if not clients:
        largest = max(len(share) for share in shares)
        allowed = f"min_examples <= {largest}" if largest >= 3 else "a column whose values occur 3 times or more"
        raise DataError(
            f"data.by = {section.by!r}: none of the {len(names)} clients has data.min_examples = "
            f"{section.min_examples} examples; allowed: {allowed}"
        )
    if len(clients) < len(names):
        dropped = len(names) - len(clients)
        log.warning("dropped %d of %d clients with fewer than %d examples", dropped, len(names), section.min_examples)
    return clients


def deal(table: Table, section: DataSection, seed: int) -> dict[str, np.ndarray]:
    """Each client's examples, indices into the table, as any scheme but ``natural`` shares them out.

    Raises
    ------
    DataError
        As `partition`.
    """
    from flwr_datasets.partitioner import IidPartitioner

    if (pictures := pictures_of(table)) is not None:
        heads = np.unique(pictures)
        groups = None if table.groups is None else [table.groups[row] for row in heads]
        one_each = Table([table.inputs[row] for row in heads], table.labels[heads], table.classes, groups)
        shares_of_pictures = deal(one_each, section, seed)
        return {client: np.flatnonzero(np.isin(pictures, heads[share])) for client, share in shares_of_pictures.items()}
    count, least = section.clients, section.min_examples
    if count * least > len(table):
        raise DataError(
            f"data.clients = {count} with data.min_examples = {least} needs {count * least} examples, the source has "
            f"{len(table)}; allowed: clients <= {len(table) // least}, a smaller min_examples (>= 3), or more data"
        )
    skewed, values = _skewed(table, section)
    # The partitioners cut contiguous pieces, of the source or of a class in it. Shuffled, its order cannot matter; and
    # with classes renumbered, which of them meet in a client is not decided by the alphabet.
    rng = numpy_generator(seed, "partition")
    order = rng.permutation(len(table))
    columns = {"index": order, "label": rng.permutation(values)[skewed[order]]}
    library_seed = derive(seed, "partition")

    if section.partition == "iid":
        shares = _apply(IidPartitioner(count), columns)
    elif section.partition == "dirichlet":
        shares = _dirichlet(section, columns, library_seed)
    elif section.partition == "pathological":
        shares = _pathological(section, columns, library_seed)
    else:
        shares = _shards(section, columns, library_seed)
    unused = len(table) - sum(len(share) for share in shares)
    if unused:
        log.warning('partition = "%s" leaves %d of %d examples unused', section.partition, unused, len(table))
    return {str(client): share for client, share in enumerate(shares)}


def _skewed(table: Table, section: DataSection) -> tuple[np.ndarray, int]:
    """What clients are to differ in, ``[n]`` numbers, and how many there are: values of ``data.by``, else classes."""
    if section.by is not None and table.groups is not None:
        names = {name: i for i, name in enumerate(sort_names(table.groups))}
        return np.array([names[name] for name in table.groups]), len(names)
    if table.classes == ONE_CLASS and section.partition != "iid":
        raise DataError(
            f'data.partition = "{section.partition}" skews labels, and the examples have none; allowed: data.by or '
            'data.label, a column of the source, or partition = "iid"'
        )
    return table.labels, len(table.classes)


def _dirichlet(section: DataSection, columns: dict[str, np.ndarray], seed: int) -> list[np.ndarray]:
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        section.clients, "label", section.alpha, min_partition_size=section.min_examples, shuffle=False, seed=seed
    )
    try:
        return _apply(partitioner, columns)
    except ValueError:  # the library draws eleven times
        raise DataError(
            f"data.alpha = {section.alpha:g}: no draw gave each of {section.clients} clients data.min_examples = "
            f"{section.min_examples} examples; allowed: a larger alpha, fewer clients, or a smaller min_examples (>= 3)"
        ) from None


def _pathological(section: DataSection, columns: dict[str, np.ndarray], seed: int) -> list[np.ndarray]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    per_client, classes = section.classes_per_client, len(np.unique(columns["label"]))
    if per_client > classes:
        values = "the number of classes" if section.by is None else f"the number of values of {section.by!r}"
        raise DataError(f"data.classes_per_client = {per_client}; allowed: <= {classes}, {values}")
    # Every class finds a client if there are as many clients as classes, which "random" does not promise.
    partitioner = PathologicalPartitioner(
        section.clients, "label", per_client, class_assignment_mode="first-deterministic", shuffle=False, seed=seed
    )
    remedy = "fewer clients, another classes_per_client, a smaller min_examples (>= 3), or another seed"
    try:
        shares = _apply(partitioner, columns)
    except ValueError:
        raise DataError(
            f"data.classes_per_client = {per_client}: a class has fewer examples than clients that should hold it; "
            f"allowed: {remedy}"
        ) from None
    smallest = min(len(share) for share in shares)
    if smallest < section.min_examples:
        raise DataError(
            f"data.classes_per_client = {per_client}: a client has only {smallest} examples, data.min_examples = "
            f"{section.min_examples}; allowed: {remedy}"
        )
    return shares


def _shards(section: DataSection, columns: dict[str, np.ndarray], seed: int) -> list[np.ndarray]:
    from flwr_datasets.partitioner import ShardPartitioner

    per_client = section.shards_per_client
    shards = section.clients * per_client
    size = len(columns["index"]) // shards
    if size * per_client < section.min_examples:
        raise DataError(
            f"data.shards_per_client = {per_client}: {shards} shards of {size} examples give a client "
            f"{size * per_client}, data.min_examples = {section.min_examples}; allowed: fewer shards_per_client, fewer "
            "clients, or a smaller min_examples (>= 3)"
        )
    # Left with a remainder, the library would drop it from the last classes, and whole shards besides.
    equal = {name: values[: size * shards] for name, values in columns.items()}
    return _apply(ShardPartitioner(section.clients, "label", per_client, size, shuffle=False, seed=seed), equal)


def _apply(partitioner: Partitioner, columns: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a partitioner over `columns`; the ``index`` column's values that each client gets.

    Raises
    ------
    ValueError
        The library's refusal.
    """
    import datasets

    # The library tells its retries by warnings and its progress on stderr.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        shares = (partitioner.load_partition(i)["index"] for i in range(partitioner.num_partitions))
        return [np.array(share[:], dtype=np.int64) for share in shares]


# The partition as a file


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
