"""Which few of many candidates do the rows of a matrix consist of? Also where they are more than the matrix has rows.

Every row is a combination of the same few inputs, so the problem is joint sparse approximation: rank-aware order
recursive matching pursuit (Davies and Eldar, arXiv 1004.4529) picks the candidate with the largest share of itself in
the span of what is not yet explained, takes it out of the rows and of all candidates, and goes on. Cyclic replacement
then asks of each choice whether, beside all others, another candidate at its place would do better [recon].

Several *views* of the same inputs (projected by the A of different layers) are pursued at once: shares are averaged
over those views that still tell candidates apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folklora.privacy.attacks.rowspan import decomposed, row_span

SWEEPS = 4
"""Times that every choice is reconsidered at most."""
AT_ONCE = 32
"""About so many times the candidates are looked through, however many are to be chosen."""


@dataclass(frozen=True)
class View:
    """Candidates and rows in one space.

    Attributes
    ----------
    candidates
        ``[N, n]`` float32.
    rows
        ``[m, n]``: combinations of some of them.
    known
        ``[k, n]``: inputs that are known to take part.
    """

    candidates: Tensor
    rows: Tensor
    known: Tensor


@dataclass(frozen=True)
class Pursued:
    """The chosen candidates' numbers, and the share of the rows' norm that they leave unexplained."""

    chosen: list[int]
    unexplained: float


def pursue(views: Sequence[View], places: Tensor, room: Sequence[int], enough: float) -> Pursued:
    """Choose candidates until every place is full or the rows are explained up to ``enough`` of their norm.

    Parameters
    ----------
    views
        With the same N candidates.
    places
        ``[N]`` int64: where each candidate stands.
    room
        How many are to be chosen at each place at most.
    """
    search = _Search(views, places)
    left = list(room)
    total = sum(left)
    while sum(left) and search.unexplained() > enough:
        scores = search.scores(sum(left))
        if scores is None:
            break
        for place, free in enumerate(left):
            if not free:
                scores[places == place] = -1.0
        picked = _distinct(scores, places, max(1, total // AT_ONCE))
        if not picked:
            break
        for candidate in picked:
            search.take(candidate)
            left[int(places[candidate])] -= 1
    best = Pursued(list(search.chosen), search.unexplained())
    for _ in range(SWEEPS):
        if best.unexplained <= enough or not search.reconsider():
            break
        if (now := search.unexplained()) < best.unexplained:
            best = Pursued(list(search.chosen), now)
    return best


def _distinct(scores: Tensor, places: Tensor, count: int) -> list[int]:
    """The best candidates, at most one a place and ``count`` of them; a share of zero is none."""
    found: dict[int, int] = {}
    for candidate in scores.topk(min(64 * count, len(scores))).indices.tolist():
        if float(scores[candidate]) <= 0 or len(found) == count:
            break
        found.setdefault(int(places[candidate]), candidate)
    return list(found.values())


class _Search:
    def __init__(self, views: Sequence[View], places: Tensor) -> None:
        self.views = views
        self.places = places
        self.chosen: list[int] = []
        self._bases = [_orthonormal(view.known) for view in views]
        self._squares = [view.candidates.square().sum(1) for view in views]
        self._left = [
            s - _in(view.candidates, basis) for view, basis, s in zip(views, self._bases, self._squares, strict=True)
        ]

    def unexplained(self) -> float:
        """Over all views together; 1 where there is nothing to explain."""
        whole = sum(float(view.rows.square().sum()) for view in self.views)
        rest = sum(
            float(_without(view.rows, basis).square().sum())
            for view, basis in zip(self.views, self._bases, strict=True)
        )
        return (rest / whole) ** 0.5 if whole else 1.0

    def scores(self, most: int) -> Tensor | None:
        """[N]: mean share of each candidate in what is not explained; None where no view tells candidates apart."""
        shares = [
            self._shares(v, basis, left, most)
            for v, basis, left in zip(range(len(self.views)), self._bases, self._left, strict=True)
        ]
        told = [share for share in shares if share is not None]
        if not told:
            return None
        scores = torch.stack(told).mean(0)
        scores[self.chosen] = -1.0
        return scores

    def _shares(self, v: int, basis: Tensor, left: Tensor, most: int, among: Tensor | None = None) -> Tensor | None:
        view = self.views[v]
        candidates = view.candidates if among is None else view.candidates[among]
        squares = self._squares[v] if among is None else self._squares[v][among]
        span = row_span(_without(view.rows, basis), most=most)
        if not span.dimensions or span.dimensions + len(basis) >= view.rows.shape[1]:
            return None
        share = (candidates @ span.basis.T.to(candidates)).square().sum(1) / left.clamp(min=1e-30)
        # What others explain already is a candidate for nothing.
        return torch.where(left > 1e-5 * squares, share.clamp(max=1.0), 0.0)

    def take(self, candidate: int) -> None:
        self.chosen.append(candidate)
        for v, view in enumerate(self.views):
            rest = _without(view.candidates[candidate : candidate + 1], self._bases[v])
            new = _orthonormal(_without(rest, self._bases[v]))  # twice is enough
            self._bases[v] = torch.cat([self._bases[v], new])
            self._left[v] = (self._left[v] - _in(view.candidates, new)).clamp(min=0)

    def reconsider(self) -> bool:
        """Replace each choice by what fits best beside the others; whether anything changed."""
        changed = False
        for i in range(len(self.chosen)):
            others = self.chosen[:i] + self.chosen[i + 1 :]
            here = (self.places == self.places[self.chosen[i]]).nonzero().squeeze(1)
            free = here[~torch.isin(here, torch.tensor(others, dtype=torch.int64))]
            told = []
            bases = [_orthonormal(torch.cat([view.known, view.candidates[others]])) for view in self.views]
            for v, (view, basis) in enumerate(zip(self.views, bases, strict=True)):
                left = (self._squares[v][free] - _in(view.candidates[free], basis)).clamp(min=0)
                share = self._shares(v, basis, left, 1, free)
                if share is not None:
                    told.append(share)
            if not told:
                return changed
            best = int(free[int(torch.stack(told).mean(0).argmax())])
            changed |= best != self.chosen[i]
            self.chosen[i] = best
        self._bases = [_orthonormal(torch.cat([view.known, view.candidates[self.chosen]])) for view in self.views]
        return changed


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span, [k, n]."""
    if not len(rows):
        return rows
    values, basis = decomposed(rows)
    return basis[values > 1e-6 * values[0].clamp(min=1e-30)].to(rows.dtype)


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    return rows - (rows @ basis.T.to(rows)) @ basis.to(rows)


def _in(candidates: Tensor, basis: Tensor) -> Tensor:
    return (candidates @ basis.T.to(candidates)).square().sum(1)
