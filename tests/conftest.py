"""Small real models and data, made here: random weights, a word-level tokenizer, sentences whose words tell all."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings

# Examples are the same in every run, and none fails because the machine was busy.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Tests kill processes, not machines: what the kernel has is safe, and the disk takes half of some tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(os, "sync", lambda: None)
        yield


class Ran(NamedTuple):
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def folklora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """``folklora("run", path, ...)`` in this process, as the entry point runs it; stdout and stderr of the process."""
    from folklora import cli

    def command(*arguments: Any) -> Ran:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["folklora", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return Ran(code or 0, *capfd.readouterr())

    return command


WORDS = 60
CLASSES = ("amber", "blue", "cyan", "dun")


def save_tokenizer(folder: Path) -> int:
    """A word-level tokenizer with [CLS] and [SEP]; returns the vocabulary size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def tiny_config(architecture: str, vocabulary: int) -> Any:
    """A configuration of width 32 with two layers."""
    from transformers import AlbertConfig, BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, RobertaConfig

    encoder: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    match architecture:
        case "albert":  # one block, six times
            return AlbertConfig(**{**encoder, "num_hidden_layers": 6}, embedding_size=16)
        case "bert":
            return BertConfig(**encoder)
        case "roberta":
            return RobertaConfig(**encoder, bos_token_id=2, eos_token_id=3, type_vocab_size=1)
        case "distilbert":
            return DistilBertConfig(
                vocab_size=vocabulary, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
            )
        case "llama":
            return LlamaConfig(**encoder, bos_token_id=2, eos_token_id=3)
        case "gpt2":
            return GPT2Config(
                vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=3
            )
    raise ValueError(architecture)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model("bert")`` -> the folder of a small random-weight Hugging Face model with a tokenizer."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            from transformers import AutoModel

            folder = tmp_path_factory.mktemp(architecture)
            vocabulary = save_tokenizer(folder)
            torch.manual_seed(0)
            AutoModel.from_config(tiny_config(architecture, vocabulary)).save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make


def sentences(count: int, seed: int, classes: int = len(CLASSES)) -> tuple[list[str], list[str]]:
    """Texts of 2 to 12 words and their labels: each class prefers words of its own."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    share = WORDS // classes
    for _ in range(count):
        label = int(rng.integers(classes))
        length = int(rng.integers(2, 13))
        own = rng.random(length) < 0.6
        words = np.where(own, label * share + rng.integers(share, size=length), rng.integers(WORDS, size=length))
        texts.append(" ".join(f"w{word}" for word in words))
        labels.append(CLASSES[label])
    return texts, labels


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv (240 rows: text, label, site) and test.csv (60 rows)."""
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", 240, 1), ("test", 60, 2)):
        texts, labels = sentences(count, seed)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "site"])
            pairs = enumerate(zip(texts, labels, strict=True))
            writer.writerows([text, label, f"site-{i % 4}"] for i, (text, label) in pairs)
    return folder


@pytest.fixture(scope="session")
def tiny_speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random-weight Llama that continues texts."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("speaker")
    config = tiny_config("llama", save_tokenizer(folder))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 questions in four topics; the answer repeats the question's first word and adds the topic's own."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(160):
        topic = i % 4
        question = [f"w{word}" for word in rng.integers(WORDS, size=rng.integers(2, 6))]
        rows.append({"prompt": " ".join(question), "response": f"{question[0]} w{topic}", "topic": f"topic-{topic}"})
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny_recipe(tiny_model: Callable[[str], Path], tiny_data: Path) -> Callable[..., Any]:
    """``tiny_recipe("method.name=fedit", ...)`` -> a Recipe of four clients that runs in about a second a round."""

    def make(*overrides: str) -> Any:
        from folklora.recipe import Recipe

        document = {
            "model": {"name": str(tiny_model("bert")), "dtype": "float32"},
            "data": {"source": str(tiny_data), "clients": 4, "partition": "dirichlet", "alpha": 1.0},
            "adapter": {"rank": 4},
            "train": {"rounds": 2, "batch_size": 8, "lr": 5e-3},
        }
        return Recipe.parse(document, overrides)

    return make


def save_caption_tokenizer(folder: Path, end_last: bool) -> tuple[int, int]:
    """A word-level tokenizer with a start and an end, as CLIP has; returns the vocabulary size and the end's id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(WORDS)]
    special = ["<pad>", "<unk>", "<start>"]
    ordered = [*special, *words, "<end>"] if end_last else [*special, "<end>", *words]
    vocabulary = {word: i for i, word in enumerate(ordered)}
    start, end = vocabulary["<start>"], vocabulary["<end>"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_input_names=["input_ids"],
    ).save_pretrained(folder)
    return len(vocabulary), end


def save_seeing_model(architecture: str, folder: Path) -> None:
    """Two layers of random weights over pictures of 12 x 12 pixels, which an image processor makes."""
    import transformers as hf
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    sees = {"hidden_size": 32, "intermediate_size": 48, "image_size": 12, "patch_size": 6, **layers}
    reads: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 12, **layers}
    square = {"height": 12, "width": 12}
    processor: Any = ViTImageProcessorPil(size=square)
    match architecture:
        case "clip" | "clip-old":
            # Old configurations call the end of a text 2, and the model then looks for the highest id.
            vocabulary, end = save_caption_tokenizer(folder, end_last=architecture == "clip-old")
            reads |= {"vocab_size": vocabulary, "eos_token_id": 2 if architecture == "clip-old" else end}
            config: Any = hf.CLIPConfig(text_config=reads, vision_config=sees, projection_dim=24)
            processor = CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=square)
        case "siglip":
            vocabulary, _ = save_caption_tokenizer(folder, end_last=False)
            reads |= {"vocab_size": vocabulary, "projection_size": 32}
            config = hf.SiglipConfig(text_config=reads, vision_config=sees)
            processor = SiglipImageProcessorPil(size=square)
        case "clip_vision_model":
            config = hf.CLIPVisionConfig(**sees)
        case "siglip_vision_model":
            config = hf.SiglipVisionConfig(**sees)
        case "vit":
            config = hf.ViTConfig(**sees)
        case "deit":
            config = hf.DeiTConfig(**sees)
        case "dinov2":
            config = hf.Dinov2Config(**{**sees, "mlp_ratio": 2})
        case _:
            raise ValueError(architecture)
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif name in ("logit_scale", "logit_bias"):
                parameter.fill_(1.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``seeing_model("clip")`` -> the folder of a small random-weight model that takes pictures."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            save_seeing_model(architecture, folder)
            made[architecture] = folder
        return made[architecture]

    return make


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Noise of many shapes, [height, width, 3]."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(5, 40, (count, 2))
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in shapes]


@pytest.fixture(scope="session")
def noise() -> Callable[..., list[np.ndarray]]:
    """``noise(5, seed=1)`` -> five pictures of different shapes."""
    return pictures
