"""Which features to add: as the recipe says, or as the client's own cross-validation does. Ours [recon]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.data.augmentation.gan import adversarial
from folklora.data.augmentation.gaussian import Labelled, draws, per_class
from folklora.data.statistics import ClassStatistics
from folklora.randomness import torch_generator

KINDS = ("none", "gaussian", "sketch", "gan")
"""From the plainest on: among equals the first is chosen."""

COUNT = 20
"""Features that are made of each class."""

FOLDS = 3

Fit = Callable[[Labelled, Labelled, str], tuple[Tensor, Tensor]]
"""(real, generated, what made them) -> weight [classes, d] and bias [classes] of a head."""


@dataclass(frozen=True)
class Augmenter:
    """What one client can make features of.

    Attributes
    ----------
    real
        Its training examples.
    classes
        Of the task.
    shared
        Everybody's class statistics, this client's among them; None where there are none.
    """

    real: Labelled
    classes: int
    seed: int
    client: str
    shared: ClassStatistics | None = None

    def generated(self, kind: str) -> Labelled:
        """Features of that kind for the classes that the client has; the same for the same seed and client."""
        return self._generated(kind, self.real, None, 0)

    def _generated(self, kind: str, kept: Labelled, held: Labelled | None, fold: int) -> Labelled:
        """Features made of the examples that are kept, as if those that are held out did not exist anywhere."""
        random = torch_generator(self.seed, f"augment/{kind}", self.client, fold)
        if kind == "gaussian":
            return per_class(kept, self.classes, COUNT, random)
        if kind == "gan":
            return adversarial(kept, COUNT, random)
        if kind == "sketch" and self.shared is not None:
            shared = self.shared
            if held is not None:
                shared = shared.without(ClassStatistics.of(*held, self.classes))
            return draws(shared, kept[1], COUNT, random)
        return kept[0][:0], kept[1][:0]

    def choose(self, fit: Fit) -> str:
        """The kind whose head errs least on examples that it was not made of, by stratified cross-validation.

        Among equal errors the likelihood decides. A class with one example is never held out. Where all have one there
        is nothing to validate on: ``none``.
        """
        folds = stratified(self.real[1], FOLDS, torch_generator(self.seed, "augment/folds", self.client))
        if not folds:
            return "none"
        features, labels = self.real
        wrong, loss = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
        for number, held in enumerate(folds, 1):
            rest = torch.ones(len(labels), dtype=torch.bool)
            rest[held] = False
            kept, out = (features[rest], labels[rest]), (features[held], labels[held])
            for i, kind in enumerate(KINDS):
                weight, bias = fit(kept, self._generated(kind, kept, out, number), kind)
                logits = out[0] @ weight.T + bias
                wrong[i] += (logits.argmax(1) != out[1]).sum()
                loss[i] += F.cross_entropy(logits, out[1], reduction="sum")
        tested = sum(len(held) for held in folds)
        mean = loss / tested
        return KINDS[int((wrong + mean / (1 + mean)).argmin())]


def stratified(labels: Tensor, folds: int, generator: torch.Generator) -> Sequence[Tensor]:
    """At most so many disjoint sets of rows, each class dealt out evenly and never whole.

    Rows of classes with one example are in none of them; where all classes have one, there are no sets.
    """
    dealt: list[list[int]] = [[] for _ in range(folds)]
    turn = 0
    for each in torch.unique(labels).tolist():
        rows = torch.nonzero(labels == each).squeeze(1)
        if len(rows) < 2:
            continue
        for row in rows[torch.randperm(len(rows), generator=generator)].tolist():
            dealt[turn % folds].append(row)
            turn += 1
    return [torch.tensor(sorted(rows)) for rows in dealt if rows]
