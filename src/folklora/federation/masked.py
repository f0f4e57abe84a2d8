"""Uploads that the server can only add up: both ends of ``secure.kind = "masks"``, over `folklora.privacy.secagg`.

An upload is the vector of all its tensors, in the order of their names, as `folklora.privacy.fixedpoint` makes whole
numbers of it, its weight behind it, under masks::

    "FLM1" | crc32 of all that follows: u32 | round: u32 | session: 16 bytes | layout: 12 bytes | words: u32 each

The layout is SHA-256 of names and shapes, cut off. ``message.dtype`` is for downloads alone. The weight is the number
of examples (`Outlet.weight`), or 1 where clients are the unit of differential privacy; the server knows it anyway, and
in the sum it proves that what is left has no mask on it.

*Whose keys.* Members know each other by what the server tells them. Each finds its own keys on the roll, or refuses it,
takes no other roll in that session, and logs its fingerprint: where all members' logs have the same, nobody's keys were
exchanged for others. Members that have a common key (``folklora join --key``) need not compare: points are sealed with
it and with the roll, so of an upload that was masked with exchanged keys nobody ever opens the own mask.

*Asked twice.* A round is played again when the server was killed, and then perhaps with other members. Each attempt has
a session of its own, hence other keys and masks. But who trains from the same state on the same data sends the same
vector, and the difference of two sums of one round may be one member's vector. So a member opens one set of survivors
in a round and no other, whoever asks, and masks one vector in a session, for one list of partners; all this is noted
before the answer leaves (`Outlet.noted`; in a member's folder, ``noted.json``), and stay noted when a server steps
back. A round that was opened, but not committed, can be completed by the same survivors only. A member that refuses its
points has still taken part: its upload is in the sum.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from folklora.adapters.lowrank import Shapes, Tensors
from folklora.errors import MessageError, RunError
from folklora.federation.engine import Engine
from folklora.federation.intake import Intake
from folklora.federation.ledger import Ledger
from folklora.federation.outlet import Outlet
from folklora.federation.secrecy import parties, refuse_cut_noise, threshold
from folklora.federation.setup import Setup
from folklora.methods.base import Method
from folklora.methods.contract import Client, Message, State
from folklora.privacy.fixedpoint import Floats, Grid, Words
from folklora.privacy.secagg.desk import Desk
from folklora.privacy.secagg.party import Party
from folklora.privacy.secagg.wire import Session, split
from folklora.recipe import Recipe

log = logging.getLogger(__name__)

KEYS, SHARES, OPEN = "masks_keys", "masks_shares", "masks_open"
"""Topics of the exchange, in their order."""
MAGIC = b"FLM1"
WEIGHT = struct.Struct("<I")
"""In front of what is attached: the round's largest weight."""


class MaskedOutlet(Outlet):
    """A member's end; ``common`` is what the members know and the server does not, if there is such a thing."""

    def __init__(self, recipe: Recipe, method: Method, client: Client, common: bytes = b"") -> None:
        super().__init__(recipe, method, client)
        self.common = common
        clients = method.context.clients
        self.index, self.size = clients.index(client.id), len(clients)
        self.parties, self.threshold = parties(recipe, self.size), threshold(recipe, self.size)

    def talk(self, round: int, topic: str, data: bytes) -> bytes:
        session = Session.of(round, data, self.threshold, self.parties)
        party = self._party(session)
        if topic == KEYS:
            session.body(data)
            return party.keys(self.weight)
        if topic == SHARES:
            answer = party.shares(data)
            log.info("round %d: fingerprint of all members' keys: %s", round, self._roll(session, data)[:32])
            return answer
        if topic != OPEN:
            return super().talk(round, topic, data)
        question = party.question(data)
        # Never noted here and now: what was sealed for other keys than this member has seen is not for it to open.
        if self.noted.setdefault(_seen(session), "") != question.roll.hex():
            raise MessageError("a question about other keys than this member was shown; allowed: about those")
        if self.noted.setdefault(f"opened {round}", question.whom) != question.whom:
            raise MessageError(f"round {round} has been opened for other members; allowed: the same again")
        log.info("round %d: helps to open the sum of %d members", round, len(question.survivors))
        answer = party.open(question)
        if party.unreadable:
            log.warning("round %d: what %d members sealed for this one cannot be opened", round, len(party.unreadable))
        return answer

    def encode(self, round: int, message: Message) -> bytes:
        if self.attached is None:
            raise MessageError("no partners came along to mask with")
        if self.recipe.privacy.unit == "client":
            refuse_cut_noise(self.recipe, self.method, self.uplink.reference(round, message))
        message = self.protect(round, message)
        (most,) = WEIGHT.unpack_from(self.attached) if len(self.attached) >= WEIGHT.size else (0,)
        attached = self.attached[WEIGHT.size :]
        session = Session.of(round, attached, self.threshold, self.parties)
        weight = int(message.numbers["examples"])
        if weight != self.weight or weight > most:
            raise MessageError(f"a weight of {weight} where the round's largest is {most}")
        words, clipped = Grid(self.recipe.secure.range, self.parties, most).words(flat(message.tensors), weight)
        if clipped:
            log.warning(
                "round %d: %d of %d numbers beyond secure.range = %g were clipped",
                round, clipped, len(words) - 1, self.recipe.secure.range,
            )  # fmt: skip
        self._roll(session, split(session, attached)[0])
        # The same words under the masks of other partners would tell these masks, and with enough of them the words.
        digest = hashlib.sha256(self.attached + words.tobytes()).hexdigest()
        if self.noted.setdefault(f"masked {session.id.hex()}", digest) != digest:
            raise MessageError("this session has masked another upload; allowed: the same again, or another session")
        shapes = {name: tuple(tensor.shape) for name, tensor in message.tensors.items()}
        alike = terms(self.recipe, self.parties, most)
        return sealed(session, shapes, self._party(session).mask(words, attached, alike))

    def _party(self, session: Session) -> Party:
        return Party(self.client.secret, self.index, self.size, session, self.common)

    def _roll(self, session: Session, roll: bytes) -> str:
        """The fingerprint of a session's one roll."""
        digest = hashlib.sha256(roll).hexdigest()
        if self.noted.setdefault(_seen(session), digest) != digest:
            raise MessageError(
                "this session has other keys of its members; allowed: the same again, or another session"
            )
        return digest


