"""A federation as it stands before the round that is attacked: played in memory, or the last checkpoint of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from folklora.adapters.lowrank import Tensors
from folklora.data.partition_file import to_json
from folklora.errors import AttackError, RunError
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Progress, Rounds
from folklora.federation.run import refuse_other_data
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup, prepare
from folklora.methods.contract import State
from folklora.recipe import Recipe


@dataclass(frozen=True)
class Warm:
    """What the server knows after ``round`` rounds, and what each client keeps.

    Attributes
    ----------
    states
        The server's after rounds 0, 1 ...; of a run the last one alone.
    record
        A client's private state by its id.
    """

    setup: Setup
    round: int
    states: tuple[State, ...]
    record: Callable[[str], Tensors]

    @property
    def state(self) -> State:
        return self.states[-1]


def attackable(recipe: Recipe) -> Recipe:
    """The recipe as it is played in memory: no network, no simulated faults, nothing that changes no number."""
    if recipe.form == "caption":
        raise AttackError(
            "data.caption: pictures with captions are not attacked, since one pair alone has no gradient; allowed: "
            "data.label"
        )
    if recipe.model.quantize != "none":
        raise AttackError(
            f'model.quantize = "{recipe.model.quantize}": gradients are not taken twice through such weights; '
            'allowed: "none"'
        )
    if recipe.drift.kind != "none":
        raise AttackError(
            f'drift.kind = "{recipe.drift.kind}": what clients hold is looked at as if it stayed; allowed: "none"'
        )
    if recipe.newcomers.share:
        raise AttackError(
            f"newcomers.share = {recipe.newcomers.share:g}: attacks are on those who take part, all of them; allowed: 0"
        )
    plain = Recipe()
    train = recipe.train.model_copy(
        update={"failures": 0.0} | ({} if recipe.adapter.promote is not None else {"evaluate_every": 10**9})
    )
    return recipe.model_copy(
        update={
            "engine": plain.engine,
            "faults": plain.faults,
            "track": plain.track,
            "train": train,
            "eval": plain.eval,
            "model": recipe.model.model_copy(update={"checkpointing": False}),
        }
    )


def play(recipe: Recipe, rounds: int, progress: Progress) -> Warm:
    """Play so many rounds of the real federation.

    Raises
    ------
    FolkLoraError
        Whatever `folklora run` refuses; and more rounds than the method has.
    """
    setup = prepare(attackable(recipe))
    if rounds > recipe.train.rounds:
        raise AttackError(f"--warmup {rounds}: train.rounds = {recipe.train.rounds}; allowed: at most so many")
    rounds = min(rounds, setup.method.rounds())  # a method may want fewer
    engine = LocalEngine(setup)
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create(
            Path(folder) / "run", setup.recipe, to_json(setup.data.table, setup.data.splits)
        )
        loop = Rounds(setup, directory, engine, list(setup.data.splits), progress)
        loop.begin()
        states = [loop.state]
        for round in range(1, rounds + 1):
            loop.round(round)
            states.append(loop.state)
    return Warm(setup, rounds, tuple(states), lambda client: engine.records([client])[client])


def reopen(path: Path) -> Warm:
    """Where a run directory stands, finished or not.

    Raises
    ------
    RunError
        If nothing is committed, the data is another, or the clients' states are elsewhere.
    """
    directory = RunDirectory.open(path)
    if directory.recipe.engine.kind != "local":
        raise RunError(f'{path}: the members\' states are at the members; allowed: a run of engine.kind = "local"')
    checkpoint = directory.checkpoint()
    if checkpoint is None:
        raise RunError(f"{path}: nothing is committed yet, so there is no state to attack from")
    setup = prepare(attackable(directory.recipe))
    refuse_other_data(directory, setup)
    state = directory.tensors(checkpoint, checkpoint.server)
    found = checkpoint
    return Warm(setup, checkpoint.round, (state,), lambda c: directory.tensors(found, found.clients[c]))


def with_batch(setup: Setup, client: str, rows: np.ndarray, steps: int) -> Setup:
    """The same setup, in which one client trains on these rows alone, all in one batch, so many times."""
    own = setup.data.splits[client]
    splits = {**setup.data.splits, client: replace(own, train=rows)}
    train = setup.recipe.train.model_copy(update={"batch_size": len(rows), "local_epochs": steps})
    recipe = setup.recipe.model_copy(update={"train": train})
    return replace(setup, recipe=recipe, data=replace(setup.data, splits=splits))
