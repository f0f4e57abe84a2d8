"""What secure aggregation writes and reads, and the session that it all belongs to; nothing here needs a library.

Little-endian; every part starts with round: u32 | session: 16 bytes, and has exactly the length that follows from its
count.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from folklora.errors import MessageError

SESSION = 16
KEY, POINT, MARK = 32, 16, 16
SEALED = 2 * POINT + 16
"""Bytes of two points and the seal on them."""
HEAD = struct.Struct(f"<I{SESSION}s")
KEYS = struct.Struct(f"<{KEY}s{KEY}s{MARK}sI")
"""Step 1: the key to be written to with, the mask key, the mark of the own mask, the weight."""
ENTRY = struct.Struct(f"<I{KEY}s{KEY}s")
"""Of a roll: a member's index and both keys."""
SENT = struct.Struct(f"<{MARK}s{MARK}s{SEALED}s")
"""Step 2, of each member of the roll: the marks of its two points, and both sealed."""
ASKED = struct.Struct(f"<IB{KEY}s{SEALED}s")
"""Step 4, of each other partner: its index, whether it survived, its key, and what it sealed."""


@dataclass(frozen=True)
class Session:
    """One attempt at a round: its number, 16 bytes that no other attempt has, how many open its sum, and how many take
    part in it at most."""

    round: int
    id: bytes
    threshold: int
    most: int

    @property
    def head(self) -> bytes:
        return HEAD.pack(self.round, self.id)

    @classmethod
    def of(cls, round: int, data: bytes, threshold: int, most: int) -> Session:
        """The session that a part belongs to, as a member reads it.

        Raises
        ------
        MessageError
            If it is of another round.
        """
        if len(data) < HEAD.size:
            raise MessageError(f"a part of {len(data)} bytes; allowed: {HEAD.size} or more")
        of, id = HEAD.unpack_from(data)
        if of != round:
            raise MessageError(f"a part of round {of} in round {round}; allowed: this round's")
        return cls(round, id, threshold, most)

    def body(self, data: bytes) -> memoryview:
        """What stands behind the head, if it is this session's.

        Raises
        ------
        MessageError
            Otherwise.
        """
        if data[: HEAD.size] != self.head:
            raise MessageError("it is of another round or another attempt at it; allowed: what was asked for")
        return memoryview(data)[HEAD.size :]


def entries_of(layout: struct.Struct, data: memoryview, what: str) -> list[tuple[Any, ...]]:
    """Entries behind their count, each led by an index, which must rise."""
    count = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    if not count or len(data) != 4 + count * layout.size:
        raise MessageError(f"{what} of {len(data)} bytes for {count} members; allowed: as many as they take")
    found = list(layout.iter_unpack(data[4:]))
    if any(after[0] <= before[0] for before, after in itertools.pairwise(found)):
        raise MessageError(f"{what} names members twice or out of order; allowed: in their order")
    return found


def listed(layout: struct.Struct, entries: Iterable[tuple[Any, ...]]) -> bytes:
    packed = [layout.pack(*entry) for entry in entries]
    return struct.pack("<I", len(packed)) + b"".join(packed)


def split(session: Session, attached: bytes) -> tuple[bytes, bytes]:
    """What goes along with the training: the roll, and for each of its entries whether it is a partner."""
    body = session.body(attached)
    count = struct.unpack_from("<I", body)[0] if len(body) >= 4 else 0
    if len(body) != 4 + count * (ENTRY.size + 1):
        raise MessageError(
            f"a list of partners of {len(body)} bytes for {count} members; allowed: as many as they take"
        )
    return attached[: len(attached) - count], attached[len(attached) - count :]
