"""What a round cost, and its line in ``metrics.jsonl``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """What one round cost (bytes of each client in each direction, seconds in each phase), and uploads passed over."""

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def line(
        self,
        clients: Sequence[str],
        round: int,
        sampled: list[str],
        failed: Mapping[str, str],
        loss: float | None,
        validation: Mapping[str, Any] | None,
        error: float | None,
    ) -> dict[str, Any]:
        """The round's line: in the clients' order, not that of arrival, so that it is the same in every engine."""
        up, down = ({client: counts[client] for client in clients if counts[client]} for counts in (self.up, self.down))
        line = {
            "round": round,
            "participants": [client for client in sampled if client not in failed],
            "failed": {client: failed[client] for client in clients if client in failed},
            "train_loss": loss,
            "validation": validation,
            "bytes_up": sum(up.values()),
            "bytes_down": sum(down.values()),
            "bytes_up_clients": up,
            "bytes_down_clients": down,
            "aggregation_error": error,
            "seconds": {phase: round_to(seconds, 4) for phase, seconds in self.seconds.items()},
        }
        return line if not self.ignored else {**line, "ignored": dict(sorted(self.ignored.items()))}


def round_to(value: float, digits: int) -> float:
    return float(f"{value:.{digits}f}")
