"""What the round loop asks of an engine: to carry messages to the clients and back, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import Score
from folklora.federation.member import SplitName


@dataclass(frozen=True)
class Upload:
    """What came back from a client's training: an encoded message, nothing (``data`` None), or a ``failure``.

    ``round`` is the one it was made for; what is of another round does not count. ``loss`` is the mean training loss,
    not a number where the method trains nothing at its clients.
    """

    client: str
    data: bytes | None
    loss: float = math.nan
    failure: str | None = None
    round: int = 0


Asked = tuple[SplitName, Mapping[str, bytes | None]]
"""A split, and each client's reply to be applied before it answers (none: its model as it stands)."""


class Engine(Protocol):
    """Carries messages between the round loop and the members. ``local`` calls them; a network engine sends.

    What comes up may be late, doubled, damaged or missing: the loop sorts that out. What goes down with `settle`,
    `receive` and `accepted` reaches a client before its next work, not necessarily at once.
    """

    def present(self, round: int, clients: Sequence[str], least: int) -> Sequence[str]:
        """Who of them can be asked now; a network engine waits up to ``engine.wait`` until ``least`` of them can."""
        ...

    def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
        """Sketches of those that answer; asked for again in a later round, they leave the clients as they are."""
        ...

    def settle(self, client: str, data: bytes) -> None: ...
    def receive(self, client: str, data: bytes) -> None: ...

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        """Uploads as they come, until all are there or ``engine.deadline`` is over."""
        ...

    def attach(self, client: str, data: bytes) -> None:
        """What goes along with this client's next training."""
        ...

    def talk(self, round: int, topic: str, parts: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """An exchange beside the training: what clients answer to their parts; who fails or is silent is missing."""
        ...

    def accepted(self, clients: Sequence[str]) -> None:
        """The server has taken these clients' uploads of this round."""
        ...

    def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
        """One dict a question, all of them one exchange; who does not answer is missing."""
        ...

    def global_score(self, tensors: Tensors) -> Score | None: ...

    def aggregation_error(
        self, clients: Sequence[str], replies: Mapping[str, bytes | None], mixing: Tensor
    ) -> float | None:
        """None where private factors stay at home."""
        ...

    def records(self, clients: Sequence[str]) -> dict[str, Tensors]:
        """What brings each of them back: its private state, or where it keeps it itself, which version that is."""
        ...

    def restore(self, records: Mapping[str, Tensors]) -> Sequence[str]:
        """Bring these clients, all or some, back to records; the clients that must be told their welcome again."""
        ...
