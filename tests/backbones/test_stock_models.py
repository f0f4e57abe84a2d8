"""What goes home, on the stock models of every task: exported adapters and merged checkpoints answer as we do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from folklora.adapters.layers import Bank, SiteStack
from folklora.adapters.lowrank import LowRank, Tensors
from folklora.adapters.peft import save_peft
from folklora.backbones.frozen import Frozen
from folklora.backbones.merged import save_merged
from folklora.errors import BackboneError

ALPHA = 6.0
WORDS = torch.tensor([[3, 7, 11, 2], [5, 9, 1, 4]])
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

Call = Callable[[Any], Tensor]
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def causal(architecture: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config: Any = {
        "llama": LlamaConfig(vocab_size=20, **SMALL, num_key_value_heads=1, **ids),
        "qwen2": Qwen2Config(vocab_size=20, **SMALL, num_key_value_heads=1, tie_word_embeddings=True, **ids),
        "gpt2": GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, **ids),
    }[architecture]
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def clip() -> nn.Module:
    from transformers import AutoModel, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(vocab_size=20, **SMALL, max_position_embeddings=8, bos_token_id=1, eos_token_id=2)
    vision = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model: nn.Module = AutoModel.from_config(config)
    return model


def siglip() -> nn.Module:
    from transformers import AutoModel, SiglipConfig, SiglipTextConfig, SiglipVisionConfig

    text = SiglipTextConfig(vocab_size=20, **SMALL, max_position_embeddings=8, projection_size=16)
    vision = SiglipVisionConfig(**SMALL, image_size=8, patch_size=4)
    config = SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    model: nn.Module = AutoModel.from_config(config)
    return model


def bert() -> nn.Module:
    from transformers import AutoModel, BertConfig

    model: nn.Module = AutoModel.from_config(BertConfig(vocab_size=20, **SMALL))
    return model


def vit() -> nn.Module:
    from transformers import AutoModel, ViTConfig

    model: nn.Module = AutoModel.from_config(ViTConfig(**SMALL, image_size=8, patch_size=4))
    return model


def logits(model: Any) -> Tensor:
    answer: Tensor = model(input_ids=WORDS).logits
    return answer


def of_text(model: Any) -> Tensor:
    answer: Tensor = model.text_model(input_ids=WORDS).last_hidden_state
    return answer


def of_pictures(model: Any) -> Tensor:
    answer: Tensor = model.vision_model(pixel_values=PICTURES).last_hidden_state
    return answer


def states(model: Any) -> Tensor:
    answer: Tensor = model(pixel_values=PICTURES).last_hidden_state
    return answer


def hidden(model: Any) -> Tensor:
    answer: Tensor = model(input_ids=WORDS).last_hidden_state
    return answer


# name -> the model, the task, what is asked of it, and how many token rows each of those passes has
CASES: dict[str, tuple[Callable[[], nn.Module], str, list[tuple[Call, int]]]] = {
    "llama": (lambda: causal("llama"), "causal-lm", [(logits, 8)]),
    "qwen2": (lambda: causal("qwen2"), "causal-lm", [(logits, 8)]),
    "gpt2": (lambda: causal("gpt2"), "causal-lm", [(logits, 8)]),
    "clip": (clip, "image-text", [(of_text, 8), (of_pictures, 10)]),
    "siglip": (siglip, "image-text", [(of_text, 8), (of_pictures, 8)]),  # no class token
    "vit": (vit, "classification", [(states, 10)]),
    "bert": (bert, "classification", [(hidden, 8)]),
}


def adapted(frozen: Frozen, core: bool, base: bool) -> tuple[LowRank, Tensors]:
    """A client's tensors; where the frozen weights changed too, by another rank at each site."""
    adapter = LowRank(frozen.sites, core, ALPHA)
    g = torch.Generator().manual_seed(1)
    tensors = {name: 0.3 * torch.randn(shape, generator=g) for name, shape in adapter.shapes(2).items()}
    if base:
        for i, site in enumerate(frozen.sites):
            rank = i % 4
            up, down = (0.3 * torch.randn(shape, generator=g) for shape in ((site.d_out, rank), (rank, site.d_in)))
            tensors[f"base/{site.name}"] = up @ down
    return adapter, tensors


