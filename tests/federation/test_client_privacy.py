"""Differential privacy of clients in whole runs: what leaves is clipped, the noise is what the accountant is told."""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.adapters.lowrank import Tensors
from folklora.errors import FolkLoraError, MessageError, RunError
from folklora.federation.codec import decode
from folklora.federation.compression import Compression
from folklora.federation.engine import Upload
from folklora.federation.intake import intake_of
from folklora.federation.ledger import Ledger
from folklora.federation.local import LocalEngine
from folklora.federation.member import Member
from folklora.federation.rounds import Silent
from folklora.federation.run import resume, run
from folklora.federation.rundir import RunDirectory
from folklora.federation.sampling import sampled, simulated_secret
from folklora.federation.setup import Setup, prepare
from folklora.methods.contract import Message

Play = Callable[..., Any]
LOUD = ("train.optimizer=sgd", "train.lr=50.0", "train.clip=none")  # updates far longer than any clip
HIDDEN = ("data.limit=80", "privacy.unit=client", "privacy.noise=1.0", "privacy.accountant=rdp")
SILENT = (*HIDDEN, "privacy.noise=1e-6")  # the clip alone


class Heard(LocalEngine):
    """Keeps all uploads as they travelled, and what each member knew then."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.uploads: list[tuple[int, str, bytes]] = []
        self.knew: dict[tuple[int, str], Tensors] = {}

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        for client in clients:
            uplink = self.members[client].outlet.uplink
            self.knew[round, client] = {**uplink.welcome, **uplink.reply}
        for upload in super().train(round, clients):
            assert upload.data is not None
            self.uploads.append((round, upload.client, upload.data))
            yield upload


def flat(tensors: Tensors, less: Tensors | None = None) -> np.ndarray:
    zero = torch.zeros(())
    return np.concatenate([(t - (less or {}).get(n, zero)).double().numpy().ravel() for n, t in tensors.items()])


@pytest.mark.parametrize("method", ["fedit", "ffa", "celora:similarity=model", "celora:similarity=size", "flora"])
def test_no_upload_is_longer_than_the_clip_on_the_bytes(tiny_recipe: Any, play: Play, method: str) -> None:
    name, *options = method.split(":")
    each = [f"method.{option}" for option in options]
    recipe = tiny_recipe(
        f"method.name={name}", *each, *SILENT, *LOUD, "privacy.clip=0.5", "privacy.placement=client", "train.rounds=3"
    )
    engine = play(recipe, Heard).engine
    assert len(engine.uploads) == 12
    for round, client, data in engine.uploads:
        message = decode(data)
        reference = Compression(recipe.message, engine.setup.method).reference(
            round, client, engine.knew[round, client], message
        )
        size = np.linalg.norm(flat(message.tensors, reference))
        # Noise of sd 5e-7 and float32 are all that is added.
        assert size <= 0.5 * 1.001
        if round > 1:  # under B = 0, a core has no gradient
            assert size > 0.5 * 0.999
        assert message.numbers["examples"] == 1.0


def test_a_short_update_is_not_touched(tiny_recipe: Any, play: Play) -> None:
    """A clip that nothing reaches and no noise to speak of: the run is that of equal weights."""
    plain = play(tiny_recipe("method.name=fedit", "data.limit=80", "train.rounds=1"), Heard).engine
    wide = ("privacy.clip=1e3", "privacy.placement=client")
    hidden = play(tiny_recipe("method.name=fedit", *HIDDEN, *wide, "privacy.noise=1e-12", "train.rounds=1"), Heard)
    for (_, client, data), (_, same, other) in zip(plain.uploads, hidden.engine.uploads, strict=True):
        assert client == same
        for name, tensor in decode(data).tensors.items():
            torch.testing.assert_close(decode(other).tensors[name], tensor, rtol=0, atol=1e-6)


def about(deviation: float, numbers: np.ndarray) -> Any:
    """What a sample's deviation is of so many numbers, but once in a million."""
    return pytest.approx(deviation, rel=5 / math.sqrt(2 * numbers.size))


# -- who adds which noise ----------------------------------------------------------------------------------------------


