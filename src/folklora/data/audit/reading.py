"""The examples of one file as an audit takes them: texts, or sequences of items, and their labels.

Where a run refuses an example without a word in it, an audit counts it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from folklora.data import chat
from folklora.data.audit.duplicates import Example
from folklora.data.columns import Columns, either, short, why_not_text
from folklora.data.readers import TABULAR
from folklora.errors import DataError
from folklora.sections import DataSection, Form


@dataclass(frozen=True)
class Rows:
    """What was read.

    Attributes
    ----------
    name
        Of the file, without its folder.
    kind, column
        What an example is, and where it stood.
    examples
        A text each, or the items of a sequence; empty where there was nothing.
    labels
        One an example; None where they have none.
    places
        Where a person finds each: ``"line 3"``.
    """

    name: str
    kind: Literal["text", "items"]
    column: str
    examples: Sequence[Example]
    labels: Sequence[str] | None
    places: Sequence[str]


def read_rows(path: str | Path, *, text: str | None = None, items: str | None = None, label: str | None = None) -> Rows:
    """The examples of a CSV, TSV, JSONL or Parquet file.

    Parameters
    ----------
    text, items
        The column, either of texts (default: ``text``) or of sequences: lists of integers or words, or strings of them
        with white space between.
    label
        The column of labels; default: there are none.

    Raises
    ------
    DataError
        One line that names the file, the row or the column, and what is allowed.
    """
    if text is not None and items is not None:
        raise DataError(f"--text {text} with --items {items}; allowed: one of them")
    column, kind = (items, "items") if items is not None else (text or "text", "text")
    read = _items if kind == "items" else _text
    return _rows(Path(path), column, kind, [column], lambda columns, row: read(columns, row, column), label)  # type: ignore[arg-type]


def read_rows_as(
    path: str | Path, section: DataSection, form: Form, *, text: str | None = None, label: str | None = None
) -> Rows:
    """The examples of a member's own file, with the columns that a recipe has for them; a chat's turns are one text.

    Raises
    ------
    DataError
        As `read_rows`, and for pictures.
    """
    if form in ("image", "caption"):
        raise DataError(f"{path}: the recipe's examples are pictures; allowed: texts, chats or sequences of items")
    if form == "text":
        return read_rows(path, text=text or section.text, label=label or section.label or "label")
    wanted = [section.messages] if section.messages else [section.prompt, section.response]
    wanted += [section.context] if section.context else []

    def spoken(columns: Columns, row: int) -> str:
        turns = (
            chat.from_messages(columns, row, section.messages)
            if section.messages
            else chat.from_columns(columns, row, section.prompt, section.response, section.context)
        )
        return "\n".join(content for _, content in turns)

    return _rows(Path(path), " and ".join(wanted), "text", wanted, spoken, label or section.label)


def _rows(
    path: Path,
    column: str,
    kind: Literal["text", "items"],
    wanted: list[str],
    read: Callable[[Columns, int], Example],
    label: str | None,
) -> Rows:
    reader = TABULAR.get(path.suffix.lower())
    if not path.is_file():
        raise DataError(f"{path}: no such file; allowed: a {either(TABULAR)} file")
    if reader is None:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; allowed: {either(TABULAR)}")
    try:
        columns = reader(path, list(dict.fromkeys([*wanted, *([label] if label else [])])))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; allowed: a readable file") from None
    if not len(columns):
        raise DataError(f"{path}: no examples; allowed: at least one row")
    rows = range(len(columns))
    examples = [read(columns, row) for row in rows]
    if not any(examples):
        raise DataError(f"{path}: column {column!r}: empty in all {len(columns)} rows; allowed: at least one {kind}")
    labels = [columns.name(row, label) for row in rows] if label else None
    name = path.name.encode("utf-8", "backslashreplace").decode()  # a file's name may be any bytes
    return Rows(name, kind, column, examples, labels, columns.places)


def _text(columns: Columns, row: int, column: str) -> str:
    value = columns.values[column][row]
    problem = why_not_text(value)
    if problem in ("missing", "empty"):
        return ""
    if problem:
        raise columns.blame(row, column, f"{problem}; allowed: a string")
    return str(value)


def _items(columns: Columns, row: int, column: str) -> tuple[Any, ...]:
    value = columns.values[column][row]
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = value.split()
        else:
            value = value.split()
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(i, int | str) and not isinstance(i, bool) for i in value):
        raise columns.blame(
            row,
            column,
            f"{short(value)}; allowed: a list of integers or words, or a string of them with blanks between",
        )
    return tuple(value)
