"""HAFLQ: HAFL whose uploads have more bits where it matters, within what a client's link can carry. arXiv 2411.06581.

1. Clients train and send the rank-1 pairs that matter most to them, and the server averages over the owners of each
  pair: `folklora.methods.hafl`.
2. A client may send ``bits`` a number on average, of each layer's pairs, scales and all; ``bits`` may be a list, one
  number a client [bandwidth-aware: abstract; a budget in bits: recon]. Nobody gets less than 2 bits and their scales.
3. Within that, its more important pairs get more bits: 2, 3, 4 (normal-float grids) or 8 (equally spaced), the same
  for row i of A and column i of B [importance-aware: abstract; grids, blocks of ``block`` numbers: recon].
4. Who gets how many follows from the order of importance alone: the i-th most important pair weighs 1 / i, the squared
  error of b bits is 4^-b, and bits go one step at a time to where an added byte removes most weighted error [recon]. So
  the order that HAFL sends anyway says all, and the length of an upload is known beforehand.

The pairs' bits are this method's to say: ``message.dtype`` and ``message.top_k`` apply to the head and to downloads
alone.

The paper's third part, a backbone in few bits by salience, is ``model.bits``: `folklora.backbones.quantize`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from folklora.adapters.lowrank import Site
from folklora.errors import MethodError
from folklora.methods.contract import Client, Context, Message
from folklora.methods.hafl import HAFL, HAFLOptions
from folklora.methods.options import Options
from folklora.quantization import BLOCK, MOST_IN_BLOCK, blocks_of, packed_bytes

STEPS: tuple[tuple[int, str], ...] = ((2, "nf2"), (3, "nf3"), (4, "nf4"), (8, "int8"))
"""Bits that a pair may have, and the grid that a codec's slices of so many bits are on."""

Bits = Annotated[float, Field(ge=2, le=64)]


class HAFLQOptions(HAFLOptions):
    bits: Bits | list[Bits] = Field(4.0, description="a number of the pairs that go up, on average; or one a client")
    block: int = Field(BLOCK, ge=1, le=MOST_IN_BLOCK, description="numbers that share a scale")


class HAFLQ(HAFL):
    """HAFL with bits by importance."""

    name = "haflq"
    title = "HAFLQ (bits by importance)"
    options_type = HAFLQOptions
    options: HAFLQOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        bits = self.options.bits
        if isinstance(bits, list) and len(bits) != len(context.clients):
            raise MethodError(
                f"method.bits lists {len(bits)} numbers for {len(context.clients)} clients; "
                "allowed: one number, or one a client"
            )

    def bits(self, client: str) -> float:
        """A client's budget, bits a number."""
        bits = self.options.bits
        return bits[self.context.clients.index(client)] if isinstance(bits, list) else bits

    def send(self, round: int, client: Client) -> Message | None:
        message = super().send(round, client)
        return None if message is None else self.coarse(client.id, message)

    def coarse(self, client: str, message: Message) -> Message:
        """An upload with the encodings of its pairs."""
        encodings = {}
        for site in self.context.sites:
            index = message.tensors[f"index/{site.name}"]
            shares = bits_by_importance(site, len(index), self.bits(client), self.options.block)
            # The factors stand in ascending order of pair, the index in falling order of importance.
            own = ",".join(str(shares[i]) for i in torch.argsort(index, stable=True).tolist())
            encodings[f"A/{site.name}"] = f"rows/{self.options.block}:{own}"
            encodings[f"B/{site.name}"] = f"columns/{self.options.block}:{own}"
        return Message(message.tensors, message.numbers, encodings)

    def typical_upload(self, round: int, client: str, counts: Tensor | None = None) -> Message | None:
        message = super().typical_upload(round, client, counts)
        return None if message is None else self.coarse(client, message)


def pair_bytes(site: Site, grid: str, block: int) -> int:
    """What one pair takes on the wire: a row and a column, each a mark of its grid, scales and codes."""
    return sum(1 + 4 * blocks_of(d, block) + packed_bytes(d, grid) for d in (site.d_in, site.d_out))


@cache
def bits_by_importance(site: Site, pairs: int, bits: float, block: int) -> tuple[int, ...]:
    """Bits of each of ``pairs`` pairs, the most important first, within ``bits`` a number on average."""
    cost = [pair_bytes(site, grid, block) for _, grid in STEPS]
    left = math.floor(bits / 8 * pairs * (site.d_in + site.d_out)) - pairs * cost[0]
    level = [0] * pairs

    def price(i: int) -> int:
        """Bytes of the next step of pair i; a very short row may have it for nothing."""
        return cost[level[i] + 1] - cost[level[i]]

    def gain(i: int) -> float:
        """Weighted error that the next step of pair i removes, by added byte."""
        before, after = STEPS[level[i]][0], STEPS[level[i] + 1][0]
        return float((4.0**-before - 4.0**-after) / (i + 1) / price(i)) if price(i) else math.inf

    while True:
        open_ = [i for i in range(pairs) if level[i] + 1 < len(STEPS) and price(i) <= left]
        if not open_:
            return tuple(STEPS[each][0] for each in level)
        best = max(open_, key=gain)  # the first of equals is the more important
        left -= price(best)
        level[best] += 1
