"""What reaches the first adapted layers, for every token at every position: public, whatever the client trained.

Below the first attention nothing mixes tokens, so the input of its query and value layers depends on one token and its
position alone. Which adapted layers those are is found out by a forward pass, and so their inputs are the backbone's
own, whatever its architecture does to an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import Tensors, kind
from folklora.backbones.batch import Batch
from folklora.errors import AttackError
from folklora.privacy.attacks.replica import Replica
from folklora.training.stacks import plug, stack

BLOCK = 2**22
"""Numbers that are computed at a time."""
KEPT = 2**28
"""Numbers that are remembered between attacks at most: 1 GiB in float32."""

Plug = Callable[[Batch], Bank | None]


class FirstInputs:
    """See the module's text.

    Parameters
    ----------
    replica
        Of a text task.
    before
        The client's model: LayerNorms that it trains may stand below the first layer.
    positions
        Inputs are of tokens at the positions 0 to ``positions - 1``.
    dtype
        In which the client computed.

    Raises
    ------
    AttackError
        If every adapted layer sees tokens that are mixed already.
    """

    def __init__(self, replica: Replica, before: Tensors, positions: int, dtype: torch.dtype) -> None:
        self.backbone: Any = replica.backbone
        self.positions = positions
        self.dtype = dtype
        self.vocabulary = len(replica.vectors)
        norms = any(kind(name) == "norm" for name in before)
        self.plugged = plug_of(replica, before) if norms else None
        self.sites = self._unmixed()

    def at(self, tokens: Tensor) -> Tensor:
        """Inputs of ``tokens`` [n, positions], each at its column's position: [n, positions, d] float32."""
        (found,) = look(self.backbone, _rows(tokens), self.sites[:1], self.dtype, self.plugged)
        return found.float().view(*tokens.shape, -1)

    def every(self) -> Iterator[tuple[int, Tensor]]:
        """The whole vocabulary in blocks: (first token, inputs [n, positions, d] in the client's dtype)."""
        numbers = self.vocabulary * self.positions * int(self.backbone.width)
        if self.plugged is None and numbers <= KEPT:
            return iter(_remembered(self.backbone, self.sites[0], self.vocabulary, self.positions, self.dtype))
        return _blocks(self.backbone, self.sites[0], self.vocabulary, self.positions, self.dtype, self.plugged)

    def _unmixed(self) -> tuple[str, ...]:
        """The first adapted layers with the same input, of which no position sees the one before it."""
        names = tuple(site.name for site in self.backbone.sites)
        texts = [torch.tensor([[first, 2, 3]]) % self.vocabulary for first in (1, 4)]
        one, other = (
            dict(zip(names, look(self.backbone, _rows(t), names, self.dtype, self.plugged), strict=True)) for t in texts
        )
        free = [name for name in names if torch.equal(one[name][1:], other[name][1:])]
        if not free:
            raise AttackError(
                f"{names[0]}: the first adapted layer sees tokens that are mixed already; allowed: "
                "adapter.targets that reach the first attention's inputs"
            )
        return tuple(name for name in free if torch.equal(one[name], one[free[0]]))


class _Enough(Exception):
    """All inputs were seen: what comes behind them is not computed."""


@torch.no_grad()
def look(backbone: Any, batch: Batch, sites: tuple[str, ...], dtype: torch.dtype, plugged: Plug | None) -> list[Tensor]:
    """The inputs of ``sites``, [tokens, d] each, padding among them; what comes behind them is not computed."""
    model: Any = backbone.run(lambda model: model, None, dtype)
    seen: dict[str, Tensor] = {}

    def looking(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0].reshape(-1, arguments[0].shape[-1]).cpu()
            if len(seen) == len(sites):
                raise _Enough

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(looking(name)) for name in sites]
    try:
        backbone.hidden(batch, plugged(batch) if plugged else None, dtype)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[name] for name in sites]


def _blocks(
    backbone: Any, site: str, vocabulary: int, positions: int, dtype: torch.dtype, plugged: Plug | None = None
) -> Iterator[tuple[int, Tensor]]:
    count = max(1, BLOCK // (positions * int(backbone.width)))
    for start in range(0, vocabulary, count):
        tokens = torch.arange(start, min(start + count, vocabulary))[:, None].expand(-1, positions)
        (found,) = look(backbone, _rows(tokens), (site,), dtype, plugged)
        yield start, found.view(*tokens.shape, -1)


@lru_cache(maxsize=1)
def _remembered(
    backbone: Any, site: str, vocabulary: int, positions: int, dtype: torch.dtype
) -> list[tuple[int, Tensor]]:
    return list(_blocks(backbone, site, vocabulary, positions, dtype))


def plug_of(replica: Replica, before: Tensors) -> Plug:
    """What plugs a client's model in."""
    adapter, device = replica.adapter, replica.device
    rank = adapter.rank(before)
    stacks = stack([before], rank, device)
    scales = torch.tensor([adapter.scale(rank)], device=device)
    return lambda batch: plug(adapter, stacks, scales, batch, device)


def _rows(tokens: Tensor) -> Batch:
    """One client's texts, one a row, all of one length."""
    rows, length = tokens.shape
    first = torch.arange(rows) * length
    positions = torch.arange(length).expand(rows, length)
    segments = torch.arange(rows)[:, None].expand(rows, length)
    ends = (0, rows * length), (0, rows)
    return Batch(tokens.contiguous(), positions, segments, *ends, first, first + length - 1, packed=False)
