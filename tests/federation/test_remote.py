"""The network engine over a carrier in memory: the same run as the local engine's, whatever is lost on the way."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from folklora.adapters.lowrank import Tensors
from folklora.errors import FolkLoraError, RunError
from folklora.federation import remote
from folklora.federation.answers import predict
from folklora.federation.network import begin, reopen
from folklora.federation.orders import Order
from folklora.federation.parties import Own, for_members
from folklora.federation.rounds import Silent
from folklora.federation.run import client_model, run
from folklora.federation.rundir import RunDirectory
from folklora.methods import METHODS
from folklora.recipe import Recipe
from folklora.report.page import write_report
from folklora.report.reading import read_run
from folklora.sections import TrackSection

MIXED = sorted(name for name, method in METHODS.items() if method.mixed_ranks)
HALF = ["train.participation=0.5", "train.rounds=3"]
# Ranks of their own are padded where clients train side by side: sums differ in their last digits, and Adam would make
# much of those.
MIXED_RANKS = ["adapter.rank=[2, 3, 4, 4]", "train.optimizer=sgd", "train.lr=0.02", *HALF]
FEEDBACK = ["message.top_k=0.3", "message.error_feedback=true", "train.participation=0.75", "train.rounds=3"]
TWO, TWO_IDS = ["method.name=fedit", "data.limit=40", "data.clients=2", "train.rounds=1"], ("0", "1")
RECIPES: dict[str, list[str]] = {
    **{name: [f"method.name={name}", *(MIXED_RANKS if name in MIXED else [])] for name in METHODS},
    **{
        f"{name}, compressed": [f"method.name={name}", *FEEDBACK]
        for name in ("celora", "fedit", "fedex", "hafl", "ravan")
    },
    "hafl, freezing": ["method.name=hafl", "method.scheme=freezing"],
    "a head that each client chooses": ["method.name=celora", "method.head_start=auto", "train.participation=0.5"],
    "scaffold": ["method.name=fedit", "method.scaffold=true", "train.optimizer=sgd", *HALF],
    "moments are kept": ["method.name=fedit", "train.optimizer_state=kept", "message.dtype=float16"],
    **{f"{name}, masked": [f"method.name={name}", "secure.kind=masks", *HALF] for name in ("fedit", "folklora")},
    "promotion": ["method.name=replication", "adapter.promote=6", "train.rounds=3"],
    "less is better": ["method.name=fedit", "train.patience=1", "train.rounds=3"],
    "the best round": ["method.name=fedit", "train.patience=1", "train.rounds=4", "train.lr=0.5"],
}


def close(found: Any, wanted: Any, where: str = "") -> None:
    """Equal but for the last digits of floats."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for name, each in wanted.items():
            close(found[name], each, f"{where}.{name}")
    elif isinstance(wanted, float):
        assert math.isclose(found, wanted, rel_tol=1e-5, abs_tol=1e-6), f"{where}: {found}, not {wanted}"
    else:
        assert found == wanted, where


@pytest.mark.parametrize("name", RECIPES)
def test_a_network_run_is_the_local_run(
    tiny_recipe: Callable[..., Any],
    federated: Callable[..., Any],
    tmp_path: Path,
    name: str,
    request: pytest.FixtureRequest,
) -> None:
    if name == "less is better":
        request.getfixturevalue("judged_by_loss")
    # A member trains alone. Beside others, sums differ in their last digits, and Adam makes much of those.
    recipe = tiny_recipe("train.cohort=1", "data.limit=80", *RECIPES[name])
    fed = federated(recipe)
    summary = fed.play()
    local, directory = run(recipe, tmp_path / "local"), RunDirectory(tmp_path / "local")
    for found, wanted in zip(fed.lines, map(without_seconds, directory.metrics()), strict=True):
        close(found, {**wanted, "aggregation_error": None}, f"round {wanted['round']}")
    rows = (without_seconds({**each["row"], "aggregation_error": None}) for each in (summary, local))
    close(*rows)
    close(summary["clients"], local["clients"])
    for client in fed.members:
        for tuned in (False, True):
            same_tensors(
                client_model(fed.folder(client), client, tuned=tuned).tensors,
                client_model(directory.path, client, tuned=tuned).tensors,
            )
    # What was carried is what was counted: nothing travels twice.
    lines, carrier = fed.directory.metrics(), fed.carrier
    turns = sum(len(line["participants"]) + len(line["failed"]) for line in lines[1:])
    down = summary["row"]["bytes_down_per_client_round"] * max(1, turns) + lines[0]["bytes_down"]
    assert carrier.up.total() == sum(line["bytes_up"] for line in lines)
    assert carrier.down.total() == pytest.approx(down, abs=1e-3)


