"""Ditto: a personal model that is pulled to the common one. arXiv 2012.04221 (Li et al., ICML 2021), over FedIT.

1. The common model w is trained and averaged as without Ditto: here FedIT [paper: any solver].
2. Beside it each client trains its personal model v_k on ``F_k(v) + lambda / 2 ||v - w||^2`` [paper], w being what the
  server sent for this round, not what the client made of it; ``lambda = 0`` is local training. v_k is kept between
  rounds and never travels.
3. v_k predicts.

Both trainings see the same minibatches, so v_k takes as many steps as w [recon: the paper leaves their number open].
v_k starts as the model that the client holds when it first trains [recon: of everybody's first model, for a client
that joins later would begin far from w]. The pull is on what comes from the server; a private head has nothing to be
pulled to [recon]. lambda = 0.1 by default [recon; the paper tunes it, for each client on its validation data at best].
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from folklora.adapters.lowrank import Tensors, kind
from folklora.methods.contract import Client
from folklora.methods.fedit import FedITOptions
from folklora.methods.personal import BRANCH, Personal
from folklora.methods.work import Terms, Trained, Work


class DittoOptions(FedITOptions):
    lambda_: float = Field(0.1, ge=0, alias="lambda", description="strength of the pull to the common model")


class Ditto(Personal):
    """FedIT, and v_k at each client."""

    name = "ditto"
    title = "Ditto (personal model pulled to FedIT's)"
    paper = "arXiv:2012.04221"
    options_type = DittoOptions
    options: DittoOptions

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        (common,) = super().work(round, client)
        shared = self.shared(round)
        w = {name: tensor for name, tensor in client.tensors.items() if kind(name) in shared}
        pull = Terms(anchor=w, proximal=self.options.lambda_)
        return common, Work(self.own(client), common.trained, pull, BRANCH)

    def learned(self, round: int, client: Client, results: Mapping[str, Trained]) -> None:
        super().learned(round, client, results)
        self.keep(client, results[BRANCH].tensors)

    def model(self, client: Client) -> Tensors:
        return self.own(client)
