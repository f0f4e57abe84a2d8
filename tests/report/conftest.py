"""Synthetic run directories, written as docs/architecture.md describes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from folklora.report.page import write_compare_report, write_report

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
NASTY = ("<script>alert(1)</script>", "$x_1$ & co", "Übersee")
SHAPE = {  # method: last accuracy, bytes up a client and round, bytes once
    "celora": (0.77, 3_400, 461_000),
    "fedit": (0.71, 295_000, 0),
    "local": (0.66, 0, 0),
    "ffa-lora": (0.695, 147_000, 0),
    "rolora": (0.712, 148_000, 0),
    "sketch": (0.60, 0, 461_000),
}


def _write_run(
    path: Path,
    method: str = "celora",
    seed: int = 0,
    *,
    clients: Sequence[str] = tuple("0123456789"),
    classes: int = 77,
    rounds: int = 10,
    finished: bool = True,
    insight: bool = True,
    counts: bool = True,
    every: int = 1,
    class_name: str = "class {}",
    stopped_early: bool = False,
    loss: bool = False,
) -> dict[str, Any]:
    """Write a run directory; returns the compare row. Where it is judged by its ``loss``, less is better."""
    generator = np.random.default_rng([seed, len(clients), *method.encode()])
    path.mkdir(parents=True)
    final, up, once = SHAPE.get(method, (0.7, 100_000, 0))
    (path / "recipe.toml").write_text(
        f'seed = {seed}\n\n[model]\nname = "minilm"\ntask = "classification"\n\n[data]\nsource = "banking77"\n'
        f'clients = {len(clients)}\npartition = "dirichlet"\nalpha = 0.5\n\n[adapter]\nrank = 8\n\n'
        f'[method]\nname = "{method}"\n\n[train]\nrounds = {rounds}\nlr = 0.001\n'
    )
    share = generator.dirichlet(np.full(len(clients), 0.5), size=classes).T
    table = generator.poisson(share * 90)
    table[:, 0] += 3
    sizes = table.sum(axis=1)
    partition: dict[str, Any] = {"fingerprint": "f" * 64, "classes": [class_name.format(c) for c in range(classes)]}
    start, partition["clients"] = 0, {}
    for client, size in zip(clients, sizes.tolist(), strict=True):
        ends = np.cumsum([start, size, size // 7 + 1, size // 4 + 1]).tolist()
        partition["clients"][client] = {
            split: list(range(ends[i], ends[i + 1])) for i, split in enumerate(("train", "validation", "test"))
        }
        start = ends[-1]
    if counts:
        partition["counts"] = {client: row.tolist() for client, row in zip(clients, table, strict=True)}
    (path / "partition.json").write_text(json.dumps(partition))

    skill = generator.normal(0, 0.05, len(clients))
    lines = [_round(0, clients, up=once * len(clients), down=0, seconds={"sketch": 1.2})]
    for number in range(1, rounds + 1):
        level = final * (1 - 0.75 * np.exp(-number / 2.2)) + generator.normal(0, 0.006)
        each = np.clip(level + skill + generator.normal(0, 0.012, len(clients)), 0.01, 0.99)
        line = _round(number, clients, up=up * len(clients), down=up * len(clients))
        if number % every == 0:
            line["validation"] = _spread(dict(zip(clients, each.tolist(), strict=True)), loss)
        line["train_loss"] = 4.2 * float(np.exp(-number / 3)) + 0.3
        line["seconds"] = {
            "train": 4 + float(generator.random()),
            "aggregate": 0.05,
            "evaluate": 0.8 * (number % every == 0),
            "checkpoint": 0.1,
        }
        if number in (3, 7) and len(clients) > 2:
            line["participants"] = list(clients[:-1])
            line["failed"] = {clients[-1]: "dropped out (simulated)"}
        lines.append(line)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    if insight:
        similarity = np.clip(np.corrcoef(share + 0.02) * 0.4 + 0.5, 0, 1) if len(clients) > 1 else np.ones((1, 1))
        noisy = np.clip(similarity + generator.normal(0, 0.05, similarity.shape), 0, 1)
        weights = np.exp(6 * similarity)
        tensors = {
            "similarity/data": similarity,
            "similarity/model": noisy,
            "similarity/mixed": (similarity + noisy) / 2,
            "weights": weights / weights.sum(axis=1, keepdims=True),
        }
        save_file({k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()}, path / "insight.safetensors")

    test = np.clip(final + skill + generator.normal(0, 0.01, len(clients)), 0, 1)
    row: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "accuracy_mean": float(test.mean()),
        "accuracy_std_clients": float(test.std()),
        "accuracy_worst_tenth": float(test.min()),
        "accuracy_weighted": float(np.average(test, weights=sizes)),
        "accuracy_tuned_mean": float(test.mean() + 0.011),
        "accuracy_chosen_mean": float(test.mean() + 0.013),
        "accuracy_global": float(test.mean() - 0.05) if method == "fedit" else None,
        "bytes_up_per_client_round": float(up),
        "bytes_down_per_client_round": float(up),
        "bytes_once_per_client": float(once),
        "rounds": rounds,
        "seconds_train": 41.0 + seed,
        "seconds_total": 60.0 + seed,
        "aggregation_error": 0.12 if method == "fedit" else None,
    }
    results: dict[str, Any] = {
        client: {
            "accuracy": float(value),
            "accuracy_tuned": float(value) + 0.011,
            "accuracy_chosen": float(value) + 0.013,
            "examples": {split: len(part) for split, part in partition["clients"][client].items()},
        }
        for client, value in zip(clients, test, strict=True)
    }
    if loss:
        row, results = _as_losses(row, results)
    if finished:
        environment = {"folklora": "0.1.0", "torch": "2.13.0", "device": "cpu", "dtype": "bfloat16", "threads": 2}
        summary = {"row": row, "clients": results, "stopped_early": stopped_early, "environment": environment}
        (path / "summary.json").write_text(json.dumps(summary))
    return row


def _write_comparison(
    path: Path, variants: Sequence[str] = tuple(SHAPE), seeds: int = 3, **options: Any
) -> list[dict[str, Any]]:
    """Write a folder of compared runs, as `compare` does; ``sketch`` has no rounds. Returns the rows."""
    rows, names = [], []
    for variant in variants:
        method = variant.partition(":")[0]
        for seed in range(seeds):
            names.append(f"{variant.replace(':', '__')}-s{seed}")
            here = {**options, "rounds": 0} if method == "sketch" else options
            rows.append({**_write_run(path / names[-1], method, seed, **here), "variant": variant})
    (path / "compare.json").write_text(json.dumps({"rows": rows, "runs": names}))
    return rows


def _round(
    number: int, clients: Sequence[str], up: int, down: int, seconds: dict[str, float] | None = None
) -> dict[str, Any]:
    return {
        "round": number,
        "participants": list(clients) if number else [],
        "failed": {},
        "train_loss": None,
        "validation": None,
        "bytes_up": up,
        "bytes_down": down,
        "bytes_up_clients": {client: up // len(clients) for client in clients} if up else {},
        "bytes_down_clients": {client: down // len(clients) for client in clients} if down else {},
        "aggregation_error": None,
        "seconds": seconds or {},
    }


def _spread(each: dict[str, float], loss: bool = False) -> dict[str, Any]:
    if loss:
        each = {client: _nats(value) for client, value in each.items()}
    values = np.array(list(each.values()))
    worst_first = np.sort(values)[::-1] if loss else np.sort(values)
    found = {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "worst_tenth": float(worst_first[: max(1, len(values) // 10)].mean()),
        "weighted": float(values.mean()),
        "clients": each,
    }
    judged = {"metric": "loss", "higher": False, "beside": {"perplexity": float(np.exp(values).mean())}}
    return {**judged, **found} if loss else found


def _nats(accuracy: float) -> float:
    """A loss that is the smaller, the better."""
    return 3 * (1 - accuracy)


def _as_losses(row: dict[str, Any], results: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same run judged by its loss; the best client stays the best, the worst the worst."""
    results = {
        client: {name.replace("accuracy", "loss"): v if name == "examples" else _nats(v) for name, v in told.items()}
        for client, told in results.items()
    }
    for told in results.values():
        told["perplexity"] = float(np.exp(told["loss"]))
    scale = {"accuracy_std_clients": lambda value: 3 * value}
    row = {
        name.replace("accuracy", "loss"): scale.get(name, _nats)(value)
        if name.startswith("accuracy") and value is not None
        else value
        for name, value in row.items()
    }
    perplexity = float(np.mean([told["perplexity"] for told in results.values()]))
    return {**row, "metric": "loss", "higher": False, "perplexity_mean": perplexity}, results


