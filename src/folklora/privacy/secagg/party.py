"""A member in one session of secure aggregation; the protocol is told in `folklora.privacy.secagg`."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from folklora.errors import MessageError
from folklora.privacy.secagg.pieces import (
    MASKS,
    OWN,
    Words,
    agreed,
    derive_key,
    keystream,
    mark,
    mask_key,
    number,
    own_mark,
    own_mask,
    pair_mask,
    point,
    polynomial,
    told,
)
from folklora.privacy.secagg.wire import ASKED, ENTRY, KEYS, POINT, SEALED, SENT, Session, entries_of, split


class Question(NamedTuple):
    """Step 4 as a member is asked it: the roll's SHA-256, the other partners, and who survived, itself included."""

    roll: bytes
    others: list[tuple[int, bool, bytes, bytes]]
    survivors: list[int]

    @property
    def whom(self) -> str:
        """SHA-256 of the survivors."""
        return hashlib.sha256(",".join(map(str, self.survivors)).encode()).hexdigest()


class Party:
    """A member in one session; nothing of it need last, since all follows from its secret.

    Parameters
    ----------
    secret
        Known to nobody else; the same in all rounds.
    index
        The member's place among all members of the federation, from 0.
    size
        How many those are.
    common
        What all members know and the server does not, if there is such a thing: points are sealed with it, too.

    Attributes
    ----------
    unreadable
        Whose points, of the last question, cannot be opened here.
    """

    def __init__(self, secret: int, index: int, size: int, session: Session, common: bytes = b"") -> None:
        self.index, self.size, self.session, self._common = index, size, session, common
        self.unreadable: list[int] = []
        material = secret.to_bytes(max(32, (secret.bit_length() + 7) // 8), "little")
        self._derive = lambda purpose, *more: derive_key(
            material, purpose, session.head, struct.pack("<II", index, session.threshold), *more
        )
        self._channel = X25519PrivateKey.from_private_bytes(self._derive("channel"))
        self._own, self._masks = (number(self._derive(purpose)[:POINT]) for purpose in ("own", "masks"))
        self._mask_key = mask_key(session, self._masks)

    def keys(self, weight: int) -> bytes:
        """Step 1; ``weight`` is the number that the member's vector will be multiplied by, which is no secret."""
        public = [key.public_key().public_bytes_raw() for key in (self._channel, self._mask_key)]
        return self.session.head + KEYS.pack(*public, own_mark(self.session, self._own), weight)

    def shares(self, roll: bytes) -> bytes:
        """Step 2: for each member of the roll, this one included, the marks of its points, and the points sealed.

        Raises
        ------
        MessageError
            If the roll is too short, names nobody that there is, or has other keys for this member.
        """
        keys = self._roll(roll)
        digest = hashlib.sha256(roll).digest()
        own, masks = self._polynomials(digest)
        sent = []
        for holder, (channel, _) in keys.items():
            points = point(own, holder), point(masks, holder)
            marks = [mark(self.session, which, self.index, holder, points[which]) for which in (OWN, MASKS)]
            sealed = bytes(SEALED) if holder == self.index else self._seal(channel, digest, holder, b"".join(points))
            sent.append(SENT.pack(*marks, sealed))
        return self.session.head + b"".join(sent)

    def _roll(self, roll: bytes) -> dict[int, tuple[bytes, bytes]]:
        entries = entries_of(ENTRY, self.session.body(roll), "a roll")
        self._all_known([index for index, *_ in entries], "a roll")
        keys = {index: (channel, mask) for index, channel, mask in entries}
        mine = (self._channel.public_key().public_bytes_raw(), self._mask_key.public_key().public_bytes_raw())
        if keys.get(self.index) != mine:
            raise MessageError("a roll with other keys for this member; allowed: its own")
        return keys

    def mask(self, words: Words, attached: bytes, terms: bytes = b"") -> Words:
        """Step 3, with those whose points arrived.

        Parameters
        ----------
        terms
            What made the words of numbers. Masks cancel among members that have the same, and were told the same.

        Raises
        ------
        MessageError
            If they are too few, or this member is none of them.
        """
        roll, marks = split(self.session, attached)
        partners = {
            index: mask for (index, (_, mask)), there in zip(self._roll(roll).items(), marks, strict=True) if there
        }
        self._all_known(list(partners), "a list of partners")
        alike = told(attached, terms)
        masked = words + keystream(own_mask(self.session, self._own), len(words))
        for other, theirs in partners.items():
            if other != self.index:
                key = pair_mask(self.session, self._mask_key, theirs, self.index, other, alike)
                stream = keystream(key, len(words))
                (np.add if self.index < other else np.subtract)(masked, stream, out=masked)
        return masked

    def open(self, question: Question) -> bytes:
        """Step 4: this member's point of each partner, of the one secret that is to be known; zeros where what it was
        sent is nothing."""
        own, _ = self._polynomials(question.roll)
        points = {self.index: point(own, self.index)}
        self.unreadable = []
        for owner, survived, channel, sealed in question.others:
            points[owner] = self._opened(owner, survived, channel, sealed, question.roll)
        return self.session.head + b"".join(points[owner] for owner in sorted(points))

    def question(self, data: bytes) -> Question:
        """A question of step 4, checked.

        Raises
        ------
        MessageError
            If too few survived, or it names nobody that there is.
        """
        body = self.session.body(data)
        others = [
            (owner, bool(survived), channel, sealed)
            for owner, survived, channel, sealed in entries_of(ASKED, body[32:], "a question")
        ]
        question = Question(bytes(body[:32]), others, [owner for owner, survived, *_ in others if survived])
        if self.index in (owner for owner, *_ in others):
            raise MessageError("a question for this member's own point; allowed: for the others'")
        question.survivors.append(self.index)
        question.survivors.sort()
        self._all_known(question.survivors, "a question")
        self._all_known([self.index, *(owner for owner, *_ in others)], "a question")
        return question

    def _all_known(self, indices: Sequence[int], what: str) -> None:
        if max(indices) >= self.size or self.index not in indices:
            raise MessageError(
                f"{what} with members that there are not, or without this one; allowed: the federation's"
            )
        least, most = self.session.threshold, self.session.most
        if not least <= len(indices) <= most:
            raise MessageError(f"{what} of {len(indices)} members; allowed: {least} to {most} (secure.threshold)")

    def _polynomials(self, roll: bytes) -> tuple[list[int], list[int]]:
        """Another roll, another polynomial: whoever sees points on several learns no more than on one."""
        degree = self.session.threshold - 1
        own, masks = (
            polynomial(secret, degree, self._derive(purpose, roll))
            for secret, purpose in ((self._own, "own polynomial"), (self._masks, "masks polynomial"))
        )
        return own, masks

    def _seal_key(self, channel: bytes, roll: bytes, owner: int, holder: int) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(
            derive_key(
                agreed(self._channel, channel) + self._common,
                "points",
                self.session.head,
                roll,
                struct.pack("<II", owner, holder),
            )
        )

    def _seal(self, channel: bytes, roll: bytes, holder: int, points: bytes) -> bytes:
        # The key is of this roll and direction, and seals nothing else: a fixed nonce is used once.
        return self._seal_key(channel, roll, self.index, holder).encrypt(bytes(12), points, None)

    def _opened(self, owner: int, survived: bool, channel: bytes, sealed: bytes, roll: bytes) -> bytes:
        try:
            points = self._seal_key(channel, roll, owner, self.index).decrypt(bytes(12), sealed, None)
        except (InvalidTag, MessageError):
            self.unreadable.append(owner)
            return bytes(POINT)
        return points[:POINT] if survived else points[POINT:]
