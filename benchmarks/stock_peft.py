"""Stock PEFT as its users write it, one client after another: what the benchmarks compare the cohort trainer with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from folklora.adapters.lowrank import Tensors
from folklora.backbones.batch import TokenIds
from folklora.backbones.frozen import DEFAULT_TARGETS
from folklora.backbones.loading import find
from folklora.sections import TrainSection
from folklora.training.jobs import Job, Slot

CLASSES, RANK, ALPHA = 77, 8, 16.0
Losses = dict[str, float]


class OneByOne:
    """Stock PEFT, a client after another, as its users write it."""

    def __init__(self, device: torch.device, tuned: bool, seed: int = 0) -> None:
        dtype = torch.bfloat16 if tuned else torch.float32
        attention = "eager" if tuned else "sdpa"
        model = AutoModel.from_pretrained(find("minilm"), attn_implementation=attention, dtype=dtype)
        model.pooler = None  # nobody reads it; leaving it in would cost the rivals time
        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=DEFAULT_TARGETS["bert"])
        self.model = get_peft_model(model, config).to(device).eval()  # adapters are float32 whatever the model is
        self.head = nn.Linear(model.config.hidden_size, CLASSES).to(device)
        self.device, self.tuned, self.seed = device, tuned, seed

    def parameters(self) -> Tensors:
        """What is trained, by our names for it; the model's own tensors, not copies."""
        named = {}
        for name, own in self.model.named_parameters():
            if own.requires_grad:
                path = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                site, _, factor = path.rpartition(".")
                named[f"{factor.removeprefix('lora_')}/{site}"] = own
        return {**named, "head/weight": self.head.weight, "head/bias": self.head.bias}

    def load(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, own in self.parameters().items():
                own.copy_(tensors[name])

    def fit(self, jobs: Sequence[Job], train: TrainSection) -> Losses:
        return {job.client: self.fit_one(job, train) for job in jobs}

    def fit_one(self, job: Job, train: TrainSection) -> float:
        self.load(job.tensors)
        trained = list(self.parameters().values())
        optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=train.weight_decay, fused=self.tuned)
        losses = []
        for picks in Slot(job, train, self.seed).batches:
            loss = self.loss([job.examples[i] for i in picks], torch.from_numpy(job.labels[picks]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, train.clip or 1.0)
            optimizer.step()
            losses.append((loss.item(), len(picks)))
        return statistics.fmean(*zip(*losses, strict=True))  # an example counts one, whatever its minibatch

    def loss(self, examples: Sequence[TokenIds], labels: Tensor) -> Tensor:
        length = max(map(len, examples))
        tokens, mask = (torch.zeros(len(examples), length, dtype=torch.long) for _ in range(2))
        for row, example in enumerate(examples):
            tokens[row, : len(example)] = torch.tensor(example)
            mask[row, : len(example)] = 1
        tokens, mask, labels = tokens.to(self.device), mask.to(self.device), labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.tuned else nullcontext():
            hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        features = (hidden.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return F.cross_entropy(self.head(features), labels)
