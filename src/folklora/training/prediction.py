"""Prediction with each client's own adapter, many clients in one forward pass; features of the frozen backbone; and
what adapted layers see on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.grouped import Offsets
from folklora.adapters.layers import Bank, SiteAdapter
from folklora.adapters.lowrank import LowRank, Tensors
from folklora.backbones.batch import Batch
from folklora.backbones.task import Example, Plug, Task
from folklora.training.stacks import plug, stack


@dataclass(frozen=True)
class Question:
    """Examples to be answered by one client's model.

    ``depth`` is how often a shared block is applied (`folklora.backbones.depth`); None: as often as the backbone does.
    """

    client: str
    rank: int
    tensors: Tensors
    examples: Sequence[Example]
    depth: int | None = None


def features(task: Task, examples: Sequence[Example], tokens: int = 8192, depth: int | None = None) -> np.ndarray:
    """Float32 features [n, width] of the frozen backbone, without any adapter; ``depth`` as in `Question`."""
    found = np.zeros((len(examples), task.width), dtype=np.float32)
    with torch.no_grad(), task.backbone.depth.walking(depth):
        for picks in _chunks([examples], tokens):
            chosen = picks[0][1]
            found[chosen] = task.features(task.lay_out([[examples[i] for i in chosen]])).cpu().numpy()
    return found


Plugged = Callable[[Sequence[Question]], tuple[Tensors, Plug]]
"""Of the clients of one forward pass, one a question: their stacked tensors, and what plugs them in."""


def predict(
    task: Task,
    adapter: LowRank,
    questions: Sequence[Question],
    tokens: int = 8192,
    *,
    dtype: torch.dtype = torch.float32,
    plugged: Plugged | None = None,
) -> dict[str, np.ndarray]:
    """Float32 answers [n, answer_width] to every question, keyed by client.

    Parameters
    ----------
    tokens
        About how many tokens one forward pass takes, over all clients in it.
    dtype
        What the backbone computes in.
    plugged
        By default `stacked`: each pass stacks the tensors of its questions.
    """
    plugged = plugged or partial(stacked, task, adapter)
    answers = {q.client: np.zeros((len(q.examples), task.answer_width), dtype=np.float32) for q in questions}
    # Clients of one depth behind each other: a pass of equals is the fastest.
    asked = sorted((question for question in questions if len(question.examples)), key=lambda q: -(q.depth or 0))
    with torch.no_grad():
        for picks in _chunks([question.examples for question in asked], tokens):
            chosen = [(asked[k], members) for k, members in picks]
            stacks, plug_in = plugged([question for question, _ in chosen])
            groups = [[question.examples[i] for i in members] for question, members in chosen]
            for mixed in (True, False):  # rows shared between clients, unless one of them is not finite
                layout = task.lay_out(groups, mixed=mixed)
                found = task.answers(layout, stacks, plug_in, dtype).cpu().numpy()
                if np.isfinite(found).all():
                    break
            for (question, members), start in zip(chosen, layout.sequence_offsets, strict=False):
                answers[question.client][members] = found[start : start + len(members)]
    return answers


def stacked(task: Task, adapter: LowRank, questions: Sequence[Question]) -> tuple[Tensors, Plug]:
    """The tensors of the questions' clients at their highest rank, and what plugs them in."""
    device = task.backbone.device
    rank = max(question.rank for question in questions)
    stacks = stack([question.tensors for question in questions], rank, device)
    scales = torch.tensor([adapter.scale(question.rank) for question in questions], device=device)
    depth = task.backbone.depth.of([question.depth for question in questions])

    def plugged(batch: Batch) -> Bank:
        return plug(adapter, stacks, scales, batch, device, depth)

    return stacks, plugged


def layer_inputs(
    task: Task,
    adapter: LowRank,
    tensors: Tensors,
    examples: Sequence[Example],
    tokens: int = 8192,
    depth: int | None = None,
) -> Tensors:
    """``input/<site>`` [d_in] float32: the mean, over all tokens of the examples, of what each adapted layer sees.

    Zeros where there are no examples.

    Parameters
    ----------
    tensors
        The client's model.
    tokens
        About how many tokens one forward pass takes.
    depth
        As in `Question`.
    """
    device = task.backbone.device
    rank = adapter.rank(tensors)
    stacks = stack([tensors], rank, device)
    scales = torch.tensor([adapter.scale(rank)], device=device)
    totals = {site.name: torch.zeros(site.d_in + 1, dtype=torch.float64) for site in adapter.sites}

    def plugged(batch: Batch) -> Bank:
        bank = plug(adapter, stacks, scales, batch, device, task.backbone.depth.of([depth]))
        real = (batch.segments.reshape(-1) >= 0).to(device)
        bank.sites = {name: _Listening(site, real, totals[name]) for name, site in bank.sites.items()}
        return bank

    with torch.no_grad():
        for picks in _chunks([examples], tokens):
            task.answers(task.lay_out([[examples[i] for i in picks[0][1]]]), stacks, plugged)
    return {f"input/{name}": (total[:-1] / total[-1].clamp_min(1)).float() for name, total in totals.items()}


class _Listening(SiteAdapter):
    """An adapter that adds up what it is given, tokens that pad a row left out."""

    def __init__(self, inner: SiteAdapter, real: Tensor, total: Tensor) -> None:
        self.inner, self.real, self.total = inner, real, total

    def delta(self, x: Tensor, offsets: Offsets, mask: Tensor | None) -> Tensor:
        seen = x[self.real].double().sum(0).cpu()
        self.total += torch.cat([seen, torch.tensor([int(self.real.sum())], dtype=torch.float64)])
        return self.inner.delta(x, offsets, mask)

    def narrowed(self, tokens: Tensor, live: Tensor) -> SiteAdapter:
        return _Listening(self.inner.narrowed(tokens, live), self.real[tokens] & live, self.total)


def _chunks(groups: Sequence[Sequence[Example]], tokens: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Cut groups of examples into forward passes of about ``tokens`` tokens: lists of (group, members).

    Within a group, examples go from long to short, so that those of a pass are of like length.
    """
    current: list[tuple[int, list[int]]] = []
    filled = 0
    for k, group in enumerate(groups):
        members: list[int] = []
        for i in sorted(range(len(group)), key=lambda i: -len(group[i])):
            if filled and filled + len(group[i]) > tokens:
                if members:
                    current.append((k, members))
                yield current
                current, members, filled = [], [], 0
            members.append(i)
            filled += len(group[i])
        if members:
            current.append((k, members))
    if current:
        yield current
