"""Training and prediction over several depths of a shared block: company changes nothing, and steps say which depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from folklora.randomness import numpy_generator
from folklora.sections import TrainSection
from folklora.training.gradients import weight_gradients
from folklora.training.jobs import Job, Slot
from folklora.training.prediction import Question, features, layer_inputs, predict
from folklora.training.private import Private
from folklora.training.stacks import plug, stack

SEED = 5
DEPTHS = ((2, 3, 6), (6,), (1, 4), (3, 5))
"""What each client's minibatches draw from."""


def jobs_of(place: Any, *, private: bool = False) -> list[Job]:
    jobs = place.jobs((17, 9, 12, 5), (4, 2, 4, 3))
    return [
        replace(job, depths=depths, private=Private(1.0, 0.4, 100 + k) if private else None)
        for k, (job, depths) in enumerate(zip(jobs, DEPTHS, strict=True))
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packed", ["always", "never"])
@pytest.mark.parametrize("private", [False, True])
def test_training_over_depths_is_the_same_side_by_side_and_one_by_one(
    world: Callable[..., Any], packed: str, dropout: float, private: bool
) -> None:
    place = world("albert", core=True, norm=True, dropout=dropout)
    # Plain steps: Adam would make much of the last digits.
    train: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "local_epochs": 2, "batch_size": 4, "packed": packed}
    alone = place.fit(jobs_of(place, private=private), cohort=1, **train)
    for cohort in (3, 4):
        together = place.fit(jobs_of(place, private=private), cohort=cohort, **train)
        for client, fitted in alone.items():
            assert together[client].steps == fitted.steps
            assert together[client].loss == pytest.approx(fitted.loss, rel=1e-4)
            for name, tensor in fitted.tensors.items():
                torch.testing.assert_close(together[client].tensors[name], tensor, rtol=2e-3, atol=2e-5)


def test_depths_follow_from_seed_client_round_and_step(world: Callable[..., Any]) -> None:
    place = world("albert")
    (job,) = place.jobs((40,), (2,))
    job = replace(job, depths=(2, 3, 6))
    train = TrainSection(batch_size=4, local_epochs=5)
    drawn = Slot(job, train, SEED).depths
    generator = numpy_generator(SEED, "depth", "client-0", 1)
    assert drawn == [(2, 3, 6)[i] for i in generator.integers(3, size=50)]
    assert set(drawn) == {2, 3, 6}
    assert Slot(replace(job, branch="other"), train, SEED).depths == drawn
    for other in (replace(job, round=2), replace(job, client="client-1")):
        assert Slot(other, train, SEED).depths != drawn
    assert Slot(job, train, SEED + 1).depths != drawn
    assert Slot(replace(job, depths=(3,)), train, SEED).depths == [3] * 50
    assert Slot(replace(job, depths=()), train, SEED).depth is None


def test_every_step_is_the_gradient_at_its_own_depth(world: Callable[..., Any]) -> None:
    place = world("albert", core=True)
    (job,) = place.jobs((12,), (3,))
    job = replace(job, depths=(2, 3, 6))
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "clip": None, "batch_size": 4, "local_epochs": 2}
    fitted = place.fit([job], **settings)["client-0"]
    slot = Slot(job, TrainSection(**settings), SEED)
    assert len(set(slot.depths)) > 1
    now = dict(job.tensors)
    for picks, depth in zip(slot.batches, slot.depths, strict=True):
        stacks = {n: t.requires_grad_() for n, t in stack([now], 3, place.task.backbone.device).items()}
        scales = torch.tensor([place.adapter.scale(3)])

        def plugged(batch: Any, stacks: Any = stacks, scales: Any = scales, depth: int = depth) -> Any:
            return plug(place.adapter, stacks, scales, batch, torch.device("cpu"), [depth])

        layout = place.task.lay_out([[job.examples[i] for i in picks]])
        place.task.losses(layout, torch.from_numpy(job.labels[picks]), stacks, plugged).sum().backward()
        for name in job.trained:
            slope = stacks[name].grad[0]
            now[name] = now[name] - 0.1 * (slope.T if name.startswith("B/") else slope)
    for name in job.trained:
        torch.testing.assert_close(fitted.tensors[name], now[name], rtol=1e-4, atol=1e-6)


def test_answers_at_depths_of_their_own_are_those_of_each_alone(world: Callable[..., Any]) -> None:
    place = world("albert")
    asked = [
        Question(f"c{k}", rank, place.tensors(rank, k), place.examples(9, k)[0], depth)
        for k, (rank, depth) in enumerate(((2, 3), (4, 6), (1, None), (3, 1), (2, 3)))
    ]
    for tokens in (40, 8192):
        together = predict(place.task, place.adapter, asked, tokens)
        for question in asked:
            alone = predict(place.task, place.adapter, [question])[question.client]
            np.testing.assert_allclose(together[question.client], alone, rtol=1e-4, atol=1e-5)
    full = predict(place.task, place.adapter, [replace(asked[2], depth=6)])["c2"]
    np.testing.assert_array_equal(full, predict(place.task, place.adapter, [asked[2]])["c2"])


def test_what_else_runs_the_backbone_runs_it_at_the_depth_that_is_named(world: Callable[..., Any]) -> None:
    place = world("albert")
    examples, labels = place.examples(7, 0)
    tensors = place.tensors(2, 0)
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("head/")}
    depth = place.task.backbone.depth
    asked: list[Callable[[int | None], Any]] = [
        lambda steps: {"features": torch.from_numpy(features(place.task, examples, depth=steps))},
        lambda steps: weight_gradients(place.task, examples, labels, head, depth=steps),
        lambda steps: layer_inputs(place.task, place.adapter, tensors, examples, depth=steps),
    ]
    for ask in asked:
        named, whole = ask(2), ask(None)
        with depth.walking(2):
            by_default = ask(None)
        for name, tensor in named.items():
            assert torch.equal(tensor, by_default[name])
            assert not torch.equal(tensor, whole[name])
            assert torch.equal(whole[name], ask(6)[name])
    assert depth.steps == 6
