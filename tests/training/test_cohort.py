"""What a cohort promises: no result depends on company, order or layout; no step is wasted; trouble stays at home."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import Tensors
from folklora.randomness import torch_generator
from folklora.sections import TrainSection
from folklora.training.cohort import CohortTrainer, _Cohort
from folklora.training.dropout import Dropout
from folklora.training.jobs import Fitted, Job, Slot
from folklora.training.prediction import Question, predict

SEED = 5  # as in conftest
SIZES = (23, 9, 40, 3, 17, 8, 30, 1)
RANKS = (3, 1, 8, 4, 2, 5, 3, 2)


def assert_same(ours: dict[str, Fitted], theirs: dict[str, Fitted]) -> None:
    assert set(ours) == set(theirs)
    for client, fitted in ours.items():
        other = theirs[client]
        assert fitted.steps == other.steps
        assert fitted.loss == pytest.approx(other.loss, rel=1e-5)
        for name, tensor in fitted.tensors.items():
            assert float((tensor - other.tensors[name]).norm()) <= 1e-5 * float(other.tensors[name].norm()), name


def differ(ours: Tensors, theirs: Tensors) -> bool:
    return any(not torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


# -- company ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_neither_the_cohort_nor_the_order_nor_the_layout_matters(
    world: Callable[..., Any], architecture: str, dropout: float
) -> None:
    place = world(architecture, core=True, dropout=dropout)
    jobs = place.jobs(SIZES, RANKS)
    run = lambda jobs, **train: place.fit(jobs, local_epochs=2, **train)
    alone = {client: fitted for job in jobs for client, fitted in run([job]).items()}
    for cohort in (1, 3, 8):
        assert_same(run(jobs, cohort=cohort), alone)
    assert_same(run(jobs[::-1], cohort=3), alone)
    shuffled = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs))]
    assert_same(run(shuffled, cohort=5), alone)
    assert_same(run(jobs, cohort=4, packed="never"), alone)
    assert_same(run(jobs, tokens=150), alone)  # an automatic cohort


def test_every_order_of_four(world: Callable[..., Any]) -> None:
    place = world("bert", dropout=0.2)
    jobs = place.jobs(SIZES[:4], RANKS[:4])
    expected = place.fit(jobs, cohort=2)
    for order in list(permutations(jobs))[1::4]:
        assert_same(place.fit(order, cohort=2), expected)


@pytest.mark.parametrize("core", [False, True])
def test_a_larger_common_rank_changes_nothing(world: Callable[..., Any], core: bool) -> None:
    """A neighbour of rank 16 makes everybody's stack taller."""
    place = world("bert", core=core, norm=True)
    jobs = place.jobs((20, 12), (2, 16))
    together = place.fit(jobs, weight_decay=0.1)
    alone = place.fit(jobs[:1], weight_decay=0.1)
    assert_same({"client-0": together["client-0"]}, alone)
    shapes = {name: tensor.shape for name, tensor in together["client-0"].tensors.items()}
    assert shapes == {name: tensor.shape for name, tensor in jobs[0].tensors.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_kept_moments_shrink_with_the_rank(world: Callable[..., Any], optimizer: str) -> None:
    """Moments of a rank 6 that is 2 by now: what they were about is gone, whoever trains beside the client."""
    place = world("bert", core=True)
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    settings = {"optimizer": optimizer, "optimizer_state": "kept", **momentum}
    before = place.fit(place.jobs((20,), (6,)), **settings)["client-0"]
    small, neighbour = place.jobs((20, 20), (2, 6), round=2)
    small = replace(small, moments=before.moments)
    alone = place.fit([small], **settings)
    assert_same({"client-0": place.fit([small, neighbour], cohort=2, **settings)["client-0"]}, alone)
    shapes = {name: tensor.shape for name, tensor in alone["client-0"].moments.items() if name.startswith("m/")}
    assert shapes == {f"m/{name}": small.tensors[name].shape for name in small.trained}


# -- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_belongs_to_the_client_and_the_round(world: Callable[..., Any]) -> None:
    place = world("bert", dropout=0.5)
    job = place.jobs((8,), (4,))[0]  # one batch: the order of examples cannot tell clients apart
    run = lambda job: place.fit([job])[job.client].tensors
    first = run(job)
    assert not differ(first, run(job))
    assert differ(first, run(replace(job, client="another")))
    assert differ(first, run(replace(job, round=2)))
    without = world("bert").fit([job])[job.client].tensors
    assert differ(first, without)


class Masks:
    """The keep-masks that a batch gets, placed back by sequence and position."""

    def __init__(self, place: Any, probability: float, groups: list[list[list[int]]], layout: str) -> None:
        batch = place.task.backbone.batch(groups, layout)
        slots = [Slot(job, TrainSection(), SEED) for job in place.jobs((1,) * len(groups), (2,) * len(groups))]
        bank = Bank({}, {}, batch.token_offsets, batch.token_clients())
        self.make = Dropout(probability, batch, [slot.dropout for slot in slots], bank)
        self.batch = batch

    def draw(self, width: int) -> tuple[list[Tensor], Tensor]:
        mask = self.make("site", width)
        segments = self.batch.segments.reshape(-1)
        return [mask[segments == i] for i in range(self.batch.sequences)], mask[segments < 0]


GROUPS = [[[5] * 7, [6] * 3, [7] * 11], [[8] * 20]]


def test_masks_do_not_depend_on_the_layout_or_on_the_neighbours(world: Callable[..., Any]) -> None:
    place = world("bert")
    packed, padded = Masks(place, 0.4, GROUPS, "always"), Masks(place, 0.4, GROUPS, "never")
    single = Masks(place, 0.4, GROUPS[:1], "always")
    seen = []
    for width in (32, 5):  # one site after the other; an odd width leaves part of a random word unused
        one, _ = packed.draw(width)
        other, _ = padded.draw(width)
        alone, _ = single.draw(width)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one[:3], alone, strict=True))
        seen.append(one[3][:, :5])
    assert not torch.equal(*seen)  # each site has masks of its own


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9, 0.999999])
def test_masks_keep_the_mean(world: Callable[..., Any], probability: float) -> None:
    sequences, _ = Masks(world("bert"), probability, GROUPS, "never").draw(4000)
    mask = torch.cat(sequences).flatten()
    exact = min(round(probability * 65536), 65535) / 65536
    values = {0.0, *(mask[mask > 0].unique().tolist())}
    assert len(values) == 2
    assert max(values) == pytest.approx(1 / (1 - exact))
    dropped = float((mask == 0).float().mean())
    assert abs(dropped - exact) < 5 * math.sqrt(exact * (1 - exact) / mask.numel())


