"""Kill -9 at any moment, then resume: the same numbers and the same adapters, bit for bit, as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from folklora.errors import FolkLoraError, RecipeError, RunError
from folklora.federation import setup
from folklora.federation.handover import export
from folklora.federation.rounds import Silent
from folklora.federation.run import client_models, resume, run
from folklora.federation.rundir import RunDirectory
from folklora.recipe import Recipe

Facts = Callable[[Path], dict[str, Any]]

HARD = ("train.rounds=4", "train.participation=0.5", "train.failures=0.3", "train.optimizer_state=kept")
CASES: dict[str, tuple[str, ...]] = {
    "celora": ("adapter.dropout=0.1", "adapter.rank=[2, 4, 3, 4]"),
    "fedit": ("adapter.norm=true", "message.dtype=float16"),
    "fedsa": ("privacy.unit=example", "privacy.noise=0.7", "adapter.dropout=0.1"),
    "folklora": ("train.schedule=cosine", "train.warmup=0.2", "message.top_k=0.2", "message.error_feedback=true"),
    "rolora": ("train.patience=2", "train.optimizer=sgd", "train.momentum=0.9"),
    "ditto": ("method.fedopt=yogi", "method.proximal=0.1"),
    "ffa": ("method.scaffold=true", "train.optimizer=sgd", "train.lr=0.3"),
    "flora": ("faults.offline=0.3", "faults.late=0.4", "faults.duplicate=0.3", "faults.corrupt=0.2"),
}


def carry_out(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, str]]:
    """The jobs of a plan in `crash_driver.py`."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("crash_driver.py")), str(plan)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=folder, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(lines) == len(jobs), found.stderr[-3000:]
    return lines


def kill_and_resume(recipes: dict[str, Recipe], points: Sequence[float], folder: Path, facts: Facts) -> None:
    """Each recipe once undisturbed, and once a point: killed there, killed again later, then resumed to its end."""
    jobs: list[dict[str, Any]] = []
    for name, recipe in recipes.items():
        path = folder / f"{name}.toml"
        path.write_text(recipe.to_toml())
        jobs.append({"recipe": str(path), "out": str(folder / f"{name}-whole"), "kill": None})
    for name in recipes:
        for point in points:
            # The second kill comes after as many events of the resumed run, if it has so many.
            kills = (point, point / 2, None)
            jobs += [
                {"recipe": str(folder / f"{name}.toml"), "out": str(folder / f"{name}-{point}"), "kill": kill}
                for kill in kills
            ]
    killed_in = set()
    for line, job in zip(carry_out(jobs, folder), jobs, strict=True):
        assert line["ended"] in (("0",) if job["kill"] is None else ("killed", "0")), line
        if line["ended"] == "killed":
            killed_in.add(line["said"])
    assert killed_in >= {"finish", "replace"}
    for name in recipes:
        expected = facts(folder / f"{name}-whole")
        for point in points:
            found = facts(folder / f"{name}-{point}")
            assert found.keys() == expected.keys(), (name, point)
            for key in expected:
                assert found[key] == expected[key], (name, point, key)


def hard_recipe(tiny_recipe: Callable[..., Recipe], name: str) -> Recipe:
    return tiny_recipe(f"method.name={name}", *HARD, *CASES[name])


def test_killed_and_resumed_is_as_if_nothing_had_been(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, facts: Facts
) -> None:
    recipes = {name: hard_recipe(tiny_recipe, name) for name in CASES}
    kill_and_resume(recipes, (0.13, 0.44, 0.98), tmp_path, facts)


def test_killed_and_resumed_with_words_and_with_pictures(
    speaking: Callable[..., Recipe],
    seeing_model: Callable[[str], Path],
    coloured: Path,
    tmp_path: Path,
    facts: Facts,
) -> None:
    """Answers are written at the end, and what a tower without adapters says of a picture is computed once."""
    written = ("eval.generate=['rouge_l']", "eval.max_new_tokens=4", "eval.examples=3", "adapter.dropout=0.1")
    document = {
        "model": {"name": str(seeing_model("clip")), "task": "image-text", "template": "{}", "dtype": "float32"},
        "data": {"source": str(coloured), "clients": 4, "alpha": 1.0, "image": "image"},
        "adapter": {"rank": 4, "tower": "image"},
    }
    recipes = {
        "words": speaking("method.name=celora", *HARD, *written),
        "pictures": Recipe.parse({**document, "method": {"name": "celora"}}, HARD),
    }
    kill_and_resume(recipes, (0.21, 0.6, 0.97), tmp_path, facts)


def test_killed_while_the_last_round_is_tidied_up(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("method.name=fedit")
    run(recipe, tmp_path / "whole")

    class Killed(Exception): ...

    sweep = RunDirectory.sweep

    def killed(self: RunDirectory) -> None:
        if (last := self.checkpoint()) is not None and last.round == recipe.train.rounds:
            raise Killed
        sweep(self)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "sweep", killed)
        with pytest.raises(Killed):
            run(recipe, tmp_path / "killed")
    resume(tmp_path / "killed")
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_event_of_a_run(
    name: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path, facts: Facts
) -> None:
    """There are about a hundred."""
    points = [i / 120 for i in range(1, 120)]
    kill_and_resume({name: hard_recipe(tiny_recipe, name)}, points, tmp_path, facts)


