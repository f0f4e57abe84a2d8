"""Simulated faults: who is struck has not taken part, nothing counts twice or in the wrong round, and it repeats."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora import cli
from folklora.adapters.lowrank import Tensors
from folklora.errors import RecipeError, RunError
from folklora.federation.engine import Engine, Upload
from folklora.federation.faults import FaultyEngine, with_faults
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Silent
from folklora.federation.run import client_model, resume, run
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup
from folklora.recipe import Recipe

Play = Callable[..., Any]
Make = Callable[..., Recipe]
Facts = Callable[[Path], dict[str, Any]]

ROUNDS = "train.rounds=4"
OWED = ("message.top_k=0.2", "message.error_feedback=true")
CASES: dict[str, tuple[str, ...]] = {
    "celora": ("method.name=celora",),
    "fedit": ("method.name=fedit", "train.optimizer_state=kept"),
    "fedit, memory": ("method.name=fedit", *OWED),
    "scaffold": ("method.name=fedit", "method.scaffold=true", "train.optimizer=sgd", "train.lr=0.3"),
    "flora": ("method.name=flora",),
    "fedex": ("method.name=fedex",),
    "local": ("method.name=local",),
}
ALL = ("faults.offline=0.2", "faults.late=0.3", "faults.duplicate=0.3", "faults.corrupt=0.2")


def faulty(setup: Setup) -> Engine:
    return with_faults(LocalEngine(setup), setup.recipe)


def struck(recipe: Recipe, fault: str, rounds: Sequence[int]) -> set[tuple[str, int]]:
    """Whom a fault strikes, as (client, round)."""
    engine = FaultyEngine(None, recipe)  # type: ignore[arg-type]
    clients = [str(i) for i in range(recipe.data.clients)]
    return {(client, round) for client in clients for round in rounds if engine.strikes(fault, client, round)}


class Missing(LocalEngine):
    """The local engine, some of whose clients are not there, or silent, in some rounds."""

    def __init__(self, setup: Setup, silent: set[tuple[str, int]], absent: set[tuple[str, int]] = frozenset()) -> None:
        super().__init__(setup)
        self.silent, self.absent = silent, absent

    def present(self, round: int, clients: Sequence[str], least: int) -> Sequence[str]:
        return [client for client in clients if (client, round) not in self.absent]

    def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
        for client, data in super().sketches(clients, round):
            if data is None or (client, 0) not in self.silent:
                yield client, data

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        return (upload for upload in super().train(round, clients) if (upload.client, round) not in self.silent)


def models(engine: Any) -> dict[str, Tensors]:
    engine = getattr(engine, "engine", engine)
    return {client: member.record() for client, member in engine.members.items()}


def assert_same(one: dict[str, Tensors], other: dict[str, Tensors]) -> None:
    assert one.keys() == other.keys()
    for client, tensors in one.items():
        assert tensors.keys() == other[client].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other[client][name]), (client, name)


def without(line: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(("seconds", *keys))}


def assert_played_alike(one: Any, other: Any, *but: str) -> None:
    """Models, memories, moments, the server's state, scores and lines are the same to the bit, but for some keys."""
    assert_same(models(one.engine), models(other.engine))
    assert_same({"": one.rounds.state}, {"": other.rounds.state})
    assert [without(line, *but) for line in one.lines] == [without(line, *but) for line in other.lines]
    assert without(one.row, *but) == without(other.row, *but)
    assert one.summary["clients"] == other.summary["clients"]


# -- each fault alone --------------------------------------------------------------------------------------------------


def test_faults_repeat_and_have_the_share_asked_for() -> None:
    recipe = Recipe.parse({"data": {"clients": 10}}, ["faults.offline=0.3", "faults.late=0.3", "faults.corrupt=1"])
    engine = FaultyEngine(None, recipe)  # type: ignore[arg-type]
    found = {
        fault: np.array([[engine.strikes(fault, str(c), round) for c in range(10)] for round in range(1, 401)])
        for fault in ("offline", "late", "duplicate", "corrupt")
    }
    assert 0.26 < found["offline"].mean() < 0.34
    assert 0.26 < found["late"].mean() < 0.34
    assert 0.05 < (found["offline"] & found["late"]).mean() < 0.13  # of one another they know nothing
    assert not found["duplicate"].any()
    assert found["corrupt"].all()
    assert with_faults(engine, Recipe()) is engine


