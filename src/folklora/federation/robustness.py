"""A server that takes another centre of the uploads than their mean (``[robust]``), against clients that lie.

What is compared are updates: uploads less what both sides know of them. Everybody counts the same, because how many
examples a client has is its own word. ``clip`` shortens each update and leaves the rest to the method, whichever it is;
the other rules put a centre in the mean's place, so they are for methods that take nothing but a mean
(`Method.averages`). The rules themselves: `folklora.privacy.robust`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.federation.engine import Engine
from folklora.federation.guarantees import liars
from folklora.federation.ledger import Ledger
from folklora.federation.protection import EqualIntake
from folklora.federation.setup import Setup
from folklora.methods.contract import Message, State
from folklora.privacy import robust
from folklora.privacy.mechanism import applied, clipped, difference, norm


class RobustIntake(EqualIntake):
    """Clipped updates, or one centre in place of all; see the module's text."""

    def __init__(self, setup: Setup, engine: Engine) -> None:
        super().__init__(setup, engine)
        self.rule, self.norm = self.recipe.robust.rule, self.recipe.robust.norm
        # Whoever drops out may have been honest: the number stays that of the round as it was drawn.
        self.liars = liars(self.recipe, len(self.method.context.clients))
        fewest = robust.fewest(self.rule, self.liars)
        if fewest > self.recipe.engine.min_clients:
            self.least, self.needs = fewest, f'robust.rule = "{self.rule}"'

    def server(self, round: int, state: State, uploads: Mapping[str, Any], ledger: Ledger) -> State:
        references = {client: self.known(round, state, client, message) for client, message in uploads.items()}
        updates = {client: difference(m.tensors, references[client]) for client, m in uploads.items()}
        if self.rule == "clip":
            bound = self.norm or float(torch.tensor([norm(u) for u in updates.values()], dtype=torch.float64).median())
            shorter = {
                client: Message(
                    {**m.tensors, **applied(clipped(updates[client], bound), references[client])},
                    m.numbers,
                    m.encodings,
                )
                for client, m in uploads.items()
            }
            return self.method.server(round, state, shorter)
        first = next(iter(uploads))
        rows = torch.stack([_row(update) for update in updates.values()])
        centre = robust.centre(self.rule, rows, self.liars)
        pooled = applied(_tensors(centre, updates[first]), references[first])
        return self.method.server(round, state, {first: Message(pooled, {"examples": 1.0})})


def _row(update: Tensors) -> Tensor:
    return torch.cat([update[name].flatten() for name in sorted(update)])


def _tensors(row: Tensor, like: Tensors) -> Tensors:
    """The other way round, in the order of ``like``."""
    names = sorted(like)
    parts = dict(zip(names, row.split([like[name].numel() for name in names]), strict=True))
    return {name: parts[name].view_as(tensor) for name, tensor in like.items()}