def test_the_stream_is_the_clients_own_generator(world: Callable[..., Any]) -> None:
    """Sixteen bits a number, in the order of tokens: a fresh generator of the same client draws the same."""
    sequences, _ = Masks(world("bert"), 0.25, GROUPS, "always").draw(8)
    for client, first, last in (("client-0", 0, 3), ("client-1", 3, 4)):
        mask = torch.cat(sequences[first:last])
        words = torch.empty(mask.numel() // 4, dtype=torch.int64)
        words.random_(-(2**63), None, generator=torch_generator(SEED, "dropout", client, 1))
        bits = words.view(torch.int16).int() + 32768
        assert torch.equal(mask.flatten() > 0, bits >= 0.25 * 65536)


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 24])
def test_every_example_once_an_epoch(world: Callable[..., Any], size: int, epochs: int) -> None:
    job = world("bert").jobs((size,), (2,))[0]
    train = TrainSection(batch_size=8, local_epochs=epochs)
    batches = Slot(job, train, SEED).batches
    per_epoch = math.ceil(size / 8)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(part).tolist()) == list(range(size))
        assert all(len(batch) == 8 for batch in part[:-1])
    again = Slot(job, train, SEED).batches
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    if size > 7:
        other = Slot(replace(job, round=2), train, SEED).batches
        assert not all(np.array_equal(a, b) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize("cohort", [1, 2, 3, 8])
def test_no_step_is_wasted_and_none_is_extra(
    world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, cohort: int
) -> None:
    place = world("bert")
    jobs = place.jobs(SIZES, RANKS)
    widths: list[int] = []
    step = _Cohort.step
    monkeypatch.setattr(_Cohort, "step", lambda self: (widths.append(len(self.slots)), step(self)))
    fitted = place.fit(jobs, cohort=cohort, local_epochs=2)
    expected = {job.client: 2 * math.ceil(len(job.examples) / 8) for job in jobs}
    assert {client: found.steps for client, found in fitted.items()} == expected
    assert sum(widths) == sum(expected.values())  # a slot that is open trains
    assert max(widths) == cohort
    # Nobody waits beside an empty slot: until the queue is empty all slots are taken.
    full = widths.count(cohort)
    assert widths == [cohort] * full + sorted(widths[full:], reverse=True)


def test_a_client_is_given_back_as_soon_as_it_is_done(world: Callable[..., Any]) -> None:
    place = world("bert")
    trainer = CohortTrainer(place.task, place.adapter, TrainSection(batch_size=8, cohort=2), SEED)
    order = [fitted.client for fitted in trainer.fit(place.jobs((8, 64, 16, 8), (2, 2, 2, 2)))]
    assert order[-1] == "client-1"  # the long one, seated first, ends last
    assert sorted(order) == [f"client-{k}" for k in range(4)]
    assert list(trainer.fit([])) == []


def test_how_many_train_side_by_side(world: Callable[..., Any]) -> None:
    place = world("bert")
    jobs = place.jobs((30,) * 6, (2,) * 6)
    count = lambda **train: CohortTrainer(place.task, place.adapter, TrainSection(**train), SEED).slots_for(jobs)
    assert count(cohort=4) == 4
    assert count(cohort=100) == 6
    mean = sum(len(example) for job in jobs for example in job.examples) / 180
    assert count(batch_size=8, tokens=round(3 * 8 * mean)) == 3
    assert count(batch_size=8, tokens=1) == 1
    assert count(batch_size=8, tokens=10**6) == 6


def test_the_loss_is_the_mean_over_all_examples_seen(world: Callable[..., Any]) -> None:
    """With a learning rate of (almost) nothing it is the cross-entropy of the model that came in."""
    place = world("bert", core=True)
    jobs = place.jobs((21, 5), (3, 2))
    fitted = place.fit(jobs, lr=1e-30, local_epochs=2)
    asked = [Question(job.client, job.rank, job.tensors, job.examples) for job in jobs]
    answers = predict(place.task, place.adapter, asked)
    for job in jobs:
        expected = F.cross_entropy(torch.from_numpy(answers[job.client]), torch.from_numpy(job.labels))
        assert fitted[job.client].loss == pytest.approx(float(expected), rel=1e-5)


def test_training_learns(world: Callable[..., Any]) -> None:
    place = world("bert", core=True)
    jobs = place.jobs((60, 40), (4, 2), start="fresh")
    losses = [place.fit(jobs, local_epochs=epochs, lr=1e-2)["client-0"].loss for epochs in (1, 15)]
    assert losses[1] < 0.75 * losses[0]


# -- what trains and what does not -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["B head", "A head", "C", "head", "norm head", "A B C head norm"])
def test_only_what_trains_moves(world: Callable[..., Any], kinds: str) -> None:
    place = world("bert", core=True, norm=True)
    jobs = place.jobs((20, 9, 12), (3, 5, 1), kinds=kinds)
    before = [{name: tensor.clone() for name, tensor in job.tensors.items()} for job in jobs]
    fitted = place.fit(jobs, cohort=2)
    assert_same(fitted, {client: found for job in jobs for client, found in place.fit([job]).items()})
    for job, start in zip(jobs, before, strict=True):
        assert list(fitted[job.client].tensors) == list(start)
        for name, tensor in fitted[job.client].tensors.items():
            assert torch.equal(tensor, start[name]) != (name.partition("/")[0] in kinds.split()), name
            assert torch.equal(job.tensors[name], start[name])  # what came in is left alone
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()


# -- trouble ---------------------------------------------------------------------------------------------------------


def poisoned(job: Job, kind: str, value: float) -> Job:
    tensors = {name: tensor.clone() for name, tensor in job.tensors.items()}
    for name, tensor in tensors.items():
        if name.startswith(kind):
            tensor.view(-1)[0] = value
    return replace(job, tensors=tensors)


@pytest.mark.parametrize("layout", ["auto", "never"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("kind", "value"), [("A/", math.nan), ("B/", math.inf), ("head/", math.nan), ("norm/", 1e38)])
def test_a_client_that_is_not_finite_harms_nobody_and_shows(
    world: Callable[..., Any], kind: str, value: float, optimizer: str, layout: str
) -> None:
    place = world("bert", core=True, norm=True, dropout=0.1)
    jobs = place.jobs((20, 9, 30, 12, 16), (3, 5, 1, 2, 2))
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    settings = {"cohort": 3, "optimizer": optimizer, "packed": layout, **momentum}
    healthy = place.fit(jobs, **settings)
    jobs[0], jobs[2] = poisoned(jobs[0], kind, value), poisoned(jobs[2], kind, value)
    sick = place.fit(jobs, **settings)
    for client in ("client-1", "client-3", "client-4"):  # neighbours, and those who took the sick one's slot
        assert_same({client: sick[client]}, {client: healthy[client]})
    for client in ("client-0", "client-2"):
        assert not math.isfinite(sick[client].loss)
        assert math.isfinite(healthy[client].loss)


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_bfloat16_compute_trains_float32_numbers(world: Callable[..., Any], architecture: str, dropout: float) -> None:
    norm = architecture == "bert"
    half, full = (
        world(architecture, core=True, norm=norm, dropout=dropout, dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    jobs = full.jobs((40, 17), (4, 2))
    ours, theirs = (
        place.fit(jobs, local_epochs=2, optimizer_state="kept", optimizer="sgd", momentum=0.5, lr=0.05)
        for place in (half, full)
    )
    for client, fitted in ours.items():
        assert fitted.loss == pytest.approx(theirs[client].loss, rel=0.02)
        assert fitted.loss != theirs[client].loss
        assert {tensor.dtype for tensor in fitted.tensors.values()} == {torch.float32}
        assert {t.dtype for name, t in fitted.moments.items() if name.startswith("m/")} == {torch.float32}
        start = next(job.tensors for job in jobs if job.client == client)
        for kind in ("A/", "B/", "head/"):
            moved, expected = (
                torch.cat([(f.tensors[name] - start[name]).flatten() for name in start if name.startswith(kind)])
                for f in (fitted, theirs[client])
            )
            assert float((moved - expected).norm()) < 0.1 * float(expected.norm())
        # Master weights hold more than bfloat16 can say.
        assert any(not torch.equal(t, t.bfloat16().float()) for n, t in fitted.tensors.items() if n.startswith("A/"))
