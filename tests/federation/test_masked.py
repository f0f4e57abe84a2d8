"""Runs whose server reads sums alone: the numbers of the plain run, whoever disappears, and nobody's upload."""

from __future__ import annotations

import logging
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

pytest.importorskip("cryptography")

from folklora.errors import FolkLoraError, MessageError, RecipeError, RunError
from folklora.federation import masked
from folklora.federation.faults import FaultyEngine
from folklora.federation.inspect import inspect
from folklora.federation.local import LocalEngine
from folklora.federation.masked import MaskedIntake, MaskedOutlet
from folklora.federation.member import Member
from folklora.federation.orders import Order
from folklora.federation.parties import Own
from folklora.federation.rounds import Rounds
from folklora.federation.run import run
from folklora.federation.secrecy import secrecy, threshold
from folklora.federation.setup import prepare
from folklora.methods.contract import Message
from folklora.privacy.ckks import Key
from folklora.privacy.fixedpoint import Grid
from folklora.privacy.secagg.wire import Session
from folklora.recipe import Recipe

MASKS = "secure.kind=masks"
SMALL = ["data.limit=80", "train.rounds=1"]
AVERAGING = [
    ["method.name=fedit"],
    ["method.name=fedit", "method.fedopt=adam"],
    ["method.name=fedit", "message.dtype=float16"],
    ["method.name=ffa"],
    ["method.name=ditto"],
    ["method.name=celora", "method.similarity=size"],
    ["method.name=folklora", "method.proximal=0.1"],
]


SHARES = ["method.name=fedit", "method.head_start=zero", "privacy.unit=client", "privacy.noise=1.0",
          "privacy.placement=shares"]  # fmt: skip


class Opened:
    """Every sum that a server opened, beside the vectors that went into it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words: dict[int, list[Any]] = {}
        self.means: list[Any] = []
        words, mean = Grid.words, Grid.mean

        def spied_words(grid: Grid, values: Any, weight: int) -> Any:
            made = words(grid, values, weight)
            self.words.setdefault(weight, []).append(made[0])
            return made

        def spied_mean(grid: Grid, total: Any) -> Any:
            self.means.append((grid, total.copy()))
            return mean(grid, total)

        monkeypatch.setattr(Grid, "words", spied_words)
        monkeypatch.setattr(Grid, "mean", spied_mean)


@pytest.mark.parametrize("settings", AVERAGING, ids=" ".join)
def test_the_servers_state_is_that_of_the_plain_mean(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any], settings: list[str]
) -> None:
    plain, hidden = play(tiny_recipe(*settings, *SMALL)), play(tiny_recipe(*settings, *SMALL, MASKS))
    weights = [len(split.train) for split in plain.setup.data.splits.values()]
    pictures = plain.setup.method.insight(plain.rounds.state)
    assert plain.rounds.state.keys() - pictures.keys() == hidden.rounds.state.keys()
    rounding = {"message.dtype=float16": 2**-11}.get(settings[-1], 2**-23)  # uploads are rounded only where plain
    # Of what was sent; some methods keep a multiple of it.
    off = Grid(8.0, 4, max(weights)).error(4, sum(weights)) * max(1.0, plain.setup.method.adapter.scale(4))
    for name in hidden.rounds.state:
        if "fedopt" in settings[-1]:  # Adam's step is of the sign of what may be nearly nothing
            continue
        found, wanted = hidden.rounds.state[name], plain.rounds.state[name]
        torch.testing.assert_close(found, wanted, rtol=4 * rounding, atol=off + rounding / 100)
    one, other = plain.lines[1], hidden.lines[1]
    assert one["participants"] == other["participants"]
    assert one["train_loss"] == pytest.approx(other["train_loss"])
    assert other["aggregation_error"] is None


def test_bytes_are_those_that_were_foretold(tiny_recipe: Callable[..., Any], play: Callable[..., Any]) -> None:
    for settings in (["method.name=fedit"], ["method.name=folklora", "message.dtype=float16"]):
        recipe = tiny_recipe(*settings, MASKS, "data.limit=80", "train.rounds=3")
        played, foretold = play(recipe), inspect(recipe)["method"]
        beside = secrecy(recipe, 4)
        upload = next(iter(played.lines[1]["bytes_up_clients"].values())) - beside["bytes_up"]
        assert upload == 44 + 4 * sum(map(math.prod, played.setup.method.expected(1, {}, "0").values()))
        for key in ("bytes_up_per_client_round", "bytes_down_per_client_round", "bytes_once_per_client"):
            assert played.row[key] == pytest.approx(foretold[key]), (settings, key)


def test_a_member_that_disappears_leaves_the_sum_of_the_others(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has exchanged keys and masked its upload, which nobody hears."""
    monkeypatch.setattr(Rounds, "drops_out", lambda self, round, client: (round, client) == (1, "2"))
    spy = Opened(monkeypatch)
    played = play(tiny_recipe("method.name=fedit", "data.limit=80", MASKS))
    first, second = played.lines[1:]
    assert first["failed"] == {"2": "dropped out (simulated)"}
    assert second["failed"] == {}
    assert first["bytes_up_clients"]["2"] < first["bytes_up_clients"]["1"] / 4  # keys and points, no upload
    weights = {client: len(split.train) for client, split in played.setup.data.splits.items()}
    _, total = spy.means[0]
    survivors = [spy.words[weights[client]][0] for client in ("0", "1", "3")]
    np.testing.assert_array_equal(total, np.sum(survivors, axis=0, dtype=np.uint64).astype(np.uint32))
    assert total[-1] == sum(weights[client] for client in ("0", "1", "3"))


