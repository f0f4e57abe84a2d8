"""The round loop: who takes part, who fails, when it stops, and that nothing but the recipe decides the result."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import ACCURACY, Score
from folklora.federation.codec import decode, encode
from folklora.federation.engine import Asked, Upload
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Rounds, Silent
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup
from folklora.methods import METHODS as ALL
from folklora.methods.contract import Message
from folklora.recipe import Recipe

Play = Callable[..., Any]


def loop(*overrides: str, clients: Sequence[str] = tuple("0123456789")) -> Rounds:
    """A round loop that only answers who takes part."""
    recipe = Recipe.parse({"data": {"clients": len(clients)}}, overrides)
    data, task = SimpleNamespace(later={}), SimpleNamespace(metric=ACCURACY)
    setup: Any = SimpleNamespace(
        recipe=recipe, method=None, task=task, data=data, newcomers=(), method_of=lambda _: None
    )
    return Rounds(setup, None, None, clients, Silent())  # type: ignore[arg-type]


def models(engine: LocalEngine) -> dict[str, Tensors]:
    return {client: member.client.tensors for client, member in engine.members.items()}


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("seconds")}


def assert_same(one: dict[str, Tensors], other: dict[str, Tensors], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for client, tensors in one.items():
        assert tensors.keys() == other[client].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, other[client][name], rtol=tolerance, atol=tolerance)


# -- who takes part ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "participation", "expected"),
    [(10, 1.0, 10), (10, 0.5, 5), (10, 0.25, 3), (10, 0.24, 2), (10, 0.01, 1), (3, 0.5, 2), (1, 0.5, 1), (7, 0.999, 7)],
)
def test_the_fraction_is_a_count_and_never_nobody(count: int, participation: float, expected: int) -> None:
    rounds = loop(f"train.participation={participation}", clients=[str(i) for i in range(count)])
    for round in range(1, 20):
        sampled = rounds.sampled(round)
        assert len(set(sampled)) == len(sampled) == expected


def test_sampling_depends_on_ids_and_not_on_their_order() -> None:
    ids = [f"site {i}" for i in range(20)]
    forward = loop("train.participation=0.3", clients=ids)
    backward = loop("train.participation=0.3", clients=ids[::-1])
    for round in range(1, 10):
        assert set(forward.sampled(round)) == set(backward.sampled(round))
        assert forward.sampled(round) == [client for client in ids if client in forward.sampled(round)]


def test_sampling_is_fair_and_differs_by_round_and_seed() -> None:
    rounds = loop("train.participation=0.3")
    counts = Counter(client for round in range(1, 1001) for client in rounds.sampled(round))
    assert set(counts) == set("0123456789")
    assert all(240 < count < 360 for count in counts.values())  # 300 +- 4 standard deviations
    assert len({tuple(rounds.sampled(round)) for round in range(1, 30)}) > 20
    other = loop("train.participation=0.3", "seed=1")
    assert [rounds.sampled(round) for round in range(1, 10)] != [other.sampled(round) for round in range(1, 10)]


def test_simulated_failures_repeat_and_have_the_share_asked_for() -> None:
    rounds, alone = loop("train.failures=0.3"), loop("train.failures=0.3", clients=["3"])
    drops = np.array([[rounds.drops_out(round, client) for client in "0123456789"] for round in range(1, 401)])
    assert 0.26 < drops.mean() < 0.34
    assert drops[:, 3].tolist() == [alone.drops_out(round, "3") for round in range(1, 401)]
    assert not any(loop().drops_out(round, "0") for round in range(1, 50))


def test_the_lines_say_who_took_part_and_who_dropped_out(tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe("method.name=fedit", "train.rounds=4", "train.participation=0.5", "train.failures=0.4")
    played = play(recipe)
    failed = 0
    for line in played.lines[1:]:
        sampled = played.rounds.sampled(line["round"])
        assert len(sampled) == 2
        assert set(line["failed"]) == {c for c in sampled if played.rounds.drops_out(line["round"], c)}
        assert line["participants"] == [c for c in sampled if c not in line["failed"]]
        assert set(line["failed"].values()) <= {"dropped out (simulated)"}
        assert set((line["validation"] or {"clients": {}})["clients"]) == set(line["participants"])
        failed += len(line["failed"])
    assert failed


# -- messages that are not what was agreed -----------------------------------------------------------------------------


class Tampered(LocalEngine):
    """The local engine over a network that mistreats the uploads of one client in one round."""

    def __init__(self, setup: Setup, change: Callable[[Upload], Upload | None], client: str = "1", at: int = 2) -> None:
        super().__init__(setup)
        self.change, self.client, self.at = change, client, at

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        for upload in super().train(round, clients):
            changed = self.change(upload) if (upload.client, round) == (self.client, self.at) else upload
            if changed is not None:
                yield changed


def replaced(change: Callable[[Message], Message]) -> Callable[[Upload], Upload]:
    return lambda upload: replace(upload, data=encode(change(decode(upload.data or b""))))


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Upload], Upload]:
    return replaced(lambda message: Message({**message.tensors, name: tensor}, message.numbers))


def renamed(name: str) -> Callable[[Upload], Upload]:
    """The first tensor under another name, so that the message is no longer than it should be."""

    def change(message: Message) -> Message:
        (_, tensor), *others = message.tensors.items()
        return Message({name: tensor, **dict(others)}, message.numbers)

    return replaced(change)


def nan_inside(upload: Upload) -> Upload:
    """No encoder of ours would send it: the bytes of the last value are changed and the checksum made to fit."""
    body = (upload.data or b"")[8:-4] + struct.pack("<f", math.nan)
    return replace(upload, data=b"FLK1" + struct.pack("<I", zlib.crc32(body)) + body)


SITE = "A/encoder.layer.0.attention.self.query"
TAMPERINGS: dict[str, tuple[Callable[[Upload], Upload | None], str]] = {
    "wrong shape": (with_tensor(SITE, torch.zeros(3, 32)), rf"'{SITE}' has shape \(3, 32\); allowed: \(4, 32\)"),
    "unknown name": (renamed("C/x"), "unknown tensor 'C/x'"),
    "integers": (with_tensor(SITE, torch.zeros(4, 32, dtype=torch.int32)), "torch.int32; allowed: floating point"),
    "missing name": (replaced(lambda m: Message(dict(list(m.tensors.items())[1:]), m.numbers)), "is missing"),
    "no examples": (replaced(lambda m: Message(m.tensors, {"examples": 0.0})), "examples = 0.0"),
    "no weight": (replaced(lambda m: Message(m.tensors)), "'examples' is missing"),
    "NaN": (nan_inside, "holds NaN or Inf"),
    "truncated": (lambda u: replace(u, data=(u.data or b"")[:-7]), "damaged or truncated"),
    "empty": (lambda u: replace(u, data=b""), "not a FolkLoRA message"),
    "garbage": (lambda u: replace(u, data=b"\x00" * 50), "not a FolkLoRA message"),
    "an error at the client": (lambda u: replace(u, data=None, failure="out of memory"), "^out of memory$"),
    "too long": (lambda u: replace(u, data=(u.data or b"") + bytes(len(u.data or b""))), "allowed: at most"),
    "no loss": (lambda u: replace(u, loss=math.nan), "training loss = nan; allowed: a finite number"),
    "silence": (lambda u: None, "did not answer"),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_bad_message_fails_its_client_for_that_round_only(what: str, tiny_recipe: Any, play: Play) -> None:
    change, expected = TAMPERINGS[what]
    recipe = tiny_recipe("method.name=fedit", "train.rounds=3")
    played = play(recipe, lambda setup: Tampered(setup, change))
    silent = play(recipe, lambda setup: Tampered(setup, lambda upload: None))
    assert [list(line["failed"]) for line in played.lines] == [[], [], ["1"], []]
    assert re.search(expected, played.lines[2]["failed"]["1"])
    assert "\n" not in played.lines[2]["failed"]["1"]
    assert played.lines[2]["participants"] == ["0", "2", "3"]
    assert set(played.lines[2]["validation"]["clients"]) == {"0", "2", "3"}
    assert played.lines[3]["participants"] == ["0", "1", "2", "3"]
    # For everybody else it is as if that client had not answered.
    assert_same(models(played.engine), models(silent.engine))
    for line, other in zip(played.lines, silent.lines, strict=True):
        for name in ("validation", "train_loss", "aggregation_error", "bytes_down"):
            assert line[name] == other[name]


@pytest.mark.parametrize("what", ["truncated", "an error at the client"])
@pytest.mark.parametrize("name", ["fedit", "celora"])
def test_a_client_that_failed_is_resumed_as_it_was(name: str, what: str, tiny_recipe: Any, play: Play) -> None:
    """It had received and trained before its message was refused; a resumed run must not find it as it was earlier."""

    class Interrupted(Exception): ...

    class Interrupting(Silent):
        def line(self, metrics: Mapping[str, Any]) -> None:
            if metrics["round"] == 2:
                raise Interrupted

    def engine(setup: Setup) -> Tampered:
        return Tampered(setup, TAMPERINGS[what][0])

    recipe = tiny_recipe(f"method.name={name}", "train.rounds=3", "train.optimizer_state=kept")
    whole = play(recipe, engine)
    with pytest.raises(Interrupted):
        play(recipe, engine, progress=Interrupting())
    directory = RunDirectory.open(whole.directory.path.with_name("play-1"))
    resumed = engine(whole.setup)
    rounds = Rounds(whole.setup, directory, resumed, list(whole.setup.data.splits), Silent())
    summary = rounds.play()
    assert_same(models(resumed), models(whole.engine))
    assert without_seconds(summary["row"]) == whole.row


@pytest.mark.parametrize("name", ["fedit", "celora", "folklora"])
def test_the_order_of_arrival_does_not_matter(name: str, tiny_recipe: Any, play: Play) -> None:
    class Reversed(LocalEngine):
        def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
            yield from reversed(list(super().train(round, clients)))

    recipe = tiny_recipe(f"method.name={name}")
    one, other = play(recipe), play(recipe, Reversed)
    assert_same({"": one.rounds.state}, {"": other.rounds.state})
    assert one.row == other.row


@pytest.mark.parametrize("name", ["fedit", "celora", "local"])
def test_when_all_fail_the_state_stays_and_the_run_goes_on(name: str, tiny_recipe: Any, play: Play) -> None:
    class Outage(LocalEngine):
        def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
            for upload in super().train(round, clients):
                yield replace(upload, data=None, failure="no network") if round == 2 else upload

    played = play(tiny_recipe(f"method.name={name}", "train.rounds=3"), Outage)
    line = played.lines[2]
    assert line["participants"] == []
    assert line["failed"] == dict.fromkeys("0123", "no network")
    assert (line["train_loss"], line["validation"], line["aggregation_error"]) == (None, None, None)
    assert line["bytes_up"] == 0
    assert line["bytes_down"] == 0  # they had round 1's replies already, and still have
    assert played.lines[3]["participants"] == list("0123")
    previous = played.directory.checkpoint(previous=True)
    assert previous.round == 2
    reference = play(tiny_recipe(f"method.name={name}", "train.rounds=1"))
    state = played.directory.tensors(previous, previous.server)
    assert_same({"": state}, {"": reference.rounds.state})


def test_a_client_whose_training_diverges_fails_alone(tiny_recipe: Any, play: Play) -> None:
    """Its numbers leave no trace: neither in what it keeps, nor in the clients that train beside it (but for rounding:
    with it in the cohort, rows are laid out otherwise)."""

    class Poisoned(LocalEngine):
        def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
            client = self.members["1"].client
            before = client.tensors
            if round == 2:
                client.tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in before.items()}
            yield from super().train(round, clients)
            if round == 2:
                client.tensors = before

    for name in ("local", "fedit"):
        recipe = tiny_recipe(f"method.name={name}", "train.rounds=3", "train.cohort=4")
        played = play(recipe, Poisoned)
        silent = play(recipe, lambda setup: Tampered(setup, lambda upload: None))
        assert "training diverged" in played.lines[2]["failed"]["1"]
        others = {client: tensors for client, tensors in models(played.engine).items() if client != "1"}
        expected = {client: tensors for client, tensors in models(silent.engine).items() if client != "1"}
        for client, tensors in expected.items():
            torch.testing.assert_close(others[client], tensors, rtol=1e-4, atol=1e-6)
        assert all(torch.isfinite(t).all() for t in models(played.engine)["1"].values())
        assert played.lines[3]["failed"] == {}


@pytest.mark.parametrize("name", ["local", "fedit", "celora", "folklora"])
def test_when_everything_diverges_the_run_still_ends(name: str, tiny_recipe: Any, play: Play) -> None:
    played = play(tiny_recipe(f"method.name={name}", "train.lr=1e6", "train.weight_decay=1e35"))
    assert all(len(line["failed"]) == 4 for line in played.lines[1:])
    assert "training diverged" in played.lines[1]["failed"]["0"]
    json.dumps(played.summary, allow_nan=False)
    for tensors in models(played.engine).values():
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_a_reply_that_was_lost_is_sent_again(tiny_recipe: Any, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes to a client that drops out are spent all the same, and it starts its next round from the newest state."""
    recipe = tiny_recipe("method.name=fedit", "train.rounds=3", "train.evaluate_every=3")
    size = play(recipe).lines[2]["bytes_down"] // 4

    monkeypatch.setattr(Rounds, "drops_out", lambda self, round, client: (round, client) == (2, "1"))
    played = play(recipe)
    assert played.lines[2]["failed"] == {"1": "dropped out (simulated)"}
    assert [line["bytes_down"] for line in played.lines[1:]] == [0, 4 * size, 8 * size]


