"""Token sequences of many clients laid out as rows of one batch.

Both layouts are one data structure, so nothing downstream knows which is in use. *Packed*: several short sequences
share a row, each with its own positions and attending only to itself, and almost no token is padding. *Padded*: one
sequence a row. A row never mixes clients, and rows are ordered by client, so a client's tokens are consecutive.
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
    row_offsets, sequence_offsets
        K + 1 numbers each: client k owns rows ``row_offsets[k]:row_offsets[k + 1]``, and sequences likewise.
    first, last
        [S]: where each sequence's first and last token lie in the flattened [rows * L] tokens.
    packed
        Whether rows hold several sequences.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    row_offsets: tuple[int, ...]
    sequence_offsets: tuple[int, ...]
    first: Tensor
    last: Tensor
    packed: bool

    @property
    def clients(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def sequences(self) -> int:
        return self.sequence_offsets[-1]

    @property
    def row_length(self) -> int:
        return self.tokens.shape[1]

    @property
    def token_offsets(self) -> tuple[int, ...]:
        """Rows of the flattened [rows * L] tokens that each client owns."""
        return tuple(offset * self.row_length for offset in self.row_offsets)

    def row_clients(self) -> Tensor:
        """[rows]: the client of each row."""
        return _owners(self.row_offsets).to(self.tokens.device)

    def sequence_clients(self) -> Tensor:
        """[S]: the client of each sequence."""
        return _owners(self.sequence_offsets).to(self.tokens.device)

    def to(self, device: torch.device) -> Batch:
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "positions", "segments", "first", "last")}
        return Batch(**moved, row_offsets=self.row_offsets, sequence_offsets=self.sequence_offsets, packed=self.packed)


def _owners(offsets: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), torch.tensor(offsets).diff())


def pad(groups: Sequence[Sequence[TokenIds]], pad_token: int) -> Batch:
    """One sequence a row, as long as the longest; ``groups[k]`` are client k's sequences."""
    length = max(len(sequence) for group in groups for sequence in group)
    rows = [[[i] for i in range(len(group))] for group in groups]
    return _lay_out(groups, rows, length, pad_token, packed=False)


def pack(groups: Sequence[Sequence[TokenIds]], pad_token: int) -> Batch:
    """Several sequences a row, by first-fit decreasing, with the row length that wastes the fewest tokens."""
    lengths = [[len(sequence) for sequence in group] for group in groups]
    longest = max(max(group) for group in lengths)
    # Attention costs grow with the row, so rows stay short: candidates up to the longest text or ~128 tokens.
    candidates = range(longest, max(longest, 128) + 1, max(8, longest // 8))
    plans = {length: [_first_fit(group, length) for group in lengths] for length in candidates}
    best = min(candidates, key=lambda length: (sum(map(len, plans[length])) * length, length))
    return _lay_out(groups, plans[best], best, pad_token, packed=True)


def _first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Bins of sequence numbers whose lengths fit the row; longest first."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, room in enumerate(free):
            if lengths[i] <= room:
                rows[row].append(i)
                free[row] -= lengths[i]
                break
        else:
            rows.append([i])
            free.append(row_length - lengths[i])
    return rows


def _lay_out(
    groups: Sequence[Sequence[TokenIds]], rows: Sequence[list[list[int]]], length: int, pad_token: int, packed: bool
) -> Batch:
    total = sum(len(group) for group in rows)
    tokens = np.full((total, length), pad_token, dtype=np.int64)
    positions = np.zeros((total, length), dtype=np.int64)
    segments = np.full((total, length), -1, dtype=np.int64)
    sequences = sum(len(group) for group in groups)
    first, last = np.zeros(sequences, dtype=np.int64), np.zeros(sequences, dtype=np.int64)
    row = base = 0
    row_offsets, sequence_offsets = [0], [0]
    for group, bins in zip(groups, rows, strict=True):
        for members in bins:
            start = 0
            for i in members:
                stop = start + len(group[i])
                tokens[row, start:stop] = group[i]
                positions[row, start:stop] = np.arange(stop - start)
                segments[row, start:stop] = base + i
                first[base + i], last[base + i] = row * length + start, row * length + stop - 1
                start = stop
            row += 1
        base += len(group)
        row_offsets.append(row)
        sequence_offsets.append(base)
    arrays = (torch.from_numpy(array) for array in (tokens, positions, segments, first, last))
    tokens_, positions_, segments_, first_, last_ = arrays
    return Batch(
        tokens_, positions_, segments_, tuple(row_offsets), tuple(sequence_offsets), first_, last_, packed=packed
    )
