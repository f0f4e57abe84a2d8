"""CE-LoRA: tri-matrix adapters, and a mix of cores of its own for every client. arXiv 2503.23869 (IEEE TMM 2026).

1. ``y = W0 x + s B C A x``. A ~ N(0, 1e-3^2), B = 0, C = I; A, B, C and the head all train [code].
2. Only C travels [paper]; A, B, the head (and LayerNorms) never leave the client.
3. Once, each client fits a Gaussian mixture per class on frozen features and sends it [paper, code: 3 components,
  diagonal].
4. Data similarity: optimal transport between the clients' mixtures [paper: GMM + OT; distances to similarities: recon].
5. Model similarity: linear CKA of the cores [paper names CKA; averaging over layers: recon].
6. ``S = lambda S_data + (1 - lambda) S_model``; client i gets ``sum_j softmax_j(S_ij / T) C_j``, itself included
   [lambda, T, softmax: recon].

Examples without labels are all of one class, whose mixture is that of all features of the client [recon].

Where ranks differ, cores are mixed zero-padded and truncated on the way down [recon]; what is mixed is ``s_k C_k``, so
that the scaling alpha / rank of each client is respected [recon].

Up to a thousand clients data similarity is exact and everything N x N is kept to be shown. Beyond, clients are points
of linear optimal transport (`folklora.methods.embedding`) [recon], nothing N x N is ever held
(`folklora.methods.mixing`), and rounds of more than a thousand clients are mixed in float32.

Ours beside the published: ``basis = "frozen"`` (A, B orthonormal, from the seed, common to all and never trained; C
starts at zero; then the mean of cores is exact) and ``basis = "aligned"`` (each core is rotated to the receiver's by
orthogonal Procrustes before mixing), ``similarity = "uniform" | "size"`` (plain and example-weighted means), a
differentially private sketch, mixtures read off the class statistics (``components = 0``), and sketches that are asked
for again while data change (``refresh``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from folklora.adapters.lowrank import Tensors, gaussian, kind, orthonormal
from folklora.data.mixtures import ClassMixtures, projection
from folklora.data.release import release_statistics
from folklora.data.statistics import ClassStatistics
from folklora.errors import MethodError
from folklora.methods.aggregation import weighted_mean
from folklora.methods.base import Method, refuse_other_prefixes, statistics_tensors
from folklora.methods.cka import gram_rows
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.embedding import LinearTransport, typical_distance
from folklora.methods.mixing import Embedded, Mixing
from folklora.methods.options import Options
from folklora.methods.renewal import TAKEN, Renewal, renewals
from folklora.methods.transport import data_distances, distances_to, median_distance, similar, similarity
from folklora.randomness import derive, secret_generator, torch_generator

WHOLE = 1000
"""Clients up to which data similarity is exact, matrices are kept and shown, and mixing is done in float64."""
_SAMPLE = 2048
"""Clients that the embedding is fitted to; and as many are embedded at once."""


class CELoRAOptions(Options):
    """CE-LoRA's options; the published method is the default."""

    similarity: Literal["data", "model", "both", "uniform", "size"] = "both"
    basis: Literal["private", "frozen", "aligned"] = "private"
    lambda_: float = Field(0.5, ge=0, le=1, alias="lambda", description="weight of data similarity in `both`")
    temperature: float = Field(0.5, ge=1e-6)
    components: int = Field(
        3, ge=0, le=64, description="of each class's mixture; 0: one, read off the class statistics"
    )
    projection: int = Field(0, ge=0, description="dimensions of a common random projection before the mixture; 0: none")
    init_std: float = Field(1e-3, gt=0, description="of A [code]")
    dp_epsilon: float | None = Field(None, gt=0, description="differentially private sketch: epsilon")
    dp_delta: float = Field(1e-5, gt=0, lt=1)
    dp_clip: float = Field(1.0, gt=0, description="L2 norm features are clipped to")
    refresh: int = Field(
        0, ge=0, le=100_000, description="rounds after which clients are asked for their sketches again; 0: never"
    )

    @model_validator(mode="after")
    def _private_sketch_is_statistics(self) -> CELoRAOptions:
        if self.dp_epsilon is not None and self.components:
            raise ValueError(
                f"dp_epsilon with components = {self.components}: a private release holds class statistics, not an EM "
                "fit; allowed: components = 0"
            )
        if self.dp_epsilon is not None and self.refresh:
            raise ValueError(
                f"refresh = {self.refresh} with dp_epsilon: what is released again is paid for again, and is not "
                "counted; allowed: refresh = 0"
            )
        if self.projection and not self.components:
            raise ValueError("projection applies to fitted mixtures; allowed: components >= 1, or projection = 0")
        return self

    @model_validator(mode="after")
    def _a_fitted_head_stays(self) -> CELoRAOptions:
        if self.refresh and self.start == "fitted":
            raise ValueError(
                f'refresh = {self.refresh} with head_start = "fitted": a head that was fitted follows no sketch; '
                'allowed: refresh = 0, or head_start = "zero", "sketched" or "auto"'
            )
        return self

    @model_validator(mode="after")
    def _one_core_for_all(self) -> CELoRAOptions:
        if (self.fedopt != "none" or self.scaffold) and not self.common_core:
            key = "scaffold = true" if self.scaffold else f'fedopt = "{self.fedopt}"'
            raise ValueError(
                f'{key} with similarity = "{self.similarity}" and basis = "{self.basis}": clients have no core in '
                'common; allowed: similarity = "uniform" or "size", with basis = "private" or "frozen"'
            )
        return self

    @property
    def common_core(self) -> bool:
        """Whether the server makes one core for all."""
        return self.similarity in {"uniform", "size"} and self.basis != "aligned"

    @property
    def uses_data(self) -> bool:
        return self.similarity == "data" or (self.similarity == "both" and self.lambda_ > 0)

    @property
    def sends_statistics(self) -> bool:
        return self.head_statistics or (self.uses_data and self.components == 0)


