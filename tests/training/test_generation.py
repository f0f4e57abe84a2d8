"""Many clients' answers in one batch against transformers' own `generate` of each client's merged model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from folklora.adapters.lowrank import LowRank, Tensors
from folklora.backbones.backbone import Backbone
from folklora.backbones.causal import CausalBackbone, CausalLM
from folklora.backbones.classification import Classification
from folklora.errors import BackboneError, RecipeError
from folklora.training.generation import GREEDY, LOST, Sampling, draw, generate, refuse_speechless, stream
from folklora.training.prediction import Question

WORDS, POSITIONS, ENDS = 64, 48, (3, 5, 8, 13, 21)
SIZES, RANKS = (3, 1, 0, 4, 2), (3, 5, 2, 1, 4)
NEW = 12


def config(architecture: str) -> Any:
    """Two layers of width 32; wide weights, so that what is said depends on what was said."""
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, initializer_range=0.6
        )
    kind: Any = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}[architecture]
    return kind(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        initializer_range=0.6,
        tie_word_embeddings=False,
        **({"sliding_window": 4} if architecture == "mistral" else {}),
    )


class Talk(CausalLM):
    """A task in which several words end an answer, so that answers are of all lengths."""

    end_tokens = ENDS  # type: ignore[assignment]


@dataclass(frozen=True)
class Place:
    stock: Any
    task: Talk
    adapter: LowRank

    def tensors(self, rank: int, seed: int) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        shapes = self.adapter.shapes(rank)
        return {name: 0.4 * torch.randn(shape, generator=g) for name, shape in shapes.items()}

    def questions(self) -> list[Question]:
        rng = np.random.default_rng(0)
        prompts = [[rng.integers(1, WORDS, size=rng.integers(1, 15)).tolist() for _ in range(n)] for n in SIZES]
        return [
            Question(f"client-{k}", rank, self.tensors(rank, k), own)
            for k, (rank, own) in enumerate(zip(RANKS, prompts, strict=True))
        ]

    def merged(self, question: Question) -> Any:
        """The stock model with a client's adapter added to its weights."""
        model = copy.deepcopy(self.stock)
        for site in self.adapter.sites:
            a, b = (question.tensors[f"{factor}/{site.name}"] for factor in "AB")
            c = question.tensors.get(f"C/{site.name}", torch.eye(question.rank))
            update = self.adapter.alpha / question.rank * b @ c @ a
            weight = model.get_submodule(site.name).weight.data
            weight += update.T if self.task.backbone.model_type == "gpt2" else update
        return model


def said(model: Any, prompt: list[int], most: int = NEW) -> list[int]:
    """What transformers' own loop says, one prompt at a time."""
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=list(ENDS),
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return ids[:-1] if ids[-1] in ENDS else ids


@pytest.fixture(scope="module")
def place(tiny_model: Callable[[str], Any]) -> Callable[..., Place]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made: dict[tuple[str, bool], Place] = {}

    def make(architecture: str = "llama", core: bool = False) -> Place:
        if (architecture, core) not in made:
            torch.manual_seed(1)
            stock = AutoModelForCausalLM.from_config(config(architecture)).eval()
            tokenizer = AutoTokenizer.from_pretrained(tiny_model("gpt2"))
            backbone = CausalBackbone(copy.deepcopy(stock), tokenizer, dtype=torch.float32)
            made[architecture, core] = Place(stock, Talk(backbone), LowRank(backbone.sites, core, alpha=8.0))
        return made[architecture, core]

    return make


@pytest.mark.parametrize("tokens", [1, 70, 8192])
@pytest.mark.parametrize(
    ("architecture", "core"), [("llama", True), ("qwen2", False), ("gpt2", True), ("mistral", False)]
)
def test_greedy_answers_are_those_of_each_clients_merged_model(
    place: Callable[..., Place], architecture: str, core: bool, tokens: int
) -> None:
    here = place(architecture, core)
    asked = here.questions()
    answers = generate(here.task, here.adapter, asked, NEW, tokens=tokens)
    expected = {q.client: [said(here.merged(q), prompt) for prompt in q.examples] for q in asked}
    assert answers == expected
    lengths = {len(answer) for own in expected.values() for answer in own}
    assert NEW in lengths  # the test sees answers that are cut,
    assert min(lengths) < NEW  # and such that end


def test_greedy_answers_are_those_of_stock_peft(place: Callable[..., Place]) -> None:
    here = place("llama")
    asked = here.questions()
    answers = generate(here.task, here.adapter, asked, NEW)
    for question in asked:
        names = [site.name for site in here.adapter.sites]
        lora = LoraConfig(r=question.rank, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(here.stock), lora).eval()
        for name in names:
            layer = model.get_submodule(f"base_model.model.{name}")
            for factor, part in (("A", layer.lora_A), ("B", layer.lora_B)):
                part["default"].weight.data.copy_(question.tensors[f"{factor}/{name}"])
        assert answers[question.client] == [said(model, prompt) for prompt in question.examples]


def test_without_an_adapter_the_frozen_model_speaks(place: Callable[..., Place]) -> None:
    here = place("gpt2")
    own, moved = here.questions()[0], here.questions()[3]
    tensors = {name: torch.zeros_like(t) if name.startswith("B/") else t for name, t in own.tensors.items()}
    answers = generate(here.task, here.adapter, [Question("zero", own.rank, tensors, own.examples), moved], NEW)
    assert answers["zero"] == [said(here.stock, prompt) for prompt in own.examples]


