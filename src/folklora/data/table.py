"""The examples that a run works with, from columns of any format: labels, classes, groups, a limit, a fingerprint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np

from folklora.data.columns import Columns, listed, short
from folklora.errors import DataError, ExampleError
from folklora.randomness import numpy_generator

ONE_CLASS = ("all",)
"""The classes of examples that have no labels."""

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True)
class Table:
    """Examples in memory.

    Attributes
    ----------
    inputs
        Raw examples, all of one form: a text; a chat (`folklora.data.chat.Chat`); a picture, uint8 ``[H, W, 3]``; or a
        picture and its caption.
    labels
        ``[n]`` int64, indices into `classes`.
    classes
        Names, sorted, or as ``data.classes`` has them; `ONE_CLASS` where there are no labels.
    groups
        ``[n]`` values of ``data.by``, when named.
    places
        ``[n]``: where a person finds each, as `Columns.places` in its file; none where examples are nobody's.
    """

    inputs: list[Any]
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: list[str] | None
    places: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def only(self, rows: np.ndarray) -> Table:
        """These examples, in the order of `rows`."""
        groups = None if self.groups is None else [self.groups[row] for row in rows]
        places = [self.places[row] for row in rows] if self.places else ()
        return Table([self.inputs[row] for row in rows], self.labels[rows], self.classes, groups, places)

    @cached_property
    def pictures(self) -> np.ndarray | None:
        """``[n]`` int64: the first example with the same picture, where pictures have several captions; else None.

        Parted, a caption that was trained on would tell of a picture that is tested on.
        """
        if not self.inputs or not (isinstance(self.inputs[0], tuple) and isinstance(self.inputs[0][0], np.ndarray)):
            return None
        first: dict[tuple[tuple[int, ...], bytes], int] = {}
        seen = ((picture.shape, hashlib.sha256(picture.tobytes()).digest()) for picture, _ in self.inputs)
        found = np.array([first.setdefault(key, row) for row, key in enumerate(seen)], dtype=np.int64)
        return found if len(first) < len(found) else None


@dataclass(frozen=True)
class Known:
    """The only classes there are, and where they are from, in words.

    Where they are `numbered` and no name is a number, a whole number is the place of its class: ``0`` of an array of
    labels is the first.
    """

    classes: tuple[str, ...]
    origin: str
    numbered: bool = False

    def index(self) -> dict[str, int]:
        index = {name: i for i, name in enumerate(self.classes)}
        if self.numbered and not any(NUMBER.fullmatch(name) for name in self.classes):
            index |= {str(i): i for i in range(len(self.classes))}
        return index


def tabulated(columns: Columns, inputs: Sequence[Any], label: str | None, by: str | None, known: Known | None) -> Table:
    """Give examples their classes and groups; without `known` classes they are those found."""
    rows = range(len(columns))
    names = None if label is None else [columns.name(row, label) for row in rows]
    groups = None if by is None else [columns.name(row, by) for row in rows]
    places = [f"{columns.file}: {place}" for place in columns.places]
    if names is None or label is None:
        return Table(list(inputs), np.zeros(len(rows), dtype=np.int64), ONE_CLASS, groups, places)
    known = known or Known(tuple(sort_names(names)), "")
    if len(known.classes) < 2:
        raise DataError(f"{columns.file}: column {label!r}: a single class, {names[0]!r}; allowed: two or more")
    index = known.index()
    for row, name in enumerate(names):
        if name not in index:
            problem = f"label {short(name)} is not among {known.origin}; allowed: {listed(known.classes)}"
            raise columns.blame(row, label, problem)
    labels = np.array([index[name] for name in names], dtype=np.int64)
    return Table(list(inputs), labels, known.classes, groups, places)


def encoded(encode: Callable[[Sequence[Any]], list[Any]], table: Table) -> list[Any]:
    """What a task makes of the examples.

    Raises
    ------
    DataError
        If it cannot take one, with the place of that in its file.
    """
    try:
        return encode(table.inputs)
    except ExampleError as error:
        if not table.places:
            raise
        raise DataError(f"{table.places[error.index]}: {error.problem}") from None


def sort_names(names: Iterable[str]) -> list[str]:
    """Unique names in order: by value if all are numbers, else as text."""
    unique = sorted(set(names))
    if all(NUMBER.fullmatch(name) for name in unique):
        unique.sort(key=Decimal)
    return unique


def limited(table: Table, key: str, limit: int | None, seed: int) -> Table:
    """A stratified subsample of `limit` examples, in the source's order; without a limit all of them.

    Seats are given to classes as Sainte-Lague gives them to parties, after one seat for each: shares stay proportional
    to the classes' sizes as nearly as whole numbers allow, and no class vanishes.
    """
    if limit is None:
        return table
    if limit < len(table.classes):
        allowed = f"data.{key} >= {len(table.classes)}, one example a class"
        raise DataError(f"data.{key} = {limit} is less than the {len(table.classes)} classes; allowed: {allowed}")
    if limit >= len(table):
        return table
    order = numpy_generator(seed, key).permutation(len(table))
    labels = table.labels[order]
    turn = np.empty(len(table))
    for label, size in enumerate(np.bincount(labels, minlength=len(table.classes))):
        # The divisors 1, 3, 5, ... of Sainte-Lague, inverted; the first example of a class comes before all others.
        turn[labels == label] = np.concatenate([[0.0], (np.arange(1, size) + 0.5) / size])
    return table.only(np.sort(order[np.argsort(turn, kind="stable")[:limit]]))


def fingerprint(table: Table) -> str:
    """SHA-256 over inputs, labels and classes, in hexadecimal: changed data changes it."""
    digest = hashlib.sha256()
    for part in (table.classes, table.inputs):
        digest.update(_size(part))
        for value in part:
            for piece in _pieces(value):
                digest.update(piece)
    digest.update(np.ascontiguousarray(table.labels, dtype="<i8").tobytes())
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    """What is hashed of one value: lengths before values, since ("ab", "c") and ("a", "bc") must not meet.

    A text is hashed as it always was; other forms begin with what no length of a text is.
    """
    if isinstance(value, str):
        encoded = value.encode()
        yield _size(encoded)
        yield encoded
    elif isinstance(value, np.ndarray):
        yield b"\xff picture" + np.array(value.shape, dtype="<i8").tobytes()
        yield np.ascontiguousarray(value).tobytes()
    else:  # the turns of a chat, the role and content of a turn, a picture and its caption
        yield b"\xff several" + _size(value)
        for part in value:
            yield from _pieces(part)


def _size(value: Sequence[Any]) -> bytes:
    return len(value).to_bytes(8, "little")
