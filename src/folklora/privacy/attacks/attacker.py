"""What every gradient attack works with: public knowledge, the replica, and how far a guess is from what was seen.

The attack is adaptive: it differentiates through the frozen backbone, through all factors it knows or believes, uses
every tensor that travelled, and follows what the client's optimiser makes of a gradient: AdamW's steps are nearly
signs, and are compared as such. Clipping and learning rates change an update's length alone, which is not compared
where updates rather than gradients were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.backbones.causal import CausalLM
from folklora.privacy.attacks.canvas import PictureCanvas, TextCanvas
from folklora.privacy.attacks.labels import labels_of
from folklora.privacy.attacks.objective import norm, signed
from folklora.privacy.attacks.observation import Knowledge, Observation, cut, moving
from folklora.privacy.attacks.prior import Prior
from folklora.privacy.attacks.replica import Replica

Objective = Callable[[Tensors, Tensors], Tensor]


@dataclass
class Attacker:
    """See the module's text.

    Attributes
    ----------
    prior
        A language model of texts like these, or None.
    usual_length
        Of a text, where lengths are not known.
    further
        What was seen of the same batch in later rounds; all of them are matched at once.
    spent
        Gradients of the replica so far: the unit of an attack's budget.
    """

    replica: Replica
    knowledge: Knowledge
    prior: Prior | None = None
    usual_length: int = 16
    further: Sequence[Observation] = ()
    advance: Callable[[], None] = lambda: None
    spent: int = field(default=0, init=False)

    @property
    def task(self) -> Any:
        return self.replica.task

    # -- the unknown ---------------------------------------------------------------------------------------------------

    def canvas(self, seen: Observation) -> Any:
        """What to paint on, of the batch's size."""
        if self.replica.form == "image":
            return PictureCanvas(self.replica, seen.count)
        lengths = seen.lengths or [self.usual_length] * seen.count
        return TextCanvas(self.replica, lengths, self._around(), self._special())

    def labels(self, seen: Observation, *, own: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """The batch's labels [count] int64, as told or as read off a head's gradient, and the latter where it counts.

        ``own``: what is read goes before what is told. (None, None): neither is possible. A language model has none.
        """
        if self.replica.form == "text" and not self.task.head_shapes():
            return torch.zeros(seen.count, dtype=torch.int64), None
        told = None if seen.labels is None else torch.from_numpy(np.asarray(seen.labels, dtype=np.int64))
        read = labels_of(seen.gradient, seen.count)
        if told is not None and not (own and read is not None):
            return told, None
        return read, read

    def soft_labels(self, seen: Observation, generator: torch.Generator) -> Tensor:
        """[count, classes]: logits of labels to be guessed along with the inputs."""
        return torch.randn(seen.count, self.task.classes, generator=generator)

    # -- matching ------------------------------------------------------------------------------------------------------

    def silent(self, seen: Observation) -> bool:
        """Whether there is nothing to match: nothing travelled, or nothing but zeros."""
        return not any(bool(t.any()) for each in (seen, *self.further) for t in each.gradient.values())

    def distance(
        self, seen: Observation, inputs: Tensor, labels: Tensor, objective: Objective, *, slope: bool = True
    ) -> Tensor:
        """The objective between the gradient of a guess and the one that was seen, the mean over all rounds."""
        self.spent += 1
        self.advance()
        every = (seen, *self.further)
        return torch.stack([self._distance(each, inputs, labels, objective, slope) for each in every]).mean()

    def _distance(self, seen: Observation, inputs: Tensor, labels: Tensor, objective: Objective, slope: bool) -> Tensor:
        names = list(seen.gradient)
        lengths, prompts = self._lengths(seen), seen.prompts
        labels = labels.to(self.replica.device)
        found = self.replica.gradients(
            seen.before, names, inputs.to(self.replica.device), labels, lengths, prompts, create_graph=slope
        )
        found = moving(found, seen.masks)
        guessed = {name: cut(name, tensor, {**seen.sent, **seen.gradient}) for name, tensor in found.items()}
        target = {name: tensor.to(self.replica.device) for name, tensor in seen.gradient.items()}
        if self.knowledge.view == "sent":
            if seen.optimizer == "adamw":
                guessed = signed(guessed)
            guessed, target = _of_length_one(guessed), _of_length_one(target)
        return objective(guessed, target)

    def _lengths(self, seen: Observation) -> list[int] | None:
        return None if self.replica.form == "image" else seen.lengths or [self.usual_length] * seen.count

    # -- public tokens -------------------------------------------------------------------------------------------------

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind every text of its own accord."""
        tokenizer = self.replica.backbone.tokenizer
        whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                behind = whole[start + len(bare) :]
                if isinstance(self.task, CausalLM):  # a response ends with its own
                    behind = self.task.end_tokens[:1]
                return list(whole[:start]), list(behind)
        return [], []

    def _special(self) -> list[int]:
        tokenizer = self.replica.backbone.tokenizer
        kept = {tokenizer.unk_token_id}
        known = len(self.replica.vectors)
        beyond = range(len(tokenizer), known)
        return [token for token in {*tokenizer.all_special_ids, *beyond} if token < known and token not in kept]


def _of_length_one(tensors: Tensors) -> Tensors:
    length = norm(tensors)
    return {name: tensor / length for name, tensor in tensors.items()}
