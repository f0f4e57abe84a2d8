"""The comparison table: numbers against an independent computation, units, order."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from folklora.errors import RunError
from folklora.report.tables import (
    Spread,
    columns,
    compare_table,
    first_columns,
    grid,
    human_bytes,
    human_seconds,
    more_columns,
    rich_table,
)


def lines_of(markdown: str) -> dict[str, dict[str, str]]:
    """Method -> column -> cell, read back from the Markdown."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in markdown.splitlines() if line.startswith("|")]
    titles = rows[0]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows[2:]}


def test_table_is_mean_and_sample_deviation_over_seeds(comparison: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = comparison[1]
    table = lines_of(compare_table(rows))
    assert set(table) == {row["method"] for row in rows}
    for method, cells in table.items():
        own = [row for row in rows if row["method"] == method]
        for column, key in (("accuracy %", "accuracy_mean"), ("worst tenth %", "accuracy_worst_tenth")):
            values = [100 * row[key] for row in own]
            assert cells[column] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        assert cells["seeds"] == "3"
        assert cells["train s"] == "42.0 ± 1.0"
    assert table["celora"]["up / client / round"] == "3.40 KB"
    assert table["celora"]["once / client"] == "461 KB"
    assert table["local"]["up / client / round"] == "0 B"
    assert table["celora"]["global %"] == "—"
    assert table["fedit"]["global %"] != "—"
    assert table["fedit"]["aggregation error"].startswith("0.12")


def test_best_method_stands_first(comparison: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = comparison[1]
    means = {
        m: statistics.mean(r["accuracy_mean"] for r in rows if r["method"] == m) for m in {r["method"] for r in rows}
    }
    assert list(lines_of(compare_table(rows))) == sorted(means, key=lambda method: -means[method])
    assert list(lines_of(compare_table(rows[::-1]))) == list(lines_of(compare_table(rows)))


def test_one_seed_shows_no_spread_and_says_so() -> None:
    text = compare_table([{"method": "fedit", "seed": 0, "accuracy_mean": 0.7}])
    assert lines_of(text)["fedit"]["accuracy %"] == "70.0"
    assert "One seed" in text


def test_a_missing_or_infinite_number_is_a_dash_and_sorts_last() -> None:
    rows: list[dict[str, Any]] = [
        {"method": "a", "accuracy_mean": float("nan")},
        {"method": "b", "accuracy_mean": 0.1},
        {"method": "c"},
    ]
    table = lines_of(compare_table(rows))
    assert list(table) == ["b", "a", "c"]
    assert table["a"]["accuracy %"] == "—"


def test_markdown_survives_a_method_name_with_a_bar() -> None:
    assert "a\\|b &lt;i>" in compare_table([{"method": "a|b <i>", "accuracy_mean": 0.5}])


def test_rows_are_grouped_by_variant() -> None:
    rows = [
        {"method": "celora", "variant": variant, "seed": seed, "accuracy_mean": accuracy}
        for variant, accuracies in (("celora", (0.5, 0.6)), ("celora:similarity=uniform", (0.7, 0.7)))
        for seed, accuracy in enumerate(accuracies)
    ]
    table = lines_of(compare_table(rows))
    assert list(table) == ["celora:similarity=uniform", "celora"]
    assert table["celora"]["accuracy %"] == "55.0 ± 7.1"
    assert table["celora"]["seeds"] == "2"


def test_a_column_without_a_number_is_left_out_and_chosen_is_explained() -> None:
    rows = [{"method": "a", "accuracy_mean": 0.5, "accuracy_global": None, "accuracy_chosen_mean": 0.6}]
    assert grid(rows)[0] == ["method", "accuracy %", "chosen %", "seeds"]
    assert "by its validation split" in compare_table(rows)
    assert "validation" not in compare_table([{"method": "a", "accuracy_mean": 0.5}])


def test_what_privacy_cost_stands_beside_the_score_where_any_run_paid() -> None:
    rows: list[dict[str, Any]] = [
        {"method": "fedit", "accuracy_mean": 0.7, "seed": 0},
        {"method": "ffa", "accuracy_mean": 0.6, "epsilon": 3.99512},
        {"method": "local", "accuracy_mean": 0.5, "epsilon": 0.0},
    ]
    for choice in (columns, first_columns):
        titles, lines = grid(rows, choice)
        assert titles[:3] == ["method", "accuracy %", "epsilon"]
        assert [line[2] for line in lines] == ["—", "4", "0"]
        assert "epsilon" not in grid(rows[:1], choice)[0]
    assert "Epsilon" in compare_table(rows)
    assert "Epsilon" not in compare_table(rows[:1])


@pytest.mark.parametrize("width", [50, 80, 100, 200])
def test_a_narrow_terminal_cuts_no_number(comparison: tuple[Path, list[dict[str, Any]]], width: int) -> None:
    rows = [{**row, "variant": f"{row['method']}:a=1"} for row in comparison[1]]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table(rows))
    text = console.export_text()
    titles, lines = grid(rows)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for name, accuracy in (line[:2] for line in lines):
        assert any(name in line and accuracy in line for line in text.splitlines())
    assert ("Not shown" in text) == (width < 200)
    assert len(titles) == 11


def test_rich_table_shows_the_same_cells_and_no_markup() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(rich_table([{"method": "[red]x[/red]", "accuracy_mean": 0.5}, {"method": "y", "accuracy_mean": 0.6}]))
    text = console.export_text()
    assert "[red]x[/red]" in text
    assert text.index("60.0") < text.index("50.0")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1.00 KB"), (3400, "3.40 KB"), (461_000, "461 KB"), (999_600, "1.00 MB")],
)
def test_bytes_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_seconds_and_spread() -> None:
    assert [human_seconds(s) for s in (0.42, 41.2, 723, 7500)] == ["0.4 s", "41 s", "12 min 03 s", "2 h 05 min"]
    assert Spread.of([{"x": 1.0}, {"x": None}, {}], "x") == Spread(1.0, None)
    assert Spread.of([], "x") is None


def test_a_loss_is_the_better_the_smaller(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = losses[1]
    text = compare_table(rows)
    table = lines_of(text)
    means = {m: statistics.mean(r["loss_mean"] for r in rows if r["method"] == m) for m in {r["method"] for r in rows}}
    assert list(table) == sorted(means, key=lambda method: means[method])
    values = [row["loss_worst_tenth"] for row in rows if row["method"] == "celora"]
    assert table["celora"]["worst tenth"] == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    values = [row["perplexity_mean"] for row in rows if row["method"] == "celora"]
    assert table["celora"]["perplexity"] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert "%" not in text
    assert "Loss: mean over the clients' own test splits; lower is better." in text
    assert "by its validation split" in text
    titles = grid(rows, more_columns)[0]
    assert titles[:5] == ["method", "loss", "tuned", "weighted", "std over clients"]


def test_a_narrow_terminal_keeps_the_loss(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    console = Console(width=50, record=True, file=io.StringIO())
    console.print(rich_table(losses[1]))
    text = console.export_text()
    assert all(line[1] in text for line in grid(losses[1])[1])
    assert "perplexity" in text.partition("Not shown")[2]


def test_a_table_of_two_metrics_is_refused() -> None:
    rows: list[dict[str, Any]] = [{"method": "a", "accuracy_mean": 0.5}]
    rows += [{"method": "b", "metric": "loss", "higher": False, "loss_mean": 0.5}]
    with pytest.raises(RunError, match="a by accuracy and b by loss"):
        compare_table(rows)
