"""Data that change in mid-run: who trains and is scored on what, sketches that follow, and runs that resume."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from folklora.data.partition_file import from_json
from folklora.errors import FolkLoraError
from folklora.federation.codec import encode
from folklora.federation.local import LocalEngine
from folklora.federation.run import client_model, resume, run
from folklora.federation.setup import Setup, prepare
from folklora.federation.traffic import forecast
from folklora.methods import METHODS
from folklora.methods.contract import Message
from folklora.privacy.attacks.warm import attackable
from folklora.recipe import Recipe
from folklora.report.facts import Facts
from folklora.report.figures import validation
from folklora.report.inventory import sent
from folklora.report.page import write_report
from folklora.report.reading import read_run
from folklora.training.jobs import Job

CHANGE = ("train.rounds=5", "drift.kind=labels", "drift.round=3", "data.alpha=0.3")
FOLLOWS = ("method.name=celora", "method.similarity=data", "method.components=0", "method.refresh=2")


class Stopped(BaseException):
    """The process, at a place of our choice."""


@pytest.mark.parametrize("kind", ["labels", "classes"])
def test_whoever_drifts_trains_and_is_scored_on_its_new_data(
    kind: str, tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]
) -> None:
    asked: list[tuple[int, str, int]] = []

    class Watching(LocalEngine):
        def train(self, round: int, clients: Sequence[str]) -> Iterator[Any]:
            jobs: list[Job] = [job for client in clients for job in self.members[client].jobs(round)]
            asked.extend((round, job.client, len(job.examples)) for job in jobs)
            return super().train(round, clients)

    recipe = tiny_recipe("method.name=fedit", *CHANGE, f"drift.kind={kind}", "drift.share=0.5")
    played = play(recipe, Watching)
    data = played.setup.data
    assert len(data.later) == 2
    for round, client, examples in asked:
        own = data.later.get(client, data.splits[client]) if round >= 3 else data.splits[client]
        assert examples == len(own.train)
        assert played.setup.split(client, round) is own
    weights = {client: played.engine.members[client].client.examples for client in data.splits}
    assert weights == {client: len({**data.splits, **data.later}[client].train) for client in data.splits}
    drifted = [line["round"] for line in played.lines if "drift" in line]
    assert drifted == [3]
    assert played.lines[3]["drift"] == list(data.later)
    # What is told of the end is of the end.
    for client, result in played.summary["clients"].items():
        tests = len({**data.splits, **data.later}[client].test)
        assert (result["accuracy"] * tests) == pytest.approx(round_(result["accuracy"] * tests), abs=1e-9)


def round_(value: float) -> int:
    return int(np.rint(value))


def test_the_run_directory_says_who_has_what_when(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(*FOLLOWS, *CHANGE)
    summary = run(recipe, tmp_path / "run")
    _, _, first, later = from_json((tmp_path / "run" / "partition.json").read_text())
    setup = prepare(recipe)
    assert all(np.array_equal(first[c].test, own.test) for c, own in setup.data.splits.items())
    assert all(np.array_equal(later[c].test, own.test) for c, own in setup.data.later.items())
    for client, result in summary["clients"].items():
        assert result["examples"]["test"] == len(later[client].test)
    before, after = (
        safetensors.torch.load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("insight-before", "insight")
    )
    assert before.keys() == after.keys()
    assert not torch.equal(before["weights"], after["weights"])
    own = client_model(tmp_path / "run", "0")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in own.tensors.values())


def test_a_run_that_ends_before_the_change_is_told_of_the_data_it_had(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Here the privacy budget ends it."""
    hidden = ("privacy.unit=client", "privacy.noise=1.0", "privacy.epsilon=8.0")
    recipe = tiny_recipe("method.name=fedit", *hidden, "train.rounds=6", "drift.kind=labels", "drift.round=6")
    summary = run(recipe, tmp_path / "run")
    assert "stopped" in summary
    setup = prepare(recipe)
    assert summary["row"]["rounds"] < 5
    assert any(setup.sizes(client, 6) != setup.sizes(client) for client in setup.clients)
    assert {c: told["examples"] for c, told in summary["clients"].items()} == {c: setup.sizes(c) for c in setup.clients}


def labels_of(setup: Setup, client: str, round: int) -> np.ndarray:
    """Of its training examples."""
    return setup.data.table.labels[setup.split(client, round).train]


def shares(setup: Setup, round: int) -> Tensor:
    """Of each client's training labels in a round, [N, classes]."""
    classes = len(setup.data.table.classes)
    counts = [np.bincount(labels_of(setup, client, round), minlength=classes) for client in setup.data.splits]
    return torch.from_numpy(np.array([count / count.sum() for count in counts]))


