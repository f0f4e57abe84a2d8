"""What an attacker holds: the messages of one client, and what is assumed of its knowledge.

The attacker is an honest but curious server. It knows the frozen backbone, the recipe with its seed, and everything
that was ever sent or replied. What else it is granted is said by `Knowledge` and stated in every result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from folklora.adapters.lowrank import Tensors, kind

View = Literal["sent", "gradient"]


@dataclass(frozen=True)
class Knowledge:
    """What the attacker is granted beside the public.

    Attributes
    ----------
    view
        "sent": what really arrived, decoded. "gradient": the upper bound, the float32 gradient of the batch's mean loss
        with respect to the tensors that travel, in one step.
    labels, lengths
        Whether it knows the batch's labels, and how many tokens each text has.
    bases
        Whether it knows the client's private tensors at the start of the round. Otherwise it believes what it can know:
        the recipe's start (of a common seed), with all that was ever sent or replied.
    """

    view: View = "sent"
    labels: bool = True
    lengths: bool = True
    bases: bool = False


@dataclass(frozen=True)
class Victim:
    """The truth, for scoring only: never given to an attack.

    Attributes
    ----------
    rows
        Into the setup's table.
    inputs, examples, labels
        The batch as the source has it, as the task encodes it, and its labels.
    """

    client: str
    rows: np.ndarray
    inputs: list[Any]
    examples: list[Any]
    labels: np.ndarray


@dataclass(frozen=True)
class Observation:
    """All that an attack is given, beside public knowledge.

    Attributes
    ----------
    count
        Examples in the batch.
    before
        The client's whole model at the start of the round, as the attacker believes it.
    sent
        What arrived, decoded; empty for methods that send nothing.
    gradient
        By name, of what travelled and is trained: exact (`Knowledge.view` "gradient"), or ``-(sent - before)`` divided
        by the sum of the learning rates.
    steps, local_epochs, learning_rate, optimizer
        Of the client's local training, as the recipe tells them.
    labels, lengths
        None where they are not known.
    sketch
        What the client once sent (``statistics/...``, ``mixture/...``), decoded.
    prompts
        causal-lm: how many of each text's tokens are its prompt; known where the lengths are.
    masks
        1 where a tensor was trained and 0 where it rested, in the client's own shape, as the upload's indices tell;
        tensors that are not named were trained whole.
    """

    client: str
    round: int
    count: int
    before: Tensors
    sent: Tensors
    gradient: Tensors
    steps: int
    local_epochs: int
    learning_rate: float
    optimizer: str
    labels: np.ndarray | None
    lengths: list[int] | None
    sketch: Tensors
    prompts: list[int] | None = None
    masks: Tensors = field(default_factory=dict)


def moving(tensors: Tensors, masks: Tensors) -> Tensors:
    """Zero wherever a tensor rested."""
    return {name: t * masks[name].to(t.device) if name in masks else t for name, t in tensors.items()}


def cut(name: str, tensor: Tensor, sent: Tensors) -> Tensor:
    """Of a factor, what travelled: the pairs that an ``index/<site>`` names (HAFL), or the first ones (the experts that
    FedAMoLE's clients hold); everything else whole."""
    shape = sent[name].shape
    if tensor.shape == shape:
        return tensor
    index = f"index/{name.partition('/')[2]}"
    if index not in sent:
        return tensor[tuple(slice(size) for size in shape)]
    chosen = sent[index].long().sort().values.to(tensor.device)
    return tensor[chosen] if kind(name) == "A" else tensor[:, chosen]
