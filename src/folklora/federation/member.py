"""One client of the federation: bytes in, bytes out. The same object in every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors
from folklora.data.audit.quality import quality
from folklora.data.split import Split
from folklora.errors import FolkLoraError, MessageError, MethodError
from folklora.federation.codec import check, encode
from folklora.federation.outlet import outlet_of
from folklora.federation.setup import Setup
from folklora.federation.weighing import spoken
from folklora.methods.base import Method
from folklora.methods.contract import Client, Message
from folklora.methods.work import Trained, Work
from folklora.privacy.ckks import Key
from folklora.privacy.example import noise
from folklora.randomness import derive, numpy_generator
from folklora.training.gradients import weight_gradients
from folklora.training.jobs import Fitted, Job
from folklora.training.network import embedded
from folklora.training.prediction import Question, layer_inputs
from folklora.training.private import Private, secret_seed, simulated_seed

SplitName = Literal["train", "validation", "test"]


class MemberData:
    """A client's own examples, and the frozen features a method may ask for."""

    def __init__(self, setup: Setup, client: str) -> None:
        self.setup = setup
        self.client = client
        self.split = setup.split(client, 0)
        self._audited: tuple[Split, float] | None = None

    def indices(self, split: SplitName) -> np.ndarray:
        indices: np.ndarray = getattr(self.split, split)
        return indices

    def inputs(self, rows: np.ndarray) -> list[Any]:
        """Training examples as the source read them."""
        return [self.setup.data.table.inputs[row] for row in rows]

    def quality(self) -> float:
        by = self.setup.recipe.audit.weights
        if by == "none":
            return 1.0
        if self._audited is None or self._audited[0] is not self.split:
            examples = [spoken(example) for example in self.inputs(self.split.train)]
            self._audited = self.split, quality(examples, by)
        return self._audited[1]

    def training(self, rows: np.ndarray) -> tuple[list[Any], np.ndarray]:
        """Examples to be trained on, and their labels."""
        return self.setup.examples(rows)

    def labels(self, split: SplitName) -> np.ndarray:
        return self.setup.data.table.labels[self.indices(split)]

    def features(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(self.labels(split))
        whole = self.setup.frozen_features(*self._own_steps())
        return whole[torch.from_numpy(self.indices(split))], labels

    def _own_steps(self) -> tuple[int, ...]:
        """How often this client applies a shared block, where that is not as often as the backbone does."""
        steps = self.setup.steps(self.client)
        return () if steps in (None, self.setup.task.backbone.depth.steps) else (steps or 0,)

    def gradient_rows(self, examples: int) -> np.ndarray:
        """Which training examples so many weight gradients are of."""
        # Indices are in the table's order, and a table may be sorted by label.
        shuffled = numpy_generator(self.setup.recipe.seed, "gradient", self.client).permutation(self.split.train)
        return shuffled[:examples]

    def weight_gradients(self, head: Tensors, examples: int) -> Tensors:
        chosen, labels = self.training(self.gradient_rows(examples))
        return weight_gradients(self.setup.task, chosen, labels, head, depth=self.setup.steps(self.client))

    def layer_inputs(self, tensors: Tensors, examples: int) -> Tensors:
        shuffled = numpy_generator(self.setup.recipe.seed, "inputs", self.client).permutation(self.split.validation)
        chosen, _ = self.setup.examples(shuffled[:examples])
        steps = self.setup.steps(self.client)
        return layer_inputs(self.setup.task, self.setup.method.adapter, tensors, chosen, depth=steps)

    def network_inputs(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.indices(split)
        examples, labels = self.training(rows) if split == "train" else self.setup.examples(rows)
        inputs, lengths = embedded(self.setup.task, examples)
        return inputs, lengths, torch.from_numpy(labels)


class Member:
    """A client with its private state; everything it tells others is an encoded message."""

    def __init__(self, setup: Setup, client: str, secret: int | None = None, key: Key | None = None) -> None:
        self.setup = setup
        self.method = setup.method_of(client)
        self.data = MemberData(setup, client)
        self.moments: dict[str, Tensors] = {}  # of each branch of training
        self.simulated = secret is None  # what follows from the recipe's seed is no secret
        self.client = Client(
            id=client,
            rank=setup.ranks[client],
            examples=len(self.data.split.train),
            tensors=self.method.initial(client),
            data=self.data,
            secret=derive(setup.recipe.seed, "secret", client) if secret is None else secret,
        )
        self.outlet = outlet_of(setup.recipe, self.method, self.client, key, sends=self.method is setup.method)
        self.most = _largest_download(self.method, self.client)

    def enter(self, round: int) -> None:
        """Have the data of this round from now on."""
        self.data.split = self.setup.split(self.client.id, round)
        self.client.examples = len(self.data.split.train)

    # -- messages ------------------------------------------------------------------------------------------------

    def sketch(self) -> bytes | None:
        """What it sends once; a newcomer only what its start is made of."""
        if self.method is not self.setup.method and not self.method.asks_newcomers:
            return None
        message = self.method.sketch(self.client)
        return None if message is None else encode(message, self.setup.recipe.message.dtype)

    def settle(self, data: bytes) -> None:
        """Take the welcome in.

        Raises
        ------
        MessageError
            If it cannot be used; the client is then as it was before.
        """
        message = self.outlet.open(data, self.most)
        self._become(self._after(self.method.settle, message))
        self.outlet.uplink.settled(message)

    def receive(self, data: bytes) -> None:
        """Take a reply in; raises as `settle` does."""
        message = self.outlet.open(data, self.most)
        self._become(self._after(self.method.receive, message))
        self.outlet.uplink.received(message)

    def _become(self, shadow: Client) -> None:
        self.client.tensors, self.client.notes = shadow.tensors, shadow.notes

    def accepted(self) -> None:
        """The server has taken this client's last upload."""
        self.outlet.uplink.accepted()

    def finish(self, round: int, fitted: Sequence[Fitted]) -> bytes | None:
        """Take the training's result in (one a job, in their order) and say what travels, if anything does.

        Raises
        ------
        FolkLoraError
            If training diverged, or its result cannot be sent; the client is then as it was before.
        """
        if not fitted and self.method.trained(round):
            raise MethodError("the method trains nothing in this round")
        for each in fitted:
            finite = (bool(torch.isfinite(tensor).all()) for tensor in each.tensors.values())
            if not (math.isfinite(each.loss) and all(finite)):
                rates = "train.lr" if self.setup.recipe.train.head_lr is None else "train.lr, train.head_lr"
                raise MethodError(f"training diverged (loss {each.loss:g}); allowed: a smaller {rates} or train.clip")
        before = self.client.tensors, dict(self.client.notes)
        head_rate = self.setup.recipe.train.head_rate
        try:
            self.method.learned(
                round,
                self.client,
                {f.branch: Trained(f.tensors, f.loss, f.steps, f.travelled, f.importance, head_rate) for f in fitted},
            )
            message = self.method.send(round, self.client)
            data = None if message is None else self.outlet.encode(round, message)
        except FolkLoraError:
            self.client.tensors, self.client.notes = before
            raise
        self.moments = {f.branch: f.moments for f in fitted}
        return data

    # -- work ----------------------------------------------------------------------------------------------------

    def jobs(self, round: int) -> list[Job]:
        """This round's trainings; none if the method trains nothing."""
        examples, labels = self.data.training(self.data.split.train)
        depths = () if self.setup.depths is None else self.setup.depths.training(self.client.id)
        return [
            Job(
                self.client.id,
                round,
                self.method.adapter.rank(work.tensors),
                work.tensors,
                work.trained,
                examples,
                labels,
                self.moments.get(work.branch, {}),
                work.terms,
                work.branch,
                self._private(round, work),
                depths,
            )
            for work in self.method.work(round, self.client)
            if work.trained
        ]

    def _private(self, round: int, work: Work) -> Private | None:
        recipe, client = self.setup.recipe, self.client
        if recipe.privacy.unit != "example":
            return None
        if self.simulated:
            seed = simulated_seed(client.secret, client.id, round, work)
        else:
            seed = secret_seed(client.secret, client.id, round, work, self.moments.get(work.branch, {}), recipe)
        return Private(recipe.privacy.clip, noise(recipe, self.method, client.examples), seed)

    def preview(self, data: bytes | None) -> Client:
        """This client as it would be after receiving ``data``; what it has stays as it is."""
        return self.client if data is None else self._after(self.method.receive, self.outlet.open(data, self.most))

    def _after(self, take: Callable[[Client, Message], None], message: Message) -> Client:
        """This client as a message would leave it, if it leaves it with tensors of the names and shapes it works with.

        What a reply holds is the method's affair; what it must not do is the same for all of them.
        """
        now = self.client
        shadow = Client(**{**vars(now), "tensors": dict(now.tensors), "notes": dict(now.notes)})
        try:
            take(shadow, message)
            shapes = {name: tuple(tensor.shape) for name, tensor in now.tensors.items()}
            shapes |= self.method.adapter.shapes(self.method.adapter.rank(shadow.tensors))  # a rank may change
            check(Message(shadow.tensors), shapes)
            for name, note in shadow.notes.items():
                if note is not now.notes.get(name) and (shape := _shape_of_note(name, shapes)) is not None:
                    check(Message({name: note}), {name: shape})
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, MessageError) as error:
            raise MessageError(f"what the server sent cannot be used: {error}") from None
        return shadow

    def question(self, split: SplitName, data: bytes | None, steps: int | None = None) -> Question:
        """The examples of a split, to be answered by the model this client would use after receiving ``data``.

        ``steps`` is what it chose to take; by default it takes those of its device.
        """
        examples, _ = self.setup.examples(self.data.indices(split))
        model = self.method.model(self.preview(data))
        steps = steps or self.setup.steps(self.client.id)
        return Question(self.client.id, self.method.adapter.rank(model), model, examples, steps)

    def labels(self, split: SplitName) -> np.ndarray:
        return self.data.labels(split)

    def inputs(self, split: SplitName) -> list[Any]:
        """The examples of a split as the source has them."""
        return [self.setup.data.table.inputs[i] for i in self.data.indices(split)]

    # -- its record in the run directory -------------------------------------------------------------------------

    def record(self) -> Tensors:
        groups = {"model": self.client.tensors, "notes": self.client.notes, **self.outlet.uplink.record()}
        groups |= {f"moments@{branch}" if branch else "moments": moments for branch, moments in self.moments.items()}
        return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def restore(self, record: Tensors) -> None:
        groups: dict[str, Tensors] = {"model": {}, "notes": {}}
        for name, tensor in record.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        self.client.tensors, self.client.notes = groups.pop("model"), groups.pop("notes")
        self.outlet.uplink.restore(groups)
        # What else stands in it is not a member's.
        ours = {group: moments for group, moments in groups.items() if group.partition("@")[0] == "moments"}
        self.moments = {group.partition("@")[2]: moments for group, moments in ours.items()}


def _shape_of_note(name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape of a note that a method keeps of a tensor of the model, such as ``control/c/head/bias``."""
    parts = name.split("/")
    of = ("/".join(parts[i:]) for i in range(1, len(parts)))
    return next((shapes[tensor] for tensor in of if tensor in shapes), None)


def _largest_download(method: Method, client: Client) -> int:
    """Bytes that no welcome and no reply exceeds: several times the model at its largest, dense updates included."""
    context = method.context
    widest = method.adapter.shapes(max(*context.ranks.values(), context.promote or 1))
    numbers = sum(tensor.numel() for tensor in client.tensors.values()) + sum(map(math.prod, widest.values()))
    dense = sum(site.d_in * site.d_out for site in context.sites)
    return 16 * (numbers + dense) + (1 << 20)
