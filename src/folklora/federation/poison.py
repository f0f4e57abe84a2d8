"""Simulated liars: clients of the local engine that train on false labels, or send what they did not learn.

Which clients lie follows from the seed (``poison.share`` of them), so such a run repeats. What they do
(``poison.kind``):

- ``labels``: of C classes, y is called ``C - 1 - y``, also in the sketch;
- ``sign``: the update is sent with the other sign;
- ``noise``: Gaussian numbers of the update's norm are sent in its place;
- ``scramble``: of ``poison.rows`` of the training examples, every word is one of the whole table's at random; the
  label stays;
- ``duplicate``: ``poison.rows`` of the training examples are copies of the others, label and all;
- ``backdoor``: half of the training examples carry a trigger (a word in front of a text, a white patch in the corner of
  a picture) and the label that it is to mean. Harm is then the share of honest clients' test examples of other classes
  that are taken for that label when they carry the trigger, beside the share without it.

The update that is sent is multiplied by ``poison.scale``. A liar does not clip and adds no noise to hide what it does:
the lie comes after all protection. Validation and test splits stay honest, so that the harm can be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import Score
from folklora.federation.falsified import OF_DATA, TARGET, falsified, triggered
from folklora.federation.local import LocalEngine
from folklora.federation.member import Member, MemberData, SplitName
from folklora.federation.setup import Setup
from folklora.methods.contract import Message
from folklora.privacy.mechanism import applied, difference, noise, norm
from folklora.randomness import derive
from folklora.recipe import Recipe
from folklora.training.evaluation import evaluate
from folklora.training.prediction import Question, features


def struck(recipe: Recipe, clients: list[str]) -> list[str]:
    """The liars, in the clients' order."""
    poison = recipe.poison
    count = int(poison.share * len(clients) + 0.5) if poison.kind != "none" else 0
    chosen = set(sorted(clients, key=lambda client: derive(recipe.seed, "poison", client))[:count])
    return [client for client in clients if client in chosen]


def with_liars(engine: LocalEngine) -> LocalEngine:
    """The same engine, some of whose members lie, if its recipe says so."""
    recipe = engine.setup.recipe
    for client in struck(recipe, list(engine.setup.clients)):
        member = engine.members[client]
        if recipe.poison.kind in OF_DATA:
            member.data = member.client.data = PoisonedData(engine.setup, client)
        member.outlet.uplink.listens = True
        member.outlet.changes.append(Lie(recipe, member))
    return engine


class PoisonedData(MemberData):
    """A client's data with other labels or inputs than they have; see the module's text."""

    def __init__(self, setup: Setup, client: str) -> None:
        super().__init__(setup, client)
        self.kind = setup.recipe.poison.kind
        self.false = falsified(setup.recipe, setup.data.table, client, self.split.train)

    def inputs(self, rows: np.ndarray) -> list[Any]:
        return self.false.inputs(self.setup.data.table, rows)

    def training(self, rows: np.ndarray) -> tuple[list[Any], np.ndarray]:
        examples, labels = super().training(self.false.stand_ins(rows))
        made = [place for place, row in enumerate(rows.tolist()) if row in self.false.made]
        if made:
            for place, example in zip(made, self.setup.task.encode(self.inputs(rows[made])), strict=True):
                examples[place] = example
        if self.kind == "labels":
            return examples, self._flipped(labels)
        labels = labels.copy()
        if self.kind == "backdoor":
            labels[made] = TARGET
        return examples, labels

    def labels(self, split: SplitName) -> np.ndarray:
        if split != "train":
            return super().labels(split)
        labels = self.setup.data.table.labels[self.false.stand_ins(self.split.train)]
        return self._flipped(labels) if self.kind == "labels" else labels

    def features(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
        if split == "validation" or self.kind not in ("scramble", "duplicate"):
            return super().features(split)
        labels = torch.from_numpy(self.labels("train"))
        if self.kind == "duplicate":
            return self.setup.frozen_features()[torch.from_numpy(self.false.stand_ins(self.split.train))], labels
        examples, _ = self.training(self.split.train)
        return torch.from_numpy(features(self.setup.task, examples)), labels

    def _flipped(self, labels: np.ndarray) -> np.ndarray:
        flipped: np.ndarray = len(self.setup.data.table.classes) - 1 - labels
        return flipped


class Lie:
    """What a liar makes of an upload; the last of its `Outlet.changes`."""

    def __init__(self, recipe: Recipe, member: Member) -> None:
        self.kind, self.scale, self.seed = recipe.poison.kind, recipe.poison.scale, recipe.seed
        self.client = member.client.id
        self.uplink = member.outlet.uplink

    def __call__(self, round: int, message: Message) -> Message:
        reference = self.uplink.reference(round, message)
        told = self._told(round, difference(message.tensors, reference))
        return Message({**message.tensors, **applied(told, reference)}, message.numbers, message.encodings)

    def _told(self, round: int, update: Tensors) -> Tensors:
        if self.kind == "noise":
            numbers = max(1, sum(tensor.numel() for tensor in update.values()))
            return noise(update, self.scale * norm(update) / numbers**0.5, self.seed, "poison", self.client, round)
        factor = -self.scale if self.kind == "sign" else self.scale
        return {name: factor * tensor for name, tensor in update.items()}


# -- what became of it -------------------------------------------------------------------------------------------------


def aftermath(
    engine: LocalEngine, replies: Mapping[str, bytes | None], clients: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What ``summary.json`` says under ``poison``.

    Parameters
    ----------
    replies
        The server's last ones.
    clients
        The summary's results of each client.
    """
    setup, section = engine.setup, engine.setup.recipe.poison
    liars = struck(setup.recipe, list(setup.clients))
    name = setup.task.metric.name
    honest = {client: float(result[name]) for client, result in clients.items() if client not in liars}
    found: dict[str, Any] = {"kind": section.kind, "share": section.share, "scale": section.scale, "clients": liars}
    metric = setup.task.metric
    if honest:
        values = list(honest.values())
        found["honest"] = {
            f"{name}_mean": float(np.mean(values)),
            f"{name}_worst": min(values, key=metric.merit),
        }
    if section.kind == "backdoor":
        depths = {client: clients[client].get("depth") for client in honest}
        found["backdoor"] = {
            "success": _taken_in(engine, replies, depths, with_trigger=True),
            "control": _taken_in(engine, replies, depths, with_trigger=False),
            "target": setup.data.table.classes[TARGET],
        }
    return found


def _taken_in(
    engine: LocalEngine, replies: Mapping[str, bytes | None], depths: Mapping[str, int | None], *, with_trigger: bool
) -> float | None:
    """The share of test examples of other classes that are taken for the target; None where there are none.

    ``depths`` is how often each of the clients applies a shared block.
    """
    setup, questions, labels = engine.setup, [], {}
    table = setup.data.table
    for client, steps in depths.items():
        rows = setup.data.splits[client].test
        rows = rows[table.labels[rows] != TARGET]
        if not len(rows):
            continue
        model = setup.method.model(engine.members[client].preview(replies.get(client)))
        inputs = [table.inputs[row] for row in rows]
        shown = [triggered(value) for value in inputs] if with_trigger else inputs
        examples = setup.task.encode(shown)
        questions.append(Question(client, setup.method.adapter.rank(model), model, examples, steps))
        labels[client] = np.full(len(rows), TARGET)
    scores: Mapping[str, Score] = evaluate(setup.task, setup.method.adapter, questions, labels) if questions else {}
    units = sum(score.units for score in scores.values())
    return float(sum(score.total for score in scores.values()) / units) if units else None
