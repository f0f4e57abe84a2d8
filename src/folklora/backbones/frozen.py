"""A frozen model in memory with sockets for the adapters of many clients: what all backbones have in common.

Which layers are worth adapting in which architecture, precisions, and what must be equal wherever messages mean the
same. How a batch becomes the model's arguments is the affair of each kind of backbone.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from folklora.adapters.layers import AdaptedLinear, AdaptedNorm, Bank, Socket
from folklora.adapters.lowrank import Site
from folklora.backbones import lowbit
from folklora.backbones.checkpointing import install
from folklora.backbones.depth import Depth
from folklora.backbones.loading import device_of
from folklora.backbones.quantize import WeightBits, quantize_weights, stored_bytes
from folklora.errors import BackboneError

T = TypeVar("T")

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
    r".*\.(query_key_value|c_attn|qkv|qkv_proj|Wqkv)",
    r".*\.attn\.(q|v)",
)


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are computed by the hardware rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    # On Arm ("bf16") the products also need oneDNN, which torch for macOS lacks.
    arm = found.get("bf16") and torch.backends.mkldnn.is_available()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or arm)


class Wishes(TypedDict, total=False):
    """How a backbone is loaded, as a recipe says it."""

    targets: str
    norm: bool
    device: str
    dtype: str
    weight_bits: WeightBits | None


class Settings(TypedDict, total=False):
    """The same on this machine: what `Frozen` takes."""

    targets: str
    norm: bool
    device: torch.device | str
    dtype: torch.dtype | None
    weight_bits: WeightBits | None


def settled(wishes: Wishes) -> Settings:
    """Which device is meant, and which precision.

    Raises
    ------
    BackboneError
        If the device is not there.
    """
    dtype = wishes.get("dtype", "auto")
    return {
        "targets": wishes.get("targets", "default"),
        "norm": wishes.get("norm", False),
        "device": device_of(wishes.get("device", "auto")),
        "dtype": None if dtype == "auto" else getattr(torch, dtype),
        "weight_bits": wishes.get("weight_bits"),
    }


class Frozen:
    """One frozen model in memory, shared by all clients.

    Attributes
    ----------
    sites
        The adapted layers, in the order of the model.
    norms
        LayerNorm name -> its frozen (weight, bias); empty unless they are trained.
    model_type
        The architecture's name at Hugging Face.
    parameters
        How many numbers it consists of.
    stored
        Bytes that a device would keep of it: float32, as coarse as ``weight_bits`` made it, or as a library keeps it.
    depth
        How often it applies the one block that all its layers are, if they are one.
    """

    def __init__(
        self,
        model: Any,
        *,
        targets: str = "default",
        norm: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weight_bits: WeightBits | None = None,
    ) -> None:
        self.config = model.config
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if has_native_bfloat16(self.device) else torch.float32)
        self.model_type = str(self.config.model_type)
        model.requires_grad_(False).eval()
        if lowbit.is_low(model):
            lowbit.keep_slopes(model)
            self.stored = lowbit.stored(model)
        else:
            model.to(self.device, torch.float32)
            self.stored = 4 * sum(p.numel() for p in model.parameters())
        if weight_bits is not None:
            quantize_weights(model, weight_bits)
            self.stored = stored_bytes(model, weight_bits)
        chosen = self.targets(model, targets)
        self.sites = tuple(Site(name, *_dimensions(model.get_submodule(name))) for name in chosen)
        self.norms = _norms(model, self.norm_layers(model)) if norm else {}
        self.parameters = lowbit.parameters(model)
        self._socket = Socket()
        self.depth = Depth(model, self._socket)
        for name in chosen:
            _replace(model, name, AdaptedLinear(model.get_submodule(name), name, self._socket))
        for name in self.norms:
            _replace(model, name, AdaptedNorm(model.get_submodule(name), name, self._socket))
        self._models: dict[torch.dtype, nn.Module] = {torch.float32: model}

    def targets(self, model: nn.Module, targets: str) -> list[str]:
        """Names of the layers to adapt: those that the regex matches, or the architecture's default.

        Raises
        ------
        BackboneError
            If it is no regex, or matches no linear layer.
        """
        return choose_targets(adaptable(model), targets, self.model_type)

    def norm_layers(self, model: nn.Module) -> list[str]:
        """Names of the LayerNorms that can be each client's own."""
        return [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]

    def run(self, call: Callable[[Any], T], bank: Bank | None, dtype: torch.dtype | None = None) -> T:
        """``call`` with the model in a compute ``dtype`` (default: the training dtype), the bank plugged in."""
        model = self._model(dtype or self.dtype)
        self._socket.bank = bank
        try:
            return call(model)
        finally:
            self._socket.bank = None

    def checkpoint(self) -> None:
        """Compute every layer anew in the backward pass, rather than keep what it computed; results are the same.

        Raises
        ------
        BackboneError
            If the architecture has no layers that can.
        """
        install(self._models[torch.float32], self._socket, self.depth.block)

    def attend(self, how: str) -> None:
        """Compute attention as "eager" or "sdpa", or as suits the kind of backbone ("auto").

        Raises
        ------
        BackboneError
            If the architecture cannot.
        """
        model: Any = self._models[torch.float32]
        wanted = self.attention(model) if how == "auto" else how
        if model.config._attn_implementation == wanted:
            return
        try:
            model.set_attn_implementation(wanted)
            taken = model.config._attn_implementation == wanted
        except ValueError:
            taken = False
        if not taken:
            raise BackboneError(f'model.attention = "{how}": {self.model_type} cannot; allowed: "auto" or "eager"')

    def attention(self, model: Any) -> str:
        """What "auto" means. Encoders of short texts gain little: MiniLM, packed, is 6 % faster with "sdpa"."""
        return "eager"

    def tokens_digest(self) -> bytes:
        """What tells apart the ways in which inputs become tokens; part of `digest`."""
        return b""

    @cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of what must be equal wherever messages mean the same: weights, vocabulary, tokens."""
        digest = hashlib.sha256()
        for name, tensor in sorted(lowbit.plain_tensors(self._models[torch.float32])):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        digest.update(self.tokens_digest())
        return digest.hexdigest()

    def weight(self, site: str) -> Tensor:
        """The frozen weight of an adapted layer, [d_out, d_in] float32 on the CPU."""
        layer: Any = self._models[torch.float32].get_submodule(site).base
        weight = lowbit.weight(layer).detach().float().cpu()
        return weight if isinstance(layer, nn.Linear) else weight.T  # GPT-2's Conv1D keeps [d_in, d_out]

    @property
    def in_floats(self) -> bool:
        """Whether its weights are floats, and not a library's few bits."""
        return not lowbit.is_low(self._models[torch.float32])

    @property
    def transposed(self) -> bool:
        """Whether the adapted layers keep [d_in, d_out], as GPT-2's Conv1D does."""
        layers: Any = self._models[torch.float32]
        return any(type(layers.get_submodule(site.name).base).__name__ == "Conv1D" for site in self.sites)

    def _model(self, dtype: torch.dtype) -> nn.Module:
        if dtype not in self._models:
            # The copy shares the socket: whatever is plugged in is plugged into every precision.
            memo = {id(self._socket): self._socket}
            model = copy.deepcopy(self._models[torch.float32], memo)
            # Not `model.to(dtype)`: rotary frequencies are buffers, and rounding them would bend a decoder's positions.
            for parameter in model.parameters():
                if parameter.is_floating_point():  # a library's bits are none
                    parameter.data = parameter.data.to(dtype)
            self._models[dtype] = model
        return self._models[dtype]


