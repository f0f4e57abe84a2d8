"""One victim's round as the server sees it: the real member trains on its batch, what it sends is decoded.

The attacker is given an `Observation`. What it believes of tensors that never travel is what it can compute: the start
that follows from the seed, the welcome and the replies, taken in as a client without data would; or, where it
*rehearses*, what a client with public examples in the place of the victim's has after the same rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors, kind
from folklora.backbones.causal import Dialogue
from folklora.federation.codec import decode, encode
from folklora.federation.engine import Upload
from folklora.federation.intake import intake_of
from folklora.federation.ledger import Ledger
from folklora.federation.local import LocalEngine
from folklora.federation.member import Member
from folklora.federation.setup import Setup
from folklora.methods.contract import Client, Message, State
from folklora.methods.work import rate_of
from folklora.privacy.attacks.observation import Knowledge, Observation, Victim, cut, moving
from folklora.privacy.attacks.replica import Replica
from folklora.privacy.attacks.warm import Warm, with_batch
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job
from folklora.training.optimizer import schedule


@dataclass(frozen=True)
class Seen:
    """An observation, and of it what is reported rather than attacked: bytes, and tensors that no attack matches."""

    observation: Observation
    bytes: int
    unmatched: tuple[str, ...]


class Alone(LocalEngine):
    """The local engine with a single client in it."""

    def __init__(self, setup: Setup, client: str) -> None:
        self.setup = setup
        self.members = {client: Member(setup, client)}
        self.trainer = CohortTrainer(setup.task, setup.method.adapter, setup.recipe.train, setup.recipe.seed)

    def attach(self, client: str, data: bytes) -> None:
        if client in self.members:
            super().attach(client, data)


def watch(
    warm: Warm,
    victim: Victim,
    knowledge: Knowledge,
    replica: Replica,
    *,
    steps: int,
    rounds: int = 1,
    public: np.ndarray | None = None,
) -> list[Seen]:
    """What the server holds after each of ``rounds`` rounds in which the victim trained on the same batch.

    Between those rounds the server takes the victim's upload alone.

    Parameters
    ----------
    steps
        Gradient steps of a round.
    public
        Rows to rehearse the victim's private tensors on; None: it is not rehearsed.
    """
    setup = with_batch(warm.setup, victim.client, victim.rows, steps)
    client, state = victim.client, warm.state
    _, sketch = sketch_of(warm.setup, client)
    if setup.recipe.secure.kind != "none":  # what one client sends is nothing that a server can read
        blank = _observation(setup, victim, warm.round + 1, setup.method.initial(client), Message(), {}, {}, knowledge)
        return [Seen(blank, 0, ())]
    engine = Alone(setup, client)
    engine.restore({client: warm.record(client)})
    member = engine.members[client]
    found = []
    for number in range(warm.round + 1, warm.round + rounds + 1):
        intake = intake_of(setup, engine)
        reply = intake.reply(state, client) if number > 1 else None
        if reply is not None:
            engine.receive(client, reply)
        jobs = member.jobs(number)
        message, size = Message(), 0
        if jobs:
            intake.prepare(number, list(setup.data.splits), Ledger())
            (upload,) = engine.train(number, [client])
            message, size = _read(intake, setup, number, state, upload)
        true = jobs[0].tensors if jobs else dict(member.client.tensors)
        before = true if knowledge.bases else believed(warm, client, number, state, public)
        gradient, unmatched = _gradient(setup, jobs, message, before, knowledge, replica, victim)
        seen = _observation(setup, victim, number, before, message, gradient, sketch, knowledge)
        seen = replace(seen, masks=jobs[0].terms.masks if jobs else {})
        found.append(Seen(seen, size, unmatched))
        if number < warm.round + rounds and message.tensors:
            state = intake.server(number, state, {client: message}, Ledger())
            engine.accepted([client])
    return found


def _read(intake: Any, setup: Setup, round: int, state: State, upload: Upload) -> tuple[Message, int]:
    if upload.failure is not None or upload.data is None:
        return Message(), 0
    method, client = setup.method, upload.client
    said = (method.welcome(state, client), method.reply(state, client) if round > 1 else None)
    return intake.read(round, state, client, upload.data, said) or Message(), len(upload.data)


def sketch_of(setup: Setup, client: str) -> tuple[bytes, Tensors]:
    """What a client sends once: as it travels, and decoded; both empty where it sends nothing."""
    data = Member(setup, client).sketch()
    return (b"", {}) if data is None else (data, dict(decode(data).tensors))


def _observation(
    setup: Setup,
    victim: Victim,
    round: int,
    before: Tensors,
    message: Message,
    gradient: Tensors,
    sketch: Tensors,
    knowledge: Knowledge,
) -> Observation:
    train = setup.recipe.train
    texts = setup.recipe.form != "image"
    prompts = [e.prompt for e in victim.examples if isinstance(e, Dialogue)] if texts and knowledge.lengths else []
    return Observation(
        client=victim.client,
        round=round,
        count=len(victim.rows),
        before=before,
        sent=dict(message.tensors),
        gradient=gradient,
        steps=train.local_epochs,
        local_epochs=train.local_epochs,
        learning_rate=train.lr,
        optimizer=train.optimizer,
        labels=victim.labels if knowledge.labels else None,
        lengths=[len(example) for example in victim.examples] if texts and knowledge.lengths else None,
        sketch=sketch,
        prompts=prompts or None,
    )


def _gradient(
    setup: Setup,
    jobs: Sequence[Job],
    message: Message,
    before: Tensors,
    knowledge: Knowledge,
    replica: Replica,
    victim: Victim,
) -> tuple[Tensors, tuple[str, ...]]:
    """Of each trained tensor that travelled: exact, or read off how far it moved; and what was left out."""
    if not jobs:
        return {}, tuple(message.tensors)
    job, way = jobs[0], travelled(setup, jobs[0])
    sent = setup.method.as_trained(message.tensors, before, setup.recipe.train.optimizer, way)
    names = [name for name in sent if name in job.trained and _fits(name, sent, job)]
    unmatched = tuple(name for name in sent if name not in names and kind(name) != "index")
    if knowledge.view == "gradient":
        exact = replica.exact(job.tensors, names, victim.examples, torch.from_numpy(np.asarray(victim.labels)))
        exact = moving(exact, job.terms.masks)
        return {name: cut(name, slope.cpu(), sent) for name, slope in exact.items()}, unmatched
    moves = {name: cut(name, before[name], sent) - sent[name].float() for name in names}
    head_rate = setup.recipe.train.head_rate
    return {name: move / (way * rate_of(name, head_rate)) for name, move in moves.items()}, unmatched


def _fits(name: str, message: Tensors, job: Job) -> bool:
    sent, whole = message[name], job.tensors[name].shape
    if kind(name) in {"A", "B"} and f"index/{name.partition('/')[2]}" in message:
        return True
    return len(sent.shape) == len(whole) and all(part <= all_ for part, all_ in zip(sent.shape, whole, strict=True))


def travelled(setup: Setup, job: Job) -> float:
    """The sum of a job's learning rates: the recipe tells it to everybody."""
    train, steps = setup.recipe.train, setup.recipe.train.local_epochs
    first, total = (job.round - 1) * steps, max(1, train.rounds) * steps
    return sum(train.lr * job.terms.rate * schedule(train, first + i, total) for i in range(steps)) or 1.0


