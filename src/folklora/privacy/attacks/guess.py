"""What an attack is, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.privacy.attacks.observation import Observation, Victim

if TYPE_CHECKING:
    from folklora.privacy.attacks.attacker import Attacker

Form = Literal["text", "image"]


@dataclass(frozen=True)
class Guess:
    """What an attack believes the batch was; None where it says nothing of it.

    Attributes
    ----------
    texts
        Token ids of each text, in no particular order.
    pictures
        [count, 3, height, width] float32 in [0, 1], in no particular order.
    labels
        [count] int64: where the attack found them out by itself.
    scores
        Numbers of the attack's own, for metrics of its own.
    loss
        What its objective fell to.
    judge
        Holds what is in no other field against the truth: metrics of the attack's own, beside those of its form.
    """

    texts: list[list[int]] | None = None
    pictures: Tensor | None = None
    labels: Tensor | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    loss: float = float("nan")
    judge: Callable[[Victim], dict[str, float]] | None = None


class Attack:
    """One attack; a subclass a file, held next to its paper."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None] = None
    forms: ClassVar[frozenset[Form]] = frozenset({"text", "image"})
    matches: ClassVar[bool] = True  # whether it compares gradients, and so needs trained tensors that travel
    own_labels: ClassVar[bool] = False  # whether it finds labels out by itself even where they are known

    def run(self, lens: Attacker, seen: Observation, budget: int, generator: torch.Generator) -> Guess:
        """Reconstruct the batch with at most ``budget`` gradients of the replica; random numbers from ``generator``."""
        raise NotImplementedError

    def control(self, seen: Observation, generator: torch.Generator) -> Observation:
        """The same observation without what it says: the numbers of every tensor that was sent, shuffled."""

        def mixed(name: str, tensor: Tensor) -> Tensor:
            mask = seen.masks.get(name)
            if mask is None or mask.shape != tensor.shape:
                return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)
            moved = mask.bool()
            own = tensor[moved]
            return tensor.masked_scatter(moved, own[torch.randperm(len(own), generator=generator)])

        def shuffled(tensors: Tensors) -> Tensors:
            return {name: mixed(name, t) if t.is_floating_point() else t for name, t in tensors.items()}

        return replace(seen, gradient=shuffled(seen.gradient), sent=shuffled(seen.sent), sketch=shuffled(seen.sketch))
