"""What a private head makes of classes that its client did not have before. Ours [recon].

A head that stays at home was trained on the classes its client had: it never saw a new one win, and may have been
started so that none can (`folklora.methods.heads`). Where clients are asked for their sketches again, the server knows
who has new classes, and sends those clients the discriminant of everybody's statistics of now. A head that started
sketched takes the rows of its new classes from it; one that was chosen on validation is chosen again, among all it
could be chosen from at first, itself as it is, and itself with the new rows.
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

    def with_rows(self, head: Tensors, scale: float = 1.0) -> Tensors:
        """A head whose rows of new classes are the discriminant's."""
        weight, bias = head["head/weight"].clone(), head["head/bias"].clone()
        weight[self.new], bias[self.new] = scale * self.weight[self.new], scale * self.bias[self.new]
        return {"head/weight": weight, "head/bias": bias}

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
        if not chosen:
            return self.with_rows(kept)
        heads = {"kept": kept} | {f"kept, new rows x {scale:g}": self.with_rows(kept, scale) for scale in SCALES}
        return choose_head(
            self.weight,
            self.bias,
            client.data.features("train"),
            client.data.features("validation"),
            steps_lr=context.learning_rate,
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
