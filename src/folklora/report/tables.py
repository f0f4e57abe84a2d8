"""The comparison of methods as a table: one line a method, mean ± standard deviation over seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from folklora.backbones.metric import KNOWN, Metric
from folklora.report.reading import Row, common_metric, label

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

    A `counted` number is exact for its run: its mean over seeds (who hold other partitions) is shown without a spread.
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
        return self.number(spread.mean) if self.counted else spread.show(self.number)


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


def _seconds(value: float) -> str:
    return f"{value:.1f}"


def _error(value: float) -> str:
    return f"{value:.2g}"


SCORES = {
    "worst tenth": "worst_tenth",
    "tuned": "tuned_mean",
    "chosen": "chosen_mean",
    "global": "global",
    "weighted": "weighted",
    "newcomers": "newcomers",
}


def columns(metric: Metric) -> list[Column]:
    """All that a comparison tells a method by."""
    score, *others = _scores(metric, "worst tenth", "tuned", "chosen", "global", "newcomers")
    return [
        score,
        Column("epsilon", "epsilon", "{:.3g}".format),
        Column("depth", "depth_mean", "{:.3g}".format),
        *others,
        *_beside(metric),
        Column("up / client / round", "bytes_up_per_client_round", human_bytes, counted=True),
        Column("once / client", "bytes_once_per_client", human_bytes, counted=True),
        Column("newcomer", "bytes_per_newcomer", human_bytes, counted=True),
        Column("train s", "seconds_train", _seconds),
        Column("aggregation error", "aggregation_error", _error),
    ]


def first_columns(metric: Metric) -> list[Column]:
    """What the page shows at first sight."""
    later = {f"{metric.name}_tuned_mean", "aggregation_error"}
    return [column for column in columns(metric) if column.key not in later]


def more_columns(metric: Metric) -> list[Column]:
    """What the page keeps for those who look closer."""
    return [
        *_scores(metric, "tuned", "weighted"),
        Column("std over clients", f"{metric.name}_std_clients", metric.number),
        Column("down / client / round", "bytes_down_per_client_round", human_bytes, counted=True),
        Column("rounds", "rounds", "{:g}".format),
        Column("total s", "seconds_total", _seconds),
        Column("aggregation error", "aggregation_error", _error),
    ]


def _scores(metric: Metric, *more: str) -> list[Column]:
    """The mean, and what else is told in the metric."""
    keys = {metric.words: "mean", **{title: SCORES[title] for title in more}}
    return [Column(title + metric.unit, f"{metric.name}_{key}", metric.number) for title, key in keys.items()]


def _beside(metric: Metric) -> list[Column]:
    """Other metrics of the same models."""
    others = [other for other in KNOWN.values() if other != metric]
    return [Column(other.words + other.unit, f"{other.name}_mean", other.number) for other in others]


CHOICE = (
    "Tuned: the model as a client's own training leaves it, before the server's last reply. Chosen: each client keeps, "
    "by its validation split, that one or the one with the reply."
)


def by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each method or variant, best mean first; those without a number come last."""
    metric = common_metric(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)

    def place(name: str) -> tuple[float, str]:
        score = Spread.of(groups[name], f"{metric.name}_mean")
        return (math.inf if score is None else -metric.merit(score.mean), name)

    return {name: groups[name] for name in sorted(groups, key=place)}


def grid(
    rows: Sequence[Row], choice: Callable[[Metric], Sequence[Column]] = columns
) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of the table as strings, best method first; a column without any number is left out."""
    shown = [column for column in choice(common_metric(rows)) if Spread.of(rows, column.key) is not None]
    lines = [
        [name, *(column.show(group) for column in shown), str(len(group))] for name, group in by_variant(rows).items()
    ]
    return ["method", *(column.title for column in shown), "seeds"], lines


def note(rows: Sequence[Row]) -> str:
    """How to read the table, in a few sentences."""
    metric = common_metric(rows)
    seeds = sorted({len(group) for group in by_variant(rows).values()})
    span = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    parts = [
        "One seed a method: no spread is known, so small differences may be chance."
        if seeds == [1]
        else f"Mean ± sample standard deviation over {span} seeds.",
        f"{metric.words.capitalize()}: mean over the clients' own test splits; "
        f"{'higher' if metric.higher else 'lower'} is better.",
    ]
    if Spread.of(rows, "bytes_once_per_client") is not None:
        parts.append("Up: bytes a client sends in a round; once: before the first round, both ways.")
    if Spread.of(rows, f"{metric.name}_chosen_mean") is not None:
        parts.append(CHOICE)
    if Spread.of(rows, f"{metric.name}_newcomers") is not None:
        parts.append(
            "Newcomers: clients that took part in no round, with what the server made of their sketch, untrained; "
            "beside it the bytes of that, both ways."
        )
    if Spread.of(rows, "epsilon") is not None:
        parts.append("Epsilon: what differential privacy of training has cost; —: there was none.")
    if Spread.of(rows, "depth_mean") is not None:
        parts.append("Depth: how often clients apply the backbone's shared block, their mean; —: as often as it does.")
    return " ".join(parts)


def compare_table(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table, best method first.

    Parameters
    ----------
    rows
        Compare rows (the ``row`` of ``summary.json``); rows of one method or variant are its seeds.
    """
    titles, body = grid(rows)
    lines = ["| " + " | ".join(titles) + " |", "| :-- |" + " --: |" * (len(titles) - 1)]
    lines += ["| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in body]
    return "\n".join([*lines, "", note(rows)]) + "\n"


def _spare(metric: Metric) -> list[str]:
    """What a narrow terminal does without, in this order; the report has it all."""
    titles = ["aggregation error", f"tuned{metric.unit}", f"global{metric.unit}", "seeds", "train s"]
    titles += [column.title for column in _beside(metric)]
    return [*titles, "newcomer", f"chosen{metric.unit}", "once / client", f"worst tenth{metric.unit}"]


@dataclass(frozen=True)
class ComparisonTable:
    """The comparison for the terminal, best method first; columns that do not fit its width are left out and named."""

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        left_out: list[str] = []
        spare = [title for title in _spare(common_metric(self.rows)) if title in grid(self.rows)[0]]
        roomy = options.update(max_width=10_000)  # else the answer is cut to the width there is
        while spare and Measurement.get(console, roomy, self._table(left_out)).maximum > options.max_width:
            left_out.append(spare.pop(0))
        yield self._table(left_out)
        yield Text(note(self.rows), style="dim")
        if left_out:
            yield Text(f"Not shown, for lack of width: {', '.join(left_out)}.", style="dim")

    def _table(self, left_out: Sequence[str]) -> Table:
        titles, lines = grid(self.rows)
        kept = [i for i, title in enumerate(titles) if title not in left_out]
        table = Table(box=box.SIMPLE_HEAD, header_style="bold")
        for i in kept:
            title = Text(textwrap.fill(titles[i], 10, break_long_words=False))
            table.add_column(title, justify="right" if i else "left", no_wrap=True, vertical="bottom")
        for place, line in enumerate(lines):
            table.add_row(*(Text(line[i]) for i in kept), style="bold" if place == 0 else "")
        return table


def rich_table(rows: Sequence[Row]) -> ComparisonTable:
    """The comparison for the terminal: see `ComparisonTable`."""
    return ComparisonTable(rows)


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
