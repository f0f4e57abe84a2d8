"""The differentiable network: on the embeddings of a real text it is the backbone itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folklora.federation.setup import prepare
from folklora.randomness import torch_generator
from folklora.training.network import embedded, network_of
from folklora.training.prediction import Question, predict


@pytest.fixture(params=["bert", "roberta", "distilbert", "llama"])
def setup(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Any], tiny_model: Callable[[str], Path]) -> Any:
    return prepare(tiny_recipe("data.limit=80", f"model.name={tiny_model(request.param)}"))


def moved(setup: Any) -> dict[str, torch.Tensor]:
    random = torch_generator(1, "model")
    initial = setup.method.initial("0")
    return {name: t + 0.1 * torch.randn(t.shape, generator=random) for name, t in initial.items()}


def test_real_embeddings_give_what_the_model_gives(setup: Any) -> None:
    network, model = setup.method.context.network(setup.method.adapter), moved(setup)
    examples = setup.encoded[:12]
    inputs, lengths = embedded(setup.task, examples)
    assert inputs.shape == (12, max(map(len, examples)), network.width)
    with torch.no_grad():
        features = network.features(model, inputs, lengths.tolist())
    logits = features @ model["head/weight"].T + model["head/bias"]
    wanted = predict(setup.task, setup.method.adapter, [Question("0", 4, model, examples)])["0"]
    torch.testing.assert_close(logits, torch.from_numpy(wanted), rtol=1e-4, atol=1e-4)
    frozen = setup.method.initial("0")
    with torch.no_grad():
        plain = network.features(frozen, inputs, lengths.tolist())
    torch.testing.assert_close(plain, setup.frozen_features()[:12], rtol=1e-4, atol=1e-4)


def test_slopes_are_those_of_finite_differences(setup: Any) -> None:
    network, model = setup.method.context.network(setup.method.adapter), moved(setup)
    inputs = 0.5 * torch.randn(2, 5, network.width, generator=torch_generator(2, "inputs"))
    site = setup.method.context.sites[0].name
    wanted = torch.randn(2, setup.task.width, generator=torch_generator(3, "direction"))
    leaves = {"inputs": inputs.requires_grad_(), **{n: model[n].requires_grad_() for n in (f"A/{site}", f"B/{site}")}}

    def value() -> torch.Tensor:
        return (network.features(model, leaves["inputs"], [5, 3]) * wanted).sum()

    slopes = torch.autograd.grad(value(), list(leaves.values()))
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        direction = slope / slope.norm()
        with torch.no_grad():
            ends = []
            for step in (1e-2, -1e-2):
                leaf += step * direction
                ends.append(float(value()))
                leaf -= step * direction
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.05), name
    assert not slopes[0][1, 3:].any()  # what lies behind a short text is nothing


def test_public_inputs_are_texts_of_neutral_words(setup: Any) -> None:
    network = setup.method.context.network(setup.method.adapter)
    one, same, other = (network.public(3, 6, torch_generator(seed, "public")) for seed in (0, 0, 1))
    assert one.shape == (3, 6, network.width)
    assert torch.equal(one, same)
    if len(setup.task.backbone.tokenizer) > 100:  # the tiny model knows none of these words
        assert not torch.equal(one, other)


def test_pictures_have_none(tiny_recipe: Callable[..., Any]) -> None:
    assert network_of(object()) is None  # type: ignore[arg-type]
