"""A personal model beside the common one: FedIT, and a second training of each client that never leaves it.

What the personal training learned is kept in the client's notes as ``personal/<name>``, the head included; a client
that has not trained yet has no personal model and predicts with the common one [recon: papers start all at one point].
Only the common model travels, so a round costs what FedIT's does; ``accuracy_global`` is the common model's, and each
client's own accuracy that of its personal one.
"""

from __future__ import annotations

from folklora.adapters.lowrank import Tensors
from folklora.methods.contract import Client
from folklora.methods.fedit import FedIT

BRANCH = "personal"
_PREFIX = "personal/"


class Personal(FedIT):
    """Where personal tensors are kept; subclasses say how they train, in the branch `BRANCH`, and what predicts."""

    branches = 2

    def own(self, client: Client) -> Tensors:
        """The client's personal tensors; where it has none yet, those of the common model."""
        kept = {n.removeprefix(_PREFIX): t for n, t in client.notes.items() if n.startswith(_PREFIX)}
        return {**client.tensors, **kept}

    def keep(self, client: Client, tensors: Tensors) -> None:
        client.notes = {**client.notes, **{_PREFIX + name: tensor for name, tensor in tensors.items()}}
