"""The audit of every client of a recipe: its training examples as it would train on them, simulated faults included."""

from __future__ import annotations

from typing import Any

from folklora.data.audit.duplicates import exact_duplicates
from folklora.data.audit.quality import By, copies, quality_of, regularities, regularity_of_blocks, weighed
from folklora.data.audit.release import release
from folklora.errors import RecipeError
from folklora.federation.falsified import Falsified, falsified
from folklora.federation.poison import struck
from folklora.federation.setup import data_of, joining_late, validate
from folklora.federation.weighing import spoken
from folklora.recipe import Recipe


def audit_clients(recipe: Recipe) -> dict[str, Any]:
    """What each client's audit comes to; no model is loaded.

    Returns
    -------
    dict
        ``weights``: by what quality is measured, ``audit.weights`` or "both" where that is "none"; ``clients``: of each
        its number of training ``examples``, the share of ``copies`` among them (exact and near), the ``regularity`` of
        blocks (None: not measurable), ``quality`` and as how many examples it ``counts_as``, and the ``status`` that
        may leave.

    Raises
    ------
    FolkLoraError
        The recipe cannot be, its data cannot be read, or they are pictures.
    """
    validate(recipe)
    if recipe.form in ("image", "caption"):
        raise RecipeError("--audit: the recipe's examples are pictures, which the audit does not read; allowed: texts")
    by: By = "both" if recipe.audit.weights == "none" else recipe.audit.weights
    data = data_of(recipe)
    late = joining_late(recipe, list(data.splits))
    false = struck(recipe, [client for client in data.splits if client not in late])
    found = {}
    for client, split in data.splits.items():
        faults = falsified(recipe, data.table, client, split.train) if client in false else Falsified()
        examples = [spoken(example) for example in faults.inputs(data.table, split.train)]
        blocks, share = regularities(examples), copies(examples).share
        order = regularity_of_blocks(blocks)
        quality = quality_of(share, order, by)
        found[client] = {
            "examples": len(examples),
            "copies": share,
            "regularity": order.value,
            "quality": quality,
            "counts_as": weighed(len(examples), quality),
            "status": release(exact_duplicates(examples), blocks).status,
        }
    return {"weights": by, "clients": found}
