"""How a client chooses the start of its head: from zero, or from the sketched one, on its own validation split. Ours
[recon].

With many overlapping classes and little data, the linear discriminant of everybody's class statistics is worth more
than any local training; when a client's classes are its own, a head that knows all other classes only distracts. So
every client tries both, and variants of the second, on cached features of the frozen backbone: each candidate is
trained as the head alone would be, all candidates side by side, and the best on validation is kept. It costs seconds
and no byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import Tensors
from folklora.randomness import torch_generator

Labelled = tuple[Tensor, Tensor]

SCALES = (1.0, 0.5, 0.25, 0.1)
"""Multiples of the discriminant's logits: pooled statistics are overconfident about a client unlike the others."""

ABSENT = -10.0
"""Added to the bias of classes that a client does not have, where a candidate keeps to its own classes."""


@dataclass(frozen=True)
class Candidate:
    """A start for the head and what it was made of."""

    label: str
    weight: Tensor  # [classes, d]
    bias: Tensor  # [classes]


def candidates(weight: Tensor, bias: Tensor, labels: Tensor) -> list[Candidate]:
    """Zero, and the sketched head by scale, label prior (pooled or own), and classes (all or own).

    Parameters
    ----------
    weight, bias
        The server's discriminant, [classes, d] and [classes].
    labels
        The client's training labels: its own prior and its own classes come from them.
    """
    classes = weight.shape[0]
    counts = torch.bincount(labels, minlength=classes).float()
    own = counts > 0
    # Laplace's rule keeps a class the client has not seen yet possible.
    prior = torch.log((counts + 1) / (counts.sum() + classes))
    found = [Candidate("zero", torch.zeros_like(weight), torch.zeros_like(bias))]
    found.append(Candidate("zero, own classes", torch.zeros_like(weight), torch.where(own, 0.0, ABSENT)))
    for scale in SCALES:
        for prior_name, shift in (("pooled prior", torch.zeros_like(bias)), ("own prior", prior)):
            start = scale * bias + shift
            found.append(Candidate(f"sketched x {scale:g}, {prior_name}", scale * weight, start))
        restricted = torch.where(own, scale * bias, scale * bias + ABSENT)
        found.append(Candidate(f"sketched x {scale:g}, own classes", scale * weight, restricted))
    return found


def choose_head(
    weight: Tensor,
    bias: Tensor,
    train: Labelled,
    validation: Labelled,
    *,
    steps_lr: float,
    batch_size: int,
    epochs: int,
    seed: int,
    client: str,
    beside: Sequence[Candidate] = (),
) -> Tensors:
    """The start of the head that validates best after the head alone was trained from it, by AdamW whatever the run
    trains by: only starts are compared.

    Parameters
    ----------
    train, validation
        Frozen features [n, d] and labels [n] of the client.
    steps_lr, batch_size, epochs
        The recipe's learning rate and batch size, and as many epochs as the run will have.
    beside
        Other candidates; among equals the first is kept, and they come first.

    Returns
    -------
    Tensors
        ``head/weight`` and ``head/bias``: the *start*, not the trained head.
    """
    options = [*beside, *candidates(weight, bias, train[1])]
    weights = torch.stack([option.weight for option in options]).requires_grad_()
    biases = torch.stack([option.bias for option in options]).requires_grad_()
    optimizer = torch.optim.AdamW([weights, biases], lr=steps_lr, weight_decay=0.0)
    (x, y), (held_x, held_y) = train, validation
    order = torch_generator(seed, "head", client)
    best = torch.full((len(options),), torch.inf)
    for epoch in range(epochs + 1):
        if epoch:
            for picks in torch.randperm(len(y), generator=order).split(batch_size):
                logits = torch.einsum("nd,ocd->onc", x[picks], weights) + biases[:, None]
                each = F.cross_entropy(logits.flatten(0, 1), y[picks].repeat(len(options)), reduction="none")
                optimizer.zero_grad()
                each.view(len(options), -1).mean(1).sum().backward()
                optimizer.step()
        with torch.no_grad():
            logits = torch.einsum("nd,ocd->onc", held_x, weights) + biases[:, None]
            wrong = (logits.argmax(-1) != held_y).float().mean(1)
            loss = F.cross_entropy(logits.flatten(0, 1), held_y.repeat(len(options)), reduction="none")
            # Errors decide; among equal errors the likelihood does, squeezed below the weight of one error.
            loss = loss.view(len(options), -1).mean(1)
            best = torch.minimum(best, wrong + loss / (1 + loss) / (len(held_y) + 1))
    chosen = options[int(best.argmin())]
    return {"head/weight": chosen.weight.clone(), "head/bias": chosen.bias.clone()}
