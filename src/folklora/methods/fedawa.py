"""FedAWA: the server learns what each client's model weighs. arXiv 2503.15842 (Shi et al., CVPR 2025).

Over the shared tensors, flattened to one vector theta_k a client; tau_k = theta_k - theta_g is its *client vector*:

1. Logits T, one number a client, are kept between rounds [code]. They start as log n_k, so that the first weights are
  FedAvg's p_k (`logits = "log"` [recon]); the authors start from p_k itself used as a logit, which is near uniform
  (`logits = "sizes"` [code]).
2. ``p = softmax(T)`` over those who took part;
  ``L = sum_k p_k (1 - cos(theta_g, theta_k)) + sum_k p_k ||tau_k - sum_j p_j tau_j||_2`` [paper, code].
3. `server_epochs` steps of a fresh Adam (lr 1e-3, betas 0.5 and 0.999) or SGD (lr 0.01, momentum 0.9, weight decay
  5e-4) on T, then ``theta_g <- sum_k p_k theta_k`` [code]. The authors' code takes the p from before the last step; we
  take the one it learned [recon].
4. FedAWA-L (`weights = "layer"`): the same in each layer by itself [paper]. A layer is an adapted site with both its
  factors, the head, or one norm [recon]: weights that differ between A and B of one product would mean nothing.

A pitfall: L is minimised by putting all weight on one client, since a client is at no distance from itself. It is not
the objective but the size and number of steps that regularise; `server_epochs` is a setting to be careful with. And
the first step of a fresh Adam moves every logit by the full learning rate, however small its gradient is.

Only logits of clients that took part move. In the first round theta_g is what all clients start from. Where a norm is
zero the cosine is taken as 0, so that it says nothing [code: eps]; where two models coincide their distance has
gradient 0 [recon].

Everything is computed from inner products of the clients' vectors, K x K a layer: theta_g cancels out of the distance,
``tau_k - sum_j p_j tau_j = theta_k - sum_j p_j theta_j``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from folklora.adapters.lowrank import kind
from folklora.methods.aggregation import weighted_mean
from folklora.methods.base import Method
from folklora.methods.contract import Message, State
from folklora.methods.fedit import FedITOptions

_COINCIDE = 1e-30
"""A squared distance below this is none: float64 leaves as much of zero, and a root has no gradient there."""


class FedAWAOptions(FedITOptions):
    weights: Literal["model", "layer"] = "model"
    logits: Literal["log", "sizes"] = Field("log", description="a client's first logit: log n_k, or p_k itself")
    server_epochs: int = Field(1, ge=1, le=100_000, description="steps on the logits a round")
    server_optimizer: Literal["adam", "sgd"] = "adam"
    server_lr: float | None = Field(None, gt=0, le=1e6, description="default: 1e-3 for adam, 0.01 for sgd")

    @property
    def step_size(self) -> float:
        return self.server_lr or {"adam": 1e-3, "sgd": 0.01}[self.server_optimizer]


class FedAWA(Method):
    """Mean of all that is shared by weights learned at the server; see the module's text."""

    name = "fedawa"
    title = "FedAWA (weights learned)"
    paper = "arXiv:2503.15842"
    has_global_model = True
    takes_means = False
    travels = frozenset({"A", "B", "norm"})
    combines = frozenset({"proximal", "fedopt"})
    options_type = FedAWAOptions
    options: FedAWAOptions

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        layers = self.layers(messages)
        gram, cost = self.geometry(state, messages, layers)
        learned = improve(self.before(state, messages, len(layers)), gram, cost, self.options)
        # Rows are clients in the order of the context, columns layers; known: who has a logit at all.
        count, where = len(self.context.clients), self._where(messages)
        logits = state.get("logits", torch.zeros(count, len(layers), dtype=torch.float64)).clone()
        known = state.get("known", torch.zeros(count)).clone()
        logits[where], known[where] = learned.T, 1.0
        state = {**state, "logits": logits, "known": known}
        for p, names in zip(torch.softmax(learned, dim=1), layers.values(), strict=True):
            mean = weighted_mean([{name: m.tensors[name] for name in names} for m in messages.values()], p)
            state |= {f"global/{name}": tensor for name, tensor in mean.items()}
        return state

    def layers(self, messages: Mapping[str, Message]) -> dict[str, list[str]]:
        """Which shared tensors are weighed together: all of them, or those of each layer."""
        together: dict[str, list[str]] = {}
        for name in sorted(next(iter(messages.values())).tensors):
            together.setdefault(layer(name) if self.options.weights == "layer" else "model", []).append(name)
        return together

    def before(self, state: State, messages: Mapping[str, Message], layers: int) -> Tensor:
        """The logits that a round begins with, [L, K] float64; whoever takes part for the first time gets one now."""
        n = torch.tensor([message.numbers["examples"] for message in messages.values()], dtype=torch.float64)
        start = n.log() if self.options.logits == "log" else n / n.sum()
        fresh = start.expand(layers, -1)
        if "logits" not in state:
            return fresh
        where = self._where(messages)
        return torch.where(state["known"][where] > 0, state["logits"][where].T, fresh)

    def geometry(
        self, state: State, messages: Mapping[str, Message], layers: Mapping[str, list[str]]
    ) -> tuple[Tensor, Tensor]:
        """Of each layer: inner products of the clients' vectors around a common origin [L, K, K], and
        ``1 - cos(theta_g, theta_k)`` [L, K], float64."""
        start = self.initial(self.context.clients[0])
        grams, costs = [], []
        for names in layers.values():
            count = len(messages)
            gram, along = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
            length, size = torch.zeros(count, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for name in names:
                theta = torch.stack([m.tensors[name].double().flatten() for m in messages.values()])
                common = state.get(f"global/{name}", start[name]).double().flatten()
                # Distances do not depend on the origin; a client's own place keeps equal clients at exactly zero.
                around = theta - theta[0]
                gram += around @ around.T
                along += theta @ common
                length += theta.square().sum(1)
                size += common.square().sum()
            norms = length.sqrt() * size.sqrt()
            grams.append(gram)
            costs.append(1 - torch.where(norms > 0, along / norms, 0.0))
        return torch.stack(grams), torch.stack(costs)

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        """None by layer: weights then differ from site to site, and no one matrix says what was meant."""
        if self.options.weights == "layer":
            return None
        return torch.softmax(state["logits"][self._where(messages), 0], dim=0).expand(len(messages), -1)

    def _where(self, messages: Mapping[str, Message]) -> Tensor:
        return torch.tensor([self.context.clients.index(client) for client in messages])


def layer(name: str) -> str:
    """The layer of a tensor: ``A/<site>`` and ``B/<site>`` share one, as do weight and bias of the head or a norm."""
    return name.partition("/")[2] if kind(name) in {"A", "B"} else name.removesuffix("weight").removesuffix("bias")


def objective(logits: Tensor, gram: Tensor, cost: Tensor) -> Tensor:
    """L of each layer, [L]; see the module's text.

    Parameters
    ----------
    logits
        [L, K].
    gram
        [L, K, K]: inner products of the clients' vectors around any common origin.
    cost
        [L, K]: ``1 - cos(theta_g, theta_k)``.
    """
    p = torch.softmax(logits, dim=1)
    mixed = torch.einsum("lkj,lj->lk", gram, p)
    squared = gram.diagonal(dim1=1, dim2=2) - 2 * mixed + (p * mixed).sum(1, keepdim=True)
    return (p * (cost + squared.clamp(min=_COINCIDE).sqrt())).sum(1)


def improve(logits: Tensor, gram: Tensor, cost: Tensor, options: FedAWAOptions) -> Tensor:
    """The logits [L, K] after `server_epochs` steps of a fresh optimiser; layers do not mix."""
    learned = logits.detach().clone().requires_grad_()
    optimizer: torch.optim.Optimizer
    if options.server_optimizer == "adam":
        optimizer = torch.optim.Adam([learned], lr=options.step_size, betas=(0.5, 0.999))
    else:
        optimizer = torch.optim.SGD([learned], lr=options.step_size, momentum=0.9, weight_decay=5e-4)
    for _ in range(options.server_epochs):
        optimizer.zero_grad()
        objective(learned, gram, cost).sum().backward()
        optimizer.step()
    return learned.detach()
