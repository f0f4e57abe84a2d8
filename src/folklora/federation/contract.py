"""``contract.json``: the shapes that a run's two sides agreed on, so that what was sent can be told from the run alone.

Written when a run begins. With it a method can be asked what travels (`Method.expected`) without the backbone, the data
or one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from folklora.adapters.lowrank import LowRank, Site, Tensors
from folklora.errors import MethodError
from folklora.methods import build
from folklora.methods.base import Method
from folklora.methods.contract import Context
from folklora.recipe import Recipe
from folklora.sections import Section

CONTRACT = "contract.json"

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Width = Annotated[int, Field(ge=1, le=2**24)]
Shape = Annotated[list[Width], Field(max_length=4)]


class SiteShape(Section):
    """One adapted layer."""

    name: Name
    d_in: Width
    d_out: Width


class Contract(Section):
    """Shapes of what a client owns, but for its adapter's rank; see `folklora.methods.base.Context`."""

    sites: Annotated[list[SiteShape], Field(min_length=1, max_length=100_000)]
    head: dict[Name, Shape]
    norms: dict[Name, Shape]
    classes: Width
    width: Width
    ranks: dict[str, Annotated[int, Field(ge=1, le=2**24)]]
    input_width: Width | None = None  # of what stands behind the embedding layer, where inputs are texts

    @classmethod
    def of(cls, context: Context) -> Contract:
        """What a run's context says of shapes."""
        return cls(
            sites=[SiteShape(name=site.name, d_in=site.d_in, d_out=site.d_out) for site in context.sites],
            head={name: list(shape) for name, shape in context.head.items()},
            norms={name: list(tensor.shape) for name, tensor in context.norms.items()},
            classes=context.classes,
            width=context.width,
            ranks=dict(context.ranks),
            input_width=_input_width(context),
        )

    def encode(self) -> bytes:
        return self.model_dump_json().encode()

    def method(self, recipe: Recipe) -> Method:
        """The recipe's method, to be asked for names and shapes; it has no numbers to compute with.

        Raises
        ------
        FolkLoraError
            If the method cannot be what the recipe asks for with these shapes.
        """
        return build(recipe.method.name, recipe.method.options, self._context(recipe))

    def _context(self, recipe: Recipe) -> Context:
        return Context(
            seed=recipe.seed,
            ranks=self.ranks,
            sites=tuple(Site(site.name, site.d_in, site.d_out) for site in self.sites),
            alpha=recipe.adapter.alpha,
            dropout=recipe.adapter.dropout,
            classes=self.classes,
            width=self.width,
            head={name: tuple(shape) for name, shape in self.head.items()},
            norms=_weightless(self.norms),
            rounds=recipe.train.rounds,
            learning_rate=recipe.train.lr,
            head_rate=recipe.train.head_rate,
            batch_size=recipe.train.batch_size,
            local_epochs=recipe.train.local_epochs,
            optimizer=recipe.train.optimizer,
            weight=_no_weight,
            promote=recipe.adapter.promote,
            promote_share=recipe.adapter.promote_share,
            momentum=recipe.train.momentum,
            newcomers=recipe.newcomers.share > 0,
            network=None if self.input_width is None else partial(_Shape, self.input_width),
        )


def _weightless(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Shapes without memory: a file's word is no reason to allocate anything."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _input_width(context: Context) -> int | None:
    if context.network is None:
        return None
    return context.network(LowRank(context.sites, False, context.alpha)).width


class _Shape:
    """A network that is a width and nothing else."""

    longest = 2**24

    def __init__(self, width: int, adapter: LowRank) -> None:
        self.width = width

    def features(self, model: Tensors, inputs: Tensor, lengths: Sequence[int]) -> Tensor:
        raise MethodError("a contract has no backbone")

    def public(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        raise MethodError("a contract has no backbone")


def _no_weight(site: str) -> Tensor:
    raise MethodError(f"{site}: a contract has no weights")
