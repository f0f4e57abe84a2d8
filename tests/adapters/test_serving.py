"""Many clients' exported adapters in one server: stock PEFT's mixed batches, and what vLLM asks of a folder.

docs/serving.md says how it is done. vLLM itself needs a GPU, or hours of building; what it checks and what it computes
with is restated here in our words, and held against our folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from folklora.adapters.lowrank import LowRank, Tensors
from folklora.adapters.peft import save_peft
from folklora.backbones.batch import pad
from folklora.backbones.frozen import Frozen
from folklora.training.stacks import plug, stack

ALPHA = 8.0
RANKS = {"north": 2, "south": 5, "west": 3}
PROMPTS = [("north", [3, 7, 11, 2]), ("north", [6, 6, 1, 9]), ("south", [5, 9, 1, 4]), ("west", [8, 2, 3, 3])]


def small_llama() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def client(adapter: LowRank, rank: int, seed: int, base: bool = False) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    tensors = {name: 0.3 * torch.randn(shape, generator=g) for name, shape in adapter.shapes(rank).items()}
    for i, site in enumerate(adapter.sites if base else ()):
        up, down = (0.3 * torch.randn(shape, generator=g) for shape in ((site.d_out, i), (i, site.d_in)))
        tensors[f"base/{site.name}"] = up @ down
    return tensors


@pytest.mark.parametrize("core", [False, True], ids=["lora", "tri-lora"])
def test_stock_peft_serves_three_clients_in_one_batch(tmp_path: Path, core: bool) -> None:
    from peft import PeftModel

    frozen = Frozen(small_llama(), dtype=torch.float32)
    adapter = LowRank(frozen.sites, core, ALPHA)
    clients = {name: client(adapter, rank, seed) for seed, (name, rank) in enumerate(RANKS.items())}
    for name, tensors in clients.items():
        save_peft(tmp_path / name, tensors, adapter, "tiny", use={"task": "causal-lm"})

    first, *others = clients
    peft = PeftModel.from_pretrained(small_llama(), str(tmp_path / first), adapter_name=first).eval()
    for name in others:
        peft.load_adapter(str(tmp_path / name), adapter_name=name)
    ids = torch.tensor([prompt for _, prompt in PROMPTS])
    batch = pad([[prompt for owner, prompt in PROMPTS if owner == name] for name in clients], 0)
    stacks = stack(list(clients.values()), max(RANKS.values()), torch.device("cpu"))
    scales = torch.tensor([adapter.scale(rank) for rank in RANKS.values()])
    with torch.no_grad():
        theirs = peft(input_ids=ids, adapter_names=[owner for owner, _ in PROMPTS]).logits
        bank = plug(adapter, stacks, scales, batch, torch.device("cpu"))
        ours = frozen.run(lambda model: model(input_ids=batch.tokens).logits, bank)
        bare = frozen.run(lambda model: model(input_ids=batch.tokens).logits, None)
    assert torch.equal(batch.tokens, ids)
    assert ((ours - bare).abs().amax(dim=(1, 2)) > 0.01).all()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


# -- vLLM ------------------------------------------------------------------------------------------------------------
# Read in vLLM 0.33.0: lora/peft_helper.py (what is refused; rank and scaling), lora/utils.py (names of tensors),
# lora/lora_model.py (layers that the server does not adapt), lora/layers/base_linear.py (how factors are held).

INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def refusals(config: Mapping[str, Any], max_lora_rank: int) -> list[str]:
    """What of an adapter_config.json it would refuse."""
    found = [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    found += [f"{key} = {config[key]}" for key in ("use_dora", "lora_bias", "layer_replication") if config.get(key)]
    others = ("alora_invocation_tokens", "use_bdlora", "use_qalora", "modules_to_save", "trainable_token_indices")
    found += [f"{key} = {config[key]}" for key in others if config.get(key)]
    start = config.get("init_lora_weights", True)
    found += [f"init = {start}"] if isinstance(start, str) and start.lower() not in INITS else []
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    found += [f"rank {rank}" for rank in ranks if not isinstance(rank, int) or not 0 < rank <= max_lora_rank]
    found += [f"bias = {config['bias']}"] if config.get("bias", "none") != "none" else []
    return found


def matched(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that is an expression for the module's name or for its end."""
    keys = (key for key in pattern or {} if re.match(rf"(.*\.)?({key})$", module))
    return next(((pattern or {})[key] for key in keys), default)


def served(folder: Path, max_lora_rank: int, patterns: bool) -> dict[str, Tensor]:
    """What the server adds to the weight of each module; ``patterns``: whether it is recent enough to read them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    held: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(folder / "adapter_model.safetensors").items():
        *path, factor, leaf = key.split(".")
        assert path[:2] == ["base_model", "model"]
        assert factor in {"lora_A", "lora_B"}
        assert leaf == "weight"
        assert path[-1] in LLAMA
        # Factors of any rank lie in the corner of a buffer of zeros.
        shape = (max_lora_rank, tensor.shape[1]) if factor == "lora_A" else (len(tensor), max_lora_rank)
        buffer = torch.zeros(shape, dtype=torch.float64)
        buffer[: tensor.shape[0], : tensor.shape[1]] = tensor
        held.setdefault(".".join(path[2:]), {})[factor] = buffer
    found = {}
    for module, factors in held.items():
        rank = matched(config["rank_pattern"] if patterns else None, module, config["r"])
        alpha = matched(config["alpha_pattern"] if patterns else None, module, config["lora_alpha"])
        found[module] = alpha / rank * factors["lora_B"] @ factors["lora_A"]
    return found


@pytest.mark.parametrize("patterns", [True, False], ids=["reads patterns", "knows none"])
@pytest.mark.parametrize("base", [False, True], ids=["one rank", "ranks of their own"])
def test_vllm_takes_the_folder_and_computes_the_same(tmp_path: Path, base: bool, patterns: bool) -> None:
    targets = r".*(q_proj|v_proj|o_proj|down_proj)"
    frozen = Frozen(small_llama(), targets=targets, dtype=torch.float32)
    adapter = LowRank(frozen.sites, True, ALPHA)
    tensors = client(adapter, 3, 0, base)
    save_peft(tmp_path, tensors, adapter, "tiny", use={"task": "causal-lm"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == base
    assert refusals(config, 16) == []
    assert refusals(config, 2)  # --max-lora-rank has to cover the highest rank
    found = served(tmp_path, 16, patterns)
    assert found.keys() == {site.name for site in adapter.sites}
    for module, update in found.items():
        torch.testing.assert_close(update, adapter.update(tensors, module), rtol=1e-5, atol=1e-6)
