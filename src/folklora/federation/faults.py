"""Simulated faults: an engine around an engine, whose clients are away and whose answers come late, twice or damaged.

How often is the recipe's ``[faults]``; whom they strike follows from (seed, fault, client, round), so a run with faults
repeats like any other, also when it is interrupted and resumed. They strike what a client answers in a round, and its
sketch (at first, in round 0); what the server says always arrives, and so do scores.

A late answer arrives in the round after its own. Until then it is on its way, which a run directory must know: it lies
in the client's record, beside what is the client's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import Score
from folklora.federation.engine import Asked, Engine, Upload
from folklora.randomness import derive
from folklora.recipe import Recipe

MINUTE = 60.0
"""Simulated seconds from one look at who is connected to the next."""


def with_faults(engine: Engine, recipe: Recipe) -> Engine:
    """The engine as the recipe's faults leave it."""
    return FaultyEngine(engine, recipe) if any(share for _, share in recipe.faults) else engine


class FaultyEngine:
    """What `Engine` says, with faults; see the module's text."""

    def __init__(self, engine: Engine, recipe: Recipe) -> None:
        self.engine = engine
        self.seed = recipe.seed
        self.shares: dict[str, float] = recipe.faults.model_dump()
        self.looks = 1 + int(recipe.engine.wait // MINUTE)
        self.late: dict[str, Upload] = {}  # by client; on their way
        self.round = 0

    def strikes(self, fault: str, client: str, round: int, look: int = 0) -> bool:
        purpose = f"fault/{fault}/{look}" if look else f"fault/{fault}"
        return derive(self.seed, purpose, client, round) < self.shares[fault] * 2**63

    # -- where faults strike -------------------------------------------------------------------------------------

    def present(self, round: int, clients: Sequence[str], least: int) -> Sequence[str]:
        """Who was seen in at least one look; no time passes."""
        clients = self.engine.present(round, clients, least)
        there: set[str] = set()
        for look in range(self.looks):
            there |= {client for client in clients if not self.strikes("offline", client, round, look)}
            if len(there) >= min(least, len(clients)):
                break
        return [client for client in clients if client in there]

    def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
        for client, data in self.engine.sketches(clients, round):
            # A late sketch is never read: nobody waits for it. Who has none to send cannot be late with it.
            if data is not None and self.strikes("late", client, round):
                continue
            yield from [(client, self._carried(client, round, data))] * self._copies(client, round)

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        self.round = round
        arriving = [upload for upload in self.late.values() if upload.round == round - 1]
        self.late = {}
        yield from arriving
        for upload in self.engine.train(round, clients):
            client = upload.client
            if self.strikes("late", client, round):
                self.late[client] = upload
                continue
            carried = replace(upload, data=self._carried(client, round, upload.data))
            yield from [carried] * self._copies(client, round)

    def _copies(self, client: str, round: int) -> int:
        return 2 if self.strikes("duplicate", client, round) else 1

    def _carried(self, client: str, round: int, data: bytes | None) -> bytes | None:
        """The bytes as they arrive: where they are damaged, a byte is changed, or the rest is missing."""
        if data is None or not self.strikes("corrupt", client, round):
            return data
        draw = derive(self.seed, "fault/corrupt/where", client, round)
        where = draw // 2 % len(data)
        return data[:where] + (bytes([data[where] ^ 0xFF]) + data[where + 1 :] if draw % 2 else b"")

    # -- records -------------------------------------------------------------------------------------------------

    def records(self, clients: Sequence[str]) -> dict[str, Tensors]:
        records = self.engine.records(clients)
        for client in clients:
            if client in self.late:
                records[client] = {**records[client], **_to_tensors(self.late[client])}
        return records

    def restore(self, records: Mapping[str, Tensors]) -> Sequence[str]:
        """An answer of the round in hand stays on its way when its client is taken back to where it was before."""
        for client, record in records.items():
            upload = _from_tensors(client, record)
            if upload is not None and upload.round >= self.round:
                self.late[client] = upload
        return self.engine.restore(records)

    # -- where they do not ---------------------------------------------------------------------------------------

    def settle(self, client: str, data: bytes) -> None:
        self.engine.settle(client, data)

    def receive(self, client: str, data: bytes) -> None:
        self.engine.receive(client, data)

    def attach(self, client: str, data: bytes) -> None:
        self.engine.attach(client, data)

    def talk(self, round: int, topic: str, parts: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        return self.engine.talk(round, topic, parts)

    def accepted(self, clients: Sequence[str]) -> None:
        self.engine.accepted(clients)

    def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
        return self.engine.scores(clients, questions)

    def global_score(self, tensors: Tensors) -> Score | None:
        return self.engine.global_score(tensors)

    def aggregation_error(
        self, clients: Sequence[str], replies: Mapping[str, bytes | None], mixing: Tensor
    ) -> float | None:
        return self.engine.aggregation_error(clients, replies, mixing)


def _to_tensors(upload: Upload) -> Tensors:
    """An upload on its way, under names that no member uses."""
    about = {"late/round": torch.tensor([upload.round]), "late/loss": torch.tensor([upload.loss], dtype=torch.float64)}
    if upload.data is None:
        return about
    return {**about, "late/upload": torch.frombuffer(bytearray(upload.data), dtype=torch.uint8)}


def _from_tensors(client: str, record: Tensors) -> Upload | None:
    if "late/round" not in record:
        return None
    data = record["late/upload"].numpy().tobytes() if "late/upload" in record else None
    return Upload(client, data, float(record["late/loss"]), None, int(record["late/round"]))