def _dimensions(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    rows, columns = layer.weight.shape  # GPT-2's Conv1D keeps [d_in, d_out]
    return int(rows), int(columns)


def adaptable(model: nn.Module) -> list[str]:
    """Names of a model's linear layers, in its order."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and not name.startswith("pooler")
    ]


def choose_targets(layers: list[str], targets: str, model_type: str, part: str = "") -> list[str]:
    """Those of ``layers`` that a regex, or the architecture's default, names; ``part``: what of a model they are."""
    if targets != "default":
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise BackboneError(
                f"adapter.targets = {targets!r}: not a regular expression: {error}; "
                f'allowed: "default", or a regex over linear layers, {_called(layers)}'
            ) from None
        chosen = [name for name in layers if pattern.fullmatch(name)]
        if not chosen:
            raise BackboneError(
                f"adapter.targets = {targets!r} matches no linear layer of this {model_type}{part}; "
                f'allowed: "default", or a regex over its linear layers, {_called(layers)}'
            )
        return chosen
    for candidate in (DEFAULT_TARGETS.get(model_type), *FALLBACK_TARGETS):
        if candidate is not None:
            chosen = [name for name in layers if re.fullmatch(candidate, name)]
            if chosen:
                return chosen
    raise BackboneError(
        f'adapter.targets = "default": no default for {model_type}; '
        f"allowed: a regex over its linear layers, {_called(layers)}"
    )


def _called(layers: list[str]) -> str:
    return f"which are called like: {', '.join(layers[:8])}"


def _norms(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    found = {
        name: (layer.weight.detach().float().cpu().clone(), layer.bias.detach().float().cpu().clone())
        for name, layer in layers.items()
        if layer.bias is not None
    }
    if not found:
        raise BackboneError("adapter.norm = true: this backbone has no LayerNorm with a gain and a shift")
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
