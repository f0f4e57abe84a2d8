"""Scores: each client's model on its own examples, many clients in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from folklora.adapters.lowrank import LowRank
from folklora.backbones.metric import Score
from folklora.backbones.task import Task
from folklora.training.prediction import Question, predict


def evaluate(
    task: Task, adapter: LowRank, questions: Sequence[Question], labels: Mapping[str, np.ndarray]
) -> dict[str, Score]:
    """The score of every question, by client; ``labels`` are those of its examples."""
    answers = predict(task, adapter, questions)
    return {question.client: task.score(answers[question.client], labels[question.client]) for question in questions}
