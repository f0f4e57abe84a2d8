"""Secure aggregation as a protocol on bytes: sums open, single vectors do not, and lies harm their sender alone."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest

pytest.importorskip("cryptography")

from scipy.stats import chisquare

from folklora.errors import MessageError
from folklora.privacy.secagg import pieces
from folklora.privacy.secagg.desk import Desk
from folklora.privacy.secagg.party import Party
from folklora.privacy.secagg.pieces import PRIME, Words
from folklora.privacy.secagg.wire import HEAD, SEALED, SENT, Session


@dataclass
class Play:
    """A session with ``count`` members out of ``size``; ``vectors`` are what they hold."""

    count: int
    threshold: int
    length: int = 50
    round: int = 3
    size: int = 0
    session: Session = field(init=False)
    desk: Desk = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.size or self.count
        self.session = Session(self.round, os.urandom(16), self.threshold, self.count)
        self.desk = Desk(self.session)
        draw = random.Random(self.count)
        indices = sorted(draw.sample(range(self.size), self.count))
        self.secrets = {index: draw.getrandbits(256) for index in indices}
        self.parties = {i: Party(secret, i, self.size, self.session) for i, secret in self.secrets.items()}
        generator = np.random.default_rng(self.count)
        self.vectors = {i: generator.integers(0, 2**32, self.length, dtype=np.uint32) for i in indices}

    def meet(self, silent: Iterable[int] = ()) -> Play:
        """Steps 1 and 2; who is ``silent`` says nothing in the second."""
        for index, party in self.parties.items():
            self.desk.joined(index, party.keys(index + 1))
        roll = self.desk.roll()
        for index in self.parties.keys() - set(silent):
            self.desk.shared(index, self.parties[index].shares(roll))
        return self

    def masked(self) -> dict[int, Words]:
        attached = self.desk.attachment()
        return {index: self.parties[index].mask(self.vectors[index], attached) for index in self.desk.partners}

    def ask(self, survivors: Iterable[int]) -> dict[int, bytes]:
        self.desk.survivors = sorted(survivors)
        return {index: self.desk.question(index) for index in self.desk.survivors}

    def answer(self, index: int, question: bytes) -> bytes:
        """As a member does that was killed since and built anew."""
        party = Party(self.secrets[index], index, self.size, self.session)
        return party.open(party.question(question))

    def open(self, masked: dict[int, Words], survivors: Iterable[int], helpers: Iterable[int] | None = None) -> Words:
        asked = self.ask(survivors)
        for index in asked if helpers is None else helpers:
            self.desk.opened(index, self.answer(index, asked[index]))
        return total(masked[index] for index in self.desk.survivors) - self.desk.masks(self.length)


def total(vectors: Iterable[Words]) -> Words:
    return np.sum(list(vectors), axis=0, dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize("seed", range(12))
def test_the_sum_of_whoever_survives_opens_exactly(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 12)
    threshold = draw.randint(count // 2 + 1, count)
    play = Play(count, threshold, size=draw.randint(count, 40))
    silent = draw.sample(sorted(play.parties), draw.randint(0, count - threshold))
    play.meet(silent)
    assert play.desk.partners == sorted(play.parties.keys() - set(silent))
    survivors = draw.sample(play.desk.partners, draw.randint(threshold, len(play.desk.partners)))
    helpers = draw.sample(survivors, draw.randint(threshold, len(survivors)))
    found = play.open(play.masked(), survivors, helpers)
    np.testing.assert_array_equal(found, total(play.vectors[index] for index in survivors))


def test_one_helper_too_few_and_nothing_opens() -> None:
    play = Play(5, 4).meet()
    masked = play.masked()
    with pytest.raises(MessageError, match="3 members gave points .* 4 are needed"):
        play.open(masked, list(play.parties), list(play.parties)[:3])


def test_a_masked_vector_is_uniform_whatever_it_hides() -> None:
    play = Play(3, 2, length=60_000).meet()
    for value in (0, 1, 2**31):
        play.vectors[0] = np.full(play.length, value, dtype=np.uint32)
        play.session = Session(play.round, os.urandom(16), play.threshold, play.count)
        play.desk = Desk(play.session)
        play.parties = {i: Party(secret, i, play.size, play.session) for i, secret in play.secrets.items()}
        seen = play.meet().masked()[0].tobytes()
        # A false alarm once in a million runs.
        assert chisquare(np.bincount(np.frombuffer(seen, dtype=np.uint8), minlength=256)).pvalue > 1e-6
        assert chisquare(np.bincount(np.frombuffer(seen, dtype=np.uint8)[::4] >> 4)).pvalue > 1e-6


def test_without_one_honest_pair_nothing_cancels() -> None:
    """All others' secrets, and the own masks of the two, and still the two are hidden but for their sum."""
    play = Play(5, 3, length=60_000).meet()
    for index in play.vectors:
        play.vectors[index] = np.zeros(play.length, dtype=np.uint32)
    masked = play.masked()
    honest = (1, 3)
    keys = {index: keys.mask for index, keys in play.desk.keys.items()}
    rest = {}
    for one in honest:
        party = play.parties[one]
        left = masked[one] - pieces.keystream(pieces.own_mask(play.session, party._own), play.length)
        for other in play.parties.keys() - set(honest):
            alike = pieces.told(play.desk.attachment(), b"")
            key = pieces.pair_mask(play.session, play.parties[other]._mask_key, keys[one], one, other, alike)
            stream = pieces.keystream(key, play.length)
            left = left - stream if one < other else left + stream
        rest[one] = left
        assert chisquare(np.bincount(left.view(np.uint8), minlength=256)).pvalue > 1e-6
    assert not (rest[1] + rest[3]).any()


