"""APFL: each client predicts with a mixture of a model of its own and the common one. arXiv 2003.13461, over FedIT.

1. The common model w is trained and averaged as without APFL: here FedIT. Client k keeps v_k, which never travels, and
  predicts with ``v_bar = alpha v_k + (1 - alpha) w`` [paper]. Mixed are tensors, factor by factor [recon for LoRA].
2. Beside w it trains v_k by the gradient through the mixture: ``v_k <- v_k - lr grad_v f_k(v_bar)`` with
  ``grad_v f_k(v_bar) = alpha grad f_k(v_bar)`` [paper]. So v_bar moves by ``alpha^2 lr grad f_k(v_bar)``: what is
  trained here is v_bar at the rate ``alpha^2 lr``, and v_k moves by what v_bar moved over alpha. AdamW's steps do not
  depend on the gradient's scale: there the rate is ``alpha lr`` [recon; exact up to eps and weight decay].
3. During a round w in the mixture is what the server sent [recon: in the paper w takes its local steps there too].
4. ``adaptive = true``: after a round ``alpha <- alpha - alpha_lr <v_k - w, g>`` with g the gradient at the mixture,
  averaged over the round's steps [paper: at each step; recon: averaged], cut to [0.05, 1] [paper: [0, 1]; at 0 v_k
  would stop learning and alpha never come back]. g is read off the way of v_bar, so this needs plain SGD.

alpha = 0 is FedIT and trains nothing beside; alpha = 1 is local training. v_k starts as the model that the client holds
when it first trains [recon]. A private head has its own v_k and is mixed with the head of the client's common model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator

from folklora.adapters.lowrank import Tensors
from folklora.errors import MethodError
from folklora.methods.contract import Client, Context
from folklora.methods.fedit import FedITOptions
from folklora.methods.options import Options
from folklora.methods.personal import BRANCH, Personal
from folklora.methods.work import Terms, Trained, Work

LEAST = 0.05
"""Where an adaptive alpha stops falling."""


class APFLOptions(FedITOptions):
    alpha: float = Field(0.5, ge=0, le=1, description="the personal model's share; where adaptive, the first")
    adaptive: bool = Field(False, description="each client moves its alpha by gradient descent")
    alpha_lr: float = Field(0.1, gt=0, le=1e6, description="of the adaptive alpha")

    @model_validator(mode="after")
    def _only_an_adaptive_alpha_has_a_rate(self) -> APFLOptions:
        if not self.adaptive and "alpha_lr" in self.model_fields_set:
            raise ValueError(f"alpha_lr = {self.alpha_lr} without adaptive changes nothing; allowed: adaptive = true")
        return self


class APFL(Personal):
    """FedIT, and at each client v_k and, where it adapts, alpha."""

    name = "apfl"
    title = "APFL (personal model mixed with FedIT's)"
    paper = "arXiv:2003.13461"
    options_type = APFLOptions
    options: APFLOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        if self.options.adaptive and (context.optimizer != "sgd" or context.momentum):
            raise MethodError(
                f"method.adaptive = true reads gradients off the way a client went, train.optimizer = "
                f'"{context.optimizer}" with train.momentum = {context.momentum:g}; allowed: "sgd" with momentum = 0'
            )

    def alpha(self, client: Client) -> float:
        return float(client.notes["alpha"]) if "alpha" in client.notes else self._first_alpha()

    def _first_alpha(self) -> float:
        return max(self.options.alpha, LEAST) if self.options.adaptive else self.options.alpha

    def model(self, client: Client) -> Tensors:
        alpha, v = self.alpha(client), self.own(client)
        # lerp gives either end exactly.
        return {name: torch.lerp(w, v[name], alpha) for name, w in client.tensors.items()}

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        works = super().work(round, client)
        alpha = self.alpha(client)
        if alpha == 0:
            return works
        rate = alpha**2 if self.context.optimizer == "sgd" else alpha
        return *works, Work(self.model(client), works[0].trained, Terms(rate=rate), BRANCH)

    def learned(self, round: int, client: Client, results: Mapping[str, Trained]) -> None:
        alpha, w, v, start = self.alpha(client), client.tensors, self.own(client), self.model(client)
        super().learned(round, client, results)
        if BRANCH not in results:
            return
        after = results[BRANCH]
        moved = {name: tensor.double() - start[name].double() for name, tensor in after.tensors.items()}
        self.keep(client, {name: (v[name].double() + way / alpha).float() for name, way in moved.items()})
        if self.options.adaptive:
            gap = {n: v[n].double() - w[n].double() for n in moved}
            # In one order, however the tensors come from a file: a resumed run has the same sum.
            slope = sum(float((gap[n] * -way).sum()) / after.way(n) for n, way in sorted(moved.items()))
            alpha = min(1.0, max(LEAST, alpha - self.options.alpha_lr * slope))
            client.notes["alpha"] = torch.tensor(alpha, dtype=torch.float64)
