"""Peak resident memory of whole processes, each started for that alone: a round of FedIT with a number of clients.

    python benchmarks/memory.py [--clients 10,100,1000] [--threads 2] [--device cpu]

FedIT's clients own most: A, B and a head each, and all of it travels. Each count is a child process of this file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import environment, publish

from folklora.backbones.backbone import Backbone
from folklora.federation.run import run
from folklora.recipe import Recipe


def measure(counts: Sequence[int], device: str, threads: int) -> dict[str, Any]:
    """Peaks above a process that only loads the backbone, and what a client more costs."""
    peaks = {clients: _peak_of_child(clients, device, threads) for clients in (0, *counts)}
    baseline, few, many = peaks.pop(0), min(counts), max(counts)
    return {
        "backbone_only_bytes": baseline,
        "above_backbone_bytes": {str(clients): peak - baseline for clients, peak in peaks.items()},
        "bytes_per_extra_client": round((peaks[many] - peaks[few]) / (many - few)),
    }


def _peak_of_child(clients: int, device: str, threads: int) -> int:
    print(f"memory, {clients} clients", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--child", str(clients), "--device", device, "--threads", str(threads)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(json.loads(output)["peak_bytes"])


def _child(clients: int, device: str) -> None:
    if clients:
        # Four examples a client: two to train on, one to validate, one to test.
        data = {"clients": clients, "partition": "iid", "limit": max(4 * clients, 160), "min_examples": 3}
        document = {"data": data, "train": {"rounds": 1}, "method": {"name": "fedit"}, "model": {"device": device}}
        with tempfile.TemporaryDirectory() as folder:
            run(Recipe.parse(document), Path(folder) / "run")
    else:
        Backbone.load("minilm", device=device)
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    high_water = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"peak_bytes": 1024 * high_water}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="10,100,1000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--child", type=int, help="measure this process with so many clients")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child is not None:
        _child(arguments.child, arguments.device)
        return
    counts = [int(count) for count in arguments.clients.split(",")]
    where = environment(torch.device(arguments.device), torch.float32)
    publish("memory", {"environment": where, **measure(counts, arguments.device, arguments.threads)})


if __name__ == "__main__":
    main()
