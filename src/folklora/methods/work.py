"""What a method asks local training to do, and what it is told afterwards.

Plain gradient descent on the client's mean loss is the default. `Terms` bend it: FedProx's pull, SCAFFOLD's correction,
masks for whatever must rest, importance scores. All of it is per client, and the cohort trainer does it for many
clients at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from folklora.adapters.lowrank import Tensors, kind


@dataclass(frozen=True)
class Terms:
    """What bends a client's gradient steps; every dictionary is keyed by tensor name, and absent names are not bent.

    Attributes
    ----------
    masks
        1 where a number may move, 0 where it rests: neither gradient nor weight decay nor momentum moves it.
    anchor, proximal
        ``proximal * (theta - anchor)`` is added to the gradient (FedProx, arXiv 1812.06127; Ditto, arXiv 2012.04221),
        after clipping: the limit is for the data's gradient.
    correction
        Added to the gradient after clipping (SCAFFOLD's ``c - c_k``, arXiv 1910.06378).
    importance
        Whether to score every trained number (see `Trained`).
    rate
        Multiplies the recipe's learning rate.
    """

    masks: Tensors = field(default_factory=dict)
    anchor: Tensors = field(default_factory=dict)
    proximal: float = 0.0
    correction: Tensors = field(default_factory=dict)
    importance: bool = False
    rate: float = 1.0


@dataclass(frozen=True)
class Work:
    """One local training: where it starts, which tensors move, what bends the gradient.

    A method may ask for several in a round (a common and a personal model); ``branch`` tells them apart and keeps their
    optimiser states apart.
    """

    tensors: Tensors
    trained: frozenset[str]
    terms: Terms = field(default_factory=Terms)
    branch: str = ""


@dataclass(frozen=True)
class Trained:
    """What became of a `Work`.

    Attributes
    ----------
    loss
        Mean training loss over the examples seen.
    steps, travelled
        Gradient steps, and the sum of their learning rates.
    head_rate
        By how much the rates of the task's own head were larger.
    importance
        Where it was asked for: ``s(w) = I_bar * U_bar`` with ``I = |w dL/dw|`` of each step, ``I_bar`` its moving
        average and ``U_bar`` that of ``|I - I_bar|``, both 0.85 [AdaLoRA, arXiv 2303.10512], from zero in every round
        [recon].
    """

    tensors: Tensors
    loss: float
    steps: int
    travelled: float
    importance: Tensors = field(default_factory=dict)
    head_rate: float = 1.0

    def way(self, name: str) -> float:
        """The sum of a tensor's learning rates: its move divided by that is plain descent's mean gradient."""
        return self.travelled * rate_of(name, self.head_rate)


def rate_of(name: str, head_rate: float) -> float:
    """What multiplies the learning rate of a tensor: only the task's own head may have a rate of its own."""
    return head_rate if kind(name) == "head" else 1.0
