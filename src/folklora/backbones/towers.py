"""Two frozen towers, one for pictures and one for texts, whose embeddings meet: CLIP and SigLIP.

The towers of a family differ in where a text is pooled and in what its tokens may see:

- CLIP's text tower is causal and pools at the token that ends a text. What stands behind it changes nothing, so texts
  are cut there and several short ones share a row.
- SigLIP's sees both ways and pools at the last position, of rows that are padded to full length and attend to their
  padding, as it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from folklora.adapters.layers import Bank
from folklora.backbones.backbone import PROBE
from folklora.backbones.batch import Batch, TokenIds, pack, pad
from folklora.backbones.frozen import Frozen, Settings, Wishes, choose_targets, settled
from folklora.backbones.loading import image_processor_of, pretrained, refuse_other_kind, tokenizer_of
from folklora.backbones.pictures import FUSED_FROM, PictureBatch, PictureProcessor, Pixels, lay_out_pictures
from folklora.backbones.tokenwise import tokenwise
from folklora.errors import BackboneError

Tower = Literal["image", "text"]

PARTS: dict[Tower, str] = {"image": "vision_model.", "text": "text_model."}
"""How the names of a tower's layers begin."""

FAMILIES = ("clip", "siglip")


class ImageTextBackbone(Frozen):
    """A frozen CLIP or SigLIP.

    Attributes
    ----------
    width
        p, the width of both towers' embeddings.
    tokens
        Tokens of one picture.
    max_length
        The longest text, in tokens.
    scale, bias
        What a cosine is multiplied by, and what is added: CLIP adds nothing.
    sigmoid
        Whether pairs are judged one by one (SigLIP), not among each other (CLIP).
    adapted
        The towers in which an adapter, or a LayerNorm that is trained, sits: embeddings of the others never change.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pictures: PictureProcessor,
        *,
        tower: Literal["both", "image", "text"] = "both",
        **settings: Unpack[Settings],
    ) -> None:
        kind = str(model.config.model_type)
        if kind not in FAMILIES:
            raise BackboneError(f'model.task = "image-text" with a {kind}; allowed: a model of {" or ".join(FAMILIES)}')
        self.sigmoid = kind == "siglip"
        self.tokenizer = tokenizer
        self.pictures = pictures
        self._towers: tuple[Tower, ...] = ("image", "text") if tower == "both" else (tower,)
        self.max_length = int(model.config.text_config.max_position_embeddings)
        model.eval().float()
        self._end = None if self.sigmoid else int(model.text_model.eos_token_id)
        self._refuse_strange_tokenizer(model.config.text_config.vocab_size)
        self.tokens, self.width = _probe(model, pictures.size)
        self._tokenwise = tokenwise(
            model, lambda model: model.vision_model(pixel_values=torch.zeros(2, 3, *pictures.size)), 2 * self.tokens
        ) | tokenwise(
            model,
            lambda model: model.text_model(input_ids=torch.zeros(2, self.max_length, dtype=torch.int64)),
            2 * self.max_length,
        )
        self.scale = float(model.logit_scale.detach().exp())
        self.bias = float(model.logit_bias.detach()) if self.sigmoid else 0.0
        super().__init__(model, **settings)
        trained = [site.name for site in self.sites] + list(self.norms)
        self.adapted = frozenset(t for t, part in PARTS.items() if any(name.startswith(part) for name in trained))

    @classmethod
    def load(
        cls, name: str, *, tower: Literal["both", "image", "text"] = "both", **wishes: Unpack[Wishes]
    ) -> ImageTextBackbone:
        """Load a backbone by folder or hub id.

        Raises
        ------
        BackboneError
            If it cannot be found or read, has not two towers, or has no tokenizer or image processor beside it.
        """
        from transformers import AutoModel

        settings = settled(wishes)
        refuse_other_kind(name, "image-text")
        pictures = PictureProcessor(image_processor_of(name))
        tokenizer = tokenizer_of(name)
        return cls(
            pretrained(name, AutoModel),
            tokenizer,
            pictures,
            tower=tower,
            **settings,
        )

    def targets(self, model: nn.Module, targets: str) -> list[str]:
        linear = [n for n, m in model.named_modules() if n in self._tokenwise and isinstance(m, nn.Linear)]
        layers = [name for name in linear if self._is_in_towers(name)]
        part = f' in adapter.tower = "{self._towers[0]}"' if len(self._towers) == 1 else ""
        return choose_targets(layers, targets, self.model_type, part)

    def norm_layers(self, model: nn.Module) -> list[str]:
        return [name for name in super().norm_layers(model) if name in self._tokenwise and self._is_in_towers(name)]

    def _is_in_towers(self, name: str) -> bool:
        return name.startswith(tuple(PARTS[tower] for tower in self._towers))

    def attention(self, model: Any) -> str:
        return "sdpa" if self.tokens >= FUSED_FROM and model._supports_sdpa else "eager"

    def encode_pictures(self, pictures: Sequence[np.ndarray]) -> list[Pixels]:
        """Bytes of the model's size; raises `DataError` where something is no picture."""
        return [Pixels(values, self.tokens) for values in self.pictures.encode(pictures)]

    def encode_texts(self, texts: Sequence[str], max_length: int = 128) -> list[TokenIds]:
        """Token ids of each text, cut to its first tokens: for CLIP up to the one that is pooled, for SigLIP padded."""
        if not texts:
            return []
        if self.sigmoid:
            encoded = self.tokenizer(list(texts), truncation=True, padding="max_length", max_length=self.max_length)
            return [tuple(ids) for ids in encoded["input_ids"]]
        length = min(max_length, self.max_length)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=length)
        return [tuple(ids[: self._pooled(ids) + 1]) for ids in encoded["input_ids"]]

    def picture_batch(self, groups: Sequence[Sequence[Pixels]]) -> PictureBatch:
        """Each client's pictures, one a row."""
        return lay_out_pictures(groups)

    def text_batch(self, groups: Sequence[Sequence[TokenIds]], packed: str = "auto", *, mixed: bool = True) -> Batch:
        """Each client's texts; those of CLIP packed (see `folklora.backbones.batch.pack`), those of SigLIP not."""
        self.refuse_packing(packed)
        if self.sigmoid or packed == "never":
            return pad(groups, self._end or 0)
        return pack(groups, self._end or 0, mixed=mixed, limit=min(self.max_length, 128))  # as CLIP counts positions

    def refuse_packing(self, packed: str) -> None:
        """Raises BackboneError where packing is asked for and the text tower cannot."""
        if packed == "always" and self.sigmoid:
            raise BackboneError(
                f'train.packed = "always": {self.model_type} pads every text to its full length; '
                'allowed: "auto" or "never"'
            )

    def embed_pictures(self, batch: PictureBatch, bank: Bank | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Embeddings of length one, [S, p] float32; the tower computes in ``dtype`` (default: the training dtype)."""
        pixels = self.pictures.normalise(batch.pixels.to(self.device)).to(dtype or self.dtype)
        return F.normalize(self.run(lambda model: _embed_pictures(model, pixels), bank, dtype).float(), dim=-1)

    def embed_texts(self, batch: Batch, bank: Bank | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Embeddings of length one, [S, p] float32; the tower computes in ``dtype`` (default: the training dtype)."""
        batch = batch.to(self.device)
        arguments: dict[str, Tensor] = {"input_ids": batch.tokens, "position_ids": batch.positions}
        if batch.packed:
            before = batch.positions[:, None, :, None] >= batch.positions[:, None, None, :]
            seen = before & (batch.segments[:, None, :, None] == batch.segments[:, None, None, :])
            lowest = torch.finfo(dtype or self.dtype).min
            mask = torch.zeros(seen.shape, dtype=dtype or self.dtype, device=self.device)
            arguments["attention_mask"] = mask.masked_fill_(~seen, lowest)

        def embed(model: Any) -> Tensor:
            output = model.text_model(**arguments)
            if self.sigmoid:
                pooled: Tensor = output.pooler_output
                return pooled
            states = output.last_hidden_state
            projected: Tensor = model.text_projection(states.reshape(-1, states.shape[-1])[batch.last])
            return projected

        return F.normalize(self.run(embed, bank, dtype).float(), dim=-1)

    def tokens_digest(self) -> bytes:
        words = sorted(self.tokenizer.get_vocab().items())
        return json.dumps([words, list(self.encode_texts([PROBE])[0])]).encode() + self.pictures.digest()

    def _pooled(self, ids: TokenIds) -> int:
        """Where CLIP pools a text: see `CLIPTextModel.forward`."""
        if self._end == 2:  # configurations from before the end of a text was named: its highest id
            return int(np.argmax(ids))
        return next((place for place, token in enumerate(ids) if token == self._end), 0)

    def _refuse_strange_tokenizer(self, vocabulary: int) -> None:
        if self.sigmoid and self.tokenizer.pad_token_id is None:
            raise BackboneError(
                "model.name: the tokenizer has no pad token, and a SigLIP pads every text; "
                "allowed: a tokenizer with pad_token"
            )
        ids = self.tokenizer(PROBE, truncation=True, max_length=self.max_length)["input_ids"]
        if self._end not in (None, 2, *ids):
            raise BackboneError(
                f"model.name: the tokenizer does not end a text with token {self._end}, at which the model pools; "
                "allowed: a tokenizer that does (text_config.eos_token_id)"
            )
        if len(self.tokenizer) > vocabulary:
            raise BackboneError(
                f"model.name: the tokenizer has {len(self.tokenizer)} tokens, and the model {vocabulary}; "
                "allowed: the tokenizer that belongs to the model"
            )


def _embed_pictures(model: Any, pixels: Tensor) -> Tensor:
    pooled: Tensor = model.vision_model(pixel_values=pixels).pooler_output
    return model.visual_projection(pooled) if hasattr(model, "visual_projection") else pooled


def _probe(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens of one picture, and the width of its embedding; refuses a size that the model does not take."""
    height, width = size
    blank = torch.zeros(1, 3, height, width)
    try:
        with torch.no_grad():
            tokens = model.vision_model(pixel_values=blank).last_hidden_state.shape[1]
            return int(tokens), int(_embed_pictures(model, blank).shape[1])
    except (ValueError, RuntimeError, AttributeError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"model.name: the image processor makes {height} x {width} pixels in 3 channels, and the "
            f"{model.config.model_type} does not take them: {problem.rstrip('.')}; "
            "allowed: the image processor that belongs to the model"
        ) from None