def plugged(adapter: LowRank, tensors: Tensors, rows: int) -> Bank:
    """One client's adapter for all token rows of a pass."""
    sites = {}
    for site in adapter.sites:
        a, b, c, base = (tensors.get(f"{kind}/{site.name}") for kind in ("A", "B", "C", "base"))
        assert a is not None
        assert b is not None
        stack = [None if each is None else each[None] for each in (c, base)]
        scale = torch.tensor([adapter.scale(len(a))])
        sites[site.name] = SiteStack(a[None], b.T[None], stack[0], scale, base=stack[1])
    norms = {
        name.removeprefix("norm/").removesuffix(".weight"): (weight[None], tensors[f"{name[:-6]}bias"][None])
        for name, weight in tensors.items()
        if name.startswith("norm/") and name.endswith(".weight")
    }
    return Bank(sites, norms, (0, rows), torch.zeros(rows, dtype=torch.long))


@pytest.mark.parametrize(("core", "base"), [(False, False), (True, False), (False, True)], ids=["lora", "tri", "base"])
@pytest.mark.parametrize("case", CASES)
def test_stock_peft_answers_as_we_do(tmp_path: Path, case: str, core: bool, base: bool) -> None:
    from peft import PeftModel

    make, task, calls = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    stock = make().eval()
    stock.load_state_dict(model.state_dict())
    frozen = Frozen(model, dtype=torch.float32)
    assert all(isinstance(stock.get_submodule(site.name), nn.Module) for site in frozen.sites)
    adapter, tensors = adapted(frozen, core, base)
    save_peft(tmp_path, tensors, adapter, "tiny", use={"task": task}, transposed=case == "gpt2")
    peft = PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    wrappers = {"causal-lm": "PeftModelForCausalLM", "image-text": "PeftModel"}
    assert type(peft).__name__ == wrappers.get(task, "PeftModelForFeatureExtraction")
    with torch.no_grad():
        for call, rows in calls:
            ours = frozen.run(call, plugged(adapter, tensors, rows))
            bare = frozen.run(call, None)
            assert (ours - bare).abs().max() > 0.01  # the adapter says something in every tower
            torch.testing.assert_close(call(peft.base_model.model), ours, rtol=1e-5, atol=1e-5)


def test_clip_is_adapted_in_both_towers() -> None:
    towers = {site.name.partition(".")[0] for site in Frozen(clip()).sites}
    assert towers == {"text_model", "vision_model"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_an_auto_class_finds_the_base_by_itself(tmp_path: Path, architecture: str) -> None:
    from peft import AutoPeftModelForCausalLM

    torch.manual_seed(0)
    model: Any = causal(architecture).eval()
    model.save_pretrained(tmp_path / "base")
    frozen = Frozen(model, dtype=torch.float32)
    adapter, tensors = adapted(frozen, True, False)
    transposed = architecture == "gpt2"
    use = {"task": "causal-lm", "template": "Q: {}\nA:"}
    save_peft(tmp_path / "peft", tensors, adapter, str(tmp_path / "base"), use=use, transposed=transposed)
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "task.json",
    }
    assert json.loads((tmp_path / "peft" / "task.json").read_text()) == use
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft").eval()
    with torch.no_grad():
        ours = frozen.run(logits, plugged(adapter, tensors, 8))
        torch.testing.assert_close(logits(loaded), ours, rtol=1e-5, atol=1e-5)


NORMED = [("gpt2", True), ("vit", True), ("bert", True)]  # every LayerNorm of these sees the batch's tokens alone


# -- merged checkpoints ------------------------------------------------------------------------------------------------


def merged(folder: Path, case: str, core: bool = True, base: bool = True, norm: bool = False) -> tuple[Frozen, Tensors]:
    """``folder/base`` and ``folder/merged``; our own model of it, and the client's tensors."""
    make, task, _ = CASES[case]
    torch.manual_seed(0)
    model: Any = make().eval()
    model.save_pretrained(folder / "base")
    frozen = Frozen(model, norm=norm, dtype=torch.float32)
    adapter, tensors = adapted(frozen, core, base)
    for name, pair in frozen.norms.items():
        for part, frozen_part in zip(("weight", "bias"), pair, strict=True):
            tensors[f"norm/{name}.{part}"] = frozen_part + 0.3 * torch.randn(len(frozen_part))
    (folder / "merged").mkdir()
    save_merged(folder / "merged", str(folder / "base"), task, adapter, tensors)
    return frozen, tensors


