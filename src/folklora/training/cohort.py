"""The cohort trainer: one forward and one backward pass of the frozen backbone serve K clients.

Each client sits in a *slot*: one row of a [K, P] matrix of trained numbers. The loss is the sum of the clients' mean
losses, so gradients do not mix; clipping, optimiser moments, step counts, learning rates and dropout are per row. When
a client has done its local epochs the next one takes its slot, like continuous batching; when nobody waits, the slot
closes. The result is what training each client alone gives, whatever K is; K = 1 is the path of a network member.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import LowRank, Tensors
from folklora.backbones.batch import Batch
from folklora.backbones.task import Task
from folklora.methods.work import Terms, rate_of
from folklora.privacy.example import sampling
from folklora.sections import TrainSection
from folklora.training.dropout import Dropout
from folklora.training.jobs import Fitted, Job, Slot
from folklora.training.optimizer import build, clip_rows
from folklora.training.prefetch import Prefetch
from folklora.training.private import NUMBERS, Part, Private, add_clipped, lay_out_apart
from folklora.training.rows import Rows
from folklora.training.stacks import Plugging, from_stack, plug, stack, to_stack
from folklora.training.terms import TermRows

# A leaf is a column range of the cohort's one matrix, so its rows are not adjacent in memory; torch mentions that once.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


class CohortTrainer:
    """Trains the adapters of many clients through one backbone; see the module's text.

    Raises
    ------
    BackboneError
        When it is made: ``train.packed`` asks for a layout that the backbone cannot have, or a minibatch is too small
        for the task.
    """

    def __init__(self, task: Task, adapter: LowRank, train: TrainSection, seed: int) -> None:
        task.refuse_layout(train.packed, train.batch_size)
        self.task = task
        self.backbone = task.backbone
        self.adapter = adapter
        self.train = train
        self.seed = seed

    def slots_for(self, jobs: Sequence[Job]) -> int:
        """K: how many clients to train side by side, by the recipe or by tokens a step."""
        if self.train.cohort != "auto":
            return min(self.train.cohort, len(jobs))
        sample = [len(example) for job in jobs[:64] for example in job.examples[:64]]
        tokens = self.train.batch_size * (sum(sample) / max(1, len(sample)))
        return max(1, min(len(jobs), round(self.train.tokens / tokens)))

    def fit(self, jobs: Sequence[Job]) -> Iterator[Fitted]:
        """Train all jobs; each is given back as soon as it is done, in no particular order.

        All jobs must train the same kinds of tensors, all privately or none; their ranks, sizes and values may differ.
        """
        if not jobs:
            return
        assert all(job.trained == jobs[0].trained for job in jobs), "all jobs must train the same tensors"
        assert len({job.private is None for job in jobs}) == 1, "all jobs must be private, or none"
        # Long jobs first: the last slots to close are then short ones, and few steps run with a cohort half empty.
        waiting = sorted(jobs, key=lambda job: -len(job.examples))
        rank = max(job.rank for job in jobs)
        count = self.slots_for(waiting)
        live = _Cohort(self, waiting[:count], rank, [job.terms for job in waiting])
        queue = iter(waiting[count:])
        with live.prefetch:
            while live.slots:
                live.step()
                for k in reversed([k for k, slot in enumerate(live.slots) if slot.finished]):
                    yield live.take(k)
                    following = next(queue, None)
                    if following is None:
                        live.close(k)
                    else:
                        live.seat(k, following)


class _Cohort:
    """The slots that are training right now."""

    def __init__(self, trainer: CohortTrainer, jobs: Sequence[Job], rank: int, terms: Sequence[Terms]) -> None:
        self.trainer = trainer
        self.device = trainer.backbone.device
        self.rank = rank
        self.slots = [Slot(job, trainer.train, trainer.seed) for job in jobs]
        self.prefetch = Prefetch(self.device)
        stacks = stack([job.tensors for job in jobs], rank, self.device)
        self.trained = sorted(jobs[0].trained)
        self.shapes = {name: stacks[name].shape[1:] for name in self.trained}
        flat = [stacks.pop(name).flatten(1) for name in self.trained]
        self.frozen = stacks
        self.rows = Rows(torch.cat(flat, dim=1), self.shapes)
        widths = [shape.numel() for shape in self.shapes.values()]
        rates = [rate_of(name, trainer.train.head_rate) for name in self.trained]
        self.optimizer = build(trainer.train, len(jobs), widths, self.device, rates)
        self.scales = torch.tensor([trainer.adapter.scale(job.rank) for job in jobs], device=self.device)
        self.terms = TermRows(terms, len(jobs), sum(widths), self.device)
        self.private = jobs[0].private is not None
        for k, job in enumerate(jobs):
            self.terms.seat(k, job.terms, self._fill)
            self._restore_moments(k, job)

    def step(self) -> None:
        """One minibatch of every slot: forward, backward, clip, move."""
        train = self.trainer.train
        chosen = [slot.batches[slot.done] for slot in self.slots]
        layout = self.prefetch.now(partial(self._lay_out, chosen))
        if all(slot.done + 1 < len(slot.batches) for slot in self.slots):  # else others may be in the slots then
            self.prefetch.ahead(partial(self._lay_out, [slot.batches[slot.done + 1] for slot in self.slots]))
        losses = self._gradients(chosen, layout)
        rates = [slot.learning_rate(train) for slot in self.slots]
        values, grads = self.rows.values, self.rows.grads
        with torch.no_grad():
            if self.private:
                self._disturb(grads)
            self.terms.before_clipping(values, grads)
            if train.clip is not None and not self.private:
                clip_rows(grads, train.clip)
            self.terms.before_moving(values, grads)
            self.optimizer.step(values, grads, torch.tensor(rates, device=self.device))
            self.terms.after_moving(values)
        for slot, picks, rate, loss in zip(self.slots, chosen, rates, losses.tolist(), strict=True):
            slot.done += 1
            slot.travelled += rate
            slot.loss += loss * len(picks)
            slot.seen += len(picks)

    def _lay_out(self, chosen: Sequence[np.ndarray], *, mixed: bool = True) -> Any:
        if self.private:
            owned = [(slot.job.examples, slot.job.labels) for slot in self.slots]
            most = max(1, NUMBERS // sum(t[0].numel() for t in (*self.frozen.values(), *self.rows.leaves.values())))
            return lay_out_apart(self.trainer.task, owned, chosen, most, self.trainer.train.packed, mixed=mixed)
        groups = [[slot.job.examples[i] for i in picks] for slot, picks in zip(self.slots, chosen, strict=True)]
        return self.trainer.task.lay_out(groups, self.trainer.train.packed, mixed=mixed)

    def _gradients(self, chosen: Sequence[np.ndarray], layout: Any) -> Tensor:
        """Each slot's loss on its minibatch, [K], and its gradient in ``rows.grads``.

        Where a client is not finite any more, the step is done again with no row shared between clients, so that it
        harms nobody else (see `folklora.backbones.batch.pack`).
        """
        states = [slot.dropout.get_state() for slot in self.slots] if self.trainer.adapter.dropout else []
        losses = self._backward(chosen, layout)
        if bool(torch.isfinite(losses).all() and torch.isfinite(self.rows.grads).all()):
            return losses
        for slot, state in zip(self.slots, states, strict=bool(states)):
            slot.dropout.set_state(state)
        return self._backward(chosen, self._lay_out(chosen, mixed=False))

    def _backward(self, chosen: Sequence[np.ndarray], layout: Any) -> Tensor:
        if self.private:
            return self._backward_apart(layout)
        labels = torch.from_numpy(np.concatenate([s.job.labels[p] for s, p in zip(self.slots, chosen, strict=True)]))
        stacks = {**self.frozen, **self.rows.leaves}
        dropout, depth = ([getattr(slot, name) for slot in self.slots] for name in ("dropout", "depth"))
        losses, penalised = self._losses(layout, labels, stacks, self.scales, dropout, depth)
        self.rows.grads.zero_()
        penalised.sum().backward()
        return losses.detach()

    def _backward_apart(self, parts: Sequence[Part]) -> Tensor:
        """As `_backward`, for sums of gradients that are clipped one by one."""
        self.rows.grads.zero_()
        losses: list[list[float]] = [[] for _ in self.slots]
        privacy, masked = self._privacy(), bool(self.trainer.adapter.dropout)
        for part in parts:
            owners = part.owners.to(self.device)
            rows = Rows(self.rows.values.detach()[owners], self.shapes)
            stacks = {**{name: tensor[owners] for name, tensor in self.frozen.items()}, **rows.leaves}
            depth = [self.slots[k].depth for k in part.owners.tolist()]
            places = zip(part.owners.tolist(), part.picks, strict=True)
            # Masks come from nothing but the example and the step, whichever part it is in.
            dropout = [privacy[k].generator(f"dropout/{self.slots[k].done}/{pick}") for k, pick in places if masked]
            found, penalised = self._losses(part.layout, part.labels, stacks, self.scales[owners], dropout, depth)
            penalised.sum().backward()
            if self.terms.masks is not None:
                rows.grads.mul_(self.terms.masks[owners])
            add_clipped(self.rows.grads, rows.grads, part, [private.clip for private in privacy])
            for k, loss in zip(part.owners.tolist(), found.tolist(), strict=True):
                losses[k].append(loss)
        return torch.tensor([sum(own) / max(1, len(own)) for own in losses])

    def _losses(
        self,
        layout: Any,
        labels: Tensor,
        stacks: Tensors,
        scales: Tensor,
        dropout: Sequence[torch.Generator],
        depth: Sequence[int | None],
    ) -> tuple[Tensor, Tensor]:
        """Of each client of a layout: the data's loss, and what is minimised, which an adapter may add to.

        ``dropout`` is where the masks of each come from, ``depth`` how often a shared block is applied to its tokens.
        """
        task, adapter = self.trainer.task, self.trainer.adapter

        def made(batch: Batch) -> Bank:
            bank = plug(adapter, stacks, scales, batch, self.device, task.backbone.depth.of(depth))
            if adapter.dropout:
                bank.dropout = Dropout(adapter.dropout, batch, dropout, bank)
            return bank

        plugged = Plugging(made)
        losses = task.losses(layout, labels, stacks, plugged)
        return losses, plugged.penalised(losses)

    def _disturb(self, sums: Tensor) -> None:
        """From sums of clipped gradients to what takes the gradient's place."""
        for k, (slot, private) in enumerate(zip(self.slots, self._privacy(), strict=True)):
            job, noise = slot.job, torch.zeros(sums.shape[1])
            self._fill(noise, private.draw({name: job.tensors[name].shape for name in self.trained}, slot.noise))
            n = len(job.examples)
            sums[k].add_(noise.to(sums.device)).div_(n * sampling(n, self.trainer.train))

    def _privacy(self) -> list[Private]:
        return [slot.job.private for slot in self.slots if slot.job.private is not None]

    def take(self, k: int) -> Fitted:
        """The client in slot k, as it is now."""
        slot = self.slots[k]
        job = slot.job
        tensors = dict(job.tensors)
        for name in self.trained:
            tensors[name] = from_stack(name, self.rows.leaves[name][k], job.rank)
        moments: Tensors = {}
        if self.trainer.train.optimizer_state == "kept":
            moments.update(job.moments)  # tensors that rest this round keep theirs
            for moment, values in self.optimizer.moments.items():
                for name in self.trained:
                    shaped = values[k, self.rows.columns[name]].view(self.shapes[name])
                    moments[f"{moment}/{name}"] = from_stack(name, shaped, job.rank)
            for i, name in enumerate(self.trained):
                moments[f"steps/{name}"] = self.optimizer.steps[k, i].cpu().clone()
        return Fitted(
            job.client,
            tensors,
            slot.loss / max(1, slot.seen),
            slot.done,
            moments,
            job.branch,
            slot.travelled,
            self._importance(k, job),
        )

    def _importance(self, k: int, job: Job) -> Tensors:
        scores = self.terms.importance(k) if job.terms.importance else None
        if scores is None:
            return {}
        shaped = {name: scores[self.rows.columns[name]].view(self.shapes[name]) for name in self.trained}
        return {name: from_stack(name, tensor, job.rank) for name, tensor in shaped.items()}

    def _fill(self, row: Tensor, tensors: Tensors) -> None:
        """Write a client's tensors into their columns of a row; those that are not trained have none."""
        for name in self.trained:
            if name in tensors:
                row[self.rows.columns[name]] = to_stack(name, tensors[name], self.rank).reshape(-1).to(row.device)

    def seat(self, k: int, job: Job) -> None:
        """Give slot k to the next client."""
        self.slots[k] = Slot(job, self.trainer.train, self.trainer.seed)
        with torch.no_grad():
            for name in self.trained:
                self.rows.leaves[name][k] = to_stack(name, job.tensors[name], self.rank)
            for name, tensor in self.frozen.items():
                tensor[k] = to_stack(name, job.tensors[name], self.rank)
        self.scales[k] = self.trainer.adapter.scale(job.rank)
        for values in self.optimizer.moments.values():
            values[k] = 0
        self.optimizer.steps[k] = 0
        self.terms.seat(k, job.terms, self._fill)
        self._restore_moments(k, job)

    def close(self, k: int) -> None:
        """Remove slot k: the last slot moves into its place, and the stack is one shorter.

        Nothing else moves: copying all K rows each time would cost K^2 rows by the time the last slot closes.
        """
        last = len(self.slots) - 1
        moments = self.optimizer.moments
        for rows in (self.rows.values, self.scales, self.optimizer.steps, *moments.values(), *self.frozen.values()):
            rows[k] = rows[last]
        self.slots[k] = self.slots[last]
        del self.slots[last]
        self.rows = Rows(self.rows.values[:last], self.shapes, self.rows.grads[:last])
        self.frozen = {name: tensor[:last] for name, tensor in self.frozen.items()}
        self.scales = self.scales[:last]
        self.optimizer.moments = {name: values[:last] for name, values in moments.items()}
        self.optimizer.steps = self.optimizer.steps[:last]
        self.terms.close(k, last)

    def _restore_moments(self, k: int, job: Job) -> None:
        for moment, values in self.optimizer.moments.items():
            for name in self.trained:
                if (saved := job.moments.get(f"{moment}/{name}")) is not None:
                    # The rank may have shrunk since: what padding now fills must have no moments.
                    own = from_stack(name, to_stack(name, saved, job.rank), job.rank)
                    values[k, self.rows.columns[name]] = to_stack(name, own, self.rank).reshape(-1)
        for i, name in enumerate(self.trained):
            if (steps := job.moments.get(f"steps/{name}")) is not None:
                self.optimizer.steps[k, i] = steps
