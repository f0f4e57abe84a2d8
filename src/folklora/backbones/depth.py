"""Backbones that apply one block T times (ALBERT and its kin), taken in fewer and longer steps. arXiv 2310.12818.

``x <- Block(x)`` is ``x <- x + (Block(x) - x)``, a step of Euler's method of size one; the model is T of them. K <= T
steps of size ``beta = T / K`` go as far [abstract; recon]: ``x <- x + beta (Block(x) - x)``. K = T is the stock model,
bit for bit. What K the block is good at is a matter of training: over several depths, K drawn for each minibatch.

K may be each client's own (`folklora.adapters.layers.Bank.depth`), in one batch: rows of clients that have arrived
leave it, and tokens that share a row with somebody under way stay where they are. Adapters and LayerNorms of the block
exist once, whatever K is, and so does what travels of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from folklora.adapters.layers import Bank, Socket
from folklora.errors import BackboneError


class Depth:
    """How often a model applies the one block that all its layers are; of a model with layers of their own, nothing.

    Attributes
    ----------
    block
        It takes states [rows, L, d], a mask and whatever else the model hands down; None: layers are their own.
    full
        T, how often the model itself applies it; None likewise.
    """

    def __init__(self, model: nn.Module, socket: Socket) -> None:
        self.block: nn.Module | None = None
        self.full: int | None = None
        self.socket = socket
        config: Any = model.config
        self.kind, self.layers = str(config.model_type), getattr(config, "num_hidden_layers", None)
        if self.kind == "albert" and config.num_hidden_groups == 1:
            from transformers.models.albert.modeling_albert import AlbertTransformer

            encoder: Any = next(module for module in model.modules() if isinstance(module, AlbertTransformer))
            # A partial of the module, not a closure: a copy of the model then walks through the copy's own block.
            encoder.forward = partial(_forward, encoder, socket)
            self.block, self.full = encoder.albert_layer_groups[0], int(config.num_hidden_layers)

    @property
    def steps(self) -> int | None:
        """K, how often the block is applied where a bank does not say; None: there is no shared block."""
        return self.socket.steps or self.full

    def walk(self, steps: int | None) -> None:
        """Apply the block so often from now on; None: as the model does.

        Raises
        ------
        BackboneError
            As `refuse`.
        """
        if steps is not None:
            self.refuse(steps, "depth.steps")
        self.socket.steps = steps

    @contextmanager
    def walking(self, steps: int | None) -> Iterator[None]:
        """The same for a while; None changes nothing."""
        before = self.socket.steps
        if steps is not None:
            self.walk(steps)
        try:
            yield
        finally:
            self.socket.steps = before

    def of(self, wanted: Sequence[int | None]) -> tuple[int, ...] | None:
        """What a bank says for clients that want so many steps each; those who do not say take the backbone's."""
        told = [steps for steps in wanted if steps is not None]
        if not told:
            return None
        for steps in {min(told), max(told)}:
            self.refuse(steps, "depth")
        return tuple(steps or self.steps or 0 for steps in wanted)

    def refuse(self, steps: int, key: str) -> None:
        """Raises BackboneError, naming the ``key``, if there is no shared block, or that is not 1 to T steps."""
        if self.full is None:
            layers = f"{self.layers} layers" if self.layers else "layers"
            raise BackboneError(
                f"{key} = {steps}: this {self.kind} has {layers} with weights of their own, not one block that may be "
                "applied fewer times; allowed: an ALBERT with one group of layers, such as models/tiny-albert "
                "(`make models`)"
            )
        if not 1 <= steps <= self.full:
            raise BackboneError(
                f"{key} = {steps}: this {self.kind} applies its shared block {self.full} times; "
                f"allowed: 1 to {self.full}"
            )


def _forward(
    encoder: Any, socket: Socket, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """`AlbertTransformer.forward` in as many steps as the bank, or else the socket, says; by default all T."""
    from transformers.modeling_outputs import BaseModelOutput

    x: Tensor = encoder.embedding_hidden_mapping_in(hidden_states)
    full, bank = int(encoder.config.num_hidden_layers), socket.bank
    walk = _Walk(encoder.albert_layer_groups[0], full, socket, attention_mask, kwargs)
    depth = bank.depth if bank is not None else None
    if bank is None or depth is None or len(set(depth)) == 1:
        x = walk.together(x, (socket.steps or full) if depth is None else depth[0])
    else:
        x = walk.apart(x, bank, depth)
    return BaseModelOutput(last_hidden_state=x)


class _Walk:
    """One forward pass through the block; ``given`` is what the model hands to it beside states and mask."""

    def __init__(self, block: nn.Module, full: int, socket: Socket, mask: Tensor | None, given: dict[str, Any]) -> None:
        self.block = block
        self.full = full
        self.socket = socket
        self.mask = mask
        self.given = given
        # What adapters want added to the loss is of each application; a site remembers the last one only.
        self.penalties: dict[str, Tensor] = {}
        self._collect()

    def together(self, x: Tensor, steps: int) -> Tensor:
        """Every row in so many steps."""
        for _ in range(steps):
            y = self._applied(x)
            x = y if steps == self.full else torch.lerp(x, y, self.full / steps)
        return self._arrived(x)

    def apart(self, x: Tensor, bank: Bank, depth: Sequence[int]) -> Tensor:
        """Each client's tokens in as many steps as are its own."""
        rows, length = x.shape[:2]
        sizes = torch.tensor(bank.offsets).diff()
        steps = torch.repeat_interleave(torch.tensor(list(depth)), sizes).view(rows, length)  # of each token
        size = (self.full / steps)[..., None]
        under_way = torch.arange(rows)
        arrived: list[tuple[Tensor, Tensor]] = []
        mask, given = self.mask, self.given
        try:
            for start, stop in pairwise([0, *steps.unique().tolist()]):
                if start:
                    stays = steps[under_way].amax(1) > start
                    arrived.append((under_way[~stays], _chosen(x, (~stays).nonzero()[:, 0], len(x))))
                    under_way, x = under_way[stays], _chosen(x, stays.nonzero()[:, 0], len(x))
                    tokens = (under_way[:, None] * length + torch.arange(length)).flatten()
                    self.socket.bank = bank.narrowed(tokens, [each > start for each in depth])
                    self.mask = _chosen(mask, under_way, rows)
                    self.given = {key: _chosen(each, under_way, rows) for key, each in given.items()}
                # Of size one is exactly Block(x), of size nothing exactly x.
                beta = (size * (steps > start)[..., None])[under_way].to(x.device)
                for _ in range(start, stop):
                    x = torch.lerp(x.float(), self._applied(x).float(), beta).to(x.dtype)
        finally:
            self.socket.bank = bank
        arrived.append((under_way, x))
        order = torch.cat([numbers for numbers, _ in arrived]).argsort().to(x.device)
        return self._arrived(torch.cat([states for _, states in arrived])[order])

    def _applied(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x, self.mask, **self.given)
        self._collect()
        return y

    def _collect(self) -> None:
        bank = self.socket.bank
        for name, site in bank.sites.items() if bank is not None else ():
            if site.penalty is not None:
                self.penalties[name] = self.penalties.get(name, 0) + site.penalty
                site.penalty = None

    def _arrived(self, x: Tensor) -> Tensor:
        if self.socket.bank is not None:
            for name, penalty in self.penalties.items():
                self.socket.bank.sites[name].penalty = penalty
        return x


def _chosen(value: Any, rows: Tensor, of: int) -> Any:
    """What belongs to these rows of a batch of so many; what is the same for all rows stays as it is."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == of:
        return value[rows.to(value.device)]
    return value
