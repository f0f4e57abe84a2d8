"""A member's end of what `folklora.federation.intake` is the server's: from a method's message to bytes and back.

talk(round, topic, data) -> bytes     an exchange beside the training (keys, shares); by default there is none
encode(round, message) -> bytes       an upload, with whatever protects it
open(data) -> message                 a welcome or a reply
"""

from __future__ import annotations

from folklora.errors import MessageError
from folklora.federation.codec import decode
from folklora.federation.compression import Compression, Uplink
from folklora.methods.base import Client, Message, Method
from folklora.recipe import Recipe


class Outlet:
    """Uploads in the clear; see the module's text.

    Attributes
    ----------
    attached
        What came along with the order of this round, if anything did.
    """

    def __init__(self, recipe: Recipe, method: Method, client: Client) -> None:
        self.recipe = recipe
        self.method = method
        self.client = client
        self.uplink = Uplink(Compression(recipe.message, method), client.id)
        self.attached: bytes | None = None

    def talk(self, round: int, topic: str, data: bytes) -> bytes:
        """What the member answers to one part of an exchange; a function of its secret, its state and the part alone.

        Raises
        ------
        MessageError
            For a topic that the recipe has no use for, or a part that cannot be.
        """
        raise MessageError(f"topic {topic[:40]!r}: this recipe has no such exchange")

    def encode(self, round: int, message: Message) -> bytes:
        return self.uplink.encode(round, message)

    def open(self, data: bytes, most: int) -> Message:
        """A download of at most so many bytes."""
        return decode(data, most)


def outlet_of(recipe: Recipe, method: Method, client: Client) -> Outlet:
    """The recipe's."""
    return Outlet(recipe, method, client)
