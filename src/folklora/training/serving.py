"""Many clients' models ready to be asked: the backbone once, all adapters stacked on it.

Whatever does not depend on what is asked is done when a model comes in: a core is folded into A, the scale into B, and
both are in the precision that is computed in. A pass over some clients then takes their rows of the stacks.

A pass of one client alone is faster without an adapter beside each layer (by a tenth or a fifth for a single text,
hardly for hundreds; docs/serving.md): it runs on copies of the weights that are adapted, with the adapter added in.
They are made when a client is first asked alone, where those of all clients together would be no more than `MERGED`
bytes. Passes of several clients are stacked: with a pass for each, a batch would be as many small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import LowRank, Tensors, kind
from folklora.adapters.mixture import Mixture
from folklora.backbones.batch import Batch
from folklora.backbones.causal import CausalLM
from folklora.backbones.task import Example, Plug, Task
from folklora.training.generation import GREEDY, Sampling, generate
from folklora.training.prediction import Question, predict
from folklora.training.stacks import plug, stack

TOKENS = 4096
"""Of one forward pass, about."""

MERGED = 2**29
"""Bytes of merged weights, of all clients together."""

Asked = tuple[str, Any]
"""A client, and an example as its task encodes it or a prompt's tokens."""


@dataclass(frozen=True)
class Model:
    """What one client's requests are answered with; ``depth`` as in `folklora.training.prediction.Question`."""

    rank: int
    tensors: Tensors
    depth: int | None = None


