"""Who serves a federation: one process at a time, which notes what it knows of the members."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from folklora.errors import FederationError, FolkLoraError
from folklora.federation.files import held, write_whole
from folklora.federation.flower.membership import Federation

log = logging.getLogger(__name__)

LOCK, STATUS = "lock", "status.json"
EVERY = 2.0
"""Seconds between two notes of who is connected."""


@contextmanager
def alone(federation: Federation) -> Iterator[None]:
    """Hold the server's part of a federation for one process.

    Raises
    ------
    FederationError
        Another process serves it.
    """
    taken = FederationError(f"{federation.folder}: another process serves this federation")
    with held(federation.folder / "server" / LOCK, taken):
        yield


@contextmanager
def noted(federation: Federation, address: str, run: Path, members: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Keep ``server/status.json`` up to date: where the server is, which run, and what ``members`` says of each."""
    path, over = federation.folder / "server" / STATUS, threading.Event()

    def note() -> None:
        while not over.wait(EVERY):
            try:
                write(members())
            except (FolkLoraError, OSError) as error:  # the run itself says it louder
                log.debug("status: %s", error)

    def write(found: Mapping[str, Any]) -> None:
        document = {"pid": os.getpid(), "address": address, "run": str(run.resolve()), "members": found}
        write_whole(path, json.dumps(document, indent=1).encode(), durable=False)

    write({})
    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
