"""Optional experiment trackers: TensorBoard and MLflow see what the run directory sees, and nothing depends on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from folklora.errors import RunError
from folklora.federation.rounds import Progress
from folklora.recipe import Recipe
from folklora.sections import TrackSection

logger = logging.getLogger(__name__)


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
        for tracker in list(self.trackers):
            try:
                for name, value in scalars(metrics).items():
                    tracker.log(name, value, metrics["round"])
            except Exception as error:  # whatever another library raises: the run does not hang on it
                logger.warning("%s is not told any more: %s", type(tracker).__name__, error)
                self.trackers.remove(tracker)


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one round that a curve can be drawn of."""
    found = {name: metrics[name] for name in ("train_loss", "bytes_up", "bytes_down", "aggregation_error")}
    found["epsilon"] = metrics.get("privacy", {}).get("epsilon")
    validation = metrics["validation"] or {}
    for name in ("mean", "std", "worst_tenth", "weighted"):
        found[f"validation/{name}"] = validation.get(name)
    found |= {f"validation/{name}": value for name, value in validation.get("beside", {}).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


@contextmanager
def track(recipe: Recipe, folder: Path, progress: Progress) -> Iterator[Progress]:
    """Progress that is also logged where the recipe's ``[track]`` says.

    Raises
    ------
    RunError
        If a tracker is asked for and not installed or not reached. One that fails later is left behind with a warning.
    """
    with ExitStack() as stack:
        trackers: list[_Tracker] = []
        if recipe.track.tensorboard:
            trackers.append(stack.enter_context(_tensorboard(folder)))
        if recipe.track.mlflow is not None:
            trackers.append(stack.enter_context(_mlflow(recipe, recipe.track.mlflow, folder)))
        yield _Told(progress, trackers) if trackers else progress


def refuse_unreachable(section: TrackSection) -> None:
    """Raises RunError as `track` does, but before there is a run directory to leave behind."""
    if section.tensorboard:
        _summary_writer()
    if (uri := section.mlflow) is not None:
        mlflow = _import_mlflow()
        with _refused(uri):
            mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, name: str, value: float, step: int) -> None:
        self.writer.add_scalar(name, value, step)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError('track.tensorboard = true: not installed; pip install "folklora[trackers]"') from None
    return SummaryWriter


@contextmanager
def _tensorboard(folder: Path) -> Iterator[_Tracker]:
    with _summary_writer()(str(folder / "tensorboard")) as writer:
        yield _TensorBoard(writer)


class _MLflow:
    def __init__(self, module: Any) -> None:
        self.module = module

    def log(self, name: str, value: float, step: int) -> None:
        self.module.log_metric(name, value, step=step)


def _import_mlflow() -> Any:
    try:
        import mlflow
    except ImportError:
        raise RunError('track.mlflow is set: not installed; pip install "folklora[trackers]"') from None
    return mlflow


@contextmanager
def _refused(uri: str) -> Iterator[None]:
    """Whatever is raised, MLflow's own, SQLAlchemy's or the network's, as one line."""
    try:
        yield
    except Exception as error:
        raise RunError(f"track.mlflow = {uri!r}: {str(error).strip() or type(error).__name__}") from error


@contextmanager
def _mlflow(recipe: Recipe, uri: str, folder: Path) -> Iterator[_Tracker]:
    saved = folder / "mlflow.txt"  # the id of MLflow's run: a resumed run goes on with it
    mlflow = _import_mlflow()
    with _refused(uri):
        mlflow.set_tracking_uri(uri)
        known = saved.read_text() if saved.exists() else None
        started = mlflow.start_run(run_id=known, run_name=f"{recipe.method.name}-s{recipe.seed}")
        if known is None:
            saved.write_text(started.info.run_id)
            sections = recipe.model_dump(exclude_none=True, exclude={"seed"})
            keys = {f"{section}.{key}": value for section, table in sections.items() for key, value in table.items()}
            mlflow.log_params({"seed": recipe.seed, **keys})
    status = "FAILED"
    try:
        yield _MLflow(mlflow)
        status = "FINISHED"
    finally:
        with suppress(Exception):
            mlflow.end_run(status)
