"""The classification task: pooling sentence by sentence, heads and losses client by client, and encoding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.backbones.backbone import Backbone
from folklora.backbones.batch import Batch
from folklora.backbones.classification import Classification, mean_cross_entropy

GROUPS = [[[5, 6, 7], [8], [9, 10, 11, 12, 13]], [[14, 15]], [[16, 17, 18, 19], [20, 21]]]
SEQUENCES = [sequence for group in GROUPS for sequence in group]
OWNERS = [0, 0, 0, 1, 2, 2]
WIDTH = 32


@pytest.fixture
def task(tiny_model: Callable[[str], Path]) -> Classification:
    return Classification(Backbone.load(str(tiny_model("bert")), dtype="float32"), 3)


def hidden_like(batch: Batch) -> Tensor:
    return torch.randn(*batch.tokens.shape, WIDTH, generator=torch.Generator().manual_seed(0))


def naive(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """Find each sentence's states by its (unique) tokens and pool them."""
    flat, tokens = hidden.reshape(-1, WIDTH), batch.tokens.reshape(-1).tolist()
    pooled = []
    for sequence in SEQUENCES:
        states = torch.stack([flat[tokens.index(token)] for token in sequence])
        pooled.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return torch.stack(pooled)


@pytest.mark.parametrize("layout", ["always", "never"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling(task: Classification, pooling: str, layout: str) -> None:
    task = Classification(task.backbone, 3, pooling=pooling)
    batch = task.backbone.batch(GROUPS, layout)
    hidden = hidden_like(batch)
    torch.testing.assert_close(task.pool(hidden, batch), naive(hidden, batch, pooling))
    half = task.pool(hidden.bfloat16(), batch)
    assert half.dtype == torch.float32  # the sum is taken in full precision, whatever the states are
    torch.testing.assert_close(half, naive(hidden.bfloat16().float(), batch, pooling))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_passes_gradients_to_the_right_tokens(task: Classification, pooling: str) -> None:
    task = Classification(task.backbone, 3, pooling=pooling)
    batch = task.backbone.batch(GROUPS)
    ours, theirs = (hidden_like(batch).requires_grad_() for _ in range(2))
    weight = torch.randn(len(SEQUENCES), WIDTH, generator=torch.Generator().manual_seed(1))
    (task.pool(ours, batch) * weight).sum().backward()
    (naive(theirs, batch, pooling) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [("bert", "mean"), ("distilbert", "mean"), ("roberta", "cls"), ("llama", "last"), ("gpt2", "last")],
)
def test_pooling_follows_the_architecture_unless_it_is_named(
    tiny_model: Callable[[str], Path], architecture: str, pooling: str
) -> None:
    backbone = Backbone.load(str(tiny_model(architecture)), dtype="float32")
    assert Classification(backbone, 3).pooling == pooling
    assert Classification(backbone, 3, pooling="cls").pooling == "cls"


def test_each_client_has_its_own_head(task: Classification) -> None:
    batch = task.backbone.batch(GROUPS)
    g = torch.Generator().manual_seed(0)
    features = torch.randn(len(SEQUENCES), WIDTH, generator=g)
    weight, bias = torch.randn(3, 3, WIDTH, generator=g), torch.randn(3, 3, generator=g)
    logits = task.logits(features, batch, weight, bias)
    expected = torch.stack([weight[k] @ feature + bias[k] for k, feature in zip(OWNERS, features, strict=True)])
    torch.testing.assert_close(logits, expected)


def test_the_loss_of_a_client_is_the_mean_over_its_own_sequences(task: Classification) -> None:
    batch = task.backbone.batch(GROUPS)
    logits = torch.randn(len(SEQUENCES), 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    owners = torch.tensor(OWNERS)
    expected = [F.cross_entropy(logits[owners == k], labels[owners == k]) for k in range(3)]
    torch.testing.assert_close(mean_cross_entropy(logits, labels, batch), torch.stack(expected))


def test_a_head_is_one_linear_layer(task: Classification) -> None:
    assert task.head_shapes() == {"head/weight": (3, WIDTH), "head/bias": (3,)}


# -- encoding --------------------------------------------------------------------------------------------------------


def test_texts_become_tokens_with_the_special_ones(task: Classification) -> None:
    assert task.encode(["w0 w1", "", "w59 unknown"]) == [[2, 4, 5, 3], [2, 3], [2, 63, 1, 3]]
    assert task.encode([]) == []


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "llama", "gpt2"])
def test_a_text_longer_than_the_model_takes_is_cut(tiny_model: Callable[[str], Path], architecture: str) -> None:
    backbone = Backbone.load(str(tiny_model(architecture)), dtype="float32")
    text = " ".join(f"w{i % 60}" for i in range(500))
    task = Classification(backbone, 3, max_length=128)
    # 64 positions; RoBERTa leaves those up to the padding index (0 in this model) unused.
    assert task.max_length == (63 if architecture == "roberta" else 64)
    ids = task.encode([text])[0]
    assert len(ids) == task.max_length
    assert (ids[0], ids[-1]) == (2, 3)  # cut before the closing token, not after it
    for layout in ("auto", "never"):
        assert backbone.hidden(backbone.batch([[ids]], layout)).isfinite().all()
    assert len(Classification(backbone, 3, max_length=10).encode([text])[0]) == 10


def test_the_usable_length_of_a_real_roberta_is_512(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModel, AutoTokenizer, CamembertConfig, RobertaConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("bert"))
    for config in (RobertaConfig, CamembertConfig):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = AutoModel.from_config(
            config(vocab_size=64, max_position_embeddings=514, pad_token_id=1, **sizes), attn_implementation="eager"
        )
        task = Classification(Backbone(model, tokenizer, dtype=torch.float32), 3, max_length=8192)
        assert task.max_length == 512
        batch = task.backbone.batch([[[9] * 512]])
        assert task.backbone.hidden(batch).isfinite().all()


def test_a_model_without_a_limit_takes_what_the_recipe_says(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModel, AutoTokenizer, BloomConfig

    model = AutoModel.from_config(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2), attn_implementation="eager"
    )
    backbone = Backbone(model, AutoTokenizer.from_pretrained(tiny_model("bert")), dtype=torch.float32)
    assert Classification(backbone, 3, max_length=300).max_length == 300


def tokenizer_without(folder: Path, *, padding: bool = False, special: bool = False) -> None:
    if padding:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
    if special:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_tokenizer_without_a_padding_token(
    tiny_model: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = Path(shutil.copytree(tiny_model(architecture), tmp_path / "model"))
    tokenizer_without(folder, padding=True)
    whole = Classification(Backbone.load(str(tiny_model(architecture)), dtype="float32"), 3)
    task = Classification(Backbone.load(str(folder), dtype="float32"), 3)
    assert task.backbone.tokenizer.pad_token_id is None
    texts = ["w0 w1 w2 w3 w4", "w5", ""]
    encoded = task.encode(texts)
    assert encoded == whole.encode(texts)
    for layout in ("auto", "never"):
        batch = task.backbone.batch([encoded], layout)
        features = task.pool(task.backbone.hidden(batch), batch)
        other = whole.backbone.batch([encoded], layout)
        torch.testing.assert_close(features, whole.pool(whole.backbone.hidden(other), other))


def test_a_padding_token_that_the_model_does_not_know(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Somebody gave the tokenizer a new padding token and did not resize the model."""
    folder = Path(shutil.copytree(tiny_model("gpt2"), tmp_path / "model"))
    backbone = Backbone.load(str(folder), dtype="float32")
    backbone.tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    assert backbone.tokenizer.pad_token_id == 64  # one past the last embedding
    batch = backbone.batch([[[5, 6, 7], [8]]])
    assert backbone.hidden(batch).isfinite().all()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "llama"])
def test_an_empty_text_without_special_tokens_is_one_padding_token(
    tiny_model: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = Path(shutil.copytree(tiny_model(architecture), tmp_path / "model"))
    tokenizer_without(folder, special=True)
    task = Classification(Backbone.load(str(folder), dtype="float32"), 3)
    encoded = task.encode(["", "w0 w1 w2"])
    assert encoded == [[0], [4, 5, 6]]
    found = []
    for layout in ("auto", "never"):
        batch = task.backbone.batch([encoded], layout)
        found.append(task.pool(task.backbone.hidden(batch), batch))
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=2e-6)  # both layouts say the same


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("bert", "mean"), ("distilbert", "mean"), ("roberta", "cls"), ("llama", "last"), ("gpt2", "last")],
)
def test_the_default_pooling_fits_the_architecture(
    tiny_model: Callable[[str], Path], architecture: str, expected: str
) -> None:
    backbone = Backbone.load(str(tiny_model(architecture)), device="cpu")
    assert Classification(backbone, 2).pooling == expected
    assert Classification(backbone, 2, pooling="cls").pooling == "cls"
