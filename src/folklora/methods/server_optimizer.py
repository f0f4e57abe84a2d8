"""Server optimisers, for any method whose clients share one model. arXiv 2003.00295 (Reddi et al., ICLR 2021).

The mean of what arrived is not the new model but says where to go [paper, algorithm 2]:

1. ``Delta = mean - x``, x being the model before this round: minus a gradient.
2. ``m <- beta1 m + (1 - beta1) Delta``, from m = 0.
3. ``v <- v + Delta^2`` (*adagrad*), ``v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)`` (*yogi*),
  ``v <- beta2 v + (1 - beta2) Delta^2`` (*adam*), from v = tau^2.
4. ``x <- x + lr m / (sqrt(v) + tau)``. No bias correction [paper].

*momentum* is FedAvgM (arXiv 1909.06335): ``m <- beta1 m + Delta``, ``x <- x + lr m``; with beta1 = 0 and lr = 1 it is
the mean itself. Weights in the mean are the method's (by examples, as the paper's experiments).

Each shared tensor has moments of its own; one that did not travel in a round (RoLoRA's other factor) rests with them
[recon]. The model before round 1 is what all clients start from. Where cores of several ranks are averaged padded, it
is the start of the client of largest rank [recon].

Where a server says more than a mean (FedAWA's learned weights, LoRA-FAIR's corrected B, each pair's mean over its
owners, RAVAN's heads), what it would have said stands in the mean's place; a pair or head that nobody trained has
Delta = 0 and only its momentum left. FedLPP's x is the model that the server keeps, not the copies it sends [recon].
FLoRA and FedEx have no such x: what they add to the frozen weights is meant to be exact.

The new model is not meant to be the mean, so no `aggregation_error` is measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from folklora.adapters.lowrank import kind
from folklora.methods.base import Method
from folklora.methods.contract import Message, State


class ServerOptimizer(Method):
    """Stands before the method it is combined with, in one class; see `folklora.methods.build`."""

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        after = dict(super().server(round, state, messages))
        origin = self.origin(state)
        shared = self.shared(round)
        for name in [n for n in origin if n in after and kind(n.partition("/")[2]) in shared]:
            x = state.get(name, origin[name]).contiguous()
            moments = {k: state[f"moment/{k}/{name}"] for k in ("m", "v") if f"moment/{k}/{name}" in state}
            after[name], moments = step(self.options.fedopt, self.options.fedopt_settings, x, after[name], moments)
            after |= {f"moment/{k}/{name}": moment for k, moment in moments.items()}
        return after

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        return None


def step(
    rule: str, settings: Mapping[str, float], x: Tensor, mean: Tensor, moments: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of one tensor, computed in float64: the new value and its moments ``m`` and ``v``, float32.

    Parameters
    ----------
    rule
        *momentum*, *adagrad*, *adam* or *yogi*.
    settings
        ``lr``, ``beta1``, and ``beta2`` and ``tau`` where the rule has them.
    moments
        Of the step before, or empty.
    """
    delta = mean.double() - x.double()
    lr, beta1 = settings["lr"], settings["beta1"]
    m = moments["m"].double() if "m" in moments else torch.zeros_like(delta)
    if rule == "momentum":
        m = beta1 * m + delta
        return (x.double() + lr * m).float(), {"m": m.float()}
    tau, square = settings["tau"], delta.square()
    m = beta1 * m + (1 - beta1) * delta
    v = moments["v"].double() if "v" in moments else torch.full_like(delta, tau**2)
    match rule:
        case "adagrad":
            v = v + square
        case "yogi":
            v = v - (1 - settings["beta2"]) * square * torch.sign(v - square)
        case "adam":
            v = settings["beta2"] * v + (1 - settings["beta2"]) * square
    # One enormous delta must not make v infinite: it would stay so, and x would never move again.
    v = v.clamp(max=torch.finfo(torch.float32).max)
    return (x.double() + lr * m / (v.sqrt() + tau)).float(), {"m": m.float(), "v": v.float()}
