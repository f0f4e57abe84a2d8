"""The accuracy table: every method over every setting of `settings.py`, three seeds, each at its own learning rate.

    python benchmarks/accuracy.py --data ../shared/data --runs runs/accuracy --tune
    python benchmarks/accuracy.py --list                       # what is done, what is left, and how long it may take
    python benchmarks/accuracy.py --only "50 clients,ranks" --seed 0,1
    python benchmarks/accuracy.py --collect                    # only rewrite the results from the runs

Four parts: *methods* (all at rank 8), *equal bytes* (each method at the rank whose bytes a round come closest to
FedIT's), *ranks* (clients of unequal rank), *ablations* (one setting changed at a time). The most telling runs come
first, so a partial table is worth reading.

Any number of processes can share ``--runs``: each run is claimed by one of them, and the results are collected from
disk, so nothing is run twice and nothing is lost. Kill it at any time; what is finished is reused, what was begun goes
on where it stood. Learning rates are chosen on validation data with a seed of their own, from the same grid for every
method, in a mild setting and in the most severe one (``--tune``), and once more for the ranks at equal bytes; test data
is read once, at the end of each run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equal_bytes
from resumable import Row, Store, claimed, perform, placeless, same
from settings import TRAIN, Setting, settings

from folklora.federation.run import run_name, variant
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.methods import METHODS as REGISTRY
from folklora.report.tables import human_seconds

RESULTS = Path(__file__).parent / "results"
SEEDS = 3
TUNING_SEED = 100
TUNING_SETTINGS = ("banking77 dirichlet 0.5", "banking77 disjoint labels")
"""One where clients have much in common, one where no label is in two hands: the rate with the best mean of both."""
TUNING_EXAMPLES = 800
HOPELESS = 0.5
"""A rate that reaches less than this share of its method's best in the first setting is not tried in the second."""
GRID = ("1e-3", "3e-3", "1e-2", "3e-2", "1e-1")
SGD_GRID = ("3e-2", "1e-1", "3e-1", "1e0", "3e0")
"""Plain gradients are not brought to one size as AdamW's are: as many rates, half a decade apart too."""

OPTIONS = (
    "fedit:proximal=0.1",
    "fedit:fedopt=adam",
    "fedit:train.optimizer=sgd",
    "fedit:train.optimizer=sgd:scaffold=true",
)
"""What is published as a method and is an option of another here; tuned like a method."""

ALSO_TUNED = ("folklora:train.head_lr=1e-3",)
"""Tuned, and run no further: validation gives FolkLoRA's core the rate that its sketched head has anyway."""

AT_ONE_RANK = {"zeropad": "fedit", "replication": "fedit", "hafl": "fedit"}
"""What is another method where all clients have one rank, and is run, and tuned, only where they have not."""

PLAIN = tuple(name for name in REGISTRY if name not in AT_ONE_RANK)
METHODS = (*PLAIN, *OPTIONS, "folklora:adapter.rank=64:adapter.alpha=128")
"""The published methods, ours, and ours with a core about as heavy as one of FedIT's factors."""

ABLATIONS = (
    "fedit:head_start=sketched",
    "local:head=sketched",
    "celora:head=sketched",
    "celora:similarity=data",
    "celora:similarity=model",
    "celora:similarity=uniform",
    "celora:temperature=0.1",
    "celora:basis=aligned",
    "celora:basis=frozen",
    "celora:head=shared",
    "celora:adapter.rank=32:adapter.alpha=64",
    "folklora:similarity=both",
    "folklora:head_start=sketched",
    "folklora:head=private:head_start=zero",
    "folklora:basis=private",
)
"""What a sketched head does for others, and why CE-LoRA does what it does: one setting at a time."""

RANKS = {"2 to 32": [2, 2, 4, 4, 8, 8, 16, 16, 32, 32]}
"""Classes of devices, and the rank of each of ten clients."""

PROMOTED = {"5, the best then 20": (5, 20)}
"""Ranks that rise: all start at one, and the best of those first validated get the other (arXiv 2406.17477)."""

MIXED_OPTIONS = ("hafl:scheme=freezing",)
"""Options that differ from their method only where ranks do."""

NO_RATE = {"sketch": "3e-3"}
"""What does not train; the rate only names its runs."""

