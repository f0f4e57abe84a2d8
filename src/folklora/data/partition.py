"""How clients share the examples.

The sharing is done by flwr-datasets' partitioners over an in-memory index, so the schemes mean what they mean there:
``iid``; ``dirichlet`` label skew (arXiv:1905.12022, without self-balancing); ``pathological``, a fixed number of
classes a client (arXiv:2102.02079); ``shards`` of label-sorted examples (arXiv:1602.05629); ``natural``, by the values
of a column. Where ``data.by`` names a column, the three in the middle take its values for classes: clients differ in
domain, not in label.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING

import numpy as np

from folklora.data.split import Split, own_split
from folklora.data.table import ONE_CLASS, Table, sort_names
from folklora.errors import DataError
from folklora.randomness import derive, numpy_generator
from folklora.sections import DataSection

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

log = logging.getLogger(__name__)


def partition(table: Table, section: DataSection, seed: int) -> dict[str, Split]:
    """Share the examples among clients and split each client's share.

    Ids are ``"0"``, ``"1"``, ... or, for ``natural``, the column's values in the order of `sort_names`. What remains
    in nobody's hands is logged as a warning: under ``natural`` the examples of clients with fewer than
    ``data.min_examples``, which are dropped (``data.clients`` has no meaning there); under ``pathological`` the classes
    (or values of ``data.by``) that no client was given; under ``shards`` fewer than ``clients * shards_per_client``
    examples, drawn at random, so that all shards are equal. Whatever clients differ in, each client's own split is
    stratified by label. Captions of one picture stay together (`Table.pictures`), with one client and in one part of
    its split; under ``natural`` the column decides who has them.

    Raises
    ------
    DataError
        The examples cannot be shared like that; one line says what is allowed.
    """
    clients = _natural(table, section) if section.partition == "natural" else deal(table, section, seed)
    return {client: own_split(table, indices, section, seed, client) for client, indices in clients.items()}


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

    if (pictures := table.pictures) is not None:
        heads = np.unique(pictures)
        shared = deal(table.only(heads), section, seed)
        return {client: np.flatnonzero(np.isin(pictures, heads[share])) for client, share in shared.items()}
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
