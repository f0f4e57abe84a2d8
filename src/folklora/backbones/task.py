"""The contract of a task: what an example, a loss, an answer and a score are.

The cohort trainer, prediction and the round loop know no more of a task than this; a new one is a file in this room
and a line in `folklora.backbones.tasks`. In the order data flows::

    encode(inputs)                    -> examples   what a source read, as the backbone takes it; once a run
    lay_out(groups)                   -> layout     some examples of K clients, as one batch
    losses(layout, labels, stacks, plugged)         the mean loss of each client, [K]
    answers(layout, stacks, plugged)                what the clients' models say of each example, [S, answer_width]
    score(answers, labels)            -> score      how good that is

``stacks`` are the tensors of K clients with a leading axis (`folklora.training.stacks`); ``plugged(batch)`` gives the
bank that makes the backbone run those token rows with their own clients' adapters. A task calls it once for each
forward pass of a tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import Shapes, Tensors
from folklora.backbones.batch import Batch
from folklora.backbones.frozen import Frozen
from folklora.backbones.metric import Metric, Score

Plug = Callable[[Batch], Bank | None]
"""The adapters for the rows of a batch; None runs the backbone as it is."""


class Example(Protocol):
    """One example as the backbone takes it; its length is how many tokens it costs."""

    def __len__(self) -> int: ...


class Layout(Protocol):
    """Examples of K clients as one batch; client k owns ``sequence_offsets[k]:sequence_offsets[k + 1]`` of the S."""

    @property
    def clients(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def sequence_offsets(self) -> tuple[int, ...]: ...


class Task(Protocol):
    """See the module's text.

    Attributes
    ----------
    classes
        Labels that examples may have; 1 where they have none.
    width
        Of a feature vector.
    answer_width
        Numbers in the answer to one example.
    """

    @property
    def backbone(self) -> Frozen: ...
    @property
    def classes(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def metric(self) -> Metric: ...
    @property
    def answer_width(self) -> int: ...

    def head_shapes(self) -> Shapes:
        """``head/...`` of each client's own head; empty where the backbone needs none."""
        ...

    def encode(self, inputs: Sequence[Any]) -> list[Any]: ...

    def refuse_layout(self, packed: str, batch_size: int) -> None:
        """Raises BackboneError where packing is asked for and the architecture cannot, or so few examples of a client
        teach nothing."""
        ...

    def lay_out(self, groups: Sequence[Sequence[Any]], packed: str = "auto", *, mixed: bool = True) -> Any:
        """``mixed``: whether a row may hold several clients' examples (see `folklora.backbones.batch.pack`)."""
        ...

    def losses(
        self, layout: Any, labels: Tensor, stacks: Tensors, plugged: Plug, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Mean loss of each client's examples, [K]; ``labels`` [S] int64; computed in the training dtype by default."""
        ...

    def counted(self, examples: Sequence[Any]) -> int:
        """Of how many things a client's loss on these examples is the mean: how much it counts beside other batches."""
        ...

    def answers(self, layout: Any, stacks: Tensors, plugged: Plug, dtype: torch.dtype = torch.float32) -> Tensor:
        """[S, answer_width] float32; the backbone computes in ``dtype``."""
        ...

    def features(self, layout: Any) -> Tensor:
        """[S, width] float32, of the frozen backbone without any adapter."""
        ...

    def score(self, answers: np.ndarray, labels: np.ndarray) -> Score: ...
