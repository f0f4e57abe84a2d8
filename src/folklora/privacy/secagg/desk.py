"""The server in one session of secure aggregation; the protocol is told in `folklora.privacy.secagg`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from folklora.errors import MessageError
from folklora.privacy.secagg.pieces import (
    MASKS,
    OWN,
    PRIME,
    Words,
    agreed,
    at_zero,
    keystream,
    mark,
    mask_key,
    number,
    own_mark,
    own_mask,
    pair_mask,
    told,
)
from folklora.privacy.secagg.wire import ASKED, ENTRY, KEYS, POINT, SENT, Session, listed


class Keys(NamedTuple):
    """What a member said in step 1."""

    channel: bytes
    mask: bytes
    own_mark: bytes
    weight: int


@dataclass
class Desk:
    """The server in one session: what it was told, and what it may say next.

    What a member sends that cannot be raises `MessageError`, and is as if it had sent nothing. ``names`` are how errors
    call the members, by their index.
    """

    session: Session
    names: Sequence[str] = ()
    keys: dict[int, Keys] = field(default_factory=dict)
    sent: dict[int, dict[int, tuple[bytes, bytes, bytes]]] = field(default_factory=dict)
    points: dict[int, dict[int, bytes]] = field(default_factory=dict)
    survivors: list[int] = field(default_factory=list)

    def invitation(self) -> bytes:
        """Step 1's question, the same for all."""
        return self.session.head

    def joined(self, index: int, data: bytes) -> None:
        """Take a member's keys."""
        body = self.session.body(data)
        if len(body) != KEYS.size:
            raise MessageError(f"keys of {len(body)} bytes; allowed: {KEYS.size}")
        keys = Keys(*KEYS.unpack(body))
        for public in (keys.channel, keys.mask):
            agreed(X25519PrivateKey.generate(), public)
        most = (2**32 - 1) // self.session.most
        if not 1 <= keys.weight <= most:
            raise MessageError(f"a weight of {keys.weight}; allowed: 1 to {most}, so that a round's sum fits")
        self.keys[index] = keys

    def roll(self) -> bytes:
        """Step 2's question, the same for all."""
        entries = ((index, self.keys[index].channel, self.keys[index].mask) for index in sorted(self.keys))
        return self.session.head + listed(ENTRY, entries)

    def shared(self, index: int, data: bytes) -> None:
        """Take what a member dealt; nobody joins from here on."""
        body, holders = self.session.body(data), sorted(self.keys)
        if len(body) != len(holders) * SENT.size:
            raise MessageError(f"points of {len(body)} bytes; allowed: {len(holders) * SENT.size}")
        self.sent[index] = dict(zip(holders, SENT.iter_unpack(body), strict=True))

    @property
    def partners(self) -> list[int]:
        """Those whose points arrived: with them uploads are masked."""
        return sorted(self.sent)

    def attachment(self) -> bytes:
        """What goes along with the training, the same for all."""
        return self.roll() + bytes(index in self.sent for index in sorted(self.keys))

    def question(self, holder: int) -> bytes:
        """Step 4's question to one of ``survivors``."""
        asked = (
            (owner, owner in self.survivors, self.keys[owner].channel, self.sent[owner][holder][2])
            for owner in self.partners
            if owner != holder
        )
        return self.session.head + hashlib.sha256(self.roll()).digest() + listed(ASKED, asked)

    def opened(self, holder: int, data: bytes) -> None:
        """Take one survivor's points; all of them that are what their makers told the server they are.

        Raises
        ------
        MessageError
            Naming how many are not; those that are count all the same.
        """
        body = self.session.body(data)
        if len(body) != len(self.partners) * POINT:
            raise MessageError(f"points of {len(body)} bytes; allowed: {len(self.partners) * POINT}")
        wrong = []
        for i, owner in enumerate(self.partners):
            share = bytes(body[i * POINT : (i + 1) * POINT])
            which = OWN if owner in self.survivors else MASKS
            if mark(self.session, which, owner, holder, share) == self.sent[owner][holder][which]:
                self.points.setdefault(owner, {})[holder] = share
            else:
                wrong.append(owner)
        if wrong:
            whose = ", ".join(map(self._name, wrong[:5]))
            raise MessageError(
                f"its points of {whose} ({len(wrong)} of {len(self.partners)}) are not those that were dealt"
            )

    def masks(self, count: int, terms: bytes = b"") -> Words:
        """What is to be taken off the sum of the survivors' masked vectors; ``terms`` as of `Party.mask`.

        Raises
        ------
        MessageError
            If points of some member are too few, or are not of the secret that it began with.
        """
        total, alike = np.zeros(count, dtype=np.uint32), told(self.attachment(), terms)
        weights: dict[tuple[int, ...], list[int]] = {}
        for owner in self.partners:
            secret = self._secret(owner, weights)
            if owner in self.survivors:
                if own_mark(self.session, secret) != self.keys[owner].own_mark:
                    raise MessageError(f"member {self._name(owner)} dealt points of another mask than its own")
                total += keystream(own_mask(self.session, secret), count)
                continue
            key = mask_key(self.session, secret)
            if key.public_key().public_bytes_raw() != self.keys[owner].mask:
                raise MessageError(f"member {self._name(owner)} dealt points of another key than its own")
            for other in self.survivors:
                stream = keystream(pair_mask(self.session, key, self.keys[other].mask, owner, other, alike), count)
                (np.add if other < owner else np.subtract)(total, stream, out=total)
        return total

    def _secret(self, owner: int, weights: dict[tuple[int, ...], list[int]]) -> int:
        points = self.points.get(owner, {})
        if len(points) < self.session.threshold:
            raise MessageError(
                f"{len(points)} members gave points of {self._name(owner)}'s, {self.session.threshold} are needed"
            )
        holders = tuple(sorted(points)[: self.session.threshold])
        if holders not in weights:
            weights[holders] = at_zero(holders)
        return sum(w * number(points[h]) for w, h in zip(weights[holders], holders, strict=True)) % PRIME

    def _name(self, index: int) -> str:
        return self.names[index] if self.names else str(index)
