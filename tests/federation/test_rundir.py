"""The run directory alone: commits are whole or not at all, damage is noticed, one round is always kept."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.adapters.lowrank import Tensors
from folklora.errors import RunError
from folklora.federation.rundir import Checkpoint, RunDirectory
from folklora.recipe import Recipe

CLIENTS = ("0", "1", "2")


def tensors(value: float) -> Tensors:
    return {"model/A/x": torch.full((3, 4), value), "moments/steps": torch.tensor(int(value))}


def commit(run: RunDirectory, round: int, clients: tuple[str, ...] = CLIENTS, **more: Any) -> Checkpoint:
    """Round ``round``, in which the given clients changed to the round's number."""
    return run.commit(
        run.checkpoint(),
        round,
        {client: tensors(round) for client in clients},
        {"global/A/x": torch.full((2,), float(round))},
        {"round": round, "note": "x" * round},
        delivered=dict.fromkeys(clients, str(round)),
        **more,
    )


def check(run: RunDirectory, round: int, last_change: dict[str, int] | None = None) -> None:
    """The run stands at ``round``: every tensor, every line, and nothing else under its folders."""
    checkpoint = run.checkpoint()
    assert checkpoint is not None
    assert checkpoint.round == round
    for client, changed in (last_change or dict.fromkeys(CLIENTS, round)).items():
        found = run.tensors(checkpoint, checkpoint.clients[client])
        assert torch.equal(found["model/A/x"], torch.full((3, 4), float(changed)))
    assert torch.equal(run.tensors(checkpoint, checkpoint.server)["global/A/x"], torch.full((2,), float(round)))
    assert [line["round"] for line in run.metrics()] == list(range(round + 1))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", Recipe(), "{}")


def files(run: RunDirectory) -> set[str]:
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}


# -- committing --------------------------------------------------------------------------------------------------------


def test_a_commit_comes_back(run: RunDirectory) -> None:
    assert run.checkpoint() is None
    assert run.metrics() == []
    commit(run, 0)
    commit(run, 1, ("0", "2"))
    again = RunDirectory.open(run.path)
    check(again, 1, {"0": 1, "1": 0, "2": 1})
    assert again.recipe == Recipe()
    assert again.checkpoint() == run.checkpoint()


def test_only_what_a_kept_checkpoint_names_stays(run: RunDirectory) -> None:
    for round in range(4):
        commit(run, round, CLIENTS if round == 0 else ("0",), best_round=1 if round >= 1 else None)
    (run.path / "clients" / "0" / ".9.safetensors.part").write_bytes(b"left by a killed process")
    commit(run, 4, ("0",), best_round=1)
    assert {name for name in files(run) if name.startswith(("clients", "server"))} == {
        "clients/0/1.safetensors",  # the best round's
        "clients/0/3.safetensors",  # the previous round's
        "clients/0/4.safetensors",
        "clients/1/0.safetensors",
        "clients/2/0.safetensors",
        "server/1.safetensors",
        "server/3.safetensors",
        "server/4.safetensors",
    }
    best = run.checkpoint(best=True)
    assert best is not None
    assert best.round == 1
    assert float(run.tensors(best, best.clients["0"])["model/A/x"][0, 0]) == 1
    with pytest.raises(RunError, match="no such file|No such file"):
        run.tensors(best, "clients/0/2.safetensors")


def test_who_steps_back_behind_the_best_round_finds_the_best_before(run: RunDirectory) -> None:
    for round, best in enumerate([None, 1, 1, 3]):
        commit(run, round, ("0", "1", "2"), best_round=best)
    run.step_back()
    commit(run, 3, ("0", "1"), best_round=1)  # what was the best is not, this time
    for round in (4, 5):
        best_then = run.checkpoint(best=True)
        assert best_then is not None
        assert best_then.round == 1
        for name in (best_then.server, *best_then.clients.values()):
            run.tensors(best_then, name)
        assert {kept.round for kept in run.kept()} == {round - 1, round - 2 if round > 4 else 2, 1}
        commit(run, round, ("0",), best_round=1)


