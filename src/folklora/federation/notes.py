"""What the server of a network run keeps of each member in place of a record: a few facts about its private state."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from folklora.adapters.lowrank import Tensors
from folklora.errors import RunError


@dataclass(frozen=True)
class Note:
    """What the server knows of a member's private state.

    Attributes
    ----------
    version
        The round it was made in; 0 after the sketch, -1: it has none.
    settled
        Whether that version has taken its welcome in.
    accepted
        Whether the upload made in it was taken.
    welcome, reply
        SHA-256 of those that the member was sent last.
    """

    version: int = -1
    settled: bool = False
    accepted: bool = False
    welcome: str = ""
    reply: str = ""

    def tensors(self) -> Tensors:
        """As the round loop's record of this client."""
        numbers = {"version": self.version, "settled": self.settled, "accepted": self.accepted}
        digests = {name: list(bytes.fromhex(getattr(self, name))) for name in ("welcome", "reply")}
        return {name: torch.tensor([int(number)]) for name, number in numbers.items()} | {
            name: torch.tensor(digest, dtype=torch.uint8) for name, digest in digests.items()
        }

    @classmethod
    def of(cls, record: Tensors) -> Note:
        """Raises RunError for a record of another engine."""
        try:
            version, settled, accepted = (int(record[name]) for name in ("version", "settled", "accepted"))
            welcome, reply = (bytes(record[name].tolist()).hex() for name in ("welcome", "reply"))
        except (KeyError, ValueError, RuntimeError):
            raise RunError("the run's client records are not those of a network run") from None
        return cls(version, bool(settled), bool(accepted), welcome, reply)

    @property
    def digests(self) -> set[str]:
        return {digest for digest in (self.welcome, self.reply) if digest}
