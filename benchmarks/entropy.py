"""How long the measures of `folklora.data.audit` take, and how long antropy takes for the same number.

    OMP_NUM_THREADS=1 python benchmarks/entropy.py [--turns N]

*Approximate entropy* (m = 2, the least that antropy takes; tolerance 0.5 there, which on integers is exact match): both
arms alternate in one process, and antropy's time is divided by that of ours just before it. Their values must agree.
*All measures* at their defaults, from ids, on a million tokens; copies among 100,000 texts. Contents are drawn with a
seed: 50,000 symbols after Zipf's law, 22 equally likely ones, bytes at random. antropy runs at a million tokens once
a content.

Seconds are processor seconds of this process on one core: others may be at work on the machine. Wall-clock is beside.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import antropy
import numpy as np
import torch
from _common import environment, publish, spread

from folklora.data.audit.duplicates import exact_duplicates, near_duplicates
from folklora.data.audit.entropy import approximate_entropy, compression_ratio, regularity, sample_entropy, shannon
from folklora.data.audit.matches import entropy_rate
from folklora.data.audit.tokens import Ints, Tokens

SEED = 0
SIZES = (10_000, 100_000, 1_000_000)
ORDER = 2
WORDS, TEXTS, AGAIN = 20_000, 90_000, 10_000
MEASURES: dict[str, Callable[[Ints], object]] = {
    "approximate entropy": approximate_entropy,
    "regularity (20 shuffles)": regularity,
    "sample entropy": sample_entropy,
    "entropy rate": entropy_rate,
    "Shannon entropy": shannon,
    "compression ratio": lambda ids: compression_ratio(Tokens.of(ids)),
}


def zipf(symbols: int) -> np.ndarray:
    shares = 1 / np.arange(1, symbols + 1)
    return shares / shares.sum()


def contents(n: int) -> dict[str, Ints]:
    random = np.random.default_rng(SEED)
    return {
        "Zipf, 50,000 symbols": random.choice(50_000, n, p=zipf(50_000)),
        "22 symbols": random.integers(22, size=n),
        "random bytes": random.integers(256, size=n),
    }


def texts() -> list[str]:
    """Of 5 to 19 words after Zipf's law; the last ones are copies of others with a word more."""
    random = np.random.default_rng(SEED)
    lengths = random.integers(5, 20, size=TEXTS)
    drawn = iter(random.choice(WORDS, lengths.sum(), p=zipf(WORDS)).tolist())
    found = [" ".join(f"w{next(drawn)}" for _ in range(length)) for length in lengths]
    return found + [f"{found[source]} again" for source in random.integers(TEXTS, size=AGAIN)]


def timed(job: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, processor seconds and seconds on the wall."""
    wall, processor = time.perf_counter(), time.process_time()
    value = job()
    return value, time.process_time() - processor, time.perf_counter() - wall


def against_antropy(turns: int) -> list[dict[str, Any]]:
    cells = []
    for n in SIZES:
        for name, ids in contents(n).items():
            real = ids.astype(float)
            ours, theirs, ratios, gap = [], [], [], 0.0
            for _ in range(turns if n < max(SIZES) else 1):
                mine, seconds, _ = timed(lambda ids=ids: approximate_entropy(ids, ORDER).value)
                other, rival, _ = timed(lambda real=real: antropy.app_entropy(real, order=ORDER, tolerance=0.5))
                ours.append(seconds)
                theirs.append(rival)
                ratios.append(rival / seconds)
                gap = max(gap, abs(mine - other))
            if gap > 1e-9:
                raise SystemExit(f"{name}, n = {n}: the values differ by {gap:g}")
            print(f"antropy, {name}, n = {n}: {spread(ratios, 1)}", file=sys.stderr, flush=True)
            row = {"tokens": n, "content": name, "turns": len(ratios), "value": mine, "largest_gap": gap}
            times = {"ours_seconds": spread(ours, 4), "antropy_seconds": spread(theirs, 4)}
            cells.append({**row, **times, "times_faster": spread(ratios, 1)})
    return cells


def measures(turns: int) -> list[dict[str, Any]]:
    rows = []
    for name, ids in contents(max(SIZES)).items():
        for measure, job in MEASURES.items():
            found = [timed(lambda job=job, ids=ids: job(ids))[1:] for _ in range(turns)]
            seconds, wall = (spread(each) for each in zip(*found, strict=True))
            print(f"{measure}, {name}: {seconds}", file=sys.stderr, flush=True)
            rows.append({"measure": measure, "content": name, "seconds": seconds, "wall_seconds": wall})
    return rows


def copies(turns: int) -> dict[str, Any]:
    examples = texts()
    exact = [timed(lambda: exact_duplicates(examples)) for _ in range(turns)]
    near = [timed(lambda: near_duplicates(examples)) for _ in range(turns)]
    return {
        "texts": len(examples),
        "copied": AGAIN,
        "exact_found": exact[0][0].copies,
        "exact_seconds": spread([each[1] for each in exact]),
        "near_found": near[0][0].copies,
        "near_seconds": spread([each[1] for each in near]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="repetitions of what does not take minutes")
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    document = {
        "environment": {
            **environment(torch.device("cpu"), torch.float64),
            **{name: version(name) for name in ("numpy", "pandas", "scipy", "antropy")},
        },
        "order": ORDER,
        "against_antropy": against_antropy(turns),
        "measures": measures(turns),
        "copies": copies(turns),
    }
    publish("entropy", document)


if __name__ == "__main__":
    main()