def loaded(folder: Path, task: str) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return (AutoModelForCausalLM if task == "causal-lm" else AutoModel).from_pretrained(folder).eval()


@pytest.mark.parametrize(("case", "norm"), [*((case, False) for case in CASES), *NORMED])
def test_a_merged_checkpoint_answers_as_base_and_adapter_do(tmp_path: Path, case: str, norm: bool) -> None:
    frozen, tensors = merged(tmp_path, case, norm=norm)
    _, task, calls = CASES[case]
    stock = loaded(tmp_path / "merged", task)
    adapter = LowRank(frozen.sites, True, ALPHA)
    with torch.no_grad():
        for call, rows in calls:
            ours = frozen.run(call, plugged(adapter, tensors, rows))
            assert (ours - frozen.run(call, None)).abs().max() > 0.01
            torch.testing.assert_close(call(stock), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "gpt2", "clip", "bert"])
def test_only_adapted_weights_differ_from_the_base(tmp_path: Path, case: str) -> None:
    frozen, tensors = merged(tmp_path, case)
    adapter = LowRank(frozen.sites, True, ALPHA)
    before, after = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    of_base = loaded(tmp_path / "base", CASES[case][1]).base_model_prefix
    assert len(changed) == len(adapter.sites)
    for site in adapter.sites:
        (name,) = (
            key
            for key in changed
            if key.removeprefix(f"{of_base}.") == f"{site.name}.weight".removeprefix(f"{of_base}.")
        )
        update = adapter.update(tensors, site.name)
        want = before[name].double() + (update.T if case == "gpt2" else update)
        assert torch.equal(after[name], want.float())


def test_the_base_s_precision_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = causal("llama").bfloat16()
    model.save_pretrained(tmp_path / "base")
    frozen = Frozen(model, dtype=torch.float32)
    adapter, tensors = adapted(frozen, False, False)
    (tmp_path / "merged").mkdir()
    save_merged(tmp_path / "merged", str(tmp_path / "base"), "causal-lm", adapter, tensors)
    after = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    for site in adapter.sites:
        want = (frozen.weight(site.name).double() + adapter.update(tensors, site.name)).bfloat16()
        assert torch.equal(after[f"{site.name}.weight"], want)


def test_what_reads_inputs_is_copied_byte_for_byte_and_nothing_else(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    told = {"tokenizer.json": b"{}\n", "chat_template.jinja": b"{{ x }}", "preprocessor_config.json": b"{ }"}
    for name, content in told.items():
        (base / name).write_bytes(content)
    for name in ("notes.txt", "pytorch_model.bin", "optimizer.pt"):
        (base / name).write_bytes(b"no")
    merged(tmp_path, "bert")
    found = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert found.keys() == {"config.json", "model.safetensors", *told}
    assert {name: found[name] for name in told} == told
    assert str(tmp_path).encode() not in found["config.json"]  # no path of this machine


def test_a_part_that_the_base_lacks_is_not_made_up(tmp_path: Path) -> None:
    """Hugging Face fills a missing pooler with random numbers; a checkpoint must not carry them on."""
    frozen, tensors = merged(tmp_path, "bert")
    weights = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "again").mkdir()
    adapter = LowRank(frozen.sites, True, ALPHA)
    save_merged(tmp_path / "again", str(tmp_path / "base"), "classification", adapter, tensors)
    assert safetensors.torch.load_file(tmp_path / "again" / "model.safetensors").keys() == kept.keys()


def test_a_base_that_is_gone_is_one_line(tmp_path: Path) -> None:
    frozen, tensors = merged(tmp_path, "bert")
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "again").mkdir()
    with pytest.raises(BackboneError, match="model.name") as caught:
        save_merged(
            tmp_path / "again", str(tmp_path / "base"), "classification", LowRank(frozen.sites, True, ALPHA), tensors
        )
    assert "\n" not in str(caught.value)
