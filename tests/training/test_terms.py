"""What bends gradient steps, in a cohort: against each client alone, with torch.optim and the terms written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from folklora.adapters.lowrank import Tensors
from folklora.methods.work import Terms
from folklora.sections import TrainSection
from folklora.training.cohort import CohortTrainer, _Cohort
from folklora.training.jobs import Fitted, Job, Slot
from folklora.training.stacks import plug

SEED = 5  # as in conftest
SIZES = (23, 9, 40, 3, 17, 8, 30, 1)
RANKS = (3, 1, 8, 4, 2, 5, 3, 2)
KINDS = ("proximal", "correction", "masks", "rate", "importance")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "lr": 5e-3, "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
}


# -- the reference ---------------------------------------------------------------------------------------------------


def loss_of(place: Any, job: Job, tensors: Tensors, picks: np.ndarray) -> Tensor:
    """One client's mean loss on a padded batch of its own."""
    batch = place.task.backbone.batch([[job.examples[i] for i in picks]], "never")
    stacks = {name: (tensor.T if name.startswith("B/") else tensor)[None] for name, tensor in tensors.items()}
    scale = torch.tensor([place.adapter.alpha / job.rank])
    hidden = place.task.backbone.hidden(batch, plug(place.adapter, stacks, scale, batch, torch.device("cpu")))
    features = place.task.pool(hidden, batch)
    logits = features @ tensors["head/weight"].T + tensors["head/bias"]
    return nn.functional.cross_entropy(logits, torch.from_numpy(job.labels[picks]))


class Alone:
    """One client and one torch optimiser, through as many rounds as there are jobs."""

    def __init__(self, place: Any, jobs: Sequence[Job], train: TrainSection) -> None:
        first = jobs[0]
        own = {name: nn.Parameter(first.tensors[name].clone()) for name in sorted(first.trained)}
        if train.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(own.values(), weight_decay=train.weight_decay)
        else:
            optimizer = torch.optim.SGD(own.values(), momentum=train.momentum, weight_decay=train.weight_decay)
        self.importance: Tensors = {}
        for job in jobs:
            mean, spread = ({name: torch.zeros_like(p) for name, p in own.items()} for _ in range(2))
            for picks in Slot(job, train, SEED).batches:
                optimizer.zero_grad()
                loss_of(place, job, {**job.tensors, **own}, picks).backward()
                for name, p in own.items():
                    assert p.grad is not None
                    now = (p * p.grad).detach().abs()
                    mean[name] = 0.85 * mean[name] + 0.15 * now
                    spread[name] = 0.85 * spread[name] + 0.15 * (now - mean[name]).abs()
                self.step(own, optimizer, job.terms, train)
            self.importance = {name: mean[name] * spread[name] for name in own}
        self.tensors = {**jobs[-1].tensors, **{name: p.detach() for name, p in own.items()}}

    @staticmethod
    @torch.no_grad()
    def step(own: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, terms: Terms, train: TrainSection) -> None:
        rests = {name: mask == 0 for name, mask in terms.masks.items()}
        for name, at_rest in rests.items():
            own[name].grad[at_rest] = 0  # type: ignore[index]
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(own.values(), train.clip)
        for name, p in own.items():
            assert p.grad is not None
            if name in terms.anchor:
                p.grad += terms.proximal * (p - terms.anchor[name])
            if name in terms.correction:
                p.grad += terms.correction[name]
            if name in rests:
                p.grad[rests[name]] = 0
        before = {name: p.clone() for name, p in own.items()}
        optimizer.param_groups[0]["lr"] = train.lr * terms.rate
        optimizer.step()
        for name, at_rest in rests.items():
            own[name][at_rest] = before[name][at_rest]


