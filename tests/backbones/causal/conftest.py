"""Small causal language models of many families, with random weights, and a tokenizer of words."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from folklora.backbones.causal import CausalBackbone, CausalLM, Dialogue

WORDS = 64
POSITIONS = 64
TARGETS = r".*(q_proj|v_proj|c_attn|qkv_proj|query_key_value)"


def config(family: str, **changes: Any) -> Any:
    """Two layers of width 32; wide weights, so that what is predicted depends on what was read."""
    import transformers as hf

    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
        return hf.GPT2Config(vocab_size=WORDS, **sizes, initializer_range=0.3, **changes)
    own: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own |= {
        "gpt_neox": {"num_key_value_heads": None},
        "granite": {"logits_scaling": 3.0},  # what happens to logits behind the head
        "mistral": {"sliding_window": None},
        "phi3": {"sliding_window": None},
        "qwen3": {"head_dim": 8},
        "gemma": {"head_dim": 8},
        "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0},
    }.get(family, {})
    names = {"gpt_neox": "GPTNeoX", "olmo2": "Olmo2", "smollm3": "SmolLM3", "stablelm": "StableLm"}
    kind = getattr(hf, names.get(family, family.capitalize()) + "Config")
    return kind(**{key: value for key, value in {**own, **changes}.items() if value is not None or "window" in key})


@cache
def stock(family: str, **changes: Any) -> Any:
    """The model of Hugging Face's own; biases and norms are moved off their special values."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, **changes), attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def words(*special: str, **roles: str) -> Any:
    """A tokenizer of ``w0`` ... ``w40`` and a few signs; ``special`` words come first, ``roles`` as eos_token=..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = ["[UNK]", *special, *(f"w{i}" for i in range(41)), "user", "assistant", "system", ":", "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(named)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **roles)


def task_of(model: Any, tokenizer: Any = None, *, attention: str = "auto", **arguments: Any) -> CausalLM:
    """The task over a copy of a stock model, in float32 unless told otherwise."""
    settings = {"targets": TARGETS, "dtype": torch.float32}
    own = {name: arguments.pop(name) for name in ("template", "max_length") if name in arguments}
    tokenizer = words("[END]", eos_token="[END]") if tokenizer is None else tokenizer
    backbone = CausalBackbone(copy.deepcopy(model), tokenizer, **{**settings, **arguments})
    backbone.attend(attention)
    return CausalLM(backbone, **own)


def dialogues(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Dialogue]:
    """Of random tokens; ``sizes`` are (tokens of the prompt, of the response)."""
    g = torch.Generator().manual_seed(seed)
    return [Dialogue(torch.randint(3, 50, (p + r,), generator=g).tolist(), p) for p, r in sizes]


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The functions above, and ``lab.groups``: examples of three clients."""
    groups = [
        dialogues([(1, 1), (9, 4), (20, 11), (3, 6)]),
        dialogues([(5, 5)], seed=1),
        dialogues([(30, 2), (2, 17)], seed=2),
    ]
    return SimpleNamespace(config=config, stock=stock, words=words, task_of=task_of, dialogues=dialogues, groups=groups)
