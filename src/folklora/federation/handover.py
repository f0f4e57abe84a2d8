"""What leaves a run: one client's adapter for stock PEFT, or its whole model as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from folklora.adapters.peft import save_beside, save_peft
from folklora.backbones.image_text import TEMPLATE
from folklora.backbones.loading import find
from folklora.backbones.merged import save_merged
from folklora.data.table import ONE_CLASS
from folklora.errors import RunError
from folklora.federation.files import whole_folder
from folklora.federation.run import ClientModel, client_model, recipe_of
from folklora.federation.setup import Setup


def export(path: str | Path, client: str, to: str | Path, *, tuned: bool = False, base: str | None = None) -> Path:
    """One client's adapter as a stock PEFT LoRA folder; see `folklora.adapters.peft.save_peft`.

    Parameters
    ----------
    path
        A run directory, or the folder that a member keeps of a network run.
    tuned
        The model as the client's own last training left it, before the server's last reply.
    base
        What the folder names as its base model; default: the backbone as it is called on this machine, which may be a
        path.
    """
    model = client_model(path, client, tuned=tuned, rows=False)
    setup = model.setup
    base = base or find(setup.recipe.model.name)
    transposed = setup.task.backbone.transposed
    use = _use(model)
    return save_peft(to, model.tensors, setup.method.adapter, base, _classes(setup), use, transposed=transposed)


def merge(path: str | Path, client: str, to: str | Path, *, tuned: bool = False) -> Path:
    """One client's model as a checkpoint of its own; see `folklora.backbones.merged.save_merged`.

    What a classifier needs beside it lies there too, as in an exported folder. Parameters as of `export`.

    Raises
    ------
    RunError
        If ``to`` exists or cannot be written, or the backbone is kept in few bits.
    """
    to = Path(to)
    section = recipe_of(path).model
    for key, value in (("bits", section.bits), ("quantize", None if section.quantize == "none" else section.quantize)):
        if value is not None:
            raise RunError(
                f"{path}: model.{key} = {value}: an ordinary checkpoint has other weights than those it was trained "
                "on; allowed: `folklora export`"
            )
    with whole_folder(to) as folder:
        model: ClientModel = client_model(path, client, tuned=tuned, rows=False)
        setup = model.setup
        setup.method.adapter.refuse_folding()
        save_merged(folder, setup.recipe.model.name, section.task, setup.method.adapter, model.tensors)
        save_beside(folder, model.tensors, _classes(setup), _use(model))
    return to


def _classes(setup: Setup) -> tuple[str, ...]:
    """Names of the labels; none where examples have none."""
    classes = setup.data.table.classes
    return () if classes == ONE_CLASS else classes


def _use(model: ClientModel) -> dict[str, Any]:
    """How the model is used: what the recipe says, with what the task decided by itself spelt out.

    ``depth`` is how often a shared block is applied, and ``full_depth`` how often stock libraries apply it.
    """
    setup = model.setup
    task: Any = setup.task
    section = setup.recipe.model
    use: dict[str, Any] = {"task": section.task}
    if section.task == "classification":
        use["pooling"] = task.pooling
    elif section.task == "causal-lm" and task.conversations.chat_template is None:
        use["template"] = task.conversations.template  # else the tokenizer's own
    elif section.task == "image-text" and not task.captions:
        use["template"] = section.template or TEMPLATE
    if getattr(task, "max_length", None) is not None:
        use["max_length"] = task.max_length
    if setup.depths is not None:
        use |= {"depth": model.steps, "full_depth": setup.depths.full}
    return use
