"""What a federation over Flower costs beside the local engine: bytes on the wire, seconds a round, memory.

    python benchmarks/federation.py [--methods local,celora,fedit] [--rounds 3] [--repeats 1] [--threads 1]

Real processes on this machine: `folklora serve`, three times `folklora join`, TLS and members' keys, MiniLM in float32,
a share of Banking77 each. Members dial a relay of this file that passes bytes on to the server and counts them: what it
counts is all that TCP carries, TLS records, HTTP headers, polling and heartbeats included. Beside it stands what a run
reports of itself: encoded messages. ``local`` sends no message at all, so its row is what Flower, TLS and our orders
cost, and it grows with the time that a run takes.

Seconds a round are those of the run's own metrics lines in both engines, but for the first round, which holds what is
done once, such as loading data; the local engine's are taken just before. Memory is the highest resident set of each
process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import environment, publish, spread

from folklora.federation.flower.credentials import init
from folklora.federation.flower.processes import free_port
from folklora.federation.run import run
from folklora.federation.rundir import RunDirectory
from folklora.recipe import Recipe

MEMBERS = ["0", "1", "2"]
FOLKLORA = [sys.executable, "-m", "folklora.cli"]
PIECE = 1 << 16


class Relay(socketserver.ThreadingTCPServer):
    """Passes TCP connections on to another port of this machine, and counts."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.upstream = upstream
        self.counted = {"up": 0, "down": 0}
        self.lock = threading.Lock()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def add(self, way: str, count: int) -> None:
        with self.lock:
            self.counted[way] += count


class _Passing(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        try:
            onward = socket.create_connection(("127.0.0.1", self.server.upstream))
        except OSError:  # the server is not there yet: the member dials again
            return
        with onward:
            back = threading.Thread(target=self._pass, args=(onward, self.request, "down"), daemon=True)
            back.start()
            self._pass(self.request, onward, "up")
            back.join()

    def _pass(self, source: socket.socket, target: socket.socket, way: str) -> None:
        try:
            while piece := source.recv(PIECE):
                target.sendall(piece)
                self.server.add(way, len(piece))
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one end hung up


def recipe(method: str, rounds: int) -> Recipe:
    data = {"clients": len(MEMBERS), "partition": "dirichlet", "alpha": 0.5, "limit": 600, "test_limit": 100}
    train = {"rounds": rounds, "batch_size": 16, "lr": 5e-3}
    document = {"data": data, "train": train, "method": {"name": method}, "model": {"dtype": "float32"}}
    return Recipe.parse(document)


@contextmanager
def child(
    command: Sequence[str], log: Path, threads: int, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours, ended as Ctrl-C ends it; ``before``: what it is run by, such as `ip netns exec`."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with log.open("wb") as file:
        whole = [*before, *FOLKLORA, *command]
        process = subprocess.Popen(whole, stdout=file, stderr=file, env={**os.environ, **limits})
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def over_flower(settings: Recipe, folder: Path, threads: int) -> dict[str, Any]:
    """One run over the network; its metrics, what the relay counted, the memory of each process."""
    port = free_port()
    with Relay(port) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        init(folder / "federation", MEMBERS, "127.0.0.1", relay.port)
        (folder / "recipe.toml").write_text(settings.to_toml(), encoding="utf-8")
        serve = ["serve", str(folder / "recipe.toml"), "--out", str(folder / "run"), "--port", str(port)]
        with (
            child([*serve, "--federation", str(folder / "federation")], folder / "serve.log", threads) as server,
            members(folder, threads) as joined,
        ):
            memory = watched(server, joined)
        relay.shutdown()
    if server.returncode:
        raise SystemExit(f"the server ended with {server.returncode}:\n{(folder / 'serve.log').read_text()}")
    return {"wire": dict(relay.counted), "memory": memory, **told(folder / "run")}


@contextmanager
def members(folder: Path, threads: int, before: Sequence[str] = ()) -> Iterator[list[subprocess.Popen[bytes]]]:
    """All members of the federation in ``folder``, with their shares of Banking77."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                child(
                    ["join", "--federation", str(folder / "federation"), "--member", name],
                    folder / f"{name}.log",
                    threads,
                    before,
                )
            )
            for name in MEMBERS
        ]


def watched(server: subprocess.Popen[bytes], members: Sequence[subprocess.Popen[bytes]]) -> dict[str, int]:
    """Wait for the server's end; the highest resident set of each kind of process until then."""
    highest: dict[str, int] = {}
    while True:
        for kind, processes in (("server", [server]), ("member", members)):
            for process in processes:
                for role, pid in (kind, process.pid), *((f"{kind}'s Flower process", c) for c in children(process.pid)):
                    highest[role] = max(highest.get(role, 0), resident(pid))
        try:
            server.wait(0.5)
            return highest
        except subprocess.TimeoutExpired:
            continue


def children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def resident(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
    except OSError:
        return 0


def told(path: Path) -> dict[str, Any]:
    """What a run says of itself: bytes in all, seconds of each round, accuracy, who failed in each and why."""
    lines = RunDirectory.open(path).metrics()
    row = json.loads((path / "summary.json").read_text(encoding="utf-8"))["row"]
    turns = max(1, sum(len(line["participants"]) + len(line["failed"]) for line in lines[1:]))
    up = sum(line["bytes_up"] for line in lines)
    down = lines[0]["bytes_down"] + row["bytes_down_per_client_round"] * turns  # the final reply included
    seconds = [sum(line["seconds"].values()) for line in lines[1:]]
    return {
        "counted": {"up": up, "down": round(down)},
        "seconds": seconds,
        "accuracy": row["accuracy_mean"],
        "failed": [line["failed"] for line in lines],
    }


def measured(method: str, rounds: int, repeats: int, threads: int) -> dict[str, Any]:
    settings = recipe(method, rounds)
    local, flower = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            run(settings, Path(folder) / "local")
            local.append(told(Path(folder) / "local"))
            flower.append(over_flower(settings, Path(folder), threads))
        print(f"{method}: {flower[-1]}", file=sys.stderr, flush=True)
    return {
        "method": method,
        "counted": flower[-1]["counted"],
        "wire": {way: spread([each["wire"][way] for each in flower], 2) for way in ("up", "down")},
        "seconds_a_round": {
            "local": spread([s for each in local for s in each["seconds"][1:]], 2),
            "flower": spread([s for each in flower for s in each["seconds"][1:]], 2),
        },
        "memory": highest([each["memory"] for each in flower]),
        "accuracy": {"local": local[-1]["accuracy"], "flower": flower[-1]["accuracy"]},
    }


def highest(found: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {role: max(each.get(role, 0) for each in found) for role in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="local,celora,folklora,fedit,flora")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        measured(method, arguments.rounds, arguments.repeats, arguments.threads)
        for method in arguments.methods.split(",")
    ]
    where = environment(torch.device("cpu"), torch.float32)
    publish("federation", {"environment": where, "members": len(MEMBERS), "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
