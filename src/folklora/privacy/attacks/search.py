"""One start of an optimisation: the free numbers, their objective, and the best they have been."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from folklora.privacy.attacks.attacker import Attacker, Objective
from folklora.privacy.attacks.guess import Guess
from folklora.privacy.attacks.observation import Observation


@dataclass(frozen=True)
class Found:
    """Paint, its objective, and the label logits where labels were free."""

    loss: float
    paint: Tensor
    soft: Tensor | None = None


class Search:
    """Paint, and soft labels where nobody knows the labels, on their way to a smaller objective.

    Parameters
    ----------
    labels
        [count] int64, or None: they are sought, too.
    """

    def __init__(
        self,
        lens: Attacker,
        seen: Observation,
        canvas: Any,
        paint: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self.lens, self.seen, self.canvas, self.known = lens, seen, canvas, labels
        self.paint = paint.detach().clone().requires_grad_()
        self.soft = lens.soft_labels(seen, generator).requires_grad_() if labels is None else None
        self.best = Found(math.inf, paint.detach().clone(), None if self.soft is None else self.soft.detach().clone())

    @property
    def free(self) -> list[Tensor]:
        return [self.paint] if self.soft is None else [self.paint, self.soft]

    def labels(self) -> Tensor:
        if self.known is not None:
            return self.known
        assert self.soft is not None
        return self.soft.softmax(1)

    def loss(self, objective: Objective, penalty: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The objective, and a penalty on the paint, with its slope in the free numbers' ``grad``; the best is kept."""
        for each in self.free:
            each.grad = None
        loss = self.lens.distance(self.seen, self.canvas.inputs(self.paint), self.labels(), objective)
        if penalty is not None:
            loss = loss + penalty(self.paint)
        loss.backward()
        loss = loss.detach()
        self._keep(loss)
        return loss

    def judge(self, paint: Tensor, objective: Objective) -> float:
        """The objective of another paint, without a slope."""
        with torch.no_grad():
            inputs, labels = self.canvas.inputs(paint), self.labels()
        return float(self.lens.distance(self.seen, inputs, labels, objective, slope=False))

    def _keep(self, loss: Tensor) -> None:
        if float(loss) < self.best.loss:  # what is not a number is not less
            soft = None if self.soft is None else self.soft.detach().clone()
            self.best = Found(float(loss), self.paint.detach().clone(), soft)


def guess_of(lens: Attacker, seen: Observation, canvas: Any, found: Found, read: Tensor | None) -> Guess:
    """What was found, as texts or pictures; labels where the attack read or guessed them."""
    labels = found.soft.argmax(1) if found.soft is not None else read
    if lens.replica.form == "text":
        return Guess(texts=canvas.tokens(found.paint), labels=labels, loss=found.loss)
    return Guess(pictures=canvas.pictures(found.paint), labels=labels, loss=found.loss)
