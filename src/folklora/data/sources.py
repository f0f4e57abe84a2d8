"""Labelled examples, from the embedded data set, a file, or a folder.

A source is read in two steps: a reader for each format yields plain columns with the place of every row, and one
validation, the same for all formats, turns them into a `Table`. Nothing is unpickled, no code of a data set runs, and
the network is never touched.

Labels may be strings, integers or booleans; the class of the integer 1 and of the string ``"1"`` is the same. Classes
are sorted by name, or by value if all of them are numbers, so their order does not depend on the order of rows;
``data.classes`` names them in an order of its own, and then no other may occur.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from folklora.errors import DataError
from folklora.randomness import numpy_generator
from folklora.recipe import DataSection

EMBEDDED = {"banking77": Path(__file__).with_name("banking77")}
"""Data sets inside the package; their columns are ``text`` and ``category``."""

Known = tuple[tuple[str, ...], str]
"""The only classes there are, and where they are from, in words."""

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True)
class Table:
    """Labelled examples in memory.

    Attributes
    ----------
    inputs
        Raw examples.
    labels
        ``[n]`` int64, indices into `classes`.
    classes
        Names, sorted, or as ``data.classes`` has them.
    groups
        ``[n]`` values of ``data.by``, when named.
    """

    inputs: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: list[str] | None

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Columns:
    """Columns as a reader found them, not validated yet."""

    file: str
    places: Sequence[str]  # where a person finds each row: "line 3" of a text, "row 2" of a binary file
    values: dict[str, list[Any]]

    def blame(self, row: int, column: str, problem: str) -> DataError:
        return DataError(f"{self.file}: {self.places[row]}, column {column!r}: {problem}")


def load(section: DataSection, seed: int) -> tuple[Table, Table | None]:
    """Read the examples and the common test set, if there is one.

    ``data.source`` is an embedded name; a ``.csv``, ``.tsv`` (both with a header and quotes as spreadsheets write
    them), ``.jsonl`` or ``.parquet`` file; a folder with ``train.*`` and perhaps ``test.*`` in one of these formats;
    or a Hugging Face folder written by ``save_to_disk``, with the splits ``train`` and perhaps ``test``. The file
    ``data.test`` replaces the test set that a folder brings. ``data.limit`` applies to the examples,
    ``data.test_limit`` to the test set.

    Raises
    ------
    DataError
        One line naming the file, the row, the column and what is allowed.
    """
    text, label, by = section.text, section.label, section.by
    if section.source in EMBEDDED:
        text, label = "text", "category"
    with _readable():
        train, test = _read_source(section.source, [text, label], [] if by is None else [by])
    known = None if section.classes is None else (section.classes, "data.classes")
    table = _validated(train, text, label, by, known)
    if section.limit is not None:
        table = _limited(table, "limit", section.limit, seed)
    known = known or (table.classes, "those of the training examples")
    if section.test is not None:
        return table, _own_test(section, section.test, seed, known)
    return table, None if test is None else _test(section, seed, test, text, label, known)


def load_test(section: DataSection, seed: int) -> Table | None:
    """The common test set where `section` says all about it, ``data.test`` and ``data.classes``: no other file is read.

    Raises
    ------
    DataError
        As `load`.
    """
    if section.test is None or section.classes is None:
        return None
    return _own_test(section, section.test, seed, (section.classes, "data.classes"))


def _own_test(section: DataSection, file: str, seed: int, known: Known) -> Table:
    # A file of the user's own has the recipe's columns, also beside an embedded source.
    with _readable():
        columns = _read_file(Path(file), [section.text, section.label], f'data.test = "{file}"')
    return _test(section, seed, columns, section.text, section.label, known)


def _test(section: DataSection, seed: int, columns: Columns, text: str, label: str, known: Known) -> Table:
    table = _validated(columns, text, label, None, known)
    return table if section.test_limit is None else _limited(table, "test_limit", section.test_limit, seed)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}; allowed: a readable file") from None


def fingerprint(table: Table) -> str:
    """SHA-256 over inputs, labels and classes, in hexadecimal: changed data changes it."""
    digest = hashlib.sha256()
    for part in (table.classes, table.inputs):
        digest.update(len(part).to_bytes(8, "little"))
        for value in part:
            encoded = value.encode()
            # Lengths before the values: ("ab", "c") and ("a", "bc") must not meet.
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    digest.update(np.ascontiguousarray(table.labels, dtype="<i8").tobytes())
    return digest.hexdigest()


# From columns to a table


def _validated(columns: Columns, text: str, label: str, by: str | None, known: Known | None) -> Table:
    """Check every value."""
    if not columns.places:
        raise DataError(f"{columns.file}: no examples; allowed: at least one row")
    inputs = [_string(columns, row, text, value) for row, value in enumerate(columns.values[text])]
    names = [_name(columns, row, label, value) for row, value in enumerate(columns.values[label])]
    groups = None
    if by is not None:
        groups = [_name(columns, row, by, value) for row, value in enumerate(columns.values[by])]
    classes, origin = known if known is not None else (tuple(sort_names(names)), "")
    if len(classes) < 2:
        raise DataError(f"{columns.file}: column {label!r}: a single class, {classes[0]!r}; allowed: two or more")
    index = {name: i for i, name in enumerate(classes)}
    for row, name in enumerate(names):
        if name not in index:
            problem = f"label {_short(name)} is not among {origin}; allowed: {_listed(classes)}"
            raise columns.blame(row, label, problem)
    return Table(inputs, np.array([index[name] for name in names], dtype=np.int64), classes, groups)


def sort_names(names: Iterable[str]) -> list[str]:
    """Unique names in order: by value if all are numbers, else as text."""
    unique = sorted(set(names))
    if all(NUMBER.fullmatch(name) for name in unique):
        unique.sort(key=Decimal)
    return unique


def _string(columns: Columns, row: int, column: str, value: Any) -> str:
    if value is None:
        raise columns.blame(row, column, "missing; allowed: a non-empty string")
    if not isinstance(value, str):
        raise columns.blame(
            row, column, f"{_short(value)} is of type {type(value).__name__}; allowed: a non-empty string"
        )
    if not value.strip():
        raise columns.blame(row, column, "empty; allowed: a non-empty string")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise columns.blame(row, column, "not valid Unicode; allowed: a non-empty string") from None
    return value


def _name(columns: Columns, row: int, column: str, value: Any) -> str:
    """The name of a class or a client."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise columns.blame(row, column, "missing; allowed: a string, an integer or a boolean")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        problem = f"{_short(value)} is of type {type(value).__name__}; allowed: a string, an integer or a boolean"
        raise columns.blame(row, column, problem)
    return _string(columns, row, column, value)


