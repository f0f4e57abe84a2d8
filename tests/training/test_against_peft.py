"""The cohort against stock PEFT: every client trained alone, by the tools everybody else uses.

LoRA is ``peft.get_peft_model`` on a fresh copy of the backbone; tri-LoRA, which PEFT lacks, is a linear layer that
computes ``W0 x + s B C A x`` as it is written. Both train with ``torch.optim`` on padded batches, know nothing of
stacks, and are given the same starting values and the same minibatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from folklora.adapters.lowrank import Tensors
from folklora.sections import TrainSection
from folklora.training.cohort import _Cohort
from folklora.training.jobs import Fitted, Job, Slot
from folklora.training.stacks import from_stack

SEED = 5  # as in conftest
SIZES = (40, 33, 7, 21, 5, 38, 16, 1)  # with batches of 8 and 4 epochs: 20, 20, 4, 12, 4, 20, 8 and 4 steps
RANKS = (2, 5, 3, 8, 1, 4, 5, 2)
EPOCHS, BATCH = 4, 8
TOLERANCE = 1e-5

# What is trained by which optimiser, and whether rows are packed.
CASES: dict[str, dict[str, Any]] = {
    "bert packed lora adamw": {"architecture": "bert"},
    "bert padded lora adamw": {"architecture": "bert", "packed": "never"},
    "bert packed tri adamw norm": {"architecture": "bert", "core": True, "norm": True},
    "bert padded tri sgd": {
        "architecture": "bert",
        "core": True,
        "packed": "never",
        "train": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    },
    "bert packed tri from the start": {"architecture": "bert", "core": True, "start": "fresh"},
    "roberta packed lora norm schedule": {
        "architecture": "roberta",
        "norm": True,
        "train": {"weight_decay": 0.1, "warmup": 0.2, "schedule": "cosine"},
    },
    "bert packed lora head at its own rate": {
        "architecture": "bert",
        "train": {"head_lr": 1e-4, "weight_decay": 0.1, "schedule": "cosine"},
    },
    "distilbert packed tri no clip": {"architecture": "distilbert", "core": True, "train": {"clip": None}},
    "llama padded lora adamw": {"architecture": "llama"},
    # Not AdamW: part of GPT-2's norms has (all but) no gradient, whose rounding Adam blows up to steps of full size;
    # stock PEFT in float32 is then 1e-4 away from stock PEFT in float64.
    "gpt2 padded lora norm": {"architecture": "gpt2", "norm": True, "train": {"optimizer": "sgd", "lr": 0.1}},
    "gpt2 padded tri sgd": {"architecture": "gpt2", "core": True, "train": {"optimizer": "sgd", "lr": 0.1}},
}


@dataclass
class Trace:
    """What happened to one client: the loss of every step, the first (clipped) gradient, what it ended with."""

    losses: list[float] = field(default_factory=list)
    gradient: Tensors = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


# -- the reference ---------------------------------------------------------------------------------------------------


class TriLinear(nn.Module):
    """``W0 x + s B C A x``, on ``nn.Linear`` or GPT-2's ``Conv1D``."""

    def __init__(self, base: nn.Module, a: Tensor, c: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.c, self.b = nn.Parameter(a.clone()), nn.Parameter(c.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.scale * F.linear(F.linear(F.linear(x, self.a), self.c), self.b)


def stock_model(world: Any, job: Job) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the backbone with this client's adapter; and its trained parameters by our names."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    base = AutoModel.from_pretrained(world.folder, attn_implementation="eager").requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    for name in world.task.backbone.norms:
        for part in ("weight", "bias"):
            parameter = base.get_submodule(name).get_parameter(part)
            parameter.data.copy_(job.tensors[f"norm/{name}.{part}"])
            trained[f"norm/{name}.{part}"] = parameter
    names = [site.name for site in world.adapter.sites]
    if not world.adapter.core:
        config = LoraConfig(
            r=job.rank, lora_alpha=world.adapter.alpha, target_modules=names, fan_in_fan_out="gpt2" in str(world.folder)
        )
        model = get_peft_model(base, config)
        for name in names:
            layer = model.base_model.model.get_submodule(name)
            for factor in ("A", "B"):
                parameter = getattr(layer, f"lora_{factor}")["default"].weight
                parameter.data.copy_(job.tensors[f"{factor}/{name}"])
                trained[f"{factor}/{name}"] = parameter
    else:
        model = base
        for name in names:
            a, c, b = (job.tensors[f"{factor}/{name}"] for factor in "ACB")
            layer = TriLinear(base.get_submodule(name), a, c, b, world.adapter.alpha / job.rank)
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, layer)
            trained |= {f"A/{name}": layer.a, f"C/{name}": layer.c, f"B/{name}": layer.b}
    for parameter in trained.values():
        parameter.requires_grad_()
    return model.eval(), trained  # eval: the backbone's own dropout is never on


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    rows = [row[keep.bool()] for row, keep in zip(states, mask, strict=True)]
    return torch.stack([{"mean": row.mean(0), "cls": row[0], "last": row[-1]}[pooling] for row in rows])


def rate(train: TrainSection, step: int, total: int) -> float:
    """The published schedule: linear warm-up to lr in the first steps, then (here) half a cosine."""
    warmup = round(train.warmup * total)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def train_alone(world: Any, job: Job, train: TrainSection, kinds: tuple[str, ...] = ("A B C head norm",)) -> Trace:
    """Train through as many rounds as ``kinds`` names what trains in each, with one optimiser for all of them."""
    model, trained = stock_model(world, job)
    head = {name: nn.Parameter(job.tensors[name].clone()) for name in ("head/weight", "head/bias")}
    trained |= head
    parameters = list(trained.values())
    groups = [
        {"params": [p for name, p in trained.items() if name not in head], "times": 1.0},
        {"params": list(head.values()), "times": (train.head_lr or train.lr) / train.lr},
    ]
    if train.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=train.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=train.momentum, weight_decay=train.weight_decay)
    trace = Trace()
    per_round = EPOCHS * -(-len(job.examples) // BATCH)
    batches: list[np.ndarray] = []  # the order of examples is given; everything else is not
    for number in range(1, len(kinds) + 1):
        batches += Slot(replace(job, round=number), train, SEED).batches
    assert len(batches) == len(kinds) * per_round
    for step, picks in enumerate(batches):
        for name, parameter in trained.items():
            parameter.requires_grad_(name.partition("/")[0] in kinds[step // per_round].split())
        chosen = [list(job.examples[i]) for i in picks]
        longest = max(map(len, chosen))
        tokens = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in chosen])
        mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in chosen])
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        logits = F.linear(pooled(states, mask, world.task.pooling), head["head/weight"], head["head/bias"])
        loss = F.cross_entropy(logits, torch.from_numpy(job.labels[picks]))
        optimizer.zero_grad()
        loss.backward()
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip)
        if step == 0:
            trace.gradient = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * rate(train, step, train.rounds * per_round)
        optimizer.step()
        trace.losses.append(loss.item())
    trace.tensors = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return trace


