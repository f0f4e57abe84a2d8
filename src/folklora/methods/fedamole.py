"""FedAMoLE: mixtures of LoRA experts, and experts that choose their clients. arXiv 2411.19128.

1. Every adapted layer has E domain experts and a shared one, each a LoRA pair of rank r. A client holds the shared
  expert and some of the others: ``y = W0 x + s B_0 A_0 x + s sum_e p_e B_e A_e x`` over the top 2 of its own [code;
  `folklora.adapters.mixture`]. What is minimised is the loss plus ``balance`` times the load balance
  ``n sum_e P_e f_e`` of each layer, summed [code]; tokens that pad a row count in neither [ours].
2. Clients train and send the experts they hold, the shared one and the token projection W_t [code]. The server takes
  the plain mean of W_t and of the shared expert, and of expert e over its holders [code]; an expert that nobody sent is
  unchanged [recon]. ``weights = "size"`` weighs by examples [ours].
3. With them go ``token`` t_k = mean W_t x and ``embedding`` u_ke = mean A_e x over at most ``probe`` examples under the
  client's own trained model [code: of a split of its own, 5 %; here: of the validation split]. They are products with
  the mean input, which is the same. u_e is the mean over holders [code], kept until somebody sends it again [recon].
4. Each round, in each layer: ``P = softmax over clients of u_e . t_k / sqrt(r)``; the experts go to the clients that
  make ``sum P X`` largest, each expert to ``holders`` clients, each client with ``min_experts`` to ``max_experts``
  [code: 2; 2 to 8]. It is solved exactly (`folklora.methods.assignment`). Clients that were never heard have t = 0
  [recon]. ``assignment = "random"`` and ``"static"`` are the authors' ablations [code].
5. The first assignment is by chance [code], and even; experts start as LoRA does. Both follow from the seed and cost no
  byte [recon]. E is 30 of 10 clients [code], and in proportion for other numbers of clients [recon].
6. Head and LayerNorms, where there are any, are averaged by examples [recon].

``experts = "cores"`` [ours]: A and B are frozen, orthonormal and common to all, as FolkLoRA's; experts are cores C_e
[r, r], which are all that travels of them. The shared core starts at zero, the others at N(0, 1e-3^2): cores of zero
would be indistinguishable to the router.

A reply holds the blocks of a client's experts in the order of their numbers, which the client need not know: what it
sends back is in the same order. A client that takes part in no round gets the shared expert. With
``train.optimizer_state = "kept"`` moments belong to a slot, where the next round may put another expert: fresh moments
are meant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors, gaussian, kaiming, kind, orthonormal, select
from folklora.adapters.mixture import CoreMixture, Mixture, blocks_of, joined
from folklora.methods.aggregation import weighted_mean
from folklora.methods.assignment import assign, dealt, refuse_infeasible
from folklora.methods.base import Method, blank
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.fedit import FedITOptions
from folklora.methods.options import Options
from folklora.randomness import torch_generator

HELD = 6
"""Experts of a client, on average, unless the recipe says otherwise [code: 30 experts at 2 of 10 clients]."""
CORE_STD = 1e-3


class FedAMoLEOptions(FedITOptions):
    experts: Literal["lora", "cores"] = Field("lora", description="pairs of factors, or cores in a common frame")
    domain_experts: int | None = Field(
        None, ge=1, le=4096, description="E of each layer; default: so many that a client holds 6 on average"
    )
    holders: int | None = Field(None, ge=1, description="clients of each expert; default: 2")
    min_experts: int = Field(2, ge=1, le=256, description="that a client holds in a layer")
    max_experts: int = Field(8, ge=1, le=256, description="likewise")
    top_k: int = Field(2, ge=1, le=256, description="experts that a token takes")
    balance: float = Field(1e-3, ge=0, description="weight of the load balance in the loss")
    assignment: Literal["selected", "random", "static"] = Field(
        "selected", description="experts choose clients each round; chance each round; chance once"
    )
    probe: int = Field(200, ge=1, description="at most so many validation examples tell what a client is like")
    weights: Literal["equal", "size"] = Field("equal", description="of the holders of an expert")

    @model_validator(mode="after")
    def _bounds(self) -> FedAMoLEOptions:
        if self.min_experts > self.max_experts:
            raise ValueError(
                f"min_experts = {self.min_experts} exceeds max_experts = {self.max_experts}; allowed: at most that"
            )
        return self


class FedAMoLE(Method):
    """Means over the holders of each expert, and a new assignment every round."""

    name = "fedamole"
    title = "FedAMoLE (mixture of experts)"
    paper = "arXiv:2411.19128"
    takes_means = False
    trains = frozenset({"A", "B", "T", "head", "norm"})
    travels = frozenset({"A", "B", "T", "norm"})
    combines = frozenset({"proximal"})
    options_type = FedAMoLEOptions
    options: FedAMoLEOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        own, clients = self.options, len(context.clients)
        self.holders = min(2, clients) if own.holders is None else own.holders
        self.count = self._default_count(clients) if own.domain_experts is None else own.domain_experts
        if context.rounds:
            refuse_infeasible(self.count, clients, self.holders, own.min_experts, own.max_experts)
        mixture = CoreMixture if own.experts == "cores" else Mixture
        self.adapter: Mixture = mixture(
            context.sites,
            False,
            context.alpha,
            context.dropout,
            slots=self._slots(),
            top=own.top_k,
            balance=own.balance,
        )
        self.position = {client: i for i, client in enumerate(context.clients)}

    def _default_count(self, clients: int) -> int:
        own = self.options
        each = min(max(HELD, own.min_experts), own.max_experts)
        count = each * clients // self.holders
        return max(1, count if count * self.holders >= own.min_experts * clients else count + 1)

    def _slots(self) -> int:
        """Of each client. Newcomers have the adapter of those who play, and do not know how many experts there are
        where that follows from how many play."""
        own = self.options
        unknown = self.context.newcomers and own.domain_experts is None
        return own.max_experts if unknown else min(own.max_experts, self.count)

    @property
    def expert_rank(self) -> int:
        """r of one expert."""
        return next(iter(self.context.ranks.values()))

    def rank(self, state: State, client: str) -> int:
        return self.adapter.stacked(self.expert_rank)

    # -- the start -----------------------------------------------------------------------------------------------

    @cached_property
    def _start(self) -> Tensors:
        """All experts as they are before the first round, block 0 the shared one, and what is common beside them."""
        found: Tensors = {}
        rank = self.expert_rank
        for site in self.context.sites:
            a, b, t = (f"{factor}/{site.name}" for factor in "ABT")
            if self.options.experts == "lora":
                found[a] = kaiming(((1 + self.count) * rank, site.d_in), self.generator(a)).unflatten(0, (-1, rank))
                found[b] = torch.zeros(1 + self.count, site.d_out, rank)
                found[t] = kaiming((rank, site.d_in), self.generator(t))
            else:
                found[a] = orthonormal((rank, site.d_in), self.generator(a))
                found[b] = orthonormal((site.d_out, rank), self.generator(b))
                e = f"E/{site.name}"
                found[e] = gaussian((1 + self.count, rank, rank), self.generator(e), CORE_STD)
                found[e][0] = 0.0
                found[t] = kaiming((rank, rank), self.generator(t))
        return found

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        """Site -> [E, N] bool; by the clients' names, so that it does not depend on their order."""
        ranked = sorted(self.position)
        columns = torch.tensor([ranked.index(client) for client in self.position])
        return {site.name: self._dealt(f"experts/{site.name}", 0)[:, columns] for site in self.context.sites}

    def _dealt(self, purpose: str, round: int) -> Tensor:
        random = torch_generator(self.context.seed, purpose, round=round)
        return dealt(self.count, len(self.position), self.holders, random)

    def initial_factors(self, client: str, rank: int) -> Tensors:
        tensors: Tensors = {}
        for site in self.context.sites:
            held = self._first[site.name][:, self.position[client]].nonzero().flatten()
            for factor in self.adapter.factors:
                name = f"{factor}/{site.name}"
                if factor == "live":
                    tensors[name] = torch.zeros(self.adapter.slots)
                    tensors[name][: len(held)] = 1.0
                elif factor in self.adapter.expert_kinds:
                    shared, others = self._start[name][:1], self._start[name][1:]
                    tensors[name] = self._seated(name, torch.cat([shared, others[held]]))
                else:
                    tensors[name] = self._start[name].clone()
        return tensors

    def _seated(self, name: str, blocks: Tensor) -> Tensor:
        """A client's tensor with these blocks in it, and nothing in the other slots."""
        whole = blocks.new_zeros(1 + self.adapter.slots, *blocks.shape[1:])
        whole[: len(blocks)] = blocks
        return joined(name, whole)

    # -- at the client -------------------------------------------------------------------------------------------

    def trained(self, round: int) -> frozenset[str]:
        return (self.trains - {"A", "B"}) | set(self.adapter.expert_kinds)

    def shared(self, round: int) -> frozenset[str]:
        return (super().shared(round) - {"A", "B"}) | set(self.adapter.expert_kinds)

    def send(self, round: int, client: Client) -> Message:
        tensors = select(client.tensors, self.shared(round))
        for site in self.context.sites:
            held = int(client.tensors[f"live/{site.name}"].sum())
            for name in self._expert_names(site.name):
                tensors[name] = joined(name, blocks_of(name, tensors[name], self.expert_rank)[: 1 + held])
        if self.options.assignment == "selected":
            inputs = client.data.layer_inputs(client.tensors, self.options.probe)
            for site in self.context.sites:
                token, experts = self.adapter.embeddings(client.tensors, site.name, inputs[f"input/{site.name}"])
                tensors |= {f"token/{site.name}": token, f"embedding/{site.name}": experts}
        return Message(tensors, {"examples": client.examples})

    def receive(self, client: Client, message: Message) -> None:
        tensors = dict(message.tensors)
        for site in self.context.sites:
            for name in self._expert_names(site.name):
                if name in tensors:
                    blocks = blocks_of(name, tensors[name], self.expert_rank)
                    tensors[name] = self._seated(name, blocks)
                    live = torch.zeros(self.adapter.slots)
                    live[: len(blocks) - 1] = 1.0
                    tensors[f"live/{site.name}"] = live
        client.tensors.update(tensors)

    def known(self, round: int, client: str, told: Tensors, message: Message) -> Tensors:
        """Of experts: what was told, whose order is that of the message, or the start of those first held."""
        known = dict(super().known(round, client, told, message))
        for name, tensor in message.tensors.items():
            if kind(name) in self.adapter.expert_kinds and name not in told and name in known:
                sent = len(blocks_of(name, tensor, self.expert_rank))
                known[name] = joined(name, blocks_of(name, known[name], self.expert_rank)[:sent])
        return known

    def repays(self, name: str) -> bool:
        """Not of experts: in the next round their places may be others'."""
        return kind(name) not in self.adapter.expert_kinds or self.options.assignment == "static"

    @property
    def beside_training(self) -> tuple[str, str] | None:
        if self.options.assignment == "selected":
            return 'assignment = "selected"', 'assignment = "static" or "random"'
        return super().beside_training

    # -- at the server -------------------------------------------------------------------------------------------

    def _expert_names(self, site: str) -> tuple[str, ...]:
        return tuple(f"{factor}/{site}" for factor in self.adapter.expert_kinds)

    def assigned(self, state: State, site: str) -> Tensor:
        """[E, N] bool: who holds which expert of a layer now."""
        return state.get(f"assigned/{site}", self._first[site])

    def held(self, state: State, client: str, site: str) -> Tensor:
        """[n] int64: a client's experts, ascending; none of one that the state knows nothing of (a newcomer)."""
        place = self.position[client]
        return self.assigned(state, site)[:, place : place + 1].any(1).nonzero().flatten()

    def expected(self, round: int, state: State, client: str) -> Shapes:
        shapes, rank = super().expected(round, state, client), self.expert_rank
        for site in self.context.sites:
            held = len(self.held(state, client, site.name))
            shapes |= self._shapes(site.name, held)
            if self.options.assignment == "selected":
                shapes |= {f"token/{site.name}": (rank,), f"embedding/{site.name}": (held, rank)}
        return shapes

    def _shapes(self, site: str, held: int) -> Shapes:
        """Of the shared expert and so many others."""
        blocks = {name: self._start[name][: 1 + held] for name in self._expert_names(site)}
        return {name: tuple(joined(name, block).shape) for name, block in blocks.items()}

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        by_size = self.weights(messages)
        shares = by_size if self.options.weights == "size" else torch.full_like(by_size, 1 / len(messages))
        parts = {frozenset({"head", "norm"}): by_size, frozenset({"T"}): shares}
        mean: Tensors = {}
        for kinds, weights in parts.items():
            mean |= weighted_mean([select(message.tensors, kinds) for message in messages.values()], weights)
        state = {**state, **{f"global/{name}": tensor for name, tensor in mean.items()}}
        for site in self.context.sites:
            held = [self.held(state, client, site.name) for client in messages]
            for name in self._expert_names(site.name):
                sent = [blocks_of(name, message.tensors[name], self.expert_rank) for message in messages.values()]
                start = self._start[name]
                before = state.get(f"experts/{name}", start[1:])
                state[f"experts/{name}"] = holders_mean([blocks[1:] for blocks in sent], held, shares, before)
                common = weighted_mean([{name: blocks[0]} for blocks in sent], shares)
                state[f"shared/{name}"] = common[name]
            if self.options.assignment == "selected":
                state |= self._told(state, site.name, messages, held, shares)
            state[f"assigned/{site.name}"] = self._next(round, state, site.name)
        return state

    @property
    def counts_examples(self) -> bool:
        others = (kind(name) in {"head", "norm"} for name in super().expected(1, {}, self.context.clients[0]))
        return self.options.weights == "size" or any(others)

    def _told(
        self, state: State, site: str, messages: Mapping[str, Message], held: list[Tensor], shares: Tensor
    ) -> State:
        """What is known of clients and of experts after these messages: ``token`` [N, r], ``embedding`` [E, r]."""
        rank = self.expert_rank
        tokens = state.get(f"token/{site}", torch.zeros(len(self.position), rank)).clone()
        for client, message in messages.items():
            tokens[self.position[client]] = message.tensors[f"token/{site}"]
        before = state.get(f"embedding/{site}", torch.zeros(self.count, rank))
        sent = [message.tensors[f"embedding/{site}"] for message in messages.values()]
        return {f"token/{site}": tokens, f"embedding/{site}": holders_mean(sent, held, shares, before)}

    def _next(self, round: int, state: State, site: str) -> Tensor:
        match self.options.assignment:
            case "static":
                return self._first[site].clone()
            case "random":
                return self._dealt(f"experts/{site}", round)
        scores = state[f"embedding/{site}"].double() @ state[f"token/{site}"].double().T
        wanted = torch.softmax(scores / math.sqrt(self.expert_rank), dim=1)
        return assign(wanted, self.holders, self.options.min_experts, self.options.max_experts)

    def mixing(self, state: State, messages: Mapping[str, Message]) -> None:
        """Nothing: updates of mixtures are no matrices, and have no mean."""

    def reply(self, state: State, client: str) -> Message | None:
        message = super().reply(state, client)
        if f"assigned/{self.context.sites[0].name}" not in state:
            return message
        assert message is not None  # whoever has an assignment has a mean of W_t
        held = {site.name: self.held(state, client, site.name) for site in self.context.sites}
        return Message({**message.tensors, **self._blocks(state, held)})

    def _blocks(self, state: State, held: Mapping[str, Tensor]) -> Tensors:
        """The shared expert and these others, as a client takes them."""
        found: Tensors = {}
        for site, experts in held.items():
            for name in self._expert_names(site):
                shared, others = state[f"shared/{name}"][None], state[f"experts/{name}"][experts]
                found[name] = joined(name, torch.cat([shared, others]))
        return found

    def typical_reply(self, round: int, client: str) -> Message | None:
        """As if experts stayed as evenly spread as at first; over all clients their number is the same in any case."""
        shapes = self.expected(round, {}, client)
        return Message(blank({n: shape for n, shape in shapes.items() if kind(n) not in {"token", "embedding"}}))


def holders_mean(sent: list[Tensor], held: list[Tensor], weights: Tensor, before: Tensor) -> Tensor:
    """The mean of each expert over the clients that sent it; of one that nobody sent, what it was before.

    Parameters
    ----------
    sent
        Of each client, [n_k, ...]: its experts.
    held
        Of each client, [n_k] int64: which they are, each once.
    weights
        [K], positive; they need not sum to one.
    before
        [E, ...].

    Returns
    -------
    Tensor
        [E, ...] float32, accumulated in float64.
    """
    total, mass = torch.zeros_like(before, dtype=torch.float64), torch.zeros(len(before), dtype=torch.float64)
    for blocks, experts, weight in zip(sent, held, weights.double(), strict=True):
        total[experts] += weight * blocks.double()
        mass[experts] += weight
    shape = (-1, *[1] * (before.dim() - 1))
    mean = total / torch.where(mass > 0, mass, 1.0).view(shape)
    return torch.where((mass > 0).view(shape), mean, before.double()).float()
