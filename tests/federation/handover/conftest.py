"""A finished run of every task, and the files that its clients' models are asked about."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.federation.run import run
from folklora.recipe import Recipe

CLASSES = ("w1", "w2", "w3")
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
WORDS = {"vocab_size": 64, "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
PIXELS = {"image_size": 8, "patch_size": 4}

# name -> what a run of it has in its recipe, beside the model's and the data's folder
RUNS: dict[str, dict[str, Any]] = {
    "text": {"model": {"max_length": 32}, "data": {}},
    "vit": {"model": {}, "data": {"image": "image"}},
    "clip": {"model": {"task": "image-text", "template": "w9 {} w8"}, "data": {"image": "image"}},
    "captions": {"model": {"task": "image-text"}, "data": {"image": "image", "caption": "caption"}},
    "llama": {"model": {"task": "causal-lm", "max_length": 32}, "data": {}},
    "gpt2": {"model": {"task": "causal-lm", "max_length": 32, "template": "w5 {} w6"}, "data": {}},
}
MODELS = {"captions": "clip", "text": "bert"}


def tiny(architecture: str, folder: Path, words: Path) -> None:
    """A small model with random weights, and what reads its inputs."""
    import transformers as hf

    text = {**SMALL, **WORDS}
    made: dict[str, tuple[Callable[[], Any], Any]] = {
        "bert": (lambda: hf.BertConfig(**text), hf.AutoModel),
        "vit": (lambda: hf.ViTConfig(**SMALL, **PIXELS), hf.AutoModel),
        "clip": (
            lambda: hf.CLIPConfig(
                text_config=hf.CLIPTextConfig(**text).to_dict(),
                vision_config=hf.CLIPVisionConfig(**SMALL, **PIXELS).to_dict(),
                projection_dim=8,
            ),
            hf.AutoModel,
        ),
        "llama": (lambda: hf.LlamaConfig(**text, num_key_value_heads=1), hf.AutoModelForCausalLM),
        "gpt2": (
            lambda: hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3),
            hf.AutoModelForCausalLM,
        ),
    }
    config, auto = made[architecture]
    torch.manual_seed(0)
    auto.from_config(config()).save_pretrained(folder)
    if architecture != "vit":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(words / name, folder / name)
    if architecture in {"vit", "clip"}:
        side = {"height": 8, "width": 8}
        settings = {"image_processor_type": f"{'CLIP' if architecture == 'clip' else 'ViT'}ImageProcessor"}
        settings |= {"do_resize": True, "size": side, "do_center_crop": False, "do_rescale": True, "do_normalize": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def pictures(folder: Path) -> dict[str, str]:
    """Thirty files in class folders, each class of a colour of its own: name -> class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    found = {}
    for i, label in enumerate(CLASSES):
        (folder / label).mkdir(parents=True)
        for j in range(10):
            picture = rng.integers(0, 80, (10, 9, 3), dtype=np.uint8)
            picture[..., i] += 150
            found[f"{label}/{j}.png"] = label
            Image.fromarray(picture).save(folder / label / f"{j}.png")
    return found


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures by class, and ``captions.jsonl`` about them."""
    folder = tmp_path_factory.mktemp("shown") / "pictures"
    rows = [
        {"image": name, "caption": f"w4 {label} w7 w{10 + i}"}
        for i, (name, label) in enumerate(pictures(folder).items())
    ]
    (folder.parent / "captions.jsonl").write_text(
        "".join(json.dumps({**row, "image": f"pictures/{row['image']}"}) + "\n" for row in rows)
    )
    return folder


@pytest.fixture(scope="session")
def finished(
    tiny_model: Callable[[str], Path], tiny_data: Path, shown: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``finished("clip", "adapter.norm=true", ...)`` -> the directory of a run of two clients and two rounds."""
    folder = tmp_path_factory.mktemp("finished")
    spoken = folder / "spoken.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1}", "response": f"w{i + 2} w{i + 3}"} for i in range(30)]
    spoken.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"text": tiny_data, "vit": shown, "clip": shown, "captions": shown.parent / "captions.jsonl"}
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str, *overrides: str) -> Path:
        if (name, *overrides) not in made:
            architecture = MODELS.get(name, name)
            model = folder / architecture
            if not model.exists():
                tiny(architecture, model, tiny_model("bert"))
            document = {
                "model": {"name": str(model), "dtype": "float32", **RUNS[name]["model"]},
                "data": {"source": str(sources.get(name, spoken)), "clients": 2, **RUNS[name]["data"]},
                "adapter": {"rank": 3, "alpha": 12.0},
                "train": {"rounds": 2, "batch_size": 4, "lr": 0.05, "optimizer": "adamw"},
                "method": {"name": "fedit"},
            }
            document["data"] |= {"partition": "iid", "min_examples": 5, "limit": 30}
            path = folder / f"run-{len(made)}"
            run(Recipe.parse(document, overrides), path)
            made[name, *overrides] = path
        return made[name, *overrides]

    return make
