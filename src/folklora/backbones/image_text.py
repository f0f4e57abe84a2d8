"""The task of two towers: classes of pictures by text prompts, or pictures and their captions.

*By prompts*: each class name stands in a template, and a picture's logits are its cosines with the prompts' embeddings,
scaled as the model scales them. Where adapters sit in the text tower every client has class embeddings of its own,
computed with all others' in one forward pass. *By captions*: a client's minibatch is compared pair by pair, with the
loss that the model was trained with. There is no head: what a client learns is its adapters.

A tower in which no adapter sits gives the same embeddings for ever, so they are computed once, when examples are
encoded, and stand in the place of the pixels or the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.grouped import grouped_linear
from folklora.adapters.lowrank import Shapes, Tensors
from folklora.backbones.batch import Batch, TokenIds, repeat
from folklora.backbones.classification import accuracy, mean_cross_entropy
from folklora.backbones.contrastive import contrastive_losses, places, retrieved
from folklora.backbones.metric import ACCURACY, TEXT_TO_IMAGE, Score
from folklora.backbones.pictures import PictureBatch, Pixels
from folklora.backbones.task import Plug
from folklora.backbones.towers import ImageTextBackbone
from folklora.errors import BackboneError, ExampleError

__all__ = ["Example", "ImageText", "ImageTextBackbone", "ImageTextLayout"]

TEMPLATE = "a photo of a {}."
NAME_BITS = 24
"""Of each of the two whole numbers by which an answer names its caption, or its picture: so many are exact in
float32."""

BLOCK = 64
"""Examples of one pass when embeddings are computed once for all."""


@dataclass(frozen=True, slots=True)
class Example:
    """A picture, perhaps with its caption; of a tower without adapters the embedding, float32 [p].

    ``names`` are four numbers below 2^24: the first two are the same for the same caption, the others for the same
    picture.
    """

    picture: Pixels | np.ndarray
    caption: TokenIds | np.ndarray | None = None
    names: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __len__(self) -> int:
        parts = (part for part in (self.picture, self.caption) if part is not None)
        return max(1, sum(len(part) for part in parts if not isinstance(part, np.ndarray)))


@dataclass(frozen=True)
class ImageTextLayout:
    """Examples of K clients: a batch for each tower that runs, [S, p] embeddings for one that does not.

    ``texts`` are captions, one an example, or the prompts of all classes once a client; None where neither runs.
    """

    sequence_offsets: tuple[int, ...]
    pictures: PictureBatch | Tensor
    texts: Batch | Tensor | None
    names: Tensor  # [S, 4] float32

    @property
    def clients(self) -> int:
        return len(self.sequence_offsets) - 1

    @property
    def sequences(self) -> int:
        return self.sequence_offsets[-1]


class ImageText:
    """See the module's text.

    Parameters
    ----------
    class_names
        Names of the classes, in their order.
    captions
        Whether examples are pairs of a picture and its caption.
    template
        What stands around a class name; ``{}`` is its place.
    max_length
        Tokens; longer texts are cut. SigLIP's are as long as its text tower has positions.
    """

    metric = ACCURACY

    def __init__(
        self,
        backbone: ImageTextBackbone,
        class_names: Sequence[str],
        *,
        captions: bool = False,
        template: str | None = None,
        max_length: int = 128,
    ) -> None:
        template = TEMPLATE if template is None else template
        if template.count("{}") != 1:
            raise BackboneError(f"model.template = {template!r}; allowed: a text with one {{}}, the class name's place")
        self.backbone = backbone
        self.classes = len(class_names)
        self.captions = captions
        self.prompts = [template.replace("{}", name) for name in class_names]
        self.max_length = backbone.max_length if backbone.sigmoid else min(max_length, backbone.max_length)
        self._prompt_batches: dict[str, Batch] = {}

    @property
    def width(self) -> int:
        return self.backbone.width

    @property
    def answer_width(self) -> int:
        return 2 * self.width + 4 if self.captions else self.classes

    def head_shapes(self) -> Shapes:
        return {}

    def refuse_layout(self, packed: str, batch_size: int) -> None:
        self.backbone.refuse_packing(packed)
        if batch_size == 1 and self.captions and not self.backbone.sigmoid:
            raise BackboneError(
                "train.batch_size = 1: a caption is learnt against those of other pictures, and alone there is nothing "
                "to tell it from; allowed: 2 or more"
            )

    def encode(self, inputs: Sequence[Any]) -> list[Example]:
        """Pictures, or pairs (picture, caption), as the towers take them.

        Raises
        ------
        DataError
            If a picture is none.
        """
        if not self.captions:
            return [Example(picture) for picture in self._encode_pictures(inputs)]
        for index, pair in enumerate(inputs):
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], str)):
                raise ExampleError(index, f"of type {type(pair).__name__}; allowed: a picture with its caption")
        pictures = self._encode_pictures([picture for picture, _ in inputs])
        tokens = self.backbone.encode_texts([caption for _, caption in inputs], self.max_length)
        texts: Sequence[Any] = tokens if "text" in self.backbone.adapted else self._embed_texts(tokens)
        names = [
            (*_name(repr(tuple(ids)).encode()), *_name(np.asarray(picture).tobytes()))
            for ids, (picture, _) in zip(tokens, inputs, strict=True)
        ]
        return [Example(*each) for each in zip(pictures, texts, names, strict=True)]

    def lay_out(
        self, groups: Sequence[Sequence[Example]], packed: str = "auto", *, mixed: bool = True
    ) -> ImageTextLayout:
        """One batch for each tower; ``mixed`` says whether a row may hold texts of several clients."""
        offsets = (0, *np.cumsum([len(group) for group in groups]).tolist())
        flat = list(chain.from_iterable(groups))
        texts: Batch | Tensor | None = None
        if self.captions and "text" in self.backbone.adapted:
            captions: Any = [[example.caption for example in group] for group in groups]
            texts = self.backbone.text_batch(captions, packed, mixed=mixed)
        elif self.captions:
            texts = _stacked([example.caption for example in flat])
        elif "text" in self.backbone.adapted:
            texts = repeat(self._prompt_batch(packed), len(groups))
        pictures: PictureBatch | Tensor
        if "image" in self.backbone.adapted:
            pixels: Any = [[example.picture for example in group] for group in groups]
            pictures = self.backbone.picture_batch(pixels)
        else:
            pictures = _stacked([example.picture for example in flat])
        names = torch.tensor([example.names for example in flat], dtype=torch.float32)
        return ImageTextLayout(offsets, pictures, texts, names)

    def losses(
        self,
        layout: ImageTextLayout,
        labels: Tensor,
        stacks: Tensors,
        plugged: Plug,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Mean of each client's examples, [K]: cross-entropy over the classes, or the family's contrastive loss."""
        if not self.captions:
            return mean_cross_entropy(self._logits(layout, plugged, dtype), labels, layout)
        pictures, texts = self._pictures(layout, plugged, dtype), self._texts(layout, plugged, dtype)
        where, real = (tensor.to(pictures.device) for tensor in places(layout.sequence_offsets))
        cosines = torch.bmm(pictures[where], texts[where].transpose(1, 2))
        names = layout.names.to(pictures.device)[where]
        same = names[:, :, None] == names[:, None, :]
        twins = same[..., :2].all(3) | same[..., 2:].all(3)
        twins &= ~torch.eye(twins.shape[1], dtype=torch.bool, device=twins.device)
        logits = cosines * self.backbone.scale + self.backbone.bias
        return contrastive_losses(logits, real, twins, sigmoid=self.backbone.sigmoid)

    def counted(self, examples: Sequence[Example]) -> int:
        return len(examples)

    def answers(
        self, layout: ImageTextLayout, stacks: Tensors, plugged: Plug, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Logits [S, classes]; or of each pair both embeddings, one behind the other, and the names of both."""
        if not self.captions:
            return self._logits(layout, plugged, dtype)
        pictures, texts = (embed(layout, plugged, dtype) for embed in (self._pictures, self._texts))
        return torch.cat([pictures, texts, layout.names.to(pictures.device)], dim=1)

    def features(self, layout: ImageTextLayout) -> Tensor:
        """The pictures' embeddings, of length one."""
        return self._pictures(layout, lambda batch: None, torch.float32)

    def score(self, answers: np.ndarray, labels: np.ndarray) -> Score:
        """Right classes; or how many pictures find their caption, and beside it the share of captions that do."""
        if not self.captions:
            return accuracy(answers, labels)
        pictures, texts, captioned, pictured = np.split(answers, np.cumsum([self.width, self.width, 2]), axis=1)
        names = [np.unique(each, axis=0, return_inverse=True)[1] for each in (captioned, pictured)]
        back = retrieved(texts, pictures, names) / len(answers)
        return Score(float(retrieved(pictures, texts, names)), len(answers), {TEXT_TO_IMAGE.name: back})

    def _logits(self, layout: ImageTextLayout, plugged: Plug, dtype: torch.dtype | None) -> Tensor:
        pictures = self._pictures(layout, plugged, dtype)
        if layout.texts is None:
            cosines = pictures @ self._class_embeddings.T
        else:
            own = self._texts(layout, plugged, dtype).view(layout.clients, self.classes, self.width)
            cosines = grouped_linear(pictures, own, layout.sequence_offsets)
        return cosines * self.backbone.scale + self.backbone.bias

    def _pictures(self, layout: ImageTextLayout, plugged: Plug, dtype: torch.dtype | None) -> Tensor:
        batch = layout.pictures
        if isinstance(batch, Tensor):
            return batch.to(self.backbone.device)
        return self.backbone.embed_pictures(batch, plugged(batch), dtype)

    def _texts(self, layout: ImageTextLayout, plugged: Plug, dtype: torch.dtype | None) -> Tensor:
        batch = layout.texts
        assert batch is not None
        if isinstance(batch, Tensor):
            return batch.to(self.backbone.device)
        return self.backbone.embed_texts(batch, plugged(batch), dtype)

    @cached_property
    def _class_embeddings(self) -> Tensor:
        """[classes, p], of a text tower without adapters."""
        tokens = self.backbone.encode_texts(self.prompts, self.max_length)
        return _stacked(self._embed_texts(tokens)).to(self.backbone.device)

    def _prompt_batch(self, packed: str) -> Batch:
        """The prompts of all classes, of one client."""
        if packed not in self._prompt_batches:
            prompts = self.backbone.encode_texts(self.prompts, self.max_length)
            self._prompt_batches[packed] = self.backbone.text_batch([prompts], packed)
        return self._prompt_batches[packed]

    def _encode_pictures(self, pictures: Sequence[np.ndarray]) -> Sequence[Pixels | np.ndarray]:
        if "image" in self.backbone.adapted:
            return self.backbone.encode_pictures(pictures)
        found: list[np.ndarray] = []
        for start in range(0, len(pictures), BLOCK):
            pixels = self.backbone.encode_pictures(pictures[start : start + BLOCK])
            with torch.no_grad():
                embedded = self.backbone.embed_pictures(self.backbone.picture_batch([pixels]), None, torch.float32)
            found += list(embedded.cpu().numpy())
        return found

    def _embed_texts(self, tokens: Sequence[TokenIds]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for start in range(0, len(tokens), BLOCK):
            batch = self.backbone.text_batch([tokens[start : start + BLOCK]])
            with torch.no_grad():
                found += list(self.backbone.embed_texts(batch, None, torch.float32).cpu().numpy())
        return found


def _stacked(embeddings: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack(embeddings))


def _name(content: bytes) -> tuple[int, int]:
    """Two whole numbers that are the same for the same content, and by all odds for no other."""
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big")
    return digest >> NAME_BITS, digest & (2**NAME_BITS - 1)