FIRST = ("banking77 dirichlet 0.5", "snips dirichlet 0.1")
THEN = (
    "banking77 dirichlet 0.1",
    "goemotions dirichlet 0.5",
    "sgd by service",
    "snips dirichlet 0.5",
    "goemotions dirichlet 0.1",
)
MANY = ("banking77 dirichlet 0.5 (50 clients)",)
LAST = ("banking77 disjoint labels",)
STAGES: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("methods", FIRST, (0,)),
    ("methods", FIRST, (1, 2)),
    ("methods", (*THEN, *MANY), (0,)),
    ("methods", THEN, (1, 2)),
    ("equal bytes", ("sgd by service",), (0, 1, 2)),
    ("ranks", FIRST[:1], (0, 1, 2)),
    ("ablations", FIRST[:1], (0, 1, 2)),
    ("equal bytes", FIRST[:1], (0, 1, 2)),
    ("methods", MANY, (1, 2)),
    ("methods", LAST, (0, 1, 2)),
    ("ablations", LAST, (0, 1, 2)),
)
"""Part, settings and seeds in the order they are run: within a stage one seed of all settings before the next."""


@dataclass(frozen=True)
class Cell:
    """One run: a variant, as `folklora compare --methods` takes it but for the rate, in a setting with a seed."""

    part: str
    setting: Setting
    seed: int
    variant: str
    rate: str | None = None  # where it is not for any tuning to say
    tuned: str | None = None  # what was tuned for it, where that is not its method

    @property
    def key(self) -> tuple[str, str, int]:
        return self.setting.name, self.variant, self.seed

    @property
    def label(self) -> str:
        return f"{self.setting.name}; {self.part}; seed {self.seed}"

    def entry(self, rates: Mapping[str, str]) -> str | None:
        """The variant at its method's learning rate; None until that is chosen."""
        rate = self.rate or (rates.get(self.tuned) if self.tuned else rate_of(self.variant, rates))
        return None if rate is None else f"{self.variant}:train.lr={rate}"

    def folder(self, runs: Path, entry: str) -> Path:
        name = re.sub(r"[^\w.]+", "-", self.setting.name).strip("-")
        return runs / ("tuning" if self.part == "tuning" else "") / name / run_name(entry, self.seed)

    def identity(self, entry: str) -> str:
        """What the result depends on, in short: wherever the files lie."""
        told = [placeless(self.setting.data), self.setting.train, self.seed, entry]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def rate_of(variant: str, rates: Mapping[str, str]) -> str | None:
    """That of the variant without its size if such variants are tuned, else its method's."""
    method, *options = variant.split(":")
    method = AT_ONE_RANK.get(method, method)
    plain = ":".join((method, *(o for o in options if not o.startswith("adapter."))))
    return NO_RATE.get(method) or rates.get(plain if plain in OPTIONS else method)


def mixed_ranks() -> tuple[str, ...]:
    """Every method that takes clients of unequal rank, and FedIT with everybody at the lowest or the highest."""
    found = []
    for ranks in RANKS.values():
        able = [name for name, method in REGISTRY.items() if method.mixed_ranks and name not in NO_RATE]
        able += MIXED_OPTIONS
        found += [f"{name}:adapter.rank={json.dumps(ranks, separators=(',', ':'))}" for name in able]
        found += [f"fedit:adapter.rank={rank}" for rank in (min(ranks), max(ranks))]
    for first, then in PROMOTED.values():
        able = [name for name, method in REGISTRY.items() if method.promotes]
        found += [f"{name}:adapter.rank={first}:adapter.promote={then}" for name in able]
        found += [f"fedit:adapter.rank={rank}" for rank in (first, then)]
    return tuple(dict.fromkeys(found))


def plan(found: Mapping[str, Setting], equal: Mapping[str, Mapping[str, str]]) -> list[Cell]:
    """All runs in their order; a run that two parts share stands in both."""
    cells = []
    for part, names, seeds in STAGES:
        for seed in seeds:
            for name in names:
                if name not in found:
                    continue
                if part == "equal bytes":
                    tuned = equal.get(TUNING_SETTINGS[0], {})
                    for method, entry in equal.get(name, {}).items():
                        cells.append(Cell(part, found[name], seed, entry, tuned=tuned.get(method, entry)))
                    continue
                variants = {"methods": METHODS, "ablations": ABLATIONS, "ranks": mixed_ranks()}[part]
                cells += [Cell(part, found[name], seed, each) for each in variants]
    return cells


TUNED = tuple(variant for variant in (*PLAIN, *OPTIONS, *ALSO_TUNED) if variant not in NO_RATE)


def grid(variant: str) -> tuple[str, ...]:
    return SGD_GRID if "train.optimizer=sgd" in variant else GRID


