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


@pytest.mark.parametrize("settings", [[], ["method.gradient_head=own"], ["model.dtype=bfloat16"]])
def test_few_examples_are_told_word_for_word(settings: list[str], tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=fedsb", "method.gradient_examples=1", *settings)
    document = first_gradient(recipe)
    found = document["metrics"]
    for metric in ("pair_recall", "word_recall", "pair_precision", "word_precision"):
        assert found[metric]["mean"] == 1
    assert found["pair_recall"]["control"] == 0
    assert found["dimensions"]["mean"] == found["pairs"]["mean"]
    assert document["victims"][0]["recovered"] == document["victims"][0]["original"]
    assert any(name.startswith("gradient/") for name in document["sent"])


def test_of_more_tokens_than_the_layer_is_wide_nothing_is_told(tiny_recipe: Callable[..., Any]) -> None:
    document = first_gradient(tiny_recipe("method.name=fedsb", "method.gradient_examples=64"))
    found = document["metrics"]
    assert found["pairs"]["mean"] > found["dimensions"]["mean"]
    assert found["pair_recall"]["mean"] == 0
    assert set(document["victims"][0]["recovered"]) == {""}


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
