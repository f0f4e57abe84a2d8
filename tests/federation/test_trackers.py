"""TensorBoard and MLflow see every round's numbers, and a run does not hang on them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from folklora.errors import RunError
from folklora.federation.run import resume, run
from folklora.federation.rundir import RunDirectory
from folklora.federation.trackers import scalars
from folklora.recipe import Recipe

NAMES = {
    "train_loss",
    "bytes_up",
    "bytes_down",
    "aggregation_error",
    "validation/mean",
    "validation/std",
    "validation/worst_tenth",
    "validation/weighted",
}


def expected(path: Path) -> dict[tuple[str, int], float]:
    """(name, round) -> value, from the run directory."""
    lines = RunDirectory.open(path).metrics()[1:]
    return {(name, line["round"]): value for line in lines for name, value in scalars(line).items()}


def test_other_metrics_have_curves_too() -> None:
    line = {
        "train_loss": 2.0, "bytes_up": 1, "bytes_down": 2, "aggregation_error": None,
        "validation": {"metric": "loss", "higher": False, "mean": 2.5, "beside": {"perplexity": 12.2}},
    }  # fmt: skip
    found = scalars(line)
    assert (found["validation/mean"], found["validation/perplexity"]) == (2.5, 12.2)
    assert scalars({**line, "validation": None}).keys() == {"train_loss", "bytes_up", "bytes_down"}


class FakeMLflow:
    """The few calls of MLflow that are made, remembered."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.active: str | None = None
        self.fails: set[str] = set()

    def MlflowClient(self, tracking_uri: str) -> FakeMLflow:
        return self

    def search_experiments(self, max_results: int) -> list[Any]:
        if "search_experiments" in self.fails:
            raise ConnectionError("no route\nto host")
        return []

    def set_tracking_uri(self, uri: str) -> None:
        self.uri = uri

    def start_run(self, run_id: str | None, run_name: str) -> Any:
        if "start_run" in self.fails:
            raise ConnectionError("no route\nto host")
        self.active = run_id or f"id-{len(self.runs)}"
        self.runs.setdefault(self.active, {"name": run_name, "params": {}, "metrics": {}, "status": "RUNNING"})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def log_params(self, params: dict[str, Any]) -> None:
        self.runs[self.active or ""]["params"].update(params)

    def log_metric(self, name: str, value: float, step: int) -> None:
        if "log_metric" in self.fails:
            raise ConnectionError("gone")
        self.runs[self.active or ""]["metrics"][name, step] = value

    def end_run(self, status: str) -> None:
        self.runs[self.active or ""]["status"] = status
        if "end_run" in self.fails:
            raise ConnectionError("gone")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def test_tensorboard_holds_every_scalar(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(
        tiny_recipe("method.name=fedit", "track.tensorboard=true", "train.evaluate_every=2", "train.rounds=3"), tmp_path
    )
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == NAMES
    found = {(name, event.step): event.value for name in NAMES for event in board.Scalars(name)}
    assert found == pytest.approx(expected(tmp_path))
    assert ("validation/mean", 1) not in found


def test_mlflow_is_told_the_recipe_and_every_round(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, mlflow: FakeMLflow
) -> None:
    run(tiny_recipe("method.name=fedit", "track.mlflow=http://somewhere"), tmp_path)
    assert mlflow.uri == "http://somewhere"
    (told,) = mlflow.runs.values()
    assert told["name"] == "fedit-s0"
    assert told["status"] == "FINISHED"
    assert told["metrics"] == expected(tmp_path)
    assert told["params"]["train.lr"] == 5e-3
    assert told["params"]["method.name"] == "fedit"
    assert told["params"]["seed"] == 0


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, mlflow: FakeMLflow
) -> None:
    class Stop(Exception): ...

    class Stopping:
        def run(self, name: str) -> None: ...
        def phase(self, name: str, total: int) -> None: ...
        def advance(self) -> None: ...
        def line(self, metrics: Any) -> None:
            if metrics["round"] == 2:
                raise Stop

    recipe = tiny_recipe("method.name=fedit", "track.mlflow=x", "train.rounds=3")
    with pytest.raises(Stop):
        run(recipe, tmp_path, Stopping())
    assert mlflow.runs["id-0"]["status"] == "FAILED"
    resume(tmp_path)
    (told,) = mlflow.runs.values()
    assert told["status"] == "FINISHED"
    known = {key: value for key, value in expected(tmp_path).items() if key[1] != 2}  # it was stopped in telling
    assert told["metrics"] == known


def test_a_tracker_that_cannot_be_reached_is_one_line(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, mlflow: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a run directory; or, where it is lost in between, before the first round."""
    recipe = tiny_recipe("method.name=local", "track.mlflow=http://x")
    for lost in ("search_experiments", "start_run"):
        mlflow.fails = {lost}
        with pytest.raises(RunError, match=r"track.mlflow = 'http://x': no route\\nto host"):
            run(recipe, tmp_path / "run")
        assert (tmp_path / "run").exists() == (lost == "start_run")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RunError, match="track.mlflow is set: not installed; pip install"):
        resume(tmp_path / "run")
    with pytest.raises(RunError, match="track.mlflow is set: not installed; pip install"):
        run(recipe, tmp_path / "other")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match=r"track.tensorboard = true: not installed; pip install"):
        run(tiny_recipe("method.name=local", "track.tensorboard=true"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tracker_that_fails_later_is_left_behind(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, mlflow: FakeMLflow, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow.fails = {"log_metric", "end_run"}
    with caplog.at_level(logging.WARNING):
        summary = run(tiny_recipe("method.name=fedit", "track.mlflow=x"), tmp_path)
    assert summary["row"]["rounds"] == 2
    assert (tmp_path / "summary.json").exists()
    assert [record.getMessage() for record in caplog.records if "told" in record.message] == [
        "_MLflow is not told any more: gone"
    ]


def test_tracking_changes_no_number(tiny_recipe: Callable[..., Recipe], tmp_path: Path, mlflow: FakeMLflow) -> None:
    plain = run(tiny_recipe("method.name=fedit"), tmp_path / "plain")["row"]
    told = run(tiny_recipe("method.name=fedit", "track.tensorboard=true", "track.mlflow=x"), tmp_path / "told")["row"]
    assert mlflow.runs
    for name in plain:
        if not name.startswith("seconds"):
            assert plain[name] == told[name]


@pytest.mark.slow
def test_real_mlflow_with_sqlite(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow, because MLflow builds its tables by all of its migrations."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run(tiny_recipe("method.name=fedit", f"track.mlflow={uri}"), tmp_path / "run")
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs(["0"])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.lr"] == "0.005"
    numbers = expected(tmp_path / "run")
    for name in NAMES:
        history = client.get_metric_history(found.info.run_id, name)
        assert {(name, point.step): point.value for point in history} == {
            key: value for key, value in numbers.items() if key[0] == name
        }
    assert not (tmp_path / "mlruns").exists()  # nothing is left in the working directory
    for refused in (f"file://{tmp_path / 'mlruns'}", "nonsense://x"):  # MLflow takes no folders any more
        with pytest.raises(RunError, match="track.mlflow = ") as caught:
            run(tiny_recipe("method.name=fedit", f"track.mlflow={refused}"), tmp_path / refused[:4])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / refused[:4]).exists()
