"""Files to columns: CSV, TSV, JSONL, Parquet, and folders written by Hugging Face's ``save_to_disk``.

Nothing is unpickled, no code of a data set runs, and the network is never touched.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from folklora.data.columns import Columns, listed, numbered_rows, require_columns, short
from folklora.errors import DataError, first_line

Reader = Callable[[Path, list[str]], Columns]
"""Gives the wanted columns of a file."""


def read_delimited(path: Path, wanted: list[str], delimiter: str) -> Columns:
    csv.field_size_limit(2**31 - 1)  # of the process; a sequence of events is longer than csv's 128 KiB
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
                require_columns(str(path), names, wanted)
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
    return Columns(str(path), places, values, path.parent)


def read_jsonl(path: Path, wanted: list[str]) -> Columns:
    places: list[str] = []
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    for place, row in json_lines(path):
        require_columns(f"{path}: {place}", list(row), wanted)
        places.append(place)
        for name in wanted:
            values[name].append(row[name])
    return Columns(str(path), places, values, path.parent)


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place; DataError where a line is none, or there is none."""
    found = False
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line breaks here.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            problem = f"not JSON: {first_line(error)}"
            raise DataError(f"{path}: line {number}: {problem}; allowed: one JSON object a line") from None
        if not isinstance(row, dict):
            problem = f"{short(row)} is no JSON object"
            raise DataError(f"{path}: line {number}: {problem}; allowed: one JSON object a line")
        found = True
        yield f"line {number}", row
    if not found:
        raise DataError(f"{path}: empty file; allowed: at least one JSON object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError where a name is there twice: which of the two is meant, nobody knows."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{short(name)} is there twice")
        found[name] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: not UTF-8 ({error.reason}); allowed: text in UTF-8") from None


def read_parquet(path: Path, wanted: list[str]) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        require_columns(str(path), file.schema_arrow.names, wanted)
        places = numbered_rows(str(path), file.metadata.num_rows)
        table = file.read(columns=wanted)
        values: dict[str, Sequence[Any]] = {name: table.column(name).to_pylist() for name in wanted}
        for name, classes in _class_names(file.schema_arrow.metadata).items():
            if name in values and pa.types.is_integer(file.schema_arrow.field(name).type):
                values[name] = _named(values[name], classes)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: a value that Python lacks
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}; allowed: Parquet") from None
    return Columns(str(path), places, values, path.parent)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column -> names of its classes, as Hugging Face's ``datasets`` writes them into a Parquet file; nothing where
    what stands there is of another make."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        found = {name: told["names"] for name, told in features.items() if told.get("_type") == "ClassLabel"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in found.items() if isinstance(names, list) and all(map(_is_text, names))}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _named(values: Sequence[Any], names: Sequence[str]) -> list[str | None]:
    """Numbers of a ClassLabel as names; -1 and what no name stands for is unknown."""
    return [None if v is None or not 0 <= v < len(names) else names[v] for v in values]


def read_saved(folder: Path, wanted: list[str], grouping: list[str]) -> tuple[Columns, Columns | None]:
    """The splits ``train`` and ``test`` of a ``DatasetDict``, or a ``Dataset`` that is all for training."""
    import datasets  # slow to import, and only this format needs it

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises whatever its first broken part does
        problem = f"not a readable Hugging Face data set: {first_line(error)}"
        raise DataError(f"{folder}: {problem}; allowed: a folder written by datasets' save_to_disk") from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if "train" not in splits:
        raise DataError(f'{folder}: has the splits {listed(sorted(map(str, splits)))}; allowed: one named "train"')
    train = _split(splits["train"], folder, "train", wanted + grouping)
    return train, _split(splits["test"], folder, "test", wanted) if "test" in splits else None


def _split(split: Any, folder: Path, name: str, wanted: list[str]) -> Columns:
    import datasets

    file = f"{folder} ({name})"
    require_columns(file, split.column_names, wanted)
    places = numbered_rows(file, len(split))
    split = split.select_columns(wanted).with_format(None)
    for column in wanted:
        if isinstance(split.features[column], datasets.Image):  # which files are opened, and how, is not its business
            split = split.cast_column(column, datasets.Image(decode=False))
    values: dict[str, Sequence[Any]] = dict(split[:])
    for column in wanted:
        names = getattr(split.features[column], "names", None)
        if names is not None:
            values[column] = _named(values[column], names)
    return Columns(file, places, values, folder)


TABULAR: dict[str, Reader] = {
    ".csv": functools.partial(read_delimited, delimiter=","),
    ".tsv": functools.partial(read_delimited, delimiter="\t"),
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
