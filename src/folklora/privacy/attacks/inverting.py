"""Inverting Gradients: angles, a smooth picture, signed Adam. arXiv 2003.14053 (Geiping et al., NeurIPS 2020).

1. ``min 1 - cos(g', g) + tv TV(x)`` over all layers together [paper], the cosine the mean over tensors [recon]; tv is
  0.1 [paper: 1e-1 to 1e-6, by model]. The start is a grey picture with faint noise [paper: noise].
2. Adam with the signs of its gradient, learning rate 0.1 in units of the pixels' spread, a tenth after 3/8, 5/8 and
  7/8 of the steps; pixels are kept in their range [paper].
3. Several starts share the budget, one for each 400 steps [recon]; that with the smallest objective counts [paper].
  Labels: from the head's gradient [paper], else guessed along with the picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from folklora.privacy.attacks.attacker import Attacker
from folklora.privacy.attacks.guess import Attack, Form, Guess
from folklora.privacy.attacks.objective import cosine, total_variation
from folklora.privacy.attacks.observation import Observation
from folklora.privacy.attacks.search import Found, Search, guess_of

SMOOTH = 0.1
FAINT = 0.1
"""Of the noise that a picture starts from."""

STEPS = 400
"""Of one start, before another is worth more."""

RATE = 0.1


class Inverting(Attack):
    """Cosine, total variation, signed Adam."""

    name = "inverting"
    title = "Inverting Gradients (cosine, total variation)"
    paper = "arXiv:2003.14053"
    forms: frozenset[Form] = frozenset({"image"})  # type: ignore[misc]

    def run(self, lens: Attacker, seen: Observation, budget: int, generator: torch.Generator) -> Guess:
        canvas = lens.canvas(seen)
        labels, read = lens.labels(seen)
        best = Found(math.inf, FAINT * canvas.noise(generator))
        starts = 0 if lens.silent(seen) else max(1, budget // STEPS)
        for start in range(starts):
            search = Search(lens, seen, canvas, FAINT * canvas.noise(generator), labels, generator)
            self._descend(search, (budget - lens.spent) // (starts - start))
            best = min(best, search.best, key=lambda found: found.loss)
        return guess_of(lens, seen, canvas, best, read)

    def _descend(self, search: Search, steps: int) -> None:
        optimiser = torch.optim.Adam(search.free, lr=RATE)
        decays = [steps * part // 8 for part in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones=decays, gamma=0.1)
        canvas = search.canvas

        def rough(paint: Tensor) -> Tensor:
            return SMOOTH * total_variation(canvas.inputs(paint))

        for _ in range(steps):
            search.loss(cosine, rough)
            for each in search.free:
                assert each.grad is not None
                each.grad.sign_()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                search.paint.copy_(canvas.boxed(search.paint))
