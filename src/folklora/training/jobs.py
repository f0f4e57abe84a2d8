"""One client's local training in one round: what it starts from, where it stands, what it became."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from folklora.adapters.lowrank import Tensors
from folklora.backbones.task import Example
from folklora.methods.work import Terms
from folklora.randomness import numpy_generator, torch_generator
from folklora.sections import TrainSection
from folklora.training.optimizer import schedule
from folklora.training.private import Private


@dataclass(frozen=True)
class Job:
    """One client's local training in one round.

    Attributes
    ----------
    tensors
        Everything the client's model consists of: factors, head, norms.
    trained
        Names among them that receive gradients.
    moments
        Optimiser state from earlier rounds (``m/<name>``, ``v/<name>``, ``steps/<name>``), or empty to start fresh.
    terms
        What bends its gradient steps.
    branch
        Tells several jobs of one client in one round apart; they see the same minibatches in the same order.
    private
        What makes it DP-SGD; see `folklora.training.private`.
    depths
        How often a shared block is applied (`folklora.backbones.depth`): each minibatch draws one of these; none: as
        often as the backbone does.
    """

    client: str
    round: int
    rank: int
    tensors: Tensors
    trained: frozenset[str]
    examples: Sequence[Example]
    labels: np.ndarray
    moments: Tensors = field(default_factory=dict)
    terms: Terms = field(default_factory=Terms)
    branch: str = ""
    private: Private | None = None
    depths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """What a job became: all tensors (trained ones new), the mean training loss, steps done, optimiser state, the sum
    of its steps' learning rates, and importance scores where its terms asked for them."""

    client: str
    tensors: Tensors
    loss: float
    steps: int
    moments: Tensors
    branch: str = ""
    travelled: float = 0.0
    importance: Tensors = field(default_factory=dict)


class Slot:
    """A client in training: its minibatches still to come, and its tallies."""

    def __init__(self, job: Job, train: TrainSection, seed: int) -> None:
        self.job = job
        n = len(job.examples)
        if job.private is None:
            order = numpy_generator(seed, "order", job.client, job.round)
            epochs = [order.permutation(n) for _ in range(train.local_epochs)]
            self.batches = [epoch[i : i + train.batch_size] for epoch in epochs for i in range(0, n, train.batch_size)]
        else:
            self.batches = job.private.samples(n, train)
            self.noise = job.private.disturbance()
        self.dropout = torch_generator(seed, "dropout", job.client, job.round)
        self.depths = _depths(job, len(self.batches), seed)
        self.done = 0
        self.loss = 0.0
        self.seen = 0
        self.travelled = 0.0

    @property
    def finished(self) -> bool:
        return self.done == len(self.batches)

    @property
    def depth(self) -> int | None:
        """Of the minibatch in hand."""
        return self.depths[self.done] if self.depths else None

    def learning_rate(self, train: TrainSection) -> float:
        per_round = len(self.batches)
        step = (self.job.round - 1) * per_round + self.done
        return train.lr * self.job.terms.rate * schedule(train, step, max(1, train.rounds) * per_round)


def _depths(job: Job, steps: int, seed: int) -> list[int]:
    """Of each minibatch; they follow from the step, so that several trainings of a client in a round have the same."""
    if len(job.depths) < 2:
        return list(job.depths) * steps
    draws = numpy_generator(seed, "depth", job.client, job.round).integers(len(job.depths), size=steps)
    return [job.depths[draw] for draw in draws]
