"""What attacks on a run are on record: ``attacks/*.json`` in its directory, checked, and the strongest of them.

The files are data of whoever wrote them: names, numbers and sizes are checked before anything is shown, texts are cut,
and a picture is a small PNG or nothing.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from folklora.errors import RunError
from folklora.report.measures import measure, place
from folklora.report.records import Record, parse

FOLDER = "attacks"

MOST_FILES = 100
MOST_BYTES = 16 << 20
"""Of one file."""
LONGEST = 400
"""Letters of a text that are shown."""
MOST_PIXELS = 1024
"""On a side of a picture."""

_PNG = "data:image/png;base64,"

Line = Annotated[str, Field(max_length=200)]
Share = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Measured(Record):
    """One metric: of the attack, of its control, and what the first gained over the second. ``higher``: more of it is
    more leakage."""

    mean: Share
    control: Share | None = None
    gain: Share | None = None
    higher: bool = True

    @property
    def advantage(self) -> float:
        """The gain, positive where the attack did better than its control; 0 where there is none to compare with."""
        return 0.0 if self.gain is None else self.gain if self.higher else -self.gain


class Shown(Record):
    """One victim: its own examples, and what the attack and its control made of the messages.

    Where shares are told rather than examples (of labels, by where they were read), they become one text; ``shares``
    says so.
    """

    client: Line = ""
    original: list[str] = Field([], max_length=4096)
    recovered: list[str] = Field([], max_length=4096)
    control: list[str] = Field([], max_length=4096)
    shares: bool = False

    @model_validator(mode="before")
    @classmethod
    def _in_words(cls, record: Any) -> Any:
        if not isinstance(record, dict) or not isinstance(record.get("original"), dict):
            return record
        told = {key: _shares(record[key]) for key in ("original", "recovered", "control") if key in record}
        return {"client": record.get("client", ""), **told, "shares": True}


def _shares(told: Any) -> Any:
    """``{"amber": 0.4}``, or several such by name, as one line of text."""
    if not isinstance(told, dict):
        return told
    if all(isinstance(share, int | float) for share in told.values()):
        return [", ".join(f"{name} {100 * share:.0f} %" for name, share in told.items())]
    return ["; ".join(f"{name}: {_shares(part)[0]}" for name, part in told.items() if isinstance(part, dict))]


class AttackRecord(Record):
    """A file that `folklora attack` wrote."""

    attack: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
    title: Line = ""
    method: Line = ""
    variant: Line = ""
    view: Literal["sent", "gradient"] = "sent"
    knowledge: dict[Line, bool | int | float | str | None] = Field({}, max_length=64)
    batch: Count = 1
    warmup: Count = 0
    steps: Count = 1
    budget: Count = 0
    seed: int = 0
    form: Literal["text", "image"] = "text"
    metrics: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]{0,63}$")], Measured] = Field({}, max_length=64)
    victims: list[Shown] = Field([], max_length=4096)
    notes: list[Annotated[str, Field(max_length=1000)]] = Field([], max_length=64)

    @field_validator("victims", mode="after")
    @classmethod
    def _small_enough(cls, victims: list[Shown]) -> list[Shown]:
        return victims[:64]

    @property
    def headline(self) -> str | None:
        """What it is judged by: of the chief metrics the one that gained most over its control; without any, the one
        that says most to people."""

        def order(name: str) -> tuple[bool, float, int]:
            chief = measure(name).chief
            return not chief, -self.metrics[name].advantage if chief else 0.0, place(name)

        return min(self.metrics, key=order, default=None)

    @property
    def gained(self) -> float:
        """What the headline gained over the control, where it is a chief metric; else 0."""
        name = self.headline
        return self.metrics[name].advantage if name is not None and measure(name).chief else 0.0

    @property
    def name(self) -> str:
        """What people call it."""
        return cut(self.title) or self.attack

    @property
    def came_to(self) -> str:
        """What it reached, in words: the end of a sentence that begins with its name."""
        if self.headline is None:
            return "measured nothing"
        told, metric = measure(self.headline), self.metrics[self.headline]
        where = "what was really sent" if self.view == "sent" else "an exact gradient, which nobody sent"
        says = f"{told.says.format(told.number(metric.mean))} from {where}"
        if metric.control is None:
            return says
        return f"{says}; the same attack on messages that say nothing of it came to {told.number(metric.control)}"


def read_attacks(run: Path) -> list[AttackRecord]:
    """All results in a run directory, the strongest first; none where no attack was run.

    Raises
    ------
    RunError
        Naming the file that is not what `folklora attack` writes.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    files = sorted(folder.glob("*.json"))
    if len(files) > MOST_FILES:
        raise RunError(f"{folder}: {len(files)} results; allowed: at most {MOST_FILES}")
    return sorted(map(_read, files), key=lambda record: (record.view == "sent", record.gained), reverse=True)


def _read(path: Path) -> AttackRecord:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    if size > MOST_BYTES:
        raise RunError(f"{path}: {size} bytes; allowed: at most {MOST_BYTES}")
    record = parse(AttackRecord, path)
    if record.form == "image":
        for place, uri in _pictures(record.victims):
            if not is_picture(uri):
                raise RunError(
                    f"{path}: {place}: allowed: a PNG of at most {MOST_PIXELS} pixels a side as a {_PNG} URI"
                )
    return record


def _pictures(victims: Sequence[Shown]) -> Iterator[tuple[str, str]]:
    for i, victim in enumerate(victims):
        if victim.shares:
            continue
        for key in ("original", "recovered", "control"):
            for j, uri in enumerate(getattr(victim, key)):
                yield f"victims.{i}.{key}.{j}", uri


def is_picture(uri: str) -> bool:
    """Whether it is a small PNG as a data URI, and nothing a browser could take for anything else."""
    if not uri.startswith(_PNG):
        return False
    try:
        data = base64.b64decode(uri.removeprefix(_PNG), validate=True)
    except (binascii.Error, ValueError):
        return False
    if len(data) < 33 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return False
    return all(1 <= side <= MOST_PIXELS for side in struct.unpack(">II", data[16:24]))


def cut(text: str) -> str:
    """A text as far as it is shown, without letters that cannot be."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: LONGEST + 1])
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