def same_tensors(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def without_seconds(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if not name.startswith("seconds")}


@pytest.mark.parametrize("seed", range(3))
def test_what_is_carried_is_what_is_counted_whoever_fails(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], seed: int
) -> None:
    """Members that are sampled in some rounds only, whose answers are missing, late, doubled or none."""
    draw = random.Random(seed)
    late: dict[str, Any] = {}

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        if order.kind not in ("train", "score"):
            return [answer]
        arrives = [late.pop(order.client)] if order.client in late else []
        fate = draw.choice(["whole", "whole", "gone", "late", "no answer", "failed", "twice", "wrong counts"])
        if fate == "late":
            late[order.client] = answer
        if fate in ("late", "gone"):
            return arrives
        changes: dict[str, dict[str, Any]] = {
            "no answer": {"loss": "x"},
            "failed": {"status": "failed", "failure": "no"},
            "wrong counts": {"units": [10**6], "totals": [1.0]} if order.kind == "score" else {},
        }
        return [*arrives, *[{**answer, **changes.get(fate, {})}] * (2 if fate == "twice" else 1)]

    recipe = tiny_recipe("method.name=celora", "data.limit=80", "train.rounds=5", "train.participation=0.75")
    fed = federated(recipe, tamper=tamper)
    at_the_end = {"counts": 0}

    class Counting(Silent):
        def phase(self, name: str, total: int) -> None:
            at_the_end["counts"] = fed.carrier.down.total() if name == "test" else 0

    with suppress(RunError):  # perhaps nobody answers the last question
        fed.play(Counting())
    assert sum(line["bytes_down"] for line in fed.directory.metrics()) == at_the_end["counts"] > 0


# -- nothing is lost ---------------------------------------------------------------------------------------------------

LASTING = ["method.name=celora", "data.limit=80", "train.optimizer_state=kept", *FEEDBACK]


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def outcome(fed: Any, summary: dict[str, Any]) -> tuple[Any, ...]:
    """All that a run says and every bit it leaves at the members."""
    models = {client: client_model(fed.folder(client), client).tensors for client in fed.members}
    bits = {c: {n: t.numpy().tobytes() for n, t in tensors.items()} for c, tensors in models.items()}
    return fed.lines, without_seconds(summary["row"]), summary["clients"], bits


def killed_at(kind: str, round: int, after: int) -> Callable[..., list[Any]]:
    """A server that dies when ``after`` answers of that kind and round have come."""
    seen = 0

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        nonlocal seen
        if (order.kind, order.round) == (kind, round):
            seen += 1
            if seen > after:
                raise Killed
        return [answer]

    return tamper


