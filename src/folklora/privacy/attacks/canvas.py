"""What an attack paints on: free numbers of about unit size that become a batch's inputs.

Texts are embeddings; the tokens that the tokenizer puts around every text are public and not guessed. Pictures are
pixels in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.privacy.attacks.replica import Replica

SPREAD = 0.25
"""Of a pixel: a unit of what is painted."""


class PictureCanvas:
    """``count`` pictures of the size that the backbone sees."""

    def __init__(self, replica: Replica, count: int) -> None:
        self.size = (count, 3, *replica.backbone.pictures.size)

    def noise(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.size, generator=generator)

    def inputs(self, paint: Tensor) -> Tensor:
        return 0.5 + SPREAD * paint

    def boxed(self, paint: Tensor) -> Tensor:
        """The nearest paint that is a picture."""
        return paint.clamp(-0.5 / SPREAD, 0.5 / SPREAD)

    def pictures(self, paint: Tensor) -> Tensor:
        """[count, 3, height, width] in [0, 1]."""
        return self.inputs(self.boxed(paint.detach())).cpu().float()


class TextCanvas:
    """Texts of given lengths.

    Attributes
    ----------
    free
        [count, longest] bool: which tokens are to be guessed.
    """

    def __init__(
        self, replica: Replica, lengths: Sequence[int], around: tuple[list[int], list[int]], special: Sequence[int]
    ) -> None:
        self.lengths = list(lengths)
        self.vectors = replica.vectors
        longest = max(lengths)
        known = torch.full((len(self.lengths), longest), -1)
        for row, length in zip(known, self.lengths, strict=True):
            before, behind = around
            row[length:] = -2
            for place, token in [*enumerate(before), *((length - len(behind) + i, t) for i, t in enumerate(behind))]:
                if 0 <= place < length:
                    row[place] = token
        self.free = known == -1
        self.real = known != -2
        self.known = known.clamp_min(0)
        self.allowed = torch.ones(len(self.vectors), dtype=torch.bool)
        self.allowed[list(special)] = False
        words = self.vectors[self.allowed]
        self.spread = float(words.std())
        self.mean = words.mean(0)
        self.norm = float(words.norm(dim=1).mean())
        self._unit = torch.nn.functional.normalize(self.vectors, dim=1)

    def noise(self, generator: torch.Generator) -> Tensor:
        return torch.randn(*self.known.shape, self.vectors.shape[1], generator=generator)

    def inputs(self, paint: Tensor) -> Tensor:
        """Paint where tokens are free, the public tokens elsewhere."""
        device = self.vectors.device
        fixed = self.vectors[self.known.to(device)] * self.real.to(device)[..., None]
        return torch.where(self.free.to(device)[..., None], self.mean + self.spread * paint.to(device), fixed)

    def paint(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """What gives exactly these tokens' vectors."""
        tokens = self.known.clone()
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor(list(text))
        return ((self.vectors[tokens.to(self.vectors.device)] - self.mean) / self.spread).cpu()

    def length_penalty(self, paint: Tensor) -> Tensor:
        """LAMP's: how far the mean norm of the guessed vectors is from that of the vocabulary, squared and relative."""
        norms = self.inputs(paint)[self.free.to(self.vectors.device)].norm(dim=1)
        return ((norms.mean() - self.norm) / self.norm).square() if len(norms) else norms.sum()

    def paint_of(self, token: int) -> Tensor:
        """[d]: what gives exactly this token's vector."""
        return ((self.vectors[token] - self.mean) / self.spread).cpu()

    def nearest(self, paint: Tensor, count: int) -> Tensor:
        """[texts, longest, count]: the tokens that each vector is nearest to, by cosine."""
        vectors = torch.nn.functional.normalize(self.inputs(paint.detach()), dim=-1)
        scores = (vectors @ self._unit.T).masked_fill(~self.allowed.to(vectors.device), -2.0)
        return scores.topk(min(count, int(self.allowed.sum())), dim=-1).indices.cpu()

    def tokens(self, paint: Tensor) -> list[list[int]]:
        """The nearest token of every vector; public tokens are themselves."""
        nearest = torch.where(self.free, self.nearest(paint, 1)[..., 0], self.known)
        return [row[:length].tolist() for row, length in zip(nearest, self.lengths, strict=True)]


Canvas = PictureCanvas | TextCanvas
