"""Token sequences of many clients laid out as rows of one batch.

Both layouts are one data structure, so nothing downstream knows which is in use. *Packed*: several short sequences
share a row, each with its own positions and attending only to itself, and almost no token is padding. *Padded*: one
sequence a row. In both, a client's tokens are consecutive in the flattened batch; a packed row may end one client's
and begin the next one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Batch:
    """Sequences of K clients.

    Attributes
    ----------
    tokens, positions, segments
        [rows, L] int64: token id; position in its sequence; number of its sequence in this batch (-1 where padded).
    token_offsets, sequence_offsets
        K + 1 numbers each: client k owns rows ``token_offsets[k]:token_offsets[k + 1]`` of the flattened [rows * L]
        tokens (padding among them), and sequences likewise.
    first, last
        [S]: where each sequence's first and last token lie in the flattened [rows * L] tokens.
    packed
        Whether rows hold several sequences.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    token_offsets: tuple[int, ...]
    sequence_offsets: tuple[int, ...]
    first: Tensor
    last: Tensor
    packed: bool

    @property
    def clients(self) -> int:
        return len(self.token_offsets) - 1

    @property
    def sequences(self) -> int:
        return self.sequence_offsets[-1]

    @property
    def row_length(self) -> int:
        return self.tokens.shape[1]

    def token_clients(self) -> Tensor:
        """[rows * L]: the client of each token."""
        return _owners(self.token_offsets).to(self.tokens.device)

    def sequence_clients(self) -> Tensor:
        """[S]: the client of each sequence."""
        return _owners(self.sequence_offsets).to(self.tokens.device)

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "positions", "segments", "first", "last")
        }
        return Batch(
            **moved, token_offsets=self.token_offsets, sequence_offsets=self.sequence_offsets, packed=self.packed
        )


def _owners(offsets: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), torch.tensor(offsets).diff())


def repeat(batch: Batch, clients: int) -> Batch:
    """The batch of one client once for each of K clients, in rows of their own."""
    rows, length = batch.tokens.shape
    numbers = torch.arange(clients)
    segments = torch.where(
        batch.segments >= 0, batch.segments + batch.sequences * numbers[:, None, None], batch.segments
    )
    shift = rows * length * numbers[:, None]
    return Batch(
        tokens=batch.tokens.repeat(clients, 1),
        positions=batch.positions.repeat(clients, 1),
        segments=segments.view(-1, length),
        token_offsets=tuple(rows * length * k for k in range(clients + 1)),
        sequence_offsets=tuple(batch.sequences * k for k in range(clients + 1)),
        first=(batch.first + shift).view(-1),
        last=(batch.last + shift).view(-1),
        packed=batch.packed,
    )


ATTENTION = 512
"""The row length at which attention costs as much as all else: measured on MiniLM, and no result depends on it."""

Rows = list[list[tuple[int, int]]]
"""Which sequences each row holds, in their order: (client, number of the client's sequence)."""


def pad(groups: Sequence[Sequence[TokenIds]], pad_token: int) -> Batch:
    """One sequence a row, as long as the longest; ``groups[k]`` are client k's sequences."""
    length = max(len(sequence) for group in groups for sequence in group)
    rows = [[(k, i)] for k, group in enumerate(groups) for i in range(len(group))]
    return _lay_out(groups, rows, length, pad_token, packed=False)


def pack(groups: Sequence[Sequence[TokenIds]], pad_token: int, *, mixed: bool = True, limit: int = 128) -> Batch:
    """Several sequences a row, clients one behind the other, with the row length that costs least.

    Parameters
    ----------
    mixed
        Whether a row may hold several clients' sequences. A sequence gives the others of its row a weight of zero in
        attention, and zero times infinity is not zero: only rows of one client keep what is not finite to itself.
    limit
        Tokens of a row, unless a single sequence is longer.
    """
    lengths = [[len(sequence) for sequence in group] for group in groups]
    longest = max(max(group) for group in lengths if group)
    # A token costs the same in every linear layer and more in attention the longer its row is.
    candidates = range(longest, max(longest, limit) + 1, max(8, longest // 8))
    plans = {length: _fit(lengths, length, mixed) for length in candidates}
    best = min(candidates, key=lambda length: (len(plans[length]) * length * (1 + length / ATTENTION), length))
    return _lay_out(groups, plans[best], best, pad_token, packed=True)


def _fit(lengths: Sequence[Sequence[int]], row_length: int, mixed: bool) -> Rows:
    """Rows that no sequence overflows. Each client first fills what the one before it left of its last row, then fresh
    rows by first-fit decreasing, the emptiest of them last: that one is left to the next client."""
    rows: Rows = []
    room = 0  # in the last row
    for k, group in enumerate(lengths):
        waiting = sorted(range(len(group)), key=lambda i: -group[i])
        for i in list(waiting):
            if mixed and group[i] <= room:
                rows[-1].append((k, i))
                room -= group[i]
                waiting.remove(i)
        if not waiting:
            continue
        fresh: Rows = []
        free: list[int] = []
        for i in waiting:
            row = next((row for row, left in enumerate(free) if group[i] <= left), len(fresh))
            if row == len(fresh):
                fresh.append([])
                free.append(row_length)
            fresh[row].append((k, i))
            free[row] -= group[i]
        order = sorted(range(len(fresh)), key=lambda row: free[row])
        rows += [fresh[row] for row in order]
        room = free[order[-1]]
    return rows


def _lay_out(groups: Sequence[Sequence[TokenIds]], rows: Rows, length: int, pad_token: int, packed: bool) -> Batch:
    tokens = np.full((len(rows), length), pad_token, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    segments = np.full((len(rows), length), -1, dtype=np.int64)
    sequence_offsets = [0, *np.cumsum([len(group) for group in groups]).tolist()]
    first, last = (np.zeros(sequence_offsets[-1], dtype=np.int64) for _ in range(2))
    starts: dict[int, int] = {}  # client -> its first token
    for row, members in enumerate(rows):
        start = 0
        for k, i in members:
            sequence = groups[k][i]
            stop = start + len(sequence)
            number = sequence_offsets[k] + i
            tokens[row, start:stop] = sequence
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = number
            first[number], last[number] = row * length + start, row * length + stop - 1
            starts.setdefault(k, row * length + start)
            start = stop
    # What pads a row belongs to whoever comes before it, and a client without sequences owns nothing.
    token_offsets = [tokens.size]
    for k in reversed(range(len(groups))):
        token_offsets.append(starts.get(k, token_offsets[-1]))
    token_offsets[-1] = 0
    arrays = (torch.from_numpy(array) for array in (tokens, positions, segments, first, last))
    tokens_, positions_, segments_, first_, last_ = arrays
    return Batch(
        tokens_,
        positions_,
        segments_,
        tuple(reversed(token_offsets)),
        tuple(sequence_offsets),
        first_,
        last_,
        packed=packed,
    )
