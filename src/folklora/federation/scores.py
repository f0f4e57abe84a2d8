"""Personalised evaluation in numbers: each client's own score, and what stands for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from folklora.adapters.lowrank import Tensors
from folklora.federation.setup import Setup
from folklora.training.prediction import Question, predict


@dataclass(frozen=True)
class Score:
    """How many of a client's examples were answered right."""

    correct: int
    examples: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.examples

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray) -> Score:
        """From logits [n, classes] and labels [n]."""
        return cls(int((logits.argmax(1) == labels).sum()), len(labels))


def summarise(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Mean and standard deviation over clients, mean of the worst tenth (one at least), example-weighted mean."""
    accuracies = np.array([score.accuracy for score in scores.values()])
    worst = np.sort(accuracies)[: max(1, len(accuracies) // 10)]
    return {
        "mean": float(accuracies.mean()),
        "std": float(accuracies.std()),
        "worst_tenth": float(worst.mean()),
        "weighted": sum(s.correct for s in scores.values()) / sum(s.examples for s in scores.values()),
        "clients": {client: score.accuracy for client, score in scores.items()},
    }


def common_score(setup: Setup, tensors: Tensors) -> Score | None:
    """A common model on the common test set; None if the data has none."""
    if setup.data.test is None:
        return None
    question = Question("global", setup.method.adapter.rank(tensors), tensors, setup.test_encoded)
    answer = predict(setup.task, setup.method.adapter, [question])["global"]
    return Score.of(answer, setup.data.test.labels)