class CELoRA(Method):
    """CE-LoRA and its variants; see the module's text."""

    name = "celora"
    title = "CE-LoRA (core C travels)"
    paper: ClassVar[str | None] = "arXiv:2503.23869"
    core = True
    mixed_ranks = True
    travels = frozenset({"C"})
    combines = frozenset({"proximal", "scaffold", "fedopt"})
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
        if self.options.refresh and len(context.clients) > WHOLE:
            raise MethodError(
                f"method.refresh = {self.options.refresh} with {len(context.clients)} clients, whose sketches the "
                f"server would have to keep; allowed: 0, or at most {WHOLE} clients"
            )

    # -- factors -------------------------------------------------------------------------------------------------

    def initial_factors(self, client: str, rank: int) -> Tensors:
        frozen = self.options.basis == "frozen"
        factors: Tensors = {}
        for name, shape in self.adapter.shapes(rank).items():
            match name[0], frozen:
                case "A", True:
                    factors[name] = self._common_basis(name, shape)[:rank]
                case "B", True:
                    factors[name] = self._common_basis(name, shape)[:, :rank].contiguous()
                case "C", True:
                    factors[name] = torch.zeros(shape)
                case "A", False:
                    factors[name] = gaussian(shape, self.generator(name), self.options.init_std)
                case "B", False:
                    factors[name] = torch.zeros(shape)
                case "C", False:
                    factors[name] = torch.eye(rank)
        return factors

    def _common_basis(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # Drawn at the largest rank and cut: clients of different rank then share their leading directions.
        most = max(self.context.ranks.values())
        full = (most, shape[1]) if name.startswith("A/") else (shape[0], most)
        return orthonormal(full, self.generator(name))

    def trained(self, round: int) -> frozenset[str]:
        return self.trains - {"A", "B"} if self.options.basis == "frozen" else self.trains

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
            if len(self.context.clients) <= WHOLE:
                state |= self._data_similarity(sketches)
            else:
                state |= self._embedding(sketches)
        compared = self._mixes_for_newcomers and self.options.uses_data and len(self.context.clients) <= WHOLE
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

    # -- the round -----------------------------------------------------------------------------------------------

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        cores = self._scaled_cores(messages)  # [K, L, r, r]
        others = [{n: t for n, t in m.tensors.items() if not n.startswith("C/")} for m in messages.values()]
        mean = weighted_mean(others, self.weights(messages))  # a shared head, or nothing
        state = {**state, **{f"global/{name}": tensor for name, tensor in mean.items()}}
        mixing = self._mixing(state, messages, cores)
        if self._mixes_for_newcomers:
            state |= self._last_cores(state, messages, cores)
        if self.options.common_core:
            # One core for all, at the largest rank of all: whoever did not take part gets it too.
            common = torch.einsum("j,jlpq->lpq", self._shares(messages).to(cores.dtype), cores)
            state |= {f"common/C/{s.name}": core.float() for s, core in zip(self.context.sites, common, strict=True)}
        else:
            state |= self._kept(state, messages, self._mix(mixing, messages, cores))
        if "renewal/new" in state:  # they have been told
            state["renewal/new"] = state["renewal/new"].clone()
            state["renewal/new"][self._where(messages)] = False
        return state | self._shown(state, messages, mixing)

    def _kept(self, state: State, messages: Mapping[str, Message], mixed: Tensor) -> State:
        """A row of cores for each client, at its own scale and zero beyond its rank; absent clients keep theirs."""
        where = self._where(messages)
        scales = torch.tensor([self.adapter.scale(self.context.ranks[client]) for client in messages])
        count = len(self.context.clients)
        rows = state.get("mixed/C", torch.zeros(count, *mixed.shape[1:])).clone()
        known = state.get("mixed/known", torch.zeros(count, dtype=torch.bool)).clone()
        rows[where] = (mixed / scales.to(mixed.dtype)[:, None, None, None]).float()
        known[where] = True
        return {"mixed/C": rows, "mixed/known": known}

    def _shown(self, state: State, messages: Mapping[str, Message], mixing: Mixing | None) -> State:
        """Pictures want N x N; clients that were absent keep the row they had."""
        count = len(self.context.clients)
        if count > WHOLE:
            return {}
        matrices: State = {}
        if mixing is not None:
            if mixing.model is not None:
                matrices["similarity/model"] = mixing.model_similarity(mixing.everybody, mixing.everybody)
            matrices["similarity/mixed"] = mixing.similarity(mixing.everybody, mixing.everybody)
        weights = self._weights(messages, mixing)
        where = self._where(messages)
        shown: State = {}
        for name, matrix in {"weights": weights, **matrices}.items():
            full = state.get(name, torch.eye(count)).clone()
            if name == "weights":
                full[where] = 0.0
            full[where[:, None], where] = matrix.float()
            shown[name] = full
        return shown

    def _where(self, messages: Mapping[str, Message]) -> Tensor:
        return torch.tensor([self._position[client] for client in messages])

    def origin(self, state: State) -> Tensors:
        widest = max(self.context.ranks, key=lambda client: self.context.ranks[client])
        s = self.adapter.scale(self.context.ranks[widest])
        cores = {f"common/{n}": s * t for n, t in self.initial(widest).items() if n.startswith("C/")}
        return {**super().origin(state), **cores}

    @property
    def averages(self) -> bool:
        options = self.options
        if options.refresh and options.start != "zero":  # who was heard is who was told
            return False
        return options.common_core and options.similarity == "size" and super().averages

    def _scaled_cores(self, messages: Mapping[str, Message]) -> Tensor:
        """``s_k C_k`` of all layers, zero-padded to the largest rank of all clients: [K, L, r, r]."""
        most = max(self.context.ranks.values())
        dtype = torch.float64 if len(messages) <= WHOLE else torch.float32
        cores = torch.zeros(len(messages), len(self.context.sites), most, most, dtype=dtype)
        for row, (client, message) in zip(cores, messages.items(), strict=True):
            rank = self.context.ranks[client]
            layers = torch.stack([message.tensors[f"C/{site.name}"] for site in self.context.sites]).to(dtype)
            row[:, :rank, :rank] = self.adapter.scale(rank) * layers
        return cores

    def _mixing(self, state: State, messages: Mapping[str, Message], cores: Tensor) -> Mixing | None:
        """Who listens to whom among those who took part; None where similarity plays no part."""
        if self.options.similarity in {"uniform", "size"}:
            return None
        lam = {"data": 1.0, "model": 0.0, "both": self.options.lambda_}[self.options.similarity]
        where = self._where(messages)
        data: Tensor | Embedded | None = None
        if lam > 0 and "similarity/data" in state:
            data = state["similarity/data"][where[:, None], where].to(cores.dtype)
        elif lam > 0:
            points = state["similarity/points"][where].to(cores.dtype)
            data = Embedded(points, state["similarity/placed"][where], float(state["similarity/scale"]))
        model = gram_rows(cores, cores.dtype) if lam < 1 else None
        return Mixing(self.options.temperature, lam, data, model, cores.shape[1])

    def _shares(self, messages: Mapping[str, Message]) -> Tensor:
        """[K] float64: everybody's row, where similarity plays no part."""
        if self.options.similarity == "size":
            return self.weights(messages)
        return torch.full((len(messages),), 1 / len(messages), dtype=torch.float64)

    def _weights(self, messages: Mapping[str, Message], mixing: Mixing | None) -> Tensor:
        """[K, K] rows that sum to one."""
        if mixing is None:
            return self._shares(messages).expand(len(messages), -1)
        return mixing.weights(mixing.everybody)

    def _mix(self, mixing: Mixing | None, messages: Mapping[str, Message], cores: Tensor) -> Tensor:
        """``sum_j w_ij C_j``, [K, L, r, r]; every C_j turned towards C_i first where cores are aligned."""
        if self.options.basis != "aligned":
            assert mixing is not None
            return mixing.mix(cores.flatten(1)).view_as(cores)
        mixed = torch.empty_like(cores)
        for i in range(len(cores)):
            w = self._shares(messages) if mixing is None else mixing.weights(slice(i, i + 1))[0]
            mixed[i] = torch.einsum("j,jlpq->lpq", w.to(cores.dtype), procrustes(cores, cores[i]))
        return mixed

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        """As in the base class; None for similarity among more than a thousand clients, whose matrix nobody holds."""
        if self.options.similarity in {"uniform", "size"}:
            return self._weights(messages, None)
        if len(messages) > WHOLE:
            return None
        return self._weights(messages, self._mixing(state, messages, self._scaled_cores(messages)))

    @property
    def must_read(self) -> tuple[str, str] | None:
        options, found = self.options, super().must_read
        if options.scaffold or options.fedopt != "none":
            return found
        if len(set(self.context.ranks.values())) > 1:
            return f"adapter.rank = {sorted(set(self.context.ranks.values()))}", "one rank for all"
        if options.refresh:
            return f"method.refresh = {options.refresh}", "refresh = 0"
        if options.basis == "aligned":
            return 'method.basis = "aligned"', 'basis = "private" or "frozen"'
        if options.similarity == "model" or (options.similarity == "both" and options.lambda_ < 1):
            return f'method.similarity = "{options.similarity}"', 'similarity = "data", "uniform" or "size"'
        return None

    def blind_mixing(self, state: State, clients: Sequence[str], weights: Tensor) -> Tensor:
        unread = dict.fromkeys(clients, Message())
        if self.options.common_core:
            return weights if self.options.similarity == "size" else self._shares(unread)
        dtype = torch.float64 if len(clients) <= WHOLE else torch.float32
        mixing = self._mixing(state, unread, torch.empty(len(clients), len(self.context.sites), 0, 0, dtype=dtype))
        return self._weights(unread, mixing)

    def reply(self, state: State, client: str) -> Message | None:
        tensors = {name.removeprefix("global/"): t for name, t in state.items() if name.startswith("global/")}
        rank, position = self.context.ranks[client], self._position[client]
        if f"common/C/{self.context.sites[0].name}" in state:
            for site in self.context.sites:
                core = state[f"common/C/{site.name}"]
                tensors[f"C/{site.name}"] = core[:rank, :rank].contiguous() / self.adapter.scale(rank)
        elif position < len(state.get("mixed/known", ())) and bool(state["mixed/known"][position]):
            rows = state["mixed/C"][position, :, :rank, :rank]
            tensors |= {f"C/{s.name}": core.clone() for s, core in zip(self.context.sites, rows, strict=True)}
        new = state.get("renewal/new", torch.empty(0, 0))
        if position < len(new) and bool(new[position].any()):
            tensors |= renewals(state, new[position])
        return Message(tensors) if tensors else None

    def receive(self, client: Client, message: Message) -> None:
        renewal = Renewal.of(message.tensors, self.context.classes)
        told = {name: t for name, t in message.tensors.items() if kind(name) not in {"start", "new"}}
        client.tensors.update(told)
        if renewal is None or torch.equal(client.notes.get(TAKEN, torch.empty(0)), renewal.bias):
            return
        epochs = self.rounds() * self.context.local_epochs
        head = renewal.head(client, self.context, chosen=self.options.start == "auto", epochs=epochs)
        client.tensors.update(head)
        client.notes[TAKEN] = renewal.bias.clone()

    # -- who joins late ------------------------------------------------------------------------------------------

    @property
    def _mixes_for_newcomers(self) -> bool:
        """Whether a newcomer gets a mix of its own: cores of others say something to it, and differ."""
        return self.context.newcomers and self.options.basis == "frozen" and not self.options.common_core

    @property
    def newcomer_lacks(self) -> str | None:
        lacks = super().newcomer_lacks
        if lacks is None and self.options.basis != "frozen":
            return "cores: those of the others mean nothing without their own A and B"
        return lacks

    def _last_cores(self, state: State, messages: Mapping[str, Message], cores: Tensor) -> State:
        """``s_k C_k`` as each client last sent it, [N, L, r, r]; zero where it never did."""
        count = len(self.context.clients)
        last = state.get("newcomers/C", torch.zeros(count, *cores.shape[1:])).clone()
        last[self._where(messages)] = cores.float()
        return {"newcomers/C": last}

    def newcomer(self, state: State, client: str, sketch: Message | None) -> tuple[Message | None, Message | None]:
        """The last cores of the others by the newcomer's data similarity to them: ``sum_j softmax_j(S_j / T) C_j`` over
        all who ever sent one [recon]. Where data play no part, or say nothing, that is their mean.

        Bases that stay home make others' cores meaningless: then only the head is there.
        """
        welcome, reply = super().newcomer(state, client, sketch)
        if not self._mixes_for_newcomers:
            if reply is None or self.options.basis == "frozen":
                return welcome, reply
            heads = {name: tensor for name, tensor in reply.tensors.items() if not name.startswith("C/")}
            return welcome, Message(heads) if heads else None
        if "newcomers/C" not in state:
            return welcome, reply
        known = state["mixed/known"]
        shares = torch.softmax(self._similarity_to(state, sketch)[known] / self.options.temperature, dim=0)
        mixed = torch.einsum("j,jlpq->lpq", shares, state["newcomers/C"][known].double())
        rank = self.context.ranks[client]
        mixed = (mixed[:, :rank, :rank] / self.adapter.scale(rank)).float()
        cores = {f"C/{s.name}": core.clone() for s, core in zip(self.context.sites, mixed, strict=True)}
        return welcome, Message({**(reply.tensors if reply else {}), **cores})

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

    def insight(self, state: State) -> Tensors:
        names = ("similarity/data", "similarity/model", "similarity/mixed", "weights")
        return {name: state[name] for name in names if name in state}


def procrustes(cores: Tensor, reference: Tensor) -> Tensor:
    """Each core rotated as near the reference as an orthogonal R can bring it: ``min_R ||R C_j - C_ref||_F`` [recon].

    Parameters
    ----------
    cores
        [N, L, r, r].
    reference
        [L, r, r].
    """
    u, _, v = torch.linalg.svd(reference @ cores.transpose(-1, -2))
    rotated: Tensor = (u @ v) @ cores
    return rotated
