"""Stock PEFT serving many clients' classifiers, as its users write it: what `serving.py` compares ours with.

- *switch*: requests are grouped by client, and `set_adapter` is called where the next group is another's;
- *mixed*: one batch of all, with a name a row (`adapter_names`);
- *merged*: a model of its own for each client (`merge_and_unload`), of which only the embeddings are shared.

*Stock* is float32 with the default attention and one padded batch for all that is asked together. *Tuned* is what a
careful user would change: everything in bfloat16, eager attention (in bfloat16 the fast one on CPU), requests sorted by
length and at most 32 in a batch, so that little is padding. Heads are float32 and each client's own, everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel

from folklora.adapters.lowrank import Tensors
from folklora.backbones.batch import TokenIds
from folklora.backbones.loading import find

AT_ONCE = 32
"""Requests of a batch, where they are sorted by length."""

Asked = Sequence[tuple[str, TokenIds]]


def bare(tuned: bool) -> Any:
    dtype = torch.bfloat16 if tuned else torch.float32
    attention = "eager" if tuned else "sdpa"
    model = AutoModel.from_pretrained(find("minilm"), attn_implementation=attention, dtype=dtype)
    model.pooler = None  # nobody reads it; leaving it in would cost the rivals time
    return model.eval()


class Adapters:
    """One base model with everybody's adapter in it: *switch* and *mixed*."""

    def __init__(self, folders: Mapping[str, Path], heads: Mapping[str, Tensors], *, tuned: bool) -> None:
        self.tuned, self.heads = tuned, heads
        first, *others = folders
        self.model = PeftModel.from_pretrained(bare(tuned), str(folders[first]), adapter_name=first)
        for name in others:
            self.model.load_adapter(str(folders[name]), adapter_name=name)
        self.model.eval().requires_grad_(False)
        if tuned:
            self.model.to(torch.bfloat16)
        self.active = first
        self.weight = torch.stack([heads[name]["head/weight"] for name in folders])
        self.bias = torch.stack([heads[name]["head/bias"] for name in folders])
        self.places = {name: place for place, name in enumerate(folders)}

    @torch.no_grad()
    def switch(self, asked: Asked) -> np.ndarray:
        answers = np.zeros((len(asked), self.bias.shape[1]), dtype=np.float32)
        for client, places in by_client(asked).items():
            if client != self.active:
                self.model.set_adapter(client)
                self.active = client
            for part in parts(asked, places, self.tuned):
                features = pooled(self.model, [asked[i][1] for i in part])
                head = self.heads[client]
                answers[part] = (features @ head["head/weight"].T + head["head/bias"]).numpy()
        return answers

    @torch.no_grad()
    def mixed(self, asked: Asked) -> np.ndarray:
        answers = np.zeros((len(asked), self.bias.shape[1]), dtype=np.float32)
        for part in parts(asked, range(len(asked)), self.tuned):
            names = [asked[i][0] for i in part]
            features = pooled(self.model, [asked[i][1] for i in part], adapter_names=names)
            owners = torch.tensor([self.places[name] for name in names])
            logits = torch.bmm(self.weight[owners], features[:, :, None])[:, :, 0] + self.bias[owners]
            answers[part] = logits.numpy()
        return answers


class Copies:
    """A merged model a client."""

    def __init__(self, folders: Mapping[str, Path], heads: Mapping[str, Tensors], *, tuned: bool) -> None:
        self.tuned, self.heads = tuned, heads
        base = bare(tuned)
        self.models = {}
        for name, folder in folders.items():
            own = copy.deepcopy(base, {id(base.embeddings): base.embeddings})
            self.models[name] = PeftModel.from_pretrained(own, str(folder)).merge_and_unload().eval()

    @torch.no_grad()
    def merged(self, asked: Asked) -> np.ndarray:
        answers = np.zeros((len(asked), len(self.heads[asked[0][0]]["head/bias"])), dtype=np.float32)
        for client, places in by_client(asked).items():
            for part in parts(asked, places, self.tuned):
                features = pooled(self.models[client], [asked[i][1] for i in part])
                head = self.heads[client]
                answers[part] = (features @ head["head/weight"].T + head["head/bias"]).numpy()
        return answers


def by_client(asked: Asked) -> dict[str, list[int]]:
    """Client -> which requests are its own."""
    found: dict[str, list[int]] = {}
    for i, (client, _) in enumerate(asked):
        found.setdefault(client, []).append(i)
    return found


def parts(asked: Asked, places: Sequence[int], tuned: bool) -> list[list[int]]:
    """Which requests share a batch."""
    if not tuned:
        return [list(places)]
    order = sorted(places, key=lambda i: len(asked[i][1]))
    return [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)]


def pooled(model: Any, examples: Sequence[TokenIds], **options: Any) -> Tensor:
    """The mean of each text's last states, [n, d] float32."""
    length = max(map(len, examples))
    tokens, mask = (torch.zeros(len(examples), length, dtype=torch.long) for _ in range(2))
    for row, example in enumerate(examples):
        tokens[row, : len(example)] = torch.tensor(example)
        mask[row, : len(example)] = 1
    hidden = model(input_ids=tokens, attention_mask=mask, **options).last_hidden_state
    return (hidden.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
