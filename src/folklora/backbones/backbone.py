"""A frozen Hugging Face model with sockets for the adapters of many clients.

Everything that knows of Hugging Face is here and in the tasks beside this file: where weights come from, which layers
are worth adapting in which architecture, how a batch becomes the model's arguments. Weights are read from safetensors
only.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from folklora.adapters.layers import Bank
from folklora.backbones import lowbit
from folklora.backbones.batch import Batch, TokenIds, pack, pad
from folklora.backbones.frozen import Frozen, Settings, Wishes, settled
from folklora.backbones.loading import refuse_other_kind, tokenizer_of
from folklora.errors import BackboneError

PROBE = "Ärzte & Köche: 3.5 % of w1, w2 – don't!"
"""A text whose tokens tell tokenizers of one vocabulary apart: case, accents, signs, digits."""

PACKABLE = frozenset({"albert", "bert", "distilbert", "roberta", "xlm-roberta", "camembert"})
"""Architectures that take position ids and a mask per pair of tokens."""


class Backbone(Frozen):
    """A text model: an encoder, or a decoder that serves as one.

    Attributes
    ----------
    width
        d, the width of the last hidden state.
    max_length
        The longest sequence, in tokens, that the model has positions for, whatever stands beside it in a batch.
    causal
        Whether it is a decoder, whose tokens see only what stands before them.
    """

    def __init__(self, model: Any, tokenizer: Any, **settings: Unpack[Settings]) -> None:
        self.tokenizer = tokenizer
        config, model_type = model.config, str(model.config.model_type)
        if getattr(config, "is_encoder_decoder", False):
            raise BackboneError(
                f"model.name: {model_type} is an encoder with a decoder; allowed: an encoder, or a decoder alone"
            )
        self.width = int(config.hidden_size)
        self.packable = model_type in PACKABLE
        self.causal = _is_causal(model_type)
        self._first_position = _first_position(model)
        self.max_length = _positions(config) - self._first_position
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # its output is never used: features are pooled by the task
        super().__init__(model, **settings)

    @classmethod
    def load(cls, name: str, *, quantize: str = "none", **wishes: Unpack[Wishes]) -> Backbone:
        """Load a backbone by embedded name, folder or hub id.

        Raises
        ------
        BackboneError
            If it cannot be found or read, or the device is not there.
        """
        from transformers import AutoModel

        settings = settled(wishes)
        refuse_other_kind(name, "text")
        # Hugging Face fills what a file lacks with random numbers: harmless for the pooler, which is dropped.
        model = lowbit.pretrained(name, AutoModel, quantize, torch.device(settings["device"]), unused="pooler.")
        tokenizer = tokenizer_of(name)
        return cls(
            model,
            tokenizer,
            **settings,
        )

    def batch(self, groups: list[list[TokenIds]], packed: str = "auto", *, mixed: bool = True) -> Batch:
        """Lay out each client's sequences; packed where the architecture allows and ``packed`` does.

        ``mixed``: see `folklora.backbones.batch.pack`; padded rows hold one sequence each anyway.
        """
        self.refuse_packing(packed)
        if self.packable and packed != "never":
            return pack(groups, self.pad_token, mixed=mixed)
        return pad(groups, self.pad_token)

    def refuse_packing(self, packed: str) -> None:
        """Raises BackboneError where packing is asked for and the architecture cannot."""
        if packed == "always" and not self.packable:
            raise BackboneError(
                f'train.packed = "always": {self.model_type} has no packed path; allowed: "auto" or "never" '
                f"(packed: {', '.join(sorted(PACKABLE))})"
            )

    @property
    def pad_token(self) -> int:
        # Padding needs some id that the model knows, even where the tokenizer has none; the mask hides whatever it is.
        token = self.tokenizer.pad_token_id
        return int(token) if token is not None and token < self.config.vocab_size else 0

    def hidden(self, batch: Batch, bank: Bank | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The last hidden states [rows, L, d], in the compute ``dtype`` (default: the training dtype)."""
        batch = batch.to(self.device)
        arguments: dict[str, Tensor] = {"input_ids": batch.tokens}
        if batch.packed:
            together = batch.segments[:, None, :, None] == batch.segments[:, None, None, :]
            lowest = torch.finfo(dtype or self.dtype).min
            arguments["attention_mask"] = torch.zeros(
                together.shape, dtype=dtype or self.dtype, device=self.device
            ).masked_fill_(~together, lowest)
        else:
            arguments["attention_mask"] = (batch.segments >= 0).long()
        if self.packable:
            arguments["position_ids"] = batch.positions + self._first_position
        states: Tensor = self.run(lambda model: model(**arguments).last_hidden_state, bank, dtype)
        return states

    def tokens_digest(self) -> bytes:
        words = sorted(self.tokenizer.get_vocab().items())
        return json.dumps([words, self.tokenizer(PROBE)["input_ids"]]).encode()


def _is_causal(model_type: str) -> bool:
    from transformers.models.auto import modeling_auto as auto

    # Encoders can be asked to generate too (BERT as a decoder), but only they can fill a mask.
    return (
        model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _positions(config: Any) -> int:
    """How many tokens of a text the model tells apart by place.

    LongRoPE (arXiv:2402.13753; Phi-3's long models) stops at the length it was first trained on: one text beyond it in
    a batch and transformers turns all texts of the batch by other angles, so that a client's loss were another in
    other company.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [ropes, *(of for of in ropes.values() if isinstance(of, dict))]  # some have one for each kind of layer
    limits = [of.get("original_max_position_embeddings") for of in ropes if of.get("rope_type") == "longrope"]
    limits.append(getattr(config, "max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit and limit > 0), default=sys.maxsize)


def _first_position(model: nn.Module) -> int:
    """The position of a sequence's first token: RoBERTa and its kin count from behind the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0