def priced(setting: Setting) -> list[Cell]:
    """What stands in the plan for a setting's runs at equal bytes before it is known at which rank."""
    stages = [(names, seeds) for part, names, seeds in STAGES if part == "equal bytes"]
    return [
        Cell("equal bytes", setting, seed, "") for names, seeds in stages if setting.name in names for seed in seeds
    ]


Scores = Mapping[str, Mapping[str, float]]
"""Setting -> ``variant rate`` -> validation accuracy."""


def tuning(
    found: Mapping[str, Setting], examples: int, scores: Scores, at_equal_bytes: Sequence[str] = ()
) -> list[Cell]:
    """The runs that choose the learning rates; those of the second setting as soon as the first has said which.

    A rate that suits rank 8 may ruin rank 80: so what methods are ``at_equal_bytes`` in the first setting is tuned by
    itself, and says the rate of these methods at equal bytes wherever.
    """
    cells = []
    for name in TUNING_SETTINGS:
        plain = found[name]
        # Three tenths for validation: with the usual tenth, chance would choose.
        data = {**plain.data, "limit": examples, "validation": 0.3, "test_fraction": 0.05}
        setting = Setting(plain.name, data, {**plain.train, "evaluate_every": plain.train["rounds"]})
        for method in (*TUNED, *at_equal_bytes):
            rates = grid(method) if name == TUNING_SETTINGS[0] else promising(method, scores)
            cells += [Cell("tuning", setting, TUNING_SEED, method, rate) for rate in rates]
    return cells


def tried(method: str, rates: Iterable[str], setting: str, scores: Scores) -> dict[str, float]:
    """Rate -> score, of those rates that were tried in the setting."""
    found = {rate: scores.get(setting, {}).get(f"{method} {rate}") for rate in rates}
    return {rate: score for rate, score in found.items() if score is not None}


def promising(method: str, scores: Scores) -> tuple[str, ...]:
    """The rates that the first setting leaves; none until all of them were tried there."""
    known = tried(method, grid(method), TUNING_SETTINGS[0], scores)
    if len(known) < len(grid(method)):
        return ()
    return tuple(rate for rate, score in known.items() if score >= HOPELESS * max(known.values()))


