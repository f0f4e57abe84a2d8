"""How likely a text is to one who has not seen it: a language model of the user's, or pairs of tokens counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from folklora.errors import AttackError, BackboneError


class Prior(Protocol):
    """Mean nats a token of a text; ``name`` is how a result calls it."""

    name: str

    def nats(self, tokens: Sequence[int]) -> float: ...


class Bigrams:
    """Pairs of tokens counted on public texts, mixed with single ones.

    ``p(b | a) = 0.7 c(a b) / c(a) + 0.3 (c(b) + 0.1) / (n + 0.1 V)``
    """

    def __init__(self, texts: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.name = f"bigrams of {len(texts)} public texts"
        self.singles: Counter[int] = Counter(token for text in texts for token in text)
        self.pairs: Counter[tuple[int, int]] = Counter(pair for text in texts for pair in pairwise(text))
        self.total = sum(self.singles.values()) + 0.1 * vocabulary

    def nats(self, tokens: Sequence[int]) -> float:
        if len(tokens) < 2:
            return 0.0
        found = 0.0
        for a, b in pairwise(tokens):
            pair = self.pairs[a, b] / self.singles[a] if self.singles[a] else 0.0
            found -= math.log(0.7 * pair + 0.3 * (self.singles[b] + 0.1) / self.total)
        return found / (len(tokens) - 1)


class LanguageModel:
    """A causal language model in a folder, with its own tokenizer; read from safetensors."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        from folklora.backbones.causal import CausalBackbone

        if not folder.is_dir():
            raise AttackError(f"--prior {folder}: no such folder; allowed: bigrams, none, or a language model's folder")
        try:
            self.backbone = CausalBackbone.load(str(folder), device="cpu", dtype="float32")
        except BackboneError as error:
            raise AttackError(f"--prior {folder}: {error}") from None
        self.name = f"language model {folder.name}"
        self.written = tokenizer

    @torch.no_grad()
    def nats(self, tokens: Sequence[int]) -> float:
        text = self.written.decode(list(tokens), skip_special_tokens=True)
        ids = self.backbone.tokenizer(text)["input_ids"][: self.backbone.max_length]
        if len(ids) < 2:
            return 0.0
        states = self.backbone.hidden(self.backbone.batch([[ids]], "never"), None, torch.float32)[0, :-1]
        return float(self.backbone.nats(states, torch.tensor(ids[1:]), torch.float32).mean())
