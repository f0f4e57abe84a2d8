"""A trained model at another depth than its run gave it: a number of steps, or the client's own choice of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from folklora.errors import RunError
from folklora.federation.depths import Depths, choose
from folklora.federation.folder import MemberFolder
from folklora.federation.run import ClientModel, client_model
from folklora.federation.rundir import RunDirectory
from folklora.training.prediction import Question


def at_depth(path: str | Path, model: ClientModel, depth: int | Literal["auto"] | None) -> ClientModel:
    """A client's model with another number of steps.

    ``"auto"`` is what the client chose when its run ended. Of a run in which nobody chose, it is what the client would
    choose now: the fewest steps, of those it was trained with (or all up to its most, if it was trained with one),
    whose validation score is no more than ``depth.tolerance`` below that of the most.

    Parameters
    ----------
    path
        Where the model is from: a run directory, or a member's folder.
    depth
        None: as the run has it.

    Raises
    ------
    BackboneError
        If the backbone has no shared block, or applies it fewer times.
    RunError
        If nothing was chosen, and there are no validation examples here to choose by.
    """
    setup, backbone = model.setup, model.setup.task.backbone.depth
    if depth is None:
        return model
    if depth != "auto":
        backbone.refuse(depth, "depth")
        return replace(model, steps=depth)
    most = setup.steps(model.client) or backbone.full
    if most is None:
        backbone.refuse(1, "depth")
    assert most is not None  # or it was refused
    chose = setup.depths is not None and setup.depths.auto
    if MemberFolder(Path(path)).brief() is not None:
        state = MemberFolder(Path(path)).state()
        if not chose or state.steps is None:
            raise RunError(
                f'{path}: depth = "auto": this member has chosen no depth, and its rows are not here to choose by; '
                'allowed: a number of steps, or a finished run with depth.steps = "auto"'
            )
        return model
    directory = RunDirectory.open(path)
    if chose and directory.finished:
        return model
    setup = client_model(path, model.client).setup  # with the examples to choose by
    section, client = setup.recipe.depth, model.client
    train = section.train or tuple(range(1, most + 1))
    depths = Depths(most, {client: most}, train, True, section.tolerance)
    checkpoint = directory.checkpoint()
    split = setup.split(client, checkpoint.round + 1 if checkpoint is not None else 0)
    examples, labels = setup.examples(split.validation)
    question = Question(client, model.rank, model.tensors, examples)
    steps = choose(setup.task, setup.method.adapter, depths, [question], {client: labels})
    return replace(model, steps=steps[client])
