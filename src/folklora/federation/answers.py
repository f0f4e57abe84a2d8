"""What clients' own models say to texts and pictures: a label, the text that fits best, or an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from folklora.backbones.image_text import ImageText
from folklora.backbones.task import Task
from folklora.data.columns import why_not_text
from folklora.data.pictures import Picture, read_picture
from folklora.errors import DataError
from folklora.federation.depth_choice import at_depth
from folklora.federation.run import ClientModel, client_model, recipe_of
from folklora.recipe import Recipe
from folklora.training.generation import prompts_tokens, refuse_speechless
from folklora.training.serving import MERGED, Model, Pool

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Request:
    """What one client's model is asked.

    Attributes
    ----------
    text
        A text to classify, or a prompt; None: ``picture`` is what is asked about.
    name
        What the picture is called in the answer.
    texts
        To choose from for the picture; none: the classes.
    """

    client: str
    text: str | None = None
    picture: Picture | None = None
    name: str = ""
    texts: tuple[str, ...] = ()


def predict(
    path: str | Path,
    client: str,
    texts: Sequence[str] = (),
    images: Sequence[str | Path] = (),
    *,
    precision: Precision = "float32",
    depth: int | Literal["auto"] | None = None,
    max_new_tokens: int | None = None,
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
    precision
        What the model computes in.
    depth
        How often a shared block is applied; "auto": see `folklora.federation.depth_choice.at_depth`; default: as the
        run has it.
    max_new_tokens
        Of an answer, at most; default: the recipe's ``eval.max_new_tokens``.

    Raises
    ------
    BackboneError
        If the backbone cannot be run at that depth.
    DataError
        If a text is empty or not valid Unicode, a picture cannot be read, or the task is asked for something else.
    RunError
        As `client_model`.
    """
    recipe = recipe_of(path)
    _refuse_other(recipe, texts, images)
    refuse_length(recipe, max_new_tokens)
    for number, text in enumerate(texts, start=1):
        if problem := why_not_text(text):
            raise DataError(f"text {number} is {problem}")
    pictures = [read_picture(Path(image)) for image in images]
    asked = [
        Request(client, picture=picture, name=str(image), texts=tuple(texts))
        for image, picture in zip(images, pictures, strict=True)
    ] or [Request(client, text) for text in texts]
    models = {client: at_depth(path, client_model(path, client, rows=False), depth)}
    return respond(models, asked, precision, max_new_tokens)


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


def refuse_length(recipe: Recipe, max_new_tokens: int | None) -> None:
    """Raises DataError where an answer's length is given and nothing is written, or it is none."""
    if max_new_tokens is None:
        return
    if recipe.model.task != "causal-lm":
        raise DataError(
            f'max_new_tokens for a run with model.task = "{recipe.model.task}"; allowed: with model.task = "causal-lm"'
        )
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens = {max_new_tokens}; allowed: 1 or more")


def pool_of(models: Mapping[str, ClientModel], precision: Precision = "float32", *, most: int = MERGED) -> Pool:
    """The clients' models, of one setup, ready to be asked; see `folklora.training.serving.Pool`."""
    setup = next(iter(models.values())).setup
    own = {client: Model(model.rank, model.tensors, model.steps) for client, model in models.items()}
    return Pool(setup.task, setup.method.adapter, own, dtype=getattr(torch, precision), most=most)


def respond(
    models: Mapping[str, ClientModel],
    asked: Sequence[Request],
    precision: Precision = "float32",
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """What the clients' models say, in the order of the requests; see `predict`.

    A client whose model gives no finite numbers gets ``None`` for them, and for an answer, and nobody else does.

    Parameters
    ----------
    models
        Of one setup, at least those of the requests' clients.
    """
    setup, pool = next(iter(models.values())).setup, pool_of(models, precision)
    if setup.recipe.model.task == "causal-lm":
        return _written(pool, max_new_tokens or setup.recipe.eval.max_new_tokens, asked)
    found: list[dict[str, Any]] = [{} for _ in asked]
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, request in enumerate(asked):
        alike.setdefault(request.texts, []).append(i)
    for texts, places in alike.items():
        # Texts to choose from are class names whose prompts are themselves.
        backbone: Any = setup.task.backbone
        task = ImageText(backbone, texts, template="{}") if texts else setup.task
        choices = texts or setup.data.table.classes
        said = _chosen(pool, task, [asked[i] for i in places], choices, ranked=bool(texts))
        for i, answer in zip(places, said, strict=True):
            found[i] = answer
    return found


def _chosen(
    pool: Pool, task: Task, asked: Sequence[Request], choices: Sequence[str], *, ranked: bool
) -> list[dict[str, Any]]:
    """Which of some names fits each request, or how all of them do."""
    inputs = [request.text if request.picture is None else request.picture for request in asked]
    examples = zip((request.client for request in asked), task.encode(inputs), strict=True)
    logits = torch.from_numpy(pool.answers(list(examples), task=task))
    found = []
    for request, each in zip(asked, torch.softmax(logits, dim=1), strict=True):
        told: dict[str, Any] = {"image": request.name} if request.text is None else {"text": request.text}
        finite = bool(torch.isfinite(each).all())
        order = each.argsort(descending=True).tolist() if finite else list(range(len(choices)))
        numbers = each.tolist() if finite else [None] * len(choices)
        if ranked:
            told["ranking"] = [{"text": choices[i], "probability": numbers[i]} for i in order]
        else:
            told |= {"label": choices[order[0]] if finite else None, "probability": numbers[order[0]]}
        found.append(told)
    return found


def _written(pool: Pool, most: int, asked: Sequence[Request]) -> list[dict[str, Any]]:
    task: Any = pool.task
    refuse_speechless(task)
    prompts = prompts_tokens(task, [[("user", request.text or "")] for request in asked], most)
    said = pool.continuations([(each.client, ids) for each, ids in zip(asked, prompts, strict=True)], most)
    answers = [None if ids is None else task.decode(ids) for ids in said]
    return [{"text": request.text, "answer": answer} for request, answer in zip(asked, answers, strict=True)]
