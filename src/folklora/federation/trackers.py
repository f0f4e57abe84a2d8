"""Optional experiment trackers: TensorBoard and MLflow see what the run directory sees, and nothing depends on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from folklora.errors import RunError
from folklora.federation.rounds import Progress
from folklora.recipe import Recipe


class _Tracker(Protocol):
    def log(self, name: str, value: float, step: int) -> None: ...


class _Told:
    """Passes progress on and logs every round's numbers."""

    def __init__(self, progress: Progress, trackers: list[_Tracker]) -> None:
        self.progress = progress
        self.trackers = trackers

    def run(self, name: str) -> None:
        self.progress.run(name)

    def phase(self, name: str, total: int) -> None:
        self.progress.phase(name, total)

    def advance(self) -> None:
        self.progress.advance()

    def line(self, metrics: Mapping[str, Any]) -> None:
        self.progress.line(metrics)
        for name, value in scalars(metrics).items():
            for tracker in self.trackers:
                tracker.log(name, value, metrics["round"])


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one round that a curve can be drawn of."""
    found = {name: metrics[name] for name in ("train_loss", "bytes_up", "bytes_down", "aggregation_error")}
    for name in ("mean", "std", "worst_tenth", "weighted"):
        found[f"validation/{name}"] = (metrics["validation"] or {}).get(name)
    return {name: float(value) for name, value in found.items() if value is not None}


@contextmanager
def track(recipe: Recipe, folder: Path, progress: Progress) -> Iterator[Progress]:
    """Progress that is also logged where the recipe's ``[track]`` says.

    Raises
    ------
    RunError
        If a tracker is asked for and not installed.
    """
    with ExitStack() as stack:
        trackers: list[_Tracker] = []
        if recipe.track.tensorboard:
            trackers.append(stack.enter_context(_tensorboard(folder)))
        if recipe.track.mlflow is not None:
            trackers.append(stack.enter_context(_mlflow(recipe, recipe.track.mlflow)))
        yield _Told(progress, trackers) if trackers else progress


class _Board:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, name: str, value: float, step: int) -> None:
        self.writer.add_scalar(name, value, step)


@contextmanager
def _tensorboard(folder: Path) -> Iterator[_Tracker]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError('track.tensorboard = true: not installed; pip install "folklora[trackers]"') from None
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        yield _Board(writer)


class _Flow:
    def __init__(self, module: Any) -> None:
        self.module = module

    def log(self, name: str, value: float, step: int) -> None:
        self.module.log_metric(name, value, step=step)


@contextmanager
def _mlflow(recipe: Recipe, uri: str) -> Iterator[_Tracker]:
    try:
        import mlflow
    except ImportError:
        raise RunError('track.mlflow is set: not installed; pip install "folklora[trackers]"') from None
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_name=f"{recipe.method.name}-s{recipe.seed}"):
        mlflow.log_text(recipe.to_toml(), "recipe.toml")
        yield _Flow(mlflow)
