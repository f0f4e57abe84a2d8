"""A run directory, or a folder of compared runs, read as typed data.

The files are described in ``docs/architecture.md``. A run that is still going is read as far as it got; a file that
contradicts its description is refused with one `RunError` line naming the file and, in ``metrics.jsonl``, the line.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from folklora.backbones.metric import ACCURACY, KNOWN, Metric, metric_of, same_metric
from folklora.errors import RunError
from folklora.federation.sampling import newcomers
from folklora.report.records import Compare, Examples, Joined, Partition, Round, Summary, Validation, parse, text_of

Row = Mapping[str, Any]
"""The compare row of a finished run: the `row` of its ``summary.json``."""

INSIGHTS = ("similarity/data", "similarity/model", "similarity/mixed", "weights")


@dataclass(frozen=True)
class ClientResult:
    """A client's line in ``summary.json``: the score of its model after the server's last reply, of that before it, and
    of the one it keeps; ``beside`` are other metrics of the first, ``depth`` how often it applies a shared block."""

    score: float
    tuned: float | None
    chosen: float | None
    beside: dict[str, float]
    examples: Examples
    depth: int | None = None


@dataclass(frozen=True)
class Run:
    """Everything a report shows of one run.

    Attributes
    ----------
    path
        The run directory.
    recipe_text, recipe
        ``recipe.toml`` as it stands, and parsed. It is not validated anew, so a run of an older version stays readable.
    classes
        Names of the classes.
    examples
        Client id -> sizes of its splits; the order of the clients is that of ``partition.json``. Newcomers, who take
        part in no round, are none of these.
    newcomers
        Likewise, of those.
    joined
        What they were told and how they did with it, once the run is finished.
    counts
        [clients, classes] training examples of each class, or None where ``partition.json`` has no ``counts``.
    once
        Round 0, the one-off traffic, if any.
    rounds
        The rounds that are on record, in order, without round 0.
    row, results
        The compare row and each client's test results; None and empty until the run is finished.
    insights
        Name -> [clients, clients] matrix, those of `INSIGHTS` that the method left.
    insights_before
        Likewise, of the round before some clients' data changed.
    stopped_early, stopped
        Whether the run ended before its last round; and why, where it was not for want of improvement.
    environment
        What it was computed with: versions, device, compute type.
    """

    path: Path
    recipe_text: str
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    examples: dict[str, Examples]
    counts: np.ndarray | None
    once: Round | None
    rounds: tuple[Round, ...]
    row: Row | None
    results: dict[str, ClientResult]
    insights: dict[str, np.ndarray]
    stopped_early: bool
    stopped: str | None
    environment: dict[str, Any]
    insights_before: dict[str, np.ndarray] = field(default_factory=dict)
    newcomers: dict[str, Examples] = field(default_factory=dict)
    joined: Joined | None = None

    @property
    def clients(self) -> tuple[str, ...]:
        """Client ids in the order of ``partition.json``."""
        return tuple(self.examples)

    @property
    def method(self) -> str:
        """The method's name."""
        return str((self.row or {}).get("method") or self.section("method").get("name") or "unknown method")

    @property
    def seed(self) -> int | None:
        """The recipe's seed."""
        seed = (self.row or {}).get("seed", self.recipe.get("seed"))
        return int(seed) if isinstance(seed, int) else None

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary."""
        return self.row is not None

    @property
    def metric(self) -> Metric | None:
        """What it is judged by; None as long as it was not."""
        if self.row is not None:
            return metric_of(self.row)
        return metric_of(self.evaluated[-1][1].model_dump()) if self.evaluated else None

    @property
    def lines(self) -> tuple[Round, ...]:
        """All lines of ``metrics.jsonl``: round 0, where there is one, and the rounds."""
        return ((self.once,) if self.once else ()) + self.rounds

    @property
    def evaluated(self) -> tuple[tuple[int, Validation], ...]:
        """(round, validation) of the lines that were evaluated."""
        return tuple((line.round, line.validation) for line in self.lines if line.validation is not None)

    def section(self, name: str) -> dict[str, Any]:
        """A table of the recipe; empty where it is absent."""
        section = self.recipe.get(name)
        return section if isinstance(section, dict) else {}


@dataclass(frozen=True)
class Comparison:
    """A folder of compared runs.

    Attributes
    ----------
    rows
        The rows of the finished runs.
    runs, labels
        The runs begun, and what each is called: see `label`.
    finished
        Whether ``compare.json`` was written and no run beside it still waits for its result.
    """

    path: Path
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    finished: bool

    @property
    def metric(self) -> Metric:
        """What all of them are judged by; accuracy as long as none was."""
        return next((run.metric for run in self.runs if run.metric is not None), ACCURACY)

    def finished_runs(self, name: str) -> list[Run]:
        """The finished runs of one label."""
        return [run for run, own in zip(self.runs, self.labels, strict=True) if own == name and run.finished]


def label(row: Row) -> str:
    """What a row's runs are grouped and shown by: its variant (``celora:similarity=uniform``), else its method."""
    return str(row.get("variant") or row.get("method") or "unknown method")


