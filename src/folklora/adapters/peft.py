"""Home to PEFT and back: one client's adapter as an ordinary LoRA folder that stock tools load.

A core folds away without loss: ``s B C A = s B (C A)``, so A' = C A and B is a plain LoRA of the same rank and scaling.
Where sites have different ranks, the folder says so (``rank_pattern``, ``alpha_pattern``), and all sites keep one
scaling: servers that know of no patterns compute ``lora_alpha / r`` everywhere, and that is right here too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn import functional as F

from folklora.adapters.lowrank import LowRank, Site, Tensors
from folklora.errors import RunError

_PREFIX = "base_model.model."

_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "classification": "FEATURE_EXTRACTION", "image-text": None}
"""Task of a recipe -> PEFT's. Its wrapper for features hands on ``inputs_embeds``, which models of two towers do not
take; without a type the arguments pass as they are."""

_UNLIKE_PLAIN_LORA = ("use_dora", "use_rslora", "lora_bias", "layer_replication")
"""Settings of PEFT under which the same tensors mean another product."""


def fold(tensors: Tensors, adapter: LowRank) -> Tensors:
    """Plain LoRA factors ``A/<site>``, ``B/<site>`` with the same product, each site at its own rank.

    The scaling of all sites is ``alpha / highest_rank(folded)``. A' = C A is formed in float64; a client that changed
    the frozen weights too (``base/<site>``) gets the factors of the sum.

    Raises
    ------
    RunError
        If the adapter is no low-rank product at all.
    """
    adapter.refuse_folding()
    if any(f"base/{site.name}" in tensors for site in adapter.sites):
        return _fold_base(tensors, adapter)
    highest = highest_rank(tensors)
    folded: Tensors = {}
    for site in adapter.sites:
        a, b = tensors[f"A/{site.name}"], tensors[f"B/{site.name}"]
        if adapter.core:
            a = (adapter.core_of(tensors, site.name) @ a.double()).float()
        if len(a) < highest:
            b = b * (adapter.scale(len(a)) / adapter.scale(highest))
        folded |= {f"A/{site.name}": a, f"B/{site.name}": b}
    return folded


def highest_rank(tensors: Tensors) -> int:
    """The rank of the site that has the highest."""
    return max(len(tensor) for name, tensor in tensors.items() if name.startswith("A/"))


def _fold_base(tensors: Tensors, adapter: LowRank) -> Tensors:
    """Factors of ``s B C A + base`` by singular value decomposition, at the rank that the sum has at each site.

    A sum that is nothing has rank 1: PEFT knows no rank 0.
    """
    parts = {}
    for site in adapter.sites:
        update = adapter.update(tensors, site.name)
        base = tensors.get(f"base/{site.name}", torch.zeros(())).double()
        # What lies below is the rounding of two float32 parts that may all but cancel (FeDeRA), not their sum.
        noise = torch.finfo(torch.float32).eps * (base.norm() + (update - base).norm())
        u, sigma, vt = torch.linalg.svd(update, full_matrices=False)
        rank = max(1, int((sigma > noise).sum()))
        parts[site.name] = u[:, :rank], sigma[:rank], vt[:rank]
    scale = adapter.scale(max(len(sigma) for _, sigma, _ in parts.values()))
    folded: Tensors = {}
    for name, (u, sigma, vt) in parts.items():
        root = torch.sqrt(sigma / scale)
        folded |= {f"A/{name}": (root[:, None] * vt).float(), f"B/{name}": (u * root).float()}
    return folded


def save_peft(
    folder: str | Path,
    tensors: Tensors,
    adapter: LowRank,
    base_model: str,
    classes: tuple[str, ...] = (),
    use: Mapping[str, Any] | None = None,
    *,
    transposed: bool = False,
) -> Path:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and what belongs to it (see `save_beside`).

    LayerNorms, where they were trained, are no PEFT matter: they are saved as ``norms.safetensors`` under the names of
    the backbone's state dictionary.

    Parameters
    ----------
    base_model
        What the folder names as its base: a hub id, or a folder as it is called on this machine.
    use
        How the model is used, beginning with its ``task``; default: a classifier.
    transposed
        Whether the adapted layers keep [d_in, d_out] (GPT-2's Conv1D).

    Raises
    ------
    RunError
        If the folder already holds an adapter or cannot be written.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise RunError(f"{folder} already holds an adapter; nothing was overwritten; allowed: a new folder")
    use = use or {"task": "classification"}
    folded = fold(tensors, adapter)
    weights: Tensors = {}
    for name, tensor in folded.items():
        factor, _, site = name.partition("/")
        weights[f"{_PREFIX}{site}.lora_{factor}.weight"] = tensor.contiguous()
    norms = {name.removeprefix("norm/"): tensor for name, tensor in tensors.items() if name.startswith("norm/")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not `save_file`: it makes files that nobody but their owner can read, and a server may be somebody else.
        (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
        if norms:
            (folder / "norms.safetensors").write_bytes(safetensors.torch.save(norms))
        save_beside(folder, tensors, classes, use)
        # The configuration comes last: a folder that has it is whole.
        config = _config(adapter, folded, base_model, _TASK_TYPES[use["task"]], transposed)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"{folder}: cannot be written: {error}") from None
    return folder


def save_beside(folder: Path, tensors: Tensors, classes: tuple[str, ...], use: Mapping[str, Any]) -> None:
    """What a user of the model needs and no library keeps: the head, the class names, how it is used.

    ``head.safetensors`` (``weight`` [classes, d], ``bias`` [classes]) where the task has a head, ``classes.json`` where
    it has classes, and ``task.json``.
    """
    if head := {name.removeprefix("head/"): each for name, each in tensors.items() if name.startswith("head/")}:
        (folder / "head.safetensors").write_bytes(safetensors.torch.save(head))
    for name, document in (("classes.json", list(classes)), ("task.json", dict(use))):
        if document:
            (folder / name).write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")


def _config(
    adapter: LowRank, folded: Tensors, base_model: str, task_type: str | None, transposed: bool
) -> dict[str, Any]:
    from peft import LoraConfig

    highest = highest_rank(folded)
    ranks = {site.name: len(folded[f"A/{site.name}"]) for site in adapter.sites}
    own = {_pattern(name): rank for name, rank in ranks.items() if rank != highest}
    config = LoraConfig(
        task_type=task_type,
        r=highest,
        lora_alpha=_whole(adapter.alpha),  # type: ignore[arg-type]  # PEFT says int, computes with any number
        rank_pattern=own,
        # alpha of each site over its rank is the same everywhere: PEFT then scales all sites alike.
        alpha_pattern={key: _whole(adapter.alpha * rank / highest) for key, rank in own.items()},
        lora_dropout=adapter.dropout,
        target_modules=list(ranks),
        fan_in_fan_out=transposed,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base_model,
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # a set has no order, a file should
    return config


def _pattern(site: str) -> str:
    """A site's name as PEFT wants it in a pattern: a regular expression, here for this name and no other."""
    return f"^{re.escape(site)}"


