"""The accuracy table: every method, two data sets, two kinds of skew and a disjoint split, three seeds.

    python benchmarks/accuracy.py --data ../shared/data --runs runs/accuracy

Resumable: each run has its directory under ``--runs``; what is finished there is reused, and ``results/accuracy.json``
is rewritten after every run, so a partial table is a table of what is done. Learning rates were chosen on validation
data with a seed of their own (``--tune``), from the same grid for every method; test data is read once, at the end of
each run.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from folklora.data.sources import EMBEDDED
from folklora.federation.run import compare, run_name
from folklora.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
SEEDS = 3
TUNING_SEED = 100
TUNING_EXAMPLES = 800
GRID = ("3e-3", "1e-2", "3e-2")

METHODS = (
    "local",
    "sketch",
    "fedit",
    "ffa",
    "fedsa",
    "rolora",
    "celora",
    "folklora",
    "folklora:adapter.rank=64:adapter.alpha=128",
)
"""The published methods, ours, and ours with a core about as heavy as FedIT's factors."""

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

TRAIN = {"rounds": 5, "batch_size": 16}


def settings(data: Path, made: Path) -> dict[str, dict[str, Any]]:
    """Setting name -> the recipe's data section."""
    folder = data / "snips"
    snips = {"source": str(folder / "train.jsonl"), "test": str(folder / "validate.jsonl"), "label": "intent"}
    found: dict[str, dict[str, Any]] = {}
    for alpha in (0.5, 0.1):
        skew = {"clients": 10, "partition": "dirichlet", "alpha": alpha}
        found[f"banking77 dirichlet {alpha}"] = {"limit": 1500, "test_limit": 600, **skew}
        found[f"snips dirichlet {alpha}"] = {**snips, "limit": 700, "test_limit": 350, **skew}
    found["banking77 disjoint labels"] = {
        "source": str(disjoint(made)),
        "limit": 1500,
        "test_limit": 600,
        "partition": "natural",
        "by": "tenth",
    }
    return found


def disjoint(folder: Path) -> Path:
    """Banking77 with a column that gives every label to one of ten clients: tenths of the alphabet of label names.

    Label names begin with their subject, so a tenth is a subject, as clients with businesses of their own would be.
    """
    path = folder / "banking77_disjoint.csv"
    with (EMBEDDED["banking77"] / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["category"] for row in rows}, key=str.lower)
    tenth = {label: f"tenth-{10 * i // len(labels)}" for i, label in enumerate(labels)}
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "tenth"))
        writer.writerows((row["text"], row["category"], tenth[row["category"]]) for row in rows)
    return path


class Lines:
    """Progress as one line a run, for a log."""

    def run(self, name: str) -> None:
        print(name, file=sys.stderr, flush=True)

    def phase(self, name: str, total: int) -> None: ...
    def advance(self) -> None: ...
    def line(self, metrics: Mapping[str, Any]) -> None: ...


def tune(recipes: Mapping[str, dict[str, Any]], runs: Path) -> dict[str, str]:
    """The learning rate of each method: best validation accuracy on Banking77, Dirichlet 0.5, a seed of its own."""
    bases = [m for m in METHODS if ":" not in m and m != "sketch"]
    scores: dict[tuple[str, str], list[float]] = {}
    for name in ("banking77 dirichlet 0.5",):
        # Three tenths for validation: with the usual tenth, chance would choose.
        data = {**recipes[name], "limit": TUNING_EXAMPLES, "validation": 0.3, "test_fraction": 0.05}
        train = {**TRAIN, "evaluate_every": TRAIN["rounds"]}
        recipe = Recipe.parse({"seed": TUNING_SEED, "data": data, "train": train})
        entries = [f"{method}:train.lr={lr}" for method in bases for lr in GRID]
        document = compare(recipe, entries, 1, runs / "tuning" / name.replace(" ", "-"), Lines())
        for entry, row in zip(entries, document["rows"], strict=True):
            method, _, lr = entry.partition(":train.lr=")
            scores.setdefault((method, lr), []).append(row["validation_mean"])
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    chosen = {method: max(GRID, key=lambda lr: means[method, lr]) for method in bases}
    document = {
        "grid": GRID,
        "seed": TUNING_SEED,
        "examples": TUNING_EXAMPLES,
        "validation": {f"{m} {lr}": v for (m, lr), v in means.items()},
    }
    write("tuning", {**document, "chosen": chosen})
    return chosen


def rates() -> dict[str, str]:
    """What an earlier `--tune` chose."""
    path = RESULTS / "tuning.json"
    chosen: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["chosen"] if path.exists() else {}
    return chosen


def plan(recipes: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Settings and seeds in the order they are run: a first seed of everything before a second of anything."""
    for seed in range(SEEDS):
        for name in recipes:
            yield name, seed, METHODS
    for seed in range(SEEDS):
        for name in ("banking77 dirichlet 0.5", "banking77 disjoint labels"):
            yield name, seed, ABLATIONS


def write(name: str, document: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def collect(recipes: Mapping[str, dict[str, Any]], runs: Path, chosen: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of all runs that are finished, in the order of the plan."""
    rows = []
    for name, seed, variants in plan(recipes):
        for variant in variants:
            entry = rated(variant, chosen)
            run = runs / folder_of(name) / run_name(entry, seed)
            if (run / "summary.json").exists():
                row = json.loads((run / "summary.json").read_text(encoding="utf-8"))["row"]
                known = {"setting": name, "variant": variant, "lr": float(entry.rpartition("=")[2])}
                rows.append({**row, **known, "curve": curve(run)})
    return rows


def curve(run: Path) -> list[tuple[float, float]]:
    """(bytes a client has moved so far, both ways and one-off included; mean validation accuracy) after each round."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    clients = len(json.loads((run / "partition.json").read_text(encoding="utf-8"))["clients"])
    points, moved = [], 0.0
    for line in lines:
        moved += (line["bytes_up"] + line["bytes_down"]) / clients
        if line["validation"]:
            points.append((round(moved), round(line["validation"]["mean"], 4)))
    return points


def rated(variant: str, chosen: Mapping[str, str]) -> str:
    """A variant with the learning rate that was chosen for its method."""
    return f"{variant}:train.lr={chosen.get(variant.partition(':')[0], '3e-3')}"


def folder_of(name: str) -> str:
    return name.replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder that holds snips/")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--tune", action="store_true", help="choose the learning rates first")
    parser.add_argument(
        "--only",
        default="",
        help="parts that hold one of these, such as 0.1 or ablations (several processes can share --runs)",
    )
    arguments = parser.parse_args()
    recipes = settings(arguments.data.resolve(), arguments.runs.resolve())
    chosen = tune(recipes, arguments.runs) if arguments.tune else rates()
    for name, seed, variants in plan(recipes):
        part = f"{name}; {'ablations' if variants is ABLATIONS else 'methods'}; seed {seed}"
        if not any(text in part for text in arguments.only.split(",")):
            continue
        recipe = Recipe.parse({"seed": seed, "data": dict(recipes[name]), "train": dict(TRAIN)})
        for variant in variants:
            compare(recipe, [rated(variant, chosen)], 1, arguments.runs / folder_of(name), Lines())
            rows = collect(recipes, arguments.runs, chosen)
            limits = {setting: section["limit"] for setting, section in recipes.items()}
            document = {"train": TRAIN, "lr": chosen, "examples": limits, "seeds": SEEDS}
            write("accuracy", {"settings": document, "rows": rows})
    print(json.dumps({"benchmark": "accuracy", "runs": len(collect(recipes, arguments.runs, chosen))}))


if __name__ == "__main__":
    main()