@pytest.mark.parametrize("case", CASES)
def test_who_is_late_has_not_taken_part(case: str, tiny_recipe: Make, play: Play) -> None:
    """As if it had been silent; its answer arrives a round later, is counted as traffic, and as nothing else."""
    recipe = tiny_recipe(*CASES[case], ROUNDS, "faults.late=0.4")
    late = struck(recipe, "late", range(5))
    found = play(recipe, faulty)
    reference = play(tiny_recipe(*CASES[case], ROUNDS), lambda setup: Missing(setup, late))
    assert_played_alike(found, reference, "bytes_up", "ignored")
    assert any(round in (1, 2, 3) for _, round in late)
    sizes = {tuple(line["bytes_up_clients"].values()) for line in reference.lines[1:]}
    (size,) = {size for each in sizes for size in each} or {0}
    for before, line, plain in zip(found.lines[1:], found.lines[2:], reference.lines[2:], strict=False):
        arrived = [client for client, round in late if round == before["round"]]
        assert line.get("ignored", {}).get("late", 0) == len(arrived)
        assert line["bytes_up"] - plain["bytes_up"] == size * len(arrived)
        assert {client for client, reason in before["failed"].items() if reason == "did not answer"} == set(arrived)


@pytest.mark.parametrize("case", CASES)
def test_what_comes_twice_counts_once(case: str, tiny_recipe: Make, play: Play) -> None:
    recipe = tiny_recipe(*CASES[case], ROUNDS, "faults.duplicate=0.5")
    twice = struck(recipe, "duplicate", range(1, 5))
    found, reference = play(recipe, faulty), play(tiny_recipe(*CASES[case], ROUNDS))
    assert_played_alike(found, reference, "bytes_up", "bytes_once", "ignored")
    assert sum(line.get("ignored", {}).get("duplicate", 0) for line in found.lines[1:]) == len(twice) > 0
    assert not any(line["failed"] for line in found.lines)
    size = reference.lines[1]["bytes_up"] // 4
    assert sum(line["bytes_up"] for line in found.lines[1:]) == size * (16 + len(twice))


@pytest.mark.parametrize("case", sorted(set(CASES) - {"local"}))  # it sends nothing that could be damaged
def test_what_is_damaged_is_refused(case: str, tiny_recipe: Make, play: Play) -> None:
    recipe = tiny_recipe(*CASES[case], ROUNDS, "faults.corrupt=0.4")
    damaged = struck(recipe, "corrupt", range(5))
    found = play(recipe, faulty)
    reference = play(tiny_recipe(*CASES[case], ROUNDS), lambda setup: Missing(setup, damaged))
    assert_played_alike(found, reference, "bytes_up", "bytes_once", "failed")
    for line, plain in zip(found.lines, reference.lines, strict=True):
        assert list(line["failed"]) == list(plain["failed"])
        assert all("damaged or truncated" in reason or "not a Folk" in reason for reason in line["failed"].values())
    assert any(line["failed"] for line in found.lines[1:])
    assert "ignored" not in found.lines[-1]


@pytest.mark.parametrize("case", ["celora", "fedit, memory"])
def test_who_is_away_is_not_asked(case: str, tiny_recipe: Make, play: Play) -> None:
    settings = (*CASES[case], ROUNDS, "seed=1")
    recipe = tiny_recipe(*settings, "faults.offline=0.4", "engine.wait=0")
    away = struck(recipe, "offline", range(6))
    assert any(round == 0 for _, round in away), "the sketch should miss somebody too"
    found = play(recipe, faulty)
    reference = play(tiny_recipe(*settings), lambda setup: Missing(setup, set(), away))
    assert_played_alike(found, reference)
    for line in found.lines:
        absent = [client for client, round in away if round == line["round"]]
        assert line["failed"] == dict.fromkeys(sorted(absent), "not connected")
        assert not set(absent) & {*line["bytes_up_clients"], *(line["bytes_down_clients"] if line["round"] else ())}
    # After the last round all are asked once more; who is away then has no score.
    missing = sorted(client for client, round in away if round == 5)
    assert missing
    assert found.summary["missing"] == missing
    assert list(found.summary["clients"]) == [client for client in "0123" if client not in missing]
    accuracies = [result["accuracy"] for result in found.summary["clients"].values()]
    assert found.summary["row"]["accuracy_mean"] == pytest.approx(np.mean(accuracies))