def _whole(number: float) -> float:
    """A whole number as such: readers of the file may expect one."""
    return int(number) if float(number).is_integer() else number


def load_peft(folder: str | Path, adapter: LowRank) -> tuple[Tensors, int, float]:
    """A LoRA folder of stock PEFT as ``A/<site>``, ``B/<site>``, with its rank and alpha.

    Sites of lower rank are padded with zeros to the highest, and their B takes what their scaling differs by.

    Raises
    ------
    RunError
        If the folder is no LoRA adapter for these sites.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        ranks = {key: int(own) for key, own in (config.get("rank_pattern") or {}).items()}
        alphas = {key: float(own) for key, own in (config.get("alpha_pattern") or {}).items()}
        unlike = [key for key in _UNLIKE_PLAIN_LORA if config.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise RunError(f"{folder}: not a PEFT LoRA folder ({error})") from None
    if unlike:
        raise RunError(f"{folder}: not plain LoRA (adapter_config.json sets {', '.join(unlike)})")
    for key in (*ranks, *alphas):
        if not any(_means(key, site) for site in adapter.sites):
            raise RunError(f"{folder}: the pattern {key!r} names no layer that adapter.targets names")
    if min([rank, *ranks.values()]) < 1 or not 0 < alpha < math.inf:
        raise RunError(f"{folder}: adapter_config.json has a rank below 1, or an alpha that is no positive number")
    found: Tensors = {}
    for site in adapter.sites:
        own_rank = next((own for key, own in ranks.items() if _means(key, site)), rank)
        own_alpha = next((own for key, own in alphas.items() if _means(key, site)), alpha)
        b = _taken(weights, folder, site, "B", (site.d_out, own_rank)) * (own_alpha / own_rank / (alpha / rank))
        found |= {f"A/{site.name}": _taken(weights, folder, site, "A", (own_rank, site.d_in)), f"B/{site.name}": b}
    if weights:
        raise RunError(f"{folder}: {min(weights)} belongs to no layer that adapter.targets names")
    highest = highest_rank(found)  # of what is there, not of what the configuration says
    for name, tensor in found.items():
        missing = highest - (len(tensor) if name.startswith("A/") else tensor.shape[1])
        found[name] = F.pad(tensor, (0, 0, 0, missing) if name.startswith("A/") else (0, missing))
    return found, highest, alpha * highest / rank


def _means(key: str, site: Site) -> bool:
    """Whether a key of a pattern names a site: in full, or its end. Names only; no expression of a file is run."""
    name = key.replace("\\", "")
    return name in {site.name, f"^{site.name}"} or site.name.endswith(f".{name}")


def _taken(weights: Tensors, folder: Path, site: Site, factor: str, shape: tuple[int, int]) -> torch.Tensor:
    key = f"{_PREFIX}{site.name}.lora_{factor}.weight"
    if key not in weights or tuple(weights[key].shape) != shape:
        raise RunError(f"{folder}: {key} is missing or not of shape {shape}")
    return weights.pop(key).to(torch.float32)