def test_the_command_line_killed_by_somebody_else(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, facts: Facts
) -> None:
    """A real ``folklora run``, SIGKILL from outside in the middle of a round, ``folklora resume``."""
    recipe = tiny_recipe("method.name=folklora", *HARD, "train.rounds=6", "train.local_epochs=4")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    run(recipe, tmp_path / "whole")
    out = tmp_path / "killed"
    folklora = [sys.executable, "-m", "folklora.cli"]
    process = subprocess.Popen(
        [*folklora, "run", str(tmp_path / "recipe.toml"), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(0.03)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    found = subprocess.run([*folklora, "resume", str(out)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert facts(out) == facts(tmp_path / "whole")


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_data: Path) -> Path:
    """A finished run of a FedIT recipe over a copy of the data, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_data, folder / "data")
    document = {
        "model": {"name": str(tiny_model("bert")), "dtype": "float32"},
        "data": {"source": str(folder / "data"), "clients": 4, "alpha": 1.0},
        "adapter": {"rank": 4},
        "method": {"name": "fedit"},
        "train": {"rounds": 3, "batch_size": 8, "participation": 0.5},
    }
    run(Recipe.parse(document), folder / "run")
    return folder / "run"


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run as a kill right before the summary was written would leave it."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    (path / "summary.json").unlink()
    return path


def refusal(path: Path, error: type[FolkLoraError] = RunError) -> str:
    with pytest.raises(error) as caught:
        resume(path)
    assert "\n" not in str(caught.value)
    assert not (path / "summary.json").exists()
    return str(caught.value)


def test_a_finished_run_gives_its_summary_back(finished: Path, facts: Facts) -> None:
    before = facts(finished)
    summary = resume(finished)
    assert summary == json.loads((finished / "summary.json").read_text())
    assert facts(finished) == before


def test_resuming_right_before_the_summary(stopped: Path, finished: Path, facts: Facts) -> None:
    resume(stopped)
    assert facts(stopped) == facts(finished)


@pytest.mark.parametrize("where", ["checkpoint.json", "server", "clients", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
def test_damage_costs_one_round(where: str, how: str, stopped: Path, finished: Path, facts: Facts) -> None:
    path = stopped / where
    if path.is_dir():
        path = max(path.rglob("*.safetensors"), key=lambda file: int(file.stem))
        assert path.stem == "3"
    data = bytearray(path.read_bytes())
    match how:
        case "flipped":
            data[-10] ^= 4
            path.write_bytes(data)
        case "truncated":
            path.write_bytes(data[:-20])
        case "removed":
            path.unlink()
    message = refusal(stopped)
    assert str(path) in message
    assert f"round 2 is kept: `folklora resume {stopped} --previous`" in message
    if (where, how) == ("metrics.jsonl", "removed"):  # the history is gone with it
        assert str(path) in refusal(stopped)
        return
    resume(stopped, previous=True)
    assert facts(stopped) == facts(finished)


@pytest.mark.parametrize("content", [None, b"\xff", b"", b'{"a": 1}'])
def test_a_damaged_partition(content: bytes | None, stopped: Path) -> None:
    if content is None:
        (stopped / "partition.json").unlink()
    else:
        (stopped / "partition.json").write_bytes(content)
    assert "partition.json" in refusal(stopped)


@pytest.mark.parametrize("content", [b"\xff", b"seed = ", b"[train]\nrouds = 3"])
def test_a_damaged_recipe(content: bytes, stopped: Path) -> None:
    (stopped / "recipe.toml").write_bytes(content)
    assert str(stopped / "recipe.toml") in refusal(stopped, RecipeError)


def test_a_damaged_summary(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    (path / "summary.json").write_bytes(b"{")
    with pytest.raises(RunError, match=r"summary\.json cannot be read"):
        resume(path)


@pytest.mark.parametrize("change", ["a label", "a word", "a row less", "the order"])
def test_data_that_changed_under_a_run_is_refused(change: str, stopped: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    text = (stopped / "recipe.toml").read_text().replace(str(finished.parent / "data"), str(tmp_path / "data"))
    (stopped / "recipe.toml").write_text(text)
    path = tmp_path / "data" / "train.csv"
    header, first, second, *rest = path.read_text().splitlines()
    words, label, site = first.split(",")
    other = "blue" if label != "blue" else "cyan"
    changed = {
        "a label": [f"{words},{other},{site}", second, *rest],
        "a word": [f"{words} w1,{label},{site}", second, *rest],
        "a row less": [second, *rest],
        "the order": [second, first, *rest],
    }[change]
    path.write_text("\n".join([header, *changed]) + "\n")
    assert "the data is not what this run started with" in refusal(stopped)
    with pytest.raises(RunError, match="the data is not what this run started with"):
        client_models(stopped)


def test_models_are_handed_on_where_the_data_is_not(finished: Path, tmp_path: Path) -> None:
    """A run that was moved to another machine: nothing but its own folder and the backbone is read."""
    moved, here = tmp_path / "moved", client_models(finished)
    shutil.copytree(finished, moved)
    text = (moved / "recipe.toml").read_text()
    (moved / "recipe.toml").write_text(text.replace(str(finished.parent / "data"), str(tmp_path / "nowhere")))
    with pytest.raises(FolkLoraError, match="nowhere"):
        client_models(moved)
    there = client_models(moved, rows=False)
    assert list(there) == list(here)
    for client, model in there.items():
        assert model.rank == here[client].rank
        assert set(model.tensors) == set(here[client].tensors)
        assert all(torch.equal(tensor, here[client].tensors[name]) for name, tensor in model.tensors.items())
    for tuned in (False, True):
        export(moved, "1", tmp_path / f"adapter-{tuned}", tuned=tuned)
        assert (tmp_path / f"adapter-{tuned}" / "adapter_config.json").exists()
    (moved / "partition.json").write_text("{}")
    with pytest.raises(RunError, match=r"moved: partition\.json: fingerprint"):
        client_models(moved, rows=False)


def test_data_that_changed_within_a_process_is_read_again(stopped: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    recipe = Recipe.read(stopped / "recipe.toml", [f"data.source={tmp_path / 'data' / 'train.csv'}"])
    before = setup.prepare(recipe)
    assert setup.prepare(recipe).data is before.data  # read once
    lines = (tmp_path / "data" / "train.csv").read_text().splitlines()
    (tmp_path / "data" / "train.csv").write_text("\n".join(lines[:-3]) + "\n")
    assert len(setup.prepare(recipe).data.table) == len(before.data.table) - 3


def test_two_processes_on_one_run(stopped: Path, finished: Path, facts: Facts) -> None:
    with RunDirectory.open(stopped).locked():
        assert "another process is running this run" in refusal(stopped)
        with pytest.raises(RunError, match="another process"):
            resume(stopped, previous=True)
    resume(stopped)
    assert facts(stopped) == facts(finished)


def test_a_run_is_not_started_where_one_is(finished: Path, tiny_recipe: Callable[..., Recipe], facts: Facts) -> None:
    before = facts(finished)
    with pytest.raises(RunError, match="already holds a run"):
        run(tiny_recipe("method.name=local"), finished)
    assert facts(finished) == before


# -- disks -------------------------------------------------------------------------------------------------------------


def full_from(metrics: Path, strike: int) -> Callable[[Path, Path], Path]:
    """A rename that fails for good, the ``strike``-th time after two lines of metrics were written."""
    original, seen = Path.replace, iter(range(10**6))

    def replace(path: Path, target: Path) -> Path:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2 and next(seen) >= strike:
            raise OSError(28, "No space left on device")
        return original(path, target)

    return replace


def test_a_disk_that_fills_up_costs_nothing(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC from the third round on, wherever in the commit it strikes; when there is room again, it goes on."""
    recipe = tiny_recipe("method.name=folklora", "train.rounds=4")
    run(recipe, tmp_path / "whole")
    for strike in range(0, 12, 3):
        out = tmp_path / f"full-{strike}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full_from(out / "metrics.jsonl", strike))
            with pytest.raises(RunError, match="No space left on device; what was committed is untouched") as caught:
                run(recipe, out)
        assert "\n" not in str(caught.value)
        assert not list(out.rglob("*.part"))
        checkpoint = RunDirectory.open(out).checkpoint()
        assert checkpoint is not None
        resume(out)
        assert facts(out) == facts(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tiny_recipe: Callable[..., Recipe], tmp_path: Path, facts: Facts) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    recipe = tiny_recipe("method.name=fedit", "train.rounds=3")
    ballast = disk / "ballast"

    class Filling(Silent):
        """Leaves no room on the disk once a round is committed."""

        def line(self, metrics: Mapping[str, Any]) -> None:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1000))

    try:
        with pytest.raises(RunError, match="No space left on device"):
            run(recipe, disk / "run", Filling())
        checkpoint = RunDirectory.open(disk / "run").checkpoint()
        assert checkpoint is not None
        assert checkpoint.round == 1
        ballast.unlink()
        resume(disk / "run")
        run(recipe, tmp_path / "whole")
        assert facts(disk / "run") == facts(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("where", ["/proc/run", "/dev/null/run"])
def test_an_unwritable_place(where: str, tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        run(tiny_recipe("method.name=local"), where)


def test_setup_is_shared_within_a_process(tiny_recipe: Callable[..., Recipe]) -> None:
    """`compare` loads data and backbone once."""
    one, two = setup.prepare(tiny_recipe("method.name=local")), setup.prepare(tiny_recipe("method.name=fedit"))
    assert one.task.backbone is two.task.backbone
    assert one.data is two.data
    assert one.encoded is two.encoded
