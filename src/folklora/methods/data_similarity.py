"""What CE-LoRA's clients say of their data, once or again, and how alike the server takes them to be.

1. A client fits a Gaussian mixture per class on frozen features, or sends class statistics that one is read off, or
  both: its *sketch* [paper, code; statistics: ours].
2. Between two clients: optimal transport between their mixtures, exact up to `WHOLE` clients [paper]; beyond, clients
  are points of linear optimal transport (`folklora.methods.embedding`) [recon].
3. Where data change, sketches are asked for again (``refresh``), and a private head is told of new classes
  (`folklora.methods.renewal`) [ours]. Who joins late is compared with everybody by its sketch alone [ours].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.data.mixtures import ClassMixtures, projection
from folklora.data.release import release_statistics
from folklora.data.statistics import ClassStatistics
from folklora.errors import MethodError
from folklora.methods.base import Method, refuse_other_prefixes, statistics_tensors
from folklora.methods.celora_options import CELoRAOptions
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.embedding import LinearTransport, typical_distance
from folklora.methods.mixing import Embedded
from folklora.methods.options import Options
from folklora.methods.transport import data_distances, distances_to, median_distance, similar, similarity
from folklora.randomness import derive, secret_generator, torch_generator

WHOLE = 1000
"""Clients up to which data similarity is exact, matrices are kept and shown, and mixing is done in float64."""
_SAMPLE = 2048
"""Clients that the embedding is fitted to; and as many are embedded at once."""


def held_whole(clients: int) -> bool:
    """Whether so many are compared exactly, and everything N x N of them is kept."""
    return clients <= WHOLE


class DataSimilarity(Method):
    """See the module's text; what follows from being alike is a subclass's affair."""

    options_type: ClassVar[type[Options]] = CELoRAOptions
    options: CELoRAOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        if self.options.projection > context.width:
            raise MethodError(
                f"method.projection = {self.options.projection} exceeds the features' width; "
                f"allowed: 0 (none) to {context.width}"
            )
        self._position = {client: i for i, client in enumerate(context.clients)}
        if self.options.refresh and not self.sketch_numbers():
            raise MethodError(
                f"method.refresh = {self.options.refresh}, and no sketch is sent; allowed: 0, or options that need "
                'one: similarity = "data" or "both", a head that starts sketched'
            )
        if self.options.refresh and not held_whole(len(context.clients)):
            raise MethodError(
                f"method.refresh = {self.options.refresh} with {len(context.clients)} clients, whose sketches the "
                f"server would have to keep; allowed: 0, or at most {WHOLE} clients"
            )

    @property
    def _mixes_for_newcomers(self) -> bool:
        """Whether a newcomer gets a mix of its own: cores of others say something to it, and differ."""
        return self.context.newcomers and self.options.basis == "frozen" and not self.options.common_core

    def _where(self, messages: Mapping[str, Message]) -> Tensor:
        return torch.tensor([self._position[client] for client in messages])

    @property
    def once(self) -> str | None:
        fitted = self.options.uses_data and self.options.components > 0
        sent = {"class statistics": self.options.sends_statistics, "class mixtures": fitted}
        return " and ".join(what for what, there in sent.items() if there) or None

    @property
    def beside_training(self) -> tuple[str, str] | None:
        options, released = self.options, self.options.dp_epsilon is not None
        if options.start in {"auto", "fitted"} or (options.start == "sketched" and not released):
            return (
                f'head_start = "{options.start}"',
                'head = "private" with head_start = "zero", or head_start = "sketched" with dp_epsilon, components = 0',
            )
        if options.uses_data and not released:
            return (
                f'similarity = "{options.similarity}"',
                'similarity = "model", "uniform", "size", or dp_epsilon with components = 0',
            )
        return None

    @property
    def private_release(self) -> tuple[float, float] | None:
        if self.options.dp_epsilon is None or not self.options.sends_statistics:
            return None
        return self.options.dp_epsilon, self.options.dp_delta

    def sketch_numbers(self) -> int:
        each = self.options.components * (2 * self.context.width + 1) + 2
        fitted = self.options.uses_data and self.options.components
        return super().sketch_numbers() + (self.context.classes * each if fitted else 0)

    @property
    def sends_statistics(self) -> bool:
        return self.options.sends_statistics

    # -- the one-off sketch --------------------------------------------------------------------------------------

    def sketch(self, client: Client) -> Message | None:
        tensors: Tensors = {}
        if self.options.sends_statistics:
            tensors |= statistics_tensors(self.statistics(client))
        if self.options.uses_data and self.options.components:
            tensors |= {f"mixture/{name}": t for name, t in self._mixtures(client).to_tensors().items()}
        return Message(tensors) if tensors else None

    def typical_sketch(self, client: str, counts: Tensor) -> Message | None:
        """Under differential privacy by the true counts: which classes the noise suppresses is not known before."""
        message = super().typical_sketch(client, counts)
        if not (self.options.uses_data and self.options.components):
            return message
        width = self.options.projection or self.context.width
        blank = ClassMixtures.blank(counts, self.options.components, width).to_tensors()
        own = message.tensors if message else {}
        return Message({**own, **{f"mixture/{name}": tensor for name, tensor in blank.items()}})

    def statistics(self, client: Client) -> ClassStatistics:
        if self.options.dp_epsilon is None:
            return super().statistics(client)
        features, labels = client.data.features("train")
        noise = secret_generator(client.secret, "release", client.id)
        return release_statistics(
            features,
            labels,
            self.context.classes,
            self.options.dp_clip,
            self.options.dp_epsilon,
            self.options.dp_delta,
            noise,
        )

    def _mixtures(self, client: Client) -> ClassMixtures:
        features, labels = client.data.features("train")
        if self.options.projection:
            features = features @ projection(features.shape[1], self.options.projection, self.context.seed).T
        seed = derive(self.context.seed, "mixture", client.id)
        return ClassMixtures.fit(features, labels, components=self.options.components, seed=seed)

    def check_sketch(self, message: Message) -> None:
        fitted = self.options.uses_data and self.options.components > 0
        agreed = {"statistics/": self.options.sends_statistics, "mixture/": fitted}
        refuse_other_prefixes(message, {prefix for prefix, expected in agreed.items() if expected})
        if self.options.sends_statistics:
            self.read_statistics(message)
        if fitted:
            self._read_mixtures(message)

    def begin(self, sketches: Mapping[str, Message]) -> State:
        state = super().begin(sketches)
        if self.options.uses_data:
            if held_whole(len(self.context.clients)):
                state |= self._data_similarity(sketches)
            else:
                state |= self._embedding(sketches)
        compared = self._mixes_for_newcomers and self.options.uses_data and held_whole(len(self.context.clients))
        if self.options.refresh or compared:
            state |= {f"sketch/{c}/{name}": t for c, sent in sketches.items() for name, t in sent.tensors.items()}
        return state

    def refreshes(self, round: int) -> bool:
        return bool(self.options.refresh) and round > 1 and (round - 1) % self.options.refresh == 0

    def refresh(self, round: int, state: State, sketches: Mapping[str, Message]) -> State:
        """As if the run began with the sketches of now; of whom none came, with its last.

        Whoever has new classes, and a head of its own that started sketched, is told the discriminant of now when it
        next takes part (`folklora.methods.renewal`).
        """
        before = self._last_sketches(state)
        now = {
            client: {**before, **sketches}[client] for client in self.context.clients if client in {*before, *sketches}
        }
        begun = self.begin(now)
        afresh = {name: tensor for name, tensor in begun.items() if not name.startswith("global/")}
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("sketch/")}
        if self.options.start == "zero" or self.options.head_travels:
            return {**kept, **afresh}
        new = state.get("renewal/new", torch.zeros(len(self.context.clients), self.context.classes, dtype=torch.bool))
        new = new.clone()
        for client, sketch in sketches.items():
            has = self.read_statistics(sketch).counts > 0
            had = self.read_statistics(before[client]).counts > 0 if client in before else torch.zeros_like(has)
            new[self._position[client]] = (new[self._position[client]] | ~had) & has
        return {**kept, **afresh, "renewal/new": new}

    def _last_sketches(self, state: State) -> dict[str, Message]:
        found: dict[str, Tensors] = {}
        for path, tensor in state.items():
            if path.startswith("sketch/"):
                client, of, name = path.removeprefix("sketch/").rsplit("/", 2)  # a client may have slashes in its name
                found.setdefault(client, {})[f"{of}/{name}"] = tensor
        return {client: Message(tensors) for client, tensors in found.items()}

    def _data_similarity(self, sketches: Mapping[str, Message]) -> State:
        """[N, N] over all clients; one that never sent a sketch is like itself only. The scale of its distances is kept
        where newcomers will be compared by it."""
        clients = self.context.clients
        known = [i for i, client in enumerate(clients) if client in sketches]
        mixtures = [self._read_mixtures(sketches[clients[i]]) for i in known]
        full = torch.eye(len(clients), dtype=torch.float64)
        where = torch.tensor(known, dtype=torch.long)
        distances = data_distances(mixtures)
        full[where[:, None], where] = similarity(distances)
        found = {"similarity/data": full.float()}
        if self._mixes_for_newcomers:
            found["similarity/scale"] = torch.tensor(median_distance(distances), dtype=torch.float64)
        return found

    def _embedding(self, sketches: Mapping[str, Message]) -> State:
        """Points of all clients; one that never sent a usable sketch is not placed."""
        known = [client for client in self.context.clients if client in sketches]
        order = torch.randperm(len(known), generator=torch_generator(self.context.seed, "embedding/sample"))
        placed = torch.zeros(len(self.context.clients), dtype=torch.bool)
        points = torch.zeros(len(placed), 0)
        embed = None
        for part in order.split(_SAMPLE):
            mixtures = {known[i]: self._read_mixtures(sketches[known[i]]) for i in part.tolist()}
            usable = {client: mixture for client, mixture in mixtures.items() if len(mixture.classes)}
            if not usable:
                continue
            if embed is None:
                embed = LinearTransport.fit(list(usable.values()), self.context.seed)
                points = torch.zeros(len(placed), len(embed.directions))
            where = torch.tensor([self._position[client] for client in usable])
            points[where] = embed(list(usable.values()))
            placed[where] = True
        scale = typical_distance(points[placed], self.context.seed)
        kept = vars(embed) if embed is not None and self._mixes_for_newcomers else {}
        return {
            "similarity/points": points,
            "similarity/placed": placed,
            "similarity/scale": torch.tensor(scale, dtype=torch.float64),
            **{f"embedding/{name}": tensor.contiguous() for name, tensor in kept.items()},
        }

    def _read_mixtures(self, message: Message) -> ClassMixtures:
        if self.options.components == 0:
            return ClassMixtures.from_statistics(self.read_statistics(message))
        prefix = "mixture/"
        own = {name.removeprefix(prefix): t for name, t in message.tensors.items() if name.startswith(prefix)}
        width = self.options.projection or self.context.width
        return ClassMixtures.from_tensors(own, self.context.classes, width, self.options.components)

    def _similarity_to(self, state: State, sketch: Message | None) -> Tensor:
        """[N] float64: S_data of a newcomer and everybody; zeros where it cannot be told."""
        count = len(state["mixed/known"])
        nothing = torch.zeros(count, dtype=torch.float64)
        own = self._read_mixtures(sketch) if sketch is not None and self.options.uses_data else None
        if own is None or not len(own.classes):
            return nothing
        scale = float(state["similarity/scale"])
        if "similarity/points" in state:
            if not bool(state["similarity/placed"].any()):
                return nothing
            names = [field.name for field in fields(LinearTransport)]
            embed = LinearTransport(**{name: state[f"embedding/{name}"] for name in names})
            points = torch.cat([state["similarity/points"], embed([own])]).double()
            placed = torch.cat([state["similarity/placed"], torch.ones(1, dtype=torch.bool)])
            return Embedded(points, placed, scale).block(slice(count, count + 1), slice(0, count))[0]
        others = {self._position[c]: self._read_mixtures(sent) for c, sent in self._last_sketches(state).items()}
        distances = torch.full((count,), torch.inf, dtype=torch.float64)
        distances[list(others)] = distances_to(own, list(others.values()))
        return similar(distances, scale)
