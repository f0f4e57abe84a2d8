"""A member's end of what `folklora.federation.intake` is the server's: from a method's message to bytes and back.

talk(round, topic, data) -> bytes     an exchange beside the training (keys, shares); by default there is none
protect(round, message) -> message    what privacy asks of an upload (clipping, noise), in the clear; by default nothing
encode(round, message) -> bytes       a protected upload as it travels: written out, or masked, or encrypted
open(data) -> message                 a welcome or a reply
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from folklora.data.audit.quality import weighed
from folklora.errors import MessageError
from folklora.federation.clipping import Clipping
from folklora.federation.codec import decode
from folklora.federation.compression import Compression, Uplink
from folklora.federation.weighing import weighed_message
from folklora.methods.base import Method
from folklora.methods.contract import Client, Message
from folklora.privacy.ckks import Key
from folklora.recipe import Recipe
from folklora.sections import PrivacySection


class Noted(Protocol):
    """A dictionary that only grows."""

    def setdefault(self, key: str, value: str, /) -> str: ...


class Outlet:
    """Uploads in the clear; see the module's text.

    Attributes
    ----------
    attached
        What came along with the order of this round, if anything did.
    changes
        What becomes of an upload before it leaves, in this order.
    noted
        What was said once and must never be said otherwise: a network engine's members keep it on the disk.
    """

    def __init__(self, recipe: Recipe, method: Method, client: Client) -> None:
        self.recipe = recipe
        self.method = method
        self.client = client
        self.uplink = Uplink(Compression(recipe.message, method), client.id)
        self.attached: bytes | None = None
        self.noted: Noted = {}
        self.changes: list[Callable[[int, Message], Message]] = []
        if recipe.audit.weights != "none":
            self.changes.append(lambda round, message: weighed_message(message, self.weight))
        if recipe.privacy.unit == "client":
            self.changes.append(Clipping(recipe, method, client, self.uplink, self._note))

    @property
    def weight(self) -> int:
        """As how many examples an upload counts."""
        if self.recipe.privacy.unit == "client":
            return 1
        return weighed(self.client.examples, self.client.data.quality())

    def _note(self, key: str, value: str) -> str:
        return self.noted.setdefault(key, value)

    def talk(self, round: int, topic: str, data: bytes) -> bytes:
        """What the member answers to one part of an exchange; a function of its secret, its state and the part alone.

        Raises
        ------
        MessageError
            For a topic that the recipe has no use for, or a part that cannot be.
        """
        raise MessageError(f"topic {topic[:40]!r}: this recipe has no such exchange")

    def protect(self, round: int, message: Message) -> Message:
        """An upload that says no more than the recipe's ``[privacy]`` allows; whatever hides it comes after."""
        for change in self.changes:
            message = change(round, message)
        return message

    def encode(self, round: int, message: Message) -> bytes:
        return self.uplink.encode(round, self.protect(round, message))

    def open(self, data: bytes, most: int) -> Message:
        """A download of at most so many bytes."""
        return decode(data, most)


def outlet_of(recipe: Recipe, method: Method, client: Client, key: Key | None = None, *, sends: bool = True) -> Outlet:
    """The recipe's; ``key`` is the members' common one, without which nothing is encrypted; masks are safer with it.

    A client that never ``sends`` an upload has nothing to protect in one.
    """
    if not sends:
        return Outlet(recipe.model_copy(update={"privacy": PrivacySection()}), method, client)
    if recipe.secure.kind == "masks":
        from folklora.federation.masked import MaskedOutlet  # it is built on this file

        return MaskedOutlet(recipe, method, client, b"" if key is None else key.seed)
    if recipe.secure.kind == "ckks":
        from folklora.federation.encrypted import EncryptedOutlet  # so is this

        return EncryptedOutlet(recipe, method, client, key)
    return Outlet(recipe, method, client)
