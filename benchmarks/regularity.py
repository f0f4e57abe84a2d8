"""What the measures of order can tell at the sizes that clients have, and how far they are off.

    OMP_NUM_THREADS=1 python benchmarks/regularity.py

- *Noise*: natural texts, and the same with a share of the texts replaced by as many words drawn at random from the
  corpus. At each amount of words: regularity, how well it tells noisy data from clean (AUC over draws of each), and
  what is left of the order, 1 - regularity, over that of clean data.
- *Length*: regularity of the same sort of data at growing lengths: texts, and Markov chains whose true ratio is known.
- *Rate*: the Kontoyiannis estimate over the true entropy rate, of one sequence and of the same cut into short ones.

A chain steps to the next state of a cycle, and with the probability `noise` to one drawn at random.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, publish, spread
from sklearn.metrics import roc_auc_score

from folklora.data.audit.entropy import regularity
from folklora.data.audit.matches import entropy_rate
from folklora.data.audit.tokens import Ints, Tokens, words
from folklora.randomness import numpy_generator

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data"
DRAWS, FEW = 30, 5
AMOUNTS = (100, 200, 500, 1000, 2000)
SHARES = (0.0, 0.1, 0.3, 0.5, 1.0)
LENGTHS = (500, 2000, 10_000, 100_000)
CHAINS = ((22, 0.3), (200, 0.3), (200, 0.7), (3000, 0.7))
RATES = ((22, 0.3), (22, 1.0), (1000, 1.0))
PIECE = 12

Row = dict[str, Any]
Texts = list[list[str]]


def banking77() -> list[str]:
    with (DATA / "banking77/train.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def goemotions() -> list[str]:
    lines = (DATA / "goemotions/train.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines]


def dolly() -> list[str]:
    lines = (DATA / "dolly15k/dolly15k.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["response"] for line in lines]


CORPORA: dict[str, Callable[[], list[str]]] = {
    "Banking77": banking77,
    "GoEmotions": goemotions,
    "Dolly's answers": dolly,
}


def some(texts: Texts, amount: int, random: np.random.Generator) -> Texts:
    """Texts in random order up to so many words; the last one is cut."""
    found: Texts = []
    left = amount
    for place in random.permutation(len(texts)):
        found.append(texts[place][:left])
        left -= len(found[-1])
        if not left:
            break
    return found


def noisy(texts: Texts, share: float, pool: np.ndarray, random: np.random.Generator) -> Texts:
    chosen = set(random.permutation(len(texts))[: round(share * len(texts))].tolist())
    return [random.choice(pool, len(text)).tolist() if i in chosen else text for i, text in enumerate(texts)]


def noise(name: str, texts: Texts) -> list[Row]:
    pool = np.array([word for text in texts for word in text], dtype=object)
    rows = []
    for amount in AMOUNTS:
        values: dict[float, list[float]] = {share: [] for share in SHARES}
        counted = []
        for draw in range(DRAWS):
            random = numpy_generator(draw, f"regularity/{amount}", name)
            clean = some(texts, amount, random)
            counted.append(len(clean))
            for share, found in values.items():
                # What cannot be measured shows no order.
                value = regularity(Tokens.joined(noisy(clean, share, pool, random))).value
                found.append(1.0 if value is None else value)
        order = 1 - np.mean(values[0.0])
        for share, found in values.items():
            labels = [0] * DRAWS + [1] * DRAWS
            row = {"corpus": name, "words": amount, "texts": float(np.median(counted)), "share": share}
            row |= {"mean": float(np.mean(found)), "sd": float(np.std(found, ddof=1))}
            row |= {"auc": float(roc_auc_score(labels, values[0.0] + found)) if share else None}
            rows.append(row | {"order_left": float((1 - np.mean(found)) / order)})
        print(name, amount, rows[-1], file=sys.stderr, flush=True)
    return rows


def chain(states: int, jumps: float, n: int, random: np.random.Generator) -> Ints:
    leaves = random.random(n) < jumps
    # Where it landed last, and how many steps ago.
    landed = np.maximum.accumulate(np.where(leaves, np.arange(n), 0))
    to = random.integers(states, size=n)
    return np.asarray((to[landed] + np.arange(n) - landed) % states)


def rate(states: int, jumps: float) -> float:
    leave = jumps / states
    stay = 1 - jumps + leave
    return -stay * math.log(stay) - ((states - 1) * leave * math.log(leave) if leave else 0.0)


def by_length(name: str, true: float | None, sample: Callable[[int, np.random.Generator], Tokens]) -> list[Row]:
    rows = []
    for n in LENGTHS:
        drawn = [regularity(sample(n, numpy_generator(draw, f"length/{n}", name))) for draw in range(FEW)]
        found = [each.value for each in drawn if each.value is not None]
        rows.append({"data": name, "tokens": n, "true": true, "regularity": spread(found)})
    return rows


def rates() -> list[Row]:
    rows = []
    for states, jumps in RATES:
        for n in (1000, 10_000, 100_000):
            found: Sequence[list[float]] = ([], [])
            for draw in range(FEW):
                ids = chain(states, jumps, n, numpy_generator(draw, f"rate/{states}/{jumps}/{n}"))
                cut = Tokens.of(ids, [*range(0, n, PIECE), n])
                for values, tokens in zip(found, (Tokens.of(ids), cut), strict=True):
                    values.append((entropy_rate(tokens).value or math.nan) / rate(states, jumps))
            one, pieces = map(spread, found)
            rows.append({"symbols": states, "noise": jumps, "tokens": n, "one": one, "pieces": pieces})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    corpora = {name: [found for text in load() if (found := words(text))] for name, load in CORPORA.items()}
    lengths = []
    for name, texts in corpora.items():
        lengths += by_length(name, None, lambda n, random, texts=texts: Tokens.joined(some(texts, n, random)))
    for states, jumps in CHAINS:
        named = f"chain of {states} symbols, noise {jumps:g}"
        true = rate(states, jumps) / math.log(states)
        lengths += by_length(
            named, true, lambda n, random, states=states, jumps=jumps: Tokens.of(chain(states, jumps, n, random))
        )
    document = {
        "environment": environment(torch.device("cpu"), torch.float64),
        "draws": DRAWS,
        "few": FEW,
        "piece": PIECE,
        "lengths": lengths,
        "rates": rates(),
        "noise": [row for name, texts in corpora.items() for row in noise(name, texts)],
    }
    publish("regularity", document)


if __name__ == "__main__":
    main()
