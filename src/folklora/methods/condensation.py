"""Condensing examples into few made-up ones, and training a model on those: the two halves of FedDM and FedAF.

Made-up examples are moved until a model cannot tell their mean from that of the real ones, class by class (distribution
matching, arXiv 2110.04181). How an input becomes a feature is a *view*; `FeatureView` and `EmbeddingView` are the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import Tensors
from folklora.methods.contract import Network

MAPS = 128
"""Random maps of a feature that are matched beside it, where the backbone itself makes none."""

Extra = Callable[[Tensor, Tensor], Tensor]
"""What is added to a loss: from logits [S, C] and labels [S] to a scalar."""


@dataclass(frozen=True)
class Examples:
    """Inputs [n, ..., width], how long each is (of features: 1), and labels [n] int64."""

    inputs: Tensor
    lengths: Tensor
    labels: Tensor

    def __getitem__(self, picks: Tensor) -> Examples:
        return Examples(self.inputs[picks], self.lengths[picks], self.labels[picks])


class View(Protocol):
    """What a model sees of inputs: [n, m] to be matched, and logits [n, C]."""

    def __call__(self, model: Tensors, inputs: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]: ...


class FeatureView:
    """Inputs are features of the frozen backbone.

    A linear head sees nothing of a class but its mean. So random rectified maps, drawn with every model (`with_maps`),
    stand for the networks that are drawn where inputs are pixels or embeddings [recon]: their means differ wherever two
    distributions do.
    """

    def __call__(self, model: Tensors, inputs: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        logits = inputs @ model["head/weight"].T + model["head/bias"]
        if "map/weight" not in model:
            return inputs, logits
        return torch.cat([inputs, F.relu(inputs @ model["map/weight"].T)], dim=1), logits


class EmbeddingView:
    """Inputs are embeddings [n, L, width], which go through the backbone with the model's adapters in it."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, model: Tensors, inputs: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        features = self.network.features(model, inputs, lengths)
        return features, features @ model["head/weight"].T + model["head/bias"]


# -- models that are drawn ---------------------------------------------------------------------------------------------


def with_maps(model: Tensors, width: int, generator: torch.Generator) -> Tensors:
    """The model with random maps for `FeatureView`; they keep the size of what they map."""
    return {**model, "map/weight": torch.randn(MAPS, width, generator=generator) * (2 / MAPS) ** 0.5}


def in_ball(model: Tensors, names: Sequence[str], radius: float, generator: torch.Generator) -> Tensors:
    """The model with its tensors ``names`` moved, together, to a point drawn uniformly from the ball around them."""
    noise = [torch.randn(model[name].shape, generator=generator) for name in names]
    count = sum(part.numel() for part in noise)
    length = torch.cat([part.flatten() for part in noise]).norm().clamp(min=1e-12)
    scale = radius * torch.rand((), generator=generator) ** (1 / max(1, count)) / length
    return {**model, **{name: model[name] + scale * part for name, part in zip(names, noise, strict=True)}}


def between(model: Tensors, other: Tensors, share: float) -> Tensors:
    """``share * model + (1 - share) * other``, of the tensors that ``other`` has."""
    return {**model, **{name: share * model[name] + (1 - share) * tensor for name, tensor in other.items()}}


# -- the client's half -------------------------------------------------------------------------------------------------


def noise_like(real: Examples, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gaussian inputs of this shape, with the mean and the deviation of the real ones in each dimension."""
    flat = real.inputs
    if flat.dim() == 3:
        flat = flat[torch.arange(flat.shape[1]) < real.lengths[:, None]]
    spread = flat.std(0) if len(flat) > 1 else torch.zeros_like(flat[0])
    return flat.mean(0) + spread * torch.randn(*shape, generator=generator)


def class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[classes, m]: the mean of each label's rows; zero where there are none."""
    sums = values.new_zeros(classes, values.shape[1]).index_add(0, labels, values)
    return sums / torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]


def condense(
    start: Tensor,
    labels: Tensor,
    real: Examples,
    draw: Callable[[], Tensors],
    view: View,
    *,
    steps: int,
    rate: float,
    batch: int,
    generator: torch.Generator,
    extra: Extra | None = None,
) -> Tensor:
    """Move made-up inputs until their classes' mean features and mean logits are those of the real ones.

    Parameters
    ----------
    start, labels
        Where they begin, [S, ...], and the labels they stand for.
    draw
        The model of a step: they are seen by another one every time.
    rate
        Of Adam, as a share of the spread of the start's numbers; it falls to zero.
    batch
        Real examples of each class in a step, at most.
    extra
        Of the made-up inputs' logits.
    """
    made = start.clone().requires_grad_()
    spread = float(start.std()) if start.numel() > 1 else 1.0
    optimizer = torch.optim.Adam([made], lr=rate * (spread or 1.0))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
    classes = 1 + int(labels.max())
    lengths = [made.shape[1] if made.dim() == 3 else 1] * len(made)
    members = [torch.nonzero(real.labels == label).squeeze(1) for label in labels.unique()]
    for _ in range(steps):
        model = draw()
        some = real[torch.cat([own[torch.randperm(len(own), generator=generator)[:batch]] for own in members])]
        with torch.no_grad():
            wanted = [class_means(v, some.labels, classes) for v in view(model, some.inputs, some.lengths.tolist())]
        features, logits = view(model, made, lengths)
        seen = [class_means(values, labels, classes) for values in (features, logits)]
        loss = sum(((a - b).square().sum() for a, b in zip(seen, wanted, strict=True)), torch.zeros(()))
        if extra is not None:
            loss = loss + extra(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return made.detach()


# -- the server's half -------------------------------------------------------------------------------------------------


def fit(
    model: Tensors,
    names: Sequence[str],
    examples: Examples,
    view: View,
    *,
    steps: int,
    rate: float,
    batch: int,
    generator: torch.Generator,
    radius: float | None = None,
    extra: Extra | None = None,
) -> Tensors:
    """The model's tensors ``names`` after so many steps of Adam on the cross-entropy of these examples.

    After each step they are brought back into the ball of ``radius`` around where they began, if there is one.
    """
    began = {name: model[name].detach().clone() for name in names}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in began.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=rate)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(len(examples.labels), generator=generator)
        some, order = examples[order[:batch]], order[batch:]
        _, logits = view({**model, **leaves}, some.inputs, some.lengths.tolist())
        loss = F.cross_entropy(logits, some.labels)
        if extra is not None:
            loss = loss + extra(logits, some.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if radius is not None:
            _project(leaves, began, radius)
    return {name: leaf.detach().clone() for name, leaf in leaves.items()}


def _project(leaves: Tensors, began: Tensors, radius: float) -> None:
    with torch.no_grad():
        moved = {name: leaf - began[name] for name, leaf in leaves.items()}
        length = float(torch.cat([part.flatten() for part in moved.values()]).norm())
        if length > radius:
            for name, leaf in leaves.items():
                leaf.copy_(began[name] + moved[name] * (radius / length))
