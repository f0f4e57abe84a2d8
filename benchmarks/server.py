"""CE-LoRA's server among 10 to 100,000 clients: time, memory and error of its personalised aggregation.

    python benchmarks/server.py [--quick] [--threads 2]      # about a quarter of an hour on two cores; --quick a minute

Three parts, into results/server.json, which keeps what other processors took beside it:

*aggregation*: what a round costs once all cores are there: CKA rows of 12 modules of rank 8, half model and half data
similarity, softmax, mix. Each number of clients is a process of its own, so that its peak of memory is its own; inputs
count. Beyond the clients whose matrices the method keeps, both types of products are measured, where the processor has
bfloat16. The error is that of 64 clients' mixed cores against the dense formula in float64, relative to their distance
from the mean of all cores.

*similarity*: the one-off comparison of data, exact and embedded, for made-up clients of ten out of 77 classes each.

*embedding*: how near the embeddings come to the exact distances: clients of Banking77, features of MiniLM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folklora.data.mixtures import ClassMixtures
from folklora.data.statistics import ClassStatistics
from folklora.methods.cka import gram_rows
from folklora.methods.data_similarity import WHOLE
from folklora.methods.embedding import LinearTransport, SlicedTransport, typical_distance
from folklora.methods.mixing import Embedded, Mixing
from folklora.methods.transport import data_distances, similarity
from folklora.randomness import derive

MODULES, RANK, WIDTH = 12, 8, 128
CLASSES, OWN, FEATURES = 77, 10, 384
TEMPERATURE, LAMBDA = 0.5, 0.5
COUNTS = (10, 100, 1000, 10_000, 100_000)


def timed(work: Callable[[], Any], least: float = 0.5) -> tuple[float, Any]:
    """Seconds of the fastest run, of as many as begin within ``least`` seconds; and what the last returned."""
    best, begun = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > least:
            return best, result


# -- aggregation -------------------------------------------------------------------------------------------------------


def aggregation(counts: Sequence[int], threads: int) -> list[dict[str, Any]]:
    # Here and below, not above: a child measures its own memory, without a library of transformers.
    from folklora.backbones.frozen import has_native_bfloat16

    rows = []
    many = ("float32", "bfloat16") if has_native_bfloat16(torch.device("cpu")) else ("float32",)
    for clients in counts:
        for products in ("float64",) if clients <= WHOLE else many:
            print(f"aggregation, {clients} clients, {products}", file=sys.stderr, flush=True)
            child = ["--child", str(clients), "--products", products, "--threads", str(threads)]
            done = subprocess.run([sys.executable, __file__, *child], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
    return rows


def _child(clients: int, products: torch.dtype) -> dict[str, Any]:
    """One number of clients; twenty kinds of them, so that some are alike."""
    random = torch.Generator().manual_seed(clients)
    kind = torch.arange(clients) % 20
    cores = torch.randn(20, MODULES, RANK, RANK, generator=random)[kind]
    cores += 0.7 * torch.randn(cores.shape, generator=random)
    points = torch.randn(20, WIDTH, generator=random)[kind]
    points += 0.5 * torch.randn(points.shape, generator=random)
    dtype = torch.float64 if clients <= WHOLE else torch.float32
    cores, points = cores.to(dtype), points.to(dtype)
    scale = typical_distance(points, 0, sample=256)
    before = _peak()

    def listening(cores: Tensor, points: Tensor) -> Mixing:
        placed = torch.ones(clients, dtype=torch.bool)
        return Mixing(TEMPERATURE, LAMBDA, Embedded(points, placed, scale), gram_rows(cores, cores.dtype), MODULES)

    seconds, mixed = timed(lambda: listening(cores, points).mix(cores.flatten(1), products=products))
    peak = _peak()
    reference, some = listening(cores.double(), points.double()), slice(0, min(64, clients))
    values = cores.flatten(1).double()
    exact = reference.weights(some) @ values
    error = (mixed[some] - exact).norm() / (exact - values.mean(0)).norm()
    return {
        "clients": clients,
        "products": str(products).removeprefix("torch."),
        "seconds": round(seconds, 4),
        "peak_bytes": peak,
        "peak_bytes_of_inputs": before,
        "error": float(f"{float(error):.2e}"),
    }


def _peak() -> int:
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# -- one-off similarity ------------------------------------------------------------------------------------------------


def made_up(clients: int, components: int, seed: int) -> list[ClassMixtures]:
    """Clients of ten classes each, around common class means and a little apart from each other."""
    random = torch.Generator().manual_seed(seed)
    common = 0.28 * torch.randn(CLASSES, 1, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape, found = (OWN, components, FEATURES), []
    for _ in range(clients):
        classes = torch.randperm(CLASSES, generator=random)[:OWN].sort().values
        means = common[classes] + 0.14 * torch.randn(shape, generator=random, dtype=torch.float64)
        variances = 0.02 + 0.02 * torch.rand(shape, generator=random, dtype=torch.float64)
        counts = torch.randint(2, 12, (OWN,), generator=random).double()
        weights = torch.full((OWN, components), 1 / components, dtype=torch.float64)
        found.append(ClassMixtures(classes, counts, weights, means, variances))
    return found


def one_off(counts: Sequence[int]) -> list[dict[str, Any]]:
    data_distances(made_up(3, 3, 0))  # what is imported at the first call is not counted
    rows = []
    for components in (1, 3):
        for clients in counts:
            print(f"similarity, {clients} clients of {components} components", file=sys.stderr, flush=True)
            row: dict[str, Any] = {"clients": clients, "components": components, "exact_seconds": None}
            if clients <= WHOLE:
                own = made_up(clients, components, 1)
                row["exact_seconds"] = round(timed(lambda own=own: data_distances(own))[0], 3)
            row["embedding_seconds"] = round(_embed(clients, components), 3)
            rows.append(row)
    return rows


def _embed(clients: int, components: int) -> float:
    """Seconds to fit and to embed, a part after the other: all mixtures of 100,000 clients fill gigabytes."""
    seconds, points, embed = 0.0, [], None
    for first in range(0, clients, 2048):
        part = made_up(min(2048, clients - first), components, first)
        start = time.perf_counter()
        embed = embed or LinearTransport.fit(part, 0)
        points.append(embed(part))
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    typical_distance(torch.cat(points), 0)
    return seconds + time.perf_counter() - start


# -- error of the embeddings -------------------------------------------------------------------------------------------


def embedding(clients: int, limit: int | None) -> list[dict[str, Any]]:
    """Against exact distances, where clients have the data of Banking77."""
    from folklora.federation.setup import federated_data, prepare
    from folklora.recipe import Recipe

    rows, features = [], None
    for alpha in (0.1, 0.5):
        print(f"embedding, {clients} clients, Dirichlet {alpha}", file=sys.stderr, flush=True)
        data = {"clients": clients, "partition": "dirichlet", "alpha": alpha, "min_examples": 3, "limit": limit}
        recipe = Recipe.parse({"data": {k: v for k, v in data.items() if v is not None}})
        shared = federated_data(recipe.data, recipe.seed)
        if features is None:  # of the same examples in both partitions
            features, labels = prepare(recipe).frozen_features(), torch.from_numpy(shared.table.labels)
        assert torch.equal(labels, torch.from_numpy(shared.table.labels))
        for sketch in ("mixtures", "statistics"):
            own = []
            for client, split in shared.splits.items():
                x, y = features[split.train], labels[split.train]
                if sketch == "mixtures":
                    own.append(ClassMixtures.fit(x, y, seed=derive(0, "mixture", client)))
                else:
                    own.append(ClassMixtures.from_statistics(ClassStatistics.of(x, y, CLASSES)))
            usable = [mixtures for mixtures in own if len(mixtures.classes)]
            start = time.perf_counter()
            exact = data_distances(usable)
            seconds = time.perf_counter() - start
            for name, kind in (("linear", LinearTransport), ("sliced", SlicedTransport)):
                points = kind.fit(usable, 0)(usable).double()
                row = {"partition": f"dirichlet {alpha}", "sketch": sketch, "clients": len(usable), "embedding": name}
                row["classes_per_client"] = round(sum(len(m.classes) for m in usable) / len(usable), 1)
                row["exact_seconds"] = round(seconds, 2)
                rows.append(row | _errors(exact, torch.cdist(points, points)))
    return rows


def _errors(exact: Tensor, embedded: Tensor) -> dict[str, float]:
    """Of distances by rank, of similarities, and of weights on data similarity alone, relative to the exact weight."""
    from scipy.stats import spearmanr

    pairs = tuple(torch.triu_indices(len(exact), len(exact), 1))
    s, t = similarity(exact), similarity(embedded)
    w, v = (torch.softmax(x / TEMPERATURE, dim=1) for x in (s, t))
    return {
        "rank_correlation": round(float(spearmanr(exact[pairs], embedded[pairs]).statistic), 4),
        "similarity_mean_error": round(float((s - t)[pairs].abs().mean()), 5),
        "similarity_max_error": round(float((s - t).abs().max()), 5),
        "weight_mean_relative_error": round(float(((w - v).abs() / w).mean()), 5),
        "weight_max_relative_error": round(float(((w - v).abs() / w).max()), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few clients; prints, and writes nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=int, help="measure aggregation in this process with so many clients")
    parser.add_argument("--products", choices=("float64", "float32", "bfloat16"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child is not None:
        print(json.dumps(_child(arguments.child, getattr(torch, arguments.products))))
        return
    from _common import RESULTS, environment, publish

    quick = arguments.quick
    counts = (10, 100, 2000) if quick else COUNTS
    where = environment(torch.device("cpu"), torch.float32)
    measured = {
        "environment": where,
        "aggregation": aggregation(counts, arguments.threads),
        "similarity": one_off((10, 50) if quick else (10, 100, 300, *COUNTS[2:])),
    }
    document = {
        "setup": {
            "modules": MODULES,
            "rank": RANK,
            "lambda": LAMBDA,
            "temperature": TEMPERATURE,
            "embedding_width": WIDTH,
            "classes_per_client": OWN,
            "features": FEATURES,
        },
        "embedding": embedding(20, 500) if quick else embedding(300, None),
        "processors": {where["processor"]: measured},
    }
    if quick:
        print(json.dumps(document, indent=1))
        return
    before = json.loads(file.read_text(encoding="utf-8")) if (file := RESULTS / "server.json").exists() else {}
    publish("server", {**document, "processors": {**before.get("processors", {}), **document["processors"]}})


if __name__ == "__main__":
    main()
