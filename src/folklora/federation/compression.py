"""What of an upload travels: the recipe's ``[message]`` table, under every method.

``dtype`` rounds what goes up and what comes down (`folklora.federation.codec`). With ``top_k`` below 1, or with
``error_feedback``, an upload is the difference to what both sides know already (`Method.known`: what the client was
last told, or what it started with), because a difference is small where a model is not:

1. Client: ``d = x + e - r``; x is what the method sends, r the reference, e the memory (0 without feedback).
2. d travels: of each matrix the largest ``top_k`` of its numbers, rounded to ``dtype``; d' is what arrives.
3. Server: ``x' = r + d'`` is what the method is given.
4. With feedback, the client keeps ``e <- x + e - x'``: what is not sent now is sent later
  [arXiv 1809.07599, 1901.09847; relative to the last reply and under any method: recon].

Whose upload does not arrive, or is refused, has not taken part: it finds its memory as it was before, and its update is
lost as without compression. So the client takes the new memory over only when it is told that its upload was accepted.

The reference's checksum travels beside the tensors (12 bytes and a name): a client and a server that do not mean the
same are found out at once, and the client fails that round. Integers travel as they are. Tensors whose rows a method
names by an index (``index/<site>``) keep their memory as long as they name the same rows. What has no reference has no
memory, and neither has what starts afresh in every round (`Method.repays`): it continues nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors, kind
from folklora.errors import MessageError
from folklora.federation.codec import check, decode, encode, longest
from folklora.methods.base import Method
from folklora.methods.contract import Message
from folklora.sections import MessageSection

REFERENCE = "reference"
"""The number that carries the reference's checksum."""


class Compression:
    """Both ends of the wire, as the recipe wants them; a server needs no more than this."""

    def __init__(self, section: MessageSection, method: Method) -> None:
        self.method = method
        self.differences = section.top_k < 1 or section.error_feedback
        self.feedback = section.error_feedback
        self.down = section.dtype
        self.up = f"{section.dtype}@{section.top_k!r}" if section.top_k < 1 else section.dtype

    # -- what both sides compute -------------------------------------------------------------------------------------

    def reference(self, round: int, client: str, told: Tensors, message: Message) -> Tensors:
        """What both sides know of the floating tensors of an upload, by name."""
        known = self.method.known(round, client, told, message)
        return {
            name: known[name].float()
            for name, tensor in sorted(message.tensors.items())
            if tensor.is_floating_point() and name in known and known[name].shape == tensor.shape
        }

    def heard(self, message: Message | None, names: Iterable[str]) -> Tensors:
        """Some tensors of a download as their receiver reads them."""
        if message is None:
            return {}
        tensors = {name: message.tensors[name] for name in names if name in message.tensors}
        return decode(encode(Message(tensors, {}, message.encodings), self.down)).tensors

    def told(self, said: Iterable[Message | None], names: Iterable[str]) -> Tensors:
        """Some tensors of what a client was sent, its welcome and then its last reply, as it read them."""
        told: Tensors = {}
        for download in said:
            told |= self.heard(download, names)
        return told

    # -- at the server -----------------------------------------------------------------------------------------------

    def read(self, round: int, client: str, data: bytes, expected: Shapes, said: Iterable[Message | None]) -> Message:
        """An upload as the method is given it.

        Parameters
        ----------
        expected
            The tensors that were agreed on.
        said
            What the client was sent: its welcome and its last reply.

        Raises
        ------
        MessageError
            If it is not what was agreed, or is relative to something else than the server's reference.
        """
        numbers = ("examples", REFERENCE) if self.differences else ("examples",)
        message = decode(data, longest(expected, numbers), expected)
        check(message, expected, numbers)
        if not self.differences:
            return message
        reference = self.reference(round, client, self.told(said, expected), message)
        if message.numbers[REFERENCE] != checksum(reference):
            raise MessageError("the upload is relative to something else than what the client was last sent")
        return Message(restored(message.tensors, reference), {"examples": message.numbers["examples"]})

    # -- before anything runs ----------------------------------------------------------------------------------------

    def bytes_up(self, message: Message) -> int:
        """Length of an upload whose tensors have these shapes."""
        numbers = {**message.numbers, REFERENCE: 0.0} if self.differences else message.numbers
        return len(encode(Message(message.tensors, numbers, message.encodings), self.up))

    def bytes_down(self, message: Message) -> int:
        return len(encode(message, self.down))


