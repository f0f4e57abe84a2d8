"""The task "one label for one text": tokens in, pooled features, a linear head a client, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.grouped import grouped_linear
from folklora.adapters.lowrank import Shapes, Tensors
from folklora.backbones.backbone import Backbone
from folklora.backbones.batch import Batch, TokenIds

POOLED_BY_FIRST_TOKEN = frozenset({"roberta", "xlm-roberta", "camembert"})
"""Where `pooling = "auto"` is the first token, as in the heads their authors fine-tune with."""


def default_pooling(backbone: Backbone) -> str:
    """A decoder's last token has seen all others; MiniLM and its kin are trained with the mean."""
    if backbone.causal:
        return "last"
    return "cls" if backbone.model_type in POOLED_BY_FIRST_TOKEN else "mean"


class Classification:
    """What a batch, a feature, a loss and a prediction are when texts have one of ``classes`` labels."""

    def __init__(self, backbone: Backbone, classes: int, *, pooling: str = "auto", max_length: int = 128) -> None:
        self.backbone = backbone
        self.classes = classes
        self.pooling = default_pooling(backbone) if pooling == "auto" else pooling
        self.max_length = min(max_length, backbone.max_length)

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of each text, special tokens included, cut at ``max_length``."""
        if not texts:
            return []
        encoded = self.backbone.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        fallback = [self.backbone.pad_token]  # a tokenizer without special tokens may give an empty sequence
        return [ids or fallback for ids in encoded["input_ids"]]

    def head_shapes(self) -> Shapes:
        return {"head/weight": (self.classes, self.backbone.width), "head/bias": (self.classes,)}

    def initial_head(self) -> Tensors:
        """Zeros: every class equally likely. A linear head needs no symmetry broken, and zero favours nobody."""
        return {name: torch.zeros(shape) for name, shape in self.head_shapes().items()}

    def features(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Pooled states [S, d] in float32."""
        batch = batch.to(hidden.device)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.pooling == "cls":
            return flat[batch.first].float()
        if self.pooling == "last":
            return flat[batch.last].float()
        segments = batch.segments.reshape(-1)
        tokens = (segments >= 0).nonzero().squeeze(1)
        sums = flat.new_zeros(batch.sequences, flat.shape[1], dtype=torch.float32)
        sums = sums.index_add(0, segments[tokens], flat[tokens].float())
        return sums / torch.bincount(segments[tokens], minlength=batch.sequences)[:, None]

    def logits(self, features: Tensor, batch: Batch, weight: Tensor, bias: Tensor) -> Tensor:
        """``[S, d]`` by each client's head ([K, classes, d], [K, classes]) -> [S, classes]."""
        return grouped_linear(features, weight, batch.sequence_offsets) + bias[batch.sequence_clients().to(bias.device)]

    def losses(self, logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of each client's sequences: [K]."""
        each = F.cross_entropy(logits, labels.to(logits.device), reduction="none")
        owners = batch.sequence_clients().to(logits.device)
        sums = each.new_zeros(batch.clients).index_add(0, owners, each)
        return sums / torch.bincount(owners, minlength=batch.clients)
