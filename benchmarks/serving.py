"""How fast many clients' personalised models answer, against stock PEFT switching adapters, mixing them, or merged.

    python benchmarks/serving.py [--quick] [--clients 1,10,100] [--runs runs/serving]

A run of a hundred clients on Banking77 with ranks 4, 8 and 16 is made once, into ``--runs``. Then the first 1, 10 or
100 of its clients are asked about texts of natural length, 1, 32 or 256 at a time, whose clients are drawn at random:
by ours, a `Pool`, and by the rivals of `serving_peft.py`, from exported folders. Where ours merges a client that is
asked alone, it is also measured without (*stacked*).
Everything from token ids to logits is measured, tokenising is not. Arms alternate in one process on one thread (ours,
rival, ours, next rival, ...), and each rival's time is divided by that of ours, in the same precision, just before it.
Times are CPU seconds of the process: a busy neighbour takes turns with it, and its turns are not ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, environment, publish, spread
from resumable import Store, perform
from serving_peft import Adapters, Copies

from folklora.adapters.lowrank import Tensors
from folklora.adapters.peft import save_peft
from folklora.data.sources import load
from folklora.federation.answers import pool_of
from folklora.federation.rescoring import evaluate
from folklora.federation.run import ClientModel, client_models
from folklora.recipe import Recipe

SEED = 0
CLIENTS = (1, 10, 100)
BATCHES = {1: 8, 32: 1, 256: 1}
"""Requests that are answered together -> how many such batches a turn has."""
REPEATS = {1: 5, 32: 5, 256: 2}
COPIES = 10
"""Clients of whom merged float32 copies are held: a hundred would be 9 GB."""
AGREE = 256
"""Requests by which answers are compared."""

Arm = Callable[[Sequence[Any]], np.ndarray]


def recipe() -> Recipe:
    data = {"limit": 3000, "test_limit": 300, "clients": 100, "partition": "dirichlet", "alpha": 0.5, "min_examples": 8}
    return Recipe.parse(
        {
            "seed": SEED,
            "data": data,
            "adapter": {"device_ranks": [4, 8, 16], "device_shares": [0.5, 0.3, 0.2]},
            "method": {"name": "folklora"},
            "train": {"rounds": 2, "batch_size": 16, "lr": 5e-3, "evaluate_every": 2},
        }
    )


def arms(models: Mapping[str, ClientModel], folder: Path) -> dict[str, dict[str, Arm]]:
    """Precision -> name -> arm; the first of each is ours."""
    setup = next(iter(models.values())).setup
    folders = {}
    for client, model in models.items():
        folders[client] = folder / client
        if not folders[client].exists():
            save_peft(folders[client], model.tensors, setup.method.adapter, "minilm")
    heads: dict[str, Tensors] = {
        client: {name: tensor for name, tensor in model.tensors.items() if name.startswith("head/")}
        for client, model in models.items()
    }
    found: dict[str, dict[str, Arm]] = {}
    for precision, tuned in (("float32", False), ("bfloat16", True)):
        served = Adapters(folders, heads, tuned=tuned)
        pool = pool_of(models, precision)
        found[precision] = {"ours": pool.answers, "switch": served.switch, "mixed": served.mixed}
        if pool.merges:
            found[precision]["stacked"] = pool_of(models, precision, most=0).answers
        if tuned or len(models) <= COPIES:
            found[precision]["merged"] = Copies(folders, heads, tuned=tuned).merged
    return found


def batches(clients: Sequence[str], texts: Sequence[Any], size: int, count: int) -> list[list[Any]]:
    """Requests of clients and about texts that are drawn at random."""
    rng = np.random.default_rng([SEED, len(clients), size])
    return [
        [
            (clients[k], texts[i])
            for k, i in zip(rng.integers(len(clients), size=size), rng.integers(len(texts), size=size), strict=True)
        ]
        for _ in range(count)
    ]


def turn(arm: Arm, asked: Sequence[Sequence[Any]]) -> float:
    """CPU seconds of one turn."""
    start = time.process_time()
    for each in asked:
        arm(each)
    return time.process_time() - start


def measure(found: Mapping[str, Mapping[str, Arm]], asked: Sequence[Sequence[Any]], repeats: int) -> dict[str, Any]:
    """One cell: milliseconds a request of every arm, and by how much ours is faster than each rival."""
    times: dict[str, dict[str, list[float]]] = {p: {name: [] for name in own} for p, own in found.items()}
    ratios: dict[str, dict[str, list[float]]] = {p: {n: [] for n in own if n != "ours"} for p, own in found.items()}
    for own in found.values():
        for arm in own.values():
            turn(arm, [asked[0][:32]])  # warm
    for _ in range(repeats):
        for precision, own in found.items():
            for rival in ratios[precision]:
                seconds = {name: turn(own[name], asked) for name in ("ours", rival)}
                for name, spent in seconds.items():
                    times[precision][name].append(spent)
                ratios[precision][rival].append(seconds[rival] / seconds["ours"])
    requests = sum(map(len, asked))
    return {
        "tokens_a_request": round(sum(len(ids) for each in asked for _, ids in each) / requests, 1),
        "ms_a_request": {
            precision: {name: spread([1e3 * t / requests for t in values]) for name, values in own.items()}
            for precision, own in times.items()
        },
        "times_faster_than": {
            precision: {name: spread(values, 2) for name, values in own.items()} for precision, own in ratios.items()
        },
    }


def agreement(found: Mapping[str, Mapping[str, Arm]], asked: Sequence[Any]) -> dict[str, Any]:
    """How far logits are from stock PEFT's in float32, and how many labels are the same."""
    said = {(precision, name): arm(asked) for precision, own in found.items() for name, arm in own.items()}
    stock = said["float32", "switch"]
    return {
        "requests": len(asked),
        "against": "float32 switch",
        "arms": {
            f"{precision} {name}": {
                "same_labels": round(float((logits.argmax(1) == stock.argmax(1)).mean()), 4),
                "largest_logit_difference": float(f"{np.abs(logits - stock).max():.2e}"),
            }
            for (precision, name), logits in said.items()
            if (precision, name) != ("float32", "switch")
        },
        "logits_deviation": float(f"{stock.std():.2e}"),
    }


