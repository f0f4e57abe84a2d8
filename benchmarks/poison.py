"""Clients that lie: what 0 to 30 % of them do to the honest ones, by attack, method and rule of aggregation.

    python benchmarks/poison.py                                  # --runs runs/poison; kill it at any time, it goes on
    python benchmarks/poison.py --attacks sign --shares 0,0.3 --variants "fedit,celora" --seeds 1
    python benchmarks/poison.py --list                           # what is done and what is left
    python benchmarks/poison.py --collect                        # only rewrite the results from the runs

Banking77, ten clients. Rules are told to withstand 30 % of liars, as many as there ever are. A row has the accuracy of
the honest clients' own models, the share of their test texts of other classes that a backdoor's trigger turns into its
target (without liars: what the trigger does by itself), and, where replies are mixed for each client, how much weight
honest clients gave to liars beside what equal weights would give them. As in `tasks.py` any number of processes can
share ``--runs``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from _common import environment, finish
from resumable import Store, arguments, perform, work

from folklora.federation.run import run_name, variant
from folklora.recipe import Recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "banking77.toml"
CHANGES = ("data.limit=1500", "model.max_length=64", "train.rounds=5", "train.evaluate_every=5", "robust.byzantine=0.3")
RULES = ("clip", "median", "trimmed", "krum", "multikrum", "geometric")
VARIANTS = ("fedit", *(f"fedit:robust.rule={rule}" for rule in RULES), "celora", "celora:robust.rule=clip", "folklora")
ATTACKS = {"labels": 1.0, "sign": 3.0, "noise": 3.0, "backdoor": 3.0}
"""And what a liar's update is multiplied by: to stand out among seven to nine others it shouts."""
SHARES = (0.0, 0.1, 0.2, 0.3)
SEEDS = 3


@dataclass(frozen=True)
class Cell:
    """One run. Without liars all attacks are the same run, made as a backdoor's, so that its control is measured."""

    variant: str
    attack: str
    share: float
    seed: int

    @property
    def entry(self) -> str:
        told = f"poison.kind={self.attack}:poison.share={self.share:g}:poison.scale={ATTACKS[self.attack]:g}"
        return f"{self.variant}:{told}"

    @property
    def label(self) -> str:
        return f"{self.variant}, {self.attack} {self.share:.0%}, seed {self.seed}"

    def recipe(self, changes: Sequence[str]) -> Recipe:
        return variant(Recipe.read(RECIPE, [*CHANGES, *changes]), self.entry, self.seed)

    def folder(self, runs: Path) -> Path:
        return runs / run_name(self.entry, self.seed)


def plan(variants: Sequence[str], attacks: Sequence[str], shares: Sequence[float], seeds: int) -> list[Cell]:
    """All runs; one seed of everything first, the largest share before the others."""
    found = []
    for seed in range(seeds):
        for share in sorted(shares, reverse=True):
            for attack in attacks if share else ("backdoor",):
                found += [Cell(name, attack, share, seed) for name in variants]
    return found


def row_of(cell: Cell, path: Path) -> dict[str, Any] | None:
    """What the results tell of a run; None until it is finished."""
    if not (path / "summary.json").exists():
        return None
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    told, row = summary["poison"], summary["row"]
    backdoor = told.get("backdoor", {})
    return {
        "variant": cell.variant,
        "attack": cell.attack if cell.share else "none",
        "share": cell.share,
        "seed": cell.seed,
        "honest_mean": told["honest"]["accuracy_mean"],
        "honest_worst": told["honest"]["accuracy_worst"],
        "backdoor": backdoor.get("success"),
        "backdoor_control": backdoor.get("control"),
        "weight_of_liars": _weight(path, list(summary["clients"]), told["clients"]),
        "rounds": row["rounds"],
        "seconds": row["seconds_total"],
    }


def _weight(path: Path, clients: Sequence[str], liars: Sequence[str]) -> float | None:
    """The weight that honest clients' replies gave to liars, beside that of equal weights (1: the same)."""
    file = path / "insight.safetensors"
    if not liars or not file.exists():
        return None
    tensors = safetensors.torch.load_file(file)
    if "weights" not in tensors:
        return None
    lies = torch.tensor([client in liars for client in clients])
    given = float(tensors["weights"][~lies][:, lies].sum(dim=1).mean())
    return given / (len(liars) / len(clients))


def collect(bench: Store, cells: Sequence[Cell], changes: Sequence[str]) -> None:
    """Rewrite ``poison.json`` from the runs on disk; rows that were not asked for now stay."""
    with bench.locked():
        before = bench.load("poison")
        rows = {_key(row): row for row in before.get("rows", []) if before.get("changes") == [*CHANGES, *changes]}
        found = [row for cell in cells if (row := row_of(cell, cell.folder(bench.runs))) is not None]
        rows |= {_key(row): row for row in found}
        where = environment(torch.device("cpu"), torch.float32)
        document = {"environment": where, "recipe": RECIPE.name, "changes": [*CHANGES, *changes], "scales": ATTACKS}
        bench.write("poison", {**document, "rows": [rows[key] for key in sorted(rows)]})


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["attack"], row["share"], row["seed"]


def main() -> None:
    parser = arguments(__doc__, "poison")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="as `folklora compare --methods`")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--shares", default=",".join(f"{share:g}" for share in SHARES), help="of the clients, that lie")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--set", action="append", default=[], help="key=value over the recipe, for trials")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    attacks = given.attacks.split(",")
    if unknown := [name for name in attacks if name not in ATTACKS]:
        raise SystemExit(f"--attacks: no such attack {unknown[0]!r}; allowed: {', '.join(ATTACKS)}")
    cells = plan(given.variants.split(","), attacks, [float(share) for share in given.shares.split(",")], given.seeds)
    bench = Store(given.runs.resolve(), given.results)

    def folder(cell: Cell) -> Path:
        return cell.folder(bench.runs)

    def missing() -> list[Cell]:
        return [cell for cell in cells if row_of(cell, folder(cell)) is None]

    def run_one(cell: Cell, path: Path) -> str:
        perform(cell.recipe(given.set), path)
        row = row_of(cell, path)
        assert row is not None
        return f"honest {row['honest_mean']:.1%}"

    collecting = partial(collect, bench, cells, given.set)
    failed = {} if given.list or given.collect else work(missing, folder, run_one, collecting, bench.runs)
    if not given.list:
        collecting()
    finish("poison", [cell.label for cell in missing()], failed, listed=given.list)


if __name__ == "__main__":
    main()