def test_too_few_uploads_stop_the_run_and_it_can_go_on(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    recipe = tiny_recipe("method.name=fedit", MASKS, "data.limit=80", "engine.wait=0", "secure.threshold=0.7")
    whole = federated(recipe)
    wanted = whole.play()
    fed = federated(recipe, tamper=silent("train", 2, {"1", "2"}))
    with pytest.raises(
        RunError, match=r"round 2: 2 of 4 clients took part .* 3 needed \(secure\.threshold\).*; it can be resumed"
    ):
        fed.play()
    assert [line["round"] for line in fed.lines] == [0, 1]
    fed.carrier.tamper = whole.carrier.tamper
    assert fed.resume()["clients"] == wanted["clients"]
    assert fed.lines == whole.lines


def silent(kind: str, round: int, who: set[str], topic: str | None = None) -> Callable[..., list[Any]]:
    """Members whose answers do not arrive."""

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        struck = (order.kind, order.round, order.topic) == (kind, round, topic) and order.client in who
        return [] if struck else [answer]

    return tamper


@pytest.mark.parametrize("topic", [masked.KEYS, masked.SHARES, masked.OPEN])
def test_who_says_nothing_or_nonsense_harms_nobody_else(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], topic: str
) -> None:
    recipe = tiny_recipe("method.name=fedit", MASKS, *SMALL, "engine.wait=0")
    plain = federated(recipe)
    plain.play()
    lies: dict[str, Callable[[bytes], bytes | None]] = {
        "silent": lambda data: None,
        "truncated": lambda data: data[:-1],
        "other bytes": lambda data: data[:20] + bytes(len(data) - 20),
        "another round": lambda data: b"\2" + data[1:],
    }
    for name, lie in lies.items():

        def tamper(order: Order, answer: dict[str, Any], lie: Any = lie) -> list[dict[str, Any]]:
            if (order.topic, order.client) != (topic, "1"):
                return [answer]
            data = lie(answer["data"])
            return [] if data is None else [{**answer, "data": data}]

        fed = federated(recipe, tamper=tamper)
        if topic == masked.SHARES and name == "other bytes":  # nothing tells them from points until they are needed
            with pytest.raises(RunError, match="0 members gave points of 1's, 3 are needed"):
                fed.play()
            fed.carrier.tamper = plain.carrier.tamper
            fed.resume()
            assert fed.lines == plain.lines
            continue
        fed.play()
        line = fed.lines[1]
        if topic == masked.OPEN:
            assert line["failed"] == {}
            assert line["train_loss"] == plain.lines[1]["train_loss"]
        else:
            assert list(line["failed"]) == ["1"], name
            assert line["participants"] == ["0", "2", "3"]
            assert topic in line["failed"]["1"]