# -- early stopping and validation -------------------------------------------------------------------------------------


class Scripted(LocalEngine):
    """Validation scores as a script says: of the round just trained, in hundredths."""

    def __init__(self, setup: Setup, script: Sequence[int]) -> None:
        super().__init__(setup)
        self.script, self.trained = script, 0

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        self.trained = round
        return super().train(round, clients)

    def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
        scripted = Score(self.script[self.trained - 1], 100)
        return [
            dict.fromkeys(found, scripted) if split == "validation" and replies else found
            for (split, replies), found in zip(questions, super().scores(clients, questions), strict=True)
        ]


@pytest.mark.parametrize("name", ["fedit", "local", "celora"])
def test_early_stopping_goes_back_to_the_best_round(name: str, tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe(f"method.name={name}", "train.rounds=9", "train.patience=2")
    played = play(recipe, lambda setup: Scripted(setup, [50, 60, 55, 60, 99, 99, 99, 99, 99]))
    assert [line["round"] for line in played.lines] == [0, 1, 2, 3, 4]  # an equal score is no better
    assert played.summary["row"]["rounds"] == 2
    assert played.summary["stopped_early"]
    short = play(tiny_recipe(f"method.name={name}", "train.rounds=2"))
    assert_same(models(played.engine), models(short.engine))
    for key in ("accuracy_mean", "accuracy_worst_tenth", "accuracy_tuned_mean", "accuracy_global"):
        assert played.summary["row"][key] == short.summary["row"][key]


def test_patience_that_is_never_tried_still_keeps_the_best(tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe("method.name=fedit", "train.rounds=3", "train.patience=3")
    played = play(recipe, lambda setup: Scripted(setup, [60, 50, 55]))
    assert len(played.lines) == 4
    assert played.summary["row"]["rounds"] == 1
    assert not played.summary["stopped_early"]


def test_without_patience_the_last_round_counts(tiny_recipe: Any, play: Play) -> None:
    played = play(tiny_recipe("method.name=fedit", "train.rounds=3"), lambda setup: Scripted(setup, [60, 50, 55]))
    assert played.summary["row"]["rounds"] == 3
    assert not (played.directory.path / "checkpoint-best.json").exists()


def test_validation_every_few_rounds_and_after_the_last(tiny_recipe: Any, play: Play) -> None:
    often = play(tiny_recipe("method.name=fedit", "train.rounds=5"))
    rarely = play(tiny_recipe("method.name=fedit", "train.rounds=5", "train.evaluate_every=2"))
    assert [line["validation"] is not None for line in rarely.lines] == [False, False, True, False, True, True]
    assert_same(models(often.engine), models(rarely.engine))
    for line, other in zip(often.lines, rarely.lines, strict=True):
        assert other["validation"] in (None, line["validation"])
    # Looking is free: what was validated would have been sent for the next round anyway.
    assert sum(line["bytes_down"] for line in often.lines) == sum(line["bytes_down"] for line in rarely.lines)
    assert often.row["bytes_down_per_client_round"] == rarely.row["bytes_down_per_client_round"]


def test_zero_rounds_evaluate_what_was_there(tiny_recipe: Any, play: Play) -> None:
    played = play(tiny_recipe("method.name=fedit", "train.rounds=0"))
    assert len(played.lines) == 1
    assert played.summary["row"]["rounds"] == 0
    assert 0 <= played.summary["row"]["accuracy_mean"] <= 1


# -- where less is better ---------------------------------------------------------------------------------------------


def test_early_stopping_on_a_loss_goes_back_to_the_least(tiny_recipe: Any, play: Play, judged_by_loss: None) -> None:
    recipe = tiny_recipe("method.name=fedit", "train.rounds=9", "train.patience=2")
    played = play(recipe, lambda setup: Scripted(setup, [50, 40, 45, 40, 1, 1, 1, 1, 1]))
    assert [line["round"] for line in played.lines] == [0, 1, 2, 3, 4]
    assert played.summary["row"]["rounds"] == 2


def test_a_run_that_is_judged_by_its_loss(tiny_recipe: Any, play: Play, judged_by_loss: None) -> None:
    """Every number against the clients' own, which are those of the scores' definition."""
    found = play(tiny_recipe("method.name=fedit", "train.rounds=2"))
    row, clients = found.row, found.summary["clients"]
    losses = [result["loss"] for result in clients.values()]
    assert (row["metric"], row["higher"]) == ("loss", False)
    assert row["loss_mean"] == pytest.approx(np.mean(losses))
    assert row["loss_worst_tenth"] == max(losses)
    assert row["perplexity_mean"] == pytest.approx(np.mean(np.exp(losses)))
    assert row["loss_chosen_mean"] == pytest.approx(np.mean([result["loss_chosen"] for result in clients.values()]))
    assert all(r["loss_chosen"] in (r["loss"], r["loss_tuned"]) for r in clients.values())
    assert row["loss_global"] > 0
    assert not [name for name in row if name.startswith("accuracy")]
    last = found.lines[-1]["validation"]
    assert (last["metric"], last["mean"]) == ("loss", row["validation_mean"])
    assert last["beside"]["perplexity"] == pytest.approx(np.mean(np.exp(list(last["clients"].values()))))
    # Before the first round a head of zeros holds all four classes for equally likely.
    start = play(tiny_recipe("method.name=fedit", "train.rounds=0")).row
    assert [start[key] for key in ("loss_mean", "loss_weighted", "perplexity_mean")] == pytest.approx(
        [math.log(4)] * 2 + [4]
    )


def test_the_clients_with_the_least_loss_are_promoted(tiny_recipe: Any, play: Play, judged_by_loss: None) -> None:
    class Graded(LocalEngine):
        def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
            return [{client: Score(1.0 + int(client), 1) for client in clients} for _ in questions]

    settings = ("adapter.promote=6", "adapter.promote_share=0.5", "train.rounds=2")
    found = play(tiny_recipe("method.name=replication", *settings), Graded)
    assert found.rounds.state["promoted"].tolist() == [0, 1]


def test_a_model_that_diverged_is_scored_badly_and_the_run_ends(
    tiny_recipe: Any, play: Play, judged_by_loss: None
) -> None:
    class Diverged(LocalEngine):
        def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
            bad = Score(math.nan, 7, {"perplexity": math.inf})
            return [{**found, "1": bad} for found in super().scores(clients, questions)]

        def global_score(self, tensors: Tensors) -> Score | None:
            return Score(math.inf, 7)

    found = play(tiny_recipe("method.name=fedit", "train.patience=5"), Diverged)
    assert found.summary["clients"]["1"]["loss"] > 1e37
    assert found.row["loss_worst_tenth"] == found.summary["clients"]["1"]["loss"]
    assert found.row["loss_global"] > 1e37
    assert found.lines[1]["validation"]["clients"]["0"] < 10


# -- nothing but the recipe decides ------------------------------------------------------------------------------------

METHODS = ("local", "fedit", "rolora", "celora", "folklora")


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bits_whatever_the_global_generators(
    name: str, tiny_recipe: Any, play: Play
) -> None:
    recipe = tiny_recipe(f"method.name={name}", "adapter.dropout=0.1", "train.participation=0.7", "train.failures=0.2")
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    one = play(recipe)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    two = play(recipe)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert one.row == two.row
    assert one.lines == two.lines
    assert_same(models(one.engine), models(two.engine))


def test_another_seed_gives_something_else(tiny_recipe: Any, play: Play) -> None:
    one, two = play(tiny_recipe("method.name=fedit")), play(tiny_recipe("method.name=fedit", "seed=1"))
    assert one.row != two.row
    assert one.lines[1]["train_loss"] != two.lines[1]["train_loss"]


@pytest.mark.parametrize("name", METHODS)
def test_the_cohort_size_does_not_matter(name: str, tiny_recipe: Any, play: Play) -> None:
    settings = (f"method.name={name}", "adapter.dropout=0.1", "train.optimizer_state=kept", "train.rounds=3")
    one = play(tiny_recipe(*settings, "train.cohort=1"))
    four = play(tiny_recipe(*settings, "train.cohort=4"))
    assert_same(models(one.engine), models(four.engine), tolerance=2e-4)
    for line, other in zip(one.lines[1:], four.lines[1:], strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert line["bytes_up"] == other["bytes_up"]


@pytest.mark.parametrize("name", ["fedit", "folklora"])
def test_the_order_of_clients_does_not_matter(name: str, tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe(f"method.name={name}", "train.participation=0.5", "train.rounds=3")
    forward, backward = play(recipe), play(recipe, clients=lambda ids: ids[::-1])
    assert_same(models(forward.engine), models(backward.engine), tolerance=2e-4)
    for line, other in zip(forward.lines, backward.lines, strict=True):
        assert set(line["participants"]) == set(other["participants"])


def test_alone_the_mean_is_oneself(tiny_recipe: Any, play: Play) -> None:
    """One client: FedIT with a head at home is local training, to the bit."""
    one = ("data.clients=1", "train.rounds=3")
    local = play(tiny_recipe("method.name=local", *one))
    fedit = play(tiny_recipe("method.name=fedit", "method.head=private", *one))
    shared = play(tiny_recipe("method.name=fedit", *one))
    assert_same(models(local.engine), models(fedit.engine))
    assert_same(models(local.engine), models(shared.engine))
    assert fedit.lines[3]["aggregation_error"] == pytest.approx(0, abs=1e-6)
    assert local.row["accuracy_mean"] == fedit.row["accuracy_mean"] == fedit.row["accuracy_tuned_mean"]


@pytest.mark.parametrize("name", ALL)
def test_every_method_keeps_what_compression_owes_it(name: str, tiny_recipe: Any, play: Play) -> None:
    """Real messages, real records: what a client remembers shares no memory with what its method notes."""
    lossy = "message.dtype=int8" if name in ("feddm", "fedaf") else "message.top_k=0.5"  # of data nothing is left out
    recipe = tiny_recipe(f"method.name={name}", "train.rounds=2", "message.error_feedback=true", lossy)
    played = play(recipe)
    assert [line["failed"] for line in played.lines[1:]] == [{}] * len(played.lines[1:])
    again = LocalEngine(played.setup)
    again.restore(played.engine.records(list(played.setup.data.splits)))
    assert_same(models(again), models(played.engine))


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_an_enormous_update_fails_its_client_alone(name: str, tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe(f"method.name={name}", "train.rounds=3")

    def enormous(message: Message) -> Message:
        tensors = {n: torch.full_like(t, 1e30) if n[0] in "AB" else t for n, t in message.tensors.items()}
        return Message(tensors, message.numbers)

    played = play(recipe, lambda setup: Tampered(setup, replaced(enormous)))
    assert any("allowed: at most 1e+30" in line["failed"].get("1", "") for line in played.lines)
    assert all(set(line["failed"]) <= {"1"} for line in played.lines)
    assert all(torch.isfinite(t).all() for tensors in models(played.engine).values() for t in tensors.values())
