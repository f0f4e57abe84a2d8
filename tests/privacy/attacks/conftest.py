"""Recipes that an attack is done with in seconds: one client's batch of one short text, or one small picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.recipe import Recipe

COLOURS = {"w1": (220, 40, 40), "w2": (40, 220, 40), "w3": (40, 40, 220)}


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures of 12 x 12 pixels in three colours, each with a gradient of its own from dark to light."""
    rng = np.random.default_rng(0)
    labels = rng.choice(list(COLOURS), 120)
    light = np.linspace(0.2, 1, 12)
    shades = [
        light[:, None] * (0.5 + 0.5 * light) if turn else (0.5 + 0.5 * light[:, None]) * light
        for turn in rng.integers(2, size=120)
    ]
    pixels = np.stack([shade[..., None] * COLOURS[label] for shade, label in zip(shades, labels, strict=True)])
    path = tmp_path_factory.mktemp("coloured") / "pictures.npz"
    np.savez(path, image=pixels.astype(np.uint8), label=labels)
    return path


@pytest.fixture(scope="session")
def fine_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT whose patches have fewer numbers (27) than its states (32): pixels follow from what its layers see."""
    import transformers as hf
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("fine")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(image_size=6, patch_size=3, **layers))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 6, "width": 6}).save_pretrained(folder)
    return folder


@pytest.fixture
def picture_recipe(seeing_model: Callable[[str], Path], fine_model: Path, coloured: Path) -> Callable[..., Recipe]:
    """``picture_recipe("vit", ...)``: three clients with pictures; "clip" and "siglip" go by prompts."""

    def make(kind: str, *overrides: str) -> Recipe:
        model: dict[str, Any] = {
            "dtype": "float32",
            "device": "cpu",
            "name": str(fine_model if kind == "fine" else seeing_model(kind)),
        }
        if kind not in {"vit", "fine"}:
            model |= {"task": "image-text", "template": "{}"}
        document = {
            "model": model,
            "data": {"source": str(coloured), "clients": 3, "alpha": 1.0, "image": "image"},
            "adapter": {"rank": 8},
            "method": {"name": "fedit"},
            "train": {"rounds": 2, "batch_size": 8, "lr": 1e-2},
        }
        return Recipe.parse(document, overrides)

    return make


@pytest.fixture
def chat_recipe(tiny_speaker: Path, tiny_chats: Path) -> Callable[..., Recipe]:
    """Four clients, each with its topic, and a language model."""

    def make(*overrides: str) -> Recipe:
        document = {
            "model": {"name": str(tiny_speaker), "task": "causal-lm", "dtype": "float32", "max_length": 24},
            "data": {"source": str(tiny_chats), "partition": "natural", "by": "topic"},
            "adapter": {"rank": 4},
            "method": {"name": "fedit"},
            "train": {"rounds": 2, "batch_size": 8, "lr": 5e-3},
        }
        return Recipe.parse(document, overrides)

    return make
