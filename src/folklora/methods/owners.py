"""Averaging over owners, and the frame of every method whose clients own different rank-1 pairs of one adapter.

An adapter of rank r is a sum of r pairs, ``B A = sum_i b_i a_i^T`` (column i of B, row i of A). Where clients differ in
rank some pairs have few owners, and methods differ in what the others count as having there.

1. The server keeps R pairs per layer, R the largest rank there is. A starts as every client knows it from the seed,
   B = 0; a pair that nobody trained yet is that start [recon: at zero in A and B at once it could never train].
2. Scales go with ranks, ``s_k = alpha / r_k``. What is averaged is ``s_k B_k``, and the receiver's own s divides what
   comes down, so that an update is the same function at whatever rank it is held [recon].
3. The head and LayerNorms are averaged by examples [recon where a paper is silent].
4. With ``adapter.promote``, the best of the clients first validated get that rank [arXiv 2406.17477: all at rank 5 for
   one round, the best 10 % then at 20]: their next reply is wider. Where nobody was that wide before, the new rows of A
   are the common start's and the new columns of B zero, so a wider client computes what it would have computed
   [recon].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from folklora.adapters.lowrank import Site, Tensors, kind
from folklora.methods.aggregation import weighted_mean
from folklora.methods.base import Method
from folklora.methods.contract import Message, State
from folklora.methods.fedit import FedITOptions
from folklora.methods.options import Options

Chosen = dict[str, Tensor]
"""Some of the pairs of each site: [m] int64, ascending."""


def owners_mean(values: Tensor, weights: Tensor, owned: Tensor, otherwise: Tensor) -> Tensor:
    """Weighted mean of each row over the clients that own it: ``sum_{k owns i} w_k v_ki / sum_{k owns i} w_k``.

    Parameters
    ----------
    values
        [K, R, d]; rows that a client does not own may hold anything finite.
    weights
        [K], not negative; they need not sum to one.
    owned
        [K, R] bool.
    otherwise
        [R, d]: what a row becomes that nobody owns.

    Returns
    -------
    Tensor
        [R, d] float64.
    """
    shares = weights.double()[:, None] * owned
    total = shares.sum(0)
    mean = torch.einsum("kr,krd->rd", shares / torch.where(total > 0, total, 1.0), values.double())
    return torch.where((total > 0)[:, None], mean, otherwise.double())


class Pairs(Method):
    """Clients own some of the server's pairs: a subclass says which (`owned`), and how they are averaged (`combine`).

    The server's state holds ``global/A/<site>`` [R, d_in] and ``global/B/<site>`` [d_out, R] at scale alpha / R, and
    ``ranks`` [N] int32 once a rank has changed.
    """

    mixed_ranks = True
    has_global_model = True
    takes_means = False
    travels = frozenset({"A", "B", "norm"})
    combines = frozenset({"proximal", "fedopt"})
    options_type: ClassVar[type[Options]] = FedITOptions

    @cached_property
    def most(self) -> int:
        """R."""
        return max(*self.context.ranks.values(), self.context.promote or 1)

    def initial_factors(self, client: str, rank: int) -> Tensors:
        """LoRA's start, drawn at the largest rank and cut, so that clients agree on every pair that both own."""
        return cut(self._start(), self.held(client, rank))

    def _start(self) -> Tensors:
        return super().initial_factors("", self.most)

    def held(self, client: str, rank: int) -> Chosen:
        """The pairs of a client of this rank while nothing else is known; default: the first ones."""
        return {site.name: torch.arange(rank) for site in self.context.sites}

    # -- the server ----------------------------------------------------------------------------------------------

    def owned(self, state: State, client: str, message: Message) -> Chosen:
        """The pairs that the first rows of a message's factors are; default: those of the client's rank."""
        return self.held(client, self.rank(state, client))

    def combine(self, values: Tensor, weights: Tensor, owned: Tensor, before: Tensor) -> Tensor:
        """One site's new pairs, [R, d] float64.

        Parameters
        ----------
        values
            [K, R, d] float64: the clients' pairs, zero where a client owns none; d = d_in + d_out.
        weights
            [K] float64, summing to one.
        owned
            [K, R] bool.
        before
            [R, d] float64: the server's.
        """
        raise NotImplementedError

    def factor_weights(self, state: State, messages: Mapping[str, Message]) -> Tensor:
        """[K] float64, summing to one: the weights of the clients' pairs; default: by examples."""
        return self.weights(messages)

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        others = [{n: t for n, t in m.tensors.items() if kind(n) in {"head", "norm"}} for m in messages.values()]
        new = weighted_mean(others, self.weights(messages))
        weights = self.factor_weights(state, messages)
        owned = [self.owned(state, client, message) for client, message in messages.items()]
        scales = [self.most / self.rank(state, client) for client in messages]  # s_k over the server's own
        before = self.pairs(state)
        for site in self.context.sites:
            has = torch.zeros(len(messages), self.most, dtype=torch.bool)
            values = torch.zeros(len(messages), self.most, site.d_in + site.d_out, dtype=torch.float64)
            for k, message in enumerate(messages.values()):
                rows = owned[k][site.name]
                has[k, rows] = True
                values[k, rows] = side_by_side(message.tensors, site, scales[k])[: len(rows)]
            mean = self.combine(values, weights, has, side_by_side(before, site, 1.0)).float()
            new[f"A/{site.name}"] = mean[:, : site.d_in].contiguous()
            new[f"B/{site.name}"] = mean[:, site.d_in :].T.contiguous()
        return {**state, **{f"global/{name}": tensor for name, tensor in new.items()}}

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        return self.factor_weights(state, messages).expand(len(messages), -1)

    def aggregated(self, state: State) -> bool:
        """Whether any round has been; before, the server may have a sketched head but no pairs."""
        return f"global/A/{self.context.sites[0].name}" in state

    def pairs(self, state: State) -> Tensors:
        """The server's R pairs."""
        if not self.aggregated(state):
            return self._start()
        return {name: state[f"global/{name}"] for name in self.adapter.shapes(self.most)}

    def reply(self, state: State, client: str) -> Message | None:
        """What is common to all, and the client's pairs at its own rank and scale."""
        message = super().reply(state, client)
        if message is None or not self.aggregated(state):
            return message
        scale = self.rank(state, client) / self.most
        factors = cut(self.pairs(state), self.given(state, client))
        return Message({**message.tensors, **{n: scale * t if kind(n) == "B" else t for n, t in factors.items()}})

    def origin(self, state: State) -> Tensors:
        return {**super().origin(state), **{f"global/{name}": tensor for name, tensor in self._start().items()}}

    def given(self, state: State, client: str) -> Chosen:
        """The pairs that a client gets; default: the first ones (truncation)."""
        return self.held(client, self.rank(state, client))

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        """The widest model there is, whatever the rank of the client that is asked."""
        common = super().global_model(state, client, tensors)
        if common is None:
            return None
        return {n: t for n, t in {**common, **self.pairs(state)}.items() if kind(n) != "index"}

    # -- ranks that change ---------------------------------------------------------------------------------------

    @cached_property
    def position(self) -> dict[str, int]:
        """Where each client stands in ``context.clients``."""
        return {client: i for i, client in enumerate(self.context.clients)}

    def ranks(self, state: State) -> Tensor:
        """[N] int32: every client's rank, in the order of ``context.clients``."""
        start = torch.tensor(list(self.context.ranks.values()), dtype=torch.int32)
        return state.get("ranks", start).clone()

    def rank(self, state: State, client: str) -> int:
        if self.position[client] >= len(state.get("ranks", ())):  # nothing was ever known of it but where it starts
            return super().rank(state, client)
        return int(state["ranks"][self.position[client]])

    def validated(self, round: int, state: State, merits: Mapping[str, float]) -> State:
        """After the first validation the best clients are promoted; ties go to the first."""
        if self.context.promote is None or "promoted" in state:
            return state
        best = sorted(merits, key=lambda client: (-merits[client], self.position[client]))
        count = max(1, math.floor(self.context.promote_share * len(best) + 0.5))
        promoted = torch.tensor([self.position[client] for client in best[:count]], dtype=torch.int32)
        ranks = self.ranks(state)
        ranks[promoted.long()] = self.context.promote
        return {**state, "ranks": ranks, "promoted": promoted}


def cut(factors: Tensors, pairs: Chosen) -> Tensors:
    """Some rows of A and columns of B, as memory of their own."""
    chosen: Tensors = {}
    for name, tensor in factors.items():
        rows = pairs[name.partition("/")[2]]
        chosen[name] = tensor[rows] if kind(name) == "A" else tensor[:, rows].contiguous()
    return chosen


def side_by_side(tensors: Tensors, site: Site, scale: float) -> Tensor:
    """Row i of A beside column i of B times a scale: [r, d_in + d_out] float64."""
    a, b = tensors[f"A/{site.name}"].double(), tensors[f"B/{site.name}"].double()
    return torch.cat([a, scale * b.T], dim=1)
