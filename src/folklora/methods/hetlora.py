"""HetLoRA: zero padding by norm, truncation, and ranks that shrink by themselves. arXiv 2401.06432 (EMNLP 2024).

1. Client k trains A_k, B_k of its own rank r_k, cut off the server's on the way down [note].
2. Self-pruning: the tail are the pairs from floor(gamma r_k) on [note]. If training made it smaller, the client drops
   it and goes on with rank floor(gamma r_k), never below 1 [recon]. Its size is ``sum_layers ||B_tail|| ||A_tail||``
   [recon], compared with what the client had received. The paper also trains against that size; our note names neither
   the term's weight nor its form, so the data alone (and ``train.weight_decay``) decides here.
3. The server pads with zeros and averages with weights ``||s_k B_k A_k||_F / sum_j ||s_j B_j A_j||_F`` [note; the norm
   is over all layers together, and with the scale, which is the update that was really added: recon]. No product is
   built: ``||B A||_F^2 = <A A^T, B^T B>``, r x r. Where all norms are zero: by examples [recon].

How a client says so [recon]: after training it sets the tail's columns of B to zero, which is the pruned function at
once, and sends its new rank as ``index/rank`` beside factors of the old shape; the server leaves the tail out and
remembers the rank, and from then on that is what travels. A message that is lost or refused changes nobody's rank.
Starts, scales and heads: see `folklora.methods.owners`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors, kind
from folklora.errors import MessageError
from folklora.methods.contract import Client, Message, State
from folklora.methods.fedit import FedITOptions
from folklora.methods.owners import Chosen
from folklora.methods.padding import ZeroPadding
from folklora.methods.work import Trained


class HetLoRAOptions(FedITOptions):
    gamma: float = Field(0.99, gt=0, le=1, description="pruning keeps floor(gamma r) pairs; 1: ranks stay")


class HetLoRA(ZeroPadding):
    """Zero padding weighted by the updates' norms; clients prune themselves."""

    name = "hetlora"
    title = "HetLoRA (ranks prune themselves)"
    paper = "arXiv:2401.06432"
    options_type = HetLoRAOptions
    options: HetLoRAOptions

    def kept(self, rank: int) -> int:
        """floor(gamma r), and one pair at least."""
        return max(1, math.floor(self.options.gamma * rank + 1e-9))  # 0.29 * 100 is a little below 29

    # -- at the client -------------------------------------------------------------------------------------------

    def learned(self, round: int, client: Client, results: Mapping[str, Trained]) -> None:
        before, rank = client.tensors, self.adapter.rank(client.tensors)
        super().learned(round, client, results)
        kept = self.kept(rank)
        if kept < rank and self.tail(client.tensors, kept) < self.tail(before, kept):
            pruned = {
                n: torch.cat([t[:, :kept], torch.zeros_like(t[:, kept:])], 1)
                for n, t in client.tensors.items()
                if kind(n) == "B"
            }
            client.tensors = {**client.tensors, **pruned}
            rank = kept
        client.notes["rank"] = torch.tensor([rank], dtype=torch.int32)

    def tail(self, tensors: Tensors, kept: int) -> float:
        """``sum_layers ||B[:, kept:]||_F ||A[kept:]||_F``."""
        return sum(
            float(
                tensors[f"B/{site.name}"][:, kept:].double().norm() * tensors[f"A/{site.name}"][kept:].double().norm()
            )
            for site in self.context.sites
        )

    def expected(self, round: int, state: State, client: str) -> Shapes:
        return {**super().expected(round, state, client), "index/rank": (1,)}

    def send(self, round: int, client: Client) -> Message | None:
        message = super().send(round, client)
        assert message is not None  # the factors always travel
        return Message({**message.tensors, "index/rank": client.notes["rank"]}, message.numbers)

    # -- at the server -------------------------------------------------------------------------------------------

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        announced, rank = int(message.tensors["index/rank"]), self.rank(state, client)
        if announced not in {rank, self.kept(rank)}:
            raise MessageError(
                f"tensor 'index/rank' holds {announced}; allowed: {rank}, or {self.kept(rank)} if pruned"
            )

    def owned(self, state: State, client: str, message: Message) -> Chosen:
        return self.held(client, int(message.tensors["index/rank"]))

    def factor_weights(self, state: State, messages: Mapping[str, Message]) -> Tensor:
        norms = torch.stack([self.update_norm(message.tensors) for message in messages.values()])
        return norms / norms.sum() if norms.sum() > 0 else self.weights(messages)

    @property
    def counts_examples(self) -> bool:
        """Where more travels than factors, whose weights are norms."""
        return any(kind(name) in {"head", "norm"} for name in self.expected(1, {}, self.context.clients[0]))

    def update_norm(self, tensors: Tensors) -> Tensor:
        """``||s B A||_F`` over all sites, a float64 scalar, from Gram matrices alone."""
        squares = torch.zeros((), dtype=torch.float64)
        for site in self.context.sites:
            a, b = tensors[f"A/{site.name}"].double(), tensors[f"B/{site.name}"].double()
            squares += ((a @ a.T) * (b.T @ b)).sum().clamp_min(0.0)
        return self.adapter.scale(self.adapter.rank(tensors)) * squares.sqrt()

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        ranks = self.ranks(state)
        for client, message in messages.items():
            ranks[self.position[client]] = message.tensors["index/rank"][0]
        return {**super().server(round, state, messages), "ranks": ranks}

    def typical_reply(self, round: int, client: str) -> Message | None:
        """As large as before anything was pruned: who will prune what is not known in advance."""
        message = super().typical_reply(round, client)
        return None if message is None else Message({n: t for n, t in message.tensors.items() if kind(n) != "index"})
