"""The settings of the accuracy table: who holds which examples, and how long is trained.

Three public data sets of short texts, split by Dirichlet skew over labels; Banking77 with no label in two hands; and
one split nobody drew: the Schema-Guided Dialogue set, whose clients are the services that users talked to. What a data
set lacks for that (one label a text, one file with a header) is written once, into a folder of ours.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folklora.data.sources import EMBEDDED
from folklora.recipe import Recipe

TRAIN = {"rounds": 5, "batch_size": 16}
MANY = {"rounds": 25, "participation": 0.2, "evaluate_every": 5}
"""Fifty clients, ten a round: as many local epochs in all as ten clients have in five rounds."""


@dataclass(frozen=True)
class Setting:
    """A column of the table: the recipe's data section, and what its training section has of its own."""

    name: str
    data: dict[str, Any]
    train: dict[str, Any]

    def recipe(self, seed: int) -> Recipe:
        return Recipe.parse({"seed": seed, "data": dict(self.data), "train": dict(self.train)})

    def shortened(self, limit: int | None, rounds: int | None) -> Setting:
        """The same with fewer examples and rounds, for trials of the harness."""
        data, train = dict(self.data), dict(self.train)
        if limit is not None:
            data |= {"limit": limit, "min_examples": 3} | ({"test_limit": limit} if "test_limit" in data else {})
        if rounds is not None:
            train |= {"rounds": rounds}
        return Setting(self.name, data, train)


def settings(data: Path, made: Path) -> dict[str, Setting]:
    """Setting name -> setting; a data set that is not under ``data`` has none.

    Parameters
    ----------
    data
        The folder that holds ``snips/``, ``goemotions/`` and ``sgd/``; Banking77 comes with the package.
    made
        Where files are written that a data set needs first.
    """
    sources: dict[str, dict[str, Any]] = {"banking77": {"limit": 1500, "test_limit": 600}}
    if (folder := data / "snips").exists():
        snips = {"source": str(folder / "train.jsonl"), "test": str(folder / "validate.jsonl"), "label": "intent"}
        sources["snips"] = {**snips, "limit": 700, "test_limit": 350}
    if (folder := data / "goemotions").exists():
        sources["goemotions"] = {**goemotions(folder, made), "limit": 700, "test_limit": 350}
    found: dict[str, Setting] = {}
    for alpha in (0.5, 0.1):
        for source, section in sources.items():
            name = f"{source} dirichlet {alpha}"
            found[name] = Setting(name, {**section, "clients": 10, "partition": "dirichlet", "alpha": alpha}, TRAIN)
    name = "banking77 dirichlet 0.5 (50 clients)"
    skew = {"clients": 50, "partition": "dirichlet", "alpha": 0.5, "min_examples": 8}
    found[name] = Setting(name, {**sources["banking77"], **skew}, {**TRAIN, **MANY})
    name = "banking77 disjoint labels"
    section = {"source": str(disjoint(made)), "limit": 1500, "test_limit": 600}
    found[name] = Setting(name, {**section, "partition": "natural", "by": "tenth"}, TRAIN)
    if (folder := data / "sgd").exists():
        name = "sgd by service"
        section = {"source": str(services(folder, made)), "limit": 700, "label": "intent"}
        found[name] = Setting(name, {**section, "partition": "natural", "by": "service"}, TRAIN)
    return found


def disjoint(folder: Path) -> Path:
    """Banking77 with a column that gives every label to one of ten clients: tenths of the alphabet of label names.

    Label names begin with their subject, so a tenth is a subject, as clients with businesses of their own would be.
    """
    with (EMBEDDED["banking77"] / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["category"] for row in rows}, key=str.lower)
    tenth = {label: f"tenth-{10 * i // len(labels)}" for i, label in enumerate(labels)}
    lines = ((row["text"], row["category"], tenth[row["category"]]) for row in rows)
    return _table(folder / "banking77_disjoint.csv", ("text", "label", "tenth"), lambda: lines)


def goemotions(source: Path, folder: Path) -> dict[str, str]:
    """GoEmotions' comments that were given one emotion, as ``text`` and ``emotion``: the train and the test file."""
    names = (source / "labels.txt").read_text(encoding="utf-8").split()

    def single(part: str) -> Iterator[tuple[str, str]]:
        for line in (source / f"{part}.tsv").read_text(encoding="utf-8").split("\n"):
            text, tab, rest = line.partition("\t")
            ids = rest.partition("\t")[0]
            if tab and ids.isdigit() and text.strip():
                yield text, names[int(ids)]

    paths = {
        part: _table(folder / f"goemotions_{part}.csv", ("text", "emotion"), lambda part=part: single(part))
        for part in ("train", "test")
    }
    return {"source": str(paths["train"]), "test": str(paths["test"]), "label": "emotion"}


def services(source: Path, folder: Path) -> Path:
    """Schema-Guided Dialogue: what a user says where the intent changes, the intent, and the service it was said to.

    Other turns ("in San Jose, please") do not say what is wanted. ``NONE`` is an intent like the others: the user has
    what was wanted. Several services have the same intents (three of them book appointments), others share none but
    that.
    """

    def turns() -> Iterator[tuple[str, str, str]]:
        with (source / "train.jsonl").open(encoding="utf-8") as file:
            for line in file:
                before: list[str] = []
                for speaker, text, involved, intents in json.loads(line)["turns"]:
                    if speaker != "U":
                        continue
                    if len(involved) == len(intents) == 1 and intents != before and text.strip():
                        yield text, intents[0], involved[0]
                    before = intents

    return _table(folder / "sgd_services.csv", ("text", "intent", "service"), turns)


def _table(path: Path, header: tuple[str, ...], rows: Callable[[], Iterable[tuple[str, ...]]]) -> Path:
    """Write a CSV unless it is there: whole or not at all, since another process may be reading it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows())
        temporary.replace(path)
    return path
