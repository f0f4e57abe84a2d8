"""Language models from folders, their attention, and weights that a library keeps in few bits."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from folklora.backbones import lowbit, tasks
from folklora.backbones.backbone import Backbone
from folklora.backbones.causal import CausalBackbone, CausalLM
from folklora.errors import BackboneError
from folklora.sections import AdapterSection, ModelSection

LABELS = [[0, 0, 0, 0], [0], [0, 0]]
LIBRARIES = {
    "bitsandbytes-8bit": "bitsandbytes",
    "bitsandbytes-4bit": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-int4": "torchao",
}


@pytest.fixture
def folder(lab: SimpleNamespace, tmp_path: Path) -> Path:
    """A Llama of two layers, its head not tied, and its tokenizer; widths that blocks of 32 and 64 divide."""
    model = lab.stock("llama", hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "llama")
    lab.words("[END]", eos_token="[END]").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def refused(message: str, call: Callable[[], object]) -> str:
    """The error's text, which is one line."""
    with pytest.raises(BackboneError, match=message) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_recipes_task(folder: Path, lab: SimpleNamespace) -> None:
    model = ModelSection(name=str(folder), task="causal-lm", dtype="float32", template="{} :", max_length=20)
    task = tasks.build_task(model, AdapterSection(), "chat", ("",))
    assert isinstance(task, CausalLM)
    assert (task.classes, task.width, task.max_length, task.answer_width) == (1, 64, 20, 2)
    assert task.head_shapes() == {}
    assert [site.name for site in task.backbone.sites] == [
        f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qv"
    ]
    assert task.backbone.config._attn_implementation == "sdpa"
    (example,) = task.encode([(("user", "w1"), ("assistant", "w2"))])
    assert task.lay_out([[example]]).wanted.tolist() == example.tokens[2:]


@pytest.mark.parametrize(("family", "layers"), [("llama", ["q_proj", "v_proj"]), ("phi3", ["qkv_proj"])])
def test_by_default_queries_and_values_are_adapted(lab: SimpleNamespace, family: str, layers: list[str]) -> None:
    sites = lab.task_of(lab.stock(family), targets="default").backbone.sites
    assert [s.name for s in sites] == [f"model.layers.{i}.self_attn.{layer}" for i in range(2) for layer in layers]


def test_targets_reach_every_layer_but_the_head(folder: Path) -> None:
    backbone = CausalBackbone.load(str(folder), targets=".*")
    assert len(backbone.sites) == 14
    refused("matches no linear layer", lambda: CausalBackbone.load(str(folder), targets="lm_head"))