def test_members_that_copy_others_keys_take_no_mask_off_a_third() -> None:
    """Of 2, the masks with 0 and 1 and those with who has their keys would cancel: one is added, one subtracted."""
    play = Play(5, 3, length=60_000)
    copied = {4: play.parties[0], 3: play.parties[1]}
    for index, party in play.parties.items():
        play.desk.joined(index, copied.get(index, party).keys(1))
    play.desk.sent = {index: {} for index in play.parties}
    left = play.parties[2].mask(np.zeros(play.length, dtype=np.uint32), play.desk.attachment())
    left -= pieces.keystream(pieces.own_mask(play.session, play.parties[2]._own), play.length)
    assert chisquare(np.bincount(left.view(np.uint8), minlength=256)).pvalue > 1e-6


def test_fewer_points_than_the_threshold_fit_every_secret() -> None:
    """Three points of a cubic lie on another one, too, with any other value at zero."""
    secret, other = 12345, 67890
    line = pieces.polynomial(secret, 3, bytes(range(32)))
    seen = (0, 4, 7)
    zero_at_seen = [1]  # the product of (x - (i + 1))
    for i in seen:
        shifted, scaled = [0, *zero_at_seen], [-(i + 1) * c for c in (*zero_at_seen, 0)]
        zero_at_seen = [a + b for a, b in zip(shifted, scaled, strict=True)]
    factor = (other - secret) * pow(zero_at_seen[0], -1, PRIME)
    twin = [(a + factor * b) % PRIME for a, b in zip(line, zero_at_seen, strict=True)]
    assert twin[0] == other
    assert [pieces.point(twin, i) for i in seen] == [pieces.point(line, i) for i in seen]
    four = [*seen, 9]
    for coefficients, wanted in ((line, secret), (twin, other)):
        points = [int.from_bytes(pieces.point(coefficients, i), "little") for i in four]
        assert sum(w * p for w, p in zip(pieces.at_zero(four), points, strict=True)) % PRIME == wanted


def test_answers_are_functions_of_the_question() -> None:
    play = Play(4, 3).meet()
    again = {i: Party(secret, i, 4, play.session) for i, secret in play.secrets.items()}
    roll, attached = play.desk.roll(), play.desk.attachment()
    for index, party in play.parties.items():
        assert party.keys(7) == again[index].keys(7)
        assert party.shares(roll) == again[index].shares(roll)
        np.testing.assert_array_equal(
            party.mask(play.vectors[index], attached), again[index].mask(play.vectors[index], attached)
        )


def test_another_attempt_has_other_keys_and_other_masks() -> None:
    first, second = Play(4, 3).meet(), Play(4, 3).meet()
    assert first.secrets == second.secrets
    assert first.session.id != second.session.id
    for index, keys in first.desk.keys.items():
        assert len({*keys[:3], *second.desk.keys[index][:3]}) == 6
    for index, words in first.masked().items():
        assert (words != second.masked()[index]).mean() > 0.9