def test_an_answer_ends_where_the_model_has_no_more_positions(place: Callable[..., Place]) -> None:
    here = place("gpt2")
    question = here.questions()[0]
    prompts = [[7] * (POSITIONS - 1), [7, 9], [7] * (POSITIONS - 4)]
    answers = generate(here.task, here.adapter, [Question("a", question.rank, question.tensors, prompts)], 10_000)
    model = here.merged(question)
    assert answers["a"] == [said(model, prompt, POSITIONS - len(prompt)) for prompt in prompts]


@pytest.mark.parametrize("length", [0, POSITIONS, POSITIONS + 1])
def test_a_prompt_without_room_for_an_answer_is_refused(place: Callable[..., Place], length: int) -> None:
    here = place("llama")
    tensors = here.tensors(2, 0)
    with pytest.raises(BackboneError, match=f"client b: a prompt of {length} tokens; allowed: 1 to {POSITIONS - 1}"):
        generate(here.task, here.adapter, [Question("b", 2, tensors, [[7], [7] * length])], 5)


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(place: Callable[..., Place]) -> None:
    here = place("qwen2")
    asked = here.questions()
    warm = Sampling(temperature=1.0, top_p=0.95, seed=4)
    answers = generate(here.task, here.adapter, asked, NEW, sampling=warm)
    for tokens in (1, 60):
        assert generate(here.task, here.adapter, asked[::-1], NEW, sampling=warm, tokens=tokens) == answers
    others = generate(here.task, here.adapter, asked, NEW, sampling=Sampling(1.0, 0.95, seed=5))
    assert others != answers
    assert generate(here.task, here.adapter, asked, NEW) != answers
    cold = generate(here.task, here.adapter, asked, NEW, sampling=Sampling(temperature=1e-300))
    assert cold == generate(here.task, here.adapter, asked, NEW, sampling=GREEDY)


def test_the_same_prompt_twice_is_answered_by_chance_twice(place: Callable[..., Place]) -> None:
    here = place("llama")
    twins = [Question(name, 2, here.tensors(2, 0), [[7, 9], [7, 9]]) for name in ("a", "b")]
    answers = generate(here.task, here.adapter, twins, NEW, sampling=Sampling(temperature=3.0))
    assert len({tuple(answer) for own in answers.values() for answer in own}) == 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3), (1.0, 1e-9)])
def test_tokens_are_drawn_as_transformers_warps_them(temperature: float, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits, count = 2 * torch.randn(1, 20, generator=torch.Generator().manual_seed(0)), 20_000
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
    chances = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(logits.expand(count, -1), chances, Sampling(temperature, top_p))
    shares = torch.bincount(drawn, minlength=20) / count
    torch.testing.assert_close(shares, torch.softmax(warped, dim=-1)[0], atol=2 / count, rtol=1e-5)


def test_tokens_come_one_by_one_and_gradients_are_as_before(place: Callable[..., Place]) -> None:
    here = place("llama")
    asked = here.questions()
    answers = generate(here.task, here.adapter, asked, NEW)
    found: dict[tuple[str, int], list[int]] = {}
    for client, prompt, token in stream(here.task, here.adapter, asked, NEW, tokens=90):
        assert torch.is_grad_enabled()
        found.setdefault((client, prompt), []).append(token)
    assert found == {(c, i): answer for c, own in answers.items() for i, answer in enumerate(own) if answer}


def test_a_model_without_keys_and_values_is_refused(
    place: Callable[..., Place], tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place("llama")
    monkeypatch.setattr(type(here.stock), "_is_stateful", True)
    with pytest.raises(BackboneError, match="llama keeps a state in place of keys and values"):
        refuse_speechless(here.task)
    monkeypatch.undo()
    refuse_speechless(here.task)
    monkeypatch.setattr(type(here.stock.config), "layer_types", ["conv", "full_attention"], raising=False)  # LFM2
    with pytest.raises(BackboneError, match="llama keeps a state in place of keys and values"):
        refuse_speechless(here.task)
    classifying = Classification(Backbone.load(str(tiny_model("gpt2"))), 2)
    with pytest.raises(BackboneError, match='allowed: model.task = "causal-lm"'):
        refuse_speechless(classifying)


def test_nothing_is_asked(place: Callable[..., Place]) -> None:
    here = place("llama")
    assert generate(here.task, here.adapter, [], NEW) == {}
    assert generate(here.task, here.adapter, [here.questions()[2]], NEW) == {"client-2": []}


@pytest.mark.parametrize("of", [{"temperature": math.nan}, {"top_p": math.nan}])
def test_what_is_no_number_chooses_nothing(of: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="allowed: numbers"):
        Sampling(**of)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(2.0, 0.9, 5)])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_that_diverged_says_nothing_and_the_others_what_they_say(
    place: Callable[..., Place], sampling: Sampling, number: float
) -> None:
    here = place()
    questions = here.questions()
    before = generate(here.task, here.adapter, questions, NEW, sampling=sampling, tokens=100)
    for tensor in questions[1].tensors.values():
        tensor.fill_(number)
    after = generate(here.task, here.adapter, questions, NEW, sampling=sampling, tokens=100)
    assert after["client-1"] == [None] * SIZES[1]
    assert {**after, "client-1": []} == {**before, "client-1": []}
    made = list(stream(here.task, here.adapter, questions[1:2], NEW, sampling=sampling))
    assert made == [("client-1", number, LOST) for number in range(SIZES[1])]
