"""A federation over a bad network: every packet is 50 ms late, and one in a hundred is lost, in both directions.

    sudo python benchmarks/network.py [--delay 50] [--loss 1] [--rounds 2] [--method celora]

The server and the members live in two network namespaces (`ip netns`), which nothing joins but a link of this file: a
TUN device in each, and between them a loop that holds every packet back and drops some. (`tc netem` would do the same
where the kernel has it.) The link is drawn from a seed, but which packet meets which draw is up to the timing. The same
run over the same link without delay and loss comes first; both must end, with the same numbers.

It needs root and `/dev/net/tun`, so it is no test of the suite.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import environment, publish
from federation import MEMBERS, child, members, recipe, told

from folklora.federation.flower.credentials import init

SERVER, MEMBER = "10.77.0.1", "10.77.0.2"
PORT = 9443
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
LONGEST = 2000
"""Bytes of a packet, and more than any has on a link of 1500."""


class Link:
    """Two TUN devices and what lies between them.

    Parameters
    ----------
    delay
        Seconds that every packet is held back.
    loss
        The share of packets that never arrive.
    """

    def __init__(self, names: tuple[str, str], delay: float, loss: float) -> None:
        self.ends = [device(name) for name in names]
        self.delay, self.loss = delay, loss
        self.carried = self.lost = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._carry, daemon=True)

    def _carry(self) -> None:
        rng = random.Random(0)
        waiting: list[tuple[float, int, int, bytes]] = []
        while not self.over.is_set():
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            for end in select.select(self.ends, [], [], pause)[0]:
                packet = os.read(end, LONGEST)
                if rng.random() < self.loss:
                    self.lost += 1
                    continue
                self.carried += 1
                other = self.ends[1 - self.ends.index(end)]
                heapq.heappush(waiting, (time.monotonic() + self.delay, self.carried, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, other, packet = heapq.heappop(waiting)
                os.write(other, packet)

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        for end in self.ends:
            os.close(end)


def device(name: str) -> int:
    """A TUN device; it lives as long as the file that is returned is open, whatever namespace it is in."""
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return end


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def link(delay: float, loss: float) -> Iterator[tuple[Link, str, str]]:
    """Two namespaces and the link between them; their names."""
    tag = os.getpid()
    spaces, names = (f"folk-server-{tag}", f"folk-members-{tag}"), (f"folks{tag}", f"folkm{tag}")
    made = Link(names, delay, loss)
    try:
        for space, name, own, other in zip(spaces, names, (SERVER, MEMBER), (MEMBER, SERVER), strict=True):
            ip("netns", "add", space)
            ip("link", "set", name, "netns", space)
            ip("-n", space, "addr", "add", own, "peer", other, "dev", name)
            ip("-n", space, "link", "set", name, "up")
            ip("-n", space, "link", "set", "lo", "up")
        made.thread.start()
        yield made, *spaces
        made.close()
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, stderr=subprocess.DEVNULL)


def federated(method: str, rounds: int, delay: float, loss: float, threads: int) -> dict[str, Any]:
    """One run over a link; what it says of itself, and what the link did."""
    with tempfile.TemporaryDirectory() as name, link(delay, loss) as (between, server_space, member_space):
        folder = Path(name)
        init(folder / "federation", MEMBERS, SERVER, PORT)
        (folder / "recipe.toml").write_text(recipe(method, rounds).to_toml(), encoding="utf-8")
        serve = ["serve", str(folder / "recipe.toml"), "--out", str(folder / "run"), "--host", SERVER]
        there, here = ["ip", "netns", "exec", server_space], ["ip", "netns", "exec", member_space]
        with (
            child([*serve, "--federation", str(folder / "federation")], folder / "serve.log", threads, there) as server,
            members(folder, threads, here),
        ):
            server.wait()
        if server.returncode:
            raise SystemExit(f"the server ended with {server.returncode}:\n{(folder / 'serve.log').read_text()}")
        found = told(folder / "run")
        return {
            "delay_ms": 1e3 * delay,
            "loss": loss,
            "packets": between.carried,
            "packets_lost": between.lost,
            "seconds_a_round": [round(seconds, 2) for seconds in found["seconds"]],
            "failed": found["failed"],
            "accuracy": found["accuracy"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="celora")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--delay", type=float, default=50.0, help="milliseconds, each way")
    parser.add_argument("--loss", type=float, default=1.0, help="per cent of the packets")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        raise SystemExit("network namespaces need root, and this link /dev/net/tun")
    runs = []
    for delay, loss in ((0.0, 0.0), (arguments.delay / 1e3, arguments.loss / 100)):
        runs.append(federated(arguments.method, arguments.rounds, delay, loss, arguments.threads))
        print(runs[-1], file=sys.stderr, flush=True)
    where = environment(torch.device("cpu"), torch.float32)
    publish("network", {"environment": where, "members": len(MEMBERS), "method": arguments.method, "runs": runs})


if __name__ == "__main__":
    main()
