"""Laying out sequences: properties that hold for any clients, and the arithmetic of packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.backbones.batch import Batch, pack, pad, repeat

LAYOUTS = {"pack": pack, "pad": pad}
PAD = -7  # no real token: whatever shows up where a token belongs is a mistake

groups_of_lengths = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=4)


def numbered(lengths: list[list[int]]) -> list[list[list[int]]]:
    """Sequences in which every token of the whole batch is another number."""
    following = iter(range(10**9))
    return [[[next(following) for _ in range(length)] for length in group] for group in lengths]


def tokens_of(batch: Batch, sequence: int) -> list[int]:
    return batch.tokens.reshape(-1)[batch.segments.reshape(-1) == sequence].tolist()


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS.keys())
@settings(max_examples=60, deadline=None)
@given(lengths=groups_of_lengths)
def test_any_layout_keeps_every_sequence_whole(lay_out: Callable[..., Batch], lengths: list[list[int]]) -> None:
    groups = numbered(lengths)
    batch = lay_out(groups, PAD)
    flat = [sequence for group in groups for sequence in group]
    owners = [k for k, group in enumerate(groups) for _ in group]
    segments, positions = batch.segments.reshape(-1), batch.positions.reshape(-1)

    # Every token once, in order, with its own positions; everything else is padding.
    assert batch.clients == len(groups)
    assert batch.sequences == len(flat)
    for i, sequence in enumerate(flat):
        assert tokens_of(batch, i) == sequence
        assert positions[segments == i].tolist() == list(range(len(sequence)))
    assert int((segments >= 0).sum()) == sum(map(len, flat))
    assert set(batch.tokens.reshape(-1)[segments < 0].tolist()) <= {PAD}

    # A sequence lies in one row, in one piece; first and last point at its ends.
    for i, sequence in enumerate(flat):
        places = (segments == i).nonzero().squeeze(1)
        assert len(set((places // batch.row_length).tolist())) == 1
        assert places.tolist() == list(range(int(places[0]), int(places[0]) + len(sequence)))
        assert (int(batch.first[i]), int(batch.last[i])) == (int(places[0]), int(places[-1]))

    # A client's sequences are numbered, and its tokens lie, one behind the other in the order of clients.
    assert batch.sequence_clients().tolist() == owners
    assert len(batch.token_offsets) == len(groups) + 1
    assert list(batch.token_offsets) == sorted(batch.token_offsets)
    assert (batch.token_offsets[0], batch.token_offsets[-1]) == (0, batch.tokens.numel())
    for k, group in enumerate(groups):
        mine = batch.tokens.reshape(-1)[batch.token_offsets[k] : batch.token_offsets[k + 1]].tolist()
        assert sorted(token for sequence in group for token in sequence) == sorted(t for t in mine if t != PAD)
    assert batch.token_clients().tolist() == [
        k for k in range(len(groups)) for _ in range(batch.token_offsets[k + 1] - batch.token_offsets[k])
    ]


@settings(max_examples=60, deadline=None)
@given(lengths=groups_of_lengths)
def test_packing_never_takes_more_room_than_padding(lengths: list[list[int]]) -> None:
    groups = numbered(lengths)
    packed, padded = pack(groups, PAD), pad(groups, PAD)
    assert packed.packed
    assert not padded.packed
    assert packed.tokens.numel() <= padded.tokens.numel()
    assert padded.tokens.shape == (sum(map(len, lengths)), max(map(max, lengths)))
    assert packed.row_length <= max(128, padded.row_length)


def test_packing_fills_rows() -> None:
    """Two hundred texts of 2 to 40 tokens: under 8 % padding where one row a text would waste about half."""
    lengths = torch.randint(2, 41, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = numbered([lengths[:100], lengths[100:]])
    used = sum(lengths)
    assert pack(groups, PAD).tokens.numel() < 1.08 * used
    assert pad(groups, PAD).tokens.numel() > 1.7 * used


def test_long_sequences_are_placed_first() -> None:
    """In the order given, the two short ones would share a row and the long ones have a row each: three rows."""
    batch = pack(numbered([[24, 24, 96, 96]]), PAD)
    assert tuple(batch.tokens.shape) == (2, 120)


def test_a_long_sequence_sets_the_row() -> None:
    batch = pack(numbered([[300, 5, 7], [4]]), PAD)
    assert batch.row_length == 300
    # The second client's text stands where the first one's last row ends.
    assert tuple(batch.tokens.shape) == (2, 300)
    assert batch.token_offsets == (0, 312, 600)


def test_clients_share_rows() -> None:
    """Fifty clients with one short text each: a row a client would be four fifths padding."""
    batch = pack(numbered([[8]] * 49 + [[40]]), PAD)
    assert batch.tokens.numel() < 1.1 * (49 * 8 + 40)
    assert batch.row_length < 128


def test_clients_do_not_share_rows_where_they_must_not() -> None:
    batch = pack(numbered([[8, 9]] * 5), PAD, mixed=False)
    owners = [{int(batch.sequence_clients()[i]) for i in row if i >= 0} for row in batch.segments.tolist()]
    assert all(len(clients) == 1 for clients in owners)
    assert sorted(k for clients in owners for k in clients) == [0, 1, 2, 3, 4]


def test_a_client_without_sequences_owns_nothing() -> None:
    for lay_out in LAYOUTS.values():
        batch = lay_out(numbered([[], [3, 2], [], [4], []]), PAD)
        owned = [stop - start for start, stop in zip(batch.token_offsets, batch.token_offsets[1:], strict=False)]
        assert [owned[k] for k in (0, 2, 4)] == [0, 0, 0]
        assert sum(owned) == batch.tokens.numel()


def test_one_token_is_a_batch() -> None:
    for lay_out in LAYOUTS.values():
        batch = lay_out([[[5]]], PAD)
        assert batch.tokens.tolist() == [[5]]
        assert batch.first.tolist() == batch.last.tolist() == [0]


def test_moving_to_a_device_keeps_everything() -> None:
    batch = pack(numbered([[3, 4], [5]]), PAD)
    moved = batch.to(torch.device("cpu"))
    for name in ("tokens", "positions", "segments", "first", "last"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert (moved.token_offsets, moved.sequence_offsets, moved.packed) == (
        batch.token_offsets,
        batch.sequence_offsets,
        batch.packed,
    )


def test_a_clients_batch_repeated_is_that_of_clients_who_have_the_same() -> None:
    group = [list(range(1, 1 + length)) for length in (5, 3, 7, 2, 9, 4, 4)]
    for made, expected in (
        (pack([group], 0, limit=12), pack([group] * 3, 0, mixed=False, limit=12)),
        (pad([group], 0), pad([group] * 3, 0)),
    ):
        found = repeat(made, 3)
        for field in fields(Batch):
            mine, theirs = getattr(found, field.name), getattr(expected, field.name)
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


def test_rows_are_no_longer_than_the_limit() -> None:
    group = [[1] * 11, [1] * 7] * 20
    assert pack([group], 0).row_length > 17
    assert pack([group], 0, limit=17).row_length <= 17
    assert pack([group], 0, limit=3).row_length == 11
