"""Which task a recipe means: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from folklora.backbones.backbone import Backbone
from folklora.backbones.classification import Classification
from folklora.backbones.quantize import WeightBits
from folklora.backbones.task import Task
from folklora.errors import BackboneError
from folklora.sections import AdapterSection, Form, ModelSection


def build_task(
    model: ModelSection, adapter: AdapterSection, form: Form, classes: Sequence[str], steps: int | None = None
) -> Task:
    """The task, with its backbone; backbones stay in memory for the next call.

    Parameters
    ----------
    form
        What one example is.
    classes
        Names of the labels; a single one where examples have none.
    steps
        How often a shared block is applied where nobody says otherwise; None: as often as the model does.

    Raises
    ------
    BackboneError
        If the backbone cannot be loaded, or is of no kind that the task takes.
    """
    common = {
        "targets": adapter.targets,
        "norm": adapter.norm,
        "device": model.device,
        "dtype": model.dtype,
        "weight_bits": None if model.bits is None else WeightBits(model.bits, model.salient, model.block),
        "attention": model.attention,
        "checkpointing": model.checkpointing,
        "steps": steps,
    }
    if model.quantize != "none" and (model.task == "image-text" or form == "image"):
        raise BackboneError(f'model.quantize = "{model.quantize}": only models of texts are; allowed here: "none"')
    if model.task == "causal-lm":
        from folklora.backbones.causal import CausalBackbone, CausalLM

        return CausalLM(
            _loaded(CausalBackbone, model.name, quantize=model.quantize, **common),
            len(classes),
            max_length=model.max_length,
            template=model.template,
        )
    if model.task == "image-text":
        from folklora.backbones.image_text import ImageText, ImageTextBackbone

        backbone = _loaded(ImageTextBackbone, model.name, tower=adapter.tower, **common)
        return ImageText(
            backbone,
            classes,
            captions=form == "caption",
            template=model.template,
            max_length=model.max_length,
        )
    if form == "image":
        from folklora.backbones.vision import ImageClassification, VisionBackbone

        return ImageClassification(_loaded(VisionBackbone, model.name, **common), len(classes), pooling=model.pooling)
    backbone = _loaded(Backbone, model.name, quantize=model.quantize, **common)
    return Classification(backbone, len(classes), pooling=model.pooling, max_length=model.max_length)


@lru_cache(maxsize=2)
def _loaded(kind: Any, name: str, *, attention: str, checkpointing: bool, steps: int | None, **arguments: Any) -> Any:
    backbone = kind.load(name, **arguments)
    backbone.depth.walk(steps)
    backbone.attend(attention)
    if checkpointing:
        backbone.checkpoint()
    return backbone


def forget() -> None:
    """Drop the backbones in memory, because files have changed."""
    _loaded.cache_clear()
