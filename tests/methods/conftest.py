"""A small federation without a model: made-up features, random local training, messages through the codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Site, Tensors
from folklora.federation.codec import decode, encode
from folklora.federation.rounds import Silent
from folklora.federation.run import resume, run
from folklora.federation.traffic import Traffic
from folklora.methods import build
from folklora.methods.base import Method
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.work import Trained
from folklora.randomness import derive, torch_generator

SITES = (Site("layer.0.query", 10, 12), Site("layer.1.value", 8, 7))
CLASSES, WIDTH, ALPHA = 4, 6, 6.0
HEAD: Shapes = {"head/weight": (CLASSES, WIDTH), "head/bias": (CLASSES,)}
# Numbers of steps say nothing of what is tested here.
BRIEF: dict[str, dict[str, Any]] = {name: {"steps": 3, "server_steps": 3} for name in ("feddm", "fedaf")}
IDS = ("ann", "bob", "cid", "dot", "eve")


@dataclass
class Features:
    """A client's features and labels by split; and under which heads it was asked for gradients."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    gradients: Tensors = field(default_factory=dict)
    inputs: Tensors = field(default_factory=dict)
    asked: list[Tensors] = field(default_factory=list)

    def features(self, split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
        return self.train if split == "train" else self.validation

    def weight_gradients(self, head: Tensors, examples: int) -> Tensors:
        self.asked.append(head)
        return self.gradients

    def layer_inputs(self, tensors: Tensors, examples: int) -> Tensors:
        return self.inputs


def made_up(client: str, count: int, seed: int, classes: int = CLASSES) -> Features:
    """Classes around common centres, a label distribution and a shift of the client's own."""
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=torch_generator(seed, "centres"))
    random = torch_generator(seed, "features", client)
    shift = 0.5 * torch.randn(WIDTH, generator=random)
    odds = torch.rand(CLASSES, generator=random)[:classes] + 0.1

    def draw(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.multinomial(odds, n, replacement=True, generator=random)
        return centres[labels] + shift + torch.randn(n, WIDTH, generator=random), labels

    noise = torch_generator(seed, "gradients", client)
    gradients = {f"grad/{site.name}": torch.randn(site.d_out, site.d_in, generator=noise) for site in SITES}
    inputs = {f"input/{site.name}": torch.randn(site.d_in, generator=noise) for site in SITES}
    return Features(draw(count), draw(max(2, count // 3)), gradients, inputs)


@cache
def quadratic(client: str, name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """h and a of ``f_k(y) = 1/2 sum h (y - a)^2``, float64, another for each client and number."""
    random = torch_generator(3, "quadratic", client, name)
    h = 0.2 + 2 * torch.rand(shape, generator=random, dtype=torch.float64)
    return h, 2 * torch.randn(shape, generator=random, dtype=torch.float64)


@pytest.fixture(name="quadratic", scope="session")
def _quadratic() -> Callable[[str, str, torch.Size], tuple[Tensor, Tensor]]:
    return quadratic


def over_the_wire(message: Message | None) -> Message | None:
    if message is None:
        return None
    return decode(encode(message), shapes={name: tuple(tensor.shape) for name, tensor in message.tensors.items()})


@dataclass
class Federation:
    """A method, its clients, and the server's state; what `Rounds` does with them, in a few lines."""

    method: Method
    clients: dict[str, Client]
    state: State = field(default_factory=dict)

    def sketches(self, missing: Sequence[str] = ()) -> dict[str, Message]:
        found = {i: over_the_wire(self.method.sketch(c)) for i, c in self.clients.items() if i not in missing}
        return {client: message for client, message in found.items() if message is not None}

    def begin(self, missing: Sequence[str] = ()) -> Federation:
        self.state = self.method.begin(self.sketches(missing))
        for name, client in self.clients.items():
            message = over_the_wire(self.method.welcome(self.state, name))
            if message is not None:
                self.method.settle(client, message)
        return self

    def train(self, round: int, who: Sequence[str] | None = None, size: float = 0.3) -> None:
        """Every tensor the method trains moves by noise of the client and round."""
        for name in who or self.clients:
            results = {}
            for work in self.method.work(round, self.clients[name]):
                random = torch_generator(7, f"training{work.branch}", name, round)
                tensors = dict(work.tensors)
                for key, tensor in work.tensors.items():
                    if key in work.trained:
                        noise = size * torch.randn(tensor.shape, generator=random)
                        tensors[key] = tensor + noise * work.terms.masks.get(key, torch.ones(()))
                scores = {key: torch.rand(tensors[key].shape, generator=random) for key in sorted(work.trained)}
                results[work.branch] = Trained(tensors, 1.0, 4, 0.04, scores if work.terms.importance else {})
            if results:
                self.method.learned(round, self.clients[name], results)

    def descend(self, round: int, who: Sequence[str] | None = None, *, steps: int = 20, lr: float = 0.05) -> None:
        """Local gradient descent on each client's `quadratic`, bent as its work says; its end in closed form."""
        for name in who or self.clients:
            results = {}
            for work in self.method.work(round, self.clients[name]):
                terms, tensors, rate = work.terms, dict(work.tensors), work.terms.rate * lr
                for key in work.trained:
                    h, a = quadratic(name, key, tensors[key].shape)
                    mu = terms.proximal if key in terms.anchor else 0.0
                    pull = mu * terms.anchor.get(key, 0.0) - terms.correction.get(key, 0.0)
                    rest = (h * a + pull) / (h + mu)
                    tensors[key] = (rest + (1 - rate * (h + mu)) ** steps * (tensors[key] - rest)).float()
                results[work.branch] = Trained(tensors, 1.0, steps, rate * steps)
            self.method.learned(round, self.clients[name], results)

    def messages(self, round: int, who: Sequence[str] | None = None) -> dict[str, Message]:
        found = {name: over_the_wire(self.method.send(round, self.clients[name])) for name in who or self.clients}
        return {client: message for client, message in found.items() if message is not None}

    def deliver(self, who: Sequence[str] | None = None) -> None:
        for name in who or self.clients:
            message = over_the_wire(self.method.reply(self.state, name))
            if message is not None:
                self.method.receive(self.clients[name], message)

    def step(self, round: int, who: Sequence[str] | None = None) -> dict[str, Message]:
        """One round of those who take part; replies stay at the server until `deliver`."""
        self.train(round, who)
        messages = self.messages(round, who)
        if messages:
            self.state = self.method.server(round, self.state, messages)
        return messages

    def weigh(self, dtype: str = "float32", train: Callable[[int], None] | None = None) -> dict[str, Traffic]:
        """The first rounds that a forecast looks at, everybody in them: mean bytes of each client's real messages."""
        up, down = (dict.fromkeys(self.clients, 0) for _ in range(2))
        for round in range(1, 1 + min(2, self.method.rounds())):
            (train or self.train)(round)
            messages = self.messages(round)
            if messages:
                self.state = self.method.server(round, self.state, messages)
            for name, client in self.clients.items():
                said, heard = self.method.send(round, client), self.method.reply(self.state, name)
                up[name] += len(encode(said, dtype)) if said else 0
                down[name] += len(encode(heard, dtype)) if heard else 0
            self.deliver()
        return {name: Traffic(up[name] // 2, down[name] // 2) for name in self.clients}

    def snapshot(self) -> dict[str, Tensors]:
        return {name: dict(client.tensors) for name, client in self.clients.items()}

    def dense(self, tensors: Tensors) -> list[np.ndarray]:
        """The oracle: each site's ``s B C A`` or ``s B A``, and its ``base``, built in full, in float64."""
        products = []
        for site in self.method.context.sites:
            a, b = (tensors[f"{factor}/{site.name}"].double().numpy() for factor in "AB")
            core = tensors.get(f"C/{site.name}")
            middle = np.eye(len(a)) if core is None else core.double().numpy()
            if (gain := tensors.get(f"gain/{site.name}")) is not None:  # one number for the rows of each head's block
                middle = np.repeat(gain.double().numpy(), len(a) // len(gain))[:, None] * middle
            base = tensors.get(f"base/{site.name}", torch.zeros(())).double().numpy()
            products.append(self.method.context.alpha / len(a) * b @ middle @ a + base)
        return products


def frozen_weight(site: str) -> Tensor:
    """The frozen weight of a site of the made-up model."""
    (shape,) = [(s.d_out, s.d_in) for s in SITES if s.name == site]
    return torch.randn(shape, generator=torch_generator(5, "weight", site))


@pytest.fixture
def context() -> Callable[..., Context]:
    """``context(ranks={...}, ...)`` -> what a method is built with."""

    def make(ranks: Mapping[str, int] | Sequence[int] = (3, 3, 3), **other: Any) -> Context:
        named = dict(ranks) if isinstance(ranks, Mapping) else dict(zip(IDS, ranks, strict=False))
        values: dict[str, Any] = {
            "seed": 0,
            "sites": SITES,
            "alpha": ALPHA,
            "dropout": 0.0,
            "classes": CLASSES,
            "width": WIDTH,
            "head": HEAD,
            "norms": {"norm/ln.weight": torch.ones(5), "norm/ln.bias": torch.zeros(5)},
            "rounds": 3,
            "learning_rate": 1e-2,
            "batch_size": 8,
            "local_epochs": 1,
            "optimizer": "adamw",
            "weight": frozen_weight,
        }
        return Context(ranks=named, **{**values, **other})

    return make


@pytest.fixture
def federation(context: Callable[..., Context]) -> Callable[..., Federation]:
    """``federation("celora", {"basis": "frozen"}, ranks=(3, 3))`` -> clients that have not said a word yet.

    ``headless``: of a task without a head of its own and without labels.
    """

    def make(
        name: str,
        options: Mapping[str, Any] | None = None,
        ranks: Mapping[str, int] | Sequence[int] = (3, 3, 3),
        *,
        examples: Sequence[int] = (30, 12, 18, 24, 9),
        data: Mapping[str, Features] | None = None,
        headless: bool = False,
        **other: Any,
    ) -> Federation:
        made = context(ranks, **{"classes": 1, "head": {}, **other} if headless else other)
        method = build(name, {**BRIEF.get(name, {}), **(options or {})}, made)
        clients = {}
        for client, count in zip(made.clients, examples, strict=False):
            own = data[client] if data else made_up(client, count, 3, made.classes)
            secret = derive(11, "secret", client)
            clients[client] = Client(client, made.ranks[client], len(own.train[1]), method.initial(client), own, secret)
        return Federation(method, clients)

    return make


class Interrupted(Exception): ...


class Interrupting(Silent):
    """Ends a run when it says that a round is done."""

    def __init__(self, round: int) -> None:
        self.last = round

    def line(self, metrics: Mapping[str, Any]) -> None:
        if metrics["round"] == self.last:
            raise Interrupted


@pytest.fixture
def resumed(tmp_path: Path) -> Callable[[Any], dict[str, Any]]:
    """``resumed(recipe)`` -> the summary of a run (in ``tmp_path / "whole"``), to which another came that was
    interrupted before its last round and resumed."""

    def play(recipe: Any) -> dict[str, Any]:
        whole = run(recipe, tmp_path / "whole")
        with pytest.raises(Interrupted):
            run(recipe, tmp_path / "cut", Interrupting(recipe.train.rounds - 1))
        again = resume(tmp_path / "cut")
        rows = [{k: v for k, v in s["row"].items() if not k.startswith("seconds")} for s in (whole, again)]
        assert rows[0] == rows[1]
        assert whole["clients"] == again["clients"]
        return whole

    return play
