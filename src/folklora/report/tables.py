"""The comparison of methods as a table: one line a method, mean ± standard deviation over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from folklora.report.reading import Row

NOTHING = "—"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single value) of a number over seeds."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, rows: Sequence[Row], key: str) -> Spread | None:
        """Over the rows that have the number; None where no row has it."""
        values = [float(row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if not values:
            return None
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)

    def show(self, number: Callable[[float], str]) -> str:
        """``73.0 ± 0.8``, or ``73.0`` from one seed."""
        return number(self.mean) if self.std is None else f"{number(self.mean)} ± {number(self.std)}"


@dataclass(frozen=True)
class Column:
    """A column of the comparison: its title, the key of the row and how a number is written.

    A `counted` number is exact: where the seeds agree on it, there is no spread to speak of.
    """

    title: str
    key: str
    number: Callable[[float], str]
    counted: bool = False

    def show(self, rows: Sequence[Row]) -> str:
        """The cell of a method's rows."""
        spread = Spread.of(rows, self.key)
        if spread is None:
            return NOTHING
        return self.number(spread.mean) if self.counted and spread.std == 0 else spread.show(self.number)


def human_bytes(count: float) -> str:
    """Bytes in powers of 1000, three significant digits: ``0 B``, ``3.40 KB``, ``461 KB``, ``1.20 MB``."""
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"


def human_seconds(seconds: float) -> str:
    """``0.4 s``, ``41 s``, ``12 min 03 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(fraction: float) -> str:
    """A fraction as per cent without its sign: ``73.0``."""
    return f"{100 * fraction:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.1f}"


def _error(value: float) -> str:
    return f"{value:.3g}"


COLUMNS = (
    Column("accuracy %", "accuracy_mean", percent),
    Column("worst tenth %", "accuracy_worst_tenth", percent),
    Column("tuned %", "accuracy_tuned_mean", percent),
    Column("global %", "accuracy_global", percent),
    Column("up / client / round", "bytes_up_per_client_round", human_bytes, counted=True),
    Column("once / client", "bytes_once_per_client", human_bytes, counted=True),
    Column("train s", "seconds_train", _seconds),
    Column("aggregation error", "aggregation_error", _error),
)


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each method, methods sorted by mean accuracy, best first; those without a number come last."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get("method", "unknown method")), []).append(row)

    def place(name: str) -> tuple[float, str]:
        accuracy = Spread.of(groups[name], "accuracy_mean")
        return (math.inf if accuracy is None else -accuracy.mean, name)

    return {name: groups[name] for name in sorted(groups, key=place)}


def header() -> list[str]:
    """The titles of `cells`."""
    return ["method", *(column.title for column in COLUMNS), "seeds"]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The body of the table as strings, best method first."""
    groups = by_method(rows)
    return [[name, *(column.show(group) for column in COLUMNS), str(len(group))] for name, group in groups.items()]


def note(rows: Sequence[Row]) -> str:
    """How to read the table, in one line."""
    seeds = sorted({len(group) for group in by_method(rows).values()})
    if seeds == [1]:
        return "One seed a method: no spread is known, so small differences may be chance."
    span = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"Mean ± sample standard deviation over {span} seeds. Accuracies are means over the clients' own test splits."
    )


def compare_table(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table, best method first.

    Parameters
    ----------
    rows
        Compare rows (the ``row`` of ``summary.json``); rows of one method are its seeds.
    """
    titles = header()
    lines = ["| " + " | ".join(titles) + " |", "| :-- |" + " --: |" * (len(titles) - 1)]
    lines += ["| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in cells(rows)]
    return "\n".join([*lines, "", note(rows)]) + "\n"


def rich_table(rows: Sequence[Row]) -> Table:
    """The comparison for the terminal, best method first."""
    table = Table(box=box.SIMPLE_HEAD, caption=note(rows), caption_justify="left", header_style="bold")
    for index, title in enumerate(header()):
        table.add_column(title, justify="right" if index else "left", no_wrap=index == 0)
    for index, line in enumerate(cells(rows)):
        table.add_row(*(Text(cell) for cell in line), style="bold" if index == 0 else "")
    return table


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
