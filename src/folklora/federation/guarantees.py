"""Recipes that would promise more than they keep: refused before work starts, one line each.

Differential privacy of clients is a promise about everything that leaves them: all of it goes through the clip and the
noise (`folklora.federation.clipping`), or it must not leave. A sketch is none of it, not even a private one: its noise
hides an example, and not a client. Nor may anything be chosen by scores, which are said in the clear; no
guarantee covers scores, nor the training losses that are told where the server is trusted with the noise.
"""

from __future__ import annotations

from folklora.adapters.lowrank import kind
from folklora.errors import RecipeError
from folklora.federation.sampling import by_chance
from folklora.federation.weighing import refuse_weightless
from folklora.methods.base import Method
from folklora.privacy.robust import fewest
from folklora.recipe import Recipe


def refuse_unsound(recipe: Recipe, method: Method) -> None:
    """Refuse what ``privacy.unit = "client"`` could not keep its word with, and what ``[robust]`` could not do.

    Raises
    ------
    RecipeError
        Naming what is in the way, and what is allowed.
    """
    _refuse_leaks(recipe, method)
    _refuse_misplaced_noise(recipe, method)
    _refuse_rule(recipe, method)
    refuse_weightless(recipe, method)
    if recipe.message.top_k < 1 and method.condenses:
        raise RecipeError(
            f'message.top_k = {recipe.message.top_k:g} with method.name = "{method.name}", whose clients send data: '
            "what is left out of an update stays as it was, and of data is zero; allowed: top_k = 1.0"
        )
    if recipe.poison.kind == "backdoor" and method.condenses:
        raise RecipeError(
            f'poison.kind = "backdoor" with method.name = "{method.name}", whose clients train nothing: liars would '
            'train on its trigger; allowed: "labels", "sign", "noise"'
        )


def _refuse_leaks(recipe: Recipe, method: Method) -> None:
    """Whatever leaves a client beside the mechanism."""
    if recipe.privacy.unit != "client":
        return
    clients = method.context.clients  # all of them: some may send all rows, and others a choice
    indices = any(kind(name) == "index" for c in clients for r in (1, 2) for name in method.expected(r, {}, c))
    ways = (
        (
            method.sketch_numbers() > 0,
            f"{method.once}, sent once",
            'a method and options without sketches: head = "private" or "shared", head_start = "zero", similarity = '
            '"model", "size" or "uniform"',
        ),
        (indices, "numbers of rows that are sent as they are", "a method that sends nothing but its factors"),
        (method.options.scaffold, "scaffold, whose control variates share the update's clip", "scaffold = false"),
        (recipe.train.patience is not None, "train.patience: the best round is chosen by scores", "to leave it out"),
        (recipe.adapter.promote is not None, "adapter.promote: ranks follow scores", "to leave it out"),
    )
    for there, what, allowed in ways:
        if there:
            raise RecipeError(
                f'privacy.unit = "client" with method.name = "{method.name}" and {what}: it would leave clients '
                f"without noise; allowed: {allowed}"
            )


def _refuse_misplaced_noise(recipe: Recipe, method: Method) -> None:
    privacy, message = recipe.privacy, recipe.message
    if privacy.unit != "client" or privacy.placement == "client" or not method.shared(1):
        return
    here = f'privacy.placement = "{privacy.placement}"'
    if not method.averages:
        raise RecipeError(
            f'{here} with method.name = "{method.name}", whose server takes more of uploads than their mean; allowed: '
            '"client", or a method that averages, such as "fedit"'
        )
    if recipe.robust.rule != "mean":
        raise RecipeError(
            f'{here} with robust.rule = "{recipe.robust.rule}", which one client may move by more than its share; '
            'allowed: placement = "client", or rule = "mean"'
        )
    lossy = message.dtype != "float32" or message.top_k < 1 or message.error_feedback
    if privacy.placement == "shares" and lossy and recipe.secure.kind == "none":
        raise RecipeError(
            f"{here} with a [message] that loses digits: a share of the noise hides the sum alone, not what is left of "
            'each upload; allowed: dtype = "float32", top_k = 1, error_feedback = false, or placement = "client"'
        )
    if by_chance(recipe) and recipe.engine.min_clients:
        raise RecipeError(
            f"engine.min_clients = {recipe.engine.min_clients} with {here} and train.participation = "
            f"{recipe.train.participation:g}: clients are drawn by chance, and a round may have any number; allowed: 0"
        )


def liars(recipe: Recipe, clients: int) -> int:
    """How many of a round's clients may lie: ``robust.byzantine`` of those that are drawn, rounded down."""
    return int(recipe.robust.byzantine * recipe.train.sampled(clients) + 1e-9)


def _refuse_rule(recipe: Recipe, method: Method) -> None:
    rule, clients = recipe.robust.rule, len(method.context.clients)
    if rule != "mean" and method.condenses:
        raise RecipeError(
            f'robust.rule = "{rule}" with method.name = "{method.name}", whose clients send data: there is no update '
            'to judge; allowed: "mean", or a method whose clients train, such as "fedit"'
        )
    if rule in ("mean", "clip"):
        return
    if not method.averages:
        raise RecipeError(
            f'robust.rule = "{rule}" with method.name = "{method.name}", whose server takes more of uploads than their '
            'mean; allowed: "clip", or a method that averages, such as "fedit"'
        )
    drawn, most = recipe.train.sampled(clients), liars(recipe, clients)
    if drawn < fewest(rule, most):
        raise RecipeError(
            f'robust.rule = "{rule}" needs {fewest(rule, most)} clients to withstand {most}, and a round has {drawn}; '
            "allowed: more clients, or a smaller robust.byzantine"
        )
