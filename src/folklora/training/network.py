"""The frozen backbone with one client's model in it as a function of embeddings; see `folklora.methods.contract`.

Embeddings are put in the place of what the backbone's embedding layer gives, so that an input need not be a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import LowRank, Tensors, kind
from folklora.backbones.batch import Batch
from folklora.backbones.classification import Classification
from folklora.backbones.task import Example, Task
from folklora.data.neutral import sentences
from folklora.methods.contract import Network
from folklora.training.stacks import plug


class Embeddings:
    """The embedding layer of a text backbone, and how to put something else in its place."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    @cached_property
    def layer(self) -> nn.Module:
        """The layer that turns token ids into vectors."""
        model: Any = self.backbone.run(lambda model: model, None, torch.float32)
        layer: nn.Module = model.get_input_embeddings()
        return layer

    @property
    def width(self) -> int:
        weight: Any = self.layer.weight
        return int(weight.shape[1])

    @cached_property
    def vectors(self) -> Tensor:
        """[vocabulary, width] float32: what it gives for each token."""
        weight: Any = self.layer.weight
        with torch.no_grad():
            found: Tensor = self.layer(torch.arange(weight.shape[0], device=self.backbone.device)).float()
        return found

    @contextmanager
    def replaced(self, vectors: Tensor) -> Iterator[None]:
        """Within it the layer gives these, [n, longest, width], whatever it is asked for."""
        hook = self.layer.register_forward_hook(lambda layer, arguments, output: vectors.to(output.dtype))
        try:
            yield
        finally:
            hook.remove()


def one_client(adapter: LowRank, model: Tensors, device: torch.device) -> tuple[Tensors, Callable[[Batch], Bank]]:
    """A model as a stack of one client, and what plugs it in; slopes go back to the model."""
    stacks = {name: (tensor.T if kind(name) == "B" else tensor)[None] for name, tensor in model.items()}
    scales = torch.tensor([adapter.scale(adapter.rank(model))], device=device)
    return stacks, lambda batch: plug(adapter, stacks, scales, batch, device)


class TextNetwork:
    """A `Network` of a text classifier."""

    def __init__(self, task: Classification, adapter: LowRank) -> None:
        self.task = task
        self.adapter = adapter
        self.embeddings = Embeddings(task.backbone)

    @property
    def width(self) -> int:
        return self.embeddings.width

    @property
    def longest(self) -> int:
        return self.task.max_length

    def features(self, model: Tensors, inputs: Tensor, lengths: Sequence[int]) -> Tensor:
        backbone = self.task.backbone
        here = {name: tensor.to(backbone.device, torch.float32) for name, tensor in model.items()}
        _, plugged = one_client(self.adapter, here, backbone.device)
        layout = self.task.lay_out([[[backbone.pad_token] * length for length in lengths]], "never")
        longest = max(lengths)
        with self.embeddings.replaced(inputs[:, :longest].to(backbone.device)):
            hidden = backbone.hidden(layout, plugged(layout), torch.float32)
        return self.task.pool(hidden, layout).to(inputs.device)

    def public(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        # A word is one token or more; what is cut off keeps the token that ends a text.
        encoded = self.task.encode(sentences(count, length, generator))
        cut = [[*tokens[: length - 1], tokens[-1]] for tokens in encoded]
        return embedded(self.task, cut)[0]


def embedded(task: Task, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """What stands behind the embedding layer of a text backbone: [n, longest, width] float32 on the CPU, zeros behind
    short ones; and how long each is, [n]."""
    vectors = Embeddings(task.backbone).vectors.cpu()
    texts: list[Any] = list(examples)
    found = [vectors[torch.tensor(list(tokens))] for tokens in texts]
    return pad_sequence(found, batch_first=True), torch.tensor([len(tokens) for tokens in texts])


def network_of(task: Task) -> Callable[[LowRank], Network] | None:
    """What makes a task's network; None where examples have no embeddings of tokens, or the task no head."""
    return partial(TextNetwork, task) if isinstance(task, Classification) else None
