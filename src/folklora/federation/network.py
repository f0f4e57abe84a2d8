"""A network run at the server: begun, opened again, and played to its end over whatever carries orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folklora.errors import RunError
from folklora.federation.contract import CONTRACT, Contract
from folklora.federation.parties import server_setup
from folklora.federation.remote import Carrier, RemoteEngine
from folklora.federation.roster import FEDERATION, Roster
from folklora.federation.rounds import Progress, Silent
from folklora.federation.run import play, read_summary
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup
from folklora.federation.trackers import refuse_unreachable
from folklora.recipe import Recipe


@dataclass(frozen=True)
class Hosted:
    """A network run as its server has it; ready to be played."""

    setup: Setup
    directory: RunDirectory
    roster: Roster


def of_network(recipe: Recipe) -> Recipe:
    """The recipe as a network run has it, whatever its ``engine.kind`` says."""
    return Recipe.parse(recipe.model_dump(), ["engine.kind=flower"])


def begin(recipe: Recipe, out: str | Path, members: Sequence[str]) -> Hosted:
    """A new run directory for a recipe, which is then one of a network run, and these members.

    Raises
    ------
    FolkLoraError
        For anything in the recipe, the server's data or the directory that cannot be; nothing is written then.
    """
    recipe = of_network(recipe)
    setup = server_setup(recipe, members)
    refuse_unreachable(recipe.track)
    roster = Roster.new(RunDirectory(Path(out)), setup.data.table.classes, members)
    agreed = {CONTRACT: Contract.of(setup.method.context).encode(), FEDERATION: roster.federation().encode()}
    directory = RunDirectory.create(out, recipe, roster.partition(), agreed)
    return Hosted(setup, directory, roster)


def reopen(path: str | Path, members: Sequence[str], *, previous: bool = False) -> Hosted:
    """A run directory that `begin` made, for the same members.

    Parameters
    ----------
    previous
        Step back to the checkpoint before the last one first.

    Raises
    ------
    RunError
        If it holds no network run, or one of other members or labels.
    """
    directory = RunDirectory.open(path)
    roster = Roster.open(directory)
    if roster.members != list(members):
        raise RunError(f"{path}: a run of the members {', '.join(roster.members)}; allowed: the same federation")
    setup = server_setup(directory.recipe, members)
    if list(setup.data.table.classes) != roster.classes:
        raise RunError(f"{path}: the labels are not those that this run started with (partition.json)")
    if previous:
        directory.step_back()
    return Hosted(setup, directory, roster)


def host(run: Hosted, carrier: Carrier, progress: Progress | None = None) -> dict[str, Any]:
    """Play a run from where it stands to its end, tell the members, and return its summary."""
    if run.directory.finished:
        return read_summary(run.directory)
    engine = RemoteEngine(run.setup, carrier, run.directory, run.roster)
    summary = play(run.directory, run.setup, engine, progress or Silent(), engine.examples)
    engine.goodbye()
    return summary
