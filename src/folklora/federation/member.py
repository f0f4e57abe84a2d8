"""One client of the federation: bytes in, bytes out. The same object in every engine."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.errors import FolkLoraError, MethodError
from folklora.federation.codec import decode, encode
from folklora.federation.setup import Setup
from folklora.methods.base import Client
from folklora.randomness import derive
from folklora.training.cohort import Fitted, Job
from folklora.training.prediction import Question

SplitName = Literal["train", "validation", "test"]


class MemberData:
    """A client's own examples, and the frozen features a method may ask for."""

    def __init__(self, setup: Setup, client: str) -> None:
        self.setup = setup
        self.split = setup.data.splits[client]

    def indices(self, split: SplitName) -> np.ndarray:
        indices: np.ndarray = getattr(self.split, split)
        return indices

    def features(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
        indices = self.indices(split)
        labels = torch.from_numpy(self.setup.data.table.labels[indices])
        return self.setup.frozen_features()[torch.from_numpy(indices)], labels


class Member:
    """A client with its private state; everything it tells others is an encoded message."""

    def __init__(self, setup: Setup, client: str) -> None:
        self.setup = setup
        self.method = setup.method
        self.data = MemberData(setup, client)
        self.moments: Tensors = {}
        self.client = Client(
            id=client,
            rank=setup.ranks[client],
            examples=len(self.data.split.train),
            tensors=self.method.initial(client),
            data=self.data,
            secret=derive(setup.recipe.seed, "secret", client),
        )

    # -- messages ------------------------------------------------------------------------------------------------

    def sketch(self) -> bytes | None:
        message = self.method.sketch(self.client)
        return None if message is None else encode(message, self.setup.recipe.message.dtype)

    def settle(self, data: bytes) -> None:
        self.method.settle(self.client, decode(data))

    def receive(self, data: bytes) -> None:
        self.method.receive(self.client, decode(data))

    def finish(self, round: int, fitted: Fitted) -> bytes | None:
        """Take the training's result in and say what travels, if anything does.

        Raises
        ------
        FolkLoraError
            If training diverged, or its result cannot be sent; the client is then as it was before.
        """
        finite = (bool(torch.isfinite(tensor).all()) for tensor in fitted.tensors.values())
        if not (math.isfinite(fitted.loss) and all(finite)):
            raise MethodError(f"training diverged (loss {fitted.loss:g}); allowed: a smaller train.lr or train.clip")
        before, self.client.tensors = self.client.tensors, fitted.tensors
        try:
            message = self.method.send(round, self.client)
            data = None if message is None else encode(message, self.setup.recipe.message.dtype)
        except FolkLoraError:
            self.client.tensors = before
            raise
        self.moments = fitted.moments
        return data

    # -- work ----------------------------------------------------------------------------------------------------

    def job(self, round: int) -> Job:
        examples, labels = self.setup.examples(self.data.split.train)
        kinds = self.method.trained(round)
        trained = frozenset(name for name in self.client.tensors if name.partition("/")[0] in kinds)
        return Job(
            self.client.id, round, self.client.rank, self.client.tensors, trained, examples, labels, self.moments
        )

    def preview(self, data: bytes | None) -> Tensors:
        """The model this client would have after receiving ``data``; what it has stays as it is."""
        if data is None:
            return self.client.tensors
        shadow = Client(**{**vars(self.client), "tensors": dict(self.client.tensors), "notes": dict(self.client.notes)})
        self.method.receive(shadow, decode(data))
        return shadow.tensors

    def question(self, split: SplitName, tensors: Tensors) -> Question:
        examples, _ = self.setup.examples(self.data.indices(split))
        return Question(self.client.id, self.client.rank, tensors, examples)

    def labels(self, split: SplitName) -> np.ndarray:
        return self.setup.data.table.labels[self.data.indices(split)]

    # -- its record in the run directory -------------------------------------------------------------------------

    def record(self) -> Tensors:
        groups = {"model": self.client.tensors, "notes": self.client.notes, "moments": self.moments}
        return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def restore(self, record: Tensors) -> None:
        groups: dict[str, Tensors] = {"model": {}, "notes": {}, "moments": {}}
        for name, tensor in record.items():
            group, _, rest = name.partition("/")
            groups[group][rest] = tensor
        self.client.tensors, self.client.notes, self.moments = groups["model"], groups["notes"], groups["moments"]
