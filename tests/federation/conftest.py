"""Runs of the tiny recipe, and what of a run directory must not depend on how it came to be."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folklora.backbones.classification import LinearHead
from folklora.backbones.metric import LOSS, Score
from folklora.data.partition_file import to_json
from folklora.federation.local import LocalEngine
from folklora.federation.network import begin, host, reopen
from folklora.federation.orders import Order, Record
from folklora.federation.parties import Own
from folklora.federation.remote import Delivery
from folklora.federation.resident import Resident
from folklora.federation.rounds import Progress, Rounds, Silent
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup, prepare
from folklora.recipe import Recipe


@dataclass
class Played:
    """A run that was played in this process, with everything it consists of."""

    setup: Setup
    directory: RunDirectory
    engine: LocalEngine
    rounds: Rounds
    summary: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        return without_seconds(self.summary["row"])

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [without_seconds(line) for line in self.directory.metrics()]


def without_seconds(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if not name.startswith("seconds")}


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Played]:
    """``play(recipe, engine)`` -> the run played to its end in a directory of its own, by an engine made of a setup."""
    count = iter(range(1000))

    def make(
        recipe: Recipe,
        engine: Callable[[Setup], LocalEngine] = LocalEngine,
        *,
        clients: Callable[[list[str]], list[str]] = list,
        progress: Progress | None = None,
    ) -> Played:
        setup = prepare(recipe)
        partition = to_json(setup.data.table, setup.data.splits)
        directory = RunDirectory.create(tmp_path / f"play-{next(count)}", recipe, partition)
        made = engine(setup)
        ids = clients(list(setup.data.splits))
        rounds = Rounds(setup, directory, made, ids, progress or Silent())
        return Played(setup, directory, made, rounds, rounds.play())

    return make


@pytest.fixture
def judged_by_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers are judged by the nats of the right class, as language models by those of a token."""

    def score(self: LinearHead, answers: np.ndarray, labels: np.ndarray) -> Score:
        logits = answers.astype(np.float64)
        nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
        return Score(float(nats.sum()), len(labels), {"perplexity": float(np.exp(nats.mean()))})

    monkeypatch.setattr(LinearHead, "metric", LOSS)
    monkeypatch.setattr(LinearHead, "score", score)


@pytest.fixture(scope="session")
def facts() -> Callable[[Path], dict[str, Any]]:
    """``facts(run)`` -> all a finished run says, but for seconds: two runs of one recipe must agree in every bit."""

    def read(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {
            file.relative_to(path).as_posix(): file.read_bytes()
            for folder in ("clients", "server")
            for file in sorted((path / folder).rglob("*"))
            if file.is_file()
        }
        for name in ("recipe.toml", "partition.json", "insight.safetensors"):
            if (path / name).exists():
                found[name] = (path / name).read_bytes()
        summary = json.loads((path / "summary.json").read_text())
        found["summary"] = {**summary, "row": without_seconds(summary["row"])}
        lines = (path / "metrics.jsonl").read_text().splitlines()
        found["metrics"] = [without_seconds(json.loads(line)) for line in lines]
        checkpoint = json.loads((path / "checkpoint.json").read_text())
        for name in ("sha256", "metrics_bytes"):  # they depend on how many digits seconds have
            del checkpoint[name]
        del checkpoint["digests"]["metrics.jsonl"]
        found["checkpoint"] = checkpoint
        return found

    return read


# -- a network run without a network ---------------------------------------------------------------------------------


@dataclass
class InMemory:
    """A carrier to members in this process: orders and answers cross as flat records, and are counted.

    Attributes
    ----------
    residents
        What builds each member's resident from its folder.
    rebuild
        Every order finds a resident that was just built.
    away
        Members that cannot be reached.
    tamper
        What arrives in place of an answer.
    """

    residents: dict[str, Callable[[], Resident]]
    rebuild: bool = False
    away: set[str] = field(default_factory=set)
    tamper: Callable[[Order, Record], list[Record]] = lambda order, answer: [answer]
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    orders: list[Order] = field(default_factory=list)
    built: dict[str, Resident] = field(default_factory=dict)

    def members(self) -> Sequence[str]:
        return [client for client in self.residents if client not in self.away]

    def resident(self, client: str) -> Resident:
        if self.rebuild or client not in self.built:
            self.built[client] = self.residents[client]()
        return self.built[client]

    def exchange(self, orders: Mapping[str, Order], deadline: float) -> Iterator[Delivery]:
        for client, order in reversed(orders.items()):  # nothing may depend on who answers first
            if client in self.away:
                continue
            self.orders.append(order)
            for data in (order.welcome_data, order.reply_data, order.attached, order.part):
                self.down[client] += len(data or b"")
            answer = self.resident(client).answer(copy.deepcopy(order.record()))
            self.up[client] += len(answer.get("data") or b"")
            for record in self.tamper(order, copy.deepcopy(answer)):
                yield Delivery(client, record)


@dataclass
class Federated:
    """A recipe's network run in a directory of its own, and whoever takes part in it."""

    recipe: Recipe
    path: Path
    homes: Path
    carrier: InMemory

    @property
    def members(self) -> list[str]:
        return list(self.carrier.residents)

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.path)

    def folder(self, client: str) -> Path:
        """What a member keeps of the run."""
        (folder,) = (self.homes / client / "runs").iterdir()
        return folder

    def play(self, progress: Progress | None = None) -> dict[str, Any]:
        return host(begin(self.recipe, self.path, self.members), self.carrier, progress)

    def resume(self, *, previous: bool = False) -> dict[str, Any]:
        """As a server does that was started again."""
        return host(reopen(self.path, self.members, previous=previous), self.carrier)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [without_seconds(line) for line in self.directory.metrics()]


