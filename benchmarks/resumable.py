"""Runs that many processes share: what is finished is reused, what was begun goes on, and any of them may be killed."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from _common import RESULTS

from folklora.errors import FolkLoraError, RunError
from folklora.federation.run import resume, run
from folklora.federation.rundir import RunDirectory
from folklora.recipe import Recipe
from folklora.report.tables import human_seconds

Row = dict[str, Any]


class Labelled(Protocol):
    """A cell of a benchmark's grid."""

    @property
    def label(self) -> str: ...


Cell = TypeVar("Cell", bound=Labelled)


def placeless(section: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's section with the names of its files, wherever they lie."""
    return {k: Path(v).name if k in ("source", "test", "name") and v else v for k, v in section.items()}


def same(one: Recipe, other: Recipe) -> bool:
    """The same run, wherever its files lie."""
    a, b = ({**recipe.model_dump(), "data": placeless(recipe.data.model_dump())} for recipe in (one, other))
    return a == b


@contextmanager
def claimed(path: Path, runs: Path) -> Iterator[bool]:
    """Whether the run is this process's alone; the system gives the claim back however the process ends."""
    claims = runs / ".claims"
    claims.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.relative_to(runs)).encode()).hexdigest()[:24]
    with (claims / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def perform(recipe: Recipe, path: Path) -> Row:
    """The row of a run: begun, gone on with, or only read."""
    if (path / "recipe.toml").exists():
        if not same(RunDirectory.open(path).recipe, recipe):
            raise RunError(f"{path} holds a run of another recipe; remove it, or use another --runs")
        summary = resume(path)
    else:
        summary = run(recipe, path)
    row: Row = summary["row"]
    return row


def kept(path: Path) -> Row | None:
    """What `keep` wrote of a cell that is more than a run, or none: None until it is finished."""
    file = path / "row.json"
    row: Row | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return row


def keep(path: Path, row: Row) -> None:
    """Whole or not at all."""
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / "row.json.part"
    temporary.write_text(json.dumps(row, allow_nan=False), encoding="utf-8")
    temporary.replace(path / "row.json")


def arguments(doc: str | None, name: str, threads: int = 2) -> argparse.ArgumentParser:
    """What every benchmark of this kind can be told; ``name``: of the folder of its runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", threads)))
    parser.add_argument("--list", action="store_true", help="say what is done and what is left; run nothing")
    parser.add_argument("--collect", action="store_true", help="rewrite the results from the runs; run nothing")
    return parser


@dataclass
class Store:
    """Where runs and results lie."""

    runs: Path
    results: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time reads the disk and writes what it read: nobody's finished run is written away."""
        self.results.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.results, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def load(self, name: str) -> dict[str, Any]:
        path = self.results / f"{name}.json"
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return document

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Whole or not at all; a row a line."""
        rows = document.get("rows")
        text = json.dumps({**document, **({"rows": []} if rows else {})}, indent=1, allow_nan=False)
        if rows:
            lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
            text = text.replace('"rows": []', f'"rows": [\n  {lines}\n ]')
        temporary = self.results / f".{name}.json.part"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.results / f"{name}.json")


def work(
    left: Callable[[], Sequence[Cell]],
    folder: Callable[[Cell], Path],
    run_one: Callable[[Cell, Path], str],
    collect: Callable[[], object],
    runs: Path,
) -> dict[str, str]:
    """Run what is not finished and not another process's, as long as there is any; returns what failed and why.

    Parameters
    ----------
    left
        What is not finished and can be run now, the most telling first; asked again after every run.
    run_one
        Does it, and says in words what became of it (or nothing).
    collect
        Rewrites the results from what is on disk.
    """
    failed: dict[str, str] = {}
    while ready := [cell for cell in left() if cell.label not in failed]:
        ran = False
        for cell in ready:
            path = folder(cell)
            with claimed(path, runs) as mine:
                if not mine or cell.label not in {each.label for each in left()}:
                    continue
                started = time.perf_counter()
                try:
                    words = run_one(cell, path)
                except Exception as error:  # one method's bug must not end everybody's night
                    ours = isinstance(error, FolkLoraError)
                    failed[cell.label] = str(error) if ours else f"{type(error).__name__}: {error}"
                    print(f"{cell.label}: failed: {failed[cell.label]}", file=sys.stderr, flush=True)
                    continue
            ran = True
            collect()
            taken = human_seconds(time.perf_counter() - started)
            told = f"{words} in {taken}" if words else taken
            print(f"{cell.label}: {told}; {len(left())} left", file=sys.stderr, flush=True)
            break  # what is most telling next may be another now
        if not ran:
            break
    return failed
