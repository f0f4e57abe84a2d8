"""LoRA dropout of many clients at once, whose masks nobody's company changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.adapters.layers import Bank
from folklora.backbones.batch import Batch


class Dropout:
    """LoRA dropout whose masks depend on the client alone: not on K, not on the layout of the batch.

    Masks are drawn from the client's own generator in the order (site, sequence, position) and then placed where the
    tokens lie. Probabilities are exact to 2^-16.
    """

    def __init__(self, probability: float, batch: Batch, generators: Sequence[torch.Generator], bank: Bank) -> None:
        self.threshold = min(round(probability * 65536), 65535)
        self.generators = generators
        self.device = bank.token_clients.device
        segments, positions = batch.segments.reshape(-1), batch.positions.reshape(-1)
        tokens = (segments >= 0).nonzero().squeeze(1)
        self.order = tokens[torch.argsort(segments[tokens] * batch.row_length + positions[tokens])]
        self.rows = segments.numel()
        owners = batch.sequence_clients()[segments[self.order]]
        self.counts: list[int] = torch.bincount(owners, minlength=batch.clients).tolist()

    def __call__(self, site: str, width: int) -> Tensor:
        draws = []
        for count, generator in zip(self.counts, self.generators, strict=True):
            # 64 random bits give four numbers of 16: far cheaper than a float a number.
            words = torch.empty(-(-count * width // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
            draws.append(words.view(torch.int16)[: count * width].view(count, width))
        keep = torch.cat(draws) >= self.threshold - 32768
        mask = torch.zeros(self.rows, width)
        mask[self.order] = keep.float() / (1 - self.threshold / 65536)
        return mask.to(self.device)

    def narrowed(self, tokens: Tensor, clients: Sequence[bool]) -> Dropout:
        """Of some tokens; clients that are done draw no more, as they would not if they were alone."""
        fewer = copy.copy(self)
        places = torch.empty(self.rows, dtype=torch.int64)
        places[tokens] = torch.arange(len(tokens))
        fewer.order = places[
            self.order[torch.repeat_interleave(torch.tensor(list(clients)), torch.tensor(self.counts))]
        ]
        fewer.counts = [count if live else 0 for count, live in zip(self.counts, clients, strict=True)]
        fewer.rows = len(tokens)
        return fewer

    def state(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def restore(self, state: list[Tensor]) -> None:
        for generator, saved in zip(self.generators, state, strict=True):
            generator.set_state(saved)
