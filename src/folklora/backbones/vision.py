"""Plain vision transformers (ViT, DeiT, DINOv2, the image towers of CLIP and SigLIP); one label for one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from folklora.adapters.layers import Bank
from folklora.backbones.classification import LinearHead
from folklora.backbones.frozen import Frozen, Settings, Wishes, choose_targets, settled
from folklora.backbones.loading import image_processor_of, pretrained, refuse_other_kind
from folklora.backbones.pictures import FUSED_FROM, PictureBatch, PictureProcessor, Pixels, lay_out_pictures
from folklora.backbones.tokenwise import tokenwise
from folklora.errors import BackboneError

CLASS_TOKENS = ("cls_token", "class_embedding")
"""What the parameter is called that becomes the first token, where there is one."""


class VisionBackbone(Frozen):
    """A frozen vision transformer.

    Attributes
    ----------
    width
        d, the width of the last hidden state.
    tokens
        T, tokens of one picture: patches, and the class token (and registers) where there is one.
    has_class_token
        Whether the first of them is no patch.
    """

    def __init__(self, model: Any, pictures: PictureProcessor, **settings: Unpack[Settings]) -> None:
        self.pictures = pictures
        self.has_class_token = any(name.endswith(CLASS_TOKENS) for name, _ in model.named_parameters())
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # its output is never used: features are pooled by the task
        self.tokens, self.width = _probe(model, pictures.size)
        self._tokenwise = tokenwise(model, lambda model: _states(model, _two_pictures(pictures.size)), 2 * self.tokens)
        super().__init__(model, **settings)

    @classmethod
    def load(cls, name: str, **wishes: Unpack[Wishes]) -> VisionBackbone:
        """Load a backbone by folder or hub id.

        Raises
        ------
        BackboneError
            If it cannot be found or read, is no vision transformer, or has no image processor beside it.
        """
        from transformers import AutoModel

        settings = settled(wishes)
        refuse_other_kind(name, "image")
        pictures = PictureProcessor(image_processor_of(name))
        return cls(
            pretrained(name, AutoModel, unused="pooler."),
            pictures,
            **settings,
        )

    def targets(self, model: nn.Module, targets: str) -> list[str]:
        layers = [n for n, m in model.named_modules() if n in self._tokenwise and isinstance(m, nn.Linear)]
        return choose_targets(layers, targets, self.model_type)

    def norm_layers(self, model: nn.Module) -> list[str]:
        return [name for name in super().norm_layers(model) if name in self._tokenwise]

    def attention(self, model: Any) -> str:
        return "sdpa" if self.tokens >= FUSED_FROM and model._supports_sdpa else "eager"

    def encode(self, pictures: Sequence[np.ndarray]) -> list[Pixels]:
        """Bytes of the model's size; raises `DataError` where something is no picture."""
        return [Pixels(values, self.tokens) for values in self.pictures.encode(pictures)]

    def batch(self, groups: Sequence[Sequence[Pixels]], packed: str = "auto", *, mixed: bool = True) -> PictureBatch:
        """Each client's pictures, one a row; ``mixed`` changes nothing, because no row is shared."""
        self.refuse_packing(packed)
        return lay_out_pictures(groups)

    def refuse_packing(self, packed: str) -> None:
        """Raises BackboneError where packing is asked for: pictures leave no room in a row."""
        if packed == "always":
            raise BackboneError(
                f'train.packed = "always": {self.model_type} takes pictures, which are not packed; '
                'allowed: "auto" or "never"'
            )

    def hidden(self, batch: PictureBatch, bank: Bank | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The last hidden states [S, T, d], in the compute ``dtype`` (default: the training dtype)."""
        pixels = self.pictures.normalise(batch.pixels.to(self.device)).to(dtype or self.dtype)
        return self.run(lambda model: _states(model, pixels), bank, dtype)

    def tokens_digest(self) -> bytes:
        return self.pictures.digest()


class ImageClassification(LinearHead):
    """One of ``classes`` labels for each picture; see `LinearHead`.

    The feature is the class token's state where there is one, else the mean of all patches.
    """

    backbone: VisionBackbone

    def __init__(self, backbone: VisionBackbone, classes: int, *, pooling: str = "auto") -> None:
        if pooling == "last" or (pooling == "cls" and not backbone.has_class_token):
            allowed = '"auto", "mean" or "cls"' if backbone.has_class_token else '"auto" or "mean"'
            raise BackboneError(f'model.pooling = "{pooling}" with a {backbone.model_type}; allowed: {allowed}')
        default = "cls" if backbone.has_class_token else "mean"
        super().__init__(backbone, classes, default if pooling == "auto" else pooling)

    def encode(self, pictures: Sequence[np.ndarray]) -> list[Pixels]:
        """Each picture as the backbone takes it."""
        return self.backbone.encode(pictures)


def _states(model: Any, pixels: Tensor) -> Tensor:
    states: Tensor = model(pixel_values=pixels).last_hidden_state
    if model.config.model_type == "clip_vision_model":
        # CLIP norms only what it pools; that is the state which its training has shaped.
        states = model.post_layernorm(states)
    return states


def _two_pictures(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def _probe(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens of one picture, and their width.

    Raises
    ------
    BackboneError
        If the model does not take pictures of that size, or makes no sequence of tokens of them.
    """
    kind = model.config.model_type
    model.eval().float()
    try:
        with torch.no_grad():
            first, second = (_states(model, _two_pictures(size)) for _ in range(2))
    except (ValueError, RuntimeError, AttributeError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        height, width = size
        raise BackboneError(
            f"model.name: the image processor makes {height} x {width} pixels in 3 channels, and the {kind} does not "
            f"take them: {problem.rstrip('.')}; allowed: the image processor that belongs to the model"
        ) from None
    if first.dim() != 3:
        raise BackboneError(f"model.name: {kind} makes no sequence of tokens; allowed: a vision transformer")
    if not torch.equal(first, second):
        raise BackboneError(f"model.name: {kind} hides patches at random; allowed: a model that sees whole pictures")
    return int(first.shape[1]), int(first.shape[2])
