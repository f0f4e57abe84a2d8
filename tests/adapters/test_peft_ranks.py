"""Layers of different ranks in one folder: nothing padded, and one scaling for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from folklora.adapters.lowrank import LowRank, Site, Tensors
from folklora.adapters.peft import fold, highest_rank, load_peft, save_peft

# The second name ends with the first: PEFT's patterns match ends of names unless told not to.
SITES = (Site("attn.query", 8, 6), Site("deep.attn.query", 8, 10), Site("attn.value-out", 12, 9), Site("attn.q1", 5, 5))
RANKS = {"attn.query": 2, "deep.attn.query": 5, "attn.value-out": 3, "attn.q1": 5}
ADAPTER = LowRank(SITES, False, alpha=7.0)


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def own_ranks() -> Tensors:
    """Factors that came with ranks of their own: each scaled by alpha over its own."""
    tensors: Tensors = {}
    for i, site in enumerate(SITES):
        tensors |= draw(LowRank((site,), False, 7.0).shapes(RANKS[site.name]), i)
    return tensors


def changed_base() -> Tensors:
    """Factors that say nothing, and changes of the frozen weights of those ranks."""
    tensors = {name: torch.zeros(shape) for name, shape in ADAPTER.shapes(1).items()}
    for i, site in enumerate(SITES):
        rank = RANKS[site.name]
        up, down = draw({"up": (site.d_out, rank), "down": (rank, site.d_in)}, i).values()
        tensors[f"base/{site.name}"] = up @ down
    return tensors


def model() -> nn.Module:
    """A module with those layers, and one that has no adapter."""
    root = nn.Module()
    for name, d_in, d_out in [*((site.name, site.d_in, site.d_out) for site in SITES), ("deep.attn.key", 8, 10)]:
        parent = root
        *path, leaf = name.split(".")
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(leaf, nn.Linear(d_in, d_out))
    return root


@pytest.mark.parametrize("tensors", [own_ranks(), changed_base()], ids=["factors", "base"])
def test_stock_peft_reads_each_layer_at_its_own_rank(
    tmp_path: Path, tensors: Tensors, recwarn: pytest.WarningsRecorder
) -> None:
    from peft import PeftModel

    save_peft(tmp_path, tensors, ADAPTER, "tiny")
    loaded = PeftModel.from_pretrained(model(), str(tmp_path))
    assert not [w for w in recwarn if "pattern" in str(w.message) or "adapter keys" in str(w.message)]
    for site in SITES:
        layer: Any = loaded.get_submodule(f"base_model.model.{site.name}")
        assert layer.r["default"] == RANKS[site.name]
        assert layer.scaling["default"] == pytest.approx(7.0 / 5)
        theirs = layer.get_delta_weight("default").double()
        torch.testing.assert_close(theirs, ADAPTER.update(tensors, site.name), rtol=1e-5, atol=1e-6)
    key: Any = loaded.get_submodule("base_model.model.deep.attn.key")
    assert isinstance(key, nn.Linear)


def test_nothing_is_padded(tmp_path: Path) -> None:
    save_peft(tmp_path, changed_base(), ADAPTER, "tiny")
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == sum(
        RANKS[site.name] * (site.d_in + site.d_out) for site in SITES
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 5
    assert config["rank_pattern"] == {r"^attn\.query": 2, r"^attn\.value\-out": 3}
    assert config["alpha_pattern"] == pytest.approx({r"^attn\.query": 14 / 5, r"^attn\.value\-out": 21 / 5})


def test_one_rank_needs_no_pattern(tmp_path: Path) -> None:
    tensors = draw(ADAPTER.shapes(2))
    save_peft(tmp_path, tensors, ADAPTER, "tiny")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {}, {})
    assert all(torch.equal(each, tensors[name]) for name, each in fold(tensors, ADAPTER).items())  # not even scaled


def test_different_ranks_come_back_padded_to_the_highest(tmp_path: Path) -> None:
    tensors = own_ranks()
    save_peft(tmp_path, tensors, ADAPTER, "tiny")
    found, rank, alpha = load_peft(tmp_path, ADAPTER)
    assert (rank, alpha, highest_rank(found)) == (5, 7.0, 5)
    assert {name: tuple(each.shape) for name, each in found.items()} == ADAPTER.shapes(5)
    for site in SITES:
        torch.testing.assert_close(
            ADAPTER.update(found, site.name), ADAPTER.update(tensors, site.name), rtol=1e-6, atol=1e-7
        )


def test_a_folder_of_stock_peft_with_patterns_is_read(tmp_path: Path) -> None:
    """Ranks and scalings of their own, by the ends of names, as people write them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=4,
        target_modules=[site.name for site in SITES],
        rank_pattern={"value-out": 4, "deep.attn.query": 1},
        alpha_pattern={"q1": 9, "deep.attn.query": 2},
        init_lora_weights=False,
    )
    peft = get_peft_model(model(), config)
    peft.save_pretrained(str(tmp_path))
    found, rank, alpha = load_peft(tmp_path, ADAPTER)
    assert (rank, alpha) == (4, pytest.approx(4 * 4 / 3))
    for site in SITES:
        layer: Any = peft.get_submodule(f"base_model.model.{site.name}")
        ours = alpha / rank * found[f"B/{site.name}"] @ found[f"A/{site.name}"]
        torch.testing.assert_close(ours, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