def test_a_member_built_anew_between_orders_changes_no_bit(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    one, other = federated(tiny_recipe(*LASTING)), federated(tiny_recipe(*LASTING), rebuild=True)
    assert outcome(one, one.play()) == outcome(other, other.play())


def test_a_server_killed_anywhere_goes_on_as_if_nothing_had_happened(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    whole, broken = federated(tiny_recipe(*LASTING)), federated(tiny_recipe(*LASTING))
    wanted = outcome(whole, whole.play())
    kills = [("sketch", 0, 2), ("train", 1, 1), ("score", 1, 0), ("train", 2, 2), ("train", 3, 0), ("score", 3, 2)]
    for i, kill in enumerate(kills):
        broken.carrier.tamper = killed_at(*kill)
        with pytest.raises(Killed):
            broken.play() if i == 0 else broken.resume()
    broken.carrier.tamper = whole.carrier.tamper
    assert outcome(broken, broken.resume()) == wanted


def test_a_server_steps_back_a_round_and_the_members_with_it(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    fed = federated(tiny_recipe(*LASTING))
    wanted = outcome(fed, fed.play())
    assert outcome(fed, fed.resume(previous=True)) == wanted


def test_who_lost_a_reply_is_sent_it_again(tiny_recipe: Callable[..., Any], federated: Callable[..., Any]) -> None:
    one, other = federated(tiny_recipe(*LASTING)), federated(tiny_recipe(*LASTING))

    def forget(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        if order.kind == "score" and order.client == "1" and order.round <= 3:
            for part in (other.folder("1") / "parts").iterdir():
                part.unlink()
        return [answer]

    other.carrier.tamper = forget
    assert outcome(one, one.play())[0] == outcome(other, other.play())[0]
    assert other.carrier.down["1"] > one.carrier.down["1"]
    assert other.carrier.down["2"] == one.carrier.down["2"]


def test_who_asks_twice_to_be_sent_a_reply_again_takes_part(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    one, other = federated(tiny_recipe(*LASTING)), federated(tiny_recipe(*LASTING))

    def forget(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        if (order.kind, order.client) == ("score", "1") and order.round <= 3:
            for part in (other.folder("1") / "parts").iterdir():
                part.unlink()
        return [answer, answer] if answer["status"] == "resend" else [answer]

    other.carrier.tamper = forget
    assert outcome(one, one.play())[0] == outcome(other, other.play())[0]


def test_a_server_that_steps_back_goes_on_with_other_members(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    """Round 3 was the best; played again without member 3 it is not, and the best is the one before."""
    right = {1: 1.0, 2: 0.0, 3: 2.0}

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**answer, "totals": [right[order.round]]} if order.questions == ["validation+reply"] else answer]

    settings = ["method.name=fedit", "data.limit=80", "train.patience=5", "train.rounds=3", "engine.wait=0"]
    fed = federated(tiny_recipe(*settings), tamper=tamper)
    assert fed.play()["row"]["rounds"] == 3
    right[3] = 0.0
    fed.carrier.away.add("3")
    summary = fed.resume(previous=True)
    assert summary["row"]["rounds"] == 1
    assert summary["clients"].keys() == {"0", "1", "2"}


def test_a_server_killed_while_it_begins_begins_again(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fed, write = federated(tiny_recipe(*TWO), TWO_IDS), RunDirectory.write
    for writes in range(10):
        count = iter(range(writes))

        def dying(self: RunDirectory, name: str, data: bytes, count: Any = count, **options: Any) -> None:
            if next(count, None) is None:
                raise Killed
            write(self, name, data, **options)

        monkeypatch.setattr(RunDirectory, "write", dying)
        try:
            begin(fed.recipe, fed.path.with_name(f"begun-{writes}"), fed.members)
            whole = True
        except Killed:
            whole = False
        monkeypatch.setattr(RunDirectory, "write", write)
        if whole:
            assert writes == 4
            break
        begun = begin(fed.recipe, fed.path.with_name(f"begun-{writes}"), fed.members)
        assert reopen(begun.directory.path, fed.members).roster.run == begun.roster.run


def test_what_a_server_cannot_do_is_refused_before_a_directory_is_made(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for setting, said in (
        ("engine.min_clients=5", "engine.min_clients = 5, of 4 clients 4 are sampled"),
        ("track.mlflow=sqlite:///runs.db", "track.mlflow"),
        ("train.failures=0.5", "train.failures"),
    ):
        fed = federated(tiny_recipe("method.name=fedit", setting))
        with pytest.raises(FolkLoraError, match=said):
            begin(fed.recipe, fed.path, fed.members)
        assert not fed.path.exists()


def test_members_are_told_no_path_of_the_server(
    tiny_recipe: Callable[..., Any], tiny_data: Path, federated: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*TWO, f"data.test={tiny_data / 'test.csv'}")
    fed = federated(recipe, TWO_IDS)
    fed.play()
    hellos = [order.recipe for order in fed.carrier.orders if order.kind == "hello"]
    assert len(hellos) == 2
    for folder in {str(Path(path).parent) for path in (recipe.data.source, recipe.model.name)}:
        assert not any(folder in told for told in hellos)
    told = Recipe.from_toml(hellos[0])
    assert (told.train, told.adapter, told.method, told.message) == (
        recipe.train, recipe.adapter, recipe.method, recipe.message,
    )  # fmt: skip
    secret = TrackSection(mlflow="https://user:password@nowhere")
    assert "password" not in for_members(recipe.model_copy(update={"track": secret})).to_toml()
    for name in ("minilm", "/models/minilm"):  # what is in the package, and what only has its name
        other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": name})})
        assert (for_members(other).model.name == "minilm") == (name == "minilm")


def test_answers_are_recognised_however_many_members_there_are(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "REMEMBERED", 1)
    fed = federated(tiny_recipe("method.name=fedit", "data.limit=80"))
    fed.play()
    assert all(line["failed"] == {} for line in fed.lines)


# -- who comes, who goes -----------------------------------------------------------------------------------------------


def at(kind: str, round: int, act: Callable[[], None]) -> Callable[..., list[Any]]:
    """Something that happens as the first answer of that kind and round arrives."""
    done: list[bool] = []

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        if (order.kind, order.round) == (kind, round) and not done:
            done.append(True)
            act()
        return [answer]

    return tamper


@pytest.mark.parametrize("method", ["celora", "fedit", "flora", "fedsb"])
def test_a_member_may_come_in_late(tiny_recipe: Callable[..., Any], federated: Callable[..., Any], method: str) -> None:
    fed = federated(tiny_recipe(f"method.name={method}", "data.limit=80", "engine.wait=0"), away={"2"})
    fed.carrier.tamper = at("train", 1, fed.carrier.away.clear)
    summary = fed.play()
    assert [line["failed"] for line in fed.lines] == [{"2": "not connected"}, {"2": "not connected"}, {}]
    assert summary["clients"].keys() == set(fed.members)
    assert summary["clients"]["2"]["examples"]["train"] > 0
    (first, *_) = [order for order in fed.carrier.orders if order.client == "2" and order.kind != "hello"]
    assert (first.kind, first.base) == ("train", -1)


def test_a_member_that_went_is_left_out_and_listed(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    fed = federated(tiny_recipe("method.name=fedit", "data.limit=80", "engine.wait=0"))
    fed.carrier.tamper = at("train", 2, lambda: fed.carrier.away.add("3"))
    summary = fed.play()
    assert summary["missing"] == ["3"]
    assert summary["clients"].keys() == {"0", "1", "2"}


def test_too_few_members_stop_the_run_and_it_goes_on_when_they_are_back(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    settings = ["method.name=fedit", "data.limit=80", "engine.wait=0", "engine.min_clients=4"]
    whole, fed = federated(tiny_recipe(*settings)), federated(tiny_recipe(*settings))
    fed.carrier.tamper = at("score", 1, lambda: fed.carrier.away.add("3"))
    with pytest.raises(RunError, match="round 2: 3 of 4 .* 4 needed"):
        fed.play()
    with pytest.raises(RunError, match="round 2: 3 of 4"):
        fed.resume()
    fed.carrier.away.clear()
    assert outcome(fed, fed.resume())[1:] == outcome(whole, whole.play())[1:]


def test_a_member_whose_folder_is_wiped_before_it_trained_starts_afresh(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    fed = federated(tiny_recipe("method.name=celora", "data.limit=80", "train.rounds=3"), rebuild=True)
    fed.carrier.tamper = at("sketch", 0, lambda: shutil.rmtree(fed.homes / "3" / "runs"))
    fed.play()  # answers come from the last member to the first: this is its own
    assert [list(line["failed"]) for line in fed.lines] == [[], ["3"], [], []]
    assert "no such run" in fed.lines[1]["failed"]["3"]


def test_a_member_whose_folder_is_wiped_after_it_trained_cannot_go_on(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    fed = federated(tiny_recipe("method.name=celora", "data.limit=80", "train.rounds=3"), rebuild=True)
    fed.carrier.tamper = at("score", 1, lambda: shutil.rmtree(fed.homes / "3" / "runs"))
    summary = fed.play()
    assert [list(line["failed"]) for line in fed.lines] == [[], [], ["3"], ["3"]]
    assert "state of round 1; allowed: its folder brought back, or a new run" in fed.lines[3]["failed"]["3"]
    assert summary["missing"] == ["3"]


def test_a_member_with_another_backbone_is_left_out(
    tiny_recipe: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    federated: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tiny_recipe("method.name=fedit", "data.limit=80", "engine.wait=0")
    others = str(tiny_model("roberta"))
    fed = federated(
        recipe,
        own=lambda client: Own(rehearse=recipe.data.source, model=others if client == "1" else recipe.model.name),
    )
    fed.play()
    assert all(line["failed"] == {"1": "not connected"} for line in fed.lines)
    assert "member 1 is left out: the backbone here" in caplog.text
    assert others not in caplog.text.replace(recipe.model.name, "")


# -- what arrives -----------------------------------------------------------------------------------------------------


def swapped(**fields: Any) -> Callable[..., list[Any]]:
    """Member 1 answers the training of round 1 with something else."""

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**answer, **fields}] if (order.client, order.kind, order.round) == ("1", "train", 1) else [answer]

    return tamper


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a text for a number": ({"loss": "0.1"}, "loss"),
    "no loss": ({"loss": None}, "loss"),
    "a loss that is none": ({"loss": math.nan}, "loss"),
    "a loss that has no mean": ({"loss": 1.7e308}, "loss"),
    "done, but nothing to show": ({"data": None}, "it sent nothing"),
    "a reason of several lines": ({"status": "failed", "failure": "no\nWARNING \x1b[2J"}, r"no\nWARNING \x1b"),
    "a truth value for a number": ({"number": True}, "number"),
    "text for bytes": ({"data": "FLK1"}, "data"),
    "no message": ({"data": b"FLK1"}, "FLK1"),
    "nothing": ({"data": None, "status": "failed", "failure": "no"}, "no"),
    "an endless reason": ({"status": "failed", "failure": "x" * 10**6}, "failure"),
    "an endless name": ({"x" * 10**6: 1}, "unknown key"),
    "another round": ({"round": 2}, "another's"),
    "another run": ({"run": "0" * 32}, "another's"),
    "another member": ({"client": "0"}, "another's"),
    "a path for a member": ({"client": "../../etc"}, "client"),
    "an order that nobody gave": ({"number": 3}, "nobody gave"),
    "negative counts": ({"units": [-1], "totals": [0.0]}, "units"),
    "a status of its own": ({"status": "root"}, "status"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_fails_its_sender_and_nobody_else(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    fields, reason = HOSTILE[name]
    fed = federated(tiny_recipe(*TWO), TWO_IDS, tamper=swapped(**fields))
    summary = fed.play()
    (failed,) = fed.lines[1]["failed"].items()
    assert failed[0] == "1"
    assert reason in failed[1]
    assert len(failed[1]) < 1100
    assert "\n" not in failed[1]
    assert summary["clients"].keys() == {"0", "1"}


@pytest.mark.parametrize(("data", "said"), [(None, "it sent no sketch"), (b"FLK1", "FLK1"), (bytes(1 << 24), "bytes")])
def test_a_sketch_that_cannot_be_fails_its_sender_once(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], data: bytes | None, said: str
) -> None:
    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**answer, "data": data} if (order.client, order.kind) == ("1", "sketch") else answer]

    fed = federated(tiny_recipe(*TWO, "method.name=celora"), TWO_IDS, tamper=tamper)
    fed.play()
    assert list(fed.lines[0]["failed"]) == ["1"]
    assert said in fed.lines[0]["failed"]["1"]
    assert fed.lines[1]["failed"] == {}


@pytest.mark.parametrize(
    "scores",
    [
        {"totals": [1e6], "units": [10**6]},
        {"totals": [5.0], "units": [4]},
        {"totals": [0.5]},
        {"beside": ["validation"], "beside_of": [0], "beside_values": [1.0]},
        {"beside": ["rouge_l"], "beside_of": [0], "beside_values": [2.0]},
        {"totals": [], "units": []},
        {"totals": [1.0, 1.0], "units": [1, 1]},
    ],
)
def test_scores_that_cannot_be_are_left_out(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], scores: dict[str, Any]
) -> None:
    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**answer, **scores} if (order.client, order.kind) == ("1", "score") else answer]

    fed = federated(tiny_recipe(*TWO), TWO_IDS, tamper=tamper)
    summary = fed.play()
    assert fed.lines[1]["validation"]["clients"].keys() == {"0"}
    assert summary["missing"] == ["1"]


@pytest.mark.parametrize(
    ("scores", "taken"),
    [
        ({"totals": [3e38], "beside_values": [3e38]}, True),
        ({"totals": [1e308]}, False),
        ({"totals": [-1.0]}, False),
        ({"units": [10**6]}, False),
        ({"units": [0]}, False),
        ({"beside": ["loss"]}, False),
        ({"beside": ["accuracy"], "beside_values": [1.5]}, False),
        ({"beside_of": [3]}, False),
    ],
)
def test_no_number_of_a_loss_breaks_the_run(
    tiny_recipe: Callable[..., Any],
    federated: Callable[..., Any],
    scores: dict[str, Any],
    taken: bool,
    judged_by_loss: None,
) -> None:
    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        if (order.client, order.kind) != ("1", "score"):
            return [answer]
        several = {
            name: values * len(order.questions) for name, values in scores.items() if name in ("totals", "units")
        }
        return [{**answer, **scores, **several} if order.round == 1 and len(order.questions) == 1 else answer]

    fed = federated(tiny_recipe(*TWO, "train.patience=3"), TWO_IDS, tamper=tamper)
    summary = fed.play()
    assert ("1" in fed.lines[1]["validation"]["clients"]) == taken
    assert summary["clients"].keys() == {"0", "1"}
    assert 0 < summary["row"]["loss_mean"] < 10
    assert json.loads((fed.path / "summary.json").read_text())["row"]["metric"] == "loss"


def test_what_comes_twice_or_late_is_not_counted(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    settings = ["method.name=fedit", "data.limit=80", "train.rounds=3"]
    held: list[dict[str, Any]] = []

    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        if order.kind != "train":
            return [answer]
        if (order.client, order.round) == ("1", 1):
            held.append(answer)
            return []
        if (order.client, order.round) == ("1", 2):
            return [*held, answer]
        return [answer, answer] if (order.client, order.round) == ("3", 2) else [answer]

    fed = federated(tiny_recipe(*settings), tamper=tamper)
    fed.play()
    assert fed.lines[1]["failed"] == {"1": "did not answer"}
    assert fed.lines[2]["ignored"] == {"duplicate": 1, "late": 1}
    assert fed.lines[2]["failed"] == {}
    orders = [order for order in fed.carrier.orders if order.client == "1" and order.kind == "train"]
    assert [order.base for order in orders] == [0, 0, 2]  # what came too late never happened


def test_a_member_whose_data_changed_is_refused(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    fed = federated(tiny_recipe("method.name=fedit", "data.limit=80", "train.rounds=1", "engine.wait=0"))
    fed.carrier.tamper = killed_at("train", 1, 0)
    with pytest.raises(Killed):
        fed.play()
    fed.carrier.tamper = lambda order, answer: [
        {**answer, "examples": [1000, 10, 10]} if (order.kind, order.client) == ("hello", "1") else answer
    ]
    fed.resume()
    assert fed.lines[1]["failed"] == {"1": "not connected"}
    assert "it began with" in caplog.text


# -- a member's own rows -----------------------------------------------------------------------------------------------


def test_members_with_files_of_their_own_are_the_clients_of_a_natural_partition(
    tiny_recipe: Callable[..., Any], tiny_data: Path, federated: Callable[..., Any], tmp_path: Path
) -> None:
    with (tiny_data / "train.csv").open() as file:
        _, *rows = csv.reader(file)
    for site in sorted({row[2] for row in rows}):
        with (tmp_path / f"{site}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["sentence", "mood"], *([row[0], row[1]] for row in rows if row[2] == site)])
    local = tiny_recipe(
        "data.partition=natural", "data.by=site", "train.cohort=1", "method.name=celora",
        f"data.test={tiny_data / 'test.csv'}", 'data.classes=["dun", "amber", "blue", "cyan"]',
    )  # fmt: skip
    wanted = run(local, tmp_path / "local")
    recipe = local.model_copy(update={"data": local.data.model_copy(update={"source": "nobody-has-this.csv"})})

    def own(client: str) -> Own:
        return Own(str(tmp_path / f"{client}.csv"), text="sentence", label="mood", model=recipe.model.name)

    fed = federated(recipe, [f"site-{i}" for i in range(4)], own)
    found = fed.play()
    close(found["clients"], wanted["clients"])
    for line, other in zip(fed.lines, RunDirectory(tmp_path / "local").metrics(), strict=True):
        close(line, {**without_seconds(other), "aggregation_error": None})
    said = json.loads((fed.path / "partition.json").read_text())
    assert said["classes"] == ["dun", "amber", "blue", "cyan"]
    assert said["clients"]["site-1"] == wanted["clients"]["site-1"]["examples"]
    assert set(said) == {"classes", "clients"}  # and nothing about who has which
    page = write_report(fed.path).read_text()
    assert "on members&#39; own data" in page or "on members' own data" in page
    assert "partition natural" not in page
    answers = predict(fed.folder("site-2"), "site-2", ["w1 w2", "w40"])
    assert answers == predict(tmp_path / "local", "site-2", ["w1 w2", "w40"])


def test_a_report_of_a_network_run_says_what_is_known(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    fed = federated(tiny_recipe("method.name=celora", "data.limit=80", "train.rounds=1"))
    fed.play()
    page = write_report(fed.path).read_text()
    assert "celora" in page
    examples = read_run(fed.path).examples
    assert all(examples[client].train > 0 for client in fed.members)
