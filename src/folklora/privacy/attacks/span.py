"""The span attack: which tokens' inputs lie in the row span of what was sent? After DAGER, arXiv 2405.15586.

Let x_t be the input of an adapted layer at token t, dy_t the loss's slope at its output, and ``y = W0 x + s B C A x``.

1. A dense gradient ``sum_t dy_t x_t^T`` has its rows in the span of the x_t, and below the first attention x_t is the
  embedding of one token at one position. While the batch has fewer of these than the layer is wide, every (token,
  position) of the vocabulary can be tested [DAGER].
2. A factor A travels: ``G_A = s (B C)^T sum_t dy_t x_t^T`` [r, d]. Of T distinct inputs it shows min(r, T) directions
  in R^d; query and value layers share their inputs, so the rows of both are stacked and T = 2 r can be tested exactly
  [recon]. With more inputs no x_t lies in the span any more, but the rows are still sparse combinations of a known
  dictionary: joint sparse pursuit (`folklora.privacy.attacks.pursuit`) goes on from there [recon].
3. A core or B travels: ``G_C = s B^T sum_t dy_t (A x_t)^T`` [r, r] and ``G_B = s sum_t dy_t (C A x_t)^T`` [d, r] have
  their rows in the span of the A x_t (of the C A x_t), in R^r. While T < r a token is a candidate where A x_t lies in
  it; from r on the span is all of R^r, and every token is one: nothing is told [recon]. This bounds tests of spans, not
  every attack: the r r numbers still depend on the batch.
4. Steps of SGD add up gradients whose rows all lie in the span of the same x_t, because the first inputs do not move:
  the sum over E steps can be tested as one gradient where A and C rest or A itself travels, and nearly so elsewhere.
  AdamW's steps are no combinations of gradients, nor does weight decay leave the span alone: the attack then uses what
  was sent all the same, as the best it has [recon].

5. Several cores side by side (RAVAN) are blocks of one, each with a span of its own in R^r: at h r^2 numbers they tell
  as little as one of rank r, and the core of rank r sqrt(h) that costs as much tells more [recon].

The rank is chosen by the gap between singular values, what they fall to is the noise, and a (token, position) counts
as *found* where its residual is explained by that noise and is below half of the smallest one that a random span of as
many dimensions leaves: the false positives' control within each attack. Tokens of one
position are shared out among a batch's texts as a language model likes them best, and then exchanged as the second
layer says (`folklora.privacy.attacks.assembly`) [DAGER tests whole sentences there].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.privacy.attacks.assembly import Assembly
from folklora.privacy.attacks.attacker import Attacker
from folklora.privacy.attacks.canvas import TextCanvas
from folklora.privacy.attacks.first_inputs import FirstInputs
from folklora.privacy.attacks.guess import Attack, Form, Guess
from folklora.privacy.attacks.observation import Observation, Victim
from folklora.privacy.attacks.prior import Prior
from folklora.privacy.attacks.pursuit import View, pursue
from folklora.privacy.attacks.rowspan import RowSpan, Space, inside, random_like, residuals, row_span
from folklora.privacy.attacks.victims import tokens_of

NEAREST = (100, 1000)
"""Candidates of each position that a pursuit looks at: first few, and more where these do not explain the rows."""
ENOUGH = {torch.float32: 1e-6, torch.bfloat16: 2e-3}
"""What rounding leaves unexplained of a gradient computed in that precision; in others as in float32."""

SURE = 5e-3
"""Texts are sorted out where the tokens leave less than this unexplained; else it would sort what is not there."""

Inputs = frozenset[tuple[int, int]]
"""(token, position)."""


def spaces(gradient: Tensors, before: Tensors, sites: Sequence[str], masks: Tensors | None = None) -> list[Space]:
    """Where the inputs of these layers, which share them, can be looked for in what was sent.

    Rows of A's gradients live where the inputs do, and are put together; where there are none, every layer's core and
    B has a space of its own, and so has each block of a core whose other entries rest (``masks``).
    """
    whole = [gradient[f"A/{site}"] for site in sites if f"A/{site}" in gradient]
    whole = [_unit(rows) for rows in whole if rows.any() and rows.isfinite().all()]
    if whole:
        return [Space(torch.cat(whole))]
    found = []
    for site in sites:
        a, c = before[f"A/{site}"].float(), before.get(f"C/{site}")
        for name, factor in ((f"C/{site}", a), (f"B/{site}", a if c is None else c.float() @ a)):
            rows = gradient.get(name)
            if rows is not None and rows.isfinite().all() and rows.shape[1] == len(factor):
                blocks = _blocks(rows, (masks or {}).get(name))
                found += [Space(_unit(block), factor[columns]) for block, columns in blocks if block.any()]
    return found


def _blocks(rows: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Rows that move in the same columns, cut to these, and which columns they are."""
    if mask is None or mask.shape != rows.shape:
        return [(rows, torch.arange(rows.shape[1]))]
    patterns, which = mask.bool().unique(dim=0, return_inverse=True)
    return [(rows[which == i][:, columns], columns.nonzero().squeeze(1)) for i, columns in enumerate(patterns)]


