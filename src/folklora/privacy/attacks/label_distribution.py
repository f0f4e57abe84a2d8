"""Label-distribution inference: how many examples of each label has this client?

From whatever the client sent, the best of what it allows:

- *sketch*: class statistics and class mixtures hold the counts as they are, but for the labels that they leave out or
  noise hides.
- *bias*: where a head travels, its bias moves by ``-rate * sum (p_c - n_c / n)``: one step from equal answers gives the
  shares exactly; later steps and AdamW bend them [recon; the sign rule is iDLG's, arXiv 2001.02610].
- *shadows*: shadow clients of public examples, each with a label mix of its own, are trained in the victim's place; a
  ridge regression from their updates to their shares, its strength chosen by leaving one out, is asked about the
  victim's update. Works on whatever travels, cores alone as well [recon].
- *weights*: where a server mixes personally, the victim's row of weights, which whoever sees it reads with the other
  clients' label shares in hand: their mean by these weights [recon].

Each is measured by the total variation distance to the true shares (0: found out; 1: all wrong) and the recall of the
client's most frequent labels among as many guessed. Controls: for shadows the same regression on a shuffled update, for
weights a shuffled row, for a bias a shuffled one, for sketches those of another client. ``prior_distance`` is what the
pooled shares of the public examples alone come to: an attack that is no better has learnt nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from folklora.adapters.lowrank import Tensors
from folklora.errors import AttackError
from folklora.methods.condensed import COUNTS
from folklora.privacy.attacks.inference import Findings, Inference, Stage
from folklora.privacy.attacks.shadows import Cast, shadows, victim
from folklora.privacy.attacks.witness import sketch_of
from folklora.randomness import numpy_generator

LEAST = 8
"""Shadows from which a regression is made."""
MIXES = (0.1, 0.3, 1.0, 3.0)
"""Concentrations of the Dirichlet label mixes of shadows, in turn: from a few labels to nearly all."""
STRENGTHS = tuple(10.0**k for k in range(-4, 5))
"""Ridge penalties that are tried."""
TOP = 3
"""Most frequent labels that are asked for, at most."""


class LabelDistribution(Inference):
    """Counts of labels from sketches, heads, cores and mixing weights."""

    name = "labels"
    title = "label-distribution inference"
    paper = None
    casts = True

    def infer(self, stage: Stage) -> Findings:
        setup = stage.warm.setup
        classes = len(setup.data.table.classes)
        if classes < 2:
            raise AttackError("--attack labels: the recipe's examples have no labels; allowed: a task with labels")
        if stage.budget < LEAST:
            raise AttackError(f"--budget {stage.budget}: shadow clients of a victim; allowed: at least {LEAST}")
        findings = Findings()
        for client in stage.clients:
            true = shares(setup.data.table.labels[setup.data.splits[client].train], classes)
            target = victim(stage.warm, client)
            findings.sent = {name: list(tensor.shape) for name, tensor in target.sent.items()}
            findings.bytes = target.bytes
            public = stage.public(client)
            prior = shares(setup.data.table.labels[public], classes)
            guesses = self._guesses(stage, client, target, prior)
            own = {"prior_distance": distance(prior, true)}
            control: dict[str, float] = {}
            for name, (guess, other) in guesses.items():
                own |= _measured(name, guess, true)
                control |= _measured(name, other, true)
            findings.values.append(own)
            findings.controls.append(control)
            findings.victims.append(_told(setup.data.table.classes, client, true, guesses))
        return findings

    def _guesses(
        self, stage: Stage, client: str, target: Cast, prior: np.ndarray
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By source: the attack's shares and the control's."""
        setup, classes = stage.warm.setup, len(prior)
        draw = numpy_generator(stage.seed, "labels", client)
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        counted = from_sketch(sketch_of(setup, client)[1], classes)
        others = [other for other in setup.data.splits if other != client]
        if counted is not None and others:
            another = from_sketch(sketch_of(setup, str(draw.choice(others)))[1], classes)
            found["sketch"] = counted, prior if another is None else another
        if "head/bias" in target.sent and len(target.sent["head/bias"]) == classes:
            moved = (target.before["head/bias"] - target.sent["head/bias"]).double().numpy()
            # A zero head answers all labels alike; a trained one about as often as they are.
            answered = prior if target.before["head/bias"].any() else np.full(classes, 1 / classes)
            found["bias"] = from_bias(moved, answered), from_bias(draw.permutation(moved), answered)
        weights = setup.method.insight(stage.warm.state).get("weights")
        if weights is not None and len(others):
            table, splits = setup.data.table, setup.data.splits
            place = list(splits).index(client)
            theirs = np.stack([shares(table.labels[split.train], classes) for split in splits.values()])
            row = np.delete(weights[place].double().numpy(), place)
            theirs = np.delete(theirs, place, 0)
            found["weights"] = from_weights(row, theirs), from_weights(draw.permutation(row), theirs)
        if target.sent:
            found["shadows"] = self._regressed(stage, client, target, draw)
        return found

    def _regressed(
        self, stage: Stage, client: str, target: Cast, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        table = stage.warm.setup.data.table
        chosen = mixes(table.labels, stage.public(client), len(target.rows), stage.budget, draw)
        cast = shadows(stage.warm, client, chosen, stage.seed, stage.advance)
        classes = len(table.classes)
        known = np.stack([_update(each) for each in cast])
        answers = np.stack([shares(table.labels[each.rows], classes) for each in cast])
        own = _update(target)
        return regressed(known, answers, own), regressed(known, answers, draw.permutation(own))


def shares(labels: np.ndarray, classes: int) -> np.ndarray:
    """[classes] float64: how large a part of the examples has each label."""
    found: np.ndarray = np.bincount(labels, minlength=classes) / max(1, len(labels))
    return found


def distance(guess: np.ndarray, true: np.ndarray) -> float:
    """Total variation: half of the sum of differences."""
    return float(np.abs(guess - true).sum() / 2)


def top_recall(guess: np.ndarray, true: np.ndarray, top: int = TOP) -> float:
    """Of the ``top`` most frequent labels that there are, how many are among as many guessed; ties by number."""
    count = min(top, int((true > 0).sum()))
    best = [set(np.argsort(-each, kind="stable")[:count].tolist()) for each in (guess, true)]
    return len(best[0] & best[1]) / max(1, count)


def normalised(guess: np.ndarray) -> np.ndarray:
    """The nearest shares in shape: negative ones are none; equal ones where nothing is left."""
    kept = np.clip(guess, 0, None)
    found: np.ndarray = kept / kept.sum() if kept.sum() > 0 else np.full(len(kept), 1 / len(kept))
    return found


def from_sketch(sketch: Tensors, classes: int) -> np.ndarray | None:
    """Class counts as they are, or those that class statistics or mixtures hold; of both, those with more classes. None
    if there are none."""
    best: np.ndarray | None = None
    if COUNTS in sketch:
        return normalised(sketch[COUNTS].double().numpy())
    for prefix in ("mixture/", "statistics/"):
        if f"{prefix}counts" not in sketch:
            continue
        counts = np.zeros(classes)
        counts[sketch[f"{prefix}classes"].long().numpy()] = sketch[f"{prefix}counts"].double().numpy()
        if best is None or (counts > 0).sum() >= (best > 0).sum():
            best = counts
    return None if best is None else normalised(best)


def from_bias(moved: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Shares from how far the head's bias moved downhill, ``rate * (answered - shares)``, whatever the rate was.

    The rate is taken to be the largest that leaves no share below zero: then the label that moved furthest beside what
    was answered has none, which is exact wherever the client lacks a label.
    """
    if not np.any(moved):
        return answered
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = float(np.nanmax(np.where(answered > 0, moved / answered, 0.0)))
    return normalised(answered - moved / rate) if rate > 0 else answered


def from_weights(row: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The others' shares [N - 1, classes], averaged by how much the victim is made to listen to each."""
    above = row - row.min()  # softmax weights are never zero: what all get alike says nothing
    weights = above if above.sum() > 0 else np.ones_like(row)
    found: np.ndarray = weights @ theirs / weights.sum()
    return found


def mixes(labels: np.ndarray, public: np.ndarray, size: int, count: int, draw: np.random.Generator) -> list[np.ndarray]:
    """Rows of ``count`` shadows: label mixes drawn from Dirichlet distributions, public rows with replacement."""
    by_label = {label: public[labels[public] == label] for label in np.unique(labels[public])}
    names = np.array(sorted(by_label))
    found = []
    for number in range(count):
        mix = draw.dirichlet(np.full(len(names), MIXES[number % len(MIXES)]))
        wanted = draw.choice(names, size, p=mix / mix.sum())
        found.append(np.array([draw.choice(by_label[label]) for label in wanted]))
    return found


def regressed(known: np.ndarray, answers: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Shares that a ridge regression from updates [S, P] to shares [S, classes] gives of an update [P].

    In the dual, so that P may be large; updates are brought to a mean of zero and a unit mean square, and the penalty
    is the one with the least error when each shadow in turn is left out.
    """
    mean = known.mean(0)
    scale = np.sqrt(np.square(known - mean).mean()) or 1.0
    x = (known - mean) / scale
    centre = answers.mean(0)
    gram = x @ x.T / x.shape[1]
    values, vectors = np.linalg.eigh(gram)
    inverses = [(vectors / (np.clip(values, 0, None) + s)) @ vectors.T for s in STRENGTHS]
    errors = []
    for inverse in inverses:
        # Leaving one out is a division by the diagonal, to which the mean of all is close enough.
        residual = (inverse @ (answers - centre)) / np.diag(inverse)[:, None]
        errors.append(float(np.square(residual).sum()))
    best = inverses[int(np.argmin(errors))]
    similar = x @ ((asked - mean) / scale) / x.shape[1]
    return normalised(centre + similar @ best @ (answers - centre))


def _update(cast: Cast) -> np.ndarray:
    """What travelled as one vector: each tensor's move from where the attacker believes it started.

    Tensors are brought to unit length, because a client's loss, not its labels, says how long an update is.
    """
    parts = []
    for name, sent in sorted(cast.sent.items()):
        if not sent.is_floating_point():
            continue
        start = cast.before.get(name)
        move = sent.float() - start.float() if start is not None and start.shape == sent.shape else sent.float()
        parts.append((move / move.norm().clamp(min=1e-12)).flatten())
    return torch.cat(parts).double().numpy()


def _measured(name: str, guess: np.ndarray, true: np.ndarray) -> dict[str, float]:
    return {f"label_distance_{name}": distance(guess, true), f"top_labels_{name}": top_recall(guess, true)}


def _told(
    classes: Sequence[str], client: str, true: np.ndarray, guesses: dict[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, object]:
    """The most frequent labels of each, for people."""

    def most(found: np.ndarray) -> dict[str, float]:
        best = np.argsort(-found, kind="stable")[:TOP]
        return {classes[i]: round(float(found[i]), 3) for i in best if found[i] > 0}

    recovered = {name: most(guess) for name, (guess, _) in guesses.items()}
    return {"client": client, "original": most(true), "recovered": recovered}