def test_weights_follow_the_data_where_sketches_are_refreshed(
    tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]
) -> None:
    """Before the change, and after it, those with the same classes listen to each other most; without a refresh they
    still listen to those they once were like."""
    split = ("data.partition=pathological", "data.classes_per_client=1", "data.clients=8", "seed=3")
    options = ("method.name=celora", "method.similarity=data", "method.components=0", "method.temperature=0.02")
    change = ("train.rounds=4", "drift.kind=labels", "drift.round=3", "drift.share=0.5")

    def alike(setup: Setup, round: int, weights: Tensor) -> float:
        """How much of its weight for others a client gives, on average, to those with its own class."""
        same = shares(setup, round) @ shares(setup, round).T
        others = weights.double() * (1 - torch.eye(len(weights)))
        return float(((same * others).sum(1) / others.sum(1)).mean())

    found = {}
    for refresh in (0, 2):
        played = play(tiny_recipe(*options, *split, *change, f"method.refresh={refresh}"))
        now = shares(played.setup, 4)
        assert bool((now.argmax(1) != shares(played.setup, 1).argmax(1)).any())
        found[refresh] = alike(played.setup, 4, played.rounds.state["weights"])
        before = safetensors.torch.load_file(played.directory.path / "insight-before.safetensors")["weights"]
        assert alike(played.setup, 1, before) > 0.9
    assert found[2] > 0.9 > 0.6 > found[0], found


