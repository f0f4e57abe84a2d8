"""What the two pretrainings share: the loop over steps with its budget and its checkpoints, and where results go."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from folklora.backbones.frozen import has_native_bfloat16

CHECKPOINT = "pretraining.pt"
QUALITY = "quality.json"
SAVE_SECONDS = 60
WARMUP = 0.04
"""Fraction of the budget in which the learning rate rises."""
FLOOR = 0.05
"""What it falls to, as a fraction of its peak."""


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many steps, so many minutes, or whichever is first.

    The learning rate follows the larger of the two fractions used. So a budget of steps alone gives the same weights
    whenever it is run with as many threads on the same machine; one of minutes makes the best of a machine of unknown
    speed.
    """

    steps: int | None
    minutes: float | None

    def used(self, steps: int, seconds: float) -> float:
        """The fraction that is used up; 1: stop."""
        of_steps = steps / self.steps if self.steps else 0.0
        of_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(of_steps, of_time))


def arguments(description: str, to: str) -> argparse.ArgumentParser:
    """The command line that both have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("examples/data"), help="what prepare_data.py wrote")
    parser.add_argument("--to", type=Path, default=Path(to), help="the folder of the checkpoint")
    parser.add_argument("--minutes", type=float, help="stop after so long (default: 50, where --steps is not given)")
    parser.add_argument("--steps", type=int, help="stop after so many; alone, the same weights come out every time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="sums depend on their number, and so do the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def budget_of(chosen: argparse.Namespace) -> Budget:
    return Budget(chosen.steps, 50.0 if chosen.steps is None and chosen.minutes is None else chosen.minutes)


def begin(chosen: argparse.Namespace) -> None:
    """Seed everything; a finished checkpoint is not trained over."""
    if (chosen.to / QUALITY).exists():
        raise SystemExit(f"{chosen.to}: holds a finished checkpoint; remove it, or name another folder with --to")
    chosen.to.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)


def precision(device: torch.device) -> AbstractContextManager[object]:
    """Bfloat16 where the hardware multiplies in it."""
    return torch.autocast(device.type, torch.bfloat16) if has_native_bfloat16(device) else nullcontext()


def pretrain(
    model: nn.Module,
    loss: Callable[[np.random.Generator], torch.Tensor],
    to: Path,
    budget: Budget,
    told: Mapping[str, Any],
    *,
    lr: float,
    weight_decay: float = 0.1,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train with AdamW until the budget is used up, going on from a checkpoint in ``to`` where there is one.

    Parameters
    ----------
    loss
        The loss of one step, which draws its batch from the generator it is given: that of the seed and the step.
    told
        What the weights depend on, ``seed`` among it; a checkpoint of anything else is refused.
    progress
        Called after each step with the number of steps done and the loss.

    Returns
    -------
    dict
        Steps and seconds, of all sittings together; threads and device.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    device = next(model.parameters()).device
    where = {"threads": torch.get_num_threads(), "device": device.type}
    told = {**told, **where, "steps": budget.steps, "minutes": budget.minutes}
    step, before = _restore(to / CHECKPOINT, told, model, optimizer)
    started = saved = shown = time.monotonic()
    model.train()
    while (used := budget.used(step, seconds := before + time.monotonic() - started)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate(used, budget.used(step + 1, seconds))
        with precision(device):
            value = loss(np.random.default_rng([told["seed"], step]))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        now = time.monotonic()
        if now - saved > SAVE_SECONDS:
            _save(to / CHECKPOINT, told, model, optimizer, step, before + now - started)
            saved = now
        if now - shown > 15:
            _tell(f"step {step}, {100 * used:.0f} % of the budget, loss {value.item():.3f}")
            shown = now
        if progress is not None:
            progress(step, value.item())
    seconds = before + time.monotonic() - started
    _save(to / CHECKPOINT, told, model, optimizer, step, seconds)
    model.eval()
    return {"steps": step, "seconds": round(seconds), **where}


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def learning_rate(used: float, after: float) -> float:
    """Up in a straight line, then down along a cosine: the fraction of the peak."""
    if used < WARMUP:
        return max(used, min(after, WARMUP)) / WARMUP
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (used - WARMUP) / (1 - WARMUP)))


def _save(
    path: Path, told: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save({"told": dict(told), **state}, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _restore(
    path: Path, told: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True, map_location=next(model.parameters()).device)
    if state["told"] != dict(told):
        differ = ", ".join(key for key in told if state["told"].get(key) != told[key])
        raise SystemExit(f"{path}: of a pretraining with other {differ}; remove it, or name another folder with --to")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _tell(f"{path}: going on after step {state['step']}")
    return state["step"], state["seconds"]


def finish(to: Path, quality: Mapping[str, Any]) -> None:
    """State the quality beside the weights and on the screen; the checkpoint for resuming is done with."""
    text = json.dumps(quality, indent=1, allow_nan=False) + "\n"
    (to / QUALITY).write_text(text, encoding="utf-8")
    (to / CHECKPOINT).unlink(missing_ok=True)
    print(text, end="")
