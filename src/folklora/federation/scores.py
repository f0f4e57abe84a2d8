"""Personalised evaluation in numbers: each client's own score, and what stands for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import ACCURACY, KNOWN, MOST, Metric, Score
from folklora.errors import MessageError
from folklora.federation.setup import Setup
from folklora.training.evaluation import evaluate
from folklora.training.prediction import Question


def summarise(scores: Mapping[str, Score], metric: Metric) -> dict[str, Any]:
    """Mean and standard deviation over clients, mean of the worst tenth (one at least), mean weighted by units.

    ``beside``, if there is any: other metrics, mean over the clients that tell them.
    """
    values = np.array([score.value for score in scores.values()])
    worst = sorted(values, key=metric.merit)[: max(1, len(values) // 10)]
    names = dict.fromkeys(name for score in scores.values() for name in score.beside)
    beside = {name: float(np.mean([s.beside[name] for s in scores.values() if name in s.beside])) for name in names}
    return {
        "metric": metric.name,
        "higher": metric.higher,
        "mean": float(values.mean()),
        "std": float(values.std()),
        "worst_tenth": float(np.mean(worst)),
        "weighted": sum(s.total for s in scores.values()) / sum(s.units for s in scores.values()),
        "clients": {client: score.value for client, score in scores.items()},
        **({"beside": beside} if beside else {}),
    }


def written_for(splits: Sequence[str]) -> int | None:
    """Which of several questions is also answered with generated text: the last one about the test split.

    It is about the models that clients end with; None: not one of them is about the test split.
    """
    return max((place for place, split in enumerate(splits) if split == "test"), default=None)


def bounded(score: Score) -> Score:
    """The score in finite numbers: what a diverged model scores is bad, but must be written down, sent and compared."""
    beside = {name: _bounded(value) for name, value in score.beside.items()}
    return Score(_bounded(score.total), score.units, beside, score.steps)


def _bounded(value: float) -> float:
    return float(np.clip(np.nan_to_num(value, nan=MOST), -MOST, MOST))


def check_score(score: Score, metric: Metric, examples: int, length: int) -> None:
    """Check what somebody says that a model scored.

    Parameters
    ----------
    examples, length
        How many there were, and how many tokens each has at most.

    Raises
    ------
    MessageError
        If no model can score that.
    """
    most = examples if metric.percent else examples * length
    if not examples <= score.units <= most:
        raise MessageError(f"{metric.name} of {score.units}; allowed: of {examples} to {most}")
    largest = score.units if metric.percent else MOST
    if not 0 <= score.total <= largest:
        raise MessageError(f"{metric.name}: {score.total:g} of {score.units}; allowed: 0 to {largest:g}")
    if metric == ACCURACY and not float(score.total).is_integer():
        raise MessageError(f"{metric.name}: {score.total} right answers; allowed: a whole number")
    for name, value in score.beside.items():
        other = KNOWN.get(name)
        if other is None or other == metric:
            allowed = ", ".join(each for each in KNOWN if each != metric.name)
            raise MessageError(f"{metric.name}, and beside it {name!r}; allowed: {allowed}")
        if not 0 <= value <= (1 if other.percent else MOST):
            raise MessageError(f"{name} = {value:g}; allowed: {'0 to 1' if other.percent else 'a finite number'}")


def common_score(setup: Setup, tensors: Tensors) -> Score | None:
    """A common model on the common test set; None if the data has none."""
    if setup.data.test is None:
        return None
    adapter = setup.method.adapter
    question = Question("global", adapter.rank(tensors), tensors, setup.test_encoded)
    return evaluate(setup.task, adapter, [question], {"global": setup.data.test.labels})["global"]
