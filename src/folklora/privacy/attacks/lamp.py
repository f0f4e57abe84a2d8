"""LAMP: embeddings and the order of words in turn, with a language model. arXiv 2202.08827 (Balunovic et al. 2022).

1. Of several random starts the one with the smallest objective [paper: 500 of them; recon: a tenth of the budget].
2. In turn: steps of Adam on ``1 - cos`` over all layers, plus 0.1 times the squared relative difference between the
  mean norm of the embeddings and the vocabulary's [paper: both the cosine and TAG's distance; weights: recon]; and
  discrete moves of what is there: two tokens swapped, one moved elsewhere, a stretch moved, the beginning moved to the
  end [paper].
3. A move is taken where objective + 0.01 times the language model's nats a token falls [paper; weight: recon].
4. At the end all vectors are those of their nearest tokens; a fifth of the budget goes to moves among texts, of which
  one more replaces a token by another that its vector was near to [recon].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from folklora.privacy.attacks.attacker import Attacker
from folklora.privacy.attacks.guess import Attack, Form, Guess
from folklora.privacy.attacks.objective import cosine
from folklora.privacy.attacks.observation import Observation
from folklora.privacy.attacks.search import Found, Search, guess_of

RATE = 0.3
LENGTH = 0.1
FLUENT = 0.01
TURNS = 8
MOVING = 0.25
"""Share of a turn that is spent on discrete moves."""

LAST = 0.2
"""Share of the budget for the text in the end."""

NEAR = 8
"""Tokens that a vector is near to."""


class LAMP(Attack):
    """Cosine on embeddings, discrete moves ranked by objective and fluency."""

    name = "lamp"
    title = "LAMP (cosine, moves ranked by a language model)"
    paper = "arXiv:2202.08827"
    forms: frozenset[Form] = frozenset({"text"})  # type: ignore[misc]

    def run(self, lens: Attacker, seen: Observation, budget: int, generator: torch.Generator) -> Guess:
        canvas = lens.canvas(seen)
        labels, read = lens.labels(seen)
        search = Search(lens, seen, canvas, canvas.noise(generator), labels, generator)
        if lens.silent(seen):
            return guess_of(lens, seen, canvas, Found(math.inf, search.paint.detach()), read)
        self._start(search, max(1, budget // 10), generator)
        painting = round(budget * (1 - LAST))
        optimiser = torch.optim.Adam(search.free, lr=RATE)
        steps = max(1, round((painting - lens.spent) * (1 - MOVING)))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: max(0.05, 1 - step / steps))
        for turn in range(TURNS):
            ends = lens.spent + (painting - lens.spent) // (TURNS - turn)
            moves = round(MOVING * (ends - lens.spent))
            while lens.spent < ends - moves:
                search.loss(cosine, lambda paint: LENGTH * canvas.length_penalty(paint))
                optimiser.step()
                schedule.step()
            self._improve(search, search.paint.detach().clone(), ends, _Moves(canvas, generator))
        written = canvas.paint(canvas.tokens(search.paint))
        near = canvas.nearest(search.paint, NEAR)
        loss = self._improve(search, written, budget, _Moves(canvas, generator, near))
        return guess_of(lens, seen, canvas, Found(loss, search.paint.detach(), search.best.soft), read)

    def _start(self, search: Search, tries: int, generator: torch.Generator) -> None:
        best = math.inf
        for _ in range(tries):
            paint = search.canvas.noise(generator)
            if (loss := search.judge(paint, cosine)) < best:
                best = loss
                with torch.no_grad():
                    search.paint.copy_(paint)

    def _improve(self, search: Search, paint: Tensor, until: int, moves: _Moves) -> float:
        """The best of many moves, each judged once, becomes the paint; its rank."""
        best = math.inf
        while search.lens.spent < until:
            moved = paint if best == math.inf else moves.one(paint)
            rank = self._rank(search, moved)
            if rank < best:
                best, paint = rank, moved
            elif best == math.inf:  # not a number: as good as any
                best = 3e38
        with torch.no_grad():
            search.paint.copy_(paint)
        return best

    def _rank(self, search: Search, paint: Tensor) -> float:
        prior = search.lens.prior
        fluency = 0.0
        if prior is not None:
            texts = search.canvas.tokens(paint)
            fluency = sum(prior.nats(text) for text in texts) / len(texts)
        return search.judge(paint, cosine) + FLUENT * fluency


class _Moves:
    """Random discrete moves. ``near``: [count, longest, n] tokens that may stand at each place."""

    def __init__(self, canvas: Any, generator: torch.Generator, near: Tensor | None = None) -> None:
        self.canvas, self.generator, self.near = canvas, generator, near

    def one(self, paint: Tensor) -> Tensor:
        """The paint after one move in one text."""
        moved = paint.clone()
        text = self._below(len(moved))
        places = self.canvas.free[text].nonzero().squeeze(1)
        n = len(places)
        if n == 0:
            return moved
        if self.near is not None and (n == 1 or self._below(2)):
            place = int(places[self._below(n)])
            token = int(self.near[text, place, self._below(self.near.shape[2])])
            moved[text, place] = self.canvas.paint_of(token)
            return moved
        moved[text, places] = paint[text, places[self._order(n)]]
        return moved

    def _order(self, n: int) -> Tensor:
        order, i, j = list(range(n)), self._below(n), self._below(n)
        match self._below(4):
            case 0:  # two change places
                order[i], order[j] = j, i
            case 1:  # one goes elsewhere
                order.insert(j, order.pop(i))
            case 2:  # a stretch goes elsewhere
                first, last = min(i, j), max(i, j) + 1
                stretch, rest = order[first:last], order[:first] + order[last:]
                to = self._below(len(rest) + 1)
                order = rest[:to] + stretch + rest[to:]
            case _:  # the beginning goes to the end
                order = order[i:] + order[:i]
        return torch.tensor(order)

    def _below(self, most: int) -> int:
        return int(torch.randint(most, (1,), generator=self.generator))
