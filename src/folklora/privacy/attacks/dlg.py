"""DLG: dummy inputs whose gradient is nearest in the 2-norm, by L-BFGS. arXiv 1906.08935 (Zhu, Liu, Han, NeurIPS 2019).

1. Dummy inputs, and where labels are unknown dummy label logits, start as Gaussian noise [paper].
2. ``min |g' - g|^2``, relative in each tensor [recon], by L-BFGS, learning rate 1 [paper], with a line search [recon:
  without one it often leaves for infinity]; where it has settled it starts again from other noise while there is
  budget, and the best counts [recon].
3. Texts: the inputs are the embeddings, decoded to the nearest tokens [paper].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from folklora.privacy.attacks.attacker import Attacker
from folklora.privacy.attacks.guess import Attack, Guess
from folklora.privacy.attacks.objective import squared
from folklora.privacy.attacks.observation import Observation
from folklora.privacy.attacks.search import Found, Search, guess_of

SETTLED = 1e-9
"""An objective below which nothing is left to find: numbers are float32."""


class DLG(Attack):
    """2-norm, L-BFGS."""

    name = "dlg"
    title = "DLG (2-norm, L-BFGS)"
    paper = "arXiv:1906.08935"

    def run(self, lens: Attacker, seen: Observation, budget: int, generator: torch.Generator) -> Guess:
        canvas = lens.canvas(seen)
        labels, read = lens.labels(seen, own=self.own_labels)
        best = Found(math.inf, canvas.noise(generator))
        blind = lens.silent(seen)
        while lens.spent < budget and best.loss > SETTLED and not blind:
            search = Search(lens, seen, canvas, canvas.noise(generator), labels, generator)
            best = min(best, self._descend(search, budget), key=lambda found: found.loss)
        return guess_of(lens, seen, canvas, best, read)

    def _descend(self, search: Search, budget: int) -> Found:
        optimiser = torch.optim.LBFGS(search.free, lr=1, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            if search.lens.spent >= budget:  # a line search asks for as many as it likes
                raise _Spent
            return search.loss(squared)

        try:
            while search.best.loss > SETTLED:
                before = search.best.loss
                optimiser.step(closure)
                if not search.best.loss < before * (1 - 1e-3):
                    break
        except _Spent:
            pass
        return search.best


class _Spent(Exception):
    """The budget is."""
