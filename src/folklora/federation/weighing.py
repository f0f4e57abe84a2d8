"""Clients that count for less than the examples they have (``[audit] weights``), and where that cannot be.

Each client audits its own training examples (`folklora.data.audit.quality`) and says as many examples less as they are
worth less; the rest of the federation works as ever. The number it says is a whole one in every engine, in the clear,
under masks and encrypted, so all of these weigh alike. Who knows how many examples a client has learns its quality, one
of twenty-one values. Nobody checks it: a client that wants to count may say what it likes, as it may of its examples.
"""

from __future__ import annotations

from typing import Any

from folklora.errors import RecipeError
from folklora.methods.base import Method
from folklora.methods.contract import Message
from folklora.recipe import Recipe


def spoken(example: Any) -> str:
    """An example of a table as a text: itself, or all turns of a chat."""
    return example if isinstance(example, str) else "\n".join(content for _, content in example)


def weighed_message(message: Message, weight: int) -> Message:
    """An upload that counts as so many examples."""
    return Message(message.tensors, {**message.numbers, "examples": float(weight)}, message.encodings)


def refuse_weightless(recipe: Recipe, method: Method) -> None:
    """Refuse weights by the audit where nobody would count them, or they would tell what is promised to be hidden.

    Raises
    ------
    RecipeError
        Naming what is in the way, and what is allowed.
    """
    here = f'audit.weights = "{recipe.audit.weights}"'
    if recipe.audit.weights == "none":
        return
    if recipe.form in ("image", "caption"):
        raise RecipeError(f'{here} where examples are pictures, which the audit does not read; allowed: "none"')
    if recipe.privacy.unit == "client":
        raise RecipeError(f'{here} with privacy.unit = "client", where everybody counts the same; allowed: "none"')
    if recipe.privacy.unit == "example":
        raise RecipeError(
            f'{here} with privacy.unit = "example": a weight that follows from the examples would leave without noise; '
            'allowed: "none"'
        )
    if recipe.robust.rule != "mean":
        raise RecipeError(
            f'{here} with robust.rule = "{recipe.robust.rule}", which lets everybody count the same; allowed: "none", '
            'or rule = "mean"'
        )
    if not method.counts_examples:
        raise RecipeError(
            f'{here} with method.name = "{method.name}" and these options, whose server does not ask how many examples '
            'a client has; allowed: "none", or a method that does, such as "fedit" or "folklora"'
        )