@pytest.mark.parametrize(
    "overrides",
    [FOLLOWS, ("method.name=folklora", "method.refresh=2", "drift.kind=classes")],
    ids=["celora", "folklora"],
)
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumed_on_either_side_of_the_change_is_as_if_nothing_had_been(
    overrides: Sequence[str],
    stop: int,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    facts: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Round 3 is the first with other data, and the first of a refresh: killed in the rounds 2, 3 and 4."""
    hard = ("train.participation=0.75", "train.failures=0.3", "train.optimizer_state=kept", "faults.corrupt=0.2")
    recipe = tiny_recipe(*CHANGE, *overrides, *hard)
    run(recipe, tmp_path / "whole")
    inner = LocalEngine.train

    def train(self: LocalEngine, round: int, clients: Sequence[str]) -> Iterator[Any]:
        for upload in inner(self, round, clients):
            yield upload
            if round == stop:
                raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "train", train)
        with pytest.raises(Stopped):
            run(recipe, tmp_path / "killed")
    resume(tmp_path / "killed")
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")
    name = "insight-before.safetensors"
    assert (tmp_path / "killed" / name).exists() == (tmp_path / "whole" / name).exists()
    if (tmp_path / "whole" / name).exists():
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_refresh_is_counted_in_its_round_to_the_byte(
    tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]
) -> None:
    plain = play(tiny_recipe(*FOLLOWS, "method.refresh=0", "train.rounds=5"))
    played = play(tiny_recipe(*FOLLOWS, "train.rounds=5"))
    setup = played.setup
    sketches = sum(len(encode(setup.method.sketch(m.client))) for m in played.engine.members.values())
    extra = [line["bytes_up"] - old["bytes_up"] for line, old in zip(played.lines, plain.lines, strict=True)]
    assert extra == [0, 0, 0, sketches, 0, sketches]
    assert [line["bytes_down"] for line in played.lines] == [line["bytes_down"] for line in plain.lines]
    assert [line["round"] for line in played.lines if "refresh" in line] == [3, 5]
    assert all(line["refresh"]["kept"] == {} for line in played.lines if "refresh" in line)
    assert sum(played.lines[3]["refresh"]["bytes_up_clients"].values()) == sketches
    # Where data stay as they are, a refresh changes nothing, and what it costs is known before.
    assert played.row["accuracy_mean"] == plain.row["accuracy_mean"]
    labels, classes = setup.data.table.labels, len(setup.data.table.classes)
    counts = {
        c: torch.from_numpy(np.bincount(labels[s.train], minlength=classes)) for c, s in setup.data.splits.items()
    }
    told = forecast(setup.method, counts, setup.recipe.message)
    assert told.up == played.row["bytes_up_per_client_round"]
    assert told.once == played.row["bytes_once_per_client"]


def test_silent_or_damaged_refreshes_keep_the_old_sketch(
    tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]
) -> None:
    class Torn(LocalEngine):
        def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
            for client, data in super().sketches(clients, round):
                if round and client == "1":
                    continue
                yield client, data[:-5] if round and client == "2" and data else data

    recipe = tiny_recipe(*FOLLOWS, *CHANGE, "train.rounds=3")
    whole, torn = play(recipe), play(recipe, Torn)
    assert list(torn.lines[3]["refresh"]["kept"]) == ["1", "2"]
    assert torn.lines[3]["refresh"]["kept"]["1"] == "did not answer"
    assert torn.lines[3]["participants"] == ["0", "1", "2", "3"]
    old = play(tiny_recipe(*FOLLOWS, *CHANGE, "train.rounds=3", "method.refresh=0"))
    for client in ("0", "1", "2", "3"):
        prefix = f"sketch/{client}/"
        kept, now = ({n: t for n, t in p.rounds.state.items() if n.startswith(prefix)} for p in (torn, whole))
        same = kept.keys() == now.keys() and all(torch.equal(kept[name], now[name]) for name in kept)
        assert same == (client not in {"1", "2"})
    data = {name: p.rounds.state["similarity/data"] for name, p in (("old", old), ("torn", torn), ("whole", whole))}
    assert not torch.equal(data["torn"], data["old"])
    assert not torch.equal(data["torn"], data["whole"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method.name=sketch", *CHANGE), 'drift.round = 3, and method.name = "sketch" plays 0 rounds'),
        (("method.name=fedit", *CHANGE, "drift.round=6"), "allowed: a round that is played"),
        (("method.name=fedit", "method.refresh=2"), "unknown key `method.refresh`"),
        (("method.name=celora", "method.refresh=2", "method.similarity=model"), "and no sketch is sent"),
        (
            ("method.name=celora", "method.refresh=2", "method.components=0", "method.dp_epsilon=1.0"),
            "what is released again is paid for again",
        ),
        ((*FOLLOWS, "secure.kind=ckks"), "refresh = 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    overrides: Sequence[str], message: str, tiny_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(FolkLoraError, match=re.escape(message)) as caught:
        prepare(tiny_recipe(*overrides))
    assert "\n" not in str(caught.value)


def test_members_of_a_network_are_asked_again_and_stay_as_they_are(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, federated: Callable[..., Any]
) -> None:
    """The same numbers as the simulation, also when every order finds a member that was just started."""
    recipe = tiny_recipe(*FOLLOWS, "train.rounds=4")
    summary = run(recipe, tmp_path / "local")
    network = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"kind": "flower", "wait": 0.0})})
    fed = federated(network, rebuild=True)
    found = fed.play()
    accuracy = {client: result["accuracy"] for client, result in summary["clients"].items()}
    assert {client: result["accuracy"] for client, result in found["clients"].items()} == accuracy
    again = [order for order in fed.carrier.orders if order.kind == "sketch" and order.round]
    assert [(order.round, order.base) for order in again] == [(3, 2)] * 4
    lines = [json.loads(line) for line in (tmp_path / "local" / "metrics.jsonl").read_text().splitlines()]
    for name in ("bytes_up_clients", "bytes_down_clients", "validation", "refresh"):
        assert [line.get(name) for line in fed.lines] == [line.get(name) for line in lines]


def test_a_member_that_was_away_at_first_is_known_after_a_refresh(
    tiny_recipe: Callable[..., Recipe], federated: Callable[..., Any]
) -> None:
    recipe = tiny_recipe(*FOLLOWS, "train.rounds=4", "engine.wait=0")
    fed = federated(recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"kind": "flower"})}))
    fed.carrier.away = {"3"}
    carried = fed.carrier.exchange

    def comes_back(orders: Any, deadline: float) -> Any:
        if any(order.round >= 2 for order in orders.values()):
            fed.carrier.away = set()
        return carried(orders, deadline)

    fed.carrier.exchange = comes_back
    fed.play()
    assert fed.lines[0]["failed"] == {"3": "not connected"}
    assert fed.lines[3]["refresh"]["kept"] == {}
    insight = safetensors.torch.load_file(fed.path / "insight.safetensors")
    assert bool((insight["similarity/data"][3, :3] > 0).all())


def test_whoever_has_new_classes_is_told_of_them_once(
    tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]
) -> None:
    """The head goes down where classes are new, in the round of the refresh, and nowhere else."""
    options = ("method.name=folklora", "method.refresh=2", "train.rounds=5")
    change = ("drift.kind=classes", "drift.round=3", "drift.share=0.5")
    played, plain = play(tiny_recipe(*options, *change)), play(tiny_recipe(*options, *change, "method.refresh=0"))
    later = played.setup.data.later
    down = [
        {c: line["bytes_down_clients"].get(c, 0) - old["bytes_down_clients"].get(c, 0) for c in played.rounds.clients}
        for line, old in zip(played.lines, plain.lines, strict=True)
    ]
    for round, each in enumerate(down):
        assert {client for client, more in each.items() if more} == (set(later) if round == 3 else set())
    for client in later:
        joined = set(np.unique(labels_of(played.setup, client, 3))) - set(np.unique(labels_of(played.setup, client, 2)))
        plainly = played.setup.method.typical_reply(2, client).tensors
        head = {"start/head/weight": torch.zeros(4, 32), "start/head/bias": torch.zeros(4)}
        new = {"new/classes": torch.zeros(len(joined), dtype=torch.int32)}
        # What the round before left them with, they had for its validation: it is sent again, with the head.
        assert down[3][client] == len(encode(Message({**plainly, **head, **new})))
    notes = {client: sorted(member.client.notes) for client, member in played.engine.members.items()}
    assert notes == {client: ["renewed/head/bias"] if client in later else [] for client in notes}


def test_a_message_with_other_classes_than_the_task_has_is_refused(
    tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]
) -> None:
    played = play(tiny_recipe("method.name=folklora", "method.refresh=1", "train.rounds=1"))
    member = played.engine.members["0"]
    before = dict(member.client.tensors)
    start = {"start/head/weight": torch.zeros(4, 32), "start/head/bias": torch.zeros(4)}
    for tensors in (
        {**start, "new/classes": torch.tensor([1, 4], dtype=torch.int32)},
        {**start, "new/classes": torch.tensor([-1], dtype=torch.int32)},
        {"new/classes": torch.tensor([1], dtype=torch.int32)},
        {**start, "start/head/weight": torch.zeros(4, 31), "new/classes": torch.tensor([1], dtype=torch.int32)},
    ):
        with pytest.raises(FolkLoraError, match="cannot be used"):
            member.receive(encode(Message(tensors)))
    assert member.client.tensors.keys() == before.keys()
    assert all(torch.equal(member.client.tensors[name], tensor) for name, tensor in before.items())


def test_the_report_tells_of_the_change_and_the_audit_of_sketches_by_themselves(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    run(tiny_recipe(*FOLLOWS, *CHANGE), path)
    write_report(path)
    assert (path / "figures" / "similarity-before.png").exists()
    told = read_run(path)
    assert told.rounds[2].drift == told.clients
    sketches = sum(sum(line.refresh.bytes_up_clients.values()) for line in told.rounds if line.refresh)
    assert sketches > 0
    assert told.once is not None
    rows = {row.kind: row for row in sent(Facts.of(path))}
    assert rows["statistics"].bytes == told.once.bytes_up + sketches
    assert rows["C"].bytes == pytest.approx(sum(line.bytes_up for line in told.rounds) - sketches, abs=1)
    assert rows["statistics"].often == "before the first round, and again after every 2"
    figure = validation(told)
    assert figure is not None
    dotted = [line for line in figure.axes[0].get_lines() if list(line.get_xdata()) == [2.5, 2.5]]
    assert len(dotted) == 1


def test_attacks_look_at_no_data_that_change(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(FolkLoraError, match=re.escape('drift.kind = "labels"')):
        attackable(tiny_recipe(*CHANGE))


@pytest.mark.parametrize("name", sorted(name for name in METHODS if name != "sketch"))
def test_every_method_goes_on_with_new_data(
    name: str, tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]
) -> None:
    """Also with classes that a client had not when its sketch was made; where that says of which shape its uploads are,
    it must follow."""
    refresh = ("method.refresh=1",) if name in {"feddm", "fedaf"} else ()
    recipe = tiny_recipe(f"method.name={name}", "train.rounds=2", "drift.kind=classes", "adapter.rank=2", *refresh)
    played = play(recipe)
    assert [line["failed"] for line in played.lines] == [{}] * len(played.lines)
    assert played.lines[2]["drift"] == list(played.setup.data.later)


def test_newcomers_join_with_the_data_of_the_end(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(*FOLLOWS, *CHANGE, "method.basis=frozen", "newcomers.share=0.5")
    found = run(recipe, tmp_path / "run")
    setup = prepare(recipe)
    assert setup.newcomers
    for client in setup.newcomers:
        tests = len(setup.data.later[client].test)
        right = found["newcomers"]["clients"][client]["accuracy"] * tests
        assert right == pytest.approx(round_(right), abs=1e-6)
        assert found["newcomers"]["clients"][client]["examples"] == setup.sizes(client, 5)