def _unit(rows: Tensor) -> Tensor:
    """Of norm 1; the gradient of an example that the model is sure of may be so small that its squares are zero."""
    rows = rows / rows.abs().max()
    return rows / rows.norm()


class Span(Attack):
    """Row spans of the first adapted layers."""

    name = "span"
    title = "span attack (tokens in the row span)"
    paper = "arXiv:2405.15586"
    forms: frozenset[Form] = frozenset({"text"})  # type: ignore[misc]

    def run(self, lens: Attacker, seen: Observation, budget: int, generator: torch.Generator) -> Guess:
        canvas: TextCanvas = lens.canvas(seen)
        dtype = lens.replica.backbone.dtype if lens.knowledge.view == "sent" else torch.float32
        inputs = FirstInputs(lens.replica, seen.before, canvas.free.shape[1], dtype)
        public = _inputs(canvas.known[~canvas.free & canvas.real], ~canvas.free & canvas.real)
        telling = []
        for space in spaces(seen.gradient, seen.before, inputs.sites, seen.masks):
            span = row_span(space.rows, most=int(canvas.real.sum()))
            if 0 < span.dimensions < span.basis.shape[1]:
                telling.append((space, span))
        if not telling:
            return Guess(texts=written(canvas, {}, None), judge=partial(_judge, public, frozenset(), frozenset()))
        angles, found = _tested(inputs, telling, generator, int(canvas.real.sum()))
        angles[:, ~canvas.allowed.cpu()] = 1.0
        enough = ENOUGH.get(dtype, ENOUGH[torch.float32])
        where = [space for space, _ in telling]
        chosen, unexplained = _pursued(inputs, canvas, where, angles.amax(0), enough)
        texts = written(canvas, chosen, lens.prior)
        if unexplained < SURE:
            texts = _sorted_out(lens, seen, inputs, texts, canvas.free.cpu())
        pairs = frozenset((token, place) for place, tokens in chosen.items() for token in tokens)
        # Where nothing is left over these are the inputs; else what lies near must be needed, too.
        found = pairs if unexplained <= enough else found & (pairs | public)
        return Guess(
            texts=texts,
            scores={"unexplained": unexplained},
            loss=unexplained,
            judge=partial(_judge, public, found, pairs),
        )


def _sorted_out(
    lens: Attacker, seen: Observation, inputs: FirstInputs, texts: list[list[int]], free: Tensor
) -> list[list[int]]:
    """Tokens exchanged between texts until the next adapted layers' rows are explained best."""
    behind = [site.name for site in lens.replica.backbone.sites if site.name not in inputs.sites]
    if not behind:
        return texts
    sites = behind[: len(inputs.sites)]
    told = spaces(seen.gradient, seen.before, sites, seen.masks)
    return Assembly(lens.replica, seen.before, sites[0], told, inputs.dtype).improved(texts, free)