class Pool:
    """Models of many clients on one backbone.

    Parameters
    ----------
    models
        Client -> its model; all with tensors of the same names, ranks may differ.
    dtype
        What the backbone and the adapters compute in; heads, and what is answered, are float32.
    most
        Bytes of merged weights, of all clients together; 0: nothing is merged.

    Attributes
    ----------
    clients
        Their place in the stacks.
    merges
        Whether passes of one client alone run on merged weights.
    """

    def __init__(
        self,
        task: Task,
        adapter: LowRank,
        models: Mapping[str, Model],
        *,
        dtype: torch.dtype = torch.float32,
        most: int = MERGED,
    ) -> None:
        self.task = task
        self.dtype = dtype
        self.models = dict(models)
        self.clients = {client: place for place, client in enumerate(self.models)}
        self.given = adapter
        folds = not isinstance(adapter, Mixture)
        self.adapter = replace(adapter, core=False) if folds else adapter
        adapted = sum(site.d_in * site.d_out for site in adapter.sites)
        needed = len(self.models) * adapted * torch.finfo(dtype).bits // 8
        self.merges = folds and task.backbone.in_floats and needed <= most
        self._merged: dict[str, Tensors] = {}
        device = task.backbone.device
        tensors = [folded(adapter, model) if folds else model.tensors for model in self.models.values()]
        rank = max((model.rank for model in self.models.values()), default=1)
        stacks = stack(tensors, rank, device) if tensors else {}
        self.stacks = {name: self._cast(name, tensor) for name, tensor in stacks.items()}
        scales = [1.0 if folds else adapter.scale(model.rank) for model in self.models.values()]
        self.scales = torch.tensor(scales, device=device, dtype=dtype if folds else torch.float32)
        self._last: tuple[list[int], Tensors, Tensor] | None = None

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(self.task.backbone.device, self.dtype) if kind(name) in ("A", "B", "base") else tensor

    # -- what is asked ------------------------------------------------------------------------------------------------

    def answers(self, asked: Sequence[Asked], *, task: Task | None = None, tokens: int = TOKENS) -> np.ndarray:
        """Float32 answers [n, answer_width], in the order of what was asked.

        Parameters
        ----------
        task
            Another one on the same backbone, whose examples these are.
        tokens
            About how many tokens one forward pass takes, over all clients in it.
        """
        task = task or self.task
        found = np.zeros((len(asked), task.answer_width), dtype=np.float32)
        for part in self._parts(asked, tokens):
            questions, places = self._questions(asked, part)
            said = predict(task, self.adapter, questions, tokens, dtype=self.dtype, plugged=self)
            for client, own in places.items():
                found[own] = said[client]
        return found

    def continuations(
        self, asked: Sequence[Asked], max_new_tokens: int, *, sampling: Sampling = GREEDY
    ) -> list[list[int] | None]:
        """What the models go on with, as token ids, in the order of the prompts; see `generate`."""
        assert isinstance(self.task, CausalLM)
        questions, places = self._questions(asked, range(len(asked)))
        said = generate(
            self.task, self.adapter, questions, max_new_tokens, sampling=sampling, dtype=self.dtype, plugged=self
        )
        found: list[list[int] | None] = [None for _ in asked]
        for client, own in places.items():
            for place, ids in zip(own, said[client], strict=True):
                found[place] = ids
        return found

    def _parts(self, asked: Sequence[Asked], tokens: int) -> Iterator[Sequence[int]]:
        """Requests that are answered together: all where rows are packed; else long with long, for little padding."""
        if getattr(self.task.backbone, "packable", True):
            yield range(len(asked))
            return
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][1]))
        while order:
            most = max(1, tokens // len(asked[order[0]][1]))
            yield order[:most]
            order = order[most:]

    def _questions(self, asked: Sequence[Asked], part: Sequence[int]) -> tuple[list[Question], dict[str, list[int]]]:
        """A question for each client, in the order of the stacks, and which requests its examples are."""
        places: dict[str, list[int]] = {}
        for i in part:
            places.setdefault(asked[i][0], []).append(i)
        questions = []
        for client in sorted(places, key=self.clients.__getitem__):
            model = self.models[client]
            examples: list[Example] = [asked[i][1] for i in places[client]]
            questions.append(Question(client, model.rank, model.tensors, examples, model.depth))
        return questions, places

    # -- what is plugged in -------------------------------------------------------------------------------------------

    def __call__(self, questions: Sequence[Question]) -> tuple[Tensors, Plug]:
        """As `folklora.training.prediction.stacked`, out of the stacks."""
        rows = [self.clients[question.client] for question in questions]
        if self._last is None or self._last[0] != rows:
            stacks = {name: _rows(tensor, rows) for name, tensor in self.stacks.items()}
            self._last = rows, stacks, _rows(self.scales, rows)
        _, stacks, scales = self._last
        device = self.task.backbone.device
        depth = self.task.backbone.depth.of([question.depth for question in questions])
        weights = self._weights(questions[0].client) if self.merges and len(questions) == 1 else {}
        if weights:
            stacks = {name: tensor for name, tensor in stacks.items() if kind(name) not in ("A", "B", "base")}

        def plugged(batch: Batch) -> Bank:
            bank = plug(self.adapter, stacks, scales, batch, device, depth)
            bank.weights = weights
            return bank

        return stacks, plugged

    def _weights(self, client: str) -> Tensors:
        """Of each adapted layer, with the client's update in it."""
        if client not in self._merged:
            found = merged(self.task, self.given, self.models[client])
            self._merged[client] = {
                site: weight.to(self.task.backbone.device, self.dtype) for site, weight in found.items()
            }
        return self._merged[client]


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Of a stack; a view where they are neighbours."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor[torch.tensor(rows, device=tensor.device)]


def folded(adapter: LowRank, model: Model) -> Tensors:
    """The model's tensors as plain LoRA's with a scale of one: ``C A`` for A and ``s B`` for B."""
    found = {name: tensor for name, tensor in model.tensors.items() if kind(name) not in ("C", "gain")}
    for site in (site.name for site in adapter.sites if f"A/{site.name}" in found):
        a, b = f"A/{site}", f"B/{site}"
        if adapter.core:
            found[a] = (adapter.core_of(model.tensors, site) @ found[a].double()).float()
        found[b] = adapter.scale(model.rank) * found[b]
    return found


def merged(task: Task, adapter: LowRank, model: Model) -> Tensors:
    """Site -> the frozen weight with a client's update in it, [d_out, d_in] float32."""
    own = folded(adapter, model)
    found = {}
    for site in (site.name for site in adapter.sites if f"A/{site.name}" in own):
        weight = task.backbone.weight(site) + own[f"B/{site}"] @ own[f"A/{site}"]
        base = own.get(f"base/{site}")
        found[site] = weight if base is None else weight + base
    return found