@pytest.fixture(scope="session")
def write_run() -> Callable[..., dict[str, Any]]:
    """The function that writes one run directory; returns its compare row."""
    return _write_run


@pytest.fixture(scope="session")
def write_comparison() -> Callable[..., list[dict[str, Any]]]:
    """The function that writes a folder of compared runs; returns the rows."""
    return _write_comparison


@pytest.fixture(scope="session")
def ten_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 clients, 77 classes, finished, with insights, and its report."""
    path = tmp_path_factory.mktemp("report") / "celora-s0"
    _write_run(path)
    write_report(path)
    return path


@pytest.fixture(scope="session")
def three_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 clients with names that would break a careless page, 3 classes, and its report."""
    path = tmp_path_factory.mktemp("report") / "fedit-s0"
    _write_run(path, "fedit", clients=NASTY, classes=3, class_name='<img src="https://example.org/{}">')
    write_report(path)
    return path


@pytest.fixture(scope="session")
def losses(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """6 methods x 2 seeds, 5 clients, judged by their loss, and the reports of all and of the first."""
    path = tmp_path_factory.mktemp("report") / "losses"
    rows = _write_comparison(path, seeds=2, clients=[f"site {i}" for i in range(5)], classes=5, rounds=6, loss=True)
    write_compare_report(path)
    write_report(path / "celora-s0")
    return path, rows


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """6 methods x 3 seeds, 5 clients, 5 classes, and its report."""
    path = tmp_path_factory.mktemp("report") / "compare"
    rows = _write_comparison(path, clients=[f"bank {i}" for i in range(5)], classes=5, rounds=6)
    write_compare_report(path)
    return path, rows


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    yield driver
    driver.quit()
