"""A recipe looked at without training: who holds what, how large adapters are, what will travel, what it will take."""

from __future__ import annotations

from typing import Any

import torch

from folklora.adapters.lowrank import kind
from folklora.data.split import histogram
from folklora.federation.budget import Budget
from folklora.federation.secrecy import parties, secrecy
from folklora.federation.setup import Setup, prepare
from folklora.federation.traffic import forecast
from folklora.recipe import Recipe
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job


def inspect(recipe: Recipe) -> dict[str, Any]:
    """Clients with their label histograms, the model, adapter sizes, predicted bytes and memory; nothing is trained.

    Memory is what the process needs beyond Python and its libraries: the backbone in each precision, all clients' own
    tensors, and for the clients in training their gradients, two moments and a margin for activations of one step.
    Traffic is that of a run in which every client takes part in every round (`folklora.federation.traffic.forecast`).
    ``backbone_stored`` is what a device would keep of the backbone: few bits where ``model.bits`` says so. ``privacy``
    is what differential privacy will have cost after all rounds, and how many of them its budget affords.
    """
    setup = prepare(recipe)
    backbone, method, splits = setup.task.backbone, setup.method, setup.data.splits
    clients = {
        client: {
            "examples": {part: len(getattr(split, part)) for part in ("train", "validation", "test")},
            "labels": {
                setup.data.table.classes[c]: int(n) for c, n in enumerate(histogram(setup.data.table, split)) if n
            },
            "rank": setup.ranks[client],
            **({} if setup.depths is None else {"depth": setup.depths.most[client]}),
        }
        for client, split in splits.items()
    }
    largest = max(setup.clients, key=lambda client: setup.ranks[client])
    owned = method.initial(largest)
    numbers: dict[str, int] = {}
    for name, tensor in owned.items():
        numbers[kind(name)] = numbers.get(kind(name), 0) + tensor.numel()
    jobs = [_job(setup.encoded, client, splits[client].train) for client in setup.clients]
    slots = CohortTrainer(setup.task, method.adapter, recipe.train, recipe.seed).slots_for(jobs)
    client_bytes = 4 * sum(numbers.values())
    counts = {c: torch.from_numpy(histogram(setup.data.table, splits[c].train)) for c in setup.clients}
    masked = parties(recipe, len(setup.clients)) if recipe.secure.kind == "masks" else 0
    traffic = forecast(method, counts, recipe.message, masked=masked, sealed=recipe.secure.kind == "ckks")
    copies = 4 + (2 if backbone.dtype.itemsize == 2 else 0)
    tokens = recipe.train.tokens if recipe.train.cohort == "auto" else slots * recipe.train.batch_size * 32
    return {
        "model": {
            "name": recipe.model.name,
            "architecture": backbone.model_type,
            "parameters": backbone.parameters,
            "width": setup.task.width,
            "compute": str(backbone.dtype).removeprefix("torch."),
            "adapted_layers": [site.name for site in method.adapter.sites],
        },
        "adapter": {"numbers": numbers, "bytes": client_bytes},
        "method": {
            "name": method.name,
            "rounds": method.rounds(),
            "bytes_up_per_client_round": traffic.up,
            "bytes_down_per_client_round": traffic.down,
            "bytes_once_per_client": traffic.once,
        },
        "privacy": _privacy(setup),
        "secure": secrecy(recipe, len(setup.clients)),
        "memory": {
            "backbone": backbone.parameters * copies,
            "backbone_stored": backbone.stored,
            "clients": client_bytes * len(splits),
            "training": slots * client_bytes * 4 + tokens * setup.task.width * 4 * 40,
            "clients_side_by_side": slots,
        },
        "classes": len(setup.data.table.classes),
        "test_examples": len(setup.test_encoded),
        "clients": clients,
        "newcomers": list(setup.newcomers),
    }


def _privacy(setup: Setup) -> dict[str, Any] | None:
    """Noise, and epsilon after all rounds if everybody answers; None without differential privacy."""
    if setup.recipe.privacy.unit == "none":
        return None
    budget = Budget(setup.recipe, setup.method, setup.sizes)
    return {**budget.account(budget.planned(setup.method.rounds())), "rounds": budget.affordable()}


def _job(encoded: list[Any], client: str, indices: Any) -> Job:
    import numpy as np

    return Job(client, 1, 1, {}, frozenset(), [encoded[i] for i in indices], np.zeros(len(indices), dtype=np.int64))