def common_metric(rows: Sequence[Row]) -> Metric:
    """What all rows are judged by; accuracy where there are none.

    Raises
    ------
    RunError
        If they are judged by different metrics.
    """
    return same_metric((label(row), metric_of(row)) for row in rows)


def read_run(path: str | Path) -> Run:
    """Read a run directory.

    Raises
    ------
    RunError
        The folder is no run directory, a file is missing, or a file is not what it should be.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path}: no such run directory")
    if not (path / "recipe.toml").is_file():
        raise RunError(f"{path}: not a run directory (it has no recipe.toml)")
    text = text_of(path / "recipe.toml")
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{path / 'recipe.toml'}: not valid TOML: {error}") from None
    partition = parse(Partition, path / "partition.json")
    summary = parse(Summary, path / "summary.json") if (path / "summary.json").is_file() else None
    row = summary.row.told() if summary else None
    lines = _rounds(path / "metrics.jsonl")
    if not lines and row is not None and row.get("rounds"):
        raise RunError(f"{path / 'metrics.jsonl'}: missing or empty, though summary.json tells of finished rounds")
    sizes = {client: split.sizes() for client, split in partition.clients.items()}
    late = _late(recipe, list(sizes))
    examples = {client: size for client, size in sizes.items() if client not in late}
    return Run(
        path=path,
        recipe_text=text,
        recipe=recipe,
        classes=partition.classes,
        examples=examples,
        counts=_counts(partition, list(examples), path / "partition.json"),
        once=lines[0] if lines and lines[0].round == 0 else None,
        rounds=tuple(line for line in lines if line.round > 0),
        row=row,
        results=_results(summary, path / "summary.json") if summary else {},
        insights=_insights(path / "insight.safetensors", len(examples)),
        insights_before=_insights(path / "insight-before.safetensors", len(examples)),
        stopped_early=summary.stopped_early if summary else False,
        stopped=summary.stopped if summary else None,
        environment=summary.environment if summary else {},
        newcomers={client: sizes[client] for client in late},
        joined=summary.newcomers if summary else None,
    )


def read_comparison(path: str | Path) -> Comparison:
    """Read a folder of compared runs; without ``compare.json`` yet, the runs inside that are already finished.

    Raises
    ------
    RunError
        As `read_run`; or the folder holds no runs, or runs that are judged by different metrics.
    """
    comparison = _read_comparison(Path(path))
    same_metric(((run.path.name, run.metric) for run in comparison.runs if run.metric is not None), f"{path}: ")
    return comparison


def _read_comparison(path: Path) -> Comparison:
    if not path.is_dir():
        raise RunError(f"{path}: no such folder of compared runs")
    if (path / "compare.json").is_file():
        compare = parse(Compare, path / "compare.json")
        stray = next((name for name in compare.runs if name in {"", ".", ".."} or Path(name).name != name), None)
        if stray is not None:
            raise RunError(f"{path / 'compare.json'}: run {stray!r} is not the name of a folder beside it")
        if not compare.rows:
            raise RunError(f"{path / 'compare.json'}: holds no rows")
        if len(compare.rows) != len(compare.runs):
            raise RunError(f"{path / 'compare.json'}: {len(compare.rows)} rows for {len(compare.runs)} runs")
        listed = [read_run(path / name) for name in compare.runs]
        # It is written anew after every run: one that stands beside it without a result is in progress.
        waiting = [run for run in _runs_inside(path, set(compare.runs)) if not run.finished]
        rows = tuple(row.told() for row in compare.rows)
        labels = (*map(label, rows), *map(_label_of_folder, waiting))
        return Comparison(path, rows, (*listed, *waiting), labels, not waiting)
    runs = _runs_inside(path, set())
    if not runs:
        raise RunError(f"{path}: not a folder of compared runs (neither compare.json nor run directories in it)")
    rows = tuple({**run.row, "variant": _label_of_folder(run)} for run in runs if run.row is not None)
    return Comparison(path, rows, tuple(runs), tuple(map(_label_of_folder, runs)), False)


def _runs_inside(path: Path, listed: set[str]) -> list[Run]:
    folders = (recipe.parent for recipe in sorted(path.glob("*/recipe.toml")))
    return [read_run(folder) for folder in folders if folder.name not in listed]


def _label_of_folder(run: Run) -> str:
    """`label`, as far as the name that `compare` gives a run's folder tells it."""
    name = run.path.resolve().name.removesuffix(f"-s{run.seed}").replace("__", ":")
    return name if name.partition(":")[0] == run.method else run.method


