"""What it costs to mix cores that the server cannot read: bytes, seconds, memory, and digits lost.

    python benchmarks/encrypted.py [--quick]      # some minutes; --quick a few seconds

For each rank and number of clients a process of its own, so that its peak of memory is its own: every client encrypts
the cores of 12 modules, the server makes a row of weights for each out of a made-up similarity and mixes, and some
clients decrypt. *Error*: the largest difference to the same sums in float64. *Bytes*: of whole messages, as counted in
a run; beside them the same cores in the clear, and as TenSEAL's own vectors under the parameters of its tutorials
(degree 8192, moduli of 60, 40 and 60 bits), encrypted and mixed, with their error and the seconds of one row of ten.
*Seconds* are a processor's, in one thread: other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from folklora.federation.codec import encode
from folklora.methods.contract import Message
from folklora.privacy.ciphertexts import BITS, DEGREE, ciphertexts, mix
from folklora.privacy.ckks import Key

MODULES = 12
RANKS, COUNTS = (8, 16, 32), (10, 100, 1000)
DECRYPTED = 10
TEMPERATURE = 0.5
STOCK = 10


def mixing(ranks: Sequence[int], counts: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for rank in ranks:
        for clients in counts:
            print(f"rank {rank}, {clients} clients", file=sys.stderr, flush=True)
            child = ["--child", str(rank), str(clients)]
            done = subprocess.run([sys.executable, __file__, *child], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
    return rows


def made_up(rank: int, clients: int) -> tuple[np.ndarray, np.ndarray]:
    """Cores near the identity, as CE-LoRA's are, flattened; and rows of weights, a softmax of similarities."""
    random = np.random.default_rng(1000 * rank + clients)
    cores = np.tile(np.eye(rank), (clients, MODULES, 1, 1)) + 0.3 * random.normal(size=(clients, MODULES, rank, rank))
    similarity = random.random((clients, clients))
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1.0)
    weights = np.exp((similarity - 1) / TEMPERATURE)
    return cores.reshape(clients, -1), weights / weights.sum(1, keepdims=True)


def _child(rank: int, clients: int) -> dict[str, Any]:
    cores, weights = made_up(rank, clients)
    key = Key.new()
    start = time.process_time()
    uploads = [key.encrypt(each) for each in cores]
    encrypting = (time.process_time() - start) / clients
    before = _peak()
    start = time.process_time()
    mixed = mix(uploads, weights)
    seconds = time.process_time() - start
    peak = _peak()
    some = np.unique(np.linspace(0, clients - 1, DECRYPTED).astype(int))
    start = time.process_time()
    found = np.stack([key.decrypt(mixed.row(i)) for i in some])
    decrypting = (time.process_time() - start) / len(some)
    return {
        "rank": rank,
        "clients": clients,
        "numbers": cores.shape[1],
        "ciphertexts": ciphertexts(cores.shape[1]),
        "error": float(f"{np.abs(found - weights[some] @ cores).max():.2e}"),
        "seconds_mix": round(seconds, 4),
        "seconds_encrypt": round(encrypting, 5),
        "seconds_decrypt": round(decrypting, 5),
        "peak_bytes": peak,
        "peak_bytes_of_inputs": before,
    }


def message_bytes(ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Of whole messages, one round; in the clear, float32, both ways are the same but for the number of examples."""
    from folklora.federation.sealing import Sealing

    rows = []
    for rank in ranks:
        message = Message({f"C/layer.{i}": torch.zeros(rank, rank) for i in range(MODULES)}, {"examples": 1.0})
        sealing = Sealing(cast("Any", None))  # sizes follow from the shapes alone
        clear, stock = len(encode(message)), stock_vectors(rank)
        rows.append({"rank": rank, "clear": clear, "up": sealing.bytes_up(message), "down": sealing.bytes_down(message),
                     "stock": stock})  # fmt: skip
    return rows


def stock_vectors(rank: int) -> dict[str, Any]:
    """The same with TenSEAL's `ckks_vector`: one row of weights over ten clients."""
    import tenseal as ts

    cores, weights = made_up(rank, STOCK)
    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, -1, [60, 40, 60])
    context.global_scale = 2.0**40
    uploads = [ts.ckks_vector(context, each.tolist()) for each in cores]
    start = time.process_time()
    total = uploads[0] * float(weights[0, 0])
    for upload, weight in zip(uploads[1:], weights[0, 1:], strict=True):
        total += upload * float(weight)
    seconds = time.process_time() - start
    error = np.abs(np.array(total.decrypt()) - weights[0] @ cores).max()
    return {
        "up": len(uploads[0].serialize()),
        "down": len(total.serialize()),
        "seconds_row": round(seconds, 4),
        "error": float(f"{error:.2e}"),
    }


def _peak() -> int:
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few clients; prints, and writes nothing")
    parser.add_argument("--child", type=int, nargs=2, help="measure one rank and number of clients in this process")
    arguments = parser.parse_args()
    if arguments.child is not None:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):
            print(json.dumps(_child(*arguments.child)))
        return
    from _common import environment, publish

    ranks, counts = ((8,), (10, 50)) if arguments.quick else (RANKS, COUNTS)
    document = {
        "environment": {**environment(torch.device("cpu"), torch.float64), "threads": 1},
        "setup": {
            "modules": MODULES,
            "degree": DEGREE,
            "modulus_bits": BITS,
            "security_bits": 128,
        },
        "messages": message_bytes(ranks),
        "mixing": mixing(ranks, counts),
    }
    if arguments.quick:
        print(json.dumps(document, indent=1))
    else:
        publish("encrypted", document)


if __name__ == "__main__":
    main()
