"""The round loop's engine where members are elsewhere: orders go out, answers come in, whatever carries them.

Private state is at the members. What the server keeps of each is a note: which version of its state the committed round
left it with, whether that version has its welcome, and whether the upload made in it was taken. An order starts from
the noted version, so a server that lost a round asks again and gets the same.

Welcomes and replies wait here until the member's next order, and travel once: the server notes what each member has.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import Score
from folklora.errors import FolkLoraError, MessageError, RunError
from folklora.federation.engine import Asked, Upload
from folklora.federation.notes import Note
from folklora.federation.orders import Answer, Order
from folklora.federation.parties import for_members
from folklora.federation.roster import SPLITS, Roster
from folklora.federation.rundir import Checkpoint, RunDirectory
from folklora.federation.scores import check_score, common_score, written_for
from folklora.federation.setup import Setup

log = logging.getLogger(__name__)

POLL = 0.5
"""Seconds between two looks at who is connected."""
FAREWELL = 10.0
"""Seconds that a goodbye may take; nothing depends on it."""
REMEMBERED = 16
"""Orders of each member whose answers are still recognised when they come late."""


@dataclass(frozen=True)
class Delivery:
    """Something that a carrier brings: who sent it, as the carrier knows them, and the record, or why there is none."""

    client: str
    record: Mapping[str, Any] | None
    failure: str = ""


class Carrier(Protocol):
    """Takes orders to members and brings their answers."""

    def members(self) -> Sequence[str]:
        """Those that can be reached now."""
        ...

    def exchange(self, orders: Mapping[str, Order], deadline: float) -> Iterator[Delivery]:
        """Deliveries as they come, until every order is answered or ``deadline`` seconds are over.

        Answers to earlier orders may be among them; the same may come twice.
        """
        ...


class RemoteEngine:
    """Carries the round's messages as orders and answers; see `folklora.federation.engine.Engine`.

    Whoever answers with something that cannot be has failed; the others are not concerned.
    """

    def __init__(self, setup: Setup, carrier: Carrier, directory: RunDirectory, roster: Roster) -> None:
        self.setup = setup
        self.carrier = carrier
        self.directory = directory
        self.roster = roster
        self.round = 0
        self.notes = {client: Note() for client in roster.members}
        self.has: dict[str, set[str]] = {client: set() for client in roster.members}  # digests, for certain
        self.checkpoints: list[Checkpoint] | None = None
        self.welcomes: dict[str, bytes] = {}
        self.replies: dict[str, bytes] = {}
        self.attachments: dict[str, bytes] = {}
        self.told: dict[str, dict[str, bytes]] = {}  # the bytes that the last order meant
        self.afresh: set[str] = set()  # they lost their state before they ever trained, and start again
        self.waited = False
        self.greeted: set[str] = set()
        self.unwilling: set[str] = set()  # connected, but not to be asked
        self.numbers = itertools.count(secrets.randbits(40))  # no order of an earlier process has one of these
        self.sent: dict[int, Order] = {}

    # -- who is there --------------------------------------------------------------------------------------------

    def present(self, round: int, clients: Sequence[str], least: int) -> Sequence[str]:
        self.round = round
        end = time.monotonic() + self.setup.recipe.engine.wait
        if not self.waited:  # the server has just been started, perhaps again: members need some seconds to come back
            self.waited, least = True, len(clients)
        while True:
            here = set(self.carrier.members())
            self.unwilling &= here
            self._greet([c for c in clients if c in here - self.greeted - self.unwilling])
            found = [client for client in clients if client in here & self.greeted]
            left = end - time.monotonic()
            if len(found) >= min(least, len(clients)) or left <= 0:
                return found
            time.sleep(min(POLL, left))

    def _greet(self, clients: Sequence[str]) -> None:
        """Say hello to members that this process has not met; whose answer is late is met when it comes."""
        if not clients:
            return
        told = {
            "recipe": for_members(self.setup.recipe).to_toml(),
            "clients": self.roster.members,
            "classes": self.roster.classes,
            "backbone": self.setup.task.backbone.digest,
        }
        orders = {client: self._order("hello", client, 0, **told) for client in clients}
        for _ in self._exchange(orders, self.setup.recipe.engine.deadline):
            pass
        self.unwilling |= set(clients) - self.greeted

    def _met(self, answer: Answer) -> None:
        client = answer.client
        try:
            if answer.status != "done":
                raise MessageError(answer.failure)
            if answer.examples is None or min(answer.examples) < 1:
                raise MessageError(f"a hello with the examples {answer.examples}; allowed: one or more in each split")
            if answer.backbone != self.setup.task.backbone.digest:
                raise MessageError("it computes with another backbone")
            self.roster.met(client, answer.examples)
        except FolkLoraError as error:
            log.warning("member %s is left out: %s", client, error)
            self.unwilling.add(client)
        else:
            log.info("member %s is here: %d, %d and %d examples", client, *answer.examples)
            self.greeted.add(client)
            self.unwilling.discard(client)

    def goodbye(self) -> None:
        """Tell those who are there that the run is over."""
        here = [client for client in self.carrier.members() if client in self.greeted]
        orders = {client: self._order("goodbye", client, self.round) for client in here}
        for _ in self._exchange(orders, FAREWELL):
            pass

    # -- the round loop's requests -------------------------------------------------------------------------------

    def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
        base = {client: self.notes[client].version if round else -1 for client in clients}
        orders = {client: self._order("sketch", client, round, base=base[client]) for client in clients}
        for order, answer, fresh in self._ask(orders):
            if fresh and order.kind == "sketch" and answer.status == "done":
                if not order.round:
                    self.notes[order.client] = Note(version=0)
                yield order.client, answer.data

    def settle(self, client: str, data: bytes) -> None:
        self.welcomes[client] = data

    def receive(self, client: str, data: bytes) -> None:
        self.replies[client] = data

    def attach(self, client: str, data: bytes) -> None:
        self.attachments[client] = data

    def talk(self, round: int, topic: str, parts: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        orders = {
            client: self._order("talk", client, round, base=self.notes[client].version, topic=topic, part=part)
            for client, part in parts.items()
        }
        for order, answer, fresh in self._ask(orders):
            if fresh and order.kind == "talk" and answer.status == "done" and answer.data is not None:
                yield order.client, answer.data
            elif fresh and answer.status != "done":
                log.warning("member %s, %s: %s", order.client, topic, answer.failure)

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        orders = {}
        for client in clients:
            told = self._told(client, self.replies.pop(client, None))
            told["attached"] = self.attachments.pop(client, None)
            orders[client] = self._order(
                "train", client, round, base=self.notes[client].version, accepted=self.notes[client].accepted, **told
            )
        for order, answer, fresh in self._ask(orders):
            if order.kind != "train":
                continue
            if fresh and answer.status in ("done", "failed"):
                self._delivered(order)
            if fresh and answer.status == "done":
                self._trained(order)
            failure = None if answer.status == "done" else answer.failure
            if answer.status == "lost" and order.base > 0:
                failure = f"{answer.failure}; allowed: its folder brought back, or a new run"
            loss = answer.loss if answer.loss is not None else math.nan
            yield Upload(order.client, answer.data, loss, failure, order.round)

    def _delivered(self, order: Order) -> None:
        """The member has what the order named; what the round loop takes for an answer says so, and nothing else."""
        new = {name: digest for name in ("welcome", "reply") if (digest := getattr(order, name)) is not None}
        self.notes[order.client] = replace(self.notes[order.client], **new)
        self.has[order.client] |= set(new.values())

    def _trained(self, order: Order) -> None:
        note = self.notes[order.client]
        settled = note.settled or order.welcome is not None
        self.notes[order.client] = replace(note, version=order.round, settled=settled, accepted=False)

    def accepted(self, clients: Sequence[str]) -> None:
        for client in clients:
            self.notes[client] = replace(self.notes[client], accepted=True)

    def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
        orders, names = {}, {}
        for client in clients:
            given = {reply for _, replies in questions if (reply := replies.get(client)) is not None}
            if len(given) > 1:
                raise ValueError("one exchange has room for one reply a client")
            told = self._told(client, next(iter(given), None))
            names[client] = [f"{s}+reply" if replies.get(client) is not None else s for s, replies in questions]
            asked = list(dict.fromkeys(names[client]))
            orders[client] = self._order(
                "score", client, self.round, base=self.notes[client].version, questions=asked, **told
            )
        found: list[dict[str, Score]] = [{} for _ in questions]
        for order, answer, fresh in self._ask(orders):
            if not fresh or answer.status != "done":
                continue
            if scores := self._scores(order, answer):
                self._delivered(order)
            for each, name in zip(found, names[order.client], strict=True):
                if name in scores:
                    each[order.client] = scores[name]
        return found

    def _scores(self, order: Order, answer: Answer) -> dict[str, Score]:
        """What a member says its models do; nothing, if that cannot be."""
        sizes = dict(zip(SPLITS, self.roster.sizes[order.client], strict=True))
        length = self.setup.recipe.model.max_length
        scores = answer.scores
        try:
            if len(scores) != len(order.questions):
                raise MessageError(f"{len(scores)} scores; allowed: one for each of {len(order.questions)} questions")
            for question, score in zip(order.questions, scores, strict=True):
                check_score(score, self.setup.task.metric, sizes[question.removesuffix("+reply")], length)
            self._check_steps(order, answer.steps)
        except MessageError as error:
            log.warning("member %s: %s", order.client, error)
            return {}
        return dict(zip(order.questions, scores, strict=True))

    def _check_steps(self, order: Order, steps: int | None) -> None:
        depths = self.setup.depths
        asked = written_for([question.removesuffix("+reply") for question in order.questions]) is not None
        if depths is not None:
            depths.check(order.client, steps, chosen=depths.auto and asked)
        elif steps is not None:
            raise MessageError(f"depth {steps}; allowed: nothing to choose here")

    def global_score(self, tensors: Tensors) -> Score | None:
        return common_score(self.setup, tensors)

    def aggregation_error(
        self, clients: Sequence[str], replies: Mapping[str, bytes | None], mixing: Tensor
    ) -> float | None:
        return None  # it is measured on factors that stay at home

    def examples(self, client: str) -> dict[str, int]:
        return dict(zip(SPLITS, self.roster.sizes.get(client, [0, 0, 0]), strict=True))

    # -- notes ---------------------------------------------------------------------------------------------------

    def records(self, clients: Sequence[str]) -> dict[str, Tensors]:
        self.checkpoints = None  # a commit is about to be made
        return {client: self.notes[client].tensors() for client in clients}

    def restore(self, records: Mapping[str, Tensors]) -> Sequence[str]:
        for client, record in records.items():
            note = Note.of(record)
            self.notes[client] = Note() if client in self.afresh and note.version <= 0 else note
            self.has[client] |= self.notes[client].digests
            self.replies.pop(client, None)
        return [client for client in records if not self.notes[client].settled]

    def _kept(self, client: str) -> list[Note]:
        """The notes that the server may come back to."""
        found = []
        for checkpoint in self._checkpoints():
            if client not in checkpoint.clients:
                continue  # of a newcomer nothing is kept: it is asked again
            with suppress(RunError):  # what cannot be read cannot be come back to either
                found.append(Note.of(self.directory.tensors(checkpoint, checkpoint.clients[client])))
        return found

    def _checkpoints(self) -> list[Checkpoint]:
        """Those that are kept; read again after each commit."""
        if self.checkpoints is None:
            self.checkpoints = self.directory.kept()
        return self.checkpoints

    # -- orders --------------------------------------------------------------------------------------------------

    def _order(self, kind: str, client: str, round: int, **fields: Any) -> Order:
        kept = self._kept(client) if kind in ("sketch", "train", "talk", "score") else []
        order = Order.of(
            {
                "kind": kind,
                "run": self.roster.run,
                "number": next(self.numbers),
                "round": round,
                "client": client,
                "keep": sorted({note.version for note in kept}),
                "hold": sorted(set().union(*(note.digests for note in kept))),
                **fields,
            }
        )
        return self._remember(order)

    def _remember(self, order: Order) -> Order:
        # Without what weighs: it is only to know its answer by.
        heavy = ("welcome_data", "reply_data", "attached", "part", "recipe", "clients", "classes")
        self.sent[order.number] = order.model_copy(update=dict.fromkeys(heavy))
        if len(self.sent) > REMEMBERED * len(self.roster.members):
            del self.sent[next(iter(self.sent))]
        return order

    def _told(self, client: str, reply: bytes | None) -> dict[str, Any]:
        """The welcome, if the member's version lacks it, and a reply; their bytes where the member may lack those."""
        welcome = None if self.notes[client].settled else self.welcomes.get(client)
        named: dict[str, Any] = {}
        self.told[client] = {}
        for name, data in (("welcome", welcome), ("reply", reply)):
            if data is not None:
                digest = hashlib.sha256(data).hexdigest()
                named |= {name: digest, f"{name}_data": None if digest in self.has[client] else data}
                self.told[client][f"{name}_data"] = data
        return named

    def _ask(self, orders: Mapping[str, Order]) -> Iterator[tuple[Order, Answer, bool]]:
        """The answers to orders, and whether they are the first to an order of these; who lacks what it was thought to
        have is sent it."""
        again: dict[str, Order] = {}
        repeated: set[int] = set()  # they were answered with "resend": whatever else is said to them is too late
        waiting = {order.number for order in orders.values()}
        deadline = self.setup.recipe.engine.deadline
        for order, answer in self._exchange(orders, deadline):
            fresh = order.number in waiting
            waiting.discard(order.number)
            if fresh and answer.status == "resend":
                again[order.client] = self._in_full(orders[order.client])
                repeated.add(order.number)
            elif order.number not in repeated:
                yield order, answer, fresh
        waiting = {order.number for order in again.values()}
        for order, answer in self._exchange(again, deadline):
            if order.number not in repeated:
                yield order, answer, order.number in waiting
                waiting.discard(order.number)

    def _in_full(self, order: Order) -> Order:
        """The same order with all bytes."""
        told = self.told[order.client]
        return self._remember(order.model_copy(update={"number": next(self.numbers), **told}))

    def _exchange(self, orders: Mapping[str, Order], deadline: float) -> Iterator[tuple[Order, Answer]]:
        """What members say, each beside the order it answers, until all of these orders are answered."""
        open_ = {order.number for order in orders.values()}
        if not open_:
            return
        for delivery in self.carrier.exchange(orders, deadline):
            try:
                order, answer = self._recognised(delivery)
            except FolkLoraError as error:
                log.warning("member %s: %s", delivery.client, error)
                current = orders.get(delivery.client)
                if current is None or current.number not in open_:
                    continue
                order, answer = current, Answer.to(current, "failed", str(error))
            open_.discard(order.number)
            self._note(order, answer)
            if order.kind == "hello":
                self._met(answer)
            else:
                yield order, answer
            if not open_:
                return

    def _recognised(self, delivery: Delivery) -> tuple[Order, Answer]:
        """An answer and the order it answers.

        Raises
        ------
        FolkLoraError
            If it is no answer, or not the sender's to give.
        """
        if delivery.record is None:
            raise MessageError(f"no answer: {delivery.failure}")
        answer = Answer.of(delivery.record)
        order = self.sent.get(answer.number)
        if order is None:
            raise MessageError("an answer to an order that nobody gave")
        told = (answer.run, answer.round, answer.client, answer.client)
        if told != (order.run, order.round, order.client, delivery.client):
            raise MessageError(f"an answer for {answer.client} in round {answer.round} to an order that was another's")
        return order, answer

    def _note(self, order: Order, answer: Answer) -> None:
        """What an answer tells of its sender's folder."""
        client = order.client
        works = order.kind == "train" or (order.kind == "sketch" and not order.round)
        if answer.status == "done" and works:  # then it sweeps what nobody means
            self.has[client] &= set(order.hold)
        elif answer.status == "resend":
            self.has[client] -= {order.welcome, order.reply}
        elif answer.status == "lost":
            self.greeted.discard(client)
            self.has[client] = set()
            if self.notes[client].version <= 0:
                self.afresh.add(client)
                self.notes[client] = Note()
