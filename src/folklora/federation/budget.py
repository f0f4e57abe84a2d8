"""What privacy has cost so far, what another round would cost, and whether the recipe's budget has room for it.

Of ``privacy.unit = "client"``, where neighbours differ by one client whose updates are replaced by nothing, what a
round costs depends on who adds the noise (`folklora.federation.clipping`):

- ``server``: every committed round is one release. Where clients take part by chance, being unseen hides them (q < 1)
  from whoever is not told who took part, which the run directory tells.
- ``shares``: a release costs those whose updates are in it. Of m shares of noise, n arrived: the multiplier is
  ``noise * sqrt(n / m)``. A client's own share is counted among what hides it.
- ``client``: an upload costs its client, and nobody else; also one that came late, since it was sent.

In the last two who is drawn is public, nothing is gained by it, and epsilon is that of the client with the most. That
of ``privacy.unit = "example"`` is `folklora.privacy.example`'s. Both follow from the lines of ``metrics.jsonl`` alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from folklora.errors import RecipeError
from folklora.federation.sampling import by_chance, drawn, sampled
from folklora.methods.base import Method
from folklora.privacy import example
from folklora.privacy.accounting import epsilon_spent, event, noise_for
from folklora.recipe import Recipe
from folklora.sections import PrivacySection, TrainSection

Line = Mapping[str, Any]
"""A line of ``metrics.jsonl``, or as much of one as says who took part and who failed."""

AWAY = "not connected"
"""Why a client failed that was never asked."""


class Budget:
    """A run's, whatever its unit.

    Parameters
    ----------
    examples
        How many a client has in each split; asked for where examples are the unit.
    """

    def __init__(self, recipe: Recipe, method: Method, examples: Callable[[str], Mapping[str, int]]) -> None:
        self.recipe = recipe
        self.method = method
        self.examples = examples

    def spent(self, lines: Sequence[Line]) -> dict[str, Any]:
        """What a line of ``metrics.jsonl`` says under ``privacy``, after all these."""
        privacy, rounds = self.recipe.privacy, [line for line in lines if line["round"]]
        if privacy.unit == "example":
            sizes = {client: self.examples(client)["train"] for client in self.method.context.clients}
            known = {client: size for client, size in sizes.items() if size}  # who never came has said nothing
            return example.report(self.recipe, self.method, known, begun(rounds))
        noise = resolved_noise(self.recipe, self.method)
        return {"unit": "client", "epsilon": self._clients(rounds, noise), "delta": privacy.delta, "noise": noise}

    def account(self, lines: Sequence[Line]) -> dict[str, Any]:
        """What ``summary.json`` says under ``privacy``: what was spent, under which settings."""
        privacy = self.recipe.privacy
        settings = {"clip": privacy.clip, "budget": privacy.epsilon, "accountant": privacy.accountant}
        placement = {"placement": privacy.placement} if privacy.unit == "client" else {}
        return {**self.spent(lines), **settings, **placement}

    def refusal(self, lines: Sequence[Line], next: Line) -> str | None:
        """Why another round cannot be afforded; None where it can, or there is no budget."""
        privacy = self.recipe.privacy
        budget = privacy.epsilon
        if privacy.noise is None and privacy.placement != "shares":
            return None  # it was found to last for all rounds
        after = self.spent([*lines, next])["epsilon"] if budget is not None else 0.0
        if budget is None or after <= budget:
            return None
        return f"round {next['round']} would bring epsilon to {after:.4g}, beyond privacy.epsilon = {budget:g}"

    def affordable(self) -> int:
        """How many rounds the budget has room for, if everybody who is drawn answers."""
        lines = self.planned(self.method.rounds())
        return bisect_left(range(len(lines)), True, key=lambda i: self.refusal(lines[:i], lines[i]) is not None)

    def refuse_if_empty(self) -> None:
        """Raises RecipeError if not even one round can be afforded."""
        if self.recipe.privacy.unit == "none" or not self.method.rounds():
            return
        if (reason := self.refusal([], self.planned(1)[0])) is not None:
            raise RecipeError(f"{reason}; allowed: a larger privacy.epsilon, more privacy.noise")

    def planned(self, rounds: int) -> list[Line]:
        """The lines of so many rounds, if everybody who is drawn answers."""
        clients, recipe = self.method.context.clients, self.recipe
        everybody = by_chance(recipe)  # nobody is counted there, and the draw is secret
        return [
            {"round": r, "participants": clients if everybody else sampled(recipe, clients, r, 0), "failed": {}}
            for r in range(1, rounds + 1)
        ]

    def _clients(self, lines: Sequence[Line], noise: float) -> float:
        privacy = self.recipe.privacy
        if not self.method.shared(1):
            return 0.0  # nothing leaves a client
        if privacy.placement == "server":
            q = self.recipe.train.participation
            return epsilon_spent([(event(noise, q), len(lines))], privacy.delta, privacy.accountant)
        if privacy.placement == "client":
            most = max(begun(lines).values(), default=0)
            return epsilon_spent([(event(noise, 1), most)], privacy.delta, privacy.accountant)
        shares = self.recipe.train.sampled(len(self.method.context.clients))
        arrived: dict[str, Counter[int]] = {}  # client -> how often it was one of so many
        for line in lines:
            for client in line["participants"]:
                arrived.setdefault(client, Counter())[len(line["participants"])] += 1
        kinds = {tuple(sorted(counts.items())) for counts in arrived.values()}
        return max(
            (
                epsilon_spent(
                    [(event(noise * math.sqrt(n / shares), 1), times) for n, times in kind],
                    privacy.delta,
                    privacy.accountant,
                )
                for kind in kinds
            ),
            default=0.0,
        )


def begun(lines: Sequence[Line]) -> Counter[str]:
    """In how many rounds each client began to train, whoever heard of it."""
    found: Counter[str] = Counter()
    for line in lines:
        found.update(line["participants"])
        found.update(client for client, reason in line["failed"].items() if reason != AWAY)
    return found


def resolved_noise(recipe: Recipe, method: Method) -> float:
    """The noise multiplier of ``privacy.unit = "client"``: the recipe's, or what spends its budget over all rounds.

    Members and server compute it, each for itself, from the recipe and who the clients are.
    """
    return _resolved(recipe.privacy, recipe.train, recipe.seed, method)


@lru_cache(maxsize=16)  # every client asks
def _resolved(privacy: PrivacySection, train: TrainSection, seed: int, method: Method) -> float:
    if privacy.noise is not None:
        return privacy.noise
    assert privacy.epsilon is not None, "the recipe refuses privacy without noise and epsilon"
    clients, rounds, sampling = method.context.clients, method.rounds(), 1.0
    if privacy.placement == "server":
        sampling = train.participation
    elif train.participation < 1:
        turns = Counter(c for r in range(1, rounds + 1) for c in drawn(clients, train.sampled(len(clients)), seed, r))
        rounds = max(turns.values(), default=0)
    return noise_for(privacy.epsilon, privacy.delta, rounds, sampling, privacy.accountant)
