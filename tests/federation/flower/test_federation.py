"""A federation of real processes on loopback: a server, three members, TLS, keys; killed, interrupted and lied to.

The processes live through the whole file, because each takes seconds to load PyTorch: what one test leaves is where the
next begins, and they run in this order.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

pytest.importorskip("flwr")

from folklora.errors import FederationError, FolkLoraError
from folklora.federation.engine import Upload
from folklora.federation.flower.credentials import init
from folklora.federation.flower.join import Connection, join
from folklora.federation.flower.membership import Federation, Membership
from folklora.federation.flower.processes import free_port
from folklora.federation.flower.serve import serve
from folklora.federation.flower.status import status
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Silent
from folklora.federation.run import play, run
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.privacy.fixedpoint import Grid
from folklora.recipe import Recipe

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")

MEMBERS = ("site-0", "site-1", "site-2")
CLASSES = ("amber", "blue", "cyan", "dun")
DRIVER = Path(__file__).with_name("member_driver.py")
PATIENCE = 240.0
"""Seconds for anything to happen; on an idle machine all of it takes a few."""


class World:
    """A federation's folder, its members' data, and the processes that were started."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model = folder, model
        self.fed, self.cues = folder / "fed", folder / "cues"
        self.cues.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []
        with (data / "train.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["site"] in MEMBERS]
        self.all = self._table("all.csv", rows)
        for name in MEMBERS:
            self._table(f"{name}.csv", [row for row in rows if row["site"] == name])
        self.test = data / "test.csv"
        init(self.fed, list(MEMBERS), "127.0.0.1", free_port())

    def _table(self, name: str, rows: Sequence[Mapping[str, str]]) -> Path:
        with (self.folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label", "site"])
            writer.writeheader()
            writer.writerows(rows)
        return self.folder / name

    def recipe(self, method: str, rounds: int = 2) -> Recipe:
        """As the server has it: it has no rows, but knows the labels."""
        document = {
            "model": {"name": str(self.model), "dtype": "float32"},
            "data": {
                "source": "at-the-members.csv",
                "classes": list(CLASSES),
                "test": str(self.test),
                "partition": "natural",
                "by": "site",
            },
            "adapter": {"rank": 4},
            "method": {"name": method},
            "train": {"rounds": rounds, "batch_size": 8, "lr": 5e-3},
            "engine": {"wait": PATIENCE, "deadline": PATIENCE},
        }
        return Recipe.parse(document)

    def local(self, recipe: Recipe) -> Recipe:
        """The same run, where one process has all rows."""
        return Recipe.parse(recipe.model_dump(), [f"data.source={self.all}"])

    def start(self, log: str, *command: object) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
                preexec_fn=_hears_ctrl_c,
            )
        self.started.append(process)
        return process

    def join(self, member: str) -> subprocess.Popen[bytes]:
        options = ["--federation", self.fed, "--member", member, "--data", self.folder / f"{member}.csv"]
        return self.start(f"{member}.log", DRIVER, self.cues, "join", *options, "--model", self.model)

    def serve(self, recipe: Recipe, out: str) -> subprocess.Popen[bytes]:
        path = self.folder / f"{out}.toml"
        path.write_text(recipe.to_toml())
        arguments = ["serve", path, "--federation", self.fed, "--out", self.folder / out]
        return self.start(f"{out}.log", "-m", "folklora.cli", *arguments)

    def cue(self, member: str, kind: str, round: int, what: str) -> Path:
        path = self.cues / f"{member}.{kind}.{round}"
        path.write_text(what)
        return path

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def lines(self, out: str) -> list[dict[str, Any]]:
        return RunDirectory.open(self.folder / out).metrics()

    def state(self, member: str, out: str, version: int) -> Path:
        """A member's private tensors as a round left them: they are in its own folder, and nowhere else."""
        run_id = json.loads((self.folder / out / "federation.json").read_text())["run"]
        (file,) = (self.fed / "members" / member / "runs" / run_id / "versions").glob(f"{version}-*")
        return file

    def running(self, folder: Path | None = None) -> set[int]:
        """Processes that have anything to do with a folder; default: this one."""
        found = set()
        for process in Path("/proc").iterdir():
            try:
                known = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            except OSError:
                continue
            if os.fsencode(folder or self.folder) in known:
                found.add(int(process.name))
        return found - {os.getpid()}

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


def until(happened: Callable[[], Any], what: str, *processes: subprocess.Popen[bytes]) -> None:
    """Wait for something; not for what a process that has ended can no longer do."""
    end = time.monotonic() + PATIENCE
    while not happened():
        ended = [process.args for process in processes if process.poll() is not None]
        if (ended and not happened()) or time.monotonic() > end:
            pytest.fail(f"{what}: did not happen; ended: {ended}")
        time.sleep(0.05)


def _hears_ctrl_c() -> None:
    """Tests that a shell put in the background (``&``) ignore SIGINT, and so would all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path], tiny_data: Path
) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), tiny_model("bert"), tiny_data)
    yield made
    made.end()
    until(lambda: not made.running(), "no process is left")


@pytest.fixture(scope="module")
def members(world: World) -> dict[str, subprocess.Popen[bytes]]:
    return {name: world.join(name) for name in MEMBERS}


OWN = {"seconds", "aggregation_error", "seconds_train", "seconds_total"}
"""What a network run's metrics and results have otherwise: its own time; and nothing that needs private factors."""


def assert_same(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """The same numbers; floats to 1e-6."""
    assert here.keys() == there.keys()
    for key in here.keys() - OWN:
        if isinstance(here[key], float):
            assert here[key] == pytest.approx(there[key], abs=1e-6), key
        else:
            assert here[key] == there[key], key


def assert_close(mine: Path, other: Path) -> None:
    tensors, others = safetensors.torch.load_file(mine), safetensors.torch.load_file(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-5)


def assert_equals_local(world: World, out: str, recipe: Recipe) -> None:
    """Metrics, adapters, server state and results of a finished network run are those of the local engine."""
    mine, local, last = world.folder / out, world.folder / f"{out}-local", recipe.train.rounds
    expected = run(world.local(recipe), local)
    for here, there in zip(world.lines(out), RunDirectory.open(local).metrics(), strict=True):
        assert_same(here, there)
    for name in MEMBERS:
        assert_close(world.state(name, out, last), local / "clients" / name / f"{last}.safetensors")
    assert_close(mine / "server" / f"{last}.safetensors", local / "server" / f"{last}.safetensors")
    found = json.loads((mine / "summary.json").read_text())
    assert_same(found["row"], expected["row"])
    assert found["clients"] == expected["clients"]


def test_celora_over_tls_equals_the_local_engine(world: World, members: dict[str, subprocess.Popen[bytes]]) -> None:
    recipe = world.recipe("celora")
    server = world.serve(recipe, "celora")
    until(lambda: server.poll() is not None, "the run ends", *members.values())
    assert server.returncode == 0, world.log("celora")
    assert_equals_local(world, "celora", recipe)
    assert not [path for path in (world.folder / "celora" / "clients").rglob("*") if path.stat().st_size > 4096]
    assert not status(world.fed)["up"]


def test_a_newcomer_over_tls_gets_what_the_local_engine_gives_it(
    world: World, members: dict[str, subprocess.Popen[bytes]]
) -> None:
    recipe = Recipe.parse(world.recipe("folklora", rounds=1).model_dump(), ["newcomers.share=0.34"])
    server = world.serve(recipe, "newcomer")
    until(lambda: server.poll() is not None, "the run ends", *members.values())
    assert server.returncode == 0, world.log("newcomer")
    found = json.loads((world.folder / "newcomer" / "summary.json").read_text())
    expected = run(world.local(recipe), world.folder / "newcomer-local")
    assert found["newcomers"]["clients"]
    assert found["newcomers"] == expected["newcomers"]
    assert_same(found["row"], expected["row"])


def test_a_server_killed_and_restarted_ends_with_the_same_numbers(
    world: World, members: dict[str, subprocess.Popen[bytes]]
) -> None:
    recipe = world.recipe("fedit")
    cue = world.cue("site-1", "train", 2, "hang")
    server = world.serve(recipe, "fedit")
    until((world.cues / "site-1.hangs").exists, "round 2 is on its way", server, *members.values())
    server.kill()
    server.wait()
    until(lambda: not world.running(world.fed / "server"), "its SuperLink ends too")
    cue.unlink()
    assert len(world.lines("fedit")) == 2
    path = world.folder / "fedit"
    resumed = world.start("fedit.log", "-m", "folklora.cli", "resume", path, "--federation", world.fed)
    until(lambda: resumed.poll() is not None, "the run ends", *members.values())
    assert resumed.returncode == 0, world.log("fedit")
    assert_equals_local(world, "fedit", recipe)


@pytest.mark.slow
def test_masked_uploads_are_summed_without_the_member_that_was_killed(
    world: World, members: dict[str, subprocess.Popen[bytes]]
) -> None:
    """It has exchanged keys, and the others' uploads are masked with it."""
    recipe = Recipe.parse(world.recipe("fedit", rounds=1).model_dump(), ["secure.kind=masks"])
    cue = world.cue("site-1", "train", 1, "hang")
    (world.cues / "site-1.hangs").unlink(missing_ok=True)
    server = world.serve(recipe, "masked")
    until((world.cues / "site-1.hangs").exists, "site-1 is to train", server, *members.values())
    members["site-1"].kill()
    members["site-1"].wait()
    cue.unlink()
    until(lambda: not world.running(world.fed / "members" / "site-1"), "its SuperNode ends too")
    until(lambda: "helps to open the sum of 2 members" in world.log("site-0"), "round 1 goes on", server)
    members["site-1"] = world.join("site-1")
    until(lambda: server.poll() is not None, "the run ends", *members.values())
    assert server.returncode == 0, world.log("masked")
    line = world.lines("masked")[1]
    assert line["participants"] == ["site-0", "site-2"]
    assert line["failed"] == {"site-1": "no answer: the connection to it was lost"}

    sizes = json.loads((world.folder / "masked" / "partition.json").read_text())["clients"]
    weights = {name: sizes[name]["train"] for name in line["participants"]}
    sent = {name: safetensors.torch.load_file(world.state(name, "masked", 1)) for name in weights}
    off = Grid(8.0, 3, max(sizes[name]["train"] for name in sizes)).error(2, sum(weights.values()))
    summed = safetensors.torch.load_file(world.folder / "masked" / "server" / "1.safetensors")
    assert {name for name in summed if name.startswith("global/A/")}
    for name, tensor in summed.items():
        own = name.replace("global/", "model/", 1)
        mean = sum(w * sent[member][own].double() for member, w in weights.items()) / sum(weights.values())
        torch.testing.assert_close(tensor.double(), mean, rtol=2**-23, atol=off)
    run_id = json.loads((world.folder / "masked" / "federation.json").read_text())["run"]
    for name in MEMBERS:
        (folder,) = (world.fed / "members" / name / "runs").glob(run_id)
        noted = json.loads((folder / "noted.json").read_text())["noted"]
        assert ("opened 1" in noted) == (name in weights)


LIES = {1: "shape", 2: "nan", 3: "truncated", 4: "gigantic", 5: "impostor"}
"""What site-2 does in each round."""
SAID = {1: "shape", 2: "NaN", 3: "truncated", 4: "allowed", 5: "another"}
"""What stands in the metrics of each."""
GONE = {round: {"site-2"} | ({"site-1"} if round == 2 else set()) for round in LIES}


class Failing(LocalEngine):
    """The local engine, without the answers that do not count in the network run."""

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        gone = GONE.get(round, set())
        yield from super().train(round, [client for client in clients if client not in gone])
        for client in gone:
            yield Upload(client, None, failure="in the network run", round=round)


def test_a_liar_and_a_killed_member_harm_nobody_else(world: World, members: dict[str, subprocess.Popen[bytes]]) -> None:
    recipe = world.recipe("fedit", rounds=6)
    for round, lie in LIES.items():
        world.cue("site-2", "train", round, lie)
    hung = world.cue("site-1", "train", 2, "hang")
    held = world.cue("site-0", "score", 2, "hang")  # so that round 3 does not begin before site-1 is back
    world.cue("site-2", "train", 6, "hang")
    (world.cues / "site-1.hangs").unlink(missing_ok=True)
    server = world.serve(recipe, "liar")
    alive = [server, members["site-0"], members["site-2"]]
    until((world.cues / "site-1.hangs").exists, "site-1 trains in round 2", members["site-1"], *alive)
    members["site-1"].kill()
    members["site-1"].wait()
    until(lambda: not world.running(world.fed / "members" / "site-1"), "its SuperNode ends too")
    until((world.cues / "site-0.hangs").exists, "round 2 goes on without it", *alive)
    hung.unlink()

    assert_refused(world)
    members["site-1"] = world.join("site-1")
    until(lambda: connected(world) == set(MEMBERS), "site-1 is back", members["site-1"], *alive)
    held.unlink()
    until((world.cues / "site-2.hangs").exists, "round 6 is on its way", members["site-1"], *alive)

    lines = world.lines("liar")
    setup = prepare(world.local(recipe))
    directory = RunDirectory.create(world.folder / "liar-local", world.local(recipe), "{}")
    play(directory, setup, Failing(setup), Silent())
    for here, there in zip(lines, directory.metrics(), strict=False):
        assert set(here["failed"]) == set(there["failed"]) == GONE.get(here["round"], set())
        compared = ("participants", "train_loss", "validation")
        assert_same(*({key: line[key] for key in compared} for line in (here, there)))
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4, 5]
    for round, what in SAID.items():
        assert what in lines[round]["failed"]["site-2"], lines[round]["failed"]
    assert lines[2]["failed"]["site-1"] == "no answer: the connection to it was lost"
    for name in ("site-0", "site-1"):
        assert_close(world.state(name, "liar", 5), world.folder / "liar-local" / "clients" / name / "5.safetensors")


def connected(world: World) -> set[str]:
    return {name for name, member in status(world.fed)["members"].items() if member["connected"]}


def assert_refused(world: World) -> None:
    """While the server is up: whoever is no member, whoever is no server, and who is both twice."""
    until(lambda: connected(world) == {"site-0", "site-2"}, "who is there is noted")
    now = status(world.fed)
    assert now["up"]
    assert (now["round"], now["rounds"], now["finished"]) == (1, 6, False)
    with pytest.raises(FederationError, match="another process serves this federation"):
        serve(world.recipe("fedit"), world.fed, world.folder / "second")
    with pytest.raises(FolkLoraError, match="another process works for this member"):
        join(world.fed, "site-0")
    with pytest.raises(FederationError, match="--data nowhere.csv: no such file"):
        join(world.fed, "site-1", data="nowhere.csv")

    port = Federation.open(world.fed).port
    other = init(world.folder / "other", list(MEMBERS), "127.0.0.1", port)
    assert "not the server of this federation" in turned_away(Membership.read(other.folder, "site-1"))
    stranger = world.folder / "stranger"
    shutil.copytree(other.member_folder("site-1"), stranger)
    shutil.copy(world.fed / "ca.crt", stranger)
    assert "does not know the key of member 'site-1'" in turned_away(Membership.read(stranger))


def turned_away(membership: Membership) -> str:
    """Why a member is not let in."""
    with closing(Connection(membership)) as connection:
        try:
            until(lambda: connection.attend() and connection.greeted, "it is let in")
        except FederationError as error:
            return str(error)
    return "it was let in"


def test_ctrl_c_stops_everything(world: World, members: dict[str, subprocess.Popen[bytes]]) -> None:
    (server,) = (process for process in world.started if process.poll() is None and "serve" in process.args)
    for process, log in ((server, "liar"), *((members[name], name) for name in MEMBERS)):
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130, world.log(log)
        assert world.log(log).splitlines()[-1].startswith("stopped; ")
    until(lambda: not world.running(), "no process is left")
    assert not status(world.fed)["up"]
    assert [line["round"] for line in world.lines("liar")] == [0, 1, 2, 3, 4, 5]