def _limited(table: Table, key: str, limit: int, seed: int) -> Table:
    """A stratified subsample of `limit` examples, in the source's order.

    Seats are given to classes as Sainte-Lague gives them to parties, after one seat for each: shares stay proportional
    to the classes' sizes as nearly as whole numbers allow, and no class vanishes.
    """
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
    chosen = np.sort(order[np.argsort(turn, kind="stable")[:limit]])
    groups = None if table.groups is None else [table.groups[i] for i in chosen]
    return Table([table.inputs[i] for i in chosen], table.labels[chosen], table.classes, groups)


# Readers


def _read_source(source: str, wanted: list[str], grouping: list[str]) -> tuple[Columns, Columns | None]:
    """The training columns and the test columns, if any; only training examples have the `grouping` column."""
    path = EMBEDDED.get(source, Path(source))
    if not path.is_dir():
        return _read_file(path, wanted + grouping, f'data.source = "{source}"'), None
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _read_saved(path, wanted, grouping)
    files = {split: _split_file(path, split) for split in ("train", "test")}
    if files["train"] is None:
        allowed = f"a train file ({_either(READERS)}), or a folder written by datasets' save_to_disk"
        raise DataError(f"{path}: no training data in this folder; allowed: {allowed}")
    train = _read_file(files["train"], wanted + grouping)
    return train, None if files["test"] is None else _read_file(files["test"], wanted)


def _split_file(folder: Path, split: str) -> Path | None:
    files = [file for suffix in READERS if (file := folder / f"{split}{suffix}").is_file()]
    if len(files) > 1:
        raise DataError(f"{folder}: {' and '.join(f.name for f in files)}; allowed: one file named {split}.*")
    return files[0] if files else None


def _read_file(path: Path, wanted: list[str], key: str = "") -> Columns:
    if not path.is_file():
        embedded = ", ".join(f'"{name}"' for name in EMBEDDED)
        allowed = f"a {_either(READERS)} file; for data.source also a folder or an embedded name ({embedded})"
        raise DataError(f"{key or path}: no such file; allowed: {allowed}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; allowed: {_either(READERS)}")
    return reader(path, wanted)