def protected(recipe: Any, update: float, rounds: Sequence[int] = (1,)) -> dict[tuple[str, int], np.ndarray]:
    """What each member makes of an upload that adds ``update`` to every number it started with."""
    setup, found = prepare(recipe), {}
    for client in setup.data.splits:
        member = Member(setup, client)
        for round in rounds:
            message = setup.method.send(round, member.client)
            assert message is not None
            meant = Message({n: t + update for n, t in message.tensors.items()}, message.numbers)
            sent = member.outlet.protect(round, meant)
            found[client, round] = flat(sent.tensors, message.tensors)
    return found


@pytest.mark.parametrize(("placement", "share"), [("shares", 1 / math.sqrt(4)), ("client", 1.0)])
def test_every_member_adds_its_share_and_shares_add_up_to_the_central_noise(
    tiny_recipe: Any, placement: str, share: float
) -> None:
    recipe = tiny_recipe("method.name=fedit", *HIDDEN, "privacy.clip=3.0", f"privacy.placement={placement}")
    found = protected(recipe, 0.0, (1, 2))
    for numbers in found.values():
        assert np.std(numbers) == about(3.0 * share, numbers)
    if placement == "shares":
        for round in (1, 2):
            total = sum(numbers for (_, at), numbers in found.items() if at == round)
            assert np.std(total) == about(3.0, total)
    stacked = np.stack(list(found.values()))
    assert np.abs(np.corrcoef(stacked) - np.eye(len(stacked))).max() < 5 / math.sqrt(stacked.shape[1])


def test_shares_are_of_those_that_are_drawn(tiny_recipe: Any) -> None:
    half = ("privacy.placement=shares", "train.participation=0.5")
    for numbers in protected(tiny_recipe("method.name=fedit", *HIDDEN, *half), 0.0).values():
        assert np.std(numbers) == about(1 / math.sqrt(2), numbers)


def pooled(recipe: Any, updates: Sequence[float], claims: float = 1.0, secret: int = 1, round: int = 1) -> np.ndarray:
    """What the server makes of uploads that add so much to every number."""
    setup = prepare(recipe)
    intake = intake_of(setup, LocalEngine(setup), secret)
    uploads = {}
    start = setup.method.send(1, Member(setup, "0").client)
    assert start is not None
    for client, update in zip(setup.data.splits, updates, strict=False):
        raw = Message({n: t + update for n, t in start.tensors.items()}, {"examples": claims})
        data = Compression(recipe.message, setup.method)
        uploads[client] = intake.read(round, {}, client, _encoded(raw, data), ())
    state = intake.server(round, {}, uploads, Ledger())
    return flat({n.removeprefix("global/"): t for n, t in state.items()}, start.tensors)


def _encoded(message: Message, compression: Compression) -> bytes:
    from folklora.federation.codec import encode

    return encode(message, compression.up)


def test_the_servers_noise_is_that_of_one_clip_whatever_the_clients_claim(tiny_recipe: Any) -> None:
    recipe = tiny_recipe("method.name=fedit", *HIDDEN, "privacy.clip=2.0")
    one, same, other = (pooled(recipe, [0.0] * 4, secret=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.std(one) == about(2.0 / 4, one)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(one.size)
    assert np.std(pooled(recipe, [0.0] * 3)) == about(2.0 / 3, one)
    np.testing.assert_array_equal(pooled(recipe, [0.0] * 4, claims=1e6), one)
    # Who was heard decides which noise it is: two sums of one round are not hidden by the same.
    fewer = pooled(recipe, [0.0] * 3)
    assert abs(np.corrcoef(one, fewer)[0, 1]) < 5 / math.sqrt(one.size)


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_the_server_clips_what_members_did_not(tiny_recipe: Any, dtype: str) -> None:
    recipe = tiny_recipe("method.name=fedit", *SILENT, f"message.dtype={dtype}", "privacy.clip=0.5")
    for updates in ([7.0, 7.0, 7.0, 7.0], [7.0, 0.0, 0.0, 0.0]):
        size = np.linalg.norm(pooled(recipe, updates))
        assert size <= 0.5 * 1.001
        if dtype == "float32":
            assert size == pytest.approx(0.5 * sum(map(bool, updates)) / 4, rel=1e-3)


def test_one_client_moves_the_noisy_sum_by_the_clip_at_most(tiny_recipe: Any) -> None:
    """Neighbours: one client's update is replaced by nothing; what the accountant takes for the sensitivity."""
    recipe = tiny_recipe("method.name=fedit", *HIDDEN, "privacy.clip=0.7")
    for lie in (0.01, 50.0, -50.0):
        near, far = pooled(recipe, [0.0, 0.3, -2.0, lie]), pooled(recipe, [0.0, 0.3, -2.0, 0.0])
        assert 4 * np.linalg.norm(near - far) <= 0.7 * 1.0001


# -- sampling by chance ------------------------------------------------------------------------------------------------


def test_clients_are_drawn_by_chance_from_a_secret(tiny_recipe: Any) -> None:
    recipe = tiny_recipe("method.name=fedit", *HIDDEN, "train.participation=0.3")
    clients = [str(i) for i in range(50)]
    draws, others = (
        np.array([np.isin(clients, sampled(recipe, clients, r, secret)) for r in range(1, 401)]) for secret in (7, 8)
    )
    assert draws.mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / draws.size))
    # Binomial, where a fixed number would have no variance.
    assert draws.sum(1).var() == pytest.approx(50 * 0.21, rel=0.25)
    assert abs(np.corrcoef(draws.ravel(), others.ravel())[0, 1]) < 5 / math.sqrt(draws.size)
    for kept in ("privacy.placement=client", "privacy.unit=none"):
        fixed = tiny_recipe("method.name=fedit", *HIDDEN, "train.participation=0.3", kept)
        assert {len(sampled(fixed, clients, r, 7)) for r in range(1, 30)} == {15}


