"""Prediction for many clients in one pass against one client at a time; features against the stock model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.training.prediction import Question, _chunks, features, predict

SIZES, RANKS = (13, 1, 30, 0, 7), (3, 5, 1, 4, 2)


def questions(place: Any) -> list[Question]:
    return [
        Question(f"client-{k}", rank, place.tensors(rank, k), place.examples(size, k)[0])
        for k, (size, rank) in enumerate(zip(SIZES, RANKS, strict=True))
    ]


@pytest.mark.parametrize("tokens", [1, 40, 333, 8192])
@pytest.mark.parametrize(("architecture", "core"), [("bert", True), ("roberta", False), ("gpt2", True)])
def test_many_clients_in_one_pass_answer_as_each_alone(
    world: Callable[..., Any], architecture: str, core: bool, tokens: int
) -> None:
    place = world(architecture, core=core, norm=True)
    asked = questions(place)
    answers = predict(place.task, place.adapter, asked, tokens)
    assert list(answers) == [question.client for question in asked]
    for question in asked:
        answer = answers[question.client]
        assert answer.shape == (len(question.examples), 3)
        assert answer.dtype == np.float32
        for i, example in enumerate(question.examples):  # example by example: no neighbour, no order
            alone = predict(place.task, place.adapter, [Question("x", question.rank, question.tensors, [example])])
            np.testing.assert_allclose(answer[i], alone["x"][0], rtol=1e-4, atol=2e-5)


def test_the_order_of_questions_and_examples_is_kept(world: Callable[..., Any]) -> None:
    place = world("bert", core=True)
    asked = questions(place)
    answers = predict(place.task, place.adapter, asked, 60)
    turned = [Question(q.client, q.rank, q.tensors, list(q.examples)[::-1]) for q in asked[::-1]]
    for client, answer in predict(place.task, place.adapter, turned, 60).items():
        np.testing.assert_allclose(answer[::-1], answers[client], rtol=1e-4, atol=2e-5)


def test_nothing_is_asked(world: Callable[..., Any]) -> None:
    place = world("bert")
    assert predict(place.task, place.adapter, []) == {}
    empty = [Question("a", 2, place.tensors(2, 0), [])]
    assert predict(place.task, place.adapter, empty)["a"].shape == (0, 3)
    assert features(place.task, []).shape == (0, 32)


def test_prediction_is_float32_whatever_training_computes_in(world: Callable[..., Any]) -> None:
    full, half = world("bert"), world("bert", dtype="bfloat16")
    asked = questions(full)
    ours, theirs = (predict(place.task, place.adapter, asked) for place in (half, full))
    for client in ours:
        np.testing.assert_array_equal(ours[client], theirs[client])


def test_dropout_is_for_training(world: Callable[..., Any]) -> None:
    place, dropping = world("bert"), world("bert", dropout=0.9)
    asked = questions(place)
    ours, theirs = (predict(w.task, w.adapter, asked) for w in (dropping, place))
    for client in ours:
        np.testing.assert_array_equal(ours[client], theirs[client])


@pytest.mark.parametrize("tokens", [1, 50, 8192])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
def test_features_are_the_stock_models_pooled_states(world: Callable[..., Any], architecture: str, tokens: int) -> None:
    from transformers import AutoModel

    place = world(architecture)
    examples, _ = place.examples(12, 0)
    found = features(place.task, examples, tokens)
    model = AutoModel.from_pretrained(place.folder).eval()
    for example, feature in zip(examples, found, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([example])).last_hidden_state[0]
        expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[place.task.pooling]
        np.testing.assert_allclose(feature, expected.numpy(), rtol=1e-4, atol=2e-6)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=5),
    tokens=st.integers(1, 100),
)
def test_chunks_hold_everything_once_and_not_too_much(lengths: list[list[int]], tokens: int) -> None:
    groups: Sequence[Sequence[list[int]]] = [[[0] * length for length in group] for group in lengths]
    seen: list[tuple[int, int]] = []
    for chunk in _chunks(groups, tokens):
        assert [k for k, _ in chunk] == sorted({k for k, _ in chunk})  # a client once a chunk, in order
        assert all(members for _, members in chunk)
        inside = [lengths[k][i] for k, members in chunk for i in members]
        assert sum(inside) <= tokens or len(inside) == 1
        seen += [(k, i) for k, members in chunk for i in members]
    assert sorted(seen) == [(k, i) for k, group in enumerate(lengths) for i in range(len(group))]
