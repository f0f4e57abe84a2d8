"""Mixture inversion: what do the class statistics or class mixtures say that a client sends once?

A component's mean is that of the frozen features of a few examples, and everybody has the backbone. Three questions:

1. *Nearest public example*: of the examples that no split of the victim holds, the one whose features lie nearest to
  each mean (by cosine). It is what the attacker shows; its words are held against the victim's texts [recon].
2. *Identification*: the attacker has candidates, the victim's examples among public ones. Is the candidate nearest to
  a mean one of the victim's (``hit``), and at which quantile of all candidates does the nearest of them lie? A class of
  one example (statistics) has that example's features for its mean, which finds it out for sure.
3. *Subset*: a class's mean times its count is the sum of that many candidates' features. Matching pursuit picks as many
  as were counted: whoever has a list of possible sentences reads off which are in [recon].

Of pictures, pixels are also optimised until the frozen backbone's features are those of the mean (cosine, total
variation, Adam) [recon; CE-LoRA's authors attack their mixtures by optimisation too]. Everything works on what arrived,
so a private release (``method.dp_epsilon``) is attacked as it is. The control are the means of another client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import Tensors
from folklora.data.mixtures import projection
from folklora.privacy.attacks.gallery import data_uri
from folklora.privacy.attacks.inference import Findings, Inference, Stage
from folklora.privacy.attacks.metrics import Texts, Values, text_metrics
from folklora.privacy.attacks.result import texts_of
from folklora.privacy.attacks.victims import tokens_of
from folklora.privacy.attacks.witness import sketch_of

LARGEST = 32
"""A class of more examples is not taken apart: its sum says too little of each."""
STARTS = 8
"""First choices from which the examples behind a sum are looked for."""
SHOWN = 8
"""Components of a victim that are shown or, of pictures, inverted."""
PIXEL_RATE = 0.05
TOTAL_VARIATION = 1e-2


@dataclass(frozen=True)
class Means:
    """What a sketch says: [M] classes, [M, d] means and how many examples each is of (about; noise may be in it)."""

    classes: np.ndarray
    means: Tensor
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)


class MixtureInversion(Inference):
    """What class statistics and mixtures say of the examples behind them."""

    name = "mixture"
    title = "mixture inversion (nearest, identified, summed)"
    paper = None

    def infer(self, stage: Stage) -> Findings:
        findings = Findings()
        setup = stage.warm.setup
        for client in stage.clients:
            data, sketch = sketch_of(setup, client)
            findings.sent = {name: list(tensor.shape) for name, tensor in sketch.items()}
            findings.bytes = len(data)
            told = means_of(sketch), means_of(sketch_of(setup, stage.another(client, self.name))[1])
            if not all(len(means) for means in told):
                findings.notes.append(f"client {client}: no class is left in its sketch or in the control's")
                continue
            own, control = (self._asked(stage, client, means) for means in told)
            findings.values.append(own[0])
            findings.controls.append(control[0])
            findings.victims.append({"client": client, **own[1], "control": control[1]["recovered"]})
        if not findings.values and not findings.notes:
            findings.notes.append(f"method {setup.recipe.method.name!r} sends no sketch")
        return findings

    def _asked(self, stage: Stage, client: str, means: Means) -> tuple[Values, dict[str, Any]]:
        setup = stage.warm.setup
        features = setup.frozen_features()
        width = means.means.shape[1]
        if width != features.shape[1]:
            features = features @ projection(features.shape[1], width, setup.recipe.seed).T
        rows, public = setup.data.splits[client].train, stage.public(client)
        labels = setup.data.table.labels
        nearest, cosine = nearest_of(means.means, features[torch.from_numpy(public)])
        candidates = np.concatenate([rows, public])
        values = identified(means, features[torch.from_numpy(candidates)], len(rows))
        values["public_cosine"] = float(cosine.mean())
        values |= summed(means, features, labels, candidates, set(rows.tolist()))
        shown = public[nearest.numpy()]
        if stage.lens.replica.form == "image":
            return values, self._pictures(stage, means, rows)
        lens = stage.lens
        originals = closest(means, features, rows)
        original, recovered = (bare_texts(lens.replica, setup.encoded, each) for each in (originals, shown))
        values |= text_metrics(original, recovered)
        return values, {"original": original.texts[:SHOWN], "recovered": recovered.texts[:SHOWN]}

    def _pictures(self, stage: Stage, means: Means, rows: np.ndarray) -> dict[str, Any]:
        setup, lens = stage.warm.setup, stage.lens
        if means.means.shape[1] != setup.task.width:
            return {"original": [], "recovered": []}
        chosen = slice(0, SHOWN)
        wanted = means.means[chosen].float()
        size = tuple(lens.replica.backbone.pictures.size)
        pictures = inverted(lens.replica, wanted, size, stage.budget * 10)
        originals = closest(means, setup.frozen_features(), rows)[chosen]
        pixels = lens.replica.backbone.pictures.encode([setup.data.table.inputs[i] for i in originals])
        original = torch.from_numpy(np.stack(pixels)).float() / 255
        return {"original": [data_uri(p) for p in original], "recovered": [data_uri(p) for p in pictures]}


def means_of(sketch: Tensors) -> Means:
    """Components of mixtures, and classes of statistics; both where both were sent."""
    classes, means, counts = [], [], []
    if "mixture/means" in sketch:
        sizes = sketch["mixture/components"].long()
        total = sketch["mixture/counts"].double().repeat_interleave(sizes)
        classes.append(sketch["mixture/classes"].long().repeat_interleave(sizes).numpy())
        means.append(sketch["mixture/means"].float())
        counts.append((sketch["mixture/weights"].double() * total).numpy())
    if "statistics/means" in sketch:
        classes.append(sketch["statistics/classes"].long().numpy())
        means.append(sketch["statistics/means"].float())
        counts.append(sketch["statistics/counts"].double().numpy())
    if not means or len({each.shape[1] for each in means}) > 1:
        classes, means, counts = classes[-1:], means[-1:], counts[-1:]
    if not means:
        return Means(np.empty(0, dtype=np.int64), torch.zeros(0, 0), np.empty(0))
    return Means(np.concatenate(classes), torch.cat(means), np.concatenate(counts))


def nearest_of(means: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Which candidate lies nearest to each mean by cosine, and the cosine: [M] each."""
    found = F.normalize(means.float(), dim=1) @ F.normalize(candidates.float(), dim=1).T
    best = found.max(1)
    return best.indices, best.values


