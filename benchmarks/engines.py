"""Rounds of FedIT by three engines: ours, a plain loop over the clients, and Flower's simulation on Ray.

    python benchmarks/engines.py [--rounds 2] [--repeats 3] [--threads 2] [--ray]

The same work: Banking77 shared by 10 clients (Dirichlet 0.5), LoRA r = 8 on query and value of MiniLM and a head, the
same minibatches, one local epoch a round, then the mean by examples. No engine validates. The arms:

- *ours*: the local engine as a recipe runs it (compute type of the machine, clients side by side);
- *ours, float32*: the same in float32, which is the loop's work to the rounding: their losses are compared;
- *loop*: stock PEFT, float32, one client after another through one model, and the mean of what they give;
- *flower*: the same stock PEFT in a ClientApp of Flower's simulation engine, each actor with one thread and a model of
  its own, as many actors as threads. Only with ``--ray`` and where Ray is installed (``pip install
  "flwr[simulation]"``): Ray opens sockets beyond loopback, so no test of ours starts it. Its seconds are those of the
  rounds; what the start of Ray takes is told apart.

Arms alternate in one process, and each rival's time is divided by that of ours just before it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _common import environment, publish, spread
from stock_peft import OneByOne

from folklora.adapters.lowrank import Tensors
from folklora.federation.member import Member
from folklora.federation.run import run
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup, prepare
from folklora.methods.aggregation import weighted_mean
from folklora.recipe import Recipe
from folklora.training.jobs import Job

NEVER = 100_000
"""A validation that no run of ours reaches, but for the one after the last round, whose time is left out."""


@dataclass(frozen=True)
class Outcome:
    """Seconds of the rounds, mean training loss of each, and what came before the first."""

    seconds: float
    losses: list[float]
    start: float = 0.0


Arm = Callable[[], Outcome]


def recipe(rounds: int, limit: int, dtype: str) -> Recipe:
    data = {"clients": 10, "partition": "dirichlet", "alpha": 0.5, "limit": limit}
    train = {"rounds": rounds, "batch_size": 16, "lr": 5e-3, "evaluate_every": NEVER}
    return Recipe.parse({"data": data, "train": train, "method": {"name": "fedit"}, "model": {"dtype": dtype}})


def ours(settings: Recipe) -> Outcome:
    """The local engine, checkpoints and all."""
    with tempfile.TemporaryDirectory() as folder:
        run(settings, Path(folder) / "run")
        lines = RunDirectory.open(Path(folder) / "run").metrics()[1:]
    spent = sum(s for line in lines for phase, s in line["seconds"].items() if phase not in ("evaluate", "measure"))
    return Outcome(spent, [line["train_loss"] for line in lines])


class Clients:
    """The same clients for the rivals: their jobs, and what they start from."""

    def __init__(self, settings: Recipe) -> None:
        self.setup: Setup = prepare(settings)
        self.members = {client: Member(self.setup, client) for client in self.setup.data.splits}

    def jobs(self, round: int, common: Tensors | None) -> list[Job]:
        found = []
        for member in self.members.values():
            (job,) = member.jobs(round)
            found.append(job if common is None else replace(job, tensors=common))
        return found

    def mean(self, trained: Sequence[Tensors]) -> Tensors:
        examples = torch.tensor([float(member.client.examples) for member in self.members.values()])
        return weighted_mean(trained, examples / examples.sum())


def loop(clients: Clients, model: OneByOne) -> Outcome:
    """FedAvg as it is written in a notebook."""
    train = clients.setup.recipe.train
    losses, common = [], None
    started = time.perf_counter()
    for round in range(1, train.rounds + 1):
        trained, found = [], []
        for job in clients.jobs(round, common):
            found.append(model.fit_one(job, train))
            trained.append({name: tensor.detach().clone() for name, tensor in model.parameters().items()})
        common = clients.mean(trained)
        losses.append(statistics.fmean(found))
    return Outcome(time.perf_counter() - started, losses)


def flower(settings: Recipe, clients: Clients, actors: int) -> Outcome:
    """The loop's work in Flower's simulation engine: a ClientApp for each client, on Ray's actors."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    document, folder = settings.to_toml(), str(Path(__file__).parent)
    outcome: list[Outcome] = []
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        if folder not in sys.path:
            sys.path.insert(0, folder)
        import engines

        asked = message.content["ask"]
        own = engines.actor(document)
        client = list(own.clients.members)[int(context.node_config["partition-id"])]
        common = message.content["model"].to_torch_state_dict() if "model" in message.content else None
        job = {j.client: j for j in own.clients.jobs(int(asked["round"]), common)}[client]
        loss = own.model.fit_one(job, own.clients.setup.recipe.train)
        trained = {name: tensor.detach() for name, tensor in own.model.parameters().items()}
        told = ConfigRecord({"loss": loss, "client": client})
        return Message(RecordDict({"model": ArrayRecord(trained), "told": told}), reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        train_section = settings.train
        while len(nodes := list(grid.get_node_ids())) < len(clients.members):
            time.sleep(0.1)
        # Every actor loads its model before the clock runs, as the loop has loaded its own.
        order = list(clients.members)
        losses, common, started = [], None, 0.0
        for round in range(train_section.rounds + 1):
            if round == 1:
                started = time.perf_counter()
            content = {"ask": ConfigRecord({"round": max(1, round)})}
            if common is not None:
                content["model"] = ArrayRecord(common)
            asked = [Message(RecordDict(dict(content)), node, "train") for node in nodes]
            replies = list(grid.send_and_receive(asked))
            if round == 0:
                continue
            arrived = {str(r.content["told"]["client"]): r for r in replies}
            common = clients.mean([dict(arrived[client].content["model"].to_torch_state_dict()) for client in order])
            losses.append(statistics.fmean(float(r.content["told"]["loss"]) for r in replies))
        outcome.append(Outcome(time.perf_counter() - started, losses))

    began = time.perf_counter()
    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(clients.members),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": actors}},
    )
    whole = time.perf_counter() - began
    if not outcome:
        raise SystemExit("the simulation ended without a result; see its log above")
    return replace(outcome[0], start=whole - outcome[0].seconds)


