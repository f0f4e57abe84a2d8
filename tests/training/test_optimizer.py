"""The row optimisers against ``torch.optim``, client by client; clipping and schedules against torch and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from folklora.sections import TrainSection
from folklora.training.optimizer import build, clip_rows, schedule

CPU = torch.device("cpu")
WIDTHS = (5, 1, 6)
K, P = 3, sum(WIDTHS)

OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
    "adamw": ({"optimizer": "adamw"}, lambda p: torch.optim.AdamW(p, weight_decay=0.0)),
    "adamw, decay": ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, weight_decay=0.1)),
    "sgd": ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p)),
    "sgd, momentum": ({"optimizer": "sgd", "momentum": 0.9}, lambda p: torch.optim.SGD(p, momentum=0.9)),
    "sgd, momentum, decay": (
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1),
    ),
}


def gradients(step: int) -> Tensor:
    """Of very different sizes: from 1e-11, where eps matters, to 1."""
    g = torch.Generator().manual_seed(step)
    return torch.randn(K, P, generator=g) * 10.0 ** torch.arange(1 - P, 1).float()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_row_moves_as_torch_moves_it_alone(name: str) -> None:
    settings, make = OPTIMIZERS[name]
    start = torch.randn(K, P, generator=torch.Generator().manual_seed(99))
    values = start.clone()
    optimizer = build(TrainSection(**settings), K, WIDTHS, CPU)
    alone = [nn.Parameter(row.clone()) for row in start]
    theirs = [make([row]) for row in alone]
    for step in range(30):
        grads = gradients(step)
        lr = torch.tensor([1e-2, 1e-3 * (step + 1), 0.5 / (step + 1)])  # each client's own schedule
        optimizer.step(values, grads.clone(), lr)
        for k, (row, their) in enumerate(zip(alone, theirs, strict=True)):
            their.param_groups[0]["lr"] = float(lr[k])
            row.grad = grads[k].clone()
            their.step()
        torch.testing.assert_close(values, torch.stack([row.detach() for row in alone]), rtol=2e-6, atol=1e-7)
    assert optimizer.steps.unique().tolist() == [30.0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tensors_have_rates_as_parameter_groups_have(name: str) -> None:
    settings, make = OPTIMIZERS[name]
    rates = [1.0, 0.1, 30.0][: len(WIDTHS)]
    start = torch.randn(K, P, generator=torch.Generator().manual_seed(99))
    values = start.clone()
    optimizer = build(TrainSection(**settings), K, WIDTHS, CPU, rates)
    alone = [[nn.Parameter(part.clone()) for part in row.split(WIDTHS)] for row in start]
    theirs = [[make([part]) for part in parts] for parts in alone]
    for step in range(10):
        grads, lr = gradients(step), torch.tensor([1e-2, 1e-3 * (step + 1), 0.1 / (step + 1)])
        optimizer.step(values, grads.clone(), lr)
        for k, parts in enumerate(alone):
            for part, grad, rate, their in zip(parts, grads[k].split(WIDTHS), rates, theirs[k], strict=True):
                their.param_groups[0]["lr"] = float(lr[k]) * rate
                part.grad = grad.clone()
                their.step()
        expected = torch.stack([torch.cat([part.detach() for part in parts]) for parts in alone])
        torch.testing.assert_close(values, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "sgd, momentum"])
def test_rows_that_started_earlier_are_further(name: str) -> None:
    """A refilled slot: row 1 starts afresh after ten steps, the others go on."""
    settings, make = OPTIMIZERS[name]
    values = torch.zeros(K, P)
    optimizer = build(TrainSection(**settings), K, WIDTHS, CPU)
    alone = [nn.Parameter(torch.zeros(P)) for _ in range(K)]
    theirs = [make([row]) for row in alone]
    for step in range(20):
        if step == 10:
            values[1] = 0
            optimizer.steps[1] = 0
            for moment in optimizer.moments.values():
                moment[1] = 0
            alone[1] = nn.Parameter(torch.zeros(P))
            theirs[1] = make([alone[1]])
        optimizer.step(values, gradients(step), torch.full((K,), 1e-2))
        for k in range(K):
            theirs[k].param_groups[0]["lr"] = 1e-2
            alone[k].grad = gradients(step)[k]
            theirs[k].step()
    torch.testing.assert_close(values, torch.stack([row.detach() for row in alone]), rtol=2e-6, atol=1e-7)


def test_tensors_that_started_earlier_are_further() -> None:
    """A method that alternates what it trains: each tensor has its own count, as each parameter has in torch."""
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(2, 4, generator=g) for _ in range(6)]
    alone = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    theirs = torch.optim.AdamW(alone, lr=1e-2, weight_decay=0.0)
    for grad in grads[:4]:
        alone[0].grad = grad[0, :2].clone()
        theirs.step()  # the second rests: torch skips it
    values = torch.zeros(1, 4)
    values[0, :2] = alone[0].detach()
    optimizer = build(TrainSection(), 1, (2, 2), CPU)
    optimizer.steps[0] = torch.tensor([4.0, 0.0])
    state = theirs.state[alone[0]]
    optimizer.moments["m"][0, :2], optimizer.moments["v"][0, :2] = state["exp_avg"], state["exp_avg_sq"]
    for grad in grads[4:]:
        optimizer.step(values, grad[:1], torch.tensor([1e-2]))
        alone[0].grad, alone[1].grad = grad[0, :2].clone(), grad[0, 2:].clone()
        theirs.step()
    torch.testing.assert_close(values[0], torch.cat([p.detach() for p in alone]), rtol=2e-6, atol=1e-8)


def test_numbers_that_never_get_a_gradient_stay_zero() -> None:
    """Padding to the common rank relies on it."""
    for settings, _ in OPTIMIZERS.values():
        values, grads = torch.zeros(K, P), gradients(0)
        grads[:, 3:7] = 0
        optimizer = build(TrainSection(**settings), K, WIDTHS, CPU)
        for _ in range(3):
            optimizer.step(values, grads, torch.full((K,), 1e-2))
        assert not values[:, 3:7].any()
        assert values[:, :3].all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_that_is_not_finite_harms_no_other(name: str) -> None:
    settings, _ = OPTIMIZERS[name]
    train = TrainSection(**settings)
    runs = []
    for poison in (False, True):
        values = torch.ones(K, P)
        optimizer = build(train, K, WIDTHS, CPU)
        for step in range(5):
            grads = gradients(step)
            if poison:
                grads[1, step] = (torch.nan, torch.inf)[step % 2]
            clip_rows(grads, 1.0)
            optimizer.step(values, grads, torch.full((K,), 1e-2))
        runs.append(values)
    assert torch.equal(runs[0][[0, 2]], runs[1][[0, 2]])
    assert not runs[1][1].isfinite().all()


@pytest.mark.parametrize("limit", [0.1, 1.0, 50.0])
def test_clipping_is_torchs(limit: float) -> None:
    grads = torch.randn(5, P, generator=torch.Generator().manual_seed(0))
    grads *= torch.tensor([0.0, 1e-8, 1e-2, 1.0, 1e3])[:, None]
    expected = []
    for row in grads:
        parameters = [nn.Parameter(torch.zeros(width)) for width in WIDTHS]
        for parameter, piece in zip(parameters, row.split(list(WIDTHS)), strict=True):
            parameter.grad = piece.clone()
        torch.nn.utils.clip_grad_norm_(parameters, limit)
        expected.append(torch.cat([p.grad for p in parameters if p.grad is not None]))
    clipped = grads.clone()
    clip_rows(clipped, limit)
    torch.testing.assert_close(clipped, torch.stack(expected), rtol=1e-6, atol=1e-12)
    assert float(clipped.norm(dim=1).max()) <= limit * (1 + 1e-6)


TOTAL = 40


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_are_transformers_own_started_one_step_in(kind: str) -> None:
    """Theirs starts at rate 0, and nothing moves in the first step: ours is theirs, one step ahead while warming up."""
    import transformers as hf

    parameter = nn.Parameter(torch.zeros(1))
    for warmup in (0.0, 0.25):
        train = TrainSection(warmup=warmup, schedule=kind)
        steps = round(warmup * TOTAL)
        make = {
            "constant": lambda o, n: hf.get_constant_schedule_with_warmup(o, n),
            "linear": lambda o, n: hf.get_linear_schedule_with_warmup(o, n, TOTAL),
            "cosine": lambda o, n: hf.get_cosine_schedule_with_warmup(o, n, TOTAL),
        }[kind]
        scheduler = make(torch.optim.SGD([parameter], lr=1.0), steps)
        theirs = [scheduler.lr_lambdas[0](step) for step in range(TOTAL + 1)]
        ours = [schedule(train, step, TOTAL) for step in range(TOTAL)]
        assert ours[:steps] == pytest.approx(theirs[1 : steps + 1])
        assert ours[steps:] == pytest.approx(theirs[steps:TOTAL])
        assert all(0 < rate <= 1 for rate in ours)


def test_schedules_by_hand() -> None:
    linear = TrainSection(warmup=0.5, schedule="linear")
    assert [schedule(linear, step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = TrainSection(schedule="cosine")
    assert schedule(cosine, 3, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_that_is_over_stays_over(kind: str) -> None:
    """Not negative, and not up the cosine again."""
    train = TrainSection(schedule=kind)
    assert [schedule(train, step, 10) for step in (10, 11, 15, 1000)] == [0.0] * 4


def test_a_warm_up_that_lasts_the_whole_run() -> None:
    train = TrainSection(warmup=0.99, schedule="cosine")
    assert [schedule(train, step, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