class MaskedIntake(Intake):
    """The server's end. What a client's words are is known to nobody; the method is given their mean alone."""

    def __init__(self, setup: Setup, engine: Engine) -> None:
        super().__init__(setup, engine)
        clients = self.method.context.clients
        self.index = {client: i for i, client in enumerate(clients)}
        self.parties, self.threshold = (f(self.recipe, len(clients)) for f in (parties, threshold))
        self.least = self.threshold
        if self.threshold > self.recipe.engine.min_clients:
            self.needs = "secure.threshold"
        self.desk: Desk | None = None
        self.most = 0

    def prepare(self, round: int, clients: Sequence[str], ledger: Ledger) -> dict[str, str]:
        session = Session(round, secrets.token_bytes(16), self.threshold, self.parties)
        self.desk = desk = Desk(session, self.method.context.clients)
        failed: dict[str, str] = {}
        with ledger.timed("keys"):
            for topic, made, take in ((KEYS, desk.invitation, desk.joined), (SHARES, desk.roll, desk.shared)):
                part = made()
                asked = [client for client in clients if client not in failed]
                failed |= self._exchange(round, topic, dict.fromkeys(asked, part), take, ledger)
                self._enough(round, len(clients) - len(failed), "clients exchanged keys")
            self.most = max(desk.keys[index].weight for index in desk.partners)
            attached = WEIGHT.pack(self.most) + desk.attachment()
            for client in clients:
                if client not in failed:
                    self.engine.attach(client, attached)
                    ledger.down[client] += len(attached)
        return failed

    def read(self, round: int, state: State, client: str, data: bytes | None, said: Iterable[Message | None]) -> Any:
        if data is None:
            raise MessageError("it sent nothing; allowed: what the method asks for")
        return opened(self._desk().session, self.method.expected(round, state, client), data)

    def server(self, round: int, state: State, uploads: Mapping[str, Any], ledger: Ledger) -> State:
        first = next(iter(uploads))
        shapes = self.method.expected(round, state, first)
        mean, weight = self._opened(round, uploads, ledger)
        message = Message(unflat(mean, shapes), {"examples": float(weight)})
        self.method.check_update(round, state, first, message)
        after = super().server(round, state, {first: message}, ledger)
        # Pictures of who is mixed with whom would show this one client.
        return {name: tensor for name, tensor in after.items() if name not in self.method.insight(after)}

    def messages(self, uploads: Mapping[str, Any]) -> Mapping[str, Message] | None:
        return None

    def _opened(self, round: int, uploads: Mapping[str, Words], ledger: Ledger) -> tuple[Floats, int]:
        """The uploads' weighted mean, and the sum of their weights."""
        desk = self._desk()
        self._enough(round, len(uploads), "clients' uploads arrived")
        desk.survivors = sorted(self.index[client] for client in uploads)
        parts = {client: desk.question(self.index[client]) for client in uploads}
        for client, reason in self._exchange(round, OPEN, parts, desk.opened, ledger).items():
            log.warning("round %d: client %s did not help to open the sum: %s", round, client, reason)
        total = np.zeros_like(next(iter(uploads.values())))
        for words in uploads.values():
            total += words
        weights = sum(desk.keys[index].weight for index in desk.survivors)
        try:
            total -= desk.masks(len(total), terms(self.recipe, self.parties, self.most))
            if total[-1] != weights:
                raise MessageError(f"the weights in it sum to {total[-1]}, not {weights}")
        except MessageError as error:
            raise self._lost(round, f"the sum of {len(uploads)} uploads could not be opened ({error})") from None
        return Grid(self.recipe.secure.range, self.parties, self.most).mean(total)

    def _exchange(
        self, round: int, topic: str, parts: Mapping[str, bytes], take: Callable[[int, bytes], None], ledger: Ledger
    ) -> dict[str, str]:
        """Ask, and take what comes; who said nothing of use, and why."""
        failed = dict.fromkeys(parts, f"it did not answer ({topic})")
        heard: set[str] = set()
        for client, part in parts.items():
            ledger.down[client] += len(part)
        for client, data in self.engine.talk(round, topic, parts):
            ledger.up[client] += len(data)
            if client in heard or client not in parts:
                ledger.ignored["duplicate" if client in heard else "unasked"] += 1
                continue
            heard.add(client)
            try:
                take(self.index[client], data)
                del failed[client]
            except MessageError as error:
                failed[client] = f"{topic}: {error}"
        return failed

    def _enough(self, round: int, found: int, what: str) -> None:
        if found < self.threshold:
            raise self._lost(round, f"{found} {what}, {self.threshold} are needed to open their sum (secure.threshold)")

    def _lost(self, round: int, why: str) -> RunError:
        return RunError(f"round {round}: {why}; nothing of this round is kept; the run can be resumed")

    def _desk(self) -> Desk:
        assert self.desk is not None, "prepare() comes before all else"
        return self.desk


