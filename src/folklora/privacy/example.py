"""Differential privacy for each training example (``privacy.unit = "example"``): what it costs each client, and what
it does not go with.

Every client protects its own examples, in its own training (`folklora.training.private`), and trusts nobody for it.
Clients have data of different size, so the same batch is a different share of it: noise and epsilon are each client's
own. A client's examples are nobody else's, so the run's epsilon is the largest of any client.

Counted are all trainings that were begun, whoever heard of them: what was sent and came too late was sent. One training
of a round is ``local_epochs * ceil(n / batch_size)`` steps, and methods that train two models (``Method.branches``)
spend twice that. A private sketch (``method.dp_epsilon``) is one Gaussian release more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from folklora.data.release import noise_multiplier
from folklora.errors import RecipeError
from folklora.methods.base import Method
from folklora.privacy.accounting import epsilon_spent, event, noise_for, steps_within
from folklora.recipe import Recipe
from folklora.sections import TrainSection

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def sampling(examples: int, train: TrainSection) -> float:
    """q, the probability with which each of a client's examples is in a step."""
    return min(1.0, train.batch_size / examples)


def steps(examples: int, train: TrainSection) -> int:
    """Steps of one training in one round: as many as plain minibatches would be."""
    return train.local_epochs * math.ceil(examples / train.batch_size)


def refuse(recipe: Recipe, method: Method) -> None:
    """Refuse what example-level privacy could not keep its word with; nothing is refused for other units.

    Raises
    ------
    RecipeError
        In one line: a loss that compares examples, ``train.clip`` beside ``privacy.clip``, or a method that takes more
        of the training examples than its training.
    """
    if recipe.privacy.unit != "example":
        return
    if recipe.form == "caption":
        raise RecipeError(
            'privacy.unit = "example" with data.caption: the loss compares the pairs of a batch, so no gradient is of '
            'one example alone; allowed: pictures with labels, or privacy.unit = "client"'
        )
    default = TrainSection().clip
    if recipe.train.clip not in (None, default):
        raise RecipeError(
            f'train.clip = {recipe.train.clip:g} with privacy.unit = "example": privacy.clip limits the gradient of '
            f'each example in its place; allowed: "none", or to leave it out'
        )
    if (beside := method.beside_training) is not None:
        what, allowed = beside
        raise RecipeError(
            f'privacy.unit = "example" covers training, and method.name = "{method.name}" with {what} makes more of '
            f"the training examples; allowed: {allowed}"
        )


def noise(recipe: Recipe, method: Method, examples: int) -> float:
    """The noise multiplier of a client with so many training examples: ``privacy.noise``, or what spends
    ``privacy.epsilon`` over all rounds.

    Raises
    ------
    RecipeError
        If no noise is enough.
    """
    privacy, train = recipe.privacy, recipe.train
    if privacy.noise is not None:
        return privacy.noise
    assert privacy.epsilon is not None, "the recipe refuses privacy without noise and epsilon"
    count = max(1, train.rounds) * method.branches * steps(examples, train)
    q = sampling(examples, train)
    return noise_for(privacy.epsilon, privacy.delta, count, q, privacy.accountant, _releases(method))


def spent(
    recipe: Recipe, method: Method, sizes: Mapping[str, int], rounds: Mapping[str, int] | int
) -> dict[str, float]:
    """Epsilon of each client at ``privacy.delta``.

    Parameters
    ----------
    sizes
        Training examples of each client.
    rounds
        In how many rounds each began to train; one number for all.
    """
    privacy, train = recipe.privacy, recipe.train
    found: dict[str, float] = {}
    for client, n in sizes.items():
        trained = rounds if isinstance(rounds, int) else rounds.get(client, 0)
        once = event(noise(recipe, method, n), sampling(n, train))
        events = [(once, trained * method.branches * steps(n, train)), *_releases(method)]
        found[client] = epsilon_spent(events, privacy.delta, privacy.accountant)
    return found


def report(recipe: Recipe, method: Method, sizes: Mapping[str, int], rounds: Mapping[str, int] | int) -> dict[str, Any]:
    """As a line of ``metrics.jsonl`` has it under ``privacy``: parameters as `spent`; epsilon is the largest."""
    clients = spent(recipe, method, sizes, rounds)
    return {
        "unit": "example",
        "epsilon": max(clients.values(), default=0.0),
        "delta": recipe.privacy.delta,
        "clients": clients,
    }


def rounds_within(recipe: Recipe, method: Method, sizes: Mapping[str, int]) -> int:
    """How many rounds ``privacy.epsilon`` affords if every client trains in each, at most ``train.rounds``.

    Without a budget all of them, and without ``privacy.noise`` too: the noise is then found so.
    """
    privacy, train = recipe.privacy, recipe.train
    if privacy.epsilon is None or privacy.noise is None:
        return train.rounds
    affordable = train.rounds
    for n in sorted(set(sizes.values())):
        each = method.branches * steps(n, train)
        most = affordable * each
        q = sampling(n, train)
        count = steps_within(
            privacy.epsilon, privacy.delta, privacy.noise, q, privacy.accountant, most, _releases(method)
        )
        affordable = min(affordable, count // each)
    return affordable


def _releases(method: Method) -> tuple[tuple[DpEvent, int], ...]:
    """What a client releases once, under a guarantee of its own."""
    own = method.private_release
    return () if own is None else ((event(noise_multiplier(*own), 1.0), 1),)
