"""FedDM: clients send condensed data, the server trains. arXiv 2207.09653 (Xiong et al., CVPR 2023).

1. The server sends its model; a client draws models from the ball of radius rho around it and minimises, by class,
  ``||mean feature_real - mean feature_made||^2 + ||mean logit_real - mean logit_made||^2`` [paper]; 10 a class [code].
  Their 1000 steps [code] are 200 here (``steps``) [recon].
2. The server trains on the union of what clients made, cross-entropy, and its model stays in the ball of radius rho
  around the one that clients had: outside of it they did not look [paper].
3. What is drawn are the adapters and the head together, or in feature space the head alone, with random rectified maps
  in the place of networks (`folklora.methods.condensation.FeatureView`); rho is 20 there, and 5 of embeddings [recon].
  Adam in both halves [recon].

What is condensed, how it begins and what is counted is in `folklora.methods.condensed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from folklora.adapters.lowrank import Tensors
from folklora.methods.condensation import in_ball, with_maps
from folklora.methods.condensed import Condensed, CondensedOptions
from folklora.methods.contract import Message, State


class FedDMOptions(CondensedOptions):
    radius: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="of the ball that models are drawn from, and kept in; default: 20 for features, 5 for embeddings",
    )


class FedDM(Condensed):
    """Distribution matching at the clients, training at the server."""

    name = "feddm"
    title = "FedDM (condensed data travels)"
    paper = "arXiv:2207.09653"
    options_type = FedDMOptions
    options: FedDMOptions

    @property
    def radius(self) -> float:
        """rho: of the size of a round's move; a head on features that starts from zero goes a long way."""
        return self.options.radius or (20.0 if self.options.space == "features" else 5.0)

    def draw(self, model: Tensors, generator: torch.Generator) -> Tensors:
        drawn = in_ball(model, self.moving(model), self.radius, generator)
        return with_maps(drawn, self.context.width, generator) if self.options.space == "features" else drawn

    def fitting(self, state: State, messages: Mapping[str, Message]) -> dict[str, Any]:
        return {"radius": self.radius}