def _seen(session: Session) -> str:
    return f"keys {session.id.hex()}"


TERMS = {"seed", "train", "method", "adapter", "message", "privacy", "secure", "depth", "audit"}


def terms(recipe: Recipe, parties: int, most: int) -> bytes:
    """What an upload follows from beside data and model, digested.

    It goes into the masks: those of members that a server told different things do not cancel. Otherwise it could have
    all but one member send next to nothing (by a larger range, a smaller ``train.lr``), and read that one in the sum.
    """
    told = recipe.model_dump_json(include=TERMS, exclude_defaults=True)
    return hashlib.sha256(f"{parties} {most} {told}".encode()).digest()


# -- an upload's bytes -------------------------------------------------------------------------------------------------


def flat(tensors: Tensors) -> Floats:
    """All numbers, in the order of the tensors' names.

    Raises
    ------
    MessageError
        For NaN or Inf.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise MessageError(f"tensor {name!r} holds NaN or Inf")
    parts = [tensors[name].detach().cpu().double().flatten().numpy() for name in sorted(tensors)]
    return np.concatenate(parts)


def unflat(values: Floats, shapes: Shapes) -> Tensors:
    """The tensors of these shapes, float32."""
    tensors: Tensors = {}
    at = 0
    for name in sorted(shapes):
        count = math.prod(shapes[name])
        tensors[name] = torch.from_numpy(values[at : at + count].astype(np.float32)).view(shapes[name])
        at += count
    return {name: tensors[name] for name in shapes}


def sealed(session: Session, shapes: Shapes, words: Words) -> bytes:
    """A masked upload as bytes."""
    rest = session.head + layout(shapes) + words.astype("<u4", copy=False).tobytes()
    return MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def opened(session: Session, shapes: Shapes, data: bytes) -> Words:
    """The words of a masked upload.

    Raises
    ------
    MessageError
        If it is damaged, of another session, or of other tensors.
    """
    start = 8 + len(session.head) + len(layout({}))
    wanted = start + 4 * (1 + sum(map(math.prod, shapes.values())))
    if len(data) != wanted or data[:4] != MAGIC:
        raise MessageError(f"a masked upload of {len(data)} bytes; allowed: FLM1, {wanted} bytes")
    if zlib.crc32(memoryview(data)[8:]) != struct.unpack_from("<I", data, 4)[0]:
        raise MessageError("a masked upload is damaged: its checksum does not match")
    if session.body(data[8:])[: len(layout({}))] != layout(shapes):
        raise MessageError("a masked upload of other tensors; allowed: what the method asks for")
    return np.frombuffer(data, dtype="<u4", offset=start).astype(np.uint32, copy=False)


def layout(shapes: Shapes) -> bytes:
    """What an upload's words mean: names and shapes, told apart."""
    told = repr([(name, tuple(shapes[name])) for name in sorted(shapes)])
    return hashlib.sha256(told.encode()).digest()[:12]
