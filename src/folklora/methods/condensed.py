"""Methods whose clients send condensed data and whose server trains: what FedDM and FedAF have in common.

1. Once, a client says how many training examples of each class it has (``counts/train`` [C]): what it will send follows
  from them, and so the server knows the shapes of all uploads.
2. Each round it gets the server's model and sends ``condensed/inputs``, made-up examples of the classes that it has, in
  the order of their labels: ``ipc`` a class, and never more than it has real ones [recon: the cap]. It trains no model.
  ``index/labels`` beside them says what they stand for: who has other classes than it counted is refused, and not read
  under labels that are none of its own.
3. The server trains its model on the union of what arrived, and sends it back. Nothing of the made-up examples is kept.

``space = "features"``: an input is a pooled feature of the frozen backbone, [d], and the server trains the head
[recon]. ``space = "embeddings"``: it is what stands behind the embedding layer, [length, d], never a pixel or a token,
and the server trains adapters and head through the backbone [recon]. They begin as noise of the mean and the deviation
of the client's own inputs in each dimension, or as public sentences (`folklora.data.neutral`), never as real examples:
those would be sent almost as they are [recon].

Whoever sent no counts sends nothing that can be read, so it takes part in no round.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors, kind, select
from folklora.data.statistics import refuse_unknown, take
from folklora.errors import MessageError, MethodError
from folklora.methods.base import Method, blank, refuse_other_prefixes
from folklora.methods.condensation import EmbeddingView, Examples, Extra, FeatureView, View, condense, fit, noise_like
from folklora.methods.contract import Client, Context, Message, Network, State
from folklora.methods.options import Options
from folklora.methods.work import Trained, Work
from folklora.randomness import torch_generator

COUNTS = "counts/train"
INPUTS = "condensed/inputs"
LABELS = "index/labels"
MOST = 1e4
"""No number of an honest upload is larger: features and embeddings are of the size of one."""


class CondensedOptions(Options):
    head: Literal["shared"] = "shared"
    head_start: Literal["zero", "sketched"] | None = None
    space: Literal["features", "embeddings"] = Field("features", description="what is condensed")
    ipc: int = Field(10, ge=1, le=1000, description="made-up examples of each class, at most as many as real ones")
    length: int = Field(16, ge=3, le=512, description="tokens of a made-up text")
    init: Literal["noise", "public"] = Field("noise", description="where made-up examples begin")
    steps: int = Field(200, ge=1, le=100_000, description="of condensing, in each round")
    batch: int = Field(32, ge=1, le=100_000, description="real examples of each class in such a step, at most")
    rate: float = Field(0.1, gt=0, le=100, description="of condensing, as a share of the spread of the start")
    server_steps: int = Field(200, ge=1, le=100_000, description="of the server's training, in each round")
    server_batch: int = Field(64, ge=1, le=100_000)
    refresh: int = Field(0, ge=0, le=1_000_000, description="rounds after which counts are asked for again; 0: never")
    server_rate: float | None = Field(None, gt=0, le=10, description="default: train.lr")


class Condensed(Method):
    """See the module's text; a subclass says which models made-up examples are seen by, and how the server fits."""

    needs_head = True
    has_global_model = True
    takes_means = False
    condenses = True
    trains = frozenset()
    options_type = CondensedOptions
    options: CondensedOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        if not self.uses_network:
            return
        wants = 'method.space = "embeddings"' if self.options.space == "embeddings" else 'method.init = "public"'
        if context.network is None:
            raise MethodError(
                f"{wants} with examples that are no texts: they have no embeddings of tokens; allowed: "
                'space = "features", init = "noise"'
            )
        if self.options.length > self.network.longest:
            raise MethodError(
                f"method.length = {self.options.length} with {wants}: texts have at most {self.network.longest} "
                f"tokens; allowed: 3 to {self.network.longest}"
            )

    @property
    def uses_network(self) -> bool:
        return self.options.space == "embeddings" or self.options.init == "public"

    @cached_property
    def network(self) -> Network:
        assert self.context.network is not None
        return self.context.network(self.adapter)

    @cached_property
    def view(self) -> View:
        return FeatureView() if self.options.space == "features" else EmbeddingView(self.network)

    @cached_property
    def moved(self) -> frozenset[str]:
        """Kinds that the server trains."""
        return frozenset({"head"} if self.options.space == "features" else {"A", "B", "head", "norm"})

    def moving(self, model: Tensors) -> list[str]:
        """Names of those tensors, in an order that no file changes."""
        return sorted(name for name in model if kind(name) in self.moved)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.context.width,) if self.options.space == "features" else (self.options.length, self.network.width)

    # -- once ----------------------------------------------------------------------------------------------------

    def sketch(self, client: Client) -> Message:
        statistics = super().sketch(client)
        counts = torch.bincount(client.data.features("train")[1], minlength=self.context.classes)
        return Message({**(statistics.tensors if statistics else {}), COUNTS: counts.int()})

    def sketch_numbers(self) -> int:
        return super().sketch_numbers() + self.context.classes

    def check_sketch(self, message: Message) -> None:
        refuse_other_prefixes(message, {"counts/"} | ({"statistics/"} if self.sends_statistics else set()))
        if self.sends_statistics:
            self.read_statistics(message)
        self._read_counts(message)

    def _read_counts(self, message: Message) -> Tensor:
        """[C] int32.

        Raises
        ------
        MessageError
            For what is no count, or too many.
        """
        own = {name: tensor for name, tensor in message.tensors.items() if not name.startswith("statistics/")}
        refuse_unknown(own, {COUNTS})
        counts = take(own, COUNTS, (self.context.classes,), integer=True)
        if bool((counts < 0).any()) or not bool(counts.any()):
            raise MessageError(f"{COUNTS} holds negative numbers, or no example; allowed: counts of examples")
        return counts.clamp(max=2**31 - 1).int()

    def begin(self, sketches: Mapping[str, Message]) -> State:
        """``counts/train`` [N, C] of all clients, zero where nothing was said, and the server's model."""
        if not sketches:
            raise MethodError("no client said how many examples of each class it has")
        counts = torch.zeros(len(self.context.clients), self.context.classes, dtype=torch.int32)
        for client, message in sketches.items():
            counts[self._place[client]] = self._read_counts(message)
        common = select(self.initial(self.context.clients[0]), self.moved)
        start = {f"global/{name}": tensor for name, tensor in common.items()}
        return {**start, **super().begin(sketches), COUNTS: counts}

    def refreshes(self, round: int) -> bool:
        return bool(self.options.refresh) and round > 1 and (round - 1) % self.options.refresh == 0

    def refresh(self, round: int, state: State, sketches: Mapping[str, Message]) -> State:
        """Clients may have other classes now; their uploads are of another shape then."""
        counts = state[COUNTS].clone()
        for client, message in sketches.items():
            counts[self._place[client]] = self._read_counts(message)
        return {**state, COUNTS: counts}

    @cached_property
    def _place(self) -> dict[str, int]:
        return {client: place for place, client in enumerate(self.context.clients)}

    @property
    def once(self) -> str | None:
        return " and ".join(filter(None, ("class counts", super().once)))

    def typical_sketch(self, client: str, counts: Tensor) -> Message | None:
        statistics = super().typical_sketch(client, counts)
        return Message({**(statistics.tensors if statistics else {}), COUNTS: counts.int()})

    @property
    def beside_training(self) -> tuple[str, str] | None:
        return "condensed data", "a method whose clients train a model, such as 'fedit' or 'folklora'"

    # -- the round -----------------------------------------------------------------------------------------------

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        return ()

    def learned(self, round: int, client: Client, results: Mapping[str, Trained]) -> None:
        """Nothing was trained."""

    def shared(self, round: int) -> frozenset[str]:
        return frozenset({"condensed", "index"})

    def labels(self, counts: Tensor) -> Tensor:
        """[S]: what the made-up examples of a client with so many real ones stand for."""
        return torch.arange(len(counts)).repeat_interleave(counts.long().clamp(max=self.options.ipc))

    def counts(self, state: State, client: str) -> Tensor:
        """[C]; as many as can be where nothing is known yet."""
        if COUNTS not in state:
            return torch.full((self.context.classes,), self.options.ipc)
        place = self._place[client]
        known = state[COUNTS]
        return known[place] if place < len(known) else torch.zeros_like(known[0])  # who joins late sends nothing

    def expected(self, round: int, state: State, client: str) -> Shapes:
        counts = self.counts(state, client)
        if not bool(counts.any()):
            raise MessageError(
                f"client {client!r} never said how many examples of each class it has, and nothing else of it can be "
                "read; allowed: to say so when it is asked"
            )
        return self.upload_shapes(counts)

    def upload_shapes(self, counts: Tensor) -> Shapes:
        """Of what a client with so many examples of each class sends."""
        made = int(counts.clamp(max=self.options.ipc).sum())
        return {INPUTS: (made, *self.input_shape), LABELS: (made,)} if made else {}

    def typical_upload(self, round: int, client: str, counts: Tensor | None = None) -> Message | None:
        shapes = self.upload_shapes(self.counts({}, client) if counts is None else counts)
        return Message(blank(shapes), {"examples": 1.0})

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        for name, tensor in message.tensors.items():
            if float(tensor.abs().max()) > MOST:
                raise MessageError(f"{name} holds numbers beyond {MOST:g}; allowed: -{MOST:g} to {MOST:g}")
        if not torch.equal(message.tensors[LABELS].long(), self.labels(self.counts(state, client))):
            raise MessageError(f"{LABELS} are not those of the classes that it counted; allowed: to be counted again")

    def known(self, round: int, client: str, told: Tensors, message: Message) -> Tensors:
        return {}  # every round makes other examples

    def repays(self, name: str) -> bool:
        return False

    def send(self, round: int, client: Client) -> Message | None:
        real = self.real(client)
        labels = self.labels(torch.bincount(real.labels, minlength=self.context.classes))
        drawn = torch_generator(self.context.seed, "condense", client.id, round)
        made = {INPUTS: self.condensed(client, real, labels, drawn), LABELS: labels.int()}
        return Message({**made, **self.beside(client, real)}, {"examples": client.examples})

    def real(self, client: Client) -> Examples:
        """The client's training examples as inputs."""
        if self.options.space == "embeddings":
            return Examples(*client.data.network_inputs("train"))
        features, labels = client.data.features("train")
        return Examples(features, torch.ones_like(labels), labels)

    def condensed(self, client: Client, real: Examples, labels: Tensor, generator: torch.Generator) -> Tensor:
        """[S, ...]: this round's made-up inputs, of these labels."""
        start = self.start(client, real, len(labels), generator)
        return condense(
            start,
            labels,
            real,
            lambda: self.draw(client.tensors, generator),
            self.view,
            steps=self.options.steps,
            rate=self.options.rate,
            batch=self.options.batch,
            generator=generator,
            extra=self.pull(client, generator),
        )

    def start(self, client: Client, real: Examples, count: int, generator: torch.Generator) -> Tensor:
        """Where they begin, [count, ...]."""
        if self.options.init == "noise":
            return noise_like(real, (count, *self.input_shape), generator)
        inputs = self.network.public(count, self.options.length, generator)
        if self.options.space == "embeddings":
            return inputs
        plain = self.initial(client.id)
        with torch.no_grad():
            return self.network.features(plain, inputs, [self.options.length] * count)

    def draw(self, model: Tensors, generator: torch.Generator) -> Tensors:
        """The model that sees made-up examples in the next step of condensing."""
        raise NotImplementedError

    def pull(self, client: Client, generator: torch.Generator) -> Extra | None:
        """What is added to the loss of condensing."""
        return None

    def beside(self, client: Client, real: Examples) -> Tensors:
        """What is sent beside made-up inputs."""
        return {}

    # -- at the server -------------------------------------------------------------------------------------------

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        model = {**self.initial(self.context.clients[0]), **self.common(state)}
        names = self.moving(model)
        inputs = torch.cat([message.tensors[INPUTS].float() for message in messages.values()])
        labels = torch.cat([self.labels(self.counts(state, client)) for client in messages])
        lengths = torch.full((len(labels),), inputs.shape[1] if inputs.dim() == 3 else 1)
        fitted = fit(
            model,
            names,
            Examples(inputs, lengths, labels),
            self.view,
            steps=self.options.server_steps,
            rate=self.options.server_rate or self.context.learning_rate,
            batch=self.options.server_batch,
            generator=torch_generator(self.context.seed, "server", "", round),
            **self.fitting(state, messages),
        )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in fitted.values()):
            raise MethodError("the server's training diverged; allowed: a smaller method.server_rate")
        return {**state, **{f"global/{name}": tensor for name, tensor in fitted.items()}}

    @property
    def counts_examples(self) -> bool:
        return False

    def fitting(self, state: State, messages: Mapping[str, Message]) -> dict[str, Any]:
        """Further arguments of `fit`."""
        return {}

    def common(self, state: State) -> Tensors:
        """The server's model, as far as it is another than all start with."""
        return {name.removeprefix("global/"): t for name, t in state.items() if name.startswith("global/")}

    def typical_reply(self, round: int, client: str) -> Message | None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.context.norms.items()}
        shapes |= self.context.head | self.adapter.shapes(self.context.ranks[client])
        return Message(blank({name: shape for name, shape in shapes.items() if kind(name) in self.moved}))

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        return None

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        return {**tensors, **self.common(state)}