def test_a_sum_that_opened_wrongly_is_found_out(tiny_recipe: Callable[..., Any], federated: Callable[..., Any]) -> None:
    """The server knows what the weights in it sum to."""

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        if (order.kind, order.client) != ("train", "2"):
            return [answer]
        rest = answer["data"][8:-4] + bytes(4)
        return [{**answer, "data": masked.MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest}]

    fed = federated(tiny_recipe("method.name=fedit", MASKS, *SMALL), tamper=tamper)
    with pytest.raises(RunError, match=r"the weights in it sum to \d+, not \d+"):
        fed.play()


# -- asked twice -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def killed_at(topic: str, after: int) -> Callable[..., list[Any]]:
    """A server that dies in round 1 when ``after`` answers to this topic have come."""
    seen = 0

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        nonlocal seen
        if (order.topic, order.round) == (topic, 1):
            seen += 1
            if seen > after:
                raise Killed
        return [answer]

    return tamper


@pytest.mark.parametrize("topic", [masked.KEYS, masked.SHARES, masked.OPEN])
@pytest.mark.parametrize("after", [0, 3])
def test_a_server_killed_anywhere_goes_on_as_if_nothing_had_happened(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], topic: str, after: int
) -> None:
    recipe = tiny_recipe("method.name=folklora", MASKS, "data.limit=80")
    whole, broken = federated(recipe), federated(recipe, tamper=killed_at(topic, after), rebuild=True)
    wanted = whole.play()
    with pytest.raises(Killed):
        broken.play()
    broken.carrier.tamper = whole.carrier.tamper
    assert broken.resume()["clients"] == wanted["clients"]
    assert broken.lines == whole.lines


