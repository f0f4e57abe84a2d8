"""The model that a member of a network run has now, out of its own folder; its rows are not needed for that."""

from __future__ import annotations

from folklora.adapters.lowrank import Tensors
from folklora.errors import RunError
from folklora.federation.folder import Brief, MemberFolder
from folklora.federation.member import Member
from folklora.federation.parties import rowless_setup
from folklora.federation.setup import Setup
from folklora.recipe import Recipe


def own_model(folder: MemberFolder, brief: Brief, *, tuned: bool = False) -> tuple[Setup, Tensors, int | None]:
    """What the member predicts with: after the server's last reply, or (``tuned``) as its own training left it.

    Beside it how often a shared block is applied: as the member chose, or may at most; None: as the backbone does.

    Raises
    ------
    RunError
        If what it consists of is not in the folder any more, or the backbone is another one by now.
    """
    setup = rowless_setup(Recipe.from_toml(brief.recipe), brief.clients, brief.classes, brief.model)
    if setup.task.backbone.digest != brief.backbone:
        raise RunError(f"{brief.model}: not the backbone that this run was trained with")
    member = Member(setup, brief.client, key=folder.key())
    state = folder.state()
    record = folder.tensors(state.model)
    if record is None:
        raise RunError(f"{folder.path}: there is no model yet, or its file is damaged")
    member.restore(record)
    if state.reply is not None and not tuned:
        data = folder.part(state.reply)
        if data is None:
            raise RunError(f"{folder.path}: the server's last reply is missing or damaged (parts/{state.reply})")
        member.receive(data)
    return setup, member.method.model(member.client), state.steps or setup.steps(brief.client)