def identified(means: Means, candidates: Tensor, own: int) -> Values:
    """Whether the victim's examples, the first ``own`` candidates, are nearer to the means than all others.

    ``hit``: share of the means whose nearest candidate is the victim's; ``single_hit``: of those that are of one
    example. ``rank_quantile``: where the victim's nearest lies among all candidates, 0 being the first.
    """
    near = F.normalize(means.means.float(), dim=1) @ F.normalize(candidates.float(), dim=1).T
    best = near[:, :own].amax(1)
    before = (near > best[:, None]).sum(1)
    hit = (before == 0).double()
    values = {"hit": float(hit.mean()), "rank_quantile": float(before.double().mean()) / near.shape[1]}
    single = torch.from_numpy(np.abs(means.counts - 1) < 0.25)
    if bool(single.any()):
        values["single_hit"] = float(hit[single].mean())
    return values


def summed(means: Means, features: Tensor, labels: np.ndarray, candidates: np.ndarray, own: set[int]) -> Values:
    """Of the candidates that a pursuit takes for a class's examples: how many are the victim's, and all of them?

    Candidates are of the mean's own class, which is told beside it. Where a class has none beside the victim's, nothing
    is asked.
    """
    right, taken, classes, whole = 0, 0, 0, 0
    for label, mean, count in zip(means.classes, means.means, means.counts, strict=True):
        number = round(float(count))
        rows = candidates[labels[candidates] == label]
        if not 1 <= number <= LARGEST or abs(count - number) > 0.25 or len(rows) <= number:
            continue
        chosen = rows[summands(features[torch.from_numpy(rows)], mean * number, number)]
        correct = sum(int(row) in own for row in chosen)
        right, taken, classes, whole = right + correct, taken + number, classes + 1, whole + (correct == number)
    if not taken:
        return {}
    return {"summed_precision": right / taken, "summed_whole": whole / classes}


def summands(candidates: Tensor, total: Tensor, count: int) -> np.ndarray:
    """Which ``count`` of the candidates [n, d] add up to ``total`` best.

    Greedily, then each again beside the others until none is exchanged; from several first choices, of which the one
    that ends nearest is taken. A candidate's part is one, not a free number: that tells it from its likes.
    """
    x, wanted = candidates.double(), total.double()
    squares = x.square().sum(1)

    def best(rest: Tensor, taken: list[int]) -> int:
        gain = 2 * x @ rest - squares
        gain[taken] = -torch.inf
        return int(gain.argmax())

    def searched(first: int) -> tuple[float, list[int]]:
        chosen, rest = [first], wanted - x[first]
        while len(chosen) < count:
            chosen.append(best(rest, chosen))
            rest = rest - x[chosen[-1]]
        for _ in range(count):
            before = set(chosen)
            for _ in range(count):
                rest = rest + x[chosen.pop(0)]
                chosen.append(best(rest, chosen))
                rest = rest - x[chosen[-1]]
            if set(chosen) == before:
                break
        return float(rest.norm()), chosen

    firsts = (2 * x @ wanted - squares).topk(min(STARTS, len(x))).indices.tolist()
    return np.array(min(map(searched, firsts))[1])


def inverted(replica: Any, wanted: Tensor, size: Sequence[int], steps: int) -> Tensor:
    """Pictures [M, 3, height, width] in [0, 1] whose frozen features point where these do."""
    pixels = torch.full((len(wanted), 3, *size), 0.5, device=replica.device, requires_grad=True)
    wanted = F.normalize(wanted.to(replica.device), dim=1)
    optimiser = torch.optim.Adam([pixels], lr=PIXEL_RATE)
    for _ in range(steps):
        optimiser.zero_grad()
        seen = F.normalize(replica.features(pixels, slope=True), dim=1)
        rough = (pixels.diff(dim=2).abs().mean() + pixels.diff(dim=3).abs().mean()) * len(wanted)
        ((1 - (seen * wanted).sum(1)).sum() + TOTAL_VARIATION * rough).backward()
        optimiser.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    return pixels.detach().cpu()


def closest(means: Means, features: Tensor, rows: np.ndarray) -> np.ndarray:
    """The victim's own example nearest to each mean: what it is held to be the likeness of."""
    return np.asarray(rows[nearest_of(means.means, features[torch.from_numpy(rows)])[0].numpy()])


def bare_texts(replica: Any, encoded: Sequence[Any], rows: np.ndarray) -> Texts:
    """Encoded texts without their special tokens."""
    return texts_of(replica, [tokens_of(encoded[i]) for i in rows])