def terms_for(job: Job, kinds: Sequence[str], seed: int) -> Terms:
    """Made-up terms; some tensors are left out of each."""
    g = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(job.tensors[name].shape, generator=g) for name in sorted(job.trained)}
    named = lambda *prefixes: [name for name in noise if name.startswith(prefixes)]
    return Terms(
        masks={name: (noise[name] > 0.3).float() for name in named("A/", "B/", "head/weight")}
        if "masks" in kinds
        else {},
        anchor={name: job.tensors[name] + 0.1 * noise[name] for name in named("B/", "head/")}
        if "proximal" in kinds
        else {},
        proximal=0.7 if "proximal" in kinds else 0.0,
        correction={name: 0.02 * noise[name] for name in named("A/", "C/", "head/bias")}
        if "correction" in kinds
        else {},
        importance="importance" in kinds,
        rate=0.3 if "rate" in kinds else 1.0,
    )


def jobs_with(place: Any, kinds: Sequence[str]) -> list[Job]:
    """Every third client has no terms at all."""
    jobs = place.jobs(SIZES, RANKS)
    return [job if k % 3 == 2 else replace(job, terms=terms_for(job, kinds, k)) for k, job in enumerate(jobs)]


def distance(ours: Tensors, theirs: Tensors) -> float:
    """The largest relative difference, in norm, over kinds of tensors."""
    assert set(ours) == set(theirs)
    worst = 0.0
    for kind in {name.partition("/")[0] for name in ours}:
        names = [name for name in sorted(ours) if name.partition("/")[0] == kind]
        mine, other = (torch.cat([t[name].double().flatten() for name in names]) for t in (ours, theirs))
        assert mine.shape == other.shape
        worst = max(worst, float((mine - other).norm() / other.norm().clamp(min=1e-30)))
    return worst


def by_client(fitted: dict[str, Fitted]) -> dict[str, Tensors]:
    return {client: found.tensors for client, found in fitted.items()}


# -- every term, in any company ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(world: Callable[..., Any]) -> Callable[[str, str], dict[str, Alone]]:
    @cache
    def make(kinds: str, optimizer: str) -> dict[str, Alone]:
        place = world("bert", core=True)
        train = TrainSection(batch_size=8, **OPTIMIZERS[optimizer])
        return {job.client: Alone(place, [job], train) for job in jobs_with(place, kinds.split())}

    return make


@pytest.mark.parametrize("cohort", [1, 3, 8])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kinds", ["proximal", "masks", " ".join(KINDS)])
def test_a_cohort_bends_each_clients_steps_as_its_own_terms_say(
    world: Callable[..., Any],
    reference: Callable[[str, str], dict[str, Alone]],
    kinds: str,
    optimizer: str,
    cohort: int,
) -> None:
    """Slots are refilled by clients with other terms, and close in the middle."""
    place = world("bert", core=True)
    jobs = jobs_with(place, kinds.split())
    fitted = place.fit(jobs, cohort=cohort, **OPTIMIZERS[optimizer])
    assert set(fitted) == {job.client for job in jobs}
    for job in jobs:
        found, alone = fitted[job.client], reference(kinds, optimizer)[job.client]
        assert distance(found.tensors, alone.tensors) < 1e-5
        assert found.travelled == pytest.approx(OPTIMIZERS[optimizer]["lr"] * job.terms.rate * found.steps)
        if job.terms.importance:
            assert distance(found.importance, alone.importance) < 1e-4
            assert {name: t.shape for name, t in found.importance.items()} == {
                name: job.tensors[name].shape for name in job.trained
            }
        else:
            assert not found.importance


def test_terms_change_something(world: Callable[..., Any]) -> None:
    """Each of them by itself, where it is asked for and nowhere else."""
    place = world("bert", core=True)
    plain = by_client(place.fit(jobs_with(place, ()), cohort=3))
    for kind in KINDS:
        jobs = jobs_with(place, [kind])
        bent = by_client(place.fit(jobs, cohort=3))
        for job in jobs:
            moved = distance(bent[job.client], plain[job.client])
            if job.terms == Terms() or kind == "importance":  # which only looks
                assert moved < 1e-6
            else:
                assert moved > 1e-4, kind


