"""The picture of the other tasks, from results that were made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import table_parts
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from task_figures import methods_by_task
from task_tables import UNTRAINED

Values = Mapping[str, list[float]]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)
    return tmp_path / "tasks.json"


def write(file: Path, tasks: Mapping[str, tuple[str, Values]]) -> None:
    rows: list[dict[str, Any]] = [
        {"task": task, "variant": variant, "seed": seed, "metric": metric, f"{metric}_mean": value}
        for task, (metric, of) in tasks.items()
        for variant, values in of.items()
        for seed, value in enumerate(values)
    ]
    told = {task: {"variants": list(of)} for task, (_, of) in tasks.items()}
    file.write_text(json.dumps({"tasks": told, "rows": rows, "seeds": 3}))


def drawn() -> tuple[Figure, list[Axes]]:
    figure = methods_by_task()
    assert figure is not None
    figure.draw_without_rendering()
    return figure, list(figure.axes)


def points(ax: Axes) -> dict[int, float]:
    """Row -> mean."""
    dots = [line for line in ax.lines if line.get_marker() not in ("None", "none", None)]
    return {round(float(dot.get_ydata()[0])): float(dot.get_xdata()[0]) for dot in dots}  # type: ignore[index,arg-type]


def test_the_best_stand_first_and_who_is_not_in_every_task_last(results: Path) -> None:
    pictures = {UNTRAINED: [0.1, 0.1], "fedit": [0.2, 0.4], "local": [0.6, 0.8], "ravan": [0.9, 0.9]}
    words = {UNTRAINED: [5.0, 5.0], "fedit": [4.5, 4.3], "local": [4.1, 3.9]}
    write(results, {"emoji by group": ("accuracy", pictures), "dolly, Dirichlet 0.5": ("loss", words)})
    _, (left, right) = drawn()
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["local", "fedit", "ravan"]
    assert points(left) == pytest.approx({0: 0.7, 1: 0.3, 2: 0.9})
    assert points(right) == pytest.approx({0: 4.0, 1: 4.4})


def test_better_is_always_to_the_right(results: Path) -> None:
    pictures = {"fedit": [0.2, 0.4], "local": [0.6, 0.8]}
    words = {"fedit": [4.5, 4.3], "local": [4.1, 3.9]}
    write(results, {"a": ("accuracy", pictures), "b": ("loss", words)})
    _, (left, right) = drawn()
    assert left.get_xlim()[0] < left.get_xlim()[1]
    assert right.get_xlim()[0] > right.get_xlim()[1]


def test_the_untrained_checkpoint_is_a_line_and_no_method(results: Path) -> None:
    write(results, {"a": ("accuracy", {UNTRAINED: [0.1, 0.2], "fedit": [0.2, 0.4], "local": [0.6, 0.8]})})
    _, (ax,) = drawn()
    assert len(points(ax)) == 2
    (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert list(line.get_xdata()) == pytest.approx([0.15, 0.15])


def test_a_task_that_was_only_begun_is_not_drawn(results: Path) -> None:
    write(results, {"a": ("accuracy", {UNTRAINED: [0.1], "fedit": [0.2]})})
    assert methods_by_task() is None
    results.unlink()
    assert methods_by_task() is None
