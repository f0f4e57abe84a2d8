"""What the benchmarks share: what they ran on, and where their figures go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import peft
import torch
import transformers

import folklora

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, processor and threads: figures without them mean little."""
    return {
        "folklora": folklora.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }


def publish(name: str, document: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json`` and print the same as one line; returns the file."""
    path = store(name, document, RESULTS)
    print(json.dumps({"benchmark": name, **document}, allow_nan=False), flush=True)
    return path


def store(name: str, document: Mapping[str, Any], results: Path) -> Path:
    """Write ``<results>/<name>.json``, whole or not at all; returns the file."""
    results.mkdir(exist_ok=True)
    path = results / f"{name}.json"
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return part.replace(path)


def finish(name: str, left: Sequence[str], failed: Mapping[str, str], *, listed: bool) -> NoReturn:
    """End a harness: what is left (if that was asked for), what failed and why, and one line for programs."""
    for label in left if listed else ():
        print(f"left: {label}", file=sys.stderr)
    for label, reason in failed.items():
        print(f"failed: {label}: {reason}", file=sys.stderr)
    print(json.dumps({"benchmark": name, "left": len(left), "failed": len(failed)}))
    raise SystemExit(1 if failed else 0)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median and range, rounded."""
    return {key: round(f(values), digits) for key, f in (("median", statistics.median), ("min", min), ("max", max))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