def test_a_round_of_nobody_is_noise_alone_and_costs_the_same(tiny_recipe: Any, play: Play, tmp_path: Path) -> None:
    recipe = tiny_recipe("method.name=fedit", *HIDDEN, "train.participation=0.2", "train.rounds=6")
    drawn = [sampled(recipe, ["0", "1", "2", "3"], r, simulated_secret(recipe)) for r in range(1, 7)]
    assert [] in drawn
    played = play(recipe)
    assert [line["participants"] for line in played.lines[1:]] == drawn
    spent = [line["privacy"]["epsilon"] for line in played.lines[1:]]
    assert all(later > earlier for earlier, later in pairwise(spent))
    # The mean is divided by the number that is expected, 0.2 * 4.
    alone = pooled(recipe, [])
    assert np.std(alone) == about(1 / 0.8, alone)
    summed = pooled(tiny_recipe("method.name=fedit", *SILENT, "train.participation=0.2"), [0.001])
    np.testing.assert_allclose(summed, 0.001 / 0.8, atol=1e-5)


# -- the same again ----------------------------------------------------------------------------------------------------


class Stopping(Silent):
    def __init__(self, after: int) -> None:
        self.after = after

    def line(self, metrics: Any) -> None:
        if metrics["round"] == self.after:
            raise KeyboardInterrupt


