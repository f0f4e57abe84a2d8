"""Mixtures of experts in the cohort trainer: company changes nothing; the load is minimised and not reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from folklora.adapters.lowrank import LowRank, Tensors
from folklora.adapters.mixture import CoreMixture, Mixture
from folklora.backbones.backbone import Backbone
from folklora.training.jobs import Fitted, Job
from folklora.training.prediction import Question, layer_inputs, predict
from folklora.training.private import Private

RANK, SLOTS = 2, 3
SIZES, HELD = (23, 9, 17, 3, 12), (3, 1, 2, 3, 2)
KINDS = {"lora": Mixture, "cores": CoreMixture}
both = pytest.mark.parametrize("kind", KINDS)


def mixed(place: Any, kind: str, *, top: int = 2, balance: float = 0.05, slots: int = SLOTS) -> Any:
    """The same world with a mixture in it."""
    own: LowRank = place.adapter
    adapter = KINDS[kind](own.sites, False, own.alpha, own.dropout, slots=slots, top=top, balance=balance)
    return replace(place, adapter=adapter)


def jobs_of(place: Any, kinds: str = "A B T E head") -> list[Job]:
    stacked = place.adapter.stacked(RANK)
    made = place.jobs(SIZES, [stacked] * len(SIZES), kinds=kinds)
    return [replace(job, tensors=living(place, job.tensors, held)) for job, held in zip(made, HELD, strict=True)]


def living(place: Any, tensors: Tensors, held: int) -> Tensors:
    live = (torch.arange(place.adapter.slots) < held).float()
    return {name: live.clone() if name.startswith("live/") else tensor for name, tensor in tensors.items()}


def assert_same(ours: dict[str, Fitted], theirs: dict[str, Fitted], rtol: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for client, fitted in ours.items():
        assert fitted.loss == pytest.approx(theirs[client].loss, rel=1e-5)
        for name, tensor in fitted.tensors.items():
            other = theirs[client].tensors[name]
            assert float((tensor - other).norm()) <= rtol * float(other.norm()), name


@both
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_together_is_one_by_one(world: Callable[..., Any], kind: str, dropout: float) -> None:
    place = mixed(world("bert", dropout=dropout), kind)
    jobs = jobs_of(place)
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "local_epochs": 2}
    alone = {client: fitted for job in jobs for client, fitted in place.fit([job], **settings).items()}
    for cohort in (1, 2, 5):
        assert_same(place.fit(jobs, cohort=cohort, **settings), alone)
    assert_same(place.fit(jobs, cohort=3, packed="never", **settings), alone)
    assert_same(place.fit(jobs[::-1], cohort=3, **settings), alone)
    moved = alone["client-0"].tensors
    for factor in (*place.adapter.expert_kinds, "T"):
        names = [name for name in moved if name.startswith(f"{factor}/")]
        assert all(not torch.equal(moved[name], jobs[0].tensors[name]) for name in names)


@both
def test_the_load_is_minimised_and_not_reported(world: Callable[..., Any], kind: str) -> None:
    """One step each: losses are the data's, to the bit; only tensors that the router reads move otherwise."""
    settings: dict[str, Any] = {"batch_size": 64, "optimizer": "sgd", "lr": 0.1, "clip": None}
    plain, pulled = (mixed(world("bert"), kind, balance=balance) for balance in (0.0, 0.5))
    one, other = (place.fit(jobs_of(place), **settings) for place in (plain, pulled))
    for client, fitted in one.items():
        assert fitted.loss == other[client].loss
    routed = {
        name
        for name, tensor in one["client-0"].tensors.items()
        if not torch.equal(tensor, other["client-0"].tensors[name])
    }
    assert {name[0] for name in routed} >= {"T"}
    assert not any(name.startswith("head/") for name in routed)


