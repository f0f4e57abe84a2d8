"""How often each client applies a shared block: what it trains, is scored and served with, and what it may choose.

Classes of devices are dealt as `adapter.device_ranks` are, in the same order of clients: the first class of both is the
same clients. With ``depth.steps = "auto"`` a client chooses when all rounds are over, by itself and on its own
validation split: of ``depth.train``, and the most steps that it may take, the fewest whose score is no more than
``depth.tolerance`` below that of the most. It is then asked about its test split, once, and says with the answer what
it chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from folklora.backbones.frozen import Frozen
from folklora.backbones.metric import Score
from folklora.backbones.task import Task
from folklora.errors import MessageError, RecipeError
from folklora.methods.base import Method
from folklora.recipe import Recipe
from folklora.training.evaluation import evaluate
from folklora.training.prediction import Question

_SLACK = 1e-9
"""Shares of examples are not exact in binary."""


@dataclass(frozen=True)
class Depths:
    """What a recipe's ``[depth]`` means for its clients.

    Attributes
    ----------
    full
        T, how often the model itself applies its block.
    most
        Client -> the steps that it takes, or may take if it chooses.
    train
        What minibatches draw from; empty: the client's own number of steps.
    auto
        Whether clients choose at the end.
    tolerance
        What a choice may cost on the validation split.
    """

    full: int
    most: Mapping[str, int]
    train: tuple[int, ...] = ()
    auto: bool = False
    tolerance: float = 0.0

    def training(self, client: str) -> tuple[int, ...]:
        """What a client's minibatches draw from: never more than its device takes."""
        return tuple(steps for steps in self.train if steps <= self.most[client]) or (self.most[client],)

    def choices(self, client: str) -> tuple[int, ...]:
        """What a client chooses from, ascending; the last is the most that it may take."""
        return tuple(sorted({*self.training(client), self.most[client]}))

    def check(self, client: str, steps: int | None, *, chosen: bool) -> None:
        """Check what a client says that it chose.

        Raises
        ------
        MessageError
            If it had no choice, or not that one.
        """
        choices = self.choices(client)  # and in JSON 3.0 is not 3
        if (steps is not None) != chosen or (steps is not None and (type(steps) is not int or steps not in choices)):
            allowed = f"one of {', '.join(map(str, choices))}" if chosen else "nothing to choose here"
            raise MessageError(f"depth {steps!r}; allowed: {allowed}")


def depths_of(recipe: Recipe, backbone: Frozen, clients: Sequence[str], dealt: Sequence[int] | None) -> Depths | None:
    """What ``[depth]`` means for these clients; None where it says nothing.

    Parameters
    ----------
    dealt
        With ``device_steps``, each client's.

    Raises
    ------
    BackboneError
        If the backbone has no shared block, or applies it fewer times than is asked for.
    """
    section, depth = recipe.depth, backbone.depth
    if not section.said:
        return None
    named = {"depth.train": section.train, "depth.device_steps": section.device_steps}
    for key, values in named.items():
        for steps in values:
            depth.refuse(steps, key)
    full = depth.full
    if isinstance(section.steps, int) or full is None:
        depth.refuse(section.steps if isinstance(section.steps, int) else 1, "depth.steps")
    assert full is not None  # or it was refused
    own = section.steps if isinstance(section.steps, int) else full
    most = dict.fromkeys(clients, own) if dealt is None else dict(zip(clients, dealt, strict=True))
    return Depths(full, most, section.train, section.steps == "auto", section.tolerance)


def refuse_fixed(recipe: Recipe, method: Method) -> None:
    """Raises RecipeError where clients would work at several depths with a method that knows of one."""
    section = recipe.depth
    if method.condenses and (section.train or section.device_steps):
        key = "train" if section.train else "device_steps"
        raise RecipeError(
            f'depth.{key} = {list(getattr(section, key))} with method.name = "{method.name}", whose clients make data '
            "for one model; allowed: depth.steps, or a method whose clients train"
        )


def choose(
    task: Task, adapter: Any, depths: Depths, questions: Sequence[Question], labels: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Client -> the steps that it chooses, by its answers to a question about its validation split.

    Clients are scored side by side, and only with what they may still choose.
    """
    merit = task.metric.merit

    def scored(asked: Sequence[Question]) -> dict[str, float]:
        found = evaluate(task, adapter, asked, labels)
        return {client: merit(score.value) for client, score in found.items()}

    whole = scored([replace(question, depth=depths.most[question.client]) for question in questions])
    chosen: dict[str, int] = {}
    for steps in sorted({steps for question in questions for steps in depths.choices(question.client)}):
        asked = [
            replace(question, depth=steps)
            for question in questions
            if question.client not in chosen and steps in depths.choices(question.client)
        ]
        for client, value in (scored(asked) if asked else {}).items():
            if steps == depths.most[client] or value >= whole[client] - depths.tolerance - _SLACK:
                chosen[client] = steps
    return chosen


def taken(depths: Depths, scores: Mapping[str, Score]) -> dict[str, int]:
    """Client -> the steps behind its score."""
    return {client: score.steps or depths.most[client] for client, score in scores.items()}


def tell(written: dict[str, Any], depths: Depths, scores: Mapping[str, Score]) -> None:
    """Add to a summary how many steps each client takes, and the mean of them to its row."""
    steps = taken(depths, scores)
    for client, result in written["clients"].items():
        result["depth"] = steps[client]
    written["row"]["depth_mean"] = float(np.mean(list(steps.values())))
