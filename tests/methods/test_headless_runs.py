"""Whole federations of tasks without a head of their own: a language model, and CLIP with class names and captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from folklora.errors import MethodError
from folklora.federation.inspect import inspect
from folklora.federation.member import Member
from folklora.federation.setup import prepare
from folklora.methods import METHODS
from folklora.recipe import Recipe
from folklora.training.gradients import weight_gradients

WORDS = 60  # of the tokenizers in conftest
TASKS = ("causal-lm", "prompts", "captions")


def words(rng: np.random.Generator, count: int, first: int = 0, last: int = WORDS) -> str:
    return " ".join(f"w{word}" for word in rng.integers(first, last, count))


@pytest.fixture(scope="module")
def speaker(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights that can speak."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("speaker")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model("llama"))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_of(
    speaker: Path, seeing_model: Callable[[str], Path], noise: Callable[..., Any], tmp_path: Path
) -> Callable[..., Recipe]:
    """``recipe_of("captions", name="fedit")`` -> a small federation of that task under that method."""

    def make(task: str, *overrides: str, **method: Any) -> Recipe:
        rng = np.random.default_rng(0)
        document: dict[str, Any] = {"method": method}
        if task == "causal-lm":
            rows = [
                {
                    "prompt": words(rng, 4),
                    "response": words(rng, 1 + i % 3, 20 * (i % 3), 20 * (i % 3) + 20),
                    "who": i % 3,
                }
                for i in range(60)
            ]
            source = tmp_path / "rows.jsonl"
            source.write_text("".join(json.dumps({**row, "who": f"c{row['who']}"}) + "\n" for row in rows))
            document["model"] = {"name": str(speaker), "task": "causal-lm", "max_length": 16}
            document["data"] = {"source": str(source), "partition": "natural", "by": "who"}
        else:
            source = tmp_path / "pictures.npz"
            labels = [f"w{20 * (i % 3)}" for i in range(60)]
            np.savez(
                source,
                image=rng.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8),
                label=np.array(labels),
                caption=np.array([f"{label} {words(rng, 3)}" for label in labels]),
            )
            document["model"] = {"name": str(seeing_model("clip")), "task": "image-text", "template": "w1 {}"}
            document["data"] = {"source": str(source), "partition": "iid", "clients": 3}
            if task == "captions":
                document["data"]["caption"] = "caption"
                del document["model"]["template"]
        document["model"] |= {"device": "cpu", "dtype": "float32"}
        document["adapter"] = {"rank": 2, "alpha": 2.0}
        document["train"] = {"rounds": 3, "batch_size": 8, "lr": 1e-2}
        return Recipe.parse(document, list(overrides))

    return make


def heads_in(folder: Path) -> list[str]:
    """Tensors of a run directory's checkpoints that belong to a head."""
    found = []
    for file in folder.rglob("*.safetensors"):
        found += [name for name in safetensors.torch.load_file(file) if "head" in name.split("/")]
    return found


CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("fedit", {}, []),
    ("fedsb", {"eta": 0.01}, ["train.failures=0.3"]),
    ("celora", {}, ["adapter.rank=[1,2,3]"]),
    ("folklora", {"similarity": "both"}, ["message.dtype=int8", "message.error_feedback=true"]),
    ("ravan", {"heads": 3, "budget": 1}, []),
    ("haflq", {}, ["adapter.rank=[1,2,3]", "train.failures=0.3"]),
]


@pytest.mark.parametrize(("name", "options", "overrides"), CASES, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_ends_as_foretold_and_as_one_that_was_interrupted(
    recipe_of: Callable[..., Recipe],
    resumed: Callable[[Any], dict[str, Any]],
    tmp_path: Path,
    task: str,
    name: str,
    options: dict[str, Any],
    overrides: list[str],
) -> None:
    recipe = recipe_of(task, *overrides, name=name, **options)
    row = resumed(recipe)["row"]
    told = inspect(recipe)["method"]
    assert row["bytes_once_per_client"] == pytest.approx(told["bytes_once_per_client"])
    if "train.failures=0.3" not in overrides:
        assert row["bytes_up_per_client_round"] == pytest.approx(told["bytes_up_per_client_round"])
        assert row["bytes_down_per_client_round"] == pytest.approx(told["bytes_down_per_client_round"])
    assert list((tmp_path / "whole").rglob("*.safetensors"))
    assert not heads_in(tmp_path / "whole")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_prepared_or_refused(recipe_of: Callable[..., Recipe], task: str, name: str) -> None:
    recipe = recipe_of(task, name=name)
    if METHODS[name].needs_head:
        with pytest.raises(MethodError, match="the task has none of its own"):
            prepare(recipe)
        return
    numbers = inspect(recipe)["adapter"]["numbers"]
    assert "head" not in numbers
    assert numbers["A"] > 0


def test_gradients_are_those_of_a_stock_language_model(recipe_of: Callable[..., Recipe], speaker: Path) -> None:
    """The oracle: Hugging Face's own model, one conversation at a time, nothing packed."""
    from transformers import AutoModelForCausalLM

    setup = prepare(recipe_of("causal-lm", name="fedsb"))
    member = Member(setup, "c1")
    got = member.data.weight_gradients({}, 1000)
    stock = AutoModelForCausalLM.from_pretrained(speaker).eval()
    examples, _ = setup.examples(member.data.split.train)
    nats = []
    for example in examples:
        tokens = torch.tensor(example.tokens)
        logits = stock(tokens[None]).logits[0]
        nats.append(F.cross_entropy(logits[example.prompt - 1 : -1], tokens[example.prompt :], reduction="none"))
    torch.cat(nats).mean().backward()
    weights = dict(stock.named_parameters())
    assert {f"grad/{site.name}" for site in setup.task.backbone.sites} == set(got)
    for site in setup.task.backbone.sites:
        want = weights[f"{site.name}.weight"].grad
        assert want is not None
        assert bool(want.any())
        torch.testing.assert_close(got[f"grad/{site.name}"], want, rtol=1e-4, atol=1e-7)


def test_gradients_of_responses_of_unlike_length_do_not_depend_on_how_many_a_pass_takes(
    recipe_of: Callable[..., Recipe],
) -> None:
    setup = prepare(recipe_of("causal-lm", name="fedsb"))
    examples, labels = setup.examples(np.arange(20))
    assert len({len(example) - example.prompt for example in examples}) > 1
    whole, few = (weight_gradients(setup.task, examples, labels, {}, rows=rows) for rows in (20, 3))
    for name, gradient in whole.items():
        assert float((few[name] - gradient).norm()) < 1e-5 * float(gradient.norm())
