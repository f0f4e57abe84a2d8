"""Metropolis-adjusted Langevin steps: draws from a density that is known up to a factor, by its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]
"""[n, d] -> [n], differentiable; each row's depends on that row alone."""


def metropolis_hastings(
    log_density: LogDensity, start: Tensor, steps: int, tau: float, eta: float, generator: torch.Generator
) -> Tensor:
    """n chains side by side: where each is after so many steps.

    A step proposes ``z' = z + tau/2 grad log p(z) + eta eps`` [arXiv 2411.16567, by its relatives' code] and takes it
    with probability ``min(1, p(z') q(z | z') / (p(z) q(z' | z)))``. The relatives leave the ratio of proposals q out,
    and their chain then tends to another density; with it, it tends to p for any tau and eta [ours].

    Parameters
    ----------
    start
        [n, d].
    tau, eta
        Drift and noise of a proposal; with ``eta^2 = tau`` it is Langevin's, and most proposals are taken.
    """
    here, value, slope = start, *_with_gradient(log_density, start)
    for _ in range(steps):
        noise = torch.randn(here.shape, generator=generator, dtype=here.dtype)
        there = here + tau / 2 * slope + eta * noise
        value_there, slope_there = _with_gradient(log_density, there)
        forth = noise.square().sum(1) / 2
        back = (here - there - tau / 2 * slope_there).square().sum(1) / (2 * eta**2)
        odds = value_there - value + forth - back
        taken = torch.rand(len(here), generator=generator, dtype=here.dtype).log() < odds
        here = torch.where(taken[:, None], there, here)
        value = torch.where(taken, value_there, value)
        slope = torch.where(taken[:, None], slope_there, slope)
    return here


def _with_gradient(log_density: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = log_density(z)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient
