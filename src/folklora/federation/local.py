"""The local engine: all clients in this process, trained side by side through one backbone. No server, no network.

Messages are encoded and decoded all the same, so what a client gets is what would have travelled, and bytes are exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import Score
from folklora.errors import FolkLoraError
from folklora.federation.depths import choose
from folklora.federation.engine import Asked, Upload
from folklora.federation.member import Member, SplitName
from folklora.federation.scores import common_score, written_for
from folklora.federation.setup import Setup
from folklora.methods.aggregation import aggregation_error
from folklora.privacy.ckks import Key
from folklora.training.cohort import CohortTrainer
from folklora.training.evaluation import evaluate
from folklora.training.jobs import Fitted

logger = logging.getLogger(__name__)

SCORED_AT_ONCE = 64
"""Clients whose models are in memory a second time, with the server's reply in them, while they are scored."""


class LocalEngine:
    """Carries the round's messages by calling the members; see `folklora.federation.engine.Engine`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        seed, sealed = setup.recipe.seed, setup.recipe.secure.kind == "ckks"
        key = Key.of_simulation(seed) if sealed else None
        self.members = {client: Member(setup, client, key=key) for client in setup.data.splits}
        self.trainer = CohortTrainer(setup.task, setup.method.adapter, setup.recipe.train, setup.recipe.seed)

    def present(self, round: int, clients: Sequence[str], least: int) -> Sequence[str]:
        """All of them, and all with the data of this round from now on."""
        for member in self.members.values():
            member.enter(round)
        return clients

    def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
        for client in clients:
            try:
                data = self.members[client].sketch()
            except FolkLoraError as error:  # it has values that the wire cannot carry: its failure, nobody else's
                logger.warning("client %s has no sketch: %s", client, error)
            else:
                yield client, data

    def settle(self, client: str, data: bytes) -> None:
        self.members[client].settle(data)

    def receive(self, client: str, data: bytes) -> None:
        self.members[client].receive(data)

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        jobs = {client: self.members[client].jobs(round) for client in clients}
        done: dict[str, dict[str, Fitted]] = {client: {} for client in clients}
        for fitted in self.trainer.fit([job for own in jobs.values() for job in own]):
            client, own = fitted.client, done[fitted.client]
            own[fitted.branch] = fitted
            if len(own) < len(jobs[client]):
                continue
            yield self._finished(round, client, [own[job.branch] for job in jobs[client]])
        for client in (client for client in clients if not jobs[client]):
            yield self._finished(round, client, [])

    def _finished(self, round: int, client: str, results: Sequence[Fitted]) -> Upload:
        try:
            data = self.members[client].finish(round, results)
        except FolkLoraError as error:
            return Upload(client, None, failure=str(error), round=round)
        return Upload(client, data, results[0].loss if results else math.nan, round=round)

    def attach(self, client: str, data: bytes) -> None:
        self.members[client].outlet.attached = data

    def talk(self, round: int, topic: str, parts: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        for client, data in parts.items():
            try:
                answer = self.members[client].outlet.talk(round, topic, data)
            except FolkLoraError as error:
                logger.warning("client %s, %s: %s", client, topic, error)
            else:
                yield client, answer

    def accepted(self, clients: Sequence[str]) -> None:
        for client in clients:
            self.members[client].accepted()

    def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
        written = written_for([split for split, _ in questions])
        steps = self._chosen(clients, {} if written is None else questions[written][1], at_the_end=written is not None)
        return [self._scores(clients, *question, steps, written=i == written) for i, question in enumerate(questions)]

    def _chosen(
        self, clients: Sequence[str], replies: Mapping[str, bytes | None], *, at_the_end: bool
    ) -> dict[str, int]:
        """How often clients choose to apply a shared block, with the models that they end with."""
        depths, setup = self.setup.depths, self.setup
        if depths is None or not depths.auto or not at_the_end:
            return {}
        found: dict[str, int] = {}
        for start in range(0, len(clients), SCORED_AT_ONCE):
            members = [self.members[client] for client in clients[start : start + SCORED_AT_ONCE]]
            questions = [member.question("validation", replies.get(member.client.id)) for member in members]
            labels = {member.client.id: member.labels("validation") for member in members}
            found |= choose(setup.task, setup.method.adapter, depths, questions, labels)
        return found

    def _scores(
        self,
        clients: Sequence[str],
        split: SplitName,
        replies: Mapping[str, bytes | None],
        steps: Mapping[str, int],
        *,
        written: bool,
    ) -> dict[str, Score]:
        task, adapter, section = self.setup.task, self.setup.method.adapter, self.setup.recipe.eval
        found: dict[str, Score] = {}
        for start in range(0, len(clients), SCORED_AT_ONCE):
            members = [self.members[client] for client in clients[start : start + SCORED_AT_ONCE]]
            ids = [member.client.id for member in members]
            asked = [
                member.question(split, replies.get(i), steps.get(i)) for member, i in zip(members, ids, strict=True)
            ]
            labels = {member.client.id: member.labels(split) for member in members}
            chats = {member.client.id: member.inputs(split) for member in members} if written else None
            found |= evaluate(task, adapter, asked, labels, generate=section, chats=chats)
        return {client: replace(score, steps=steps.get(client)) for client, score in found.items()}

    def global_score(self, tensors: Tensors) -> Score | None:
        """The common model on the common test set; None if the data has none."""
        return common_score(self.setup, tensors)

    def aggregation_error(self, clients: Sequence[str], replies: Mapping[str, bytes | None], mixing: Tensor) -> float:
        """See `folklora.methods.aggregation.aggregation_error`; possible here because one process sees all factors."""
        trained = [self.members[client].client.tensors for client in clients]
        received = [self.members[client].preview(replies.get(client)).tensors for client in clients]
        return aggregation_error(self.setup.method.adapter, trained, received, mixing)

    def records(self, clients: Sequence[str]) -> dict[str, Tensors]:
        return {client: self.members[client].record() for client in clients}

    def restore(self, records: Mapping[str, Tensors]) -> Sequence[str]:
        for client, record in records.items():
            self.members[client].restore(record)
        return ()