@pytest.fixture
def federated(tmp_path: Path) -> Callable[..., Federated]:
    """``federated(recipe, clients, own)`` -> members with empty folders: a rehearsal, unless each has its ``own``."""
    count = iter(range(1000))

    def make(
        recipe: Recipe,
        clients: Sequence[str] = ("0", "1", "2", "3"),
        own: Callable[[str], Own] | None = None,
        **options: Any,
    ) -> Federated:
        place = tmp_path / f"federated-{next(count)}"
        rehearsal = Own(rehearse=recipe.data.source, model=recipe.model.name)

        def builder(client: str) -> Callable[[], Resident]:
            return lambda: Resident(client, place / client, own(client) if own else rehearsal)

        residents = {client: builder(client) for client in clients}
        return Federated(recipe, place / "server", place, InMemory(residents, **options))

    return make


@pytest.fixture
def speaking(tiny_speaker: Path, tiny_chats: Path) -> Callable[..., Recipe]:
    """``speaking("method.name=fedit", ...)`` -> a recipe whose four clients are the topics."""

    def make(*overrides: str) -> Recipe:
        document = {
            "model": {"name": str(tiny_speaker), "task": "causal-lm", "dtype": "float32"},
            "data": {"source": str(tiny_chats), "partition": "natural", "by": "topic"},
            "adapter": {"rank": 4, "targets": r".*(q_proj|v_proj|up_proj|down_proj)"},
            "train": {"rounds": 2, "batch_size": 8, "lr": 1e-2},
        }
        return Recipe.parse(document, overrides)

    return make


COLOURS = {"w1": (220, 40, 40), "w2": (40, 220, 40), "w3": (40, 40, 220)}
"""The class, which is also the word for it, and what its pictures look like."""


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 noisy pictures of 9 x 14 pixels, with their colour's name, a caption of it, and one of three rooms."""
    rng = np.random.default_rng(0)
    labels = rng.choice(list(COLOURS), 120)
    pixels = np.stack(
        [np.clip(rng.normal(COLOURS[label], 40, (9, 14, 3)), 0, 255).astype(np.uint8) for label in labels]
    )
    captions = [f"{label} w{10 + i % 20}" for i, label in enumerate(labels)]
    path = tmp_path_factory.mktemp("coloured") / "pictures.npz"
    rooms = np.array([f"room-{i % 3}" for i in range(120)])
    np.savez(path, image=pixels, label=labels, caption=np.array(captions), room=rooms)
    return path
