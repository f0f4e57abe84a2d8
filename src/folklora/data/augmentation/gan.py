"""A conditional GAN in feature space, after MhERGAN. arXiv 2411.16567, by a review and its relatives' code.

1. A generator ``G(z, class)`` and an ensemble of discriminators, each of which sees a random subset of every batch of
  its own [relatives' code: 18 of them].
2. A point's score is the mean of the discriminators' outputs, weighted by their softmax; the generator raises the score
  of what it makes [review].
3. Features are drawn by Metropolis-Hastings in latent space, from ``p(z) ~ exp(score(G(z)) - ||z||^2 / 2)``
  (`folklora.data.augmentation.metropolis`).
4. The head is fitted to real and generated features by a multi-head loss (`folklora.methods.fitting`).

Ours [recon], so that it is stable with few shots: all happens in the leading principal components of the client's own
features, scaled to variance 1 on average (n examples span no more than n - 1 directions, and what lies outside of them
is noise); what the generator makes is added to the class's mean, without which it does not find its classes in as few
steps; discriminators see noise on real and generated points alike, the less the longer they train; small networks, Adam
with betas (0.5, 0.9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.data.augmentation.gaussian import Labelled
from folklora.data.augmentation.metropolis import metropolis_hastings


@dataclass(frozen=True)
class Settings:
    """Sizes and rates; the defaults are stable with 2 to 20 examples of each of 2 to 77 classes.

    Attributes
    ----------
    directions
        Principal components, at most.
    noise
        Standard deviation of what is added to points before discriminators see them, at first; in the end a quarter.
    chain, tau, eta
        Steps of a latent chain, and a step's drift and noise.
    """

    discriminators: int = 18
    directions: int = 32
    latent: int = 16
    width: int = 32
    steps: int = 150
    batch: int = 32
    rate: float = 1e-3
    noise: float = 0.6
    chain: int = 20
    tau: float = 0.01
    eta: float = 0.1


class Network:
    """Networks of one hidden layer side by side: [m, n, d_in] -> [m, n, d_out]."""

    def __init__(self, copies: int, sizes: tuple[int, int, int], generator: torch.Generator) -> None:
        self.parameters: list[Tensor] = []
        for rows, columns in ((sizes[0], sizes[1]), (sizes[1], sizes[2])):
            weight = torch.randn(copies, rows, columns, generator=generator) * rows**-0.5
            self.parameters += [weight.requires_grad_(), torch.zeros(copies, 1, columns).requires_grad_()]

    def __call__(self, x: Tensor) -> Tensor:
        first, bias, second, end = self.parameters
        hidden = F.leaky_relu(torch.baddbmm(bias, x, first), 0.2)
        return torch.baddbmm(end, hidden, second)


def adversarial(real: Labelled, count: int, generator: torch.Generator, settings: Settings | None = None) -> Labelled:
    """So many features of each class of a client, from a GAN that was trained on its examples.

    Parameters
    ----------
    real
        The client's examples; of fewer than three, or where all are the same, nothing is learnt and nothing drawn.
    """
    settings = settings or Settings()
    features, labels = real
    known, codes = torch.unique(labels, return_inverse=True)
    nothing = torch.zeros(0, features.shape[1]), torch.zeros(0, dtype=torch.int64)
    if len(features) < 3:
        return nothing
    centre = features.double().mean(0)
    _, spread, directions = torch.linalg.svd(features.double() - centre, full_matrices=False)
    kept = int((spread > 1e-6 * spread[0]).sum()) if spread[0] > 0 else 0
    if kept == 0:
        return nothing
    axes = directions[: min(kept, settings.directions)]
    points = (features.double() - centre) @ axes.T
    scale = points.square().mean().sqrt()
    gan = _GAN((points / scale).float(), codes, len(known), generator, settings)
    gan.train()
    asked = torch.arange(len(known)).repeat_interleave(count)
    made = gan.draw(asked).double() * scale @ axes + centre
    return made.float(), known[asked]


class _GAN:
    """Generator and discriminators over points [n, p] of ``classes`` classes."""

    def __init__(
        self, points: Tensor, codes: Tensor, classes: int, generator: torch.Generator, settings: Settings
    ) -> None:
        self.points, self.codes, self.classes = points, codes, classes
        self.random, self.settings = generator, settings
        p = points.shape[1]
        members = F.one_hot(codes, classes).float()
        self.means = members.T @ points / members.sum(0)[:, None]
        self.maker = Network(1, (settings.latent + classes, settings.width, p), generator)
        self.judges = Network(settings.discriminators, (p + classes, settings.width, 1), generator)

    def make(self, z: Tensor, codes: Tensor) -> Tensor:
        """[n, p] of latents [n, latent]."""
        return self.means[codes] + self.maker(torch.cat([z, F.one_hot(codes, self.classes).float()], 1)[None])[0]

    def outputs(self, points: Tensor, codes: Tensor) -> Tensor:
        """[m, n]: what each discriminator says of each point."""
        seen = torch.cat([points, F.one_hot(codes, self.classes).float()], 1)
        return self.judges(seen.expand(self.settings.discriminators, -1, -1))[..., 0]

    def score(self, points: Tensor, codes: Tensor) -> Tensor:
        """[n]: the discriminators' softmax-weighted mean."""
        outputs = self.outputs(points, codes)
        return (outputs.softmax(0) * outputs).sum(0)

    def train(self) -> None:
        s, n = self.settings, min(self.settings.batch, len(self.points))
        makers, judges = (
            torch.optim.Adam(network.parameters, lr=s.rate, betas=(0.5, 0.9), fused=True)
            for network in (self.maker, self.judges)
        )
        for step in range(s.steps):
            noise = s.noise * (1 - 0.75 * step / s.steps)
            picks = torch.randperm(len(self.points), generator=self.random)[:n]
            codes = self.codes[picks]
            made = self.make(self._normal(n, s.latent), codes)
            both = torch.cat([self.points[picks], made.detach()])
            outputs = self.outputs(both + noise * self._normal(*both.shape), torch.cat([codes, codes]))
            # Each discriminator's own half of the batch.
            own = (torch.rand(s.discriminators, n, generator=self.random) < 0.5).float()
            losses = F.softplus(torch.cat([-outputs[:, :n], outputs[:, n:]], 1))
            weights = torch.cat([own, own], 1)
            judges.zero_grad()
            ((losses * weights).sum(1) / weights.sum(1).clamp(min=1)).sum().backward()
            judges.step()
            makers.zero_grad()
            F.softplus(-self.score(made + noise * self._normal(*made.shape), codes)).mean().backward()
            makers.step()

    def draw(self, codes: Tensor) -> Tensor:
        """[n, p]: one point of each class asked for, each the end of a latent chain of its own."""
        s = self.settings

        def log_density(z: Tensor) -> Tensor:
            return self.score(self.make(z, codes), codes) - z.square().sum(1) / 2

        start = self._normal(len(codes), s.latent)
        z = metropolis_hastings(log_density, start, s.chain, s.tau, s.eta, self.random)
        with torch.no_grad():
            return self.make(z, codes)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)
