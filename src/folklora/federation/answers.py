"""What one client's own model says to texts and pictures: a label, the text that fits best, or an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folklora.backbones.causal import CausalLM
from folklora.backbones.image_text import ImageText
from folklora.backbones.task import Task
from folklora.data.columns import why_not_text
from folklora.data.pictures import read_picture
from folklora.errors import DataError
from folklora.federation.run import ClientModel, client_model, recipe_of
from folklora.recipe import Recipe
from folklora.training.generation import generate, prompt_tokens, refuse_speechless
from folklora.training.prediction import Question
from folklora.training.prediction import predict as answer


def predict(
    path: str | Path, client: str, texts: Sequence[str] = (), images: Sequence[str | Path] = ()
) -> list[dict[str, Any]]:
    """What a client's model says to each text, or to each picture.

    ======================  ==================  ====================================================================
    the run's task          asked               said
    ======================  ==================  ====================================================================
    classification          texts, or pictures  ``label`` and ``probability``
    image-text              pictures            ``label`` and ``probability``: the class whose prompt fits best
    image-text              pictures and texts  ``ranking``: the texts, the best first, each with its ``probability``
    causal-lm               texts               ``answer``: the likeliest one, token by token
    ======================  ==================  ====================================================================

    Each entry begins with what was asked, as ``text`` or ``image``. Probabilities are among what there was to choose.

    Parameters
    ----------
    path
        A run directory, or the folder that a member keeps of a network run.
    images
        Picture files.

    Raises
    ------
    DataError
        If a text is empty or not valid Unicode, a picture cannot be read, or the task is asked for something else.
    RunError
        As `client_model`.
    """
    recipe = recipe_of(path)
    _refuse_other(recipe, texts, images)
    for number, text in enumerate(texts, start=1):
        if problem := why_not_text(text):
            raise DataError(f"text {number} is {problem}")
    pictures = [read_picture(Path(image)) for image in images]
    model = client_model(path, client)
    task: Any = model.setup.task
    if recipe.model.task == "causal-lm":
        return [{"text": text, "answer": said} for text, said in zip(texts, _said(model, task, texts), strict=True)]
    if texts and pictures:
        # Texts to choose from are class names whose prompts are themselves.
        ranked = _probabilities(model, ImageText(task.backbone, texts, template="{}"), pictures)
        return [
            {"image": str(image), "ranking": [{"text": texts[i], "probability": float(each[i])} for i in order]}
            for image, each, order in zip(images, ranked, ranked.argsort(1, descending=True).tolist(), strict=True)
        ]
    kind, asked = ("image", [str(image) for image in images]) if pictures else ("text", list(texts))
    best, where = _probabilities(model, task, pictures or texts).max(dim=1)
    classes = model.setup.data.table.classes
    return [
        {kind: each, "label": classes[int(i)], "probability": float(p)}
        for each, p, i in zip(asked, best, where, strict=True)
    ]


def _refuse_other(recipe: Recipe, texts: Sequence[str], images: Sequence[str | Path]) -> None:
    match recipe.model.task, recipe.form:
        case "image-text", "caption":
            fits, allowed = bool(texts and images), "pictures, and texts to choose from"
        case "image-text", _:
            fits, allowed = bool(images), "pictures, perhaps with texts to choose from"
        case _, "image":
            fits, allowed = bool(images) and not texts, "pictures"
        case _:
            fits, allowed = bool(texts) and not images, "texts"
    if not fits:
        given = " and ".join(f"{len(each)} {kind}" for kind, each in (("texts", texts), ("pictures", images)) if each)
        raise DataError(f'{given or "nothing"} for a run with model.task = "{recipe.model.task}"; allowed: {allowed}')


def _probabilities(model: ClientModel, task: Task, inputs: Sequence[Any]) -> Tensor:
    """[n, classes] of the task."""
    question = Question(model.client, model.rank, model.tensors, task.encode(inputs))
    logits = answer(task, model.setup.method.adapter, [question])[model.client]
    return torch.softmax(torch.from_numpy(logits), dim=1)


def _said(model: ClientModel, task: CausalLM, texts: Sequence[str]) -> list[str]:
    refuse_speechless(task)
    most = model.setup.recipe.eval.max_new_tokens
    prompts = [prompt_tokens(task, [("user", text)], most) for text in texts]
    question = Question(model.client, model.rank, model.tensors, prompts)
    return [task.decode(ids) for ids in generate(task, model.setup.method.adapter, [question], most)[model.client]]
