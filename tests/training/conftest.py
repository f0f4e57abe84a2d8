"""Small cohorts: a task over a tiny backbone, and clients of uneven sizes and mixed ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.adapters.lowrank import LowRank, Tensors
from folklora.backbones.backbone import Backbone
from folklora.backbones.classification import Classification
from folklora.sections import TrainSection
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Fitted, Job

CLASSES = 3
SEED = 5


@dataclass(frozen=True)
class World:
    """A task, its adapter, and clients made to measure."""

    folder: Path
    task: Classification
    adapter: LowRank

    def tensors(self, rank: int, seed: int, start: str = "moved") -> Tensors:
        """A client's model: as it starts (B = 0, C = I, head zero), or *moved* off all special values."""
        g = torch.Generator().manual_seed(seed)
        draw = lambda shape, std: std * torch.randn(shape, generator=g)
        found: Tensors = {}
        for name, shape in self.adapter.shapes(rank).items():
            found[name] = draw(shape, 0.2)
            if name.startswith("C/"):
                found[name] += torch.eye(rank)
        for name, shape in self.task.head_shapes().items():
            found[name] = draw(shape, 0.1)
        for name, (weight, bias) in self.task.backbone.norms.items():
            found[f"norm/{name}.weight"] = weight + draw(weight.shape, 0.1)
            found[f"norm/{name}.bias"] = bias + draw(bias.shape, 0.1)
        if start == "fresh":
            for name, tensor in found.items():
                if name.startswith(("B/", "head/")):
                    tensor.zero_()
                elif name.startswith("C/"):
                    tensor.copy_(torch.eye(rank))
        return found

    def examples(self, count: int, seed: int) -> tuple[list[list[int]], np.ndarray]:
        """Sequences of 3 to 12 tokens between [CLS] and [SEP], and labels that a third of the tokens give away."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(CLASSES, size=count)
        found = []
        for label in labels:
            words = rng.integers(4, 64, size=rng.integers(1, 11))
            telling = rng.random(len(words)) < 1 / 3
            found.append([2, *np.where(telling, 4 + label, words).tolist(), 3])
        return found, labels

    def jobs(
        self,
        sizes: Sequence[int],
        ranks: Sequence[int],
        *,
        start: str = "moved",
        kinds: str = "A B C head norm",
        round: int = 1,
    ) -> list[Job]:
        made = []
        for k, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
            tensors = self.tensors(rank, 100 + k, start)
            trained = frozenset(name for name in tensors if name.partition("/")[0] in kinds.split())
            made.append(Job(f"client-{k}", round, rank, tensors, trained, *self.examples(size, k)))
        return made

    def fit(self, jobs: Sequence[Job], **train: Any) -> dict[str, Fitted]:
        """Train; settings as in a recipe."""
        settings = {"batch_size": 8, "lr": 5e-3, **train}
        trainer = CohortTrainer(self.task, self.adapter, TrainSection(**settings), SEED)
        return {fitted.client: fitted for fitted in trainer.fit(jobs)}


@pytest.fixture(scope="session")
def world(tiny_model: Callable[[str], Path]) -> Callable[..., World]:
    """``world("bert", core=True, dropout=0.1)`` -> a World; its backbone is loaded once."""
    backbones: dict[tuple[str, bool, str], Backbone] = {}

    def make(
        architecture: str = "bert",
        *,
        core: bool = False,
        norm: bool = False,
        dropout: float = 0.0,
        dtype: str = "float32",
        pooling: str = "auto",
    ) -> World:
        folder = tiny_model(architecture)
        key = (architecture, norm, dtype)
        if key not in backbones:
            backbones[key] = Backbone.load(str(folder), norm=norm, dtype=dtype)
        task = Classification(backbones[key], CLASSES, pooling=pooling)
        return World(folder, task, LowRank(backbones[key].sites, core, alpha=8.0, dropout=dropout))

    return make