# -- ours, watched ---------------------------------------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> dict[str, Trace]:
    """Filled while a cohort trains."""
    found: dict[str, Trace] = {}
    step = _Cohort.step

    def watched(self: _Cohort) -> None:
        before = [(slot, slot.loss, slot.seen) for slot in self.slots]
        step(self)
        for k, (slot, loss, seen) in enumerate(before):
            trace = found.setdefault(slot.job.client, Trace())
            trace.losses.append((slot.loss - loss) / (slot.seen - seen))
            if not trace.gradient:
                for name, columns in self.rows.columns.items():
                    gradient = self.rows.grads[k, columns].view(self.shapes[name])
                    trace.gradient[name] = from_stack(name, gradient, slot.job.rank)

    monkeypatch.setattr(_Cohort, "step", watched)
    return found


def distance(ours: Tensors, theirs: Tensors) -> float:
    """The largest relative difference, in norm, over kinds of tensors (A, B, C, head, norm)."""
    assert set(ours) == set(theirs)
    worst = 0.0
    for kind in {name.partition("/")[0] for name in ours}:
        names = [name for name in sorted(ours) if name.partition("/")[0] == kind]
        mine, other = (torch.cat([t[name].double().flatten() for name in names]) for t in (ours, theirs))
        if other.any():
            worst = max(worst, float((mine - other).norm() / other.norm()))
        else:
            assert not mine.any()
    return worst


