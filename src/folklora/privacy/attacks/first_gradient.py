"""First gradient: which tokens does the dense one tell that a Fed-SB client sends once? After DAGER, arXiv 2405.15586.

The gradient of W0 is ``sum_t dy_t x_t^T`` [d_out, d_in]: below the first attention its rows lie in the span of the
inputs of single (token, position) pairs, and query and value see the same ones. While that span is not everything,
every pair of the vocabulary is tested, as in `folklora.privacy.attacks.span` [DAGER]. Here it is a client's one-off
message that is read so [recon]. How many examples are in it (``method.gradient_examples``) is the client's only
shelter, and a thin one: up to the LayerNorm's factor an input is a token's vector plus a position's, so whoever holds
(t, p), (u, p) and (u, q) has (t, q) in the span, too. Of n words at m places the rows have about n + m dimensions, not
n m; what is told are the words and the places, not which word stood where.

Messages of few bits are noisier: how much is found out by encoding the matrix once more, and what is below that noise
is left out [recon]. The control is the message of another client, asked about the victim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from folklora.adapters.lowrank import Tensors
from folklora.federation.codec import decode, encode
from folklora.federation.member import MemberData
from folklora.methods.contract import Message
from folklora.privacy.attacks.first_inputs import FirstInputs
from folklora.privacy.attacks.guess import Form
from folklora.privacy.attacks.inference import Findings, Inference, Stage
from folklora.privacy.attacks.metrics import Values
from folklora.privacy.attacks.result import texts_of
from folklora.privacy.attacks.rowspan import FARTHEST, SLACK, RowSpan, decomposed, inside, random_like, residuals
from folklora.privacy.attacks.victims import tokens_of
from folklora.privacy.attacks.witness import sketch_of
from folklora.randomness import torch_generator

GRADIENT, COUNT = "gradient/", "count/gradient"
SHOWN = 8
"""Texts of a victim that are shown."""
SHRUNK = 0.9993
"""By so little a matrix is changed before it is encoded again, so that each number is rounded anew; and turned on its
side, so that blocks of numbers with one scale are other blocks."""

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
            data, sketch = sketch_of(setup, client)
            if not any(name.startswith(GRADIENT) for name in sketch):
                findings.notes.append(f"method {setup.recipe.method.name!r} sends no dense gradient")
                return findings
            findings.sent = {name: list(tensor.shape) for name, tensor in sketch.items()}
            findings.bytes = len(data)
            rows = MemberData(setup, client).gradient_rows(int(sketch[COUNT]))
            texts = [tokens_of(setup.encoded[i]) for i in rows]
            inputs = self._inputs(stage, client, max(map(len, texts)))
            truth = frozenset((token, place) for text in texts for place, token in enumerate(text))
            _, control = sketch_of(setup, stage.another(client, self.name))
            told = [_tested(inputs, each, stage, client) for each in (sketch, control)]
            public = frozenset(stage.lens.replica.backbone.tokenizer.all_special_ids)
            findings.values.append(_scores(told[0][0], truth, public))
            findings.controls.append(_scores(told[1][0], truth, public))
            sizes = {"pairs": len(truth), "dimensions": told[0][1].dimensions}
            shown = {"original": [" / ".join(texts_of(stage.lens.replica, texts[:SHOWN]).texts)]}
            shown |= {
                key: [_words(stage, found)] for key, (found, _) in zip(("recovered", "control"), told, strict=True)
            }
            findings.victims.append({"client": client, **shown, **sizes})
        return findings

    def _inputs(self, stage: Stage, client: str, positions: int) -> FirstInputs:
        """Of as many positions as the longest text has, if that is known, or else as a public one usually has."""
        lens = stage.lens
        length = positions if lens.knowledge.lengths else lens.usual_length
        before = stage.warm.setup.method.initial(client)
        return FirstInputs(lens.replica, before, length, torch.float32)  # as the gradient is computed, always


def _span(sketch: Tensors, sites: Sequence[str], dtype: str) -> RowSpan:
    """Of the rows of layers that share their inputs, each layer's of norm 1, above the noise of the encoding."""
    parts = {site: sketch[f"{GRADIENT}{site}"] for site in sites}
    norms = {site: rows.double().norm().clamp(min=torch.finfo(torch.float64).tiny) for site, rows in parts.items()}
    again = decode(encode(Message({site: SHRUNK * rows.T.contiguous() for site, rows in parts.items()}), dtype)).tensors
    whole = torch.cat([rows.double() / norms[site] for site, rows in parts.items()])
    noise = torch.cat([(again[site].T.double() / SHRUNK - rows.double()) / norms[site] for site, rows in parts.items()])
    values, rows = decomposed(whole)
    floor = max(2**-23 * float(values[0]), 1.5 * float(torch.linalg.matrix_norm(noise, 2)))
    rank = int((values > floor).sum())
    left = float(values[rank]) if rank < len(values) else floor
    return RowSpan(rows[:rank], values, min(1.0, left / float(values[rank - 1])) if rank else 1.0)


def _tested(inputs: FirstInputs, sketch: Tensors, stage: Stage, client: str) -> tuple[Pairs, RowSpan]:
    """Which (token, position) lie in the rows' span; none where that is everything, or nothing."""
    span = _span(sketch, inputs.sites, stage.warm.setup.recipe.message.dtype)
    if not span.dimensions or span.everything:
        return frozenset(), span
    random = random_like(span, torch_generator(stage.seed, "attack", client))
    angles, chance = torch.ones(inputs.vocabulary, inputs.positions), 1.0
    for start, block in inputs.every():
        angles[start : start + len(block)] = residuals(block, span).float()
        chance = min(chance, float(residuals(block, random).min()))
    if float(angles.median()) <= FARTHEST:  # LayerNorms leave a plane, and the span is all of that
        return frozenset(), span
    if SLACK * span.noise > FARTHEST:  # noise explains anything: what chance does not give is all there is to go by
        chosen = angles <= min(FARTHEST, 0.5 * chance)
    else:
        chosen = inside(angles, span.noise, chance, span.dimensions * inputs.positions)
    return frozenset((t, p) for t, p in chosen.nonzero().tolist()), span


def _scores(found: Pairs, truth: Pairs, public: frozenset[int]) -> Values:
    """Recall and precision, in 0..1, of pairs and of words wherever they stand; without special tokens."""
    own, told = ({pair for pair in pairs if pair[0] not in public} for pairs in (truth, found))
    words, guessed = ({token for token, _ in pairs} for pairs in (own, told))
    values = {
        "word_recall": len(words & guessed) / len(words) if words else 0.0,
        "pair_recall": len(own & told) / len(own) if own else 0.0,
    }
    if told:
        values |= {"word_precision": len(words & guessed) / len(guessed), "pair_precision": len(own & told) / len(told)}
    return values


def _words(stage: Stage, found: Pairs) -> str:
    """All that an attacker reads: each word once, by the first place at which it may stand."""
    first: dict[int, int] = {}
    for token, place in sorted(found, key=lambda pair: (pair[1], pair[0])):
        first.setdefault(token, place)
    return texts_of(stage.lens.replica, [list(first)]).texts[0]
