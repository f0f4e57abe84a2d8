"""AdamW and SGD for K clients at once: one row of a [K, P] matrix is one client.

Each row has its own step counts, learning rate and gradient norm, so it moves exactly as a torch optimiser would move
that client alone (tested against ``torch.optim``). Tensors may have rates of their own, as torch's parameter groups
have: multiples of the row's learning rate. Steps are counted per tensor (a range of columns), because a method
may train other tensors in every other round and keep the optimiser's state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from folklora.sections import TrainSection


class RowOptimizer(Protocol):
    """Moves rows of parameters; ``moments`` are its state, [K, P] each, and ``steps`` [K, tensors]."""

    moments: dict[str, Tensor]
    steps: Tensor

    def step(self, values: Tensor, grads: Tensor, lr: Tensor) -> None: ...


class AdamW:
    """Decoupled weight decay, arXiv 1711.05101; betas 0.9, 0.999, eps 1e-8 as in torch."""

    def __init__(
        self, rows: int, widths: Sequence[int], weight_decay: float, device: torch.device, rates: Tensor
    ) -> None:
        self.moments = {name: torch.zeros(rows, sum(widths), device=device) for name in ("m", "v")}
        self.steps = torch.zeros(rows, len(widths), dtype=torch.float64, device=device)
        self.widths = torch.tensor(widths, device=device)
        self.rates = rates
        self.weight_decay = weight_decay

    def step(self, values: Tensor, grads: Tensor, lr: Tensor) -> None:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        m, v = self.moments["m"], self.moments["v"]
        self.steps += 1
        rate = lr[:, None] * self.rates  # [K, tensors]
        if self.weight_decay:
            values.mul_(columns(1 - rate * self.weight_decay, self.widths))
        size = columns((rate.double() / (1 - beta1**self.steps)).float(), self.widths)
        root = columns(torch.sqrt(1 - beta2**self.steps).float(), self.widths)
        for rows in _chunks(values):
            g, m_, v_ = grads[rows], m[rows], v[rows]
            m_.lerp_(g, 1 - beta1)
            v_.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = v_.sqrt().div_(root[rows]).add_(eps)
            values[rows].sub_((m_ * size[rows]).div_(denominator))


def columns(each: Tensor, widths: Tensor) -> Tensor:
    """One number a tensor, [K, tensors] -> one number a column: [K, P], or [K, 1] where a row has one."""
    if torch.equal(each, each[:, :1].expand_as(each)):
        return each[:, :1]
    return each.repeat_interleave(widths, dim=1)


def _chunks(values: Tensor) -> Iterator[slice]:
    """Rows a few at a time: on a CPU a dozen passes over what stays in its cache cost a third of passes over it all."""
    at_once = max(1, 2**17 // values.shape[1]) if values.device.type == "cpu" else len(values)
    return (slice(start, start + at_once) for start in range(0, len(values), at_once))


class SGD:
    """SGD with (heavy-ball) momentum and L2 weight decay, as ``torch.optim.SGD``."""

    def __init__(
        self,
        rows: int,
        widths: Sequence[int],
        momentum: float,
        weight_decay: float,
        device: torch.device,
        rates: Tensor,
    ) -> None:
        self.widths = torch.tensor(widths, device=device)
        self.rates = rates
        self.moments = {"m": torch.zeros(rows, sum(widths), device=device)} if momentum else {}
        self.steps = torch.zeros(rows, len(widths), dtype=torch.float64, device=device)
        self.momentum = momentum
        self.weight_decay = weight_decay

    def step(self, values: Tensor, grads: Tensor, lr: Tensor) -> None:
        self.steps += 1
        if self.weight_decay:
            grads = grads + self.weight_decay * values
        if self.momentum:
            grads = self.moments["m"].mul_(self.momentum).add_(grads)
        values.sub_(columns(lr[:, None] * self.rates, self.widths) * grads)


def build(
    train: TrainSection,
    rows: int,
    widths: Sequence[int],
    device: torch.device,
    rates: Sequence[float] | None = None,
) -> RowOptimizer:
    """The recipe's optimiser for ``rows`` clients, each with trained tensors of ``widths`` numbers.

    ``rates`` multiply the learning rate of each tensor; by default all are 1.
    """
    each = torch.tensor(rates or [1.0] * len(widths), device=device)
    if train.optimizer == "sgd":
        return SGD(rows, widths, train.momentum, train.weight_decay, device, each)
    return AdamW(rows, widths, train.weight_decay, device, each)


def clip_rows(grads: Tensor, limit: float) -> None:
    """Scale each row to norm ``limit`` if it is longer, as ``torch.nn.utils.clip_grad_norm_`` does for one client."""
    norms = torch.linalg.vector_norm(grads, dim=1)
    grads.mul_((limit / (norms + 1e-6)).clamp_(max=1.0)[:, None])


def schedule(train: TrainSection, step: int, total: int) -> float:
    """The learning-rate multiplier at ``step`` (from 0) of the client's ``total`` steps in the whole run."""
    warmup = round(train.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    match train.schedule:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return 1.0
