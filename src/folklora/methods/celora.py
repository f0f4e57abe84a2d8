"""CE-LoRA: tri-matrix adapters, and a mix of cores of its own for every client. arXiv 2503.23869 (IEEE TMM 2026).

1. ``y = W0 x + s B C A x``. A ~ N(0, 1e-3^2), B = 0, C = I; A, B, C and the head all train [code].
2. Only C travels [paper]; A, B, the head (and LayerNorms) never leave the client.
3. Once, each client fits a Gaussian mixture per class on frozen features and sends it [paper, code: 3 components,
  diagonal].
4. Data similarity: optimal transport between the clients' mixtures [paper: GMM + OT; distances to similarities: recon].
5. Model similarity: linear CKA of the cores [paper names CKA; averaging over layers: recon].
6. ``S = lambda S_data + (1 - lambda) S_model``; client i gets ``sum_j softmax_j(S_ij / T) C_j``, itself included
   [lambda, T, softmax: recon].

Where ranks differ, cores are mixed zero-padded and truncated on the way down [recon]; what is mixed is ``s_k C_k``, so
that the scaling alpha / rank of each client is respected [recon].

Ours beside the published: ``basis = "frozen"`` (A, B orthonormal, from the seed, common to all and never trained; C
starts at zero; then the mean of cores is exact) and ``basis = "aligned"`` (each core is rotated to the receiver's by
orthogonal Procrustes before mixing), ``similarity = "uniform" | "size"`` (plain and example-weighted means), a
differentially private sketch, and mixtures read off the class statistics (``components = 0``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import Tensors, gaussian, orthonormal
from folklora.data.mixtures import ClassMixtures, projection
from folklora.data.release import release_statistics
from folklora.data.statistics import ClassStatistics
from folklora.errors import MethodError
from folklora.methods.aggregation import weighted_mean
from folklora.methods.base import (
    Client,
    Context,
    Message,
    Method,
    Options,
    State,
    refuse_other_prefixes,
    statistics_tensors,
)
from folklora.methods.cka import linear_cka
from folklora.methods.transport import data_distances, similarity
from folklora.randomness import derive, torch_generator


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

    @model_validator(mode="after")
    def _private_sketch_is_statistics(self) -> CELoRAOptions:
        if self.dp_epsilon is not None and self.components:
            raise ValueError(
                f"dp_epsilon with components = {self.components}: a private release holds class statistics, not an EM "
                "fit; allowed: components = 0"
            )
        if self.projection and not self.components:
            raise ValueError("projection applies to fitted mixtures; allowed: components >= 1, or projection = 0")
        return self

    @property
    def uses_data(self) -> bool:
        return self.similarity == "data" or (self.similarity == "both" and self.lambda_ > 0)

    @property
    def sends_statistics(self) -> bool:
        return self.start != "zero" or (self.uses_data and self.components == 0)


class CELoRA(Method):
    """CE-LoRA and its variants; see the module's text."""

    name = "celora"
    title = "CE-LoRA (core C travels)"
    paper: ClassVar[str | None] = "arXiv:2503.23869"
    core = True
    mixed_ranks = True
    travels = frozenset({"C"})
    options_type: ClassVar[type[Options]] = CELoRAOptions
    options: CELoRAOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        if self.options.projection > context.width:
            raise MethodError(
                f"method.projection = {self.options.projection} exceeds the features' width; "
                f"allowed: 0 (none) to {context.width}"
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

    # -- the one-off sketch --------------------------------------------------------------------------------------

    def sketch(self, client: Client) -> Message | None:
        tensors: Tensors = {}
        if self.options.sends_statistics:
            tensors |= statistics_tensors(self.statistics(client))
        if self.options.uses_data and self.options.components:
            tensors |= {f"mixture/{name}": t for name, t in self._mixtures(client).to_tensors().items()}
        return Message(tensors) if tensors else None

    def statistics(self, client: Client) -> ClassStatistics:
        if self.options.dp_epsilon is None:
            return super().statistics(client)
        features, labels = client.data.features("train")
        noise = torch_generator(client.secret, "release", client.id)
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
            state["similarity/data"] = self._data_similarity(sketches).float()
        return state

    def _data_similarity(self, sketches: Mapping[str, Message]) -> Tensor:
        """[N, N] over all clients; one that never sent a sketch is like itself only."""
        clients = self.context.clients
        known = [i for i, client in enumerate(clients) if client in sketches]
        mixtures = [self._read_mixtures(sketches[clients[i]]) for i in known]
        full = torch.eye(len(clients), dtype=torch.float64)
        where = torch.tensor(known, dtype=torch.long)
        full[where[:, None], where] = similarity(data_distances(mixtures))
        return full

    def _read_mixtures(self, message: Message) -> ClassMixtures:
        if self.options.components == 0:
            return ClassMixtures.from_statistics(self.read_statistics(message))
        prefix = "mixture/"
        own = {name.removeprefix(prefix): t for name, t in message.tensors.items() if name.startswith(prefix)}
        width = self.options.projection or self.context.width
        return ClassMixtures.from_tensors(own, self.context.classes, width, self.options.components)

    # -- the round -----------------------------------------------------------------------------------------------

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        ids = list(messages)
        cores = self._scaled_cores(messages)  # [K, L, r, r]
        weights, similarities = self._weights(state, messages, cores)
        mixed = self._mix(weights, cores)
        others = [{n: t for n, t in m.tensors.items() if not n.startswith("C/")} for m in messages.values()]
        mean = weighted_mean(others, self.weights(messages))  # a shared head, or nothing
        state = {**state, **{f"global/{name}": tensor for name, tensor in mean.items()}}
        if self.options.similarity in {"uniform", "size"} and self.options.basis != "aligned":
            # One core for all, at the largest rank of all: whoever did not take part gets it too.
            for site, core in zip(self.context.sites, mixed[0], strict=True):
                state[f"common/C/{site.name}"] = core.float()
        else:
            for i, client in enumerate(ids):
                rank = self.context.ranks[client]
                for site, core in zip(self.context.sites, mixed[i], strict=True):
                    state[f"mixed/{client}/C/{site.name}"] = (core[:rank, :rank] / self.adapter.scale(rank)).float()
        # Pictures want N x N; clients that were absent keep the row they had.
        where = torch.tensor([self.context.clients.index(client) for client in ids])
        for name, matrix in {"weights": weights, **similarities}.items():
            full = state.get(name, torch.eye(len(self.context.clients))).clone()
            if name == "weights":
                full[where] = 0.0
            full[where[:, None], where] = matrix.float()
            state[name] = full
        return state

    def _scaled_cores(self, messages: Mapping[str, Message]) -> Tensor:
        """``s_k C_k`` of all layers, zero-padded to the largest rank of all clients: [K, L, r, r] float64."""
        most = max(self.context.ranks.values())
        stacks = []
        for client, message in messages.items():
            rank = self.context.ranks[client]
            missing = most - rank
            layers = torch.stack([message.tensors[f"C/{site.name}"] for site in self.context.sites]).double()
            stacks.append(self.adapter.scale(rank) * F.pad(layers, (0, missing, 0, missing)))
        return torch.stack(stacks)

    def _weights(
        self, state: State, messages: Mapping[str, Message], cores: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[K, K] rows that sum to one, and the similarities they were made of."""
        count = len(messages)
        if self.options.similarity == "uniform":
            return torch.full((count, count), 1 / count, dtype=torch.float64), {}
        if self.options.similarity == "size":
            return self.weights(messages).expand(count, -1).clone(), {}
        where = torch.tensor([self.context.clients.index(client) for client in messages])
        shown: dict[str, Tensor] = {}
        lam = {"data": 1.0, "model": 0.0, "both": self.options.lambda_}[self.options.similarity]
        mixed = torch.zeros(count, count, dtype=torch.float64)
        if lam > 0:
            mixed += lam * state["similarity/data"][where[:, None], where].double()
        if lam < 1:
            shown["similarity/model"] = linear_cka(cores)
            mixed += (1 - lam) * shown["similarity/model"].double()
        shown["similarity/mixed"] = mixed
        return torch.softmax(mixed / self.options.temperature, dim=1), shown

    def _mix(self, weights: Tensor, cores: Tensor) -> Tensor:
        if self.options.basis != "aligned":
            return torch.einsum("ij,jlpq->ilpq", weights, cores)
        mixed = torch.empty_like(cores)
        for i in range(len(cores)):
            mixed[i] = torch.einsum("j,jlpq->lpq", weights[i], procrustes(cores, cores[i]))
        return mixed

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        where = torch.tensor([self.context.clients.index(client) for client in messages])
        return state["weights"][where[:, None], where]

    def reply(self, state: State, client: str) -> Message | None:
        tensors = {name.removeprefix("global/"): t for name, t in state.items() if name.startswith("global/")}
        own, rank = f"mixed/{client}/", self.context.ranks[client]
        if f"common/C/{self.context.sites[0].name}" in state:
            for site in self.context.sites:
                core = state[f"common/C/{site.name}"]
                tensors[f"C/{site.name}"] = core[:rank, :rank].contiguous() / self.adapter.scale(rank)
        else:
            tensors |= {name.removeprefix(own): tensor for name, tensor in state.items() if name.startswith(own)}
        return Message(tensors) if tensors else None

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
