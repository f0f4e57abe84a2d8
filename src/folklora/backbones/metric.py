"""How well a model does: what a task counts, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from folklora.errors import RunError


@dataclass(frozen=True)
class Metric:
    """What a task is judged by.

    Attributes
    ----------
    name
        As it stands in results: ``accuracy``, ``loss``.
    higher
        Whether more is better.
    percent
        Whether it is a share, shown in percent.
    digits
        Decimals that are shown.
    """

    name: str
    higher: bool
    percent: bool
    digits: int = field(default=3, compare=False)

    def merit(self, value: float) -> float:
        """The value, turned so that more is better: what early stopping, choices and promotions compare."""
        return value if self.higher else -value

    @property
    def words(self) -> str:
        """The name as text."""
        return self.name.replace("_", " ")

    @property
    def unit(self) -> str:
        """What stands behind a number, or in a column's title."""
        return " %" if self.percent else ""

    def number(self, value: float) -> str:
        """The value as results show it, without its unit: ``71.3`` of an accuracy, ``2.345`` of a loss."""
        shown = 100 * value if self.percent else value
        return f"{shown:.{self.digits}f}" if abs(shown) < 1e6 else f"{shown:.3g}"

    def show(self, value: float) -> str:
        """The value as results show it, with its unit."""
        return self.number(value) + self.unit

    def named(self, value: float) -> str:
        """``loss 2.345``."""
        return f"{self.words} {self.show(value)}"


ACCURACY = Metric("accuracy", higher=True, percent=True, digits=1)
LOSS = Metric("loss", higher=False, percent=False)
PERPLEXITY = Metric("perplexity", higher=False, percent=False, digits=1)
ROUGE_L = Metric("rouge_l", higher=True, percent=True, digits=1)
EXACT_MATCH = Metric("exact_match", higher=True, percent=True, digits=1)
TEXT_TO_IMAGE = Metric("text_to_image", higher=True, percent=True, digits=1)

KNOWN: Mapping[str, Metric] = {m.name: m for m in (ACCURACY, LOSS, PERPLEXITY, ROUGE_L, EXACT_MATCH, TEXT_TO_IMAGE)}
"""All that results may hold, as what a task is judged by or beside it."""


def metric_of(document: Mapping[str, Any]) -> Metric:
    """What a result says that it is judged by; accuracy where it says nothing, as when there was no other."""
    name = document.get("metric", ACCURACY.name)
    return KNOWN.get(name) or Metric(name, higher=bool(document.get("higher", True)), percent=False)


def same_metric(judged: Iterable[tuple[str, Metric]], where: str = "") -> Metric:
    """The one metric that all of these runs, by name, are judged by; accuracy where there are none.

    Raises
    ------
    RunError
        If there are several: their numbers have no order.
    """
    first: dict[Metric, str] = {}
    for name, metric in judged:
        first.setdefault(metric, name)
    if len(first) > 1:
        told = " and ".join(f"{name} by {metric.name}" for metric, name in first.items())
        raise RunError(f"{where}{told}: runs that are judged differently cannot be compared; allowed: one metric")
    return next(iter(first), ACCURACY)


MOST = 3e38
"""No number in a score is larger: sums and squares of any number of them are numbers still, and JSON can hold them."""


@dataclass(frozen=True)
class Score:
    """What one client's model achieved on one split.

    Attributes
    ----------
    total, units
        What the task's metric counts, and of how many: right answers of examples, nats of tokens.
    beside
        Means of other metrics on the same examples, such as ``perplexity`` or ``rouge_l``.
    steps
        How often a shared block was applied, where the client itself chose that.
    """

    total: float
    units: int
    beside: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None

    @property
    def value(self) -> float:
        return self.total / self.units