# -- what the attacker believes ----------------------------------------------------------------------------------------


class _Unknown(Exception):
    """The shadow of a client has no data."""


class _NoData:
    def quality(self) -> float:
        raise _Unknown

    def features(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
        raise _Unknown

    def weight_gradients(self, head: Tensors, examples: int) -> Tensors:
        raise _Unknown

    def network_inputs(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor, Tensor]:
        raise _Unknown

    def layer_inputs(self, tensors: Tensors, examples: int) -> Tensors:
        raise _Unknown


def believed(warm: Warm, client: str, round: int, state: State, public: np.ndarray | None) -> Tensors:
    """The client's model at the start of a round as the attacker can know it."""
    if public is not None and len(public) and warm.round:
        return _rehearsed(warm, client, round, state, public)
    setup, method = warm.setup, warm.setup.method
    shadow = Client(client, setup.ranks[client], 1, method.initial(client), _NoData(), 0)
    for message, take in (
        (method.welcome(state, client), method.settle),
        (method.reply(state, client) if round > 1 else None, method.receive),
    ):
        if message is None:
            continue
        try:
            take(shadow, message)
        except _Unknown:  # it depends on data: what bears the name of a tensor is taken for it
            shadow.tensors.update({n: t for n, t in message.tensors.items() if n in shadow.tensors})
    try:
        works = method.work(round, shadow)
    except _Unknown:
        works = ()
    return dict(works[0].tensors) if works else shadow.tensors


def _rehearsed(warm: Warm, client: str, round: int, state: State, public: np.ndarray) -> Tensors:
    """What a client with public examples has after the rounds that the victim has behind it."""
    own = warm.setup.data.splits[client]
    half = max(1, len(public) // 10)
    split = replace(own, train=np.sort(public[half:]), validation=np.sort(public[:half]))
    setup = replace(warm.setup, data=replace(warm.setup.data, splits={client: split}))
    engine, method = Alone(setup, client), setup.method
    intake, before = intake_of(setup, engine), warm.states[0]
    if (welcome := method.welcome(before, client)) is not None:
        engine.settle(client, encode(welcome, setup.recipe.message.dtype))
    for number in range(1, warm.round + 1):
        earlier = warm.states[min(number - 1, len(warm.states) - 1)]
        if number > 1 and (reply := intake.reply(earlier, client)) is not None:
            engine.receive(client, reply)
        list(engine.train(number, [client]))
    if (reply := intake.reply(state, client)) is not None:
        engine.receive(client, reply)
    jobs = engine.members[client].jobs(round)
    return dict(jobs[0].tensors) if jobs else dict(engine.members[client].client.tensors)