def chosen_rate(method: str, scores: Scores) -> str | None:
    """The rate whose mean over the settings is best; None until all promising ones were tried everywhere."""
    rates = promising(method, scores)
    known = [tried(method, rates, setting, scores) for setting in TUNING_SETTINGS]
    if not rates or any(len(each) < len(rates) for each in known):
        return None
    return max(rates, key=lambda rate: sum(each[rate] for each in known))


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass
class Bench(Store):
    """What settings there are, and what of their runs has been read."""

    found: Mapping[str, Setting]
    examples: int = TUNING_EXAMPLES
    equal: dict[str, dict[str, str]] = field(default_factory=dict)
    read: dict[Path, Row] = field(default_factory=dict)
    before: dict[str, Any] = field(init=False)  # ``accuracy.json`` as it was last read
    held: dict[tuple[str, str, int], Row] = field(init=False)  # its rows: runs are not kept for ever
    tuned: dict[str, Any] = field(init=False)  # ``tuning.json`` as it was last read

    def __post_init__(self) -> None:
        self._hold()
        self.tuned = self._tuning()

    def _tuning(self) -> dict[str, Any]:
        """Nothing, if it was made with another seed, other examples or other settings."""
        found = self.load("tuning")
        made = tuple(found.get(key) for key in ("seed", "examples", "settings"))
        return found if made == (TUNING_SEED, self.examples, list(TUNING_SETTINGS)) else {}

    def _hold(self) -> None:
        self.before = self.load("accuracy")
        self.held = {(row["setting"], row["variant"], row["seed"]): row for row in self.before.get("rows", [])}

    # -- learning rates ------------------------------------------------------------------------------------------

    def rates(self) -> dict[str, str]:
        chosen: dict[str, str] = self.load("tuning").get("chosen", {})
        return chosen

    def tuning_cells(self) -> list[Cell]:
        return tuning(self.found, self.examples, self.tuned.get("validation", {}), self.at_equal_bytes())

    def at_equal_bytes(self) -> tuple[str, ...]:
        """What is tuned beside the methods: their entries at equal bytes in the first setting, once they are known, and
        of methods that have none there those of another."""
        known = self.before.get("settings", {}).get("equal_bytes", {}) | self.equal
        others = [name for part, names, _ in STAGES if part == "equal bytes" for name in names]
        entries: dict[str, str] = {}
        for name in (TUNING_SETTINGS[0], *others):
            for method, entry in known.get(name, {}).items():
                entries.setdefault(method, entry)
        return tuple(entries.values())

    def collect_tuning(self) -> None:
        """Validation accuracy by setting, method and rate, and the best rate of every method that has been tried."""
        with self.locked():
            before = self.tuned = self._tuning()
            scores = {name: dict(before.get("validation", {}).get(name, {})) for name in TUNING_SETTINGS}
            chosen: dict[str, str] = dict(before.get("chosen", {}))
            resized = self.at_equal_bytes()
            for name in TUNING_SETTINGS:  # the first says what is asked of the second
                for cell in tuning(self.found, self.examples, scores, resized):
                    entry = cell.entry({})
                    if cell.setting.name == name and entry and (row := self.finished(cell, entry)) is not None:
                        scores[name][f"{cell.variant} {cell.rate}"] = row["validation_mean"]
            tuned = (*TUNED, *resized)
            chosen |= {variant: rate for variant in tuned if (rate := chosen_rate(variant, scores)) is not None}
            made = {"seed": TUNING_SEED, "examples": self.examples, "settings": list(TUNING_SETTINGS)}
            self.tuned = {"grid": GRID, "sgd_grid": SGD_GRID, **made, "validation": scores, "chosen": chosen}
            self.write("tuning", self.tuned)

    # -- rows ----------------------------------------------------------------------------------------------------

    def finished(self, cell: Cell, entry: str) -> Row | None:
        """The row of a run of this very recipe that is on disk and finished, or whose row was collected before."""
        path = cell.folder(self.runs, entry)
        if path not in self.read:
            if not (path / "summary.json").exists():
                return self._collected(cell, entry)
            recipe = variant(cell.setting.recipe(cell.seed), entry, cell.seed)
            if not same(RunDirectory.open(path).recipe, recipe):
                return None
            row = json.loads((path / "summary.json").read_text(encoding="utf-8"))["row"]
            self.read[path] = {**row, "curve": curve(path)}
        return self.read[path]

    def _collected(self, cell: Cell, entry: str) -> Row | None:
        if cell.part == "tuning":
            score = self.tuned.get("validation", {}).get(cell.setting.name, {}).get(f"{cell.variant} {cell.rate}")
            return None if score is None else {"validation_mean": score}
        row = self.held.get(cell.key)
        return row if row is not None and holds(row, cell, entry, self.before["settings"]) else None

    def collect(self, write: bool = True) -> list[Row]:
        """Rewrite ``accuracy.json`` from what is on disk, and what it held before that is not."""
        with self.locked():
            self._hold()
            before, rates = self.before, self.rates()
            self.equal = before.get("settings", {}).get("equal_bytes", {}) | self.equal
            cells = plan(self.found, self.equal)
            rows: dict[tuple[str, str, int], Row] = {}
            for cell in cells:
                entry = cell.entry(rates)
                if cell.key in rows:
                    continue
                if entry is None:
                    if cell.key in self.held:  # a rate that is chosen later may be the one it was run at
                        rows[cell.key] = self.held[cell.key]
                elif (row := self.finished(cell, entry)) is not None:
                    known = {"setting": cell.setting.name, "variant": cell.variant, "recipe": cell.identity(entry)}
                    rows[cell.key] = {**row, **known, "lr": float(entry.rpartition("=")[2])}
            # Settings whose data is not at hand here keep their rows, and their place in the plan.
            rows |= {key: row for key, row in self.held.items() if key[0] not in self.found}
            described, ran = self.described(cells, rates), {key[0] for key in rows}
            for name, old in before.get("settings", {}).items():
                if name == "parts":
                    for part, settings_ in old.items():
                        absent = {k: v for k, v in settings_.items() if k not in self.found and k in ran}
                        described["parts"][part] = {**absent, **described["parts"].get(part, {})}
                elif name in ("examples", "settings"):
                    described[name] = {**{k: v for k, v in old.items() if k in ran}, **described[name]}
            if write:
                self.write("accuracy", {"settings": described, "rows": list(rows.values())})
        return list(rows.values())

    def described(self, cells: Sequence[Cell], rates: Mapping[str, str]) -> dict[str, Any]:
        """What tables need to know of the plan: what is planned where, and how settings differ."""
        parts: dict[str, dict[str, list[str]]] = {}
        for cell in cells:
            variants = parts.setdefault(cell.part, {}).setdefault(cell.setting.name, [])
            if cell.variant not in variants:
                variants.append(cell.variant)
        return {
            "train": TRAIN,
            "lr": dict(rates),
            "examples": {name: setting.data["limit"] for name, setting in self.found.items()},
            "settings": {name: {**placeless(s.data), **s.train} for name, s in self.found.items()},
            "seeds": SEEDS,
            "parts": parts,
            "equal_bytes": self.equal,
            "ranks": {**RANKS, **PROMOTED},
        }

    # -- equal bytes ---------------------------------------------------------------------------------------------

    def price(self, names: Iterable[str]) -> dict[str, str]:
        """Find the entries at equal bytes of these settings: what a method sends is asked of the method itself.

        Returns which methods could not be asked, and why.
        """
        failed = {}
        for name in names:
            setup = prepare(self.found[name].recipe(0))
            budget = equal_bytes.round_bytes(setup, equal_bytes.BUDGET)
            entries = {}
            for method in (*PLAIN, *OPTIONS):
                try:
                    if (entry := equal_bytes.entry(setup, method, budget)) is not None:
                        entries[method] = entry
                except Exception as error:
                    failed[f"{name}; equal bytes: {method}"] = f"{type(error).__name__}: {error}"
            self.equal[name] = entries
        return failed