def test_waiting_brings_them_back(tiny_recipe: Make, play: Play) -> None:
    """A look a simulated minute: who was seen once is there, and no more looks than are needed."""
    recipe = tiny_recipe(*CASES["fedit"], "faults.offline=0.4", "engine.wait=3600", "engine.min_clients=4")
    found, reference = play(recipe, faulty), play(tiny_recipe(*CASES["fedit"]))
    assert_played_alike(found, reference)
    engine = FaultyEngine(LocalEngine(found.setup), recipe)
    for round in range(1, 6):
        seen = [{c for c in "0123" if not engine.strikes("offline", c, round, look)} for look in range(61)]
        for least in (1, 2, 3, 4):
            together = next(u for n in range(1, 62) if len(u := set().union(*seen[:n])) >= least)
            assert set(engine.present(round, list("0123"), least)) == together
    assert engine.present(1, [], 5) == []


# -- together, and interrupted -----------------------------------------------------------------------------------------


class Interrupted(Exception): ...


class Interrupting(Silent):
    def __init__(self, stop: int) -> None:
        self.stop = stop

    def line(self, metrics: Mapping[str, Any]) -> None:
        if metrics["round"] == self.stop:
            raise Interrupted


@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_is_as_if_nothing_had_been(
    case: str, tiny_recipe: Make, tmp_path: Path, facts: Facts
) -> None:
    """All faults at once; after round 1 a late answer is on its way, and comes first thing after the resume."""
    recipe = tiny_recipe(*CASES[case], ROUNDS, *ALL, "engine.wait=0", "train.failures=0.1", "seed=3")
    run(recipe, tmp_path / "whole")
    whole = facts(tmp_path / "whole")
    ignored = [kind for line in whole["metrics"] for kind in line.get("ignored", {})]
    reasons = {reason[:7] for line in whole["metrics"] for reason in line["failed"].values()}
    assert {"late", "duplicate"} <= set(ignored)
    assert {"not con", "did not"} <= reasons
    assert whole["metrics"][2]["ignored"]["late"] == 1
    for stop in (1, 2, 3) if case == "fedit, memory" else (1,):
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted):
            run(recipe, out, Interrupting(stop))
        resume(out)
        found = facts(out)
        assert found.keys() == whole.keys()
        for key in whole:
            assert found[key] == whole[key], (stop, key)


@pytest.mark.parametrize("case", ["flora", "fedex"])
def test_what_is_added_to_the_frozen_weights_is_added_once(case: str, tiny_recipe: Make, play: Play) -> None:
    """Both give every client the exact mean of what counted: any update that came in twice, or late, would show."""
    found = play(tiny_recipe(*CASES[case], ROUNDS, *ALL, "engine.wait=0"), faulty)
    errors = [line["aggregation_error"] for line in found.lines[1:] if line["aggregation_error"] is not None]
    assert len(errors) >= 3
    assert max(errors) < 1e-5
    log = found.rounds.method.log.total(found.rounds.state)
    for client, member in found.engine.engine.members.items():
        if (reply := found.rounds.method.reply(found.rounds.state, client)) is not None:
            found.rounds.method.receive(member.client, reply)
        for name, total in log.items():
            torch.testing.assert_close(member.client.tensors[name], total, rtol=1e-5, atol=1e-6)


def test_a_run_with_an_answer_on_its_way_can_be_used(tiny_recipe: Make, tmp_path: Path, play: Play) -> None:
    recipe = tiny_recipe(*CASES["fedit"], "train.rounds=1", "faults.late=0.5")
    late = {client for client, round in struck(recipe, "late", [1])}
    assert late
    run(recipe, tmp_path / "run")
    reference = play(recipe, faulty)
    for client in late:
        directory = RunDirectory.open(tmp_path / "run")
        checkpoint = directory.checkpoint()
        assert checkpoint is not None
        assert "late/upload" in directory.tensors(checkpoint, checkpoint.clients[client])
        expected = reference.engine.engine.members[client].client.tensors
        found = client_model(tmp_path / "run", client, tuned=True).tensors
        assert_same({"": found}, {"": expected})


@pytest.mark.parametrize("why", ["late", "corrupt", "failures", "silent"])
def test_who_failed_is_as_it_was(why: str, tiny_recipe: Make, play: Play) -> None:
    """Whatever the reason, its private state is that of the last round it took part in."""
    setting = {"failures": "train.failures=0.5", "silent": "seed=0"}.get(why, f"faults.{why}=0.5")
    recipe = tiny_recipe(*CASES["fedit, memory"], "train.rounds=2", "train.optimizer_state=kept", setting)
    silent = {("1", 2), ("2", 1)} if why == "silent" else set()
    engine = (lambda setup: Missing(setup, silent)) if why == "silent" else faulty
    found = play(recipe, engine)
    directory = found.directory
    before, after = directory.checkpoint(previous=True), directory.checkpoint()
    failed = set(found.lines[2]["failed"])
    assert failed
    assert failed != set("0123")
    for client in "0123":
        one, other = (
            {n: t for n, t in directory.tensors(c, c.clients[client]).items() if not n.startswith("late/")}
            for c in (before, after)
        )
        same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert same == (client in failed)