def kept(where: Mapping[str, Any], quick: bool, measured: set[int]) -> dict[str, Any]:
    """What an earlier run measured in the same environment, of other numbers of clients."""
    path = RESULTS / "serving.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if (before.get("environment"), before.get("quick")) != (where, quick):
        return {"cells": []}
    return {**before, "cells": [cell for cell in before["cells"] if cell["clients"] not in measured]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a glance: one repeat")
    parser.add_argument("--clients", default="1,10,100", help="what is not named keeps its figures")
    parser.add_argument("--runs", type=Path, default=Path("runs/serving"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.runs / "banking77-100"
    perform(recipe(), path)
    models = client_models(path)
    setup = next(iter(models.values())).setup
    _, test = load(setup.recipe.data.model_copy(update={"limit": None, "test_limit": None}), SEED)
    assert test is not None
    texts = setup.task.encode(test.inputs)
    wanted = [int(count) for count in arguments.clients.split(",")]
    where = environment(torch.device("cpu"), torch.bfloat16)
    document = kept(where, arguments.quick, set(wanted))
    cells: list[dict[str, Any]] = document["cells"]
    document |= {"quick": arguments.quick, "environment": where}
    with tempfile.TemporaryDirectory() as folder:
        for count in wanted:
            clients = list(models)[:count]
            found = arms({client: models[client] for client in clients}, Path(folder))
            if count == max(CLIENTS):
                document["agreement"] = agreement(found, batches(clients, texts, AGREE, 1)[0])
            for size, several in BATCHES.items():
                asked = batches(clients, texts, size, several)
                repeats = 1 if arguments.quick else REPEATS[size]
                alone = 1 in (count, size)  # no pass has several clients
                own = {p: {n: arm for n, arm in each.items() if alone or n != "stacked"} for p, each in found.items()}
                cells.append({"clients": count, "batch": size, **measure(own, asked, repeats)})
                print(
                    f"{count} clients, {size} at a time: {cells[-1]['times_faster_than']}", file=sys.stderr, flush=True
                )
            del found
            gc.collect()
            document["cells"] = cells = sorted(cells, key=lambda cell: (cell["clients"], cell["batch"]))
            Store(arguments.runs, RESULTS).write("serving", document)
    document["validation_accuracy"] = {p: evaluate(path, precision=p)["mean"] for p in ("float32", "bfloat16")}
    publish("serving", document)


if __name__ == "__main__":
    main()
