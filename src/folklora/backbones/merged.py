"""A client's whole model as an ordinary checkpoint: the base model's weights, with what the client adds to them.

``W0 + s B C A + base`` is computed in float64 and kept in the precision that the base model's file has, so a checkpoint
of a bfloat16 base is rounded as that is; of a float32 base it answers as base and adapter do.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from folklora.adapters.lowrank import LowRank, Tensors
from folklora.backbones.loading import find, pretrained
from folklora.errors import BackboneError

PROCESSING = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files of a checkpoint that say how inputs become tokens and pixels."""


def save_merged(folder: Path, name: str, task: str, adapter: LowRank, tensors: Tensors) -> None:
    """Write the model, its configuration, and copies of the base's tokenizer and processor files.

    Parameters
    ----------
    folder
        Exists, and is empty.
    name
        The base model: embedded name, folder or hub id.
    task
        Of the recipe: a language model keeps its head for words, every other model is the bare one.

    Raises
    ------
    BackboneError
        If the base cannot be read.
    OSError
        If the folder cannot be written.
    """
    import transformers

    auto = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModel
    model = pretrained(name, auto, unused="pooler.", dtype="auto")
    for site in adapter.sites:
        layer = model.get_submodule(site.name)
        update = adapter.update(tensors, site.name)
        # GPT-2's Conv1D keeps [d_in, d_out].
        _add(layer.weight, update if isinstance(layer, nn.Linear) else update.T)
    for norm, tensor in tensors.items():
        if norm.startswith("norm/"):
            model.get_parameter(norm.removeprefix("norm/")).data.copy_(tensor)
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # which are their owner's alone, and a server may be somebody else
        shutil.copymode(folder / "config.json", file)
    for file in _processing(name):
        shutil.copyfile(file, folder / file.name)


def _add(weight: Tensor, update: Tensor) -> None:
    weight.data = (weight.data.double() + update).to(weight.dtype)


def _processing(name: str) -> Iterator[Path]:
    """The base's own files: what is written anew by a library may read texts in another way."""
    where = find(name)
    if not Path(where).is_dir():
        from huggingface_hub import snapshot_download

        try:
            where = snapshot_download(where, allow_patterns=list(PROCESSING))
        except (OSError, ValueError) as error:
            raise BackboneError(f'model.name = "{name}": its tokenizer cannot be read: {error}') from None
    for pattern in PROCESSING:
        yield from (file for file in sorted(Path(where).glob(pattern)) if file.is_file())
