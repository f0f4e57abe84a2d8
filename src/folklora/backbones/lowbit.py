"""Backbones kept in few bits by a library: bitsandbytes, torchao.

Their layers stay linear layers and give numbers of the dtype that they are given, so adapters plug in as elsewhere, in
training and in evaluation. Embeddings, norms and a language model's head stay in floats. What is in few bits differs
from `folklora.backbones.quantize` in that memory is really saved, and that each library rounds in a way of its own.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from folklora.backbones import loading
from folklora.errors import BackboneError

NONE = "none"
NEEDS = {"bitsandbytes": ("bitsandbytes", "accelerate"), "torchao": ("torchao", "accelerate")}
GROUP = 32
"""torchao-int4: numbers that share a scale, as in its own default for processors."""
_LOW = ("Params4bit", "Int8Params")
"""bitsandbytes' parameters."""


def pretrained(name: str, auto: Any, how: str, device: torch.device, **arguments: Any) -> Any:
    """`folklora.backbones.loading.pretrained`, with weights kept as ``how`` (of ``model.quantize``) says.

    Raises
    ------
    BackboneError
        As that, and where the library is missing, cannot quantise this model on this machine, or leaves most of it
        in floats.
    """
    if how == NONE:
        return _in_floats(loading.pretrained(name, auto, **arguments), name)
    try:
        model = loading.pretrained(
            name,
            auto,
            quantization_config=_configuration(how),
            dtype=torch.float32,
            device_map={"": device},
            **arguments,
        )
        _refuse_floats(model)
    except BackboneError as error:
        needs = f" (widths that {GROUP} divides are needed)" if how == "torchao-int4" else ""
        raise BackboneError(f'model.quantize = "{how}"{needs}: {error}') from None
    return model


def is_low(model: Any) -> bool:
    """Whether a library keeps the model in few bits, and no tensor of it may be cast."""
    return bool(getattr(model, "is_quantized", False))


def keep_slopes(model: nn.Module) -> None:
    """Have gradients pass through layers of a model in evaluation mode, as all frozen ones are.

    In that mode bitsandbytes' layers of four bits turn, on some processors, into others that only infer: gradients
    through them are silently wrong. The mode makes no other difference to them.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()


def stored(model: nn.Module) -> int:
    """Bytes of all that the model consists of; tensors that are tied count once."""
    seen = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for _, tensor in plain_tensors(model)}
    return sum(seen.values())


def parameters(model: Any) -> int:
    """Numbers that the model consists of, however many of them share a byte."""
    if is_low(model):
        return int(model.num_parameters())
    return sum(parameter.numel() for parameter in model.parameters())


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's state by name, with torchao's tensors taken apart into those that they consist of."""
    for name, tensor in model.state_dict().items():
        yield from _apart(name, tensor)


def weight(layer: Any) -> Tensor:
    """A layer's weight in floats, as it computes with it."""
    tensor: Any = layer.weight
    kind = type(layer).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(tensor.data, tensor.quant_state)
        return found
    if kind == "Linear8bitLt":
        state = layer.state_dict()  # wherever the layer keeps its scales by now
        return state["weight"].float() * state["SCB"].float()[:, None] / 127
    found = tensor.dequantize() if _is_made_of_others(tensor) else tensor
    return found


def _in_floats(model: Any, name: str) -> Any:
    if is_low(model):
        method = getattr(model.config, "quantization_config", None)
        raise BackboneError(
            f'model.name = "{name}": its weights are in few bits already ({type(method).__name__}); allowed: weights '
            "in floats, and model.quantize to keep them in few"
        )
    return model


def _refuse_floats(model: Any) -> None:
    """A library passes over kinds of layers that it does not know, torchao GPT-2's and both a mixture's experts, and
    says nothing."""
    embeddings = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    low, left = 0, dict[str, int]()
    for place, module in model.named_modules():
        if isinstance(module, nn.Embedding) or id(module) in embeddings:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter).__name__ in _LOW or _is_made_of_others(parameter):
                low += module.in_features * module.out_features  # a parameter may hold two numbers a byte
            elif parameter.ndim > 1:
                left[f"{place}.{name}"] = parameter.numel()
    if (numbers := sum(left.values())) > low:
        raise BackboneError(
            f"the library leaves {numbers:,} of {numbers + low:,} numbers of the layers in floats, {min(left)} among "
            'them; allowed: another library, or "none"'
        )


def _configuration(how: str) -> Any:
    import transformers

    library, _, bits = how.partition("-")
    for package in NEEDS[library]:
        if importlib.util.find_spec(package) is None:
            raise BackboneError(f'{package} is not installed; pip install {package}, or allowed: "none"')
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every call how it computes
    if how == "bitsandbytes-8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if how == "bitsandbytes-4bit":
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if bits == "int8":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    # Not torchao's packed layouts: their kernels are some GPUs' only, and bfloat16's only.
    four: Any = getattr(torch, "int4")  # noqa: B009  torch's stubs do not know it
    return transformers.TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(GROUP)))


def _is_made_of_others(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def _apart(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    if not _is_made_of_others(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _apart(f"{name}.{part}", getattr(tensor, part))
