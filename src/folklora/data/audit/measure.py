"""A number, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """What was measured of some data.

    Attributes
    ----------
    value
        The number, always finite; None where the data cannot give one.
    why
        Where there is none: the reason, a few words such as ``"no token occurs twice"``. Else None.
    """

    value: float | None
    why: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.why is None):
            raise ValueError("a measure has either a value or a reason why it has none")

    def __str__(self) -> str:
        return f"not measurable: {self.why}" if self.value is None else f"{self.value:.4g}"