def _rounds(path: Path) -> list[Round]:
    if not path.exists():
        return []  # the first round is still under way
    rounds: list[Round] = []
    whole, _, _ = text_of(path).rpartition("\n")  # what follows is of a round that was cut off while it was written
    for number, text in enumerate(whole.split("\n"), start=1):
        if not text.strip():
            continue
        line = parse(Round, path, text, f", line {number}")
        if rounds and line.round <= rounds[-1].round:
            raise RunError(f"{path}, line {number}: round {line.round} stands after round {rounds[-1].round}")
        rounds.append(line)
    return rounds


def _results(summary: Summary, path: Path) -> dict[str, ClientResult]:
    metric = metric_of(summary.row.told())
    results = {}
    for client, line in summary.clients.items():
        told = line.model_extra or {}
        numbers = {key: float(value) for key, value in told.items() if isinstance(value, int | float)}
        if metric.name not in numbers:
            raise RunError(f"{path}: clients.{client}.{metric.name}: no number")
        results[client] = ClientResult(
            score=numbers[metric.name],
            tuned=numbers.get(f"{metric.name}_tuned"),
            chosen=numbers.get(f"{metric.name}_chosen"),
            beside={name: numbers[name] for name in KNOWN if name in numbers and name != metric.name},
            examples=line.examples,
            depth=int(numbers["depth"]) if "depth" in numbers else None,
        )
    return results


def _late(recipe: Mapping[str, Any], clients: Sequence[str]) -> tuple[str, ...]:
    """The newcomers among them, by a recipe that is not validated anew."""
    section, seed = recipe.get("newcomers"), recipe.get("seed", 0)
    share = section.get("share", 0.0) if isinstance(section, dict) else 0.0
    if not (isinstance(share, int | float) and 0 < share < 1 and isinstance(seed, int)):
        return ()
    return newcomers(share, seed, clients)


def _counts(partition: Partition, clients: Sequence[str], path: Path) -> np.ndarray | None:
    if partition.counts is None:
        return None
    rows = [partition.counts.get(client, []) for client in clients]
    for client, row in zip(clients, rows, strict=True):
        if len(row) != len(partition.classes):
            raise RunError(f"{path}: counts of client {client!r} has {len(row)} of {len(partition.classes)} classes")
    return np.array(rows, dtype=np.int64)


def _insights(path: Path, clients: int) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        tensors = safetensors.numpy.load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunError(f"{path}: not a readable safetensors file: {error}") from None
    insights = {name: tensors[name].astype(np.float64) for name in INSIGHTS if name in tensors}
    for name, matrix in insights.items():
        if matrix.shape != (clients, clients):
            raise RunError(f"{path}: {name} has shape {list(matrix.shape)}; expected [{clients}, {clients}]")
    return insights