def _tested(
    inputs: FirstInputs, telling: Sequence[tuple[Space, RowSpan]], generator: torch.Generator, most: int
) -> tuple[Tensor, Inputs]:
    """Residuals [spaces, vocabulary, positions], and which (token, position) lie in all spans."""
    angles = torch.ones(len(telling), inputs.vocabulary, inputs.positions)
    random = [random_like(span, generator) for _, span in telling]
    chance = [1.0] * len(telling)
    for start, block in inputs.every():
        for i, (space, span) in enumerate(telling):
            candidates = space.of(block)
            angles[i, start : start + len(block)] = residuals(candidates, span)
            chance[i] = min(chance[i], float(residuals(candidates, random[i]).min()))
    within = [inside(angles[i], span.noise, chance[i], most) for i, (_, span) in enumerate(telling)]
    return angles, frozenset((t, p) for t, p in torch.stack(within).all(0).nonzero().tolist())


def _pursued(
    inputs: FirstInputs, canvas: TextCanvas, where: Sequence[Space], angles: Tensor, enough: float
) -> tuple[dict[int, list[int]], float]:
    """Position -> tokens that the rows are made of, the surest first, and what they leave unexplained."""
    room = canvas.free.sum(0).tolist()
    places = [place for place, free in enumerate(room) if free]
    known = _known(inputs, canvas)
    best: dict[int, list[int]] = {}
    least = 1.0
    for count in NEAREST:
        nearest = angles.topk(min(count, len(angles)), dim=0, largest=False).indices
        candidates = inputs.at(nearest)[:, places].flatten(0, 1)
        tokens, at = nearest[:, places].flatten(), torch.tensor(places, dtype=torch.int64).repeat(len(nearest))
        views = [View(space.of(candidates), space.rows.float(), space.of(known)) for space in where]
        result = pursue(views, at, room, enough)
        if result.unexplained < least:
            best, least = {}, result.unexplained
            for candidate in result.chosen:
                best.setdefault(int(at[candidate]), []).append(int(tokens[candidate]))
        if least <= enough:
            break
    return best, least


def _known(inputs: FirstInputs, canvas: TextCanvas) -> Tensor:
    """[k, d]: inputs of the tokens that the tokenizer puts around every text."""
    told = ~canvas.free & canvas.real
    return inputs.at(canvas.known)[told.cpu()]


def _inputs(tokens: Tensor, where: Tensor) -> Inputs:
    places = where.nonzero()[:, 1].tolist()
    return frozenset(zip(tokens.tolist(), places, strict=True))


def written(canvas: TextCanvas, chosen: Mapping[int, Sequence[int]], prior: Prior | None) -> list[list[int]]:
    """Texts of the tokens found at each position: shared out among the texts as fits best behind what they have.

    Where fewer were found than there are texts, the surest stands in for the others; where none was, the text has an
    unknown token, which recalls nothing.
    """
    texts = [row[:length].tolist() for row, length in zip(canvas.known, canvas.lengths, strict=True)]
    unknown = int((~canvas.allowed).nonzero()[0]) if bool((~canvas.allowed).any()) else 0
    for place in range(canvas.free.shape[1]):
        rows = canvas.free[:, place].nonzero().squeeze(1).tolist()
        tokens = list(chosen.get(place, ()))[: len(rows)] or [unknown]
        tokens += [tokens[0]] * (len(rows) - len(tokens))
        order = list(range(len(rows)))
        if prior is not None and place and len(set(tokens)) > 1:
            nats = [[prior.nats([texts[row][place - 1], token]) for token in tokens] for row in rows]
            order = linear_sum_assignment(np.array(nats))[1].tolist()
        for row, number in zip(rows, order, strict=True):
            texts[row][place] = tokens[number]
    return texts


def _judge(public: Inputs, found: Inputs, pursued: Inputs, victim: Victim) -> dict[str, float]:
    """Of the batch's distinct (token, position) that are not public, how many were found, and how many found are any.

    ``found_*`` is of those that lie in the span, beyond chance and noise; ``pursued_recall`` of the pursuit's choice.
    """
    true = {(token, place) for example in victim.examples for place, token in enumerate(tokens_of(example))} - public
    found, pursued = found - public, pursued - public
    return {
        "found_recall": len(found & true) / max(1, len(true)),
        "found_precision": len(found & true) / len(found) if found else math.nan,
        "found_exactly": float(found == true),
        "pursued_recall": len(pursued & true) / max(1, len(true)),
    }
