"""The dense gradient that Fed-SB's clients send once tells their tokens while it is of few examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from folklora.federation.member import MemberData
from folklora.federation.setup import prepare
from folklora.privacy.attacks.run import Plan, attack


def first_gradient(recipe: Any) -> dict[str, Any]:
    return attack(recipe, Plan("first-gradient", victims=2, warmup=0))


FEW = ("method.name=fedsb", "method.gradient_examples=1")


@pytest.mark.parametrize("settings", [[], ["method.gradient_head=own"], ["model.dtype=bfloat16"]])
def test_of_one_example_every_word_is_told(settings: list[str], tiny_recipe: Callable[..., Any]) -> None:
    document = first_gradient(tiny_recipe(*FEW, *settings))
    found = document["metrics"]
    for metric in ("word_recall", "word_precision", "pair_recall"):
        assert found[metric]["mean"] == 1
    assert found["word_recall"]["control"] < 0.9  # another client's words are other words, mostly
    victim = document["victims"][0]
    assert victim["dimensions"] <= victim["pairs"]
    assert any(name.startswith("gradient/") for name in document["sent"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])  # of a layer 32 wide int8 leaves little
def test_few_bits_hide_the_faintest_words_alone(dtype: str, tiny_recipe: Callable[..., Any]) -> None:
    document = first_gradient(tiny_recipe(*FEW, f"message.dtype={dtype}"))
    found = document["metrics"]
    assert found["word_recall"]["mean"] > found["word_recall"]["control"] + 0.3
    assert found["word_precision"]["mean"] > 0.9
    assert all(victim["dimensions"] < 32 for victim in document["victims"])


def test_what_is_shown_is_what_was_told(tiny_recipe: Callable[..., Any]) -> None:
    victim = first_gradient(tiny_recipe(*FEW))["victims"][0]
    assert sorted(victim["recovered"][0].split()) == sorted(set(victim["original"][0].split()))
    assert victim["control"][0] != victim["recovered"][0]


def test_of_more_tokens_than_the_layer_is_wide_nothing_is_told(tiny_recipe: Callable[..., Any]) -> None:
    document = first_gradient(tiny_recipe("method.name=fedsb", "method.gradient_examples=64"))
    found = document["metrics"]
    assert all(victim["pairs"] > victim["dimensions"] for victim in document["victims"])
    assert found["pair_recall"]["mean"] == 0
    assert document["victims"][0]["recovered"] == [""]


def test_what_sends_no_dense_gradient_says_so(tiny_recipe: Callable[..., Any]) -> None:
    document = first_gradient(tiny_recipe("method.name=celora"))
    assert document["notes"] == ["method 'celora' sends no dense gradient"]
    assert document["victims"] == []


def test_the_rows_of_the_gradient_are_those_that_it_was_taken_of(tiny_recipe: Callable[..., Any]) -> None:
    setup = prepare(tiny_recipe("method.name=fedsb"))
    data = MemberData(setup, setup.clients[0])
    rows = data.gradient_rows(3)
    assert len(rows) == 3
    assert set(rows.tolist()) <= set(data.split.train.tolist())
    assert rows.tolist() == data.gradient_rows(5)[:3].tolist()
