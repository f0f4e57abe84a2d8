"""`folklora status`: what the server of a federation on this machine is at; reads files, asks nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from folklora.errors import FederationError, FolkLoraError
from folklora.federation.flower.membership import Federation
from folklora.federation.flower.serving import STATUS, alone
from folklora.federation.rundir import RunDirectory


def status(folder: str | Path) -> dict[str, Any]:
    """What is known of a federation's server.

    Returns
    -------
    dict
        ``up``; ``address`` and ``pid`` of the server, if it is; ``run``, the last one's directory, its last committed
        ``round`` of ``rounds`` and whether it is ``finished``; ``members``: of each whether it is ``registered`` (its
        public key is here) and ``connected``, ``since`` when and when it was last ``seen`` (UTC).

    Raises
    ------
    FederationError
        The folder is no federation's.
    """
    federation = Federation.open(folder)
    up = _served(federation)
    try:
        noted: dict[str, Any] = json.loads((federation.folder / "server" / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        noted = {}
    known = noted.get("members", {})
    nobody = {"connected": False, "since": None, "seen": None}
    members = {}
    for name in federation.members:
        found = {**nobody, **known.get(name, {})}
        registered = federation.public_key(name).is_file()
        members[name] = {"registered": registered, **found, "connected": up and found["connected"]}
    return {
        "federation": federation.name,
        "up": up,
        "address": noted.get("address") if up else None,
        "pid": noted.get("pid") if up else None,
        **_progress(noted.get("run")),
        "members": members,
    }


def _served(federation: Federation) -> bool:
    try:
        with alone(federation):
            return False
    except FederationError:
        return True


def _progress(run: str | None) -> dict[str, Any]:
    """How far a run is; nothing, if it is not there any more."""
    if run is not None:
        try:
            directory = RunDirectory.open(run)
            checkpoint = directory.checkpoint()
            return {
                "run": run,
                "round": checkpoint.round if checkpoint else None,
                "rounds": directory.recipe.train.rounds,
                "finished": directory.finished,
            }
        except FolkLoraError:
            pass
    return {"run": run, "round": None, "rounds": None, "finished": False}