def test_a_best_round_that_was_never_committed_is_none(run: RunDirectory) -> None:
    for round, best in enumerate([None, 1, 1, 3]):
        commit(run, round, best_round=best)
    before = (run.path / "checkpoint-previous.json").read_bytes()
    (run.path / "checkpoint.json").write_bytes(before)  # killed between the best's file and the commit
    best_then = run.checkpoint(best=True)
    assert best_then is not None
    assert best_then.round == 1


def test_a_best_round_that_is_damaged_is_not_passed_over(run: RunDirectory) -> None:
    for round, best in enumerate([None, 1, 1]):
        commit(run, round, best_round=best)
    (run.path / "checkpoint-best.json").write_text("{}")
    with pytest.raises(RunError, match="checkpoint-best.json is not that of the best round, 1; round 1 is kept"):
        run.checkpoint(best=True)


def test_safetensors_and_json_only(run: RunDirectory) -> None:
    commit(run, 0)
    commit(run, 1)
    assert {Path(name).suffix for name in files(run)} <= {".safetensors", ".json", ".jsonl", ".toml"}


NASTY = ["..", ".", "a/b", "../../x", "é", "%2E%2E", "A b", "x.y", "con", "a\\b", "\x00", "\n", "🦊", "-", "a" * 80]


def test_any_client_id_has_a_file_of_its_own(run: RunDirectory) -> None:
    first = run.commit(
        None,
        0,
        {client: tensors(i) for i, client in enumerate(NASTY)},
        {},
        {"round": 0},
        delivered={},
    )
    run.commit(first, 1, {}, {}, {"round": 1}, delivered={})  # sweeps
    checkpoint = run.checkpoint()
    assert checkpoint is not None
    for i, client in enumerate(NASTY):
        name = checkpoint.clients[client]
        assert Path(name).parent.parent == Path("clients")
        assert int(run.tensors(checkpoint, name)["moments/steps"]) == i
    outside = {path.name for path in run.path.parent.iterdir()}
    assert outside == {"run"}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), unique=True, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_ids_never_share_a_file(run: RunDirectory, ids: list[str]) -> None:
    written = run.commit(None, 0, {client: tensors(0) for client in ids}, {}, {"round": 0}, delivered={})
    assert len(set(written.clients.values())) == len(ids)


# -- killed in the middle ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as SIGKILL for the code under test: nothing of ours may catch it and go on."""


