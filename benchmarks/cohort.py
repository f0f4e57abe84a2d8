"""How fast and how lean the cohort trainer is, against training the same clients one by one with stock PEFT.

    python benchmarks/cohort.py [--quick] [--lengths short,natural,full] [--threads 2] [--device cpu]

Three arms train the same clients on the same minibatches, with LoRA r = 8 on query and value and a head of 77 classes:

- *ours*: `CohortTrainer` as a recipe runs it (compute type of the machine, packed rows, K by tokens);
- *peft*: stock PEFT, one client at a time, float32, padded to the longest of the minibatch, default attention, AdamW;
- *tuned*: the same with what a careful user would change: bfloat16 backbone, eager attention (in bfloat16 the fast one
  on CPU), fused AdamW, adapters and head in float32 under autocast, so that their products are bfloat16 too.

Arms alternate in one process (ours, peft, ours, tuned, ours, peft, ...), and each rival's time is divided by that of
ours just before it. No arm drops anything out. Work is counted as 2 x 2 x (numbers in the encoder's linear layers) x
real tokens: forward, and gradient with respect to the input. Padding, attention, adapters and head are not counted; the
first layer's query, key and value need no such gradient, which counts 2 % too much. The peak is what ``F.linear``
reaches on the same machine just before each turn, so that a busy neighbour slows both. Memory: see `memory.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from _common import RESULTS, environment, publish, spread
from stock_peft import ALPHA, CLASSES, RANK, Losses, OneByOne
from torch import nn
from torch.nn import functional as F

from folklora.adapters.lowrank import LowRank, kaiming
from folklora.backbones.backbone import Backbone
from folklora.backbones.batch import TokenIds
from folklora.backbones.classification import Classification
from folklora.data.sources import load
from folklora.sections import DataSection, TrainSection
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job

SEED = 0
LENGTHS = {"short": "at most 12 tokens", "natural": "Banking77 as it is", "full": "64 tokens, sentences joined"}
TARGETS = {"peft": 3.5, "tuned": 1.7, "peak": 0.6}  # at natural lengths, batch 16
Fit = Callable[[Sequence[Job], TrainSection], Losses]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the arms ----------------------------------------------------------------------------------------------------------


class Ours:
    """Our trainer over all jobs; gives each client's mean training loss."""

    def __init__(self, backbone: Backbone) -> None:
        self.task = Classification(backbone, CLASSES)
        self.adapter = LowRank(backbone.sites, core=False, alpha=ALPHA)

    def trainer(self, train: TrainSection) -> CohortTrainer:
        return CohortTrainer(self.task, self.adapter, train, SEED)

    def fit(self, jobs: Sequence[Job], train: TrainSection) -> Losses:
        return {fitted.client: fitted.loss for fitted in self.trainer(train).fit(jobs)}


# -- the clients -------------------------------------------------------------------------------------------------------


def pools(task: Classification) -> dict[str, list[TokenIds]]:
    """Token sequences of each kind of length, out of Banking77's training sentences."""
    table, _ = load(DataSection(), SEED)
    natural = task.encode(table.inputs)
    joined = task.encode([" ".join(table.inputs[i : i + 12]) for i in range(0, len(table.inputs), 12)])
    full: list[TokenIds] = [[*ids[:63], ids[-1]] for ids in joined if len(ids) >= 64]
    return {"short": [ids for ids in natural if len(ids) <= 12], "natural": natural, "full": full}


