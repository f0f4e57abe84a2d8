"""Columns as a reader found them, what a value in them may be, and the words for what it is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folklora.errors import DataError

# What a file of a few bytes says of its size is not believed beyond these.
MOST_ROWS = 20_000_000
MOST_PIXELS = 2**26
"""Of one picture: 8192 x 8192."""
MOST_BYTES = 2**32
"""Of all pictures of a source together, in memory."""


@dataclass(frozen=True)
class Columns:
    """Columns of one file or split, not validated yet.

    Attributes
    ----------
    file
        What errors name.
    places
        Where a person finds each row: "line 3" of a text, "row 2" of a binary file, the path of a picture.
    values
        By column, one a row.
    folder
        Files that a value names lie in this folder.
    """

    file: str
    places: Sequence[str]
    values: Mapping[str, Sequence[Any]]
    folder: Path

    def __len__(self) -> int:
        return len(self.places)

    def blame(self, row: int, column: str, problem: str) -> DataError:
        return DataError(f"{self.file}: {self.places[row]}, column {column!r}: {problem}")

    def string(self, row: int, column: str) -> str:
        """A value that must be a text, and not empty."""
        value = self.values[column][row]
        problem = why_not_text(value)
        if problem:
            raise self.blame(row, column, f"{problem}; allowed: a non-empty string")
        return str(value)

    def name(self, row: int, column: str) -> str:
        """A value that names a class or a client; the integer 1 and the string ``"1"`` are one name."""
        value = self.values[column][row]
        allowed = "allowed: a string, an integer or a boolean"
        if value is None or (isinstance(value, str) and not value.strip()):
            raise self.blame(row, column, f"missing; {allowed}")
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            return str(value)
        if not isinstance(value, str):
            raise self.blame(row, column, f"{short(value)} is of type {type(value).__name__}; {allowed}")
        return self.string(row, column)


def why_not_text(value: Any) -> str:
    """What keeps a value from being a non-empty text; nothing if it is one."""
    if value is None:
        return "missing"
    if not isinstance(value, str):
        return f"{short(value)} is of type {type(value).__name__}"
    if not value.strip():
        return "empty"
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return "not valid Unicode"
    return ""


def require_columns(where: str, names: Sequence[str], wanted: Iterable[str]) -> None:
    for name in wanted:
        if name not in names:
            raise DataError(f"{where}: no column {name!r}; allowed: one of {listed(names)}")
        if list(names).count(name) > 1:
            raise DataError(f"{where}: {list(names).count(name)} columns {name!r}; allowed: one")


def plausible_bytes(path: Path) -> int:
    """How much a compressed file can hold, and may."""
    return min(MOST_BYTES, 1100 * path.stat().st_size)  # deflate reaches 1032 to 1


def numbered_rows(file: str, count: int) -> list[str]:
    """The places of a binary file's rows."""
    if count > MOST_ROWS:
        raise DataError(f"{file}: {count} rows; allowed: at most {MOST_ROWS}")
    return [f"row {row}" for row in range(1, count + 1)]


# Words


def listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(short(name) for name in names[:most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "")


def either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def short(value: Any) -> str:
    if isinstance(value, str | bytes):  # before it is spelt out
        value = value[:200]
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
