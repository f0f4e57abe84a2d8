"""Adapters leave as PEFT folders that stock tools load in a process that has never heard of FolkLoRA, and come back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from folklora.adapters.lowrank import LowRank, Site, Tensors
from folklora.adapters.peft import fold, highest_rank, load_peft, save_peft
from folklora.backbones.backbone import Backbone
from folklora.backbones.classification import Classification
from folklora.errors import RunError
from folklora.training.prediction import Question, predict

CLASSES = ("amber", "blau – naïve", "青")
RANK = 3
SENTENCES = [[2, 5, 6, 7, 8, 3], [2, 9, 3], [2, 10, 11, 12, 13, 14, 15, 16, 3], [2, 20, 21, 3]]

# architecture, core, LayerNorms trained too
CASES = {
    "bert-lora": ("bert", False, False),
    "bert-tri-norm": ("bert", True, True),
    "roberta-tri": ("roberta", True, False),
    "distilbert-lora-norm": ("distilbert", False, True),
    "gpt2-tri": ("gpt2", True, False),
    "llama-lora": ("llama", False, False),
    "bert-lora-base": ("bert", False, True),
    "gpt2-tri-base": ("gpt2", True, False),
}
# Cases whose clients changed the frozen weights too: by other ranks at other sites, one site by none.
BASE_RANKS = (5, 0, 2)

# Stock tools only; sentence by sentence, so that no mask and no padding is involved.
STOCK = """
import json, sys
import safetensors.torch, torch
from peft import PeftModel
from transformers import AutoModel

answers = {}
for name, base, folder, pooling in json.load(open(sys.argv[1])):
    model = AutoModel.from_pretrained(base)
    try:
        norms = safetensors.torch.load_file(folder + "/norms.safetensors")
        assert not model.load_state_dict(norms, strict=False).unexpected_keys
    except FileNotFoundError:
        pass
    model = PeftModel.from_pretrained(model, folder).eval()
    assert not any("folklora" in module for module in sys.modules)
    head = safetensors.torch.load_file(folder + "/head.safetensors")
    answers[name] = {"type": type(model).__name__, "logits": []}
    for sentence in json.loads(sys.argv[2]):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([sentence])).last_hidden_state[0]
        feature = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        answers[name]["logits"].append((head["weight"] @ feature + head["bias"]).tolist())
json.dump(answers, open(sys.argv[3], "w"))
"""


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def exported(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Case -> (our logits, what the stock process answered)."""
    folder = tmp_path_factory.mktemp("exported")
    ours, asked = {}, []
    for name, (architecture, core, norm) in CASES.items():
        base = str(tiny_model(architecture))
        backbone = Backbone.load(base, norm=norm, dtype="float32")
        task = Classification(backbone, len(CLASSES))
        adapter = LowRank(backbone.sites, core, alpha=12.0)
        tensors = draw({**adapter.shapes(RANK), **task.head_shapes()})
        for norm_name, (weight, bias) in backbone.norms.items():
            tensors[f"norm/{norm_name}.weight"] = weight + draw({"": tuple(weight.shape)}, 1)[""]
            tensors[f"norm/{norm_name}.bias"] = bias + draw({"": tuple(bias.shape)}, 2)[""]
        if name.endswith("-base"):
            tensors |= draw_bases(backbone.sites)
        save_peft(folder / name, tensors, adapter, base, CLASSES)
        answer = predict(task, adapter, [Question("0", RANK, tensors, SENTENCES)])
        for part in ("B/", "base/"):
            silent = predict(task, adapter, [Question("0", RANK, {**tensors, **zeroed(tensors, part)}, SENTENCES)])
            # Both the adapter and, where there is one, the change of the frozen weights say something.
            assert (np.abs(answer["0"] - silent["0"]).max() > 0.01) == (part == "B/" or name.endswith("-base"))
        ours[name] = torch.from_numpy(answer["0"])
        asked.append((name, base, str(folder / name), task.pooling))
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", STOCK, folder / "asked.json", json.dumps(SENTENCES), folder / "answers.json"]
    subprocess.run(command, check=True, timeout=100, cwd=folder)
    answers = json.loads((folder / "answers.json").read_text())
    return {name: (ours[name], answers[name]) for name in CASES}


def draw_bases(sites: tuple[Site, ...]) -> Tensors:
    """Changes of the frozen weights, of the ranks above in turn."""
    bases = {}
    for i, site in enumerate(sites):
        rank = BASE_RANKS[i % len(BASE_RANKS)]
        drawn = draw({"up": (site.d_out, rank), "down": (rank, site.d_in)}, i)
        bases[f"base/{site.name}"] = drawn["up"] @ drawn["down"]
    return bases