def test_points_on_two_rolls_do_not_add_up() -> None:
    """A server that shows a member several rolls gets points of several polynomials."""
    play = Play(5, 3).meet()
    party = play.parties[0]
    rolls = [Desk(play.session, keys={i: k for i, k in play.desk.keys.items() if i != left}).roll() for left in (3, 4)]
    (first, *one), (second, *other) = (party._polynomials(hashlib.sha256(roll).digest())[0] for roll in rolls)
    assert first == second
    assert set(one).isdisjoint(other)
    sealed = [party.shares(roll)[HEAD.size + SENT.size :][: SENT.size] for roll in rolls]
    assert sealed[0][:32] != sealed[1][:32]


# -- lies --------------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "a byte more": lambda data: data + b"x",
    "another session's": lambda data: data[:4] + bytes(16) + data[20:],
    "another round's": lambda data: struct.pack("<I", 4) + data[4:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_is_refused_and_is_as_if_it_had_not_been_said(damage: str) -> None:
    play, harm = Play(4, 2), DAMAGES[damage]
    for index, party in play.parties.items():
        with pytest.raises(MessageError):
            play.desk.joined(index, harm(party.keys(1)))
        play.desk.joined(index, party.keys(1))
    roll = play.desk.roll()
    for index, party in play.parties.items():
        with pytest.raises(MessageError):
            play.desk.shared(index, harm(party.shares(roll)))
        assert index not in play.desk.sent
        play.desk.shared(index, party.shares(roll))
        if damage != "another round's":  # of which a member is told beside it
            with pytest.raises(MessageError):
                party.shares(harm(roll))
            with pytest.raises(MessageError):
                party.mask(play.vectors[index], harm(play.desk.attachment()) if index else b"")
    masked, asked = play.masked(), play.ask(play.parties)
    for index, question in asked.items():
        with pytest.raises(MessageError):
            play.parties[index].question(harm(question))
        with pytest.raises(MessageError):
            play.desk.opened(index, harm(play.answer(index, question)))
    assert not play.desk.points
    np.testing.assert_array_equal(play.open(masked, play.parties), total(play.vectors.values()))


def test_parts_of_another_round_are_refused_by_members() -> None:
    with pytest.raises(MessageError, match="a part of round 3 in round 4"):
        Session.of(4, Play(3, 2).desk.invitation(), 2, 3)
    with pytest.raises(MessageError, match="allowed: 20 or more"):
        Session.of(4, b"abc", 2, 3)


def test_wrong_points_are_found_out_and_harm_nobody_else() -> None:
    play = Play(5, 3).meet()
    masked, asked = play.masked(), play.ask([0, 1, 2, 4])
    for index, question in asked.items():
        answer = play.answer(index, question)
        if index == 1:
            wrong = answer[: HEAD.size] + bytes(len(answer) - HEAD.size)
            with pytest.raises(MessageError, match="0, 1, 2, 3, 4 .5 of 5. are not those"):
                play.desk.opened(index, wrong)
        elif index == 2:  # one of them
            with pytest.raises(MessageError, match="its points of 4 .1 of 5. are"):
                play.desk.opened(index, answer[:-1] + bytes([answer[-1] ^ 1]))
        else:
            play.desk.opened(index, answer)
    assert 1 not in play.desk.points[0]
    # Of member 4 one point too few is left: the one that member 2 spoilt.
    with pytest.raises(MessageError, match="2 members gave points of 4's, 3 are needed"):
        play.desk.masks(play.length)
    play.desk.opened(2, play.answer(2, asked[2]))
    found = total(masked[index] for index in asked) - play.desk.masks(play.length)
    np.testing.assert_array_equal(found, total(play.vectors[index] for index in asked))


def test_a_member_that_deals_rubbish_is_named() -> None:
    play = Play(4, 3).meet()
    other = Party(99, 2, 4, play.session)
    other._channel, other._mask_key = play.parties[2]._channel, play.parties[2]._mask_key
    play.desk.shared(2, other.shares(play.desk.roll()))
    masked = play.masked()
    with pytest.raises(MessageError, match="member 2 dealt points of another mask"):
        play.open(masked, play.parties, [0, 1, 3])
    play.desk.points.clear()
    with pytest.raises(MessageError, match="member 2 dealt points of another key"):
        play.open(masked, [0, 1, 3])


def test_what_nobody_can_open_is_passed_over() -> None:
    """A member writes to another what that one cannot read: that one's other points count all the same."""
    play = Play(4, 3).meet()
    marks, masks, _ = play.desk.sent[0][1]
    play.desk.sent[0][1] = (marks, masks, bytes(SEALED))
    asked = play.ask(play.parties)
    with pytest.raises(MessageError, match="its points of 0 .1 of 4. are"):
        play.desk.opened(1, play.answer(1, asked[1]))
    masked = play.masked()
    np.testing.assert_array_equal(play.open(masked, play.parties, [0, 2, 3]), total(play.vectors.values()))


def test_a_weight_whose_sum_with_others_might_not_fit_is_refused_at_the_door() -> None:
    play = Play(4, 3)
    most = (2**32 - 1) // 4
    play.desk.joined(0, play.parties[0].keys(most))
    for weight in (most + 1, 2**32 - 1):
        with pytest.raises(MessageError, match=f"a weight of {weight}; allowed: 1 to {most}"):
            play.desk.joined(1, play.parties[1].keys(weight))
    assert list(play.desk.keys) == [0]


def test_keys_that_agree_on_nothing_are_refused_at_the_door() -> None:
    play = Play(3, 2)
    keys = play.parties[0].keys(1)
    with pytest.raises(MessageError, match="agrees on nothing"):
        play.desk.joined(0, keys[: HEAD.size] + bytes(32) + keys[HEAD.size + 32 :])
    with pytest.raises(MessageError, match="weight of 0"):
        play.desk.joined(0, play.parties[0].keys(0))
    assert not play.desk.keys


def test_members_refuse_lists_that_are_not_the_federations() -> None:
    play = Play(4, 3, size=6).meet()
    party = play.parties[min(play.parties)]
    roll = play.desk.roll()
    entries = [roll[HEAD.size + 4 + i * 68 :][:68] for i in range(4)]

    def listed(*found: bytes) -> bytes:
        return play.session.head + struct.pack("<I", len(found)) + b"".join(found)

    assert listed(*entries) == roll
    stranger = struct.pack("<I", 6) + entries[0][4:]
    fifth = struct.pack("<I", next(i for i in range(6) if i not in play.parties)) + entries[0][4:]
    for wrong, said in (
        (listed(*sorted([*entries, fifth])), "a roll of 5 members; allowed: 3 to 4"),
        (listed(*entries[:2]), "a roll of 2 members; allowed: 3 to 4"),
        (listed(*entries[1:]), "without this one"),
        (listed(*entries[::-1]), "out of order"),
        (listed(*entries, entries[-1]), "twice"),
        (listed(*entries, stranger), "members that there are not"),
        (listed(entries[0][:4] + entries[1][4:], *entries[1:]), "other keys for this member"),
        (play.session.head + struct.pack("<I", 2**31), "allowed: as many as they take"),
    ):
        with pytest.raises(MessageError, match=said):
            party.shares(wrong)


def test_a_question_of_too_few_survivors_is_not_answered() -> None:
    play = Play(5, 3).meet()
    asked = play.ask([0, 4])
    with pytest.raises(MessageError, match="a question of 2 members; allowed: 3 to 5"):
        play.parties[0].question(asked[0])
    with pytest.raises(MessageError, match="own point"):
        play.parties[1].question(asked[0])
    whom = [play.parties[i].question(question).whom for i, question in play.ask([0, 1, 4]).items()]
    assert len(set(whom)) == 1
    assert play.parties[0].question(play.ask([0, 1, 2])[0]).whom not in whom


def test_with_a_common_key_a_server_cannot_pose_as_a_member() -> None:
    """It has keys of its own in member 2's place, and is sent points; without the common key it opens them all."""
    play = Play(4, 3)
    for common, opened in ((b"", True), (b"known to members alone", False)):
        members = {i: Party(play.secrets[i], i, 4, play.session, common) for i in (0, 1, 3)}
        server = Party(1, 2, 4, play.session)
        desk = Desk(play.session)
        for i, party in {**members, 2: server}.items():
            desk.joined(i, party.keys(1))
        for i, party in members.items():
            desk.shared(i, party.shares(desk.roll()))
        desk.survivors = desk.partners
        question = Desk(play.session, (), desk.keys, desk.sent, {}, [0, 1, 3]).question(2)
        server.open(server.question(question))
        assert server.unreadable == ([] if opened else [0, 1, 3])
        # Among themselves members open as ever.
        for i, party in members.items():
            desk.opened(i, party.open(party.question(desk.question(i))))
            assert not party.unreadable
