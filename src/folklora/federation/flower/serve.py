"""`folklora serve`: one run of a federation, from the door to the summary.

Three things are started, and stopped in the opposite order: Flower's SuperLink on loopback, which keeps messages; the
gate before it, which lets members in; and the run, in this process.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from folklora.data.sources import sort_names
from folklora.errors import FederationError
from folklora.federation.files import write_whole
from folklora.federation.flower.apps import GridCarrier, server_app
from folklora.federation.flower.arrivals import PatientGrid
from folklora.federation.flower.executor import SuperLink
from folklora.federation.flower.gate import Gate, Limits
from folklora.federation.flower.membership import Federation
from folklora.federation.flower.processes import ended_by_signals, is_loopback, superlink
from folklora.federation.flower.serving import alone, noted
from folklora.federation.network import Hosted, begin, host, of_network, reopen
from folklora.federation.rounds import Progress
from folklora.federation.run import read_summary, refuse_another_recipe
from folklora.federation.rundir import RunDirectory
from folklora.recipe import Recipe

log = logging.getLogger(__name__)


def serve(
    recipe: Recipe,
    folder: str | Path,
    out: str | Path,
    progress: Progress | None = None,
    *,
    listen: str | None = None,
    port: int | None = None,
    insecure: bool = False,
) -> dict[str, Any]:
    """Run a recipe with the members of a federation; goes on where ``out`` stands, if it holds a run of this recipe.

    Parameters
    ----------
    listen, port
        Where to listen; default: the host that members dial if that is this machine's loopback, else all interfaces;
        the port that members dial.
    insecure
        Plain HTTP, on this machine's loopback only; members still prove who they are with their keys.

    Returns
    -------
    dict
        The summary, as of `folklora.federation.run.run`.

    Raises
    ------
    FolkLoraError
        Before work starts, for anything in the recipe, the federation's folder or the run directory that cannot be;
        later, if too few members are there, or the SuperLink ended. What was committed is then kept.
    """
    federation = Federation.read(folder)
    if (Path(out) / "recipe.toml").exists():
        refuse_another_recipe(of_network(recipe), Path(out))
        return resume(out, folder, progress, listen=listen, port=port, insecure=insecure)
    members = sort_names(federation.members)
    return _run(federation, lambda: begin(recipe, out, members), progress, listen, port, insecure)


def resume(
    path: str | Path,
    folder: str | Path,
    progress: Progress | None = None,
    *,
    previous: bool = False,
    listen: str | None = None,
    port: int | None = None,
    insecure: bool = False,
) -> dict[str, Any]:
    """Go on with a run of a federation; a finished one gives its summary back.

    Parameters
    ----------
    previous
        Step back to the checkpoint before the last one first (after a file was corrupted).
    """
    directory = RunDirectory.open(path)
    if directory.finished and not previous:
        return read_summary(directory)
    federation = Federation.read(folder)
    members = sort_names(federation.members)
    return _run(federation, lambda: reopen(path, members, previous=previous), progress, listen, port, insecure)


def _run(
    federation: Federation,
    ready: Callable[[], Hosted],
    progress: Progress | None,
    listen: str | None,
    port: int | None,
    insecure: bool,
) -> dict[str, Any]:
    home = federation.folder / "server" / "flower"
    summary: dict[str, Any] = {}
    with ended_by_signals(), alone(federation), ExitStack() as stack:
        run = ready()
        home.mkdir(mode=0o700, exist_ok=True)
        secret = secrets.token_bytes(32)
        write_whole(home / "secret", secret, mode=0o600)
        certificate, key, ca = federation.server_certificate, federation.server_key, federation.ca
        link = stack.enter_context(superlink(home, home / "secret", certificate, key, ca))
        flower = stack.enter_context(closing(SuperLink(link.address, secret, ca.read_bytes())))
        nodes = {name: flower.register(name, federation.public_key(name)) for name in run.roster.members}
        gate = Gate(
            listen or _everywhere(federation.host),
            federation.port if port is None else port,
            f"https://{link.address}",
            federation.public_keys(),
            certificate=None if insecure else certificate,
            key=None if insecure else key,
            ca=ca,
            limits=Limits(body=_largest_message(run)),
        )
        stack.enter_context(gate)
        stack.enter_context(noted(federation, gate.address, run.directory.path, flower.members))
        log.info("serving at %s; members: %s", gate.address, ", ".join(run.roster.members))

        def play(grid: PatientGrid) -> None:
            summary.update(host(run, GridCarrier(grid, nodes, gate.oversized), progress))

        try:
            flower.run(server_app(play))
        except FederationError:
            if not link.ends(1.0):
                raise
            why = f"Flower's SuperLink ended ({link.reason()}; see {link.log})"
            raise FederationError(f"{why}; what was committed is kept: `folklora resume`") from None
    return summary


def _everywhere(host: str) -> str:
    """Where to listen so that members reach ``host``: on loopback only, or on every interface."""
    if is_loopback(host):
        return host
    return "::" if ":" in host else "0.0.0.0"


def _largest_message(run: Hosted) -> int:
    """Bytes that one message of a member may have at the gate: well above the most that the method sends."""
    method, ranks = run.setup.method, run.setup.method.context.ranks
    of_each_rank = {rank: client for client, rank in ranks.items()}.values()
    rounds = range(1, min(method.rounds(), 2) + 1)
    uploads = [method.typical_upload(round, client) for round in rounds for client in of_each_rank]
    numbers = [sum(tensor.numel() for tensor in upload.tensors.values()) for upload in uploads if upload is not None]
    growth = max(1.0, (run.setup.recipe.adapter.promote or 0) / min(ranks.values()))
    return 2**20 + int(16 * growth * max([method.sketch_numbers(), *numbers]))
