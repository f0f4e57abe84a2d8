"""What the files of a run directory hold, as ``docs/architecture.md`` describes them.

Keys that a report does not need are passed over; whatever else is not as described is a `RunError` that names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from folklora.backbones.metric import ACCURACY
from folklora.errors import RunError

MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class Record(BaseModel):
    """A piece of one of the files; keys that a report does not need are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Validation(Record):
    """How the clients' models of a round do on their validation splits, by the metric that is named; ``beside`` are
    means of others."""

    metric: MetricName = ACCURACY.name
    higher: bool = ACCURACY.higher
    mean: float
    std: float | None = None
    worst_tenth: float | None = None
    weighted: float | None = None
    clients: dict[str, float] = {}
    beside: dict[str, float] = {}


class Spent(Record):
    """What differential privacy of training has cost by the end of a round: ``epsilon`` of the client with the most,
    and of each client where each has its own."""

    unit: Literal["client", "example"]
    epsilon: float | None = None
    delta: float | None = None
    noise: float | None = None
    clients: dict[str, float] = {}


class Refreshed(Record):
    """Sketches that were asked for again: whose old one is kept, and why; bytes of them, which are the round's too."""

    kept: dict[str, str] = {}
    bytes_up_clients: dict[str, int] = {}


class Round(Record):
    """A line of ``metrics.jsonl``; round 0 holds the traffic before the first round."""

    round: int = Field(ge=0)
    participants: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    train_loss: float | None = None
    validation: Validation | None = None
    bytes_up: int = Field(0, ge=0)
    bytes_down: int = Field(0, ge=0)
    bytes_up_clients: dict[str, int] = {}
    bytes_down_clients: dict[str, int] = {}
    aggregation_error: float | None = None
    privacy: Spent | None = None
    drift: tuple[str, ...] = ()  # whose data are other ones from this round on
    refresh: Refreshed | None = None
    seconds: dict[str, float] = {}


class Examples(Record):
    """How many examples a client has in each split."""

    train: int = 0
    validation: int = 0
    test: int = 0


class ClientRecord(Record):
    """A client's results; how it does goes by the names of metrics."""

    model_config = ConfigDict(extra="allow")

    examples: Examples = Examples()


class RowRecord(Record):
    """A row; all that stands in it is kept."""

    model_config = ConfigDict(extra="allow")

    metric: MetricName = ACCURACY.name
    higher: bool = ACCURACY.higher

    def told(self) -> dict[str, Any]:
        """What stands in the file, and nothing else."""
        return self.model_dump(exclude_unset=True)


class Joined(Record):
    """What ``summary.json`` tells of newcomers: results, who failed and why, and what they would have needed."""

    clients: dict[str, ClientRecord] = {}
    failed: dict[str, str] = {}
    lacks: str | None = None
    bytes_up_per_client: float = 0.0
    bytes_down_per_client: float = 0.0


class Summary(Record):
    """``summary.json``."""

    row: RowRecord
    clients: dict[str, ClientRecord] = {}
    newcomers: Joined | None = None
    stopped_early: bool = False
    stopped: str | None = None
    environment: dict[str, Any] = {}


class Split(Record):
    """A client's examples: their indices, or, where they are at home, how many they are."""

    train: list[int] | int = []
    validation: list[int] | int = []
    test: list[int] | int = []

    def sizes(self) -> Examples:
        train, validation, test = (
            part if isinstance(part, int) else len(part) for part in (self.train, self.validation, self.test)
        )
        return Examples(train=train, validation=validation, test=test)


class Partition(Record):
    """``partition.json``."""

    classes: tuple[str, ...] = ()
    clients: dict[str, Split] = Field(min_length=1)
    counts: dict[str, list[int]] | None = None


class Compare(Record):
    """``compare.json``."""

    rows: list[RowRecord]
    runs: list[str]


Model = TypeVar("Model", bound=BaseModel)


def text_of(path: Path) -> str:
    """A file's text; raises RunError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{path}: missing from the run directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read as text: {error}") from None


def parse(model: type[Model], path: Path, text: str | None = None, where: str = "") -> Model:
    """The text of a file, or of that part of it, as a record; raises RunError where it is none."""
    try:
        return model.model_validate_json(text_of(path) if text is None else text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path}{where}: {key + ': ' if key else ''}{' '.join(first['msg'].split())}") from None