def test_one_expert_beside_the_shared_one_is_plain_lora_of_twice_the_rank(world: Callable[..., Any]) -> None:
    """[A_0; A_1] and [B_0 B_1] at the scale of one of them."""
    place = world("bert")
    mixture = mixed(place, "lora", slots=1, balance=0.0)
    job = mixture.jobs((20,), (2 * RANK,), kinds="A B head")[0]
    tensors = living(mixture, job.tensors, 1)
    factors = {name: tensor for name, tensor in tensors.items() if name[0] in "ABh"}
    plain = replace(place, adapter=LowRank(place.adapter.sites, False, 2 * place.adapter.alpha))
    ours = mixture.fit([replace(job, tensors=tensors)])["client-0"]
    theirs = plain.fit([replace(job, tensors=factors)])["client-0"]
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for name, tensor in theirs.tensors.items():
        assert float((ours.tensors[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


@both
def test_layers_that_are_computed_again_change_nothing(
    world: Callable[..., Any], tiny_model: Callable[[str], Any], kind: str
) -> None:
    """Dropout and the load are as they were at first."""
    place = mixed(world("bert", dropout=0.3), kind)
    again = Backbone.load(str(tiny_model("bert")), dtype="float32")
    again.checkpoint()
    other = replace(place, task=type(place.task)(again, place.task.classes))
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "cohort": 3}
    assert_same(other.fit(jobs_of(other), **settings), place.fit(jobs_of(place), **settings), 1e-6)


@both
def test_private_examples_are_each_a_client_of_their_own(world: Callable[..., Any], kind: str) -> None:
    """Without noise and with a wide clip, a step of all examples follows the mean of their own gradients."""
    place = mixed(world("bert"), kind)
    (job, *_) = jobs_of(place)
    count = len(job.examples)
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "clip": None, "batch_size": count}
    private = replace(job, private=Private(1e6, 0.0, 7))
    (fitted,) = place.fit([private], **settings).values()
    moves: dict[str, torch.Tensor] = {name: torch.zeros_like(job.tensors[name]) for name in job.trained}
    for i in range(count):
        alone = replace(job, examples=[job.examples[i]], labels=job.labels[i : i + 1])
        (one,) = place.fit([alone], **settings).values()
        for name in job.trained:
            moves[name] += (one.tensors[name] - job.tensors[name]) / count
    for name, move in moves.items():
        found = fitted.tensors[name] - job.tensors[name]
        assert float((found - move).norm()) <= 1e-3 * float(move.norm()) + 1e-6, name


@both
def test_answers_do_not_depend_on_company(world: Callable[..., Any], kind: str) -> None:
    place = mixed(world("bert"), kind)
    rank = place.adapter.stacked(RANK)
    questions = [Question(job.client, rank, job.tensors, job.examples) for job in jobs_of(place)]
    together = predict(place.task, place.adapter, questions)
    for question in questions:
        alone = predict(place.task, place.adapter, [question], tokens=40)[question.client]
        np.testing.assert_allclose(together[question.client], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_layer_inputs_are_those_of_a_stock_model(world: Callable[..., Any], architecture: str) -> None:
    """The oracle: Hugging Face's model, one text at a time, no padding, with hooks at the adapted layers."""
    from transformers import AutoModel

    place = world(architecture)
    tensors = place.tensors(RANK, 1, "fresh")
    examples, _ = place.examples(13, 2)
    got = layer_inputs(place.task, place.adapter, tensors, examples, tokens=50)
    stock = AutoModel.from_pretrained(place.folder).eval()
    seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in place.adapter.sites}
    for name, inputs in seen.items():
        stock.get_submodule(name).register_forward_pre_hook(lambda _, given, kept=inputs: kept.append(given[0][0]))
    with torch.no_grad():
        for example in examples:
            stock(torch.tensor([example]))
    for name, inputs in seen.items():
        want = torch.cat(inputs).double().mean(0)
        torch.testing.assert_close(got[f"input/{name}"].double(), want, rtol=1e-4, atol=1e-5)
    nothing = layer_inputs(place.task, place.adapter, tensors, [])
    assert not any(bool(tensor.any()) for tensor in nothing.values())


def test_layer_inputs_are_under_the_client_s_own_model(world: Callable[..., Any]) -> None:
    place = mixed(world("bert"), "lora")
    (job, *_) = jobs_of(place)
    frozen = {name: torch.zeros_like(t) if name.startswith("B/") else t for name, t in job.tensors.items()}
    ours, plain = (layer_inputs(place.task, place.adapter, each, job.examples) for each in (job.tensors, frozen))
    first, *deeper = ours
    torch.testing.assert_close(ours[first], plain[first])
    assert any(not torch.allclose(ours[name], plain[name], atol=1e-3) for name in deeper)
