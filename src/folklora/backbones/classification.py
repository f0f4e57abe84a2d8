"""The task "one label for one text": tokens in, pooled features, a linear head a client, cross-entropy, accuracy.

What it shares with pictures (`folklora.backbones.vision`) is the class `LinearHead`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.grouped import grouped_linear
from folklora.adapters.lowrank import Shapes, Tensors
from folklora.backbones.backbone import Backbone
from folklora.backbones.batch import Batch, TokenIds
from folklora.backbones.metric import ACCURACY, Score
from folklora.backbones.slopes import felt
from folklora.backbones.task import Layout, Plug

if TYPE_CHECKING:
    from folklora.backbones.vision import VisionBackbone

POOLED_BY_FIRST_TOKEN = frozenset({"roberta", "xlm-roberta", "camembert"})
"""Where `pooling = "auto"` is the first token, as in the heads their authors fine-tune with."""


def default_pooling(backbone: Backbone) -> str:
    """A decoder's last token has seen all others; MiniLM and its kin are trained with the mean."""
    if backbone.causal:
        return "last"
    return "cls" if backbone.model_type in POOLED_BY_FIRST_TOKEN else "mean"


class LinearHead:
    """One of ``classes`` labels for each sequence: pooled states, a linear head a client, cross-entropy, accuracy."""

    backbone: Backbone | VisionBackbone

    metric = ACCURACY

    def __init__(self, backbone: Backbone | VisionBackbone, classes: int, pooling: str) -> None:
        self.backbone = backbone
        self.classes = classes
        self.pooling = pooling

    @property
    def width(self) -> int:
        return self.backbone.width

    @property
    def answer_width(self) -> int:
        return self.classes

    def refuse_layout(self, packed: str, batch_size: int) -> None:
        self.backbone.refuse_packing(packed)

    def lay_out(self, groups: Sequence[Sequence[Any]], packed: str = "auto", *, mixed: bool = True) -> Batch:
        batch: Batch = self.backbone.batch([list(group) for group in groups], packed, mixed=mixed)
        return batch

    def head_shapes(self) -> Shapes:
        return {"head/weight": (self.classes, self.backbone.width), "head/bias": (self.classes,)}

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states [rows, L, d] to one vector a sequence, [S, d] float32."""
        batch = batch.to(hidden.device)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.pooling == "cls":
            return flat[batch.first].float()
        if self.pooling == "last":
            return flat[batch.last].float()
        return mean_pooled(hidden, batch)

    def logits(self, features: Tensor, batch: Batch, weight: Tensor, bias: Tensor) -> Tensor:
        """``[S, d]`` by each client's head ([K, classes, d], [K, classes]) -> [S, classes]."""
        return grouped_linear(features, weight, batch.sequence_offsets) + bias[batch.sequence_clients().to(bias.device)]

    def losses(
        self, layout: Batch, labels: Tensor, stacks: Tensors, plugged: Plug, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Mean cross-entropy of each client's sequences: [K]."""
        return mean_cross_entropy(self._logits(layout, stacks, plugged, dtype), labels, layout)

    def counted(self, examples: Sequence[Any]) -> int:
        return len(examples)

    def answers(self, layout: Batch, stacks: Tensors, plugged: Plug, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits [S, classes]."""
        return self._logits(layout, stacks, plugged, dtype)

    def _logits(self, batch: Any, stacks: Tensors, plugged: Plug, dtype: torch.dtype | None) -> Tensor:
        features = self.pool(self.backbone.hidden(batch, plugged(batch), dtype), batch)
        return self.logits(features, batch, stacks["head/weight"], stacks["head/bias"])

    def features(self, layout: Any) -> Tensor:
        """Pooled states [S, d] of the frozen backbone."""
        return self.pool(self.backbone.hidden(layout, None, torch.float32), layout)

    def score(self, answers: np.ndarray, labels: np.ndarray) -> Score:
        return accuracy(answers, labels)


class Classification(LinearHead):
    """One label for each text; see `LinearHead`."""

    backbone: Backbone

    def __init__(self, backbone: Backbone, classes: int, *, pooling: str = "auto", max_length: int = 128) -> None:
        super().__init__(backbone, classes, default_pooling(backbone) if pooling == "auto" else pooling)
        self.max_length = min(max_length, backbone.max_length)

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of each text, special tokens included, cut at ``max_length``."""
        if not texts:
            return []
        encoded = self.backbone.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        fallback = [self.backbone.pad_token]  # a tokenizer without special tokens may give an empty sequence
        return [ids or fallback for ids in encoded["input_ids"]]


def mean_pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """Hidden states [rows, L, d] to the mean of each sequence's, [S, d] float32."""
    flat, segments = hidden.reshape(-1, hidden.shape[-1]), batch.segments.to(hidden.device).reshape(-1)
    tokens = (segments >= 0).nonzero().squeeze(1)
    sums = flat.new_zeros(batch.sequences, flat.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, segments[tokens], flat[tokens].float())
    return sums / torch.bincount(segments[tokens], minlength=batch.sequences)[:, None]


def mean_cross_entropy(logits: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """Of each client's examples, [K], from logits [S, classes] and labels [S]."""
    each = F.cross_entropy(felt(logits), labels.to(logits.device), reduction="none")
    counts = torch.tensor(layout.sequence_offsets).diff().to(logits.device)
    owners = torch.repeat_interleave(torch.arange(layout.clients, device=logits.device), counts)
    return each.new_zeros(layout.clients).index_add(0, owners, each) / counts


def accuracy(logits: np.ndarray, labels: np.ndarray) -> Score:
    """How many of the examples have their own label's logit highest: from [n, classes] and [n]."""
    return Score(float((logits.argmax(1) == labels).sum()), len(labels))
