"""Flower's HTTP clients dial the address they are given: no proxy out of the environment, no redirect.

As Flower has them they go through ``HTTP_PROXY``, on loopback too, and follow a server that sends them elsewhere. A
proxy that forwards would see the updates; a hostile server could send a member's requests into its own network.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx


class Direct(httpx.Client):
    """A client that its environment and its servers have no say in."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "trust_env": False, "follow_redirects": False})


def dial_directly() -> None:
    """Let all of Flower's clients that this process makes from now on be such."""
    from flwr.supercore.protobuf import client

    vars(client)["httpx"] = SimpleNamespace(**{**vars(httpx), "Client": Direct})
