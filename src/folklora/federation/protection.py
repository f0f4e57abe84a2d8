"""Servers that do not take uploads as they come: everybody counts the same, and central noise hides each client.

The members' end of the latter is `folklora.federation.clipping`; what it costs, `folklora.federation.budget`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from folklora.adapters.lowrank import Tensors
from folklora.federation.budget import resolved_noise
from folklora.federation.clipping import PURPOSE
from folklora.federation.engine import Engine
from folklora.federation.intake import Intake
from folklora.federation.ledger import Ledger
from folklora.federation.sampling import by_chance
from folklora.federation.setup import Setup
from folklora.methods.contract import Message, State
from folklora.privacy.mechanism import added, applied, clipped, difference, noise


class EqualIntake(Intake):
    """Every upload counts the same, whatever it claims."""

    def read(self, round: int, state: State, client: str, data: bytes | None, said: Iterable[Message | None]) -> Any:
        message = super().read(round, state, client, data, said)
        return None if message is None else Message(message.tensors, {**message.numbers, "examples": 1.0})

    def known(self, round: int, state: State, client: str, message: Message) -> Tensors:
        """What both sides know of such an upload; where methods average, the same for everybody."""
        said = (self.method.welcome(state, client), self.method.reply(state, client) if round > 1 else None)
        return self.compression.reference(round, client, self.compression.told(said, message.tensors), message)

    def messages(self, uploads: Mapping[str, Any]) -> Mapping[str, Message] | None:
        return None  # the server makes another thing of them than the method's weights say


class NoisyIntake(EqualIntake):
    """Central noise, for methods that take nothing of uploads but their mean.

    The method is given one message: the mean of the clipped updates, and noise of standard deviation ``z C / n``. Where
    clients take part by chance (`folklora.federation.sampling`), the noisy sum is divided by the number of clients that
    is expected instead, and a round without anybody is noise alone and as good as any other.
    """

    def __init__(self, setup: Setup, engine: Engine, secret: int) -> None:
        super().__init__(setup, engine)
        self.secret = secret
        self.clip = self.recipe.privacy.clip
        self.deviation = self.clip * resolved_noise(self.recipe, self.method)
        self.alone = by_chance(self.recipe)

    def server(self, round: int, state: State, uploads: Mapping[str, Any], ledger: Ledger) -> State:
        clients = self.method.context.clients
        blank = {n: torch.zeros(shape) for n, shape in self.method.expected(round, state, clients[0]).items()}
        reference = self.known(round, state, clients[0], Message(blank))
        total: Tensors = {name: tensor.double() for name, tensor in blank.items()}
        for message in uploads.values():
            total = added(total, clipped(difference(message.tensors, reference), self.clip))
        # A round that is played again and hears others makes another sum: it must not be hidden by the same noise.
        heard = hashlib.sha256("\0".join(uploads).encode()).hexdigest()
        total = added(total, noise(total, self.deviation, self.secret, f"{PURPOSE}/{heard}", "", round))
        count = self.recipe.train.participation * len(clients) if self.alone else len(uploads)
        mean = applied({name: tensor / count for name, tensor in total.items()}, reference)
        # As the first client's, whoever took part: its name says nothing.
        return self.method.server(round, state, {clients[0]: Message(mean, {"examples": 1.0})})