def zeroed(tensors: Tensors, prefix: str) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_in_a_fresh_process_gives_the_same_logits(
    exported: dict[str, tuple[Tensor, dict[str, Any]]], case: str
) -> None:
    ours, theirs = exported[case]
    torch.testing.assert_close(ours, torch.tensor(theirs["logits"]), rtol=1e-6, atol=1e-6)
    assert theirs["type"] == "PeftModelForFeatureExtraction"


SITES = (Site("layer.0.query", 8, 6), Site("layer.0.value", 8, 10))


def saved(folder: Path, core: bool = False, rank: int = RANK) -> Tensors:
    adapter = LowRank(SITES, core, alpha=12.0, dropout=0.1)
    tensors = draw({**adapter.shapes(rank), "head/weight": (3, 8), "head/bias": (3,)})
    save_peft(folder, tensors, adapter, "minilm", CLASSES)
    return tensors


@pytest.mark.parametrize("core", [False, True], ids=["lora", "tri-lora"])
def test_what_was_saved_comes_back(tmp_path: Path, core: bool) -> None:
    tensors = saved(tmp_path / "a" / "b", core)
    found, rank, alpha = load_peft(tmp_path / "a" / "b", LowRank(SITES, core, alpha=1.0))
    assert (rank, alpha) == (RANK, 12.0)
    assert list(found) == ["A/layer.0.query", "B/layer.0.query", "A/layer.0.value", "B/layer.0.value"]
    for site in SITES:
        a, b = (tensors[f"{factor}/{site.name}"].double() for factor in "AB")
        c = tensors[f"C/{site.name}"].double() if core else torch.eye(RANK, dtype=torch.float64)
        product = found[f"B/{site.name}"].double() @ found[f"A/{site.name}"].double()
        torch.testing.assert_close(product, b @ c @ a, rtol=1e-6, atol=1e-7)
        if not core:
            assert torch.equal(found[f"A/{site.name}"], tensors[f"A/{site.name}"])


def test_folding_leaves_its_input_alone() -> None:
    adapter = LowRank(SITES, core=True, alpha=12.0)
    tensors = draw(adapter.shapes(RANK))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    assert set(fold(tensors, adapter)) == set(LowRank(SITES, core=False, alpha=12.0).shapes(RANK))
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("core", [False, True], ids=["lora", "tri-lora"])
def test_a_changed_base_folds_in_at_the_rank_of_the_sum(core: bool) -> None:
    """Each site has a rank of its own, never more than the layer has room for; the scaling is that of the highest."""
    adapter = LowRank(SITES, core, alpha=12.0)
    for ranks, want in (((1, 2), (4, 5)), ((0, 0), (3, 3)), ((6, 8), (6, 8))):
        tensors = draw(adapter.shapes(RANK))
        for site, rank in zip(SITES, ranks, strict=True):
            up, down = draw({"up": (site.d_out, rank), "down": (rank, site.d_in)}, 1).values()
            tensors[f"base/{site.name}"] = up @ down
        folded = fold(tensors, adapter)
        assert highest_rank(folded) == max(want)
        for site, rank in zip(SITES, want, strict=True):
            a, b = (folded[f"{factor}/{site.name}"].double() for factor in "AB")
            assert (a.shape, b.shape) == ((rank, site.d_in), (site.d_out, rank))
            middle = tensors[f"C/{site.name}"].double() if core else torch.eye(RANK, dtype=torch.float64)
            product = tensors[f"B/{site.name}"].double() @ middle @ tensors[f"A/{site.name}"].double()
            dense = 12 / RANK * product + tensors[f"base/{site.name}"].double()
            torch.testing.assert_close(12 / max(want) * b @ a, dense, rtol=1e-5, atol=1e-6)


def test_a_base_that_nearly_cancels_the_factors_leaves_their_difference() -> None:
    """FeDeRA: what was learned has rank 2 r; float32 rounding of the large parts has full rank and is not exported."""
    sites = (Site("layer", 48, 40),)
    adapter = LowRank(sites, False, alpha=12.0)
    start, moved = draw(adapter.shapes(RANK)), draw(adapter.shapes(RANK), 1)
    learned = {name: tensor + 1e-3 * moved[name] for name, tensor in start.items()}
    learned["base/layer"] = -adapter.update(start, "layer").float()
    folded = fold(learned, adapter)
    assert adapter.rank(folded) == 2 * RANK
    dense = adapter.update(learned, "layer")
    got = 12 / (2 * RANK) * folded["B/layer"].double() @ folded["A/layer"].double()
    assert torch.linalg.norm(got - dense) < 1e-3 * torch.linalg.norm(dense)


