"""What ``secure.kind = "masks"`` asks of a recipe, what it costs in bytes, and how it is said."""

from __future__ import annotations

import math
from typing import Any

from folklora.adapters.lowrank import Tensors
from folklora.errors import MessageError, MethodError, RecipeError
from folklora.federation.budget import resolved_noise
from folklora.methods.base import Method
from folklora.privacy.fixedpoint import Grid
from folklora.privacy.secagg import wire
from folklora.recipe import Recipe

PLAIN = ("float32", "float16", "bfloat16")
DEVIATIONS, STEPS = 8, 64
"""Of a share of noise: how many standard deviations fit into the range at least, and how many steps into one."""
UPLOAD_HEAD = 40
"""Bytes of a masked upload in front of its words (`folklora.federation.masked`)."""


def parties(recipe: Recipe, clients: int) -> int:
    """How many of so many clients a round has when all are there: both sides know it without being told."""
    return recipe.train.sampled(clients)


def threshold(recipe: Recipe, clients: int) -> int:
    """How many of a round's clients open its sum: ``secure.threshold`` of them, and always more than half, because two
    sums of one round could be opened if two halves could be asked."""
    count = parties(recipe, clients)
    return min(count, max(count // 2 + 1, math.ceil(recipe.secure.threshold * count - 1e-9)))


def refuse_unmaskable(recipe: Recipe, method: Method) -> None:
    """Before work starts: whatever cannot be where the server reads sums alone.

    Raises
    ------
    FolkLoraError
        Naming it, and what is allowed.
    """
    if recipe.secure.kind != "masks":
        return
    import folklora.privacy.secagg.pieces  # noqa: F401, so that it is said now if its library is not installed

    here = 'secure.kind = "masks"'
    if not method.averages:
        raise MethodError(
            f"method.name = {method.name!r} with these options takes more of uploads than their mean, and {here} shows "
            "the server nothing else; allowed: fedit, ffa, fedsa, rolora, federa, loraxs, fedsb, fedlpp, ditto, apfl, "
            'folklora, or celora with similarity = "size", each with one rank for all and without scaffold'
        )
    count = parties(recipe, len(method.context.clients))
    if count < 2:
        raise RecipeError(f"{here} with {count} client a round: its sum is its upload; allowed: 2 or more clients")
    message = recipe.message
    if message.top_k < 1 or message.error_feedback or message.dtype not in PLAIN:
        raise RecipeError(
            f"{here} sends every number of an upload as a word of 32 bits; allowed: no message.top_k, no "
            f"message.error_feedback, message.dtype = {', '.join(PLAIN)}, which is how downloads travel"
        )
    if recipe.robust.rule != "mean":
        raise RecipeError(f'{here} shows no single upload that robust.rule = "{recipe.robust.rule}" could judge; '
                          'allowed: "mean"')  # fmt: skip
    if recipe.privacy.unit == "client" and recipe.privacy.placement == "server":
        raise RecipeError(
            f'{here} with privacy.placement = "server", which clips what it cannot read; allowed: "shares", "client"'
        )
    if recipe.privacy.unit == "client" and recipe.privacy.placement == "shares":
        _refuse_lost_noise(recipe, method, count)


def _refuse_lost_noise(recipe: Recipe, method: Method, count: int) -> None:
    """The accountant adds up shares as they were drawn: none may be cut off at the range, nor vanish in a step of the
    grid (`folklora.privacy.fixedpoint`)."""
    deviation = _share(recipe, method, count)
    steps = (2**31 - 1) // count
    least, most = recipe.privacy.clip + DEVIATIONS * deviation, deviation * steps / STEPS
    if not least <= recipe.secure.range <= most:
        raise RecipeError(
            f'secure.range = {recipe.secure.range:g} with privacy.placement = "shares", each of sd {deviation:.3g}: '
            f"noise would be clipped, or rounded away; allowed: {least:.4g} to {most:.4g}"
        )


def _share(recipe: Recipe, method: Method, count: int) -> float:
    """Standard deviation of one share of the noise."""
    return recipe.privacy.clip * resolved_noise(recipe, method) / math.sqrt(count)


def refuse_cut_noise(recipe: Recipe, method: Method, reference: Tensors) -> None:
    """The same in a round, whose uploads lie around what all know of them: whether it is refused tells of no update.

    Raises
    ------
    MessageError
        If an update and a share of noise may not fit into the range.
    """
    if recipe.privacy.unit != "client" or recipe.privacy.placement != "shares":
        return
    share = _share(recipe, method, parties(recipe, len(method.context.clients)))
    known = max((float(tensor.abs().max()) for tensor in reference.values()), default=0.0)
    least = known + recipe.privacy.clip + DEVIATIONS * share
    if least > recipe.secure.range:
        raise MessageError(
            f"what is known of uploads is up to {known:.3g}, an update up to {recipe.privacy.clip:g}, a share of noise "
            f"of sd {share:.3g}: noise may be cut off at {recipe.secure.range:g}; allowed: a larger secure.range, at "
            f"least {least:.4g}"
        )


def masked_bytes(numbers: int) -> int:
    """Of an upload of so many numbers."""
    return UPLOAD_HEAD + 4 * (numbers + 1)


def exchange_bytes(count: int) -> tuple[int, int]:
    """What each of so many clients sends and is sent in a round beside its upload and its reply, if none is lost."""
    head, entries = wire.HEAD.size, wire.HEAD.size + 4
    up = head + wire.KEYS.size + head + count * wire.SENT.size + head + count * wire.POINT
    lists = count * (2 * wire.ENTRY.size + 1) + (count - 1) * wire.ASKED.size + 32
    return up, head + 3 * entries + lists + 4


def secrecy(recipe: Recipe, clients: int) -> dict[str, Any]:
    """What keeps the server from reading uploads: as data, and in ``words`` where there is something to say.

    ``error`` is by how much a mean of equal weights is off at most, ``bytes_up`` and ``bytes_down`` what the exchange
    weighs beside an upload and a reply.
    """
    if recipe.secure.kind != "masks":
        return {"kind": recipe.secure.kind}
    needed, count = threshold(recipe, clients), parties(recipe, clients)
    error = Grid(recipe.secure.range, count, 1).error(count, count)
    up, down = exchange_bytes(count)
    words = (
        f"secure aggregation: masks, threshold {needed} of {count} clients a round; numbers beyond "
        f"{recipe.secure.range:g} are clipped, a mean of equal weights is off by at most {error:.1g}; keys and points "
        f"are {up / 1e3:,.1f} kB up and {down / 1e3:,.1f} kB down of what is said above"
    )
    return {
        "kind": "masks",
        "threshold": needed,
        "clients": count,
        "range": recipe.secure.range,
        "error": error,
        "bytes_up": up,
        "bytes_down": down,
        "words": words,
    }