def test_a_body_without_its_head_is_not_whole(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert str(folder) in refused("the weights lack 1 tensors.*lm_head", lambda: CausalBackbone.load(str(folder)))


def test_what_does_not_continue_texts_is_refused(tiny_model: Callable[[str], Path]) -> None:
    text = refused('model.task = "causal-lm".* is a bert', lambda: CausalBackbone.load(str(tiny_model("bert"))))
    assert "allowed: a decoder" in text


def test_a_folder_that_is_not_there_or_broken(folder: Path, tmp_path: Path) -> None:
    refused("model.name", lambda: CausalBackbone.load(str(tmp_path / "missing")))
    (folder / "model.safetensors").write_bytes(b"\xff" * 500)
    refused("model.name", lambda: CausalBackbone.load(str(folder)))


def test_a_vocabulary_that_is_another_models(folder: Path, lab: SimpleNamespace) -> None:
    lab.words(*(f"x{i}" for i in range(60))).save_pretrained(folder)
    refused("the tokenizer has tokens up to", lambda: CausalBackbone.load(str(folder)))


def test_the_digest_knows_the_chat_template(folder: Path, lab: SimpleNamespace) -> None:
    before = CausalBackbone.load(str(folder)).digest
    assert CausalBackbone.load(str(folder)).digest == before
    tokenizer = lab.words("[END]", eos_token="[END]")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    assert CausalBackbone.load(str(folder)).digest != before


# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["always", "never"])
def test_attention_of_an_encoder_is_the_same_either_way(
    tiny_model: Callable[[str], Path], lab: SimpleNamespace, layout: str
) -> None:
    found = []
    for how in ("eager", "sdpa", "auto"):
        backbone = Backbone.load(str(tiny_model("bert")), dtype="float32")
        backbone.attend(how)
        assert backbone.config._attn_implementation == ("sdpa" if how == "sdpa" else "eager")
        batch = backbone.batch([[example.tokens for example in group] for group in lab.groups], layout)
        with torch.no_grad():
            found.append(backbone.hidden(batch).reshape(-1, 32)[batch.segments.reshape(-1) >= 0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=2e-6)
    assert torch.equal(found[2], found[0])


def test_attention_that_an_architecture_has_not(lab: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM, GPTJConfig

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    model = AutoModelForCausalLM.from_config(GPTJConfig(vocab_size=64, **sizes), attn_implementation="eager")
    refused('model.attention = "sdpa": gptj cannot', lambda: lab.task_of(copy.deepcopy(model), attention="sdpa"))
    assert lab.task_of(model).backbone.config._attn_implementation == "eager"


# -- few bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LIBRARIES)
def test_a_library_that_is_not_here_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == LIBRARIES[how] else find_spec(name, *rest)
    )
    text = refused(f'model.quantize = "{how}"', lambda: CausalBackbone.load(str(folder), quantize=how))
    assert f"pip install {LIBRARIES[how]}" in text
    assert 'allowed: "none"' in text
    refused(f'model.quantize = "{how}"', lambda: Backbone.load(str(folder), quantize=how))


def test_models_of_pictures_stay_in_floats() -> None:
    model = ModelSection(name="anything", quantize="torchao-int8")
    refused("model.quantize", lambda: tasks.build_task(model, AdapterSection(), "image", ("a", "b")))


@pytest.mark.parametrize("how", LIBRARIES)
def test_a_backbone_in_few_bits_trains_and_answers(
    folder: Path, lab: SimpleNamespace, company: Callable[..., Any], how: str
) -> None:
    pytest.importorskip(LIBRARIES[how], reason="an optional library")
    full = CausalBackbone.load(str(folder), targets=".*", dtype="float32")
    low = CausalBackbone.load(str(folder), targets=".*", dtype="bfloat16", quantize=how)
    digest = low.digest
    assert low.stored < 0.7 * full.stored
    assert low.parameters == full.parameters
    group = company(CausalLM(low))
    group.answers(lab.groups)  # inference first: it must not make layers that only infer
    losses, grads = group.losses(lab.groups, LABELS, dtype=torch.float32)
    # The same, in floats: a model that has the rounded weights.
    for site in low.sites:
        layer = full._models[torch.float32].get_submodule(site.name).base
        rounded = low.weight(site.name)
        assert 0 < float((rounded - layer.weight).norm() / layer.weight.norm()) < (0.02 if "8" in how else 0.15)
        layer.weight.data = rounded
    coarse = 0.1 if how == "bitsandbytes-8bit" else 1e-4  # which rounds activations, too
    wanted, slopes = company(CausalLM(full)).losses(lab.groups, LABELS, dtype=torch.float32)
    torch.testing.assert_close(losses, wanted, rtol=coarse, atol=0)
    for name, slope in slopes.items():
        assert float((grads[name] - slope).norm()) < 4 * coarse * float(slope.norm())
    half, _ = group.losses(lab.groups, LABELS)
    torch.testing.assert_close(half, losses, rtol=0.05, atol=0)
    low.checkpoint()
    again, regained = group.losses(lab.groups, LABELS, dtype=torch.float32)
    torch.testing.assert_close(again, losses, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(regained[name], grad, rtol=1e-5, atol=1e-6)
    del low.__dict__["digest"]
    assert low.digest == digest  # use has not changed what it says of itself


@pytest.mark.parametrize("how", LIBRARIES)
def test_a_library_that_leaves_most_of_the_model_in_floats_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As torchao does with GPT-2's layers, without a word."""

    def passed_over(name: str, auto: Any, *, quantization_config: Any, device_map: Any, **arguments: Any) -> Any:
        return auto.from_pretrained(name, **arguments)

    monkeypatch.setattr(lowbit, "_configuration", lambda how: None)
    monkeypatch.setattr(lowbit.loading, "pretrained", passed_over)
    text = refused(f'model.quantize = "{how}"', lambda: CausalBackbone.load(str(folder), quantize=how))
    assert "in floats, model.layers.0." in text
    assert 'allowed: another library, or "none"' in text


def test_weights_that_are_in_few_bits_already_are_refused(folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    from transformers import AutoModelForCausalLM

    model = lowbit.pretrained(str(folder), AutoModelForCausalLM, "bitsandbytes-8bit", torch.device("cpu"))
    model.save_pretrained(folder)
    refused("in few bits already", lambda: CausalBackbone.load(str(folder)))
