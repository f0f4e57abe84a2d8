"""A SASRec-style model (Kang & McAuley 2018, arXiv 1808.09781) in plain torch, and its training.

From the paper: item and learnt position embeddings, N blocks of causal self-attention and a point-wise feed-forward
network of the same width, the item embedding as output layer. Ours: layers normalise before them and before the output
(the published order does not train at eight blocks), heads are 16 wide, GELU, and the loss is the full cross-entropy,
which a hundred items allow, where the paper contrasts one drawn negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from sequences import LENGTH, PADDING, Sequences
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from folklora.randomness import derive

HEAD = 16
TOP = 10  # NDCG@10


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.mixed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.mixed(self.before(x)).view(rows, length, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(rows, length, width)))
        return x + self.dropout(self.down(gelu(self.up(self.between(x)))))


class SASRec(nn.Module):
    """[rows, length] items to [rows, length, symbols] scores of the item that follows each."""

    def __init__(self, symbols: int, layers: int, width: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(symbols, width)
        self.places = nn.Embedding(LENGTH - 1, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(layers)])
        self.last = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(symbols))
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=width**-0.5)

    def forward(self, items: Tensor) -> Tensor:
        x = self.dropout(self.items(items) + self.places.weight[: items.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.last(x) @ self.items.weight.T + self.bias


@dataclass(frozen=True)
class Training:
    """The same for every cell: cells of one size cost the same, whatever their share of the data.

    Attributes
    ----------
    steps, batch
        Steps of Adam, and users in each.
    looks
        Times that validation is looked at, evenly; the best is kept.
    lr
        Peak of Adam's rate at a width of 1; it falls with the root of the width, and over the steps as a cosine.
    """

    steps: int = 400
    batch: int = 24
    looks: int = 4
    lr: float = 0.04
    warmup: int = 40
    dropout: float = 0.1


def batches(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """What is seen, and what is asked for; `PADDING` asks for nothing."""
    found = torch.from_numpy(rows)
    return found[:, :-1].clamp(min=0), found[:, 1:]


@torch.no_grad()
def scores(model: SASRec, rows: np.ndarray) -> dict[str, float]:
    """Loss in nats, share of hits at 1, NDCG@10: of every event, ranked among all items."""
    model.eval()
    loss, hits, gain, events = 0.0, 0.0, 0.0, 0
    for start in range(0, len(rows), 256):
        items, wanted = batches(rows[start : start + 256])
        asked = wanted != PADDING
        logits, target = model(items)[asked], wanted[asked]
        loss += float(cross_entropy(logits, target, reduction="sum"))
        rank = (logits > logits.gather(1, target[:, None])).sum(1)
        hits += float((rank == 0).sum())
        gain += float((1 / torch.log2(rank + 2.0))[rank < TOP].sum())
        events += len(target)
    return {"loss": loss / events, "accuracy": hits / events, "ndcg": gain / events}


def train(
    data: Sequences, share: float, layers: int, width: int, seed: int, given: Training
) -> tuple[SASRec, dict[str, float], int]:
    """The model of the look with the lowest validation loss, that look's scores, and its step."""
    rows = data.part(share, seed)
    torch.manual_seed(derive(seed, "sasrec/init"))
    model = SASRec(data.symbols, layers, width, given.dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=given.lr, betas=(0.9, 0.98))
    order = torch.Generator().manual_seed(derive(seed, "sasrec/order"))
    waiting = torch.empty(0, dtype=torch.int64)
    best: tuple[float, dict[str, Tensor], dict[str, float], int] | None = None
    for step in range(1, given.steps + 1):
        while len(waiting) < given.batch:
            waiting = torch.cat([waiting, torch.randperm(len(rows), generator=order)])
        chosen, waiting = waiting[: given.batch].numpy(), waiting[given.batch :]
        progress = max(0.0, (step - given.warmup) / (given.steps - given.warmup))
        rate = given.lr * width**-0.5 * min(1.0, step / given.warmup) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        items, wanted = batches(rows[chosen])
        loss = cross_entropy(model(items).flatten(0, 1), wanted.flatten(), ignore_index=PADDING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % (given.steps // given.looks) == 0:
            found = scores(model, data.validation)
            if best is None or found["loss"] < best[0]:
                best = (found["loss"], {k: v.clone() for k, v in model.state_dict().items()}, found, step)
    assert best is not None
    model.load_state_dict(best[1])
    return model, best[2], best[3]
