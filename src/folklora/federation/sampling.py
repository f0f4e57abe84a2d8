"""Who takes part in a round.

By default so many as the recipe's ``train.participation`` says, drawn from its seed: everybody can compute whom. Where
central noise hides clients (``[privacy]``) and not all take part, each takes part with probability q, independently of
all others (Poisson sampling), because the accountant counts on it; and the draw comes from a secret of the server,
because being unseen hides only those of whom nobody can tell that they were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from folklora.randomness import derive
from folklora.recipe import Recipe


def by_chance(recipe: Recipe) -> bool:
    """Whether each client takes part with a probability of its own, so that a round may have any number of them."""
    privacy = recipe.privacy
    return privacy.unit == "client" and privacy.placement == "server" and recipe.train.participation < 1


def sampled(recipe: Recipe, clients: Sequence[str], round: int, secret: int) -> list[str]:
    """The round's clients, in the given order, on which nothing depends.

    Parameters
    ----------
    secret
        The server's: of a network run `folklora.federation.rundir.RunDirectory.secret`.
    """
    if by_chance(recipe):
        bound = recipe.train.participation * 2**63
        return [client for client in clients if derive(secret, "sample", client, round) < bound]
    chosen = set(drawn(clients, recipe.train.sampled(len(clients)), recipe.seed, round))
    return [client for client in clients if client in chosen]


def drawn(clients: Sequence[str], count: int, seed: int, round: int) -> list[str]:
    """So many clients: the smallest of N numbers derived from (seed, client, round)."""
    return sorted(clients, key=lambda client: derive(seed, "sample", client, round))[:count]


def newcomers(share: float, seed: int, clients: Sequence[str]) -> tuple[str, ...]:
    """Those of them who take part in no round, in the given order: ``newcomers.share``, rounded half up; their ids and
    the seed say who."""
    count = math.floor(share * len(clients) + 0.5)
    chosen = set(sorted(clients, key=lambda client: derive(seed, "newcomer", client))[:count])
    return tuple(client for client in clients if client in chosen)


def simulated_secret(recipe: Recipe) -> int:
    """A simulation's server has no secret of its own, so that it repeats: whoever knows the seed knows it."""
    return derive(recipe.seed, "secret/server")
