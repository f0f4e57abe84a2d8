"""What a private head makes of classes that its client did not have before. Ours [recon].

A head that stays at home was trained on the classes its client had: it never saw a new one win, and may have been
started so that none can (`folklora.methods.heads`). Where clients are asked for their sketches again, the server knows
who has new classes, and sends those clients the discriminant of everybody's statistics of now. A head that started
sketched takes the rows of its new classes from it; one that was chosen on validation is chosen again, among all it
could be chosen from at first, itself as it is, and itself with the new rows.

Only differences of a head's logits mean anything, so rows of two heads may lie at different levels. New rows are taken
as far above the client's other rows as they are in the discriminant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.data.statistics import class_ids
from folklora.methods.contract import Client, Context
from folklora.methods.heads import SCALES, Candidate, choose_head

NEW = "new/classes"
"""The client's new classes, beside ``start/head/weight`` and ``start/head/bias``."""
TAKEN = "renewed/head/bias"
"""The note of the discriminant's bias that was taken in last: the same message twice changes nothing."""


@dataclass(frozen=True)
class Renewal:
    """The discriminant of now, [classes, d] and [classes], and which classes are new, [M]."""

    weight: Tensor
    bias: Tensor
    new: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], classes: int) -> Renewal | None:
        """What of a reply is a renewal, if anything is.

        Raises
        ------
        MessageError
            If the new classes are none of the task's.
        """
        if NEW not in tensors:
            return None
        return cls(
            tensors["start/head/weight"],
            tensors["start/head/bias"],
            class_ids({"classes": tensors[NEW]}, classes),
        )

    def with_rows(self, head: Tensors, labels: Tensor, scale: float = 1.0) -> Tensors:
        """A head whose rows of new classes are the discriminant's, at the level of those of the client's other classes.

        ``labels`` are the client's. Where it has none of other classes, the level is that of all that are not new.
        """
        found: Tensors = {}
        others = torch.ones(len(self.weight), dtype=torch.bool)
        others[self.new] = False
        own = torch.zeros_like(others)
        own[labels] = True
        level = own & others if bool((own & others).any()) else others
        for name, rows in (("head/weight", scale * self.weight), ("head/bias", scale * self.bias)):
            found[name] = head[name].clone()
            shift = (head[name] - rows)[level].mean(0) if bool(level.any()) else 0.0
            found[name][self.new] = rows[self.new] + shift
        return found

    def head(self, client: Client, context: Context, *, chosen: bool, epochs: int) -> Tensors:
        """The client's head from now on.

        Parameters
        ----------
        chosen
            Whether it is chosen on validation.
        epochs
            As many as the run has.
        """
        kept = {name: client.tensors[name] for name in ("head/weight", "head/bias")}
        train = client.data.features("train")
        if not chosen:
            return self.with_rows(kept, train[1])
        heads = {"kept": kept}
        heads |= {f"kept, new rows x {scale:g}": self.with_rows(kept, train[1], scale) for scale in SCALES}
        return choose_head(
            self.weight,
            self.bias,
            train,
            client.data.features("validation"),
            steps_lr=context.learning_rate * context.head_rate,
            batch_size=context.batch_size,
            epochs=epochs,
            seed=context.seed,
            client=client.id,
            beside=[Candidate(name, head["head/weight"], head["head/bias"]) for name, head in heads.items()],
        )


def renewals(start: Mapping[str, Tensor], new: Tensor) -> Tensors:
    """What a reply carries for a client with these new classes, a [classes] bool."""
    head = {f"start/{name}": start[f"start/{name}"] for name in ("head/weight", "head/bias")}
    return {**head, NEW: torch.nonzero(new).squeeze(1).int()}
