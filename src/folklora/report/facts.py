"""What the run directory says of privacy, before anybody judges it: recipe, contract, traffic, attacks, epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from folklora.adapters.lowrank import Shapes, kind
from folklora.errors import RunError
from folklora.federation.contract import CONTRACT, Contract, SiteShape
from folklora.methods.base import Method
from folklora.recipe import Recipe
from folklora.report.attacked import AttackRecord, read_attacks
from folklora.report.reading import Run, read_run
from folklora.report.records import Spent, parse
from folklora.sections import AdapterSection

ASKED_ALL = 10_000
"""Clients that are asked one by one what they send; beyond, those of one rank count as alike."""

UNKNOWN = 1 << 12
"""The width of a layer whose shape is not on record."""


@dataclass(frozen=True)
class Facts:
    """What a run says of itself.

    Attributes
    ----------
    known
        Whether shapes are on record (``contract.json``); without it only the kinds of tensors are known.
    method
        The recipe's method, to be asked what travels; it holds no numbers.
    attacks
        The strongest first.
    """

    run: Run
    recipe: Recipe
    method: Method
    known: bool
    attacks: tuple[AttackRecord, ...]

    @classmethod
    def of(cls, path: str | Path) -> Facts:
        """The facts of a run directory, finished or not.

        Raises
        ------
        FolkLoraError
            The folder is no run directory, or one of its files is not what it should be.
        """
        run = read_run(path)
        recipe = Recipe.read(run.path / "recipe.toml")
        known = (run.path / CONTRACT).is_file()
        contract = parse(Contract, run.path / CONTRACT) if known else _guessed(run, recipe)
        if list(contract.ranks) != list(run.clients):
            raise RunError(f"{run.path / CONTRACT}: its clients are not those of partition.json")
        return cls(run, recipe, contract.method(recipe), known, tuple(read_attacks(run.path)))

    # -- what travels ------------------------------------------------------------------------------------------------

    @property
    def simulated(self) -> bool:
        """Whether all clients were one process."""
        return self.recipe.engine.kind == "local"

    @cached_property
    def uploads(self) -> dict[str, tuple[Shapes, Shapes]]:
        """Client -> what it sends in odd and in even rounds, since some methods alternate; empty without rounds."""
        if not self.method.rounds():
            return {}
        ranks, seen = self.method.context.ranks, {}
        found: dict[str, tuple[Shapes, Shapes]] = {}
        for client in self.run.clients:
            alike = ranks[client] if len(ranks) > ASKED_ALL else client
            if alike not in seen:
                seen[alike] = self.method.expected(1, {}, client), self.method.expected(2, {}, client)
            found[client] = seen[alike]
        return found

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors that a client sends in its rounds, in the order of the message."""
        return tuple(dict.fromkeys(kind(name) for pair in self.uploads.values() for s in pair for name in s))

    @cached_property
    def once(self) -> frozenset[str]:
        """What a client sends before the first round: of "statistics", "mixtures", "counts", "gradients"."""
        options = self.method.options
        sent = {
            "statistics": self.method.sends_statistics,
            "mixtures": getattr(options, "uses_data", False) and getattr(options, "components", 0) > 0,
            "counts": self.method.condenses,
            "gradients": "gradients" in (self.method.once or ""),
        }
        return frozenset(name for name, there in sent.items() if there)

    @property
    def travels(self) -> bool:
        """Whether anything that was trained leaves a client."""
        return bool(self.kinds)

    @property
    def readable(self) -> bool:
        """Whether the server reads each client's trained tensors by themselves."""
        return self.travels and self.recipe.secure.kind == "none"

    @property
    def owned(self) -> Shapes:
        """All tensors of the client with the largest rank, at the start."""
        context = self.method.context
        norms = {name: tuple(tensor.shape) for name, tensor in context.norms.items()}
        widest = max(self.method.rank({}, client) for client in context.clients)
        return {**self.method.adapter.shapes(widest), **context.head, **norms}

    @property
    def frame_known(self) -> bool:
        """Whether what stands around the tensors that travel is the same for all, and so known to the server."""
        moved = self.method.trained(1) | self.method.trained(2)
        return self.travels and not self.method.condenses and "A" not in self.kinds and "A" not in moved

    # -- who takes part ----------------------------------------------------------------------------------------------

    @cached_property
    def fewest(self) -> int | None:
        """The fewest clients that took part in a round; before the first one, as many as are sampled."""
        if self.run.rounds:
            return min(len(line.participants) for line in self.run.rounds)
        return self.recipe.train.sampled(len(self.run.clients)) if self.method.rounds() else None

    @cached_property
    def smallest(self) -> tuple[str, int] | None:
        """The client with the fewest training examples, and how many; None where no sizes are on record."""
        sizes = {client: split.train for client, split in self.run.examples.items() if split.train}
        return min(sizes.items(), key=lambda item: item[1]) if sizes else None

    @property
    def fewest_steps(self) -> int | None:
        """Local steps of the client with the fewest examples."""
        if self.smallest is None:
            return None
        train = self.recipe.train
        return train.local_epochs * math.ceil(self.smallest[1] / train.batch_size)

    @property
    def replies_tell(self) -> bool:
        """Whether who took part in a round can tell something of the others from what comes back without noise."""
        return self.travels and len(self.run.clients) > 1 and self.recipe.privacy.unit != "client"

    # -- differential privacy ------------------------------------------------------------------------------------------

    @cached_property
    def spent(self) -> tuple[tuple[int, Spent], ...]:
        """(round, what was spent by then) of the rounds that say so."""
        return tuple((line.round, line.privacy) for line in self.run.lines if line.privacy is not None)

    @property
    def epsilon(self) -> float | None:
        """What training has spent so far; None where nothing is on record."""
        return self.spent[-1][1].epsilon if self.spent else None

    @property
    def protected_units(self) -> int | None:
        """How many clients, or examples of the smallest client, the guarantee of training is about."""
        unit = self.recipe.privacy.unit
        if unit == "client":
            return len(self.run.clients)
        return self.smallest[1] if unit == "example" and self.smallest else None

    @property
    def clipped_by_server(self) -> bool:
        """Whether no client moves the mean by more than any other may, whatever it sends."""
        return self.recipe.privacy.unit == "client" and self.recipe.privacy.placement == "server"

    @property
    def sketch_epsilon(self) -> tuple[float, float] | None:
        """Epsilon and delta of the one-off statistics; None where they are sent as they are, or not at all."""
        return self.method.private_release if "statistics" in self.once else None

    @property
    def sketched_in_clear(self) -> bool:
        """Whether what a client sends once has no noise."""
        return bool(self.once & {"statistics", "mixtures"}) and self.sketch_epsilon is None


def _guessed(run: Run, recipe: Recipe) -> Contract:
    """Of a run that has no contract on record: its kinds of tensors are right, its shapes are not."""
    classes = max(1, len(run.classes))
    return Contract(
        sites=[SiteShape(name="?", d_in=UNKNOWN, d_out=UNKNOWN)],
        head={"head/weight": [classes, 1], "head/bias": [classes]} if recipe.model.task == "classification" else {},
        norms={"norm/?": [1]} if recipe.adapter.norm else {},
        classes=classes,
        width=UNKNOWN,
        ranks=_ranks(recipe.adapter, run.clients),
    )


def _ranks(adapter: AdapterSection, clients: Iterable[str]) -> dict[str, int]:
    if adapter.device_ranks:
        return dict.fromkeys(clients, max(adapter.device_ranks))
    if isinstance(adapter.rank, list):
        return dict(zip(clients, adapter.rank, strict=False))
    return dict.fromkeys(clients, adapter.rank)
