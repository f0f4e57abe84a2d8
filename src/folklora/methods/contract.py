"""What both ends of a method speak of: messages, a client and its data, and what was agreed before the first one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Generator, Tensor

from folklora.adapters.lowrank import LowRank, Shapes, Site, Tensors

State = dict[str, Tensor]
"""What the server remembers between rounds."""


@dataclass(frozen=True)
class Message:
    """What travels: named tensors, and a few numbers such as ``examples``.

    ``encodings`` names, for tensors that a method sends in a form of its own (a quantised download), one of
    `folklora.federation.codec`'s; all others travel as the recipe's ``message.dtype``.
    """

    tensors: Tensors = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    encodings: dict[str, str] = field(default_factory=dict)


class ClientData(Protocol):
    """A client's own data as a method may see it: features of the frozen backbone, never raw examples."""

    def quality(self) -> float:
        """What an audit makes of the training examples, in (0, 1], where ``[audit] weights`` asks for it; else 1."""
        ...

    def features(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
        """([n, d] float32, [n] int64 labels)."""
        ...

    def weight_gradients(self, head: Tensors, examples: int) -> Tensors:
        """``grad/<site>`` [d_out, d_in]: of the mean loss of at most so many training examples with respect to the
        frozen weight of each adapted layer, under a given ``head/weight`` and ``head/bias``, if the task has a head."""
        ...

    def layer_inputs(self, tensors: Tensors, examples: int) -> Tensors:
        """``input/<site>`` [d_in]: what each adapted layer sees under a client's model, mean over the tokens of at most
        so many validation examples."""
        ...

    def network_inputs(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor, Tensor]:
        """What `Network` takes of each example: ([n, ..., d] float32, [n] lengths, [n] int64 labels)."""
        ...


@dataclass
class Client:
    """What one client owns. ``tensors`` is its model; ``notes`` is whatever else a method keeps at home.

    ``secret`` seeds noise that protects the client. The local engine derives it from the recipe's seed, so that
    simulations repeat: whoever knows the seed can subtract that noise. A member of a real federation draws it from its
    own system.
    """

    id: str
    rank: int
    examples: int
    tensors: Tensors
    data: ClientData
    secret: int
    notes: Tensors = field(default_factory=dict)


class Network(Protocol):
    """The frozen backbone with one client's model in it as a function that can be differentiated, at either end: for
    methods whose messages are data, and whose server trains.

    An input is what stands behind the embedding layer, so that no example need be a real one.
    """

    @property
    def width(self) -> int:
        """Of an input."""
        ...

    @property
    def longest(self) -> int:
        """The most positions that an input may have."""
        ...

    def features(self, model: Tensors, inputs: Tensor, lengths: Sequence[int]) -> Tensor:
        """[n, d] of inputs [n, longest, width]; differentiable in them and in the model's factors and norms."""
        ...

    def public(self, count: int, length: int, generator: Generator) -> Tensor:
        """[count, length, width]: inputs made of neutral words, which are nobody's data."""
        ...


@dataclass(frozen=True)
class Context:
    """What both sides agree on before the first message: it follows from the recipe and the backbone alone.

    ``ranks`` are those clients start with; ``weight(site)`` is the frozen weight [d_out, d_in], float32, of an adapted
    layer. ``head`` has the shapes of the task's own ``head/weight`` and ``head/bias``, and is empty where it answers
    without one (a language model, CLIP). Statistics of the data are of ``classes`` classes, at least one, and of
    features of ``width``. Where ``promote`` is set, the best ``promote_share`` of the clients first validated get that
    rank. ``newcomers`` says that the server will be asked what it has for clients it never heard of, so that it keeps
    what it needs for an answer. ``head_rate`` multiplies the learning rate of the task's own head. ``network`` makes
    the differentiable backbone for an adapter, where the task has one.
    """

    seed: int
    ranks: Mapping[str, int]
    sites: tuple[Site, ...]
    alpha: float
    dropout: float
    classes: int
    width: int
    head: Shapes
    norms: Tensors
    rounds: int
    learning_rate: float
    batch_size: int
    local_epochs: int
    optimizer: str
    weight: Callable[[str], Tensor]
    promote: int | None = None
    promote_share: float = 0.1
    momentum: float = 0.0
    head_rate: float = 1.0
    newcomers: bool = False
    network: Callable[[LowRank], Network] | None = None

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self.ranks)
