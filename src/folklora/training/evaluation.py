"""How good clients' own models are: the task's metric, and how close what they write is to what should be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from folklora.adapters.lowrank import LowRank
from folklora.backbones.conversation import Turns
from folklora.backbones.metric import Score
from folklora.backbones.task import Task
from folklora.backbones.text_metrics import TEXT_METRICS
from folklora.sections import EvalSection
from folklora.training.generation import generate as answers_of
from folklora.training.generation import prompts_tokens
from folklora.training.prediction import Question, predict

Chats = Mapping[str, Sequence[Turns]]
"""By client: conversations, of which the last turn is the reference."""


def evaluate(
    task: Task,
    adapter: LowRank,
    questions: Sequence[Question],
    labels: Mapping[str, np.ndarray],
    *,
    generate: EvalSection | None = None,
    chats: Chats | None = None,
) -> dict[str, Score]:
    """The score of each question's client; beside it, if asked for, what generated answers are worth.

    Parameters
    ----------
    labels
        By client, of the question's examples.
    generate
        Which text metrics, of answers of what length to how many prompts; None: none.
    chats
        The question's examples as the source has them; needed where text is generated.
    """
    answers = predict(task, adapter, questions)
    scores = {q.client: task.score(answers[q.client], labels[q.client]) for q in questions}
    if generate is not None and generate.generate and chats is not None:
        for client, means in written(task, adapter, questions, chats, generate).items():
            scores[client] = replace(scores[client], beside={**scores[client].beside, **means})
    return scores


def written(
    task: Any, adapter: LowRank, questions: Sequence[Question], chats: Chats, section: EvalSection
) -> dict[str, dict[str, float]]:
    """By client, the means of ``section.generate`` over answers that the client's model writes, without chance.

    Each client answers at most ``section.examples`` prompts, the same for each of its models.
    """
    chosen = {q.client: spread(chats[q.client], section.examples) for q in questions}
    most = section.max_new_tokens
    prompts = iter(prompts_tokens(task, [chat for q in questions for chat in chosen[q.client]], most))
    asked = [replace(q, examples=[next(prompts) for _ in chosen[q.client]]) for q in questions]
    found: dict[str, dict[str, float]] = {}
    for client, answers in answers_of(task, adapter, asked, most).items():
        # A model that diverged says nothing.
        pairs = [(chat[-1][1], task.decode(ids or [])) for chat, ids in zip(chosen[client], answers, strict=True)]
        if pairs:
            found[client] = {
                name: sum(TEXT_METRICS[name](reference, answer) for reference, answer in pairs) / len(pairs)
                for name in section.generate
            }
    return found


def spread(chats: Sequence[Turns], most: int) -> list[Turns]:
    """At most so many, evenly spaced from the first on: a table may be sorted by anything."""
    taken = min(len(chats), most)
    return [chats[i * len(chats) // taken] for i in range(taken)]