def make_jobs(adapter: LowRank, width: int, pool: Sequence[TokenIds], clients: int, examples: int) -> list[Job]:
    """Clients that start apart from each other and from zero, so that losses tell whether arms compute the same."""
    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    shapes = adapter.shapes(RANK) | {"head/weight": (CLASSES, width), "head/bias": (CLASSES,)}
    jobs = []
    for client in range(clients):
        tensors = {
            name: kaiming(shape, generator) if name.startswith("A/") else 0.02 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        picks = rng.integers(len(pool), size=examples)
        labels = rng.integers(CLASSES, size=examples)
        jobs.append(Job(str(client), 1, RANK, tensors, frozenset(tensors), [pool[i] for i in picks], labels))
    return jobs


# -- one cell of the table ---------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """An arm, with the seconds of each of its turns and the losses of the last."""

    fit: Fit
    device: torch.device
    dtype: torch.dtype
    seconds: list[float]
    peaks: list[float]
    losses: Losses

    def turn(self, jobs: Sequence[Job], train: TrainSection) -> float:
        self.peaks.append(peak(self.dtype, self.device, 0.2))
        start = time.perf_counter()
        self.losses = self.fit(jobs, train)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        return self.seconds[-1]


def measure(
    arms: Mapping[str, Fit],
    exact: Ours,
    ours: Ours,
    dtypes: Mapping[str, torch.dtype],
    pool: Sequence[TokenIds],
    batch: int,
    *,
    quick: bool,
) -> dict[str, Any]:
    """Times, ratios and losses of the arms for one batch size and one kind of length."""
    backbone = ours.task.backbone
    train = TrainSection(batch_size=batch)
    probe = [Job("", 1, RANK, {}, frozenset(), [ids], np.zeros(1)) for ids in pool[:1000]]
    side_by_side = ours.trainer(train).slots_for(probe)
    clients = side_by_side if quick else max(side_by_side, min(2 * side_by_side, 32))
    steps = 2 if quick else max(2, round(48 / clients))
    jobs = make_jobs(ours.adapter, backbone.width, pool, clients, steps * batch)
    tokens = sum(len(example) for job in jobs for example in job.examples) / (clients * steps)
    gflop = 4 * tokens * encoder_numbers(backbone) / 1e9

    timed = {name: Timed(fit, backbone.device, dtypes[name], [], [], {}) for name, fit in arms.items()}
    for arm in timed.values():
        arm.turn(jobs[: max(1, clients // 4)], train)  # warm
        arm.seconds.clear()
        arm.peaks.clear()
    ratios: dict[str, list[float]] = {name: [] for name in timed if name != "ours"}
    for _ in range(1 if quick else 3):
        for name, found in ratios.items():
            before = timed["ours"].turn(jobs, train)
            found.append(timed[name].turn(jobs, train) / before)

    # In float32 all arms compute the same function: the losses of the first step show it, and the mean over all steps.
    first = [replace(job, examples=job.examples[:batch], labels=job.labels[:batch]) for job in jobs]
    stock = arms["peft"]
    ms = {name: [1e3 * s / (clients * steps) for s in arm.seconds] for name, arm in timed.items()}
    return {
        "clients": clients,
        "clients_side_by_side": ours.trainer(train).slots_for(jobs),
        "steps": steps,
        "tokens_per_client_step": round(tokens, 1),
        "gflop_per_client_step": round(gflop, 3),
        "ms_per_client_step": {name: spread(values) for name, values in ms.items()},
        "times_faster_than": {name: spread(values) for name, values in ratios.items()},
        "gflops": {name: round(1e3 * gflop / statistics.median(values), 1) for name, values in ms.items()},
        "fraction_of_peak": {
            name: spread([1e3 * gflop / value / top for value, top in zip(values, timed[name].peaks, strict=True)])
            for name, values in ms.items()
        },
        "peak_gflops": {name: spread(arm.peaks, 1) for name, arm in timed.items()},
        "mean_loss": {name: round(statistics.fmean(arm.losses.values()), 5) for name, arm in timed.items()},
        "float32_loss_difference": {
            "first_step": furthest(exact.fit(first, train), stock(first, train)),
            "mean_over_steps": furthest(exact.fit(jobs, train), timed["peft"].losses),
        },
    }


def furthest(one: Losses, other: Losses) -> float:
    return float(f"{max(abs(one[client] - other[client]) for client in one):.2e}")


def encoder_numbers(backbone: Backbone) -> int:
    """Numbers in the weights of the encoder's linear layers."""
    model = backbone._model(torch.float32)
    return sum(m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and "encoder" in name)


def peak(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """GFLOP/s that ``F.linear`` reaches, best over shapes of the encoder and over repeats."""
    best = 0.0
    for rows, inner, outer in ((2048, 384, 1536), (2048, 1536, 384), (4096, 384, 1536), (8192, 384, 384)):
        x, weight = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, outer))
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            for _ in range(8):
                F.linear(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 8 * 2e-9 * rows * inner * outer / (time.perf_counter() - start))
    return round(best, 1)


# -- all of it ---------------------------------------------------------------------------------------------------------


def targets(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was wanted at Banking77's own lengths and batch 16, and what was reached; empty if that was not measured."""
    for cell in cells:
        if (cell["lengths"], cell["batch"]) == ("natural", 16):
            reached = {name: cell["times_faster_than"][name]["median"] for name in ("peft", "tuned")}
            reached["peak"] = cell["fraction_of_peak"]["ours"]["median"]
            return {name: {"wanted": wanted, "reached": reached[name]} for name, wanted in TARGETS.items()}
    return {}


def kept(where: Mapping[str, Any], quick: bool, measured: set[str]) -> list[dict[str, Any]]:
    """Cells of other lengths that an earlier run measured in the same environment."""
    path = RESULTS / "cohort.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if (before.get("environment"), before.get("quick")) != (where, quick):
        return []
    return [cell for cell in before["cells"] if cell["lengths"] not in measured]


def place(cell: Mapping[str, Any]) -> tuple[int, int]:
    return list(LENGTHS).index(cell["lengths"]), cell["batch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a glance: few steps, one repeat")
    parser.add_argument("--lengths", default="short,natural,full", help="what is not named keeps its figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quick, device = arguments.quick, torch.device(arguments.device)

    ours = Ours(Backbone.load("minilm", device=arguments.device))
    exact = Ours(Backbone.load("minilm", device=arguments.device, dtype="float32"))
    arms = {"ours": ours.fit, "peft": OneByOne(device, tuned=False).fit, "tuned": OneByOne(device, tuned=True).fit}
    dtypes = {"ours": ours.task.backbone.dtype, "peft": torch.float32, "tuned": torch.bfloat16}
    cells = []
    for lengths, pool in pools(ours.task).items():
        if lengths not in arguments.lengths.split(","):
            continue
        for batch in (1, 4, 16):
            cell = {"lengths": lengths, "batch": batch, **measure(arms, exact, ours, dtypes, pool, batch, quick=quick)}
            note(f"{lengths}, batch {batch}: {cell['ms_per_client_step']} ms, {cell['times_faster_than']}")
            cells.append(cell)
            gc.collect()
    where = environment(device, ours.task.backbone.dtype)
    cells = sorted(cells + kept(where, quick, {cell["lengths"] for cell in cells}), key=place)
    document = {
        "quick": quick,
        "environment": where,
        "lengths": LENGTHS,
        "cells": cells,
        "targets": targets(cells),
    }
    publish("cohort", document)


if __name__ == "__main__":
    main()
