"""The floor under the accuracy table: what is right by chance where one label is common.

    python benchmarks/majority.py --data ../shared/data --runs runs/accuracy

Of every setting and seed of `accuracy.py`, two answers that read no text: the label that is most frequent in
everybody's training examples, and in the client's own; of labels as frequent the first. Their accuracy on the clients'
own test splits, mean over clients. Needs no model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _common import publish
from accuracy import SEEDS
from settings import settings

from folklora.data.split import Split
from folklora.federation.setup import data_of


def answers(labels: np.ndarray, splits: Mapping[str, Split]) -> tuple[float, float]:
    """The accuracy of everybody's most common label, and of each client's own; means over clients."""

    def common(rows: np.ndarray) -> int:
        return int(np.bincount(labels[rows]).argmax())

    one = common(np.concatenate([own.train for own in splits.values()]))
    right = [((labels[of.test] == one).mean(), (labels[of.test] == common(of.train)).mean()) for of in splits.values()]
    everybody, own = np.mean(right, axis=0)
    return float(everybody), float(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds snips/, goemotions/, sgd/")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="where files are made that it needs")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, setting in settings(given.data.resolve(), given.runs.resolve()).items():
        for seed in range(SEEDS):
            data = data_of(setting.recipe(seed))
            everybody, own = answers(data.table.labels, data.splits)
            rows.append({"setting": name, "seed": seed, "everybody": round(everybody, 4), "own": round(own, 4)})
    publish("majority", {"rows": rows})


if __name__ == "__main__":
    main()
