"""Attacks that ask something about a client rather than for its examples: who was in, which labels, what it once sent.

They look at a whole client, with all that it trains on, in the round after the warm state;
`folklora.privacy.attacks.run` plays the federation for them and puts what they find into the same document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from folklora.privacy.attacks.attacker import Attacker
from folklora.privacy.attacks.guess import Attack
from folklora.privacy.attacks.metrics import Values, summary
from folklora.privacy.attacks.warm import Warm
from folklora.randomness import numpy_generator


@dataclass(frozen=True)
class Stage:
    """What such an attack works on.

    Attributes
    ----------
    clients
        The victims.
    budget
        Shadow clients of each victim, at most.
    advance
        To be called once for each shadow and round.
    """

    warm: Warm
    lens: Attacker
    clients: Sequence[str]
    seed: int
    budget: int
    advance: Callable[[], None] = lambda: None

    def public(self, client: str) -> np.ndarray:
        """Rows that no split of this client holds: what the attacker has of the same kind."""
        split = self.warm.setup.data.splits[client]
        own = np.concatenate([split.train, split.validation, split.test])
        return np.setdiff1d(np.arange(len(self.warm.setup.data.table.labels)), own)

    def another(self, client: str, attack: str) -> str:
        """Whose message is the control of this client's: any other one, and itself where it is alone."""
        others = list(self.warm.setup.data.splits)
        draw = numpy_generator(self.seed, attack, client)
        return str(draw.choice([each for each in others if each != client] or others))


@dataclass
class Findings:
    """What came of it.

    Attributes
    ----------
    values, controls
        Metrics of each victim, and of its control.
    pooled
        Metrics over all victims together: (value, control).
    victims
        What people are shown of each victim.
    notes
        What could not be measured, and why.
    sent, bytes
        As in every result: shapes of what one victim sent, and its length.
    """

    values: list[Values] = field(default_factory=list)
    controls: list[Values] = field(default_factory=list)
    pooled: dict[str, tuple[float, float]] = field(default_factory=dict)
    victims: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sent: Mapping[str, list[int]] = field(default_factory=dict)
    bytes: int = 0

    def document(self) -> dict[str, Any]:
        """Its part of a result."""
        together = summary(*([{name: pair[i] for name, pair in self.pooled.items()}] for i in (0, 1)))
        return {
            "metrics": summary(self.values, self.controls) | together,
            "victims": self.victims,
            "notes": self.notes,
            "sent": dict(self.sent),
            "unmatched": [],
            "bytes": self.bytes,
        }


class Inference(Attack):
    """An attack on a whole client."""

    matches = False
    casts: ClassVar[bool] = False  # whether it trains shadow clients, `Plan.budget` for each victim

    def effort(self, budget: int, warm: Warm, clients: Sequence[str]) -> int:
        """How often it will call ``advance``, at most."""
        return budget * (warm.round + 1) * len(clients) if self.casts else 0

    def infer(self, stage: Stage) -> Findings:
        """Ask it of every victim, and of its control."""
        raise NotImplementedError