@dataclass(frozen=True)
class Actor:
    """What a process of Ray keeps between two messages."""

    clients: Clients
    model: OneByOne


_actors: dict[str, Actor] = {}


def actor(document: str) -> Actor:
    if document not in _actors:
        import tomllib

        torch.set_num_threads(1)
        settings = Recipe.parse(tomllib.loads(document))
        _actors[document] = Actor(Clients(settings), OneByOne(torch.device("cpu"), tuned=False, seed=settings.seed))
    return _actors[document]


def measure(arms: Mapping[str, Arm], repeats: int) -> dict[str, Any]:
    """Seconds, ratios to ours just before, losses."""
    found: dict[str, list[Outcome]] = {name: [] for name in arms}
    ratios: dict[str, list[float]] = {name: [] for name in arms if name != "ours"}
    for _ in range(repeats):
        for name, ratio in ratios.items():
            for turn in ("ours", name):
                found[turn].append(arms[turn]())
                print(f"{turn}: {found[turn][-1].seconds:.1f} s", file=sys.stderr, flush=True)
            ratio.append(found[name][-1].seconds / found["ours"][-1].seconds)
    return {
        name: {
            "seconds": spread([each.seconds for each in outcomes], 2),
            "times_ours": spread(ratios[name], 2) if name in ratios else None,
            "seconds_before_the_rounds": spread([each.start for each in outcomes], 2) if name == "flower" else None,
            "train_loss": [round(loss, 5) for loss in outcomes[-1].losses],
        }
        for name, outcomes in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=1000, help="examples of Banking77")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ray", action="store_true", help="also Flower's simulation engine")
    arguments = parser.parse_args()
    if arguments.ray and importlib.util.find_spec("ray") is None:
        raise SystemExit('--ray: Ray is not installed; pip install "flwr[simulation]"')
    torch.set_num_threads(arguments.threads)

    as_run, exact = (recipe(arguments.rounds, arguments.limit, dtype) for dtype in ("auto", "float32"))
    clients = Clients(exact)
    model = OneByOne(torch.device("cpu"), tuned=False, seed=exact.seed)
    arms: dict[str, Arm] = {
        "ours": lambda: ours(as_run),
        "ours, float32": lambda: ours(exact),
        "loop": lambda: loop(clients, model),
    }
    if arguments.ray:
        arms["flower"] = lambda: flower(exact, clients, arguments.threads)
    ours(recipe(1, arguments.limit, "auto"))  # warm
    prepared = prepare(as_run)
    document = {
        "clients": len(clients.members),
        "examples": sum(len(split.train) for split in clients.setup.data.splits.values()),
        "rounds": arguments.rounds,
        "environment": environment(torch.device("cpu"), prepared.task.backbone.dtype),
        "arms": measure(arms, arguments.repeats),
    }
    publish("engines", document)


if __name__ == "__main__":
    main()