def test_without_terms_there_are_no_matrices(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    place = world("bert")
    seen: list[list[str]] = []
    step = _Cohort.step

    def watched(self: _Cohort) -> None:
        seen.append([name for name, value in vars(self.terms).items() if value is not None])
        step(self)

    monkeypatch.setattr(_Cohort, "step", watched)
    place.fit(place.jobs((9, 3), (2, 2)))
    assert seen
    assert not any(seen)
    seen.clear()
    place.fit([replace(job, terms=terms_for(job, ["correction"], 0)) for job in place.jobs((9, 3), (2, 2))])
    assert all(names == ["correction"] for names in seen)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cohort", [1, 3])
def test_what_is_masked_rests_whatever_pulls_at_it(world: Callable[..., Any], optimizer: str, cohort: int) -> None:
    """Weight decay, momentum kept from a round in which it moved, an anchor and a correction: not one bit changes."""
    place = world("bert", core=True)
    settings = {**OPTIMIZERS[optimizer], "cohort": cohort, "optimizer_state": "kept", "rounds": 2}
    jobs = place.jobs(SIZES[:5], RANKS[:5])
    train = TrainSection(batch_size=8, **settings)
    first = place.fit(jobs, **settings)
    second = [
        replace(
            job,
            round=2,
            tensors=first[job.client].tensors,
            moments=first[job.client].moments,
            terms=terms_for(job, ("masks", "proximal", "correction"), k) if k != 3 else Terms(),
        )
        for k, job in enumerate(jobs)
    ]
    fitted = place.fit(second, **settings)
    for job, later in zip(jobs, second, strict=True):
        found = fitted[job.client].tensors
        for name in job.trained:
            mask = later.terms.masks.get(name, torch.ones_like(found[name]))
            still = found[name] == later.tensors[name]
            assert bool(still[mask == 0].all()), name
            assert not bool(still[mask == 1].any()), name
        # The others move as if one optimiser had seen both rounds, and zeros where they rest.
        assert distance(found, Alone(place, [job, later], train).tensors) < 1e-5


def test_a_mask_of_zeros_is_a_client_that_does_not_train(world: Callable[..., Any]) -> None:
    place = world("bert")
    jobs = place.jobs((20, 9), (3, 2))
    masks = {name: torch.zeros_like(jobs[0].tensors[name]) for name in jobs[0].trained}
    jobs[0] = replace(jobs[0], terms=Terms(masks=masks))
    fitted = place.fit(jobs, weight_decay=0.5)
    assert all(torch.equal(tensor, fitted["client-0"].tensors[name]) for name, tensor in jobs[0].tensors.items())


def test_what_rests_does_not_use_up_the_clipping_limit(world: Callable[..., Any]) -> None:
    """The head's gradient is by far the largest; with it at rest, the others get all of the limit."""
    place = world("bert")
    (job,) = place.jobs((8,), (3,))
    masks = {name: torch.zeros_like(job.tensors[name]) for name in ("head/weight", "head/bias")}
    limit = 1e-3
    fitted = place.fit([replace(job, terms=Terms(masks=masks))], optimizer="sgd", lr=1.0, clip=limit)
    moved = torch.cat([(fitted[job.client].tensors[name] - job.tensors[name]).flatten() for name in job.trained])
    assert float(moved.norm()) == pytest.approx(limit, rel=1e-3)


# -- pull and correction ---------------------------------------------------------------------------------------------


def test_the_clipping_limit_is_for_the_datas_gradient_alone(world: Callable[..., Any]) -> None:
    """With next to no data gradient, a pull of 1 / lr ends at the anchor, and a correction c moves by -lr c a step."""
    place = world("bert")
    one, two = place.jobs((20, 20), (3, 5))
    g = torch.Generator().manual_seed(0)
    anchor = {name: one.tensors[name] + torch.randn(one.tensors[name].shape, generator=g) for name in one.trained}
    push = {name: torch.randn(two.tensors[name].shape, generator=g) for name in two.trained}
    jobs = [
        replace(one, terms=Terms(anchor=anchor, proximal=10.0)),
        replace(two, terms=Terms(correction=push)),
    ]
    fitted = place.fit(jobs, optimizer="sgd", lr=0.1, clip=1e-9)
    ended, pushed = fitted[one.client], fitted[two.client]
    for name, tensor in anchor.items():
        torch.testing.assert_close(ended.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    for name, tensor in push.items():
        wanted = two.tensors[name] - pushed.travelled * tensor
        torch.testing.assert_close(pushed.tensors[name], wanted, rtol=1e-4, atol=1e-5)
    assert pushed.travelled == pytest.approx(0.1 * 3)


def test_travelled_is_the_sum_of_the_learning_rates(world: Callable[..., Any]) -> None:
    """SCAFFOLD divides by it, whatever the schedule: (start - end) / travelled is then the mean gradient."""
    place = world("bert")
    jobs = [
        replace(job, round=2, terms=Terms(rate=rate))
        for job, rate in zip(place.jobs((40, 21, 7), (2, 2, 2)), (1.0, 0.25, 3.0), strict=True)
    ]
    settings = {"rounds": 3, "local_epochs": 2, "lr": 0.02, "warmup": 0.5, "schedule": "linear", "cohort": 2}
    fitted = place.fit(jobs, **settings)
    for job in jobs:
        per_round = 2 * -(-len(job.examples) // 8)
        warmup, total = round(0.5 * 3 * per_round), 3 * per_round
        rates = [
            (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (total - warmup)
            for step in range(per_round, 2 * per_round)
        ]
        assert fitted[job.client].steps == per_round
        assert fitted[job.client].travelled == pytest.approx(0.02 * job.terms.rate * sum(rates))


# -- branches --------------------------------------------------------------------------------------------------------


def test_branches_of_a_client_see_the_same_minibatches_and_keep_apart(world: Callable[..., Any]) -> None:
    """A common and a personal model (Ditto): the second is pulled to the first one's start."""
    place = world("bert", dropout=0.2)
    jobs: list[Job] = []
    for k, job in enumerate(place.jobs((20, 9, 33), (3, 5, 2))):
        jobs.append(job)
        jobs.append(replace(job, branch="twin"))
        pulled = Terms(anchor={name: job.tensors[name] for name in job.trained}, proximal=2.0)
        jobs.append(replace(job, branch="personal", tensors=place.tensors(job.rank, 50 + k), terms=pulled))
    results: dict[int, dict[tuple[str, str], Fitted]] = {}
    for cohort in (1, 4, 9):
        trainer = CohortTrainer(place.task, place.adapter, TrainSection(batch_size=8, lr=5e-3, cohort=cohort), SEED)
        results[cohort] = {(fitted.client, fitted.branch): fitted for fitted in trainer.fit(jobs)}
        assert len(results[cohort]) == 9
    for (client, branch), fitted in results[1].items():
        for cohort in (4, 9):
            other = results[cohort][client, branch]
            assert distance(other.tensors, fitted.tensors) < 1e-5
            assert other.loss == pytest.approx(fitted.loss, rel=1e-5)
        twin = results[1][client, "twin"]
        assert (distance(fitted.tensors, twin.tensors) < 1e-6) == (branch != "personal")


# -- trouble -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_client_that_is_not_finite_harms_nobody_through_its_terms(world: Callable[..., Any], optimizer: str) -> None:
    place = world("bert", core=True)
    settings = {**OPTIMIZERS[optimizer], "cohort": 3}
    jobs = jobs_with(place, KINDS)
    healthy = place.fit(jobs, **settings)
    sick = [
        replace(job, tensors={name: tensor * float("nan") for name, tensor in job.tensors.items()})
        if k in (0, 2)
        else job
        for k, job in enumerate(jobs)
    ]
    found = place.fit(sick, **settings)
    for k, job in enumerate(jobs):
        if k not in (0, 2):
            assert distance(found[job.client].tensors, healthy[job.client].tensors) < 1e-5
            assert all(torch.isfinite(tensor).all() for tensor in found[job.client].importance.values())
        else:
            assert not np.isfinite(found[job.client].loss)