def _read_saved(folder: Path, wanted: list[str], grouping: list[str]) -> tuple[Columns, Columns | None]:
    """A Hugging Face ``Dataset`` or ``DatasetDict`` from disk."""
    import datasets  # slow to import, and only this format needs it

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises whatever its first broken part does
        problem = f"not a readable Hugging Face data set: {_first_line(error)}"
        raise DataError(f"{folder}: {problem}; allowed: a folder written by datasets' save_to_disk") from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if "train" not in splits:
        raise DataError(f'{folder}: has the splits {_listed(sorted(map(str, splits)))}; allowed: one named "train"')
    train = _saved_split(splits["train"], f"{folder} (train)", wanted + grouping)
    return train, _saved_split(splits["test"], f"{folder} (test)", wanted) if "test" in splits else None


def _saved_split(split: Any, file: str, wanted: list[str]) -> Columns:
    _require_columns(file, split.column_names, wanted)
    values = split.select_columns(wanted).with_format(None)[:]
    for name in wanted:
        names = getattr(split.features[name], "names", None)
        if names is not None:  # a ClassLabel: integers on disk, -1 where unknown
            values[name] = [None if v is None or not 0 <= v < len(names) else names[v] for v in values[name]]
    return Columns(file, _rows(len(split)), values)


def _read_parquet(path: Path, wanted: list[str]) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _require_columns(str(path), file.schema_arrow.names, wanted)
        table = file.read(columns=wanted)
        values = {name: table.column(name).to_pylist() for name in wanted}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_first_line(error)}; allowed: Parquet") from None
    return Columns(str(path), _rows(len(table)), values)


def _read_delimited(path: Path, wanted: list[str], delimiter: str) -> Columns:
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    at: dict[str, int] = {}
    places: list[str] = []
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    end = 0
    try:
        for fields in reader:
            start, end = end + 1, reader.line_num  # a quoted field may hold line breaks
            if not fields:
                continue
            if not names:
                names = fields
                _require_columns(str(path), names, wanted)
                at = {name: names.index(name) for name in wanted}
                continue
            if len(fields) != len(names):
                allowed = f"{len(names)}, as in the header; quote a field that holds a separator"
                raise DataError(f"{path}: line {start}: {len(fields)} fields; allowed: {allowed}")
            places.append(f"line {start}")
            for name, position in at.items():
                values[name].append(fields[position])
    except csv.Error as error:
        raise DataError(f"{path}: line {end + 1}: broken row: {error}; allowed: quotes in pairs") from None
    if not names:
        raise DataError(f"{path}: empty file; allowed: a header and at least one row")
    return Columns(str(path), places, values)


def _read_jsonl(path: Path, wanted: list[str]) -> Columns:
    places: list[str] = []
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line breaks here.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"not JSON: {_first_line(error)}"
            raise DataError(f"{path}: line {number}: {problem}; allowed: one JSON object a line") from None
        if not isinstance(row, dict):
            problem = f"{_short(row)} is no JSON object"
            raise DataError(f"{path}: line {number}: {problem}; allowed: one JSON object a line")
        _require_columns(f"{path}: line {number}", list(row), wanted)
        places.append(f"line {number}")
        for name in wanted:
            values[name].append(row[name])
    if not places:
        raise DataError(f"{path}: empty file; allowed: at least one JSON object")
    return Columns(str(path), places, values)


READERS: dict[str, Callable[[Path, list[str]], Columns]] = {
    ".csv": functools.partial(_read_delimited, delimiter=","),
    ".tsv": functools.partial(_read_delimited, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: not UTF-8 ({error.reason}); allowed: text in UTF-8") from None


def _require_columns(where: str, names: Sequence[str], wanted: list[str]) -> None:
    for name in wanted:
        if name not in names:
            raise DataError(f"{where}: no column {name!r}; allowed: one of {_listed(names)}")
        if list(names).count(name) > 1:
            raise DataError(f"{where}: {list(names).count(name)} columns {name!r}; allowed: one")


def _rows(count: int) -> list[str]:
    return [f"row {row}" for row in range(1, count + 1)]


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(_short(name) for name in names[:most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