def test_a_base_of_nothing_is_an_adapter_of_rank_one_that_says_nothing() -> None:
    adapter = LowRank(SITES, False, alpha=12.0)
    tensors = {name: torch.zeros(shape) for name, shape in adapter.shapes(RANK).items()}
    tensors |= {f"base/{site.name}": torch.zeros(site.d_out, site.d_in) for site in SITES}
    folded = fold(tensors, adapter)
    assert adapter.rank(folded) == 1
    assert not any(tensor.any() for tensor in folded.values())


def test_the_folder_describes_itself(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    described = {
        key: config[key] for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "base_model_name_or_path")
    }
    assert described == {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 12.0,
        "lora_dropout": 0.1,
        "base_model_name_or_path": "minilm",
    }
    assert config["target_modules"] == [site.name for site in SITES]
    assert json.loads((tmp_path / "classes.json").read_text(encoding="utf-8")) == list(CLASSES)
    head = safetensors.torch.load_file(tmp_path / "head.safetensors")
    assert torch.equal(head["weight"], tensors["head/weight"])
    assert torch.equal(head["bias"], tensors["head/bias"])
    assert not (tmp_path / "norms.safetensors").exists()


def test_a_folder_of_stock_peft_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = nn.Sequential()
    model.add_module("query", nn.Linear(8, 6))
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=5, target_modules=["query"], init_lora_weights=False))
    peft.save_pretrained(tmp_path)
    found, rank, alpha = load_peft(tmp_path, LowRank((Site("query", 8, 6),), False, 1.0))
    layer = peft.get_submodule("base_model.model.query")
    assert (rank, alpha) == (2, 5.0)
    assert torch.equal(found["A/query"], layer.lora_A["default"].weight)
    assert torch.equal(found["B/query"], layer.lora_B["default"].weight)


def test_an_adapter_is_never_overwritten(tmp_path: Path) -> None:
    saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match="already holds an adapter") as caught:
        saved(tmp_path, core=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "adapter_model.safetensors").mkdir(parents=True)
    for folder in (tmp_path / "file" / "below", tmp_path / "taken"):
        with pytest.raises(RunError, match="cannot be written") as caught:
            saved(folder)
        assert "\n" not in str(caught.value)
        assert not (folder / "adapter_config.json").exists()


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def lose_a_tensor(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    weights.popitem()
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


def add_a_tensor(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.layer.1.query.lora_A.weight"] = torch.zeros(RANK, 8)
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "not a PEFT LoRA folder"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "not a PEFT LoRA folder"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not a PEFT LoRA folder"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a PEFT LoRA folder"),
    "not text": (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff"), "not a PEFT LoRA folder"),
    "no rank": (lambda folder: rewrite(folder, r=None), "not a PEFT LoRA folder"),
    "cut weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10" + bytes(20)),
        "not a PEFT LoRA folder",
    ),
    "another rank": (lambda folder: rewrite(folder, r=2), "missing or not of shape"),
    "a lost tensor": (lose_a_tensor, "missing or not of shape"),
    "a tensor of another layer": (add_a_tensor, "layer.1.query"),
    "rank-stabilised scaling": (lambda folder: rewrite(folder, use_rslora=True), "use_rslora"),
    "DoRA": (lambda folder: rewrite(folder, use_dora=True), "use_dora"),
    "a rank that the tensors have not": (lambda folder: rewrite(folder, rank_pattern={"query": 2}), "not of shape"),
    "a rank of a layer that is not there": (lambda folder: rewrite(folder, rank_pattern={"key": 2}), "names no layer"),
    "an expression for a name": (lambda folder: rewrite(folder, alpha_pattern={"(a+)+$": 2}), "names no layer"),
    "ranks that are none": (lambda folder: rewrite(folder, rank_pattern=[2]), "not a PEFT LoRA folder"),
    "no rank at all": (lambda folder: rewrite(folder, r=0), "a rank below 1"),
    "no scaling": (lambda folder: rewrite(folder, lora_alpha=0), "no positive number"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_what_is_not_this_adapter_is_refused_in_one_line(tmp_path: Path, problem: str) -> None:
    saved(tmp_path)
    damage, message = BROKEN[problem]
    damage(tmp_path)
    with pytest.raises(RunError, match=message) as caught:
        load_peft(tmp_path, LowRank(SITES, False, 12.0))
    assert "\n" not in str(caught.value)