# -- too few -----------------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a command ended."""

    returncode: int
    stderr: str


Folklora = Callable[..., Ended]


@pytest.fixture
def folklora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Folklora:
    """The command line, in this process: the libraries are loaded."""

    def ran(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["folklora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), capsys.readouterr().err)

    return ran


@pytest.mark.parametrize("fault", ["offline", "late", "corrupt"])
def test_too_few_stop_the_run_and_nothing_is_lost(
    fault: str, tiny_recipe: Make, tmp_path: Path, facts: Facts, folklora: Folklora
) -> None:
    """Every committed round had all clients: when the fault is gone the run ends as if there had been none."""
    settings = (*CASES["fedit, memory"], ROUNDS, "train.optimizer_state=kept", "engine.min_clients=4", "engine.wait=0")
    share = 0.12

    def first(seed: int) -> int:
        found = struck(tiny_recipe(f"seed={seed}", f"faults.{fault}={share}"), fault, range(5))
        return min((round for _, round in found), default=-1)

    seed = next(seed for seed in range(100) if first(seed) == 3)
    recipe = tiny_recipe(*settings, f"seed={seed}", f"faults.{fault}={share}")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    out = tmp_path / "run"
    stopped = folklora("run", tmp_path / "recipe.toml", "--out", out)
    for _ in range(2):  # the simulated weather is the same when it is tried again
        assert stopped.returncode == 2
        (line,) = (line for line in stopped.stderr.splitlines() if line.startswith("error"))
        assert "round 3: " in line
        assert "4 needed (engine.min_clients)" in line
        assert "the run stands as round 2 left it" in line
        assert "Traceback" not in stopped.stderr
        checkpoint = RunDirectory.open(out).checkpoint()
        assert checkpoint is not None
        assert checkpoint.round == 2
        assert [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()][:3] == [0, 1, 2]
        stopped = folklora("resume", out)
    text = (out / "recipe.toml").read_text()
    assert text.count(f"{fault} = {share}") == 1
    (out / "recipe.toml").write_text(text.replace(f"{fault} = {share}", f"{fault} = 0.0"))
    resumed = folklora("resume", out)
    assert resumed.returncode == 0, resumed.stderr
    run(tiny_recipe(*settings, f"seed={seed}"), tmp_path / "clean")
    assert facts(out) == facts(tmp_path / "clean")


def test_nobody_there_at_the_start(tiny_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="round 0: 0 of 4 clients are connected, 1 needed .*; nothing is committed yet"):
        run(tiny_recipe(*CASES["fedit"], "faults.offline=1", "engine.wait=120"), tmp_path / "run")
    text = (tmp_path / "run" / "recipe.toml").read_text()
    (tmp_path / "run" / "recipe.toml").write_text(text.replace("offline = 1.0", "offline = 0.0"))
    assert resume(tmp_path / "run")["row"]["rounds"] == 2


def test_more_than_ever_take_part_is_refused_before_anything(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(*CASES["fedit"], "engine.min_clients=3", "train.participation=0.5")
    with pytest.raises(RecipeError, match=r"engine.min_clients = 3, of 4 clients 2 .*; allowed: at most 2"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("faults.late=1.5", "faults.late = 1.5"),
        ("faults.late=-0.1", "faults.late = -0.1"),
        ("faults.lost=0.1", "unknown key `faults.lost`"),
        ("engine.min_clients=-1", "engine.min_clients = -1"),
        ("engine.deadline=0", "engine.deadline = 0"),
        ("engine.wait=inf", "engine.wait = inf"),
    ],
)
def test_bad_keys(key: str, said: str, tiny_recipe: Make) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(key)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faults_are_not_for_a_real_federation(tiny_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'faults.late = 0.1 with engine.kind = "flower"; allowed: .*"local"'):
        tiny_recipe("engine.kind=flower", "faults.late=0.1")
    with pytest.raises(RecipeError, match=r"train.failures = 0.1 with engine.kind"):
        tiny_recipe("engine.kind=flower", "train.failures=0.1")
    with pytest.raises(RecipeError, match='engine.kind = "flower" .*`folklora serve`'):
        run(tiny_recipe("engine.kind=flower"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