@pytest.fixture(scope="module")
def reference(world: Callable[..., Any]) -> Callable[[str], dict[str, Trace]]:
    """Case -> client -> what stock tools do to it; trained once for every K."""

    @cache
    def make(name: str) -> dict[str, Trace]:
        case = CASES[name]
        place = world(case["architecture"], core=case.get("core", False), norm=case.get("norm", False))
        train = TrainSection(**settings(case))
        jobs = place.jobs(SIZES, RANKS, start=case.get("start", "moved"))
        return {job.client: train_alone(place, job, train) for job in jobs}

    return make


def settings(case: dict[str, Any]) -> dict[str, Any]:
    base = {"rounds": 1, "local_epochs": EPOCHS, "batch_size": BATCH, "lr": 5e-3, "packed": case.get("packed", "auto")}
    return {**base, **case.get("train", {})}


@pytest.mark.parametrize("cohort", [1, 3, 8])
@pytest.mark.parametrize("name", CASES)
def test_a_cohort_trains_each_client_as_stock_peft_trains_it_alone(
    world: Callable[..., Any],
    reference: Callable[[str], dict[str, Trace]],
    traces: dict[str, Trace],
    name: str,
    cohort: int,
) -> None:
    case = CASES[name]
    place = world(case["architecture"], core=case.get("core", False), norm=case.get("norm", False))
    jobs = place.jobs(SIZES, RANKS, start=case.get("start", "moved"))
    fitted: dict[str, Fitted] = place.fit(jobs, cohort=cohort, **settings(case))
    assert set(fitted) == {job.client for job in jobs}
    for job in jobs:
        ours, theirs, became = traces[job.client], reference(name)[job.client], fitted[job.client]
        steps = EPOCHS * -(-len(job.examples) // BATCH)
        assert became.steps == len(ours.losses) == len(theirs.losses) == steps
        assert ours.losses == pytest.approx(theirs.losses, rel=TOLERANCE)
        assert distance(ours.gradient, theirs.gradient) < TOLERANCE
        assert distance(became.tensors, theirs.tensors) < TOLERANCE
        # And they did learn something: the comparison is not of things that never moved.
        assert distance(job.tensors, became.tensors) > 1e-3


ALTERNATING = ("A head", "B head", "A head")


@pytest.mark.parametrize(
    ("kinds", "train"),
    [
        (("A B head",) * 3, {"weight_decay": 0.1, "warmup": 0.4, "schedule": "cosine"}),
        (("A B head",) * 3, {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}),
        (ALTERNATING, {"weight_decay": 0.1}),
    ],
    ids=["adamw", "sgd", "adamw, alternating"],
)
def test_kept_optimiser_state_is_one_optimiser_that_was_never_interrupted(
    world: Callable[..., Any], kinds: tuple[str, ...], train: dict[str, Any]
) -> None:
    """Also when what trains alternates: a parameter that rests keeps its moments and its step count, as in torch."""
    place = world("bert")
    section = {**settings({"train": train}), "rounds": 3, "optimizer_state": "kept"}
    first = place.jobs((40, 7, 21, 1), (2, 3, 8, 2), kinds=kinds[0])
    expected = {job.client: train_alone(place, job, TrainSection(**section), kinds).tensors for job in first}
    for cohort in (1, 3):
        jobs = first
        fitted = place.fit(jobs, cohort=cohort, **section)
        for number, trained in enumerate(kinds[1:], start=2):
            jobs = [next_round(job, fitted[job.client], number, trained) for job in jobs]
            fitted = place.fit(jobs, cohort=cohort, **section)
        for job in first:
            assert distance(fitted[job.client].tensors, expected[job.client]) < TOLERANCE


def next_round(job: Job, fitted: Fitted, number: int, kinds: str) -> Job:
    trained = frozenset(name for name in job.tensors if name.partition("/")[0] in kinds.split())
    return replace(job, round=number, tensors=fitted.tensors, moments=fitted.moments, trained=trained)


def test_fresh_optimiser_state_leaves_nothing_behind(world: Callable[..., Any]) -> None:
    place = world("bert")
    fitted = place.fit(place.jobs(SIZES[:2], RANKS[:2]), optimizer_state="fresh")
    assert all(not found.moments for found in fitted.values())
