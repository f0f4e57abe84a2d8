"""Encrypted messages as they travel (``secure.kind = "ckks"``): what is in which ciphertext, under which name.

The tensors of one kind are flattened, in the order of their names, and encrypted together (`folklora.privacy.ckks`);
kinds apart, because methods send and mix kinds in different ways. In the codec's messages these are int32 tensors, four
bytes in each::

    up      sealed/<kind>/seed   [m, 8]            sealed/<kind>/body   6 bytes a number, and m more of those
    down    sealed/<kind>/mask   [m, 2048]         sealed/<kind>/body   4 bytes a number, and m more

with m ciphertexts of 2047 numbers each. How many there are follows from the method alone: what has another length is
refused before it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors, kind
from folklora.errors import MessageError, RecipeError
from folklora.federation.codec import SEALED, check, decode, encode, longest
from folklora.methods.base import Method
from folklora.methods.contract import Message
from folklora.privacy.ciphertexts import DEGREE, SEED, UP, Mixed, Sealed, ciphertexts
from folklora.privacy.ckks import Key
from folklora.recipe import Recipe


def refuse_unmixable(recipe: Recipe, method: Method) -> None:
    """Refuse what cannot be done to numbers that nobody at the server can read.

    Raises
    ------
    RecipeError
        Naming what wants to read them, and what is allowed.
    """
    if recipe.secure.kind != "ckks":
        return
    wanted, allowed = method.must_read or ("", "")
    if recipe.message.top_k < 1:
        wanted, allowed = f"message.top_k = {recipe.message.top_k:g}", "top_k = 1.0"
    elif recipe.message.error_feedback:
        wanted, allowed = "message.error_feedback = true", "error_feedback = false"
    elif recipe.robust.rule != "mean":
        wanted, allowed = f'robust.rule = "{recipe.robust.rule}"', 'rule = "mean"'
    elif recipe.privacy.unit == "client" and recipe.privacy.placement == "server":
        wanted, allowed = 'privacy.placement = "server"', 'placement = "client" or "shares"'
    if wanted:
        raise RecipeError(
            f'{wanted} with secure.kind = "ckks": the server mixes uploads, and reads none; allowed: {allowed}'
        )


TOPIC, ASKED = "ckks_key", b"which"
"""The exchange in which members say which key they have."""


@dataclass(frozen=True)
class SealedUpload:
    """What the server has of one client: its number of examples, and ciphertexts by kind."""

    examples: float
    sealed: Mapping[str, Sealed]


class Sealing:
    """Both ends of the wire; only `seal` and `opened` want the key."""

    def __init__(self, method: Method) -> None:
        self.method = method

    # -- up ----------------------------------------------------------------------------------------------------------

    def seal(self, message: Message, key: Key) -> bytes:
        """An upload, encrypted.

        Raises
        ------
        MessageError
            Naming the kind of tensors that has a number too large for it.
        """
        tensors: Tensors = {}
        for name, section in _sections(_shapes(message.tensors)).items():
            numbers = torch.cat([message.tensors[tensor].detach().double().flatten() for tensor in section])
            try:
                sealed = key.encrypt(numbers.cpu().numpy())
            except MessageError as error:
                raise MessageError(f"tensors of kind {name!r}: {error}") from None
            tensors |= {f"{SEALED}/{name}/seed": _words(sealed.seeds).view(-1, SEED // 4)}
            tensors |= {f"{SEALED}/{name}/body": _words(sealed.body)}
        return encode(Message(tensors, {"examples": message.numbers["examples"]}))

    def read(self, data: bytes, expected: Shapes) -> SealedUpload:
        """An upload at the server.

        Raises
        ------
        MessageError
            If it is not as long as what was agreed. What is in it nobody here can tell.
        """
        sizes = {name: _count(section) for name, section in _sections(expected).items()}
        shapes = {each: shape for name, count in sizes.items() for each, shape in _up(name, count).items()}
        message = decode(data, longest(shapes, ("examples",)), shapes)
        check(message, shapes, ("examples",))
        sealed = {}
        for name, count in sizes.items():
            seeds = _bytes(message.tensors[f"{SEALED}/{name}/seed"]).reshape(-1, SEED)
            body = _bytes(message.tensors[f"{SEALED}/{name}/body"])[: UP * (count + ciphertexts(count))]
            sealed[name] = Sealed(seeds, body.reshape(-1, UP))
        return SealedUpload(message.numbers["examples"], sealed)

    # -- down --------------------------------------------------------------------------------------------------------

    def opened(self, message: Message, key: Key, client: str) -> Tensors:
        """The tensors that a reply holds encrypted.

        Raises
        ------
        MessageError
            If it holds others than agreed, or was not encrypted under this key.
        """
        sealed = {name: tensor for name, tensor in message.tensors.items() if kind(name) == SEALED}
        sections = _sections(self._travelling(client))
        here = {name: _down(name, _count(section)) for name, section in sections.items()}
        here = {name: shapes for name, shapes in here.items() if shapes.keys() & sealed.keys()}
        check(Message(sealed), {each: shape for shapes in here.values() for each, shape in shapes.items()})
        tensors: Tensors = {}
        for name, shapes in here.items():
            mask, body = (sealed[each].numpy().view(np.uint32) for each in shapes)
            numbers = torch.from_numpy(key.decrypt(Mixed(mask[None], body[None]))).float()
            parts = numbers.split([math.prod(shape) for shape in sections[name].values()])
            tensors |= {n: p.reshape(s) for (n, s), p in zip(sections[name].items(), parts, strict=True)}
        return tensors

    def _travelling(self, client: str) -> Shapes:
        """All that ever travels; factors that alternate have all done so after two rounds."""
        return {n: shape for round in (1, 2) for n, shape in self.method.expected(round, {}, client).items()}

    # -- before anything runs ----------------------------------------------------------------------------------------

    def bytes_up(self, message: Message) -> int:
        """Length of an upload whose tensors have these shapes."""
        sizes = {name: _count(section) for name, section in _sections(_shapes(message.tensors)).items()}
        return _weight({n: s for name, count in sizes.items() for n, s in _up(name, count).items()}, message.numbers)

    def bytes_down(self, message: Message) -> int:
        sizes = {name: _count(section) for name, section in _sections(_shapes(message.tensors)).items()}
        return _weight({n: s for name, count in sizes.items() for n, s in _down(name, count).items()}, {})


def _down(name: str, count: int) -> Shapes:
    """The tensors of a reply's section of so many numbers: its masks, its body."""
    m = ciphertexts(count)
    return {f"{SEALED}/{name}/mask": (m, DEGREE), f"{SEALED}/{name}/body": (count + m,)}


def _up(name: str, count: int) -> Shapes:
    m = ciphertexts(count)
    return {f"{SEALED}/{name}/seed": (m, SEED // 4), f"{SEALED}/{name}/body": (-(-UP * (count + m) // 4),)}


def _sections(shapes: Shapes) -> dict[str, Shapes]:
    """Tensors by kind, in the order in which they are encrypted."""
    found: dict[str, Shapes] = {}
    for name in sorted(shapes):
        found.setdefault(kind(name), {})[name] = shapes[name]
    return found


def _shapes(tensors: Tensors) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _count(section: Shapes) -> int:
    return sum(map(math.prod, section.values()))


def _weight(shapes: Shapes, numbers: Mapping[str, float]) -> int:
    blank = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    return len(encode(Message(blank, dict(numbers))))


def _words(raw: np.ndarray) -> Tensor:
    """Bytes as int32, the last one filled up."""
    flat = raw.reshape(-1)
    return torch.from_numpy(np.pad(flat, (0, -len(flat) % 4)).view("<i4").astype(np.int32))


def _bytes(words: Tensor) -> np.ndarray:
    return words.numpy().astype("<i4").view(np.uint8).reshape(-1)