class Uplink:
    """A client's end: what it was told, and what its uploads have lost so far.

    Attributes
    ----------
    listens
        Whether what it was told is kept: compression wants it, and so do others that need the `update` of an upload.
    """

    def __init__(self, compression: Compression, client: str) -> None:
        self.compression = compression
        self.client = client
        self.listens = compression.differences
        self.welcome: Tensors = {}
        self.reply: Tensors = {}
        self.memory: Tensors = {}
        self.pending: Tensors = {}

    def settled(self, message: Message) -> None:
        if self.listens:  # copies: a method may keep what arrived, and a record refuses shared memory
            self.welcome = {name: tensor.clone() for name, tensor in message.tensors.items()}

    def received(self, message: Message) -> None:
        """Not part of the record: whoever trains after the first round has received just before."""
        if self.listens:
            self.reply = message.tensors

    def reference(self, round: int, message: Message) -> Tensors:
        """What both sides know of an upload; see `Compression.reference`."""
        return self.compression.reference(round, self.client, {**self.welcome, **self.reply}, message)

    def encode(self, round: int, message: Message) -> bytes:
        """An upload as bytes; the memory stays as it is until the upload is `accepted`.

        Raises
        ------
        MessageError
            If it cannot be sent.
        """
        compression = self.compression
        if not compression.differences:
            return encode(message, compression.up)
        reference = self.reference(round, message)
        meant = dict(message.tensors)
        for name in self._remembered(message, reference):
            meant[name] = meant[name] + self.memory[name]
        sent = {name: tensor - reference[name] if name in reference else tensor for name, tensor in meant.items()}
        numbers = {**message.numbers, REFERENCE: float(checksum(reference))}
        data = encode(Message(sent, numbers, message.encodings), compression.up)
        read = restored(decode(data, shapes={n: tuple(t.shape) for n, t in sent.items()}).tensors, reference)
        if compression.feedback:
            owed = [name for name in reference if compression.method.repays(name)]
            self.pending = {name: meant[name] - read[name] for name in owed}
            # A copy: methods send notes of their own, and a record refuses shared memory.
            self.pending |= {name: t.clone() for name, t in message.tensors.items() if kind(name) == "index"}
        return data

    def accepted(self) -> None:
        """The server has taken the last upload: what it lost is what is remembered from now on."""
        self.memory = {**self.memory, **self.pending}
        self.pending = {}

    def _remembered(self, message: Message, reference: Tensors) -> list[str]:
        """Tensors whose memory means what it meant when it was made."""
        names = [name for name in reference if name in self.memory]
        return [
            name
            for name in names
            if self.memory[name].shape == reference[name].shape and self._same_rows(name, message.tensors)
        ]

    def _same_rows(self, name: str, tensors: Tensors) -> bool:
        index = f"index/{name.partition('/')[2]}"
        if index not in tensors:
            return True
        return index in self.memory and torch.equal(tensors[index].sort().values, self.memory[index].sort().values)

    # -- its record in the run directory -----------------------------------------------------------------------------

    def record(self) -> dict[str, Tensors]:
        return {"welcome": self.welcome, "memory": self.memory, "pending": self.pending}

    def restore(self, groups: dict[str, Tensors]) -> None:
        """Take what is ours out of a record's groups."""
        self.welcome, self.memory, self.pending = (groups.pop(name, {}) for name in ("welcome", "memory", "pending"))
        self.reply = {}


def restored(differences: Tensors, reference: Tensors) -> Tensors:
    """``r + d`` where there is a reference; the same bits on both sides.

    Raises
    ------
    MessageError
        If a sum overflows.
    """
    tensors = {name: reference[name] + d if name in reference else d for name, d in differences.items()}
    for name in reference:
        if not bool(torch.isfinite(tensors[name]).all()):
            raise MessageError(f"tensor {name!r} overflows when it is added to what was known of it")
    return tensors


def checksum(reference: Tensors) -> int:
    """CRC-32 of what both sides mean, names included."""
    found = 0
    for name, tensor in sorted(reference.items()):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(_bytes(tensor), found)
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