def holds(row: Row, cell: Cell, entry: str, described: Mapping[str, Any]) -> bool:
    """Whether a row of earlier results, whose run is not here, is still what this cell would give."""
    if row["lr"] != float(entry.rpartition("=")[2]):
        return False
    if "recipe" in row:
        return bool(row["recipe"] == cell.identity(entry))
    # Written before rows told their recipe.
    setting = cell.setting
    return bool(
        described["train"] == setting.train and described["examples"].get(setting.name) == setting.data["limit"]
    )


def curve(path: Path) -> list[tuple[int, float]]:
    """(bytes a client has moved so far, both ways and one-off included; mean validation accuracy) after each round."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    clients = len(json.loads((path / "partition.json").read_text(encoding="utf-8"))["clients"])
    points, moved = [], 0.0
    for line in lines:
        moved += (line["bytes_up"] + line["bytes_down"]) / clients
        if line["validation"]:
            points.append((round(moved), round(line["validation"]["mean"], 4)))
    return points


# -- how long --------------------------------------------------------------------------------------------------------


class Pace:
    """How long runs take: by what runs of the setting took before, scaled to how this process is doing."""

    def __init__(self, rows: Iterable[Row], unknown: float = 30.0) -> None:
        self.seconds: dict[str, list[float]] = {}
        for row in rows:
            self.seconds.setdefault(row["setting"], []).append(row["seconds_total"])
        everything = [s for each in self.seconds.values() for s in each]
        self.unknown = statistics.median(everything) if everything else unknown
        self.predicted = self.taken = 0.0

    def of(self, setting: str) -> float:
        known = self.seconds.get(setting)
        return statistics.median(known) if known else self.unknown

    def saw(self, setting: str, seconds: float) -> None:
        self.predicted += self.of(setting)
        self.taken += seconds

    def left(self, settings: Iterable[str]) -> float:
        scale = self.taken / self.predicted if self.predicted else 1.0
        return scale * sum(map(self.of, settings))


def work(bench: Bench, cells: Sequence[Cell], pace: Pace) -> dict[str, str]:
    """Run what is not finished and not another process's; returns what failed and why.

    Goes over the cells again as long as that brings anything: a learning rate may have been chosen meanwhile, another
    process may have given up a claim.
    """
    failed: dict[str, str] = {}
    progress = True
    while progress:
        progress = False
        for index, cell in enumerate(cells):
            entry = cell.entry(bench.rates())
            name = f"{cell.label}: {entry or cell.variant}"
            if entry is None or name in failed or bench.finished(cell, entry) is not None:
                continue
            path = cell.folder(bench.runs, entry)
            with claimed(path, bench.runs) as mine:
                if not mine or bench.finished(cell, entry) is not None:
                    continue
                started = time.perf_counter()
                try:
                    row = perform(variant(cell.setting.recipe(cell.seed), entry, cell.seed), path)
                except Exception as error:  # one method's bug must not end everybody's night
                    failed[name] = f"{type(error).__name__}: {error}"
                    print(f"{name}: failed: {failed[name]}", file=sys.stderr, flush=True)
                    continue
                seconds = time.perf_counter() - started
            progress = True
            pace.saw(cell.setting.name, seconds)
            bench.collect_tuning() if cell.part == "tuning" else bench.collect()
            ahead = unfinished(bench, cells[index + 1 :])
            remaining = human_seconds(pace.left(each.setting.name for each in ahead))
            score = row["validation_mean" if cell.part == "tuning" else "accuracy_mean"]
            print(
                f"{name}: {100 * score:.1f} % in {human_seconds(seconds)}; "
                f"{len(ahead)} left, about {remaining} for one process",
                file=sys.stderr,
                flush=True,
            )
    return failed


def unfinished(bench: Bench, cells: Sequence[Cell]) -> list[Cell]:
    """What is left, each run once."""
    rates = bench.rates()
    runs: dict[tuple[object, ...], Cell] = {}
    for cell in cells:
        entry = cell.entry(rates)
        if entry is None or bench.finished(cell, entry) is None:
            runs.setdefault((cell.key, cell.rate), cell)
    return list(runs.values())


def listed(bench: Bench, cells: Sequence[Cell], pace: Pace) -> Iterator[str]:
    """What is done and what is left, one line a part, setting and seed."""
    rates = bench.rates()
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    for label, group in groups.items():
        missing = unfinished(bench, group)
        time_left = human_seconds(pace.left(each.setting.name for each in missing)) if missing else "nothing left"
        untuned = sum(cell.entry(rates) is None for cell in group)
        note = f", {untuned} without a learning rate (--tune)" if untuned else ""
        yield f"{label}: {len(group) - len(missing)} of {len(group)} done, {time_left}{note}"
    missing = unfinished(bench, cells)
    total = human_seconds(pace.left(each.setting.name for each in missing))
    yield f"in all {len(missing)} runs left, about {total} for one process"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds snips/, goemotions/, sgd/")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tune", action="store_true", help="choose the learning rates first")
    parser.add_argument(
        "--only", default="", help="parts whose `setting; part; seed n` holds one of these, with commas"
    )
    parser.add_argument("--seed", default="", help="only these seeds, with commas")
    parser.add_argument("--method", default="", help="only these methods, with commas")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left; run nothing")
    parser.add_argument("--collect", action="store_true", help="rewrite the results from the runs; run nothing")
    parser.add_argument("--limit", type=int, help="examples of each setting, for trying the harness out")
    parser.add_argument("--rounds", type=int, help="likewise")
    arguments = parser.parse_args()
    if (arguments.limit or arguments.rounds) and arguments.results.resolve() == RESULTS:
        parser.error("--limit and --rounds are for trials; give them --results and --runs of their own")
    return arguments


def filtered(cells: Sequence[Cell], only: str, seed: str, method: str) -> list[Cell]:
    """The cells that all filters let through."""
    texts, seeds, methods = ([each.strip() for each in given.split(",") if each] for given in (only, seed, method))
    return [
        cell
        for cell in cells
        if (not texts or any(text in cell.label for text in texts))
        and (not seeds or str(cell.seed) in seeds)
        and (not methods or cell.variant.partition(":")[0] in methods)
    ]


def main() -> None:
    arguments = parse()
    runs = arguments.runs.resolve()
    found = settings(arguments.data.resolve(), runs)
    found = {name: setting.shortened(arguments.limit, arguments.rounds) for name, setting in found.items()}
    bench = Bench(runs, arguments.results, found, min(TUNING_EXAMPLES, arguments.limit or TUNING_EXAMPLES))
    filters = (arguments.only, arguments.seed, arguments.method)
    bench.collect_tuning()

    def rates() -> list[Cell]:
        return filtered(bench.tuning_cells(), "", "", arguments.method) if arguments.tune else []

    pace = Pace(bench.collect(write=not arguments.list))
    failed: dict[str, str] = {}
    if not (arguments.list or arguments.collect):
        first = TUNING_SETTINGS[:1] if arguments.tune else ()  # its ranks are tuned, whatever else is asked for
        failed |= bench.price(
            name for name in found if name in first or filtered(priced(found[name]), *filters[:2], "")
        )
        for _ in TUNING_SETTINGS:  # what is asked of the second is known after the first
            failed |= work(bench, rates(), pace)
        failed |= work(bench, filtered(plan(found, bench.equal), *filters), pace)
        bench.collect()
    cells = [*rates(), *filtered(plan(found, bench.equal), *filters)]
    for line in listed(bench, cells, pace):
        print(line, file=sys.stderr)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(json.dumps({"benchmark": "accuracy", "left": len(unfinished(bench, cells)), "failed": len(failed)}))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
