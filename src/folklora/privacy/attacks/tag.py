"""TAG: L2 and L1 over layers, on embeddings. arXiv 2103.06819 (Deng et al., EMNLP Findings 2021).

1. ``min sum_l |g'_l - g_l|_2^2 + alpha |g'_l - g_l|_1`` over all layers [paper]; one alpha for all of them, 0.01, both
  terms relative in each tensor [recon; LAMP's code, whose alpha is 0.01 too].
2. The variable are the embeddings of the tokens, decoded to the nearest in the end [paper], by cosine [LAMP's code].
3. Adam, the rate falling linearly to nothing [recon]. Unknown labels are read off the head's gradient where one was
  sent, else guessed along with the text [paper: guessed].
"""

from __future__ import annotations

import math
from functools import partial

import torch

from folklora.privacy.attacks.attacker import Attacker
from folklora.privacy.attacks.guess import Attack, Form, Guess
from folklora.privacy.attacks.objective import tag
from folklora.privacy.attacks.observation import Observation
from folklora.privacy.attacks.search import Found, Search, guess_of

ALPHA = 0.01
RATE = 0.1


class TAG(Attack):
    """L2 and L1 on embeddings, Adam."""

    name = "tag"
    title = "TAG (L2 + alpha L1 on embeddings)"
    paper = "arXiv:2103.06819"
    forms: frozenset[Form] = frozenset({"text"})  # type: ignore[misc]

    def run(self, lens: Attacker, seen: Observation, budget: int, generator: torch.Generator) -> Guess:
        canvas = lens.canvas(seen)
        labels, read = lens.labels(seen)
        if lens.silent(seen):
            return guess_of(lens, seen, canvas, Found(math.inf, canvas.noise(generator)), read)
        search = Search(lens, seen, canvas, canvas.noise(generator), labels, generator)
        optimiser = torch.optim.Adam(search.free, lr=RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / budget)
        for _ in range(budget):
            search.loss(partial(tag, alpha=ALPHA))
            optimiser.step()
            schedule.step()
        return guess_of(lens, seen, canvas, search.best, read)