def test_a_round_that_was_opened_is_not_opened_for_others(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Or the difference of two sums would be one member's upload."""
    recipe = tiny_recipe("method.name=fedit", MASKS, "data.limit=80", "engine.wait=0")
    whole = federated(recipe)
    wanted = whole.play()
    fed = federated(recipe, tamper=killed_at("nothing", 0), rebuild=True)
    fed.play()
    fed.carrier.away.add("3")
    with pytest.raises(RunError, match="round 2: the sum of 3 uploads could not be opened"):
        fed.resume(previous=True)
    assert "round 2 has been opened for other members; allowed: the same again" in caplog.text
    fed.carrier.away.clear()
    assert fed.resume()["clients"] == wanted["clients"]
    assert fed.lines == whole.lines


def test_who_was_asked_in_vain_opens_nothing_for_others_and_the_rest_may(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    """One member's points arrived when the server was killed: too few for any sum. The others are asked again."""
    recipe = tiny_recipe("method.name=fedit", MASKS, *SMALL, "engine.wait=0", "secure.threshold=0.5")
    fed = federated(recipe, ("0", "1", "2", "3"), tamper=killed_at(masked.OPEN, 0), rebuild=True)
    with pytest.raises(Killed):
        fed.play()
    noted = [c for c in fed.members if "opened 1" in (fed.folder(c) / "noted.json").read_text()]
    assert len(noted) == 1
    others = sorted(set(fed.members) - set(noted))
    fed.carrier.tamper = lambda order, answer: [answer]
    assert threshold(recipe, 4) == 3
    fed.carrier.away.add(noted[0])
    fed.resume()
    assert fed.lines[1]["participants"] == others


def met(recipe: Recipe, outlets: list[MaskedOutlet], round: int = 1) -> tuple[masked.Desk, bytes]:
    """A session of these members, and what is attached to their training."""
    desk = masked.Desk(Session(round, bytes([round]) * 16, outlets[0].threshold, outlets[0].parties))
    for outlet in outlets:
        desk.joined(outlet.index, outlet.talk(round, masked.KEYS, desk.invitation()))
    for outlet in outlets:
        desk.shared(outlet.index, outlet.talk(round, masked.SHARES, desk.roll()))
    most = max(keys.weight for keys in desk.keys.values())
    return desk, masked.WEIGHT.pack(most) + desk.attachment()


def test_a_member_masks_one_upload_in_a_session(tiny_recipe: Callable[..., Any]) -> None:
    """Or a server could ask for a second one that differs a little, and subtract."""
    recipe = tiny_recipe("method.name=fedit", MASKS)
    setup = prepare(recipe)
    members = [Member(setup, client) for client in setup.data.splits]
    outlets: list[Any] = [each.outlet for each in members]
    message = members[0].method.send(1, members[0].client)
    assert message is not None
    with pytest.raises(MessageError, match="no partners came along"):
        outlets[0].encode(1, message)
    desk, outlets[0].attached = met(recipe, outlets)
    first = outlets[0].encode(1, message)
    assert outlets[0].encode(1, message) == first
    other = Message({name: tensor + 0.1 for name, tensor in message.tensors.items()}, message.numbers)
    with pytest.raises(MessageError, match="this session has masked another upload"):
        outlets[0].encode(1, other)
    with pytest.raises(MessageError, match="a part of round 1 in round 2"):
        outlets[0].encode(2, message)
    # The same under the masks of some partners, and of others: the differences are masks, and all of them together.
    whole = outlets[0].attached
    outlets[0].attached = whole[:-1] + b"\0"
    with pytest.raises(MessageError, match="this session has masked another upload"):
        outlets[0].encode(1, message)
    outlets[0].attached = whole
    assert outlets[0].encode(1, message) == first
    _, outlets[0].attached = met(recipe, outlets, 2)
    assert outlets[0].encode(2, other) != first
    with pytest.raises(MessageError, match="holds NaN"):
        outlets[0].encode(2, Message({"A/x": torch.tensor([torch.nan])}, message.numbers))
    for topic in ("masks_open", "masks", "ckks"):
        with pytest.raises(MessageError):
            outlets[0].talk(1, topic, desk.invitation())


@pytest.mark.parametrize("lie", ["weight", "range", "lr", "members"])
def test_members_that_were_told_different_things_hide_each_other(tiny_recipe: Callable[..., Any], lie: str) -> None:
    """Or a server has all but one send next to nothing, and reads that one's upload in the sum."""
    told = {"range": "secure.range=1e6", "lr": "train.lr=1e-12"}
    recipe = tiny_recipe("method.name=fedit", MASKS)
    setup = prepare(recipe)
    other = prepare(tiny_recipe("method.name=fedit", MASKS, told[lie])) if lie in told else setup
    members = [Member(setup if not i else other, client) for i, client in enumerate(setup.data.splits)]
    outlets: list[Any] = [each.outlet for each in members]
    desk, attached = met(recipe, outlets)
    total = None
    for i, (member, outlet) in enumerate(zip(members, outlets, strict=True)):
        outlet.attached = attached
        if i and lie == "weight":
            outlet.attached = masked.WEIGHT.pack(2**29) + attached[masked.WEIGHT.size :]
        elif i and lie == "members":
            outlet.parties += 1
        message = member.method.send(1, member.client)
        shapes = member.method.expected(1, {}, member.client.id)
        words = masked.opened(desk.session, shapes, outlet.encode(1, message))
        total = words if total is None else total + words
    desk.survivors = desk.partners
    for outlet in outlets:
        outlet.parties = outlets[0].parties
        desk.opened(outlet.index, outlet.talk(1, masked.OPEN, desk.question(outlet.index)))
    left = total - desk.masks(len(total))  # nobody is lost: own masks alone
    assert chisquare(np.bincount(left.view(np.uint8), minlength=256)).pvalue > 1e-6


def test_a_member_opens_nothing_under_keys_that_it_was_not_shown(tiny_recipe: Callable[..., Any]) -> None:
    """A server shows member 0 keys of its own, and would have the others open what 0 sealed."""
    setup = prepare(tiny_recipe("method.name=fedit", MASKS))
    outlets: list[Any] = [Member(setup, client).outlet for client in setup.data.splits]
    desk = masked.Desk(Session(1, bytes(16), outlets[0].threshold, outlets[0].parties))
    for outlet in outlets:
        desk.joined(outlet.index, outlet.talk(1, masked.KEYS, desk.invitation()))
    shown = masked.Desk(desk.session, keys={**desk.keys, 3: desk.keys[3]._replace(mask=desk.keys[2].mask)})
    sent = outlets[0].talk(1, masked.SHARES, shown.roll())
    with pytest.raises(MessageError, match="this session has other keys of its members"):
        outlets[0].talk(1, masked.SHARES, desk.roll())
    with pytest.raises(MessageError, match="other keys for this member"):
        outlets[3].talk(1, masked.SHARES, shown.roll())
    outlets[1].talk(1, masked.SHARES, desk.roll())
    for index in range(4):
        shown.shared(index, sent)
    shown.survivors = shown.partners
    for outlet in (outlets[1], outlets[2]):  # one saw another roll, one saw none
        with pytest.raises(MessageError, match="about other keys than this member was shown"):
            outlet.talk(1, masked.OPEN, shown.question(outlet.index))


def test_uploads_that_are_no_uploads_of_this_session_are_refused(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=fedit", MASKS)
    setup = prepare(recipe)
    members = [Member(setup, client) for client in setup.data.splits]
    outlets: list[Any] = [each.outlet for each in members]
    desk, outlets[0].attached = met(recipe, outlets)
    message = members[0].method.send(1, members[0].client)
    assert message is not None
    data = outlets[0].encode(1, message)
    intake = MaskedIntake(setup, None)  # type: ignore[arg-type]
    intake.desk = desk
    assert len(intake.read(1, {}, "0", data, ())) == sum(t.numel() for t in message.tensors.values()) + 1
    renamed = Message({f"{name}x": tensor for name, tensor in message.tensors.items()}, message.numbers)
    outlets[1].attached = outlets[0].attached
    other_names = outlets[1].encode(1, Message(renamed.tensors, {"examples": outlets[1].client.examples}))
    for wrong, said in (
        (None, "sent nothing"),
        (b"", "of 0 bytes"),
        (data[:-4], "allowed: FLM1"),
        (data + bytes(4), "allowed: FLM1"),
        (data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
        (other_names, "other tensors"),
    ):
        with pytest.raises(MessageError, match=said):
            intake.read(1, {}, "0", wrong, ())
    intake.desk, _ = met(recipe, outlets, 2)
    with pytest.raises(MessageError, match="another attempt"):
        intake.read(2, {}, "0", data, ())


STRIKES = {("offline", "1", 1), ("late", "2", 1), ("duplicate", "3", 2), ("corrupt", "4", 3)}


def test_faults_that_strike_uploads_are_survived(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FaultyEngine, "strikes", lambda self, fault, client, round, look=0: (fault, client, round) in STRIKES
    )
    monkeypatch.setattr(Rounds, "drops_out", lambda self, round, client: (round, client) == (3, "5"))
    settings = ["data.clients=6", "data.limit=120", "data.partition=iid", "train.rounds=3", "engine.wait=0"]
    recipe = tiny_recipe("method.name=folklora", MASKS, *settings)
    assert threshold(recipe, 6) == 4
    played = play(recipe, lambda setup: FaultyEngine(LocalEngine(setup), recipe))
    first, second, third = played.lines[1:]
    assert first["failed"] == {"1": "not connected", "2": "did not answer"}
    assert (second["failed"], second["ignored"]) == ({}, {"duplicate": 1, "late": 1})
    assert third["failed"].keys() == {"4", "5"}
    assert "masked upload" in third["failed"]["4"]


def test_what_is_clipped_is_said_in_the_members_log_only(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        played = play(tiny_recipe("method.name=fedit", *SMALL, MASKS, "secure.range=0.01"))
    assert "numbers beyond secure.range = 0.01 were clipped" in caplog.text
    assert "clipped" not in str(played.lines)
    assert all(tensor.abs().max() <= 0.0101 for tensor in played.rounds.state.values())


def test_members_with_a_common_key_seal_with_it(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tenseal")
    recipe = tiny_recipe("method.name=folklora", MASKS, *SMALL)
    common, other = Key.of_simulation(1), Key.of_simulation(2)
    plain, sealed = federated(recipe), federated(recipe, own=having(recipe, lambda client: common))
    assert plain.play()["clients"] == sealed.play()["clients"]
    assert plain.lines == sealed.lines
    with pytest.raises(RunError, match="could not be opened"):
        federated(recipe, own=having(recipe, {"0": common, "1": common, "2": other}.get)).play()
    assert "sealed for this one cannot be opened" in caplog.text
    naked = federated(
        tiny_recipe("method.name=fedit", *SMALL, "engine.wait=0"), own=having(recipe, lambda client: common)
    )
    with pytest.raises(RunError, match="0 of 4 clients are connected"):
        naked.play()
    assert "does not encrypt what it sends" in caplog.text


def having(recipe: Recipe, key: Callable[[str], Key | None]) -> Callable[[str], Own]:
    return lambda client: Own(rehearse=recipe.data.source, model=recipe.model.name, key=key(client))


# -- before anything runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.name=flora"], "takes more of uploads than their mean.*allowed: fedit, ffa"),
        (["method.name=celora"], "takes more of uploads than their mean"),
        (["method.name=local"], "takes more of uploads than their mean"),
        (["method.name=fedit", "method.scaffold=true", "train.optimizer=sgd"], "takes more of uploads"),
        (["method.name=folklora", "adapter.rank=[2,3,4,4]"], "one rank for all"),
        (["method.name=fedit", "message.top_k=0.5"], "allowed: no message.top_k"),
        (["method.name=fedit", "message.error_feedback=true"], "no message.error_feedback"),
        (["method.name=fedit", "message.dtype=int8"], "message.dtype = float32, float16, bfloat16"),
        (["method.name=fedit", "train.participation=0.25"], "with 1 client a round"),
        (["method.name=fedit", "robust.rule=median"], 'robust.rule = "median"'),
        (["method.name=fedit", "method.head_start=zero", "privacy.unit=client", "privacy.noise=1.0"], "placement"),
        ([*SHARES, "privacy.clip=3"], r"secure.range = 8 .* sd 1.5: .*; allowed: 15 to "),
        ([*SHARES, "secure.range=1e6", "privacy.clip=1e-3"], r"allowed: 0\.005 to 4194"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_runs(
    tiny_recipe: Callable[..., Any], settings: list[str], said: str
) -> None:
    with pytest.raises(FolkLoraError, match=said):
        prepare(tiny_recipe(*settings, MASKS))


@pytest.mark.parametrize(
    ("clients", "participation", "share", "needed"),
    [(4, 1.0, 0.5, 3), (5, 1.0, 0.5, 3), (10, 1.0, 0.5, 6), (10, 1.0, 0.67, 7), (10, 0.5, 0.8, 4), (3, 1.0, 1.0, 3)],
)
def test_a_sum_is_opened_by_more_than_half(clients: int, participation: float, share: float, needed: int) -> None:
    settings = [MASKS, f"secure.threshold={share}", f"train.participation={participation}"]
    recipe = Recipe.parse({"data": {"clients": clients}}, settings)
    assert threshold(recipe, clients) == needed
    told = secrecy(recipe, clients)
    assert f"masks, threshold {needed} of {recipe.train.sampled(clients)} clients a round" in told["words"]
    assert secrecy(Recipe.parse({"data": {"clients": clients}}), clients) == {"kind": "none"}


def test_no_share_of_the_noise_is_cut_off_at_the_range(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Where the others' numbers are cut off, so is their noise, and the sum has that of one member alone."""
    share = 8 * 1.0 / math.sqrt(4)
    with pytest.raises(RecipeError, match="allowed: 5 to"):
        prepare(tiny_recipe(MASKS, *SMALL, *SHARES, f"secure.range={share + 0.9}"))
    with pytest.raises(RunError, match=r"what is known of uploads is up to .*allowed: a larger secure\.range"):
        run(tiny_recipe(MASKS, *SMALL, *SHARES, f"secure.range={share + 1.001}"), tmp_path / "tight")
    run(tiny_recipe(MASKS, *SMALL, *SHARES, f"secure.range={share + 3}"), tmp_path / "wide")


def test_members_noise_shares_go_under_the_masks(tiny_recipe: Callable[..., Any], play: Callable[..., Any]) -> None:
    private = [
        "method.name=fedit", "method.head_start=zero", *SMALL, "privacy.unit=client", "privacy.noise=0.5",
        "privacy.clip=0.5", "privacy.placement=shares",
    ]  # fmt: skip
    plain, hidden = play(tiny_recipe(*private)), play(tiny_recipe(*private, MASKS))
    for name, tensor in plain.rounds.state.items():
        torch.testing.assert_close(hidden.rounds.state[name], tensor, rtol=1e-5, atol=Grid(8.0, 4, 1).error(4, 4) * 1.1)
    assert plain.lines[1]["privacy"] == hidden.lines[1]["privacy"]