LOSSY = ("message.dtype=int8", "message.top_k=0.5", "message.error_feedback=true")
CASES = {
    "central": ("method.name=fedit", "train.participation=0.6", *LOSSY),
    "shares": ("method.name=ffa", "privacy.placement=shares", "train.failures=0.3"),
    "own": ("method.name=celora", "method.similarity=model", "privacy.placement=client", "train.participation=0.5"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(tiny_recipe: Any, facts: Any, tmp_path: Path, name: str) -> None:
    recipe = tiny_recipe(*HIDDEN, "train.rounds=3", *CASES[name])
    run(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", Stopping(2))
    resume(tmp_path / "cut")
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")


@pytest.mark.parametrize("name", CASES)
def test_a_network_run_is_the_local_run(
    tiny_recipe: Any, federated: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the server's secret, which in a network is the system's."""
    case = [each for each in CASES[name] if not each.startswith("train.failures")]
    recipe = tiny_recipe(*HIDDEN, "train.cohort=1", "train.rounds=3", *case)
    monkeypatch.setattr(RunDirectory, "secret", lambda self: simulated_secret(recipe))
    fed = federated(recipe)
    there, here = fed.play(), run(recipe, tmp_path / "local")
    assert there["privacy"] == here["privacy"]
    local = RunDirectory(tmp_path / "local").metrics()
    for line, other in zip(fed.lines, local, strict=True):
        assert line["participants"] == other["participants"]
        assert line.get("privacy") == other.get("privacy")
        assert line["bytes_up_clients"] == other["bytes_up_clients"]
        if line["round"] and line["participants"]:
            # Where what clients send must tell nothing of them by itself, losses stay at home.
            assert [each["train_loss"] is None for each in (line, other)] == [name != "central"] * 2
            assert name != "central" or line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


def test_a_networks_server_draws_its_secret_from_the_system_and_keeps_it(tiny_recipe: Any, federated: Any) -> None:
    recipe = tiny_recipe(*HIDDEN, "method.name=fedit", "train.participation=0.5")
    secrets = []
    for _ in range(2):
        fed = federated(recipe)
        fed.play()
        path = fed.path / "secret"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        secrets.append(path.read_text())
        assert fed.directory.secret() == int(secrets[-1])
    assert len({*secrets, str(simulated_secret(recipe))}) == 3
    path.unlink()
    with pytest.raises(RunError, match="missing or damaged"):
        fed.directory.secret()
    plain = federated(tiny_recipe("method.name=fedit", "data.limit=80"))
    plain.play()
    assert not (plain.path / "secret").exists()


def test_a_member_hides_only_one_upload_of_a_round_by_its_noise(tiny_recipe: Any) -> None:
    setup = prepare(tiny_recipe("method.name=fedit", *HIDDEN, "privacy.placement=client"))
    member = Member(setup, "1")
    message = setup.method.send(1, member.client)
    assert message is not None
    first, again = member.outlet.encode(1, message), member.outlet.encode(1, message)
    assert first == again
    moved = Message({n: t + 0.01 for n, t in message.tensors.items()}, message.numbers)
    with pytest.raises(MessageError, match="answered before, with another update"):
        member.outlet.encode(1, moved)
    member.outlet.encode(2, moved)


def test_without_a_unit_nothing_of_the_table_matters(tiny_recipe: Any, facts: Any, tmp_path: Path) -> None:
    for name, section in (("bare", ()), ("full", ("privacy.clip=0.01", "privacy.noise=9", "privacy.placement=client"))):
        run(tiny_recipe("method.name=celora", "data.limit=80", *section), tmp_path / name)
    one, other = facts(tmp_path / "bare"), facts(tmp_path / "full")
    del one["recipe.toml"], other["recipe.toml"]
    assert one == other
    assert "privacy" not in one["summary"]
    assert all("privacy" not in line for line in one["metrics"])


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "celora": (["method.name=celora"], "class mixtures, sent once"),
    "folklora": (["method.name=folklora"], "class statistics, sent once"),
    "a private sketch": (
        ["method.name=folklora", "method.dp_epsilon=1.0", "privacy.placement=client"],
        "class statistics, sent once",
    ),
    "fedsb": (["method.name=fedsb"], "weight gradients, sent once"),
    "no mean": (["method.name=flora"], 'allowed: "client", or a method that averages'),
    "personal": (["method.name=celora", "method.similarity=model"], "takes more of uploads than their mean"),
    "hafl": (["method.name=hafl", "privacy.placement=client"], "numbers of rows that are sent as they are"),
    "hetlora": (["method.name=hetlora", "privacy.placement=client"], "numbers of rows"),
    "some of ravan's heads, not at the first client": (
        ["method.name=ravan", "adapter.rank=8", "method.budget=[4,2,4,4]", "privacy.placement=client"],
        "numbers of rows",
    ),
    "scaffold": (
        ["method.name=fedit", "method.scaffold=true", "train.optimizer=sgd", "privacy.placement=client"],
        "scaffold = false",
    ),
    "patience": (["method.name=fedit", "train.patience=2"], "train.patience"),
    "promotion": (
        ["method.name=replication", "adapter.promote=6", "privacy.placement=client"],
        "adapter.promote: ranks follow scores",
    ),
    "lossy shares": (["method.name=fedit", "privacy.placement=shares", "message.dtype=int8"], "loses digits"),
    "few by chance": (
        ["method.name=fedit", "train.participation=0.5", "engine.min_clients=1"],
        "engine.min_clients = 1",
    ),
    "robust": (["method.name=fedit", "robust.rule=median"], "may move by more than its share"),
    "no room": (["method.name=fedit", "privacy.epsilon=0.5"], "round 1 would bring epsilon to 4.729"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_keep_the_promise_is_refused_before_work(tiny_recipe: Any, tmp_path: Path, name: str) -> None:
    settings, reason = REFUSED[name]
    with pytest.raises(FolkLoraError) as refused:
        run(tiny_recipe(*HIDDEN, *settings), tmp_path / "run")
    assert reason in str(refused.value)
    assert "allowed" in str(refused.value)
    assert not (tmp_path / "run").exists()
