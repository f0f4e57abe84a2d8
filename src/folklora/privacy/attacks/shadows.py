"""Shadow clients: what would the victim have sent, had its examples been others?

A shadow has the victim's place in the federation: it starts as the victim does, is told what the victim was told round
after round (the server knows that), and trains on examples that the attacker chose. Many shadows train side by side
through one backbone, as many clients do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from folklora.adapters.lowrank import Tensors
from folklora.errors import AttackError
from folklora.federation.codec import encode
from folklora.federation.engine import Upload
from folklora.federation.intake import Intake, intake_of
from folklora.federation.ledger import Ledger
from folklora.federation.member import Member
from folklora.federation.setup import Setup
from folklora.methods.contract import Message, State
from folklora.privacy.attacks.warm import Warm
from folklora.privacy.attacks.witness import Alone
from folklora.randomness import derive
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Fitted, Job


@dataclass(frozen=True)
class Cast:
    """One client, real or shadow, after the attacked round.

    Attributes
    ----------
    rows
        What it trained on, into the setup's table.
    sent
        What the server read of it in that round; empty if nothing.
    before, model
        Its whole model when the round's training began, and after it.
    bytes
        Of the upload.
    """

    rows: np.ndarray
    sent: Tensors
    before: Tensors
    model: Tensors
    bytes: int = 0


def victim(warm: Warm, client: str) -> Cast:
    """The client itself, in the round after the warm state's: its own examples, epochs and batches."""
    setup, number = warm.setup, warm.round + 1
    engine = Alone(setup, client)
    engine.restore({client: warm.record(client)})
    intake = intake_of(setup, engine)
    if number > 1 and (reply := intake.reply(warm.state, client)) is not None:
        engine.receive(client, reply)
    member = engine.members[client]
    jobs = member.jobs(number)
    rows = setup.data.splits[client].train
    if not jobs:
        return Cast(rows, {}, dict(member.client.tensors), setup.method.model(member.client))
    before = dict(jobs[0].tensors)
    intake.prepare(number, list(setup.data.splits), Ledger())
    (upload,) = engine.train(number, [client])
    sent, size = _read(intake, setup, number, warm.state, upload)
    return Cast(rows, sent, before, setup.method.model(member.client), size)


def shadows(
    warm: Warm, client: str, rows: Sequence[np.ndarray], seed: int, advance: Callable[[], None] = lambda: None
) -> list[Cast]:
    """Shadows of a client after the same round, one for each choice of training examples.

    Raises
    ------
    AttackError
        If what one client sends cannot be read, or no training happens.
    """
    setup = warm.setup
    if setup.recipe.secure.kind != "none":
        raise AttackError(
            f'secure.kind = "{setup.recipe.secure.kind}": the server reads no single client\'s upload; allowed: "none"'
        )
    # Each shadow shuffles its batches and draws its noise on its own.
    train = setup.recipe.train
    trainer = CohortTrainer(setup.task, setup.method.adapter, train, derive(seed, "shadows", client))
    cast = [_Shadow(warm, client, own, derive(seed, "shadow", client, i)) for i, own in enumerate(rows)]
    for number in range(1, warm.round + 2):
        state = warm.states[min(number - 1, len(warm.states) - 1)]
        jobs = [replace(job, client=str(i)) for i, shadow in enumerate(cast) for job in shadow.jobs(number, state)]
        if not jobs:
            raise AttackError(f"method {setup.recipe.method.name!r} trains nothing: nobody's membership is in it")
        done: dict[str, list[Fitted]] = {}
        for fitted in trainer.fit(jobs):
            done.setdefault(fitted.client, []).append(fitted)
            advance()
        for i, shadow in enumerate(cast):
            shadow.trained(number, done[str(i)])
    return [shadow.cast(state) for shadow in cast]


class _Shadow:
    def __init__(self, warm: Warm, client: str, rows: np.ndarray, secret: int) -> None:
        own = replace(warm.setup.data.splits[client], train=np.sort(rows))
        data = replace(warm.setup.data, splits={client: own})
        self.setup: Setup = replace(warm.setup, data=data)
        self.name = client
        self.rows = own.train
        self.engine = Alone(self.setup, client)
        self.member = self.engine.members[client] = Member(self.setup, client, secret)
        self.intake: Intake = intake_of(self.setup, self.engine)
        self.before: Tensors = {}
        self.upload: bytes | None = None

    def jobs(self, number: int, state: State) -> list[Job]:
        """This round's trainings, after the welcome (before the first round) or the reply (before all others)."""
        if number == 1:
            welcome = self.setup.method.welcome(state, self.name)
            if welcome is not None:
                self.member.settle(encode(welcome, self.setup.recipe.message.dtype))
        elif (reply := self.intake.reply(state, self.name)) is not None:
            self.member.receive(reply)
        jobs = self.member.jobs(number)
        self.branches = [job.branch for job in jobs]
        self.number, self.before = number, dict(jobs[0].tensors) if jobs else {}
        return jobs

    def trained(self, number: int, fitted: Sequence[Fitted]) -> None:
        ordered = sorted(fitted, key=lambda each: self.branches.index(each.branch))
        self.upload = self.member.finish(number, [replace(each, client=self.name) for each in ordered])
        self.member.accepted()

    def cast(self, state: State) -> Cast:
        upload = Upload(self.name, self.upload, round=self.number)
        raw, size = _read(self.intake, self.setup, self.number, state, upload)
        sent = self.setup.method.as_trained(raw, self.before, self.setup.recipe.train.optimizer)
        return Cast(self.rows, sent, self.before, self.setup.method.model(self.member.client), size)


def _read(intake: Intake, setup: Setup, number: int, state: State, upload: Upload) -> tuple[Tensors, int]:
    if upload.failure is not None or upload.data is None or setup.recipe.secure.kind != "none":
        return {}, 0
    client, method = upload.client, setup.method
    said = (method.welcome(state, client), method.reply(state, client) if number > 1 else None)
    message: Any = intake.read(number, state, client, upload.data, said) or Message()
    return dict(message.tensors), len(upload.data)


def windows(pool: np.ndarray, size: int, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """``count`` choices of ``size`` rows out of a pool, each row in as many of them as any other, or one more.

    A permutation is walked round in circles, so that with ``size`` at half the pool each other choice is the rest of
    the one before it; every second walk around, the order is a new one.
    """
    found: list[np.ndarray] = []
    order = generator.permutation(pool)
    place = 0
    while len(found) < count:
        found.append(np.sort(np.take(order, range(place, place + size), mode="wrap")))
        place += size
        if place >= 2 * len(pool):
            order, place = generator.permutation(pool), 0
    return found
