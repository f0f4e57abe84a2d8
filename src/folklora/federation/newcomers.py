"""Clients that join when all rounds are over: what the server makes of a newcomer's sketch, and how they do with it.

A newcomer takes part in no round, and nothing of it is in the server's state. It sends its sketch, is told its welcome
and its reply (`folklora.methods.base.Method.newcomer`), and is scored with them as they are: no training of its own
stands between. All of that follows from the last committed round, so whoever is killed at it does it again, with the
same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from folklora.backbones.metric import Score
from folklora.errors import MethodError
from folklora.federation.codec import decode, encode
from folklora.federation.depths import taken
from folklora.federation.ledger import Ledger
from folklora.federation.member import Member
from folklora.federation.scores import summarise
from folklora.federation.setup import Setup
from folklora.methods.contract import Message, State


def introduce(
    setup: Setup, state: State, client: str, sketch: Message | None, rounds: int
) -> tuple[bytes | None, bytes | None]:
    """A newcomer's welcome and its reply, as they travel.

    Parameters
    ----------
    sketch
        What it sent, checked; None where the method asks for none.
    rounds
        How many are committed: before the first the server has no reply for anybody.

    Raises
    ------
    MethodError
        If there are no newcomers.
    """
    if setup.joining is None:
        raise MethodError(f"client {client!r} is no newcomer; allowed: newcomers.share above 0")
    welcome, reply = setup.joining.newcomer(state, client, sketch)
    dtype = setup.recipe.message.dtype
    return (
        None if welcome is None else encode(welcome, dtype),
        None if reply is None or not rounds else encode(reply, dtype),
    )


def settle_in(setup: Setup, state: State, member: Member, rounds: int, *, tuned: bool = False) -> None:
    """Bring a newcomer's member to where a run left it; ``tuned``: before the server's reply."""
    data = member.sketch()
    sketch = None if data is None else decode(data, len(data))
    welcome, reply = introduce(setup, state, member.client.id, sketch, rounds)
    if welcome is not None:
        member.settle(welcome)
    if reply is not None and not tuned:
        member.receive(reply)


def told(setup: Setup, scores: Mapping[str, Score], failed: Mapping[str, str], ledger: Ledger) -> dict[str, Any]:
    """What ``summary.json`` says under ``newcomers``; bytes are means over all of them, both ways."""
    metric, count = setup.task.metric, len(setup.newcomers)
    means = summarise(scores, metric) if scores else {"mean": None, "std": None, "worst_tenth": None, "weighted": None}
    clients: dict[str, dict[str, Any]] = {c: {metric.name: score.value, **score.beside} for c, score in scores.items()}
    if setup.depths is not None:
        for client, steps in taken(setup.depths, scores).items():
            clients[client]["depth"] = steps
    lacks = setup.joining.newcomer_lacks if setup.joining is not None else None
    return {
        **{name: value for name, value in means.items() if name not in ("metric", "higher", "clients")},
        "clients": clients,
        **({"failed": dict(failed)} if failed else {}),
        **({"lacks": lacks} if lacks else {}),
        "bytes_up_per_client": ledger.up.total() / count,
        "bytes_down_per_client": ledger.down.total() / count,
    }


def row_of(joined: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Their part of a row of `compare`."""
    moved = joined["bytes_up_per_client"] + joined["bytes_down_per_client"]
    return {f"{metric}_newcomers": joined["mean"], "bytes_per_newcomer": moved}
