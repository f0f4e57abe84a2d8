"""Differential privacy of clients (``privacy.unit = "client"``) at the member: what an upload becomes before it leaves.

The update (what a member sends less what both sides know of it, `Method.known`) is clipped over all its tensors jointly
before anything else happens to it, and everybody counts as one example. Then, by ``privacy.placement``:

- ``server``: nothing more. The server clips again what it has read, since rounding and compression may have made it
  longer and nobody has to be believed, and adds the noise (`folklora.federation.protection`).
- ``shares``: each of a round's m clients adds noise of standard deviation ``z C / sqrt(m)``. Who drops out takes its
  share along, and epsilon is computed with what arrived (`folklora.federation.budget`). It hides clients from whoever
  sees sums alone: the others, and the server where uploads are masked (``[secure]``).
- ``client``: each adds all of it, sd ``z C``: the guarantee holds against the server, whatever it computes.

What comes after a member's own noise (top_k, rounding, the memory of error feedback, encryption) is computed from what
is private already, and costs nothing. With shares that holds of the sum alone, so nothing may be lost before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

from folklora.errors import MessageError
from folklora.federation.budget import resolved_noise
from folklora.federation.compression import Uplink
from folklora.methods.base import Method
from folklora.methods.contract import Client, Message
from folklora.privacy.mechanism import added, applied, clipped, difference, noise
from folklora.recipe import Recipe

PURPOSE = "privacy/noise"
"""What the noise's generators are seeded for."""


class Clipping:
    """From an upload to the one that leaves in its place; see the module's text."""

    def __init__(
        self, recipe: Recipe, method: Method, client: Client, uplink: Uplink, note: Callable[[str, str], str]
    ) -> None:
        privacy = recipe.privacy
        self.clip = privacy.clip
        self.client = client
        self.uplink = uplink
        self.note = note  # `Outlet.noted`
        uplink.listens = True
        self.deviation = 0.0 if privacy.placement == "server" else self.clip * resolved_noise(recipe, method)
        if privacy.placement == "shares":
            self.deviation /= math.sqrt(recipe.train.sampled(len(method.context.clients)))

    def __call__(self, round: int, message: Message) -> Message:
        """The same bits for the same upload of the same round.

        Raises
        ------
        MessageError
            If another upload of this round has left already: the difference of two would be without noise.
        """
        reference = self.uplink.reference(round, message)
        update = clipped(difference(message.tensors, reference), self.clip)
        if self.deviation:
            digest = hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(update.items()))).hexdigest()
            if self.note(f"noise {round}", digest) != digest:
                raise MessageError(f"round {round} was answered before, with another update; allowed: the same again")
            update = added(update, noise(update, self.deviation, self.client.secret, PURPOSE, self.client.id, round))
        tensors = {**message.tensors, **applied(update, reference)}
        return Message(tensors, {**message.numbers, "examples": 1.0}, message.encodings)
