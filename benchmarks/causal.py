"""Many clients of one causal language model: the cohort trainer against stock PEFT one client after another.

    python benchmarks/causal.py [--device cuda] [--size 1B] [--clients 1,2,4,...,128] [--batch 1,8] [--lengths 64,512]

The model is a Llama with random weights (speed does not depend on them) and LoRA r = 8 on query and value; every
example has as many tokens as its cell says, half of them response. *ours* is `CohortTrainer` with K clients side by
side; *peft* is stock PEFT with SDPA attention and fused AdamW, the backbone in the same compute type, a client at a
time. Arms alternate in one process (ours, peft, ours, peft, ...) and a ratio is that of two neighbours. Work is counted
as 2 x 2 x (numbers in the decoder's linear layers) x tokens, plus the language-model head on response tokens; attention
and adapters are not counted. The peak is what ``F.linear`` reaches in that type on the same machine just before.
Every cell is kept as soon as it is measured, in ``results/causal-DEVICE-SIZE.json``; started again, it goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, environment, spread, store
from cohort import peak
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from folklora.adapters.lowrank import LowRank, Tensors, kaiming
from folklora.backbones.causal import CausalBackbone, CausalLM, Dialogue
from folklora.sections import TrainSection
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job, Slot

SEED, RANK, ALPHA = 0, 8, 16.0
TARGETS = r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
SIZES: dict[str, dict[str, int]] = {
    "5M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
WANTED = {"times_faster": 8.0, "fraction_of_peak": 0.5}  # on a GPU: at batch 1 x 128 tokens; at the best K

Cell = tuple[int, int, int]
"""Length, batch, clients."""


def vocabulary_of(size: str) -> int:
    return 4096 if size == "5M" else 32000


def model(size: str, vocabulary: int, positions: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(**SIZES[size], vocab_size=vocabulary, max_position_embeddings=positions, use_cache=False)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")


def make_jobs(adapter: LowRank, clients: int, steps: int, batch: int, length: int, vocabulary: int) -> list[Job]:
    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    jobs = []
    for client in range(clients):
        tensors = {
            name: kaiming(shape, generator) if name.startswith("A/") else 0.02 * torch.randn(shape, generator=generator)
            for name, shape in adapter.shapes(RANK).items()
        }
        examples = [Dialogue(rng.integers(vocabulary, size=length).tolist(), length // 2) for _ in range(steps * batch)]
        labels = np.zeros(len(examples), dtype=np.int64)
        jobs.append(Job(str(client), 1, RANK, tensors, frozenset(tensors), examples, labels))
    return jobs


class Ours:
    def __init__(self, task: CausalLM, adapter: LowRank) -> None:
        self.task, self.adapter = task, adapter

    def fit(self, jobs: Sequence[Job], batch: int) -> dict[str, float]:
        train = TrainSection(batch_size=batch, cohort=len(jobs))
        trainer = CohortTrainer(self.task, self.adapter, train, SEED)
        return {fitted.client: fitted.loss for fitted in trainer.fit(jobs)}


class Stock:
    """Stock PEFT, one client after another."""

    def __init__(self, base: LlamaForCausalLM, device: torch.device, dtype: torch.dtype) -> None:
        sites = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "self_attn" in name]
        wanted = [name for name in sites if name.endswith(("q_proj", "v_proj"))]
        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=wanted)
        self.model = get_peft_model(base.to(device, dtype), config).eval()
        self.device, self.dtype = device, dtype

    def parameters(self) -> Tensors:
        named = {}
        for name, own in self.model.named_parameters():
            if own.requires_grad:
                site, _, factor = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".")
                named[f"{factor.removeprefix('lora_')}/{site}"] = own
        return named

    def fit(self, jobs: Sequence[Job], batch: int) -> dict[str, float]:
        return {job.client: self.fit_one(job, batch) for job in jobs}

    def fit_one(self, job: Job, batch: int) -> float:
        named = self.parameters()
        with torch.no_grad():
            for name, own in named.items():
                own.copy_(job.tensors[name])
        optimizer = torch.optim.AdamW(named.values(), lr=TrainSection().lr, weight_decay=0.0, fused=True)
        losses = []
        for picks in Slot(job, TrainSection(batch_size=batch), SEED).batches:
            tokens = torch.tensor([job.examples[i].tokens for i in picks], device=self.device)
            targets = tokens.clone()
            targets[:, : len(job.examples[0].tokens) // 2] = -100
            loss = self.model(input_ids=tokens, labels=targets).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(named.values()), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return statistics.fmean(losses)


def timed(fit: Any, jobs: Sequence[Job], batch: int, device: torch.device) -> tuple[float, dict[str, float]]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    losses = fit(jobs, batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, losses


def measure(ours: Ours, stock: Stock, cell: Cell, arguments: argparse.Namespace, work: float) -> dict[str, Any]:
    """One cell; ``work``: billions of operations of one client's step."""
    length, batch, clients = cell
    device, dtype = stock.device, stock.dtype
    jobs = make_jobs(ours.adapter, clients, arguments.steps, batch, length, vocabulary_of(arguments.size))
    for fit in (ours.fit, stock.fit):
        timed(fit, jobs[: max(1, clients // 4)], batch, device)  # warm
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    top, found = [], {}
    for _ in range(arguments.repeats):
        top.append(peak(dtype, device, 0.2))
        for name, fit in (("ours", ours.fit), ("peft", stock.fit)):
            took, found[name] = timed(fit, jobs, batch, device)
            seconds[name].append(took)
    turns = clients * arguments.steps
    return {
        "length": length,
        "batch": batch,
        "clients": clients,
        "ms_per_client_step": {n: spread([1e3 * s / turns for s in own]) for n, own in seconds.items()},
        "times_faster": spread([b / a for a, b in zip(seconds["ours"], seconds["peft"], strict=True)]),
        "fraction_of_peak": spread([work * turns / s / best for s, best in zip(seconds["ours"], top, strict=True)]),
        "mean_loss": {name: round(statistics.fmean(own.values()), 4) for name, own in found.items()},
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="5M", choices=SIZES)
    parser.add_argument("--clients", type=numbers, default="1,2,4,8,16")
    parser.add_argument("--batch", type=numbers, default="1,8")
    parser.add_argument("--lengths", type=numbers, default="64,128")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, vocabulary, positions = (
        torch.device(arguments.device),
        vocabulary_of(arguments.size),
        max(arguments.lengths),
    )
    backbone = CausalBackbone(model(arguments.size, vocabulary, positions), tokenizer(), targets=TARGETS, device=device)
    adapter = LowRank(backbone.sites, core=False, alpha=ALPHA)
    ours = Ours(CausalLM(backbone, max_length=positions), adapter)
    stock = Stock(model(arguments.size, vocabulary, positions), device, backbone.dtype)
    linear = sum(m.weight.numel() for n, m in stock.model.named_modules() if type(m) is nn.Linear and "lora" not in n)
    head = vocabulary * SIZES[arguments.size]["hidden_size"]
    document: dict[str, Any] = {
        "environment": environment(device, backbone.dtype),
        "size": arguments.size,
        "parameters": backbone.parameters,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "wanted_on_a_gpu": WANTED,
    }
    name = f"causal-{device.type}-{arguments.size}"
    cells = finished(arguments.results / f"{name}.json", document)
    done = {(cell["length"], cell["batch"], cell["clients"]) for cell in cells}
    for cell in product(arguments.lengths, arguments.batch, arguments.clients):
        if cell in done:
            continue
        length, batch, _ = cell
        work = 4e-9 * batch * ((linear - head) * length + head * (length - length // 2))
        cells.append(measure(ours, stock, cell, arguments, work))
        print(cells[-1], file=sys.stderr, flush=True)
        store(name, {**document, "cells": cells}, arguments.results)  # whoever lends a device may take it back
        gc.collect()


def finished(file: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that were measured before, of the same model on the same machine with the same versions."""
    if not file.exists():
        return []
    before = json.loads(file.read_text(encoding="utf-8"))
    cells: list[dict[str, Any]] = before.pop("cells")
    return cells if before == document else []


if __name__ == "__main__":
    main()
