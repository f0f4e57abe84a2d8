"""DP-SGD [arXiv 1607.00133] for K clients at once: whether an example was trained on cannot be told from the updates.

In every step a client sums the gradients of a *Poisson sample* of its examples (each is in it with probability
``q = min(1, batch_size / n)``, independently of all others), each scaled down to norm ``clip`` if it is longer, adds
Gaussian noise of standard deviation ``noise * clip`` to every trained number, and divides by the size that it expects,
``q n``. A sample may be empty: that step is noise alone. The gradient is of the example's own loss, as if it were all
that a client has: of a chat the mean over its response tokens. A client's loss is then the mean over its examples, and
without privacy that over all tokens. Optimiser, schedule, masks, pulls, corrections and importance scores see nothing
but the result, and ``train.clip`` is not applied to it again.

One step is one `folklora.privacy.accounting.event` with this q; neighbours differ by one training example more or less,
and n is taken to be known. Not covered: validation and test examples (a model's scores on them), the training loss in
`Fitted`, that a training diverged, how long it took. Noise is Gaussian in float64 from a generator that is not
cryptographic, and is not hardened against attacks on rounding (Mironov 2012).

For the gradients' sake every example is a row of a stack, with a copy of its client's model, where without privacy
every client is one. Rows are as many at a time as `NUMBERS` allows; no result depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.backbones.task import Example, Task
from folklora.methods.work import Work
from folklora.privacy.example import sampling, steps
from folklora.randomness import derive, derive_secret, numpy_generator, secret_generator, torch_generator
from folklora.recipe import Recipe
from folklora.sections import TrainSection

NUMBERS = 2**25
"""Of models in one pass, where every example has a copy of its client's: 128 MiB, and up to as much of gradients."""


@dataclass(frozen=True)
class Private:
    """What makes a client's training private.

    Attributes
    ----------
    clip
        L2 norm that no example's gradient exceeds.
    noise
        Standard deviation of the noise in a sum of gradients, per unit of ``clip``.
    seed
        Of samples, noise and dropout; see `secret_seed`.
    """

    clip: float
    noise: float
    seed: int = field(repr=False)

    def samples(self, examples: int, train: TrainSection) -> list[np.ndarray]:
        """Which examples are in each step of a round, in ascending order."""
        random, q = numpy_generator(self.seed, "sample"), sampling(examples, train)
        return [np.flatnonzero(random.random(examples) < q) for _ in range(steps(examples, train))]

    def generator(self, purpose: str) -> torch.Generator:
        return torch_generator(self.seed, purpose)

    def disturbance(self) -> np.random.Generator:
        """Where `draw` takes a training's noise from, step by step."""
        return secret_generator(self.seed, "noise")

    def draw(self, shapes: Mapping[str, torch.Size], generator: np.random.Generator) -> Tensors:
        """The noise in one sum of gradients, float32, in the order of the names."""
        sizes = [shapes[name].numel() for name in sorted(shapes)]
        drawn = torch.from_numpy(generator.standard_normal(sum(sizes))) * (self.noise * self.clip)
        parts = zip(sorted(shapes), drawn.float().split(sizes), strict=True)
        return {name: part.view(shapes[name]) for name, part in parts}


def secret_seed(secret: int, client: str, round: int, work: Work, moments: Tensors, recipe: Recipe) -> int:
    """The seed of one training: it follows from a secret of the client's, and from all that the training starts with.

    Whoever knew it could take the noise away, and noise that is used for two different gradients cancels. So a server
    that has a round played again gets the same numbers if it says the same, and fresh noise if it says another thing,
    in a reply or in the recipe. Settings on which results do not depend are not in it.
    """
    digest = hashlib.blake2b(digest_size=16)
    train = {"rounds", "local_epochs", "batch_size", "lr", "optimizer", "optimizer_state"}
    train |= {"momentum", "weight_decay", "warmup", "schedule"}
    if recipe.train.head_lr is not None:
        train.add("head_lr")
    about: dict[str, Any] = {"train": train, "adapter": True, "privacy": True}
    if recipe.depth.said:
        about["depth"] = True
    settings = recipe.model_dump_json(include=about)
    terms = work.terms
    digest.update(f"{settings} {terms.proximal!r} {terms.rate!r} {sorted(work.trained)}".encode())
    for part, tensors in enumerate((work.tensors, moments, terms.masks, terms.anchor, terms.correction)):
        for name, tensor in sorted(tensors.items()):
            digest.update(f" {part} {name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return derive_secret(secret, f"private/{work.branch}/{digest.hexdigest()}", client, round)


def simulated_seed(secret: int, client: str, round: int, work: Work) -> int:
    """The same for a simulation, whose secrets are none: there a run's numbers must not hang on the last bit of where
    a training starts, which is another one in another company or on another machine."""
    return derive(secret, f"private/{work.branch}", client, round)


@dataclass(frozen=True)
class Part:
    """Some examples of a step, each laid out as a client of its own.

    Attributes
    ----------
    owners
        [S] int64, ascending: the slot of each.
    picks
        Which of its slot's examples each one is.
    """

    owners: Tensor
    picks: tuple[int, ...]
    labels: Tensor
    layout: Any

    def slots(self) -> Iterator[tuple[int, slice]]:
        """Each slot with examples here, and which rows are its own."""
        found, counts = self.owners.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0)
        for k, stop, count in zip(found.tolist(), stops.tolist(), counts.tolist(), strict=True):
            yield k, slice(stop - count, stop)


def lay_out_apart(
    task: Task,
    owned: Sequence[tuple[Sequence[Example], np.ndarray]],
    chosen: Sequence[np.ndarray],
    most: int,
    packed: str,
    *,
    mixed: bool = True,
) -> list[Part]:
    """A step's examples in parts of at most ``most``; ``owned`` are the examples and labels of each slot."""
    places = [(k, int(i)) for k, picks in enumerate(chosen) for i in picks]
    parts = []
    for start in range(0, len(places), most):
        some = places[start : start + most]
        parts.append(
            Part(
                torch.tensor([k for k, _ in some]),
                tuple(i for _, i in some),
                torch.tensor([int(owned[k][1][i]) for k, i in some]),
                task.lay_out([[owned[k][0][i]] for k, i in some], packed, mixed=mixed),
            )
        )
    return parts


def add_clipped(total: Tensor, grads: Tensor, part: Part, clips: Sequence[float]) -> None:
    """Add gradients [S, P], each of at most its slot's norm, to the slots' sums [K, P]."""
    norms = torch.linalg.vector_norm(grads, dim=1)
    for k, rows in part.slots():
        # A product of its own for each slot: what is not finite harms nobody else.
        total[k] += (clips[k] / norms[rows].clamp(min=clips[k])) @ grads[rows]