@contextlib.contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[list[str]]:
    """Changes to the disk are counted; the one numbered ``count`` does not happen, and nothing after it does.

    A file that is opened for writing is a change too: killed there, it is empty.
    """
    happened: list[str] = []

    def change(name: str) -> None:
        if len(happened) >= count:
            raise Killed
        happened.append(name)

    def guard(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            change(name)
            return original(*args, **kwargs)

        patch.setattr(owner, name, replacement)

    opened = Path.open

    def opening(path: Path, mode: str = "r", **kwargs: Any) -> Any:
        file = opened(path, mode, **kwargs)
        if set(mode) & set("wax+"):
            with contextlib.ExitStack() as left_open:
                left_open.callback(file.close)
                change("open")
                left_open.pop_all()
        return file

    with monkeypatch.context() as patch:
        for owner, name in ((os, "sync"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
            guard(owner, name)
        patch.setattr(Path, "open", opening)
        with contextlib.suppress(Killed):
            yield happened


def test_a_kill_at_any_change_leaves_the_round_before_or_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exhaustive: a commit is killed before its first change to the disk, its second, ... until it gets through."""
    outcomes = []
    for count in range(200):
        run = RunDirectory.create(tmp_path / str(count), Recipe(), "{}")
        for round in range(3):
            commit(run, round, best_round=1 if round else None)
        with killed_at(monkeypatch, count) as happened:
            commit(run, 3, ("0", "1"), best_round=3)
            happened.append("done")
        again = RunDirectory.open(run.path)
        checkpoint = again.checkpoint()
        assert checkpoint is not None
        outcomes.append(checkpoint.round)
        check(again, checkpoint.round, {"0": 3, "1": 3, "2": 2} if checkpoint.round == 3 else None)
        previous = again.checkpoint(previous=True)
        assert previous is not None
        for name in (previous.server, *previous.clients.values()):
            again.tensors(previous, name)
        # And the run goes on from there as if nothing had been.
        for round in range(checkpoint.round + 1, 5):
            commit(again, round, ("0", "1"), best_round=3)
        check(again, 4, {"0": 4, "1": 4, "2": 2})
        expected = {"server/3.safetensors", "server/4.safetensors"}
        assert {name for name in files(again) if name.startswith("server")} == expected
        if happened[-1:] == ["done"]:
            break
    assert sorted(outcomes) == outcomes
    assert set(outcomes) == {2, 3}
    assert len(outcomes) > 10


def test_a_kill_while_a_run_is_created_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in range(50):
        path = tmp_path / str(count)
        with killed_at(monkeypatch, count) as happened:
            RunDirectory.create(path, Recipe(), "{}")
            happened.append("done")
        with contextlib.suppress(RunError):  # refused if it was created after all
            RunDirectory.create(path, Recipe(), "{}")
        commit(RunDirectory.open(path), 0)
        check(RunDirectory.open(path), 0)
        if happened[-1:] == ["done"]:
            return
    raise AssertionError("never created")


# -- damage ------------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "emptied":
            path.write_bytes(b"")
        case "flipped":
            changed = bytearray(data)
            changed[len(data) // 2] ^= 1
            path.write_bytes(bytes(changed))
        case "removed":
            path.unlink()
        case "garbage":
            path.write_bytes(b"\xff\x00 no such thing")


DAMAGE = ("truncated", "emptied", "flipped", "removed", "garbage")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["clients/1/2.safetensors", "server/2.safetensors", "metrics.jsonl"])
def test_a_damaged_file_is_noticed_and_the_round_before_is_kept(run: RunDirectory, name: str, how: str) -> None:
    for round in range(3):
        commit(run, round)
    if name == "metrics.jsonl" and how != "removed":  # what rots is the last round's line: the others are still there
        whole = (run.path / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        (run.path / "line").write_bytes(lines[-1])
        damage(run.path / "line", how)
        (run.path / name).write_bytes(b"".join(lines[:-1]) + (run.path / "line").read_bytes())
    else:
        damage(run.path / name, how)
    with pytest.raises(RunError) as caught:
        check(run, 2)
    message = str(caught.value)
    assert str(run.path / name) in message
    assert f"round 1 is kept: `folklora resume {run.path} --previous`" in message
    assert "\n" not in message
    run.step_back()
    if not (name == "metrics.jsonl" and how == "removed"):
        check(run, 1)
        commit(run, 2)
        check(run, 2)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_noticed(run: RunDirectory, how: str) -> None:
    for round in range(3):
        commit(run, round)
    damage(run.path / "checkpoint.json", how)
    if how == "removed":
        # Without it nothing says that a round was ever committed; but the one before is there and is not thrown away.
        with pytest.raises(RunError, match="checkpoint.json is missing; round 1 is kept"):
            run.checkpoint()
    else:
        with pytest.raises(RunError, match=r"checkpoint.json cannot be read .*; round 1 is kept: .*--previous"):
            run.checkpoint()
    run.step_back()
    check(run, 1)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", "{}", '{"round": 1}', '"x"', '{"sha256": null}', "{" * 500, "\ufeff{}"]
)
def test_a_checkpoint_that_is_json_but_no_checkpoint(run: RunDirectory, text: str) -> None:
    for round in range(2):
        commit(run, round)
    (run.path / "checkpoint.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"checkpoint.json cannot be read .*round 0 is kept"):
        run.checkpoint()


def test_one_changed_digit_in_the_checkpoint_is_noticed(run: RunDirectory) -> None:
    commit(run, 0)
    text = (run.path / "checkpoint.json").read_text()
    (run.path / "checkpoint.json").write_text(text.replace('"round": 0', '"round": 7', 1))
    with pytest.raises(RunError, match="not what was committed.*no earlier round is kept"):
        run.checkpoint()
    with pytest.raises(RunError, match="no earlier round is kept"):
        run.step_back()


def test_both_checkpoints_damaged(run: RunDirectory) -> None:
    for round in range(2):
        commit(run, round)
    for name in ("checkpoint.json", "checkpoint-previous.json"):
        (run.path / name).write_text("{")
    with pytest.raises(RunError, match="no earlier round is kept"):
        run.checkpoint()
    with pytest.raises(RunError, match="checkpoint-previous.json cannot be read"):
        run.step_back()


def test_stepping_back_twice_stays(run: RunDirectory) -> None:
    for round in range(3):
        commit(run, round)
    assert run.step_back().round == 1
    assert run.step_back().round == 1
    check(run, 1)


# -- refusals of the disk ----------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_directory_is_refused(run: RunDirectory) -> None:
    with pytest.raises(RunError, match="already holds a run; use `folklora resume"):
        RunDirectory.create(run.path, Recipe(seed=1), "{}")
    assert run.recipe.seed == 0


@pytest.mark.parametrize(
    "name", ["server/app.py", "clients/list.csv", "summary.json", "metrics.jsonl", "checkpoint.json"]
)
def test_somebody_elses_files_are_neither_swept_nor_trusted(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is there already and belongs to no run; use another --out"):
        RunDirectory.create(tmp_path, Recipe(), "{}")
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    commit(RunDirectory.create(tmp_path, Recipe(), "{}"), 0)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path(__file__), Path(__file__) / "below"):
        with pytest.raises(RunError, match="not a run directory"):
            RunDirectory.open(path)


@pytest.mark.parametrize("where", [Path(__file__), Path(__file__) / "run", Path("/proc/run"), Path("/dev/null/run")])
def test_a_place_that_cannot_be_written(where: Path) -> None:
    with pytest.raises(RunError, match="cannot be written") as caught:
        RunDirectory.create(where, Recipe(), "{}")
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_what_was_committed(run: RunDirectory) -> None:
    """A limit on file sizes stands in for the full disk: writes fail half done."""
    for round in range(2):
        commit(run, round)
    before = {name: (run.path / name).read_bytes() for name in files(run)}
    code = f"""
import resource
import torch
from folklora.errors import RunError
from folklora.federation.rundir import RunDirectory
run = RunDirectory.open({str(run.path)!r})
big = {{"model/A/x": torch.zeros(1000)}}
before = run.checkpoint()
for limit in (0, 100, 250, 1000):
    for tensors in ({{"0": big}}, {{}}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        try:
            run.commit(before, 2, tensors, {{}}, {{"round": 2, "long": "x" * 1000}}, delivered={{}})
        except RunError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    messages = found.stdout.splitlines()
    assert len(messages) == 8
    assert all("cannot be written: File too large; what was committed is untouched" in line for line in messages)
    metrics = before["metrics.jsonl"]
    assert (run.path / "metrics.jsonl").read_bytes().startswith(metrics)  # a line that was cut short may follow
    (run.path / "metrics.jsonl").write_bytes(metrics)
    assert {name: (run.path / name).read_bytes() for name in before} == before
    check(run, 1)
    commit(run, 2)
    check(run, 2)


# -- one process at a time ---------------------------------------------------------------------------------------------


def test_a_second_process_is_refused(run: RunDirectory) -> None:
    for round in range(3):
        commit(run, round)
    code = (
        "import sys; from folklora.federation.rundir import RunDirectory\n"
        f"with RunDirectory.open({str(run.path)!r}).locked():\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is running this run"), run.locked():
            pass
        with pytest.raises(RunError, match="another process is running this run"):
            run.step_back()
        check(run, 2)
        other.kill()
    with run.locked():  # a killed process holds nothing
        pass
    run.step_back()
    check(run, 1)


def test_the_lock_does_not_hide_what_goes_wrong_inside(run: RunDirectory) -> None:
    """An OSError of ours is our mistake, not an unwritable directory."""
    with pytest.raises(FileNotFoundError), run.locked():
        Path("/nowhere/at/all").read_bytes()
