"""First gradient: which tokens does the dense one tell that a Fed-SB client sends once? After DAGER, arXiv 2405.15586.

The gradient of W0 is ``sum_t dy_t x_t^T`` [d_out, d_in]: below the first attention its rows lie in the span of the
embeddings of single (token, position) pairs, and query and value see the same ones. While the examples that it is of
have fewer distinct pairs than the layer is wide, every pair of the vocabulary is tested, as in
`folklora.privacy.attacks.span`; from there on the span is everything, and nothing is told by it [DAGER]. Here it is a
client's one-off message that is read so [recon]: how many examples are in it (``method.gradient_examples``) is the
client's only shelter, and a thin one. Up to the LayerNorm's factor an input is a token's vector plus a position's, so
whoever holds (t, p), (u, p) and (u, q) has (t, q) in the span, too: of n words at m places the rows have about n + m
dimensions, not n m, and what is told are the words and the places, not which stood where.

The control is the same matrix with its numbers shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.federation.codec import decode
from folklora.federation.member import Member, MemberData
from folklora.privacy.attacks.first_inputs import FirstInputs
from folklora.privacy.attacks.guess import Form
from folklora.privacy.attacks.inference import Findings, Inference, Stage
from folklora.privacy.attacks.metrics import Values
from folklora.privacy.attacks.result import texts_of
from folklora.privacy.attacks.rowspan import ROUNDING, SLACK, RowSpan, inside, residuals, row_span
from folklora.privacy.attacks.victims import tokens_of
from folklora.randomness import torch_generator

GRADIENT, COUNT = "gradient/", "count/gradient"
SHOWN = 8
"""Texts of a victim that are shown."""

Pairs = frozenset[tuple[int, int]]
"""(token, position)."""


class FirstGradient(Inference):
    """What a dense gradient that is sent once says of the examples behind it."""

    name = "first-gradient"
    title = "first gradient (tokens in the rows of a dense one)"
    paper = "arXiv:2405.15586"
    forms: frozenset[Form] = frozenset({"text"})  # type: ignore[misc]

    def infer(self, stage: Stage) -> Findings:
        findings, setup = Findings(), stage.warm.setup
        for client in stage.clients:
            data = Member(setup, client).sketch()
            sketch = {} if data is None else dict(decode(data).tensors)
            if not any(name.startswith(GRADIENT) for name in sketch):
                findings.notes.append(f"method {setup.recipe.method.name!r} sends no dense gradient")
                return findings
            findings.sent = {name: list(tensor.shape) for name, tensor in sketch.items()}
            findings.bytes = 0 if data is None else len(data)
            rows = MemberData(setup, client).gradient_rows(int(sketch[COUNT]))
            texts = [tokens_of(setup.encoded[i]) for i in rows]
            inputs = self._inputs(stage, client, max(map(len, texts)))
            truth = frozenset((token, place) for text in texts for place, token in enumerate(text))
            draw = torch_generator(stage.seed, "shuffle", client)
            told = [_tested(inputs, matrix, stage, client) for matrix in _matrices(sketch, inputs.sites, draw)]
            public = frozenset(stage.lens.replica.backbone.tokenizer.all_special_ids)
            (own, values), (_, control) = ((found, _scores(found, span, truth, public)) for found, span in told)
            findings.values.append(values)
            findings.controls.append(control)
            findings.victims.append({"client": client, **_shown(stage, texts, own)})
        return findings

    def _inputs(self, stage: Stage, client: str, positions: int) -> FirstInputs:
        """Of as many positions as the longest text has, if that is known, or else as a public one usually has."""
        lens = stage.lens
        length = positions if lens.knowledge.lengths else lens.usual_length
        before = stage.warm.setup.method.initial(client)
        return FirstInputs(lens.replica, before, length, torch.float32)  # as the gradient is computed, always


def _matrices(sketch: Tensors, sites: Sequence[str], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The rows of the first layers that share their inputs, each layer's of norm 1; and the same, shuffled."""
    found = [sketch[f"{GRADIENT}{site}"].double() for site in sites]
    whole = torch.cat([rows / rows.norm().clamp(min=torch.finfo(rows.dtype).tiny) for rows in found])
    return whole, whole.flatten()[torch.randperm(whole.numel(), generator=draw)].view(whole.shape)


def _tested(inputs: FirstInputs, matrix: Tensor, stage: Stage, client: str) -> tuple[Pairs, RowSpan]:
    """Which (token, position) lie in the rows' span; none where that is everything, or nothing."""
    span = row_span(matrix)
    if not span.dimensions or span.everything:
        return frozenset(), span
    generator = torch_generator(stage.seed, "attack", client)
    drawn = torch.randn(span.basis.T.shape, generator=generator, dtype=span.basis.dtype)
    random = replace(span, basis=torch.linalg.qr(drawn).Q.T.contiguous(), noise=1.0)
    angles, chance = torch.ones(inputs.vocabulary, inputs.positions), 1.0
    for start, block in inputs.every():
        angles[start : start + len(block)] = residuals(block, span).float()
        chance = min(chance, float(residuals(block, random).min()))
    if float(angles.median()) <= SLACK * max(span.noise, ROUNDING):  # LayerNorms leave a plane, and it is all of that
        return frozenset(), span
    chosen = inside(angles, span.noise, chance, span.dimensions * inputs.positions)
    return frozenset((t, p) for t, p in chosen.nonzero().tolist()), span


def _scores(found: Pairs, span: RowSpan, truth: Pairs, public: frozenset[int]) -> Values:
    """Recall and precision, in 0..1, of pairs and of words wherever they stand; without special tokens."""
    own, told = ({pair for pair in pairs if pair[0] not in public} for pairs in (truth, found))
    words, guessed = ({token for token, _ in pairs} for pairs in (own, told))
    values = {
        "pair_recall": len(own & told) / len(own) if own else 0.0,
        "word_recall": len(words & guessed) / len(words) if words else 0.0,
        "dimensions": float(span.dimensions),
        "pairs": float(len(truth)),
    }
    if told:
        values |= {"pair_precision": len(own & told) / len(told), "word_precision": len(words & guessed) / len(guessed)}
    return values


def _shown(stage: Stage, texts: Sequence[Sequence[int]], found: Pairs) -> dict[str, Any]:
    """Some of the client's texts, and of each what was told of it in its places."""
    told = [[token for place, token in enumerate(text) if (token, place) in found] for text in texts[:SHOWN]]
    replica = stage.lens.replica
    return {"original": texts_of(replica, texts[:SHOWN]).texts, "recovered": texts_of(replica, told).texts}
