"""Chains against densities whose moments are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.data.augmentation.metropolis import metropolis_hastings


def run(log_density, start: Tensor, steps: int, tau: float, eta: float, seed: int = 0) -> Tensor:
    return metropolis_hastings(log_density, start, steps, tau, eta, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tau", "eta"), [(0.5, 0.5**0.5), (0.5, 1.0), (0.05, 0.6)])
def test_a_correlated_gaussian_is_reached_whatever_the_step(tau: float, eta: float) -> None:
    """Drift and noise that do not belong together are set right by the ratio of proposals, and by nothing else."""
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    sigma = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    precision = torch.linalg.inv(sigma)

    def log_density(z: Tensor) -> Tensor:
        return -((z - mean) @ precision * (z - mean)).sum(1) / 2

    chains = 8000
    z = run(log_density, torch.zeros(chains, 2, dtype=torch.float64), 300, tau, eta).numpy()
    np.testing.assert_allclose(z.mean(0), mean.numpy(), atol=5 / chains**0.5)
    np.testing.assert_allclose(np.cov(z.T), sigma.numpy(), atol=5 * (2 / chains) ** 0.5)


def test_two_modes_keep_their_shares() -> None:
    """A mixture, a third and two thirds: chains that start in it as it is stay as it is."""

    def log_density(z: Tensor) -> Tensor:
        one, other = -(z[:, 0] + 2).square() / 2 - np.log(3), -(z[:, 0] - 2).square() / 2 + np.log(2 / 3)
        return torch.logaddexp(one, other)

    chains = 6000
    random = torch.Generator().manual_seed(1)
    side = torch.where(torch.rand(chains, 1, generator=random) < 1 / 3, -2.0, 2.0)
    start = (side + torch.randn(chains, 1, generator=random)).double()
    z = run(log_density, start, 200, 0.8, 1.2)
    assert abs(float((z < 0).double().mean()) - float((start < 0).double().mean())) < 0.03
    within = z[z > 0]  # a standard Gaussian around 2, cut at 0
    assert abs(float(within.mean()) - 2.055) < 0.06


def test_the_same_seed_is_the_same_chain() -> None:
    def log_density(z: Tensor) -> Tensor:
        return -z.square().sum(1) / 2

    start = torch.ones(5, 3)
    assert torch.equal(run(log_density, start, 20, 0.1, 0.3), run(log_density, start, 20, 0.1, 0.3))
    assert torch.equal(start, torch.ones(5, 3))


def test_a_chain_never_enters_where_the_density_is_none() -> None:
    def log_density(z: Tensor) -> Tensor:
        return torch.where(z[:, 0] < 0, -torch.inf, -z[:, 0])

    z = run(log_density, torch.ones(500, 1), 100, 0.01, 0.5)
    assert float(z.min()) >= 0
