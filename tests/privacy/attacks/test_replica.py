"""The attacker's copy: fed with the truth, it gives the gradient that a client's own training follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.federation.setup import Setup, prepare
from folklora.privacy.attacks.replica import Replica, padded
from folklora.randomness import torch_generator
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job

METHODS = ["fedit", "ffa", "fedsa", "celora", "folklora", "fedsb", "ravan"]


def _model(setup: Setup) -> Tensors:
    """Some model of a client, no tensor of which is zero."""
    client = next(iter(setup.data.splits))
    tensors = setup.method.initial(client)
    return {n: t + 0.05 * torch.randn(t.shape, generator=torch_generator(0, n)) for n, t in sorted(tensors.items())}


def _moved(setup: Setup, model: Tensors, names: list[str], rows: np.ndarray) -> Tensors:
    """What a step of SGD subtracts: the cohort trainer's gradient. Long steps leave less of it to rounding."""
    rate = 1000.0
    train = setup.recipe.train.model_copy(
        update={"optimizer": "sgd", "lr": rate, "clip": None, "batch_size": len(rows), "local_epochs": 1}
    )
    adapter = setup.method.adapter
    examples, labels = setup.examples(rows)
    job = Job("0", 1, adapter.rank(model), model, frozenset(names), examples, labels)
    (fitted,) = CohortTrainer(setup.task, adapter, train, 0).fit([job])
    return {name: (model[name] - fitted.tensors[name]) / rate for name in names}


def _same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float(tensor.norm()) > 0
        torch.testing.assert_close(found[name].detach(), tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_texts(tiny_recipe: Callable[..., Any], method: str) -> None:
    setup = prepare(tiny_recipe(f"method.name={method}"))
    model, rows = _model(setup), np.array([3, 8, 21])
    names = sorted(n for n in model if n.startswith(("A/", "B/", "C/", "gain/", "head/")))
    replica = Replica(setup.task, setup.method.adapter, "text")
    examples, labels = setup.examples(rows)
    vectors = padded([replica.vectors[torch.tensor(ids)] for ids in examples])
    lengths = [len(ids) for ids in examples]
    assert len(set(lengths)) > 1  # padding must not count

    found = replica.gradients(model, names, vectors, torch.from_numpy(labels), lengths)
    wanted = _moved(setup, model, names, rows)
    _same(found, wanted)
    _same(replica.exact(model, names, examples, torch.from_numpy(labels)), wanted)
    soft = torch.nn.functional.one_hot(torch.from_numpy(labels), setup.task.classes).float()
    _same(replica.gradients(model, names, vectors, soft, lengths), wanted)


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip"])
def test_pictures(picture_recipe: Callable[..., Any], kind: str) -> None:
    setup = prepare(picture_recipe(kind))
    model, rows = _model(setup), np.array([3, 8, 21])
    names = sorted(n for n in model if n.startswith(("A/", "B/")))
    replica = Replica(setup.task, setup.method.adapter, "image")
    examples, labels = setup.examples(rows)
    pictures = [getattr(example, "picture", example) for example in examples]
    pixels = torch.from_numpy(np.stack([picture.values for picture in pictures])).float() / 255
    _same(
        replica.gradients(model, names, pixels, torch.from_numpy(labels)),
        _moved(setup, model, names, rows),
    )


def test_only_the_text_tower_is_adapted(picture_recipe: Callable[..., Any]) -> None:
    # Then encoded examples are embeddings, and pixels still have a slope.
    setup = prepare(picture_recipe("clip", "adapter.tower=text"))
    model, rows = _model(setup), np.array([3, 8])
    names = sorted(n for n in model if n.startswith(("A/", "B/")))
    replica = Replica(setup.task, setup.method.adapter, "image")
    encoded = replica.backbone.pictures.encode([setup.data.table.inputs[i] for i in rows])
    pixels = (torch.from_numpy(np.stack(encoded)).float() / 255).requires_grad_()
    labels = torch.from_numpy(setup.data.table.labels[rows])
    found = replica.gradients(model, names, pixels, labels)
    _same(found, _moved(setup, model, names, rows))
    (slope,) = torch.autograd.grad(sum(t.square().sum() for t in found.values()), pixels)
    assert float(slope.norm()) > 0


def test_a_language_model(chat_recipe: Callable[..., Any]) -> None:
    setup = prepare(chat_recipe())
    model, rows = _model(setup), np.array([3, 8])
    names = sorted(n for n in model if n.startswith(("A/", "B/")))
    replica = Replica(setup.task, setup.method.adapter, "text")
    examples, labels = setup.examples(rows)
    vectors = padded([replica.vectors[torch.tensor(example.tokens)] for example in examples])
    lengths, prompts = [len(example) for example in examples], [example.prompt for example in examples]
    found = replica.gradients(model, names, vectors, torch.from_numpy(labels), lengths, prompts)
    _same(found, _moved(setup, model, names, rows))


def test_slopes_of_slopes(tiny_recipe: Callable[..., Any]) -> None:
    """Second derivatives against finite differences, in the direction of some noise."""
    setup = prepare(tiny_recipe())
    model = _model(setup)
    names = sorted(n for n in model if n.startswith("C/"))
    replica = Replica(setup.task, setup.method.adapter, "text")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 5, replica.vectors.shape[1], generator=generator)
    way = torch.randn(vectors.shape, generator=generator)

    def size(inputs: Tensor) -> Tensor:
        found = replica.gradients(model, names, inputs, torch.tensor([1]), [5])
        return torch.stack([t.double().square().sum() for t in found.values()]).sum()

    inputs = vectors.clone().requires_grad_()
    (slope,) = torch.autograd.grad(size(inputs), inputs)
    step = 1e-2
    difference = float((size(vectors + step * way) - size(vectors - step * way)).detach()) / (2 * step)
    assert float((slope * way).sum()) == pytest.approx(difference, rel=2e-2)
