"""Write the tables in README.md and docs/*.md from benchmarks/results/*.json; no number in them is typed by hand.

python benchmarks/tables.py            # rewrite what stands between <!-- table:NAME --> and <!-- /table -->
python benchmarks/tables.py --check    # exit 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accuracy_tables
import condensed_tables
import depth_tables
import drift_tables
import entropy_tables
import experts_tables
import law_tables
import newcomers_tables
import poison_tables
import privacy_tables
import quality_tables
import serving_tables
import shots_tables
import task_tables
from table_parts import load, markdown

from folklora.federation.traffic import describe_methods
from folklora.report.tables import human_bytes

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def cohort() -> str:
    """Milliseconds a client-step and ratios against stock PEFT, by length and batch."""
    document = load("cohort")
    lines = []
    for cell in document["cells"]:
        ratios = [cell["times_faster_than"][rival] for rival in ("peft", "tuned")]
        ratio = [f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for r in ratios]
        ms = cell["ms_per_client_step"]["ours"]["median"]
        peak = f"{100 * cell['fraction_of_peak']['ours']['median']:.0f} %"
        shown = [str(cell["batch"]), f"{cell['tokens_per_client_step']:.0f}", str(cell["clients_side_by_side"])]
        lines.append([cell["lengths"], *shown, f"{ms:.1f}", *ratio, peak])
    header = [
        "texts",
        "batch",
        "tokens a client-step",
        "clients side by side",
        "ms a client-step",
        "times faster than stock PEFT",
        "than tuned PEFT",
        "of the bf16 peak",
    ]
    return markdown(header, lines)


def memory() -> str:
    """Peak memory above the backbone by number of clients."""
    found = load("memory")["above_backbone_bytes"]
    return markdown(
        ["clients", "peak memory above the backbone alone"], [[n, human_bytes(b)] for n, b in found.items()]
    )


def _measured(part: str, size: str) -> tuple[list[str], dict[tuple[int, Any], dict[str, dict[str, Any]]]]:
    """The processors that were measured, and (clients, ``size``) -> processor -> row of a part of ``server.json``."""
    processors = load("server")["processors"]
    rows: dict[tuple[int, Any], dict[str, dict[str, Any]]] = {}
    for processor, measured in processors.items():
        for row in measured[part]:
            rows.setdefault((row["clients"], row[size]), {})[processor] = row
    return list(processors), rows


def _taken(row: dict[str, Any] | None, key: str) -> str:
    return "-" if row is None or row[key] is None else _seconds(row[key])


def server() -> str:
    """A round's aggregation by number of clients, on every processor that was measured."""
    processors, rows = _measured("aggregation", "products")
    lines = []
    for (clients, products), found in rows.items():
        times = [_taken(found.get(name), "seconds") for name in processors]
        memory, error = (max(row[key] for row in found.values()) for key in ("peak_bytes", "error"))
        lines.append([f"{clients:,}", products, *times, human_bytes(memory), f"{error:.0e}"])
    mixes = [f"a round's mix, {_short(name)}" for name in processors]
    return markdown(["clients", "products in", *mixes, "peak memory of the process", "error"], lines, left=2)


def server_similarity() -> str:
    """The one-off comparison of data by number of clients, on every processor that was measured."""
    processors, rows = _measured("similarity", "components")
    kinds = {"exact transport": "exact_seconds", "embedding": "embedding_seconds"}
    lines = [
        [f"{clients:,}", str(components), *(_taken(found.get(n), key) for key in kinds.values() for n in processors)]
        for (clients, components), found in rows.items()
    ]
    header = [f"{kind}, {_short(name)}" for kind in kinds for name in processors]
    return markdown(["clients", "components a class", *header], lines, left=2)


def _short(processor: str) -> str:
    """A processor's name without its marks: the table's header is narrow."""
    return re.sub(r"\(R\)|\(TM\)| Processor", "", processor).strip()


def server_embedding() -> str:
    """How near the embeddings come to exact transport."""
    rows = load("server")["embedding"]
    keys = ("similarity_mean_error", "similarity_max_error", "weight_mean_relative_error", "weight_max_relative_error")
    lines = [
        [
            row["partition"],
            row["sketch"],
            row["embedding"],
            str(row["clients"]),
            f"{row['classes_per_client']:.1f}",
            f"{row['rank_correlation']:.3f}",
            *(f"{row[key]:.3f}" for key in keys),
        ]
        for row in rows
    ]
    header = [
        "partition",
        "sketch",
        "embedding",
        "clients",
        "classes a client",
        "rank correlation",
        "similarity: mean error",
        "largest",
        "weights: mean relative error",
        "largest",
    ]
    return markdown(header, lines, left=3)


def encrypted_bytes() -> str:
    """A round's messages of one client, encrypted and in the clear."""
    lines = [
        [
            str(r["rank"]),
            *(human_bytes(n) for n in (r["clear"], r["up"], r["down"], r["stock"]["up"], r["stock"]["down"])),
        ]
        for r in load("encrypted")["messages"]
    ]
    return markdown(["rank", "in the clear", "up", "down", "stock up", "stock down"], lines, left=0)


def encrypted() -> str:
    """The server's mix of ciphertexts, by rank and number of clients."""
    lines = [
        [
            str(r["rank"]),
            f"{r['clients']:,}",
            *(_seconds(r[f"seconds_{part}"]) for part in ("mix", "encrypt", "decrypt")),
            human_bytes(r["peak_bytes"] - r["peak_bytes_of_inputs"]),
            f"{r['error']:.0e}",
        ]
        for r in load("encrypted")["mixing"]
    ]
    header = ["rank", "clients", "mix", "a client encrypts", "decrypts", "memory of the mix", "largest error"]
    return markdown(header, lines, left=0)


def threats() -> str:
    """What the server sees with each method at its defaults: told by the methods themselves."""
    lines = [
        [m["name"], ", ".join(m["travels"]) or "nothing", m["once"] or "nothing", "yes" if m["global_model"] else "no"]
        for m in describe_methods(384, 384, 8)
    ]
    return markdown(["method", "the server sees, each round", "and once", "makes one model for all"], lines, left=4)


def engines() -> str:
    """Seconds of the same rounds by engine."""
    lines = []
    for name, arm in load("engines")["arms"].items():
        ratio, start = arm["times_ours"], arm["seconds_before_the_rounds"]
        lines.append(
            [
                name,
                f"{arm['seconds']['median']:.1f} s",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "1",
                f"{start['median']:.1f} s" if start else "-",
                f"{arm['train_loss'][-1]:.4f}",
            ]
        )
    return markdown(
        ["engine", "the rounds", "times ours", "start of the engine", "training loss of the last round"], lines
    )


def federation() -> str:
    """Bytes and seconds of runs over Flower, by method."""
    lines = []
    for row in load("federation")["rows"]:
        counted, wire, seconds = row["counted"], row["wire"], row["seconds_a_round"]
        lines.append(
            [
                row["method"],
                *(human_bytes(counted[way]) for way in ("up", "down")),
                *(human_bytes(wire[way]["median"]) for way in ("up", "down")),
                *(f"{seconds[engine]['median']:.1f} s" for engine in ("flower", "local")),
                *(f"{100 * row['accuracy'][engine]:.2f}" for engine in ("flower", "local")),
            ]
        )
    header = ["method", "counted up", "down", "on the wire up", "down", "a round", "locally", "accuracy", "locally"]
    return markdown(header, lines)


def federation_memory() -> str:
    """The highest resident set of each kind of process, over all methods."""
    highest: dict[str, int] = {}
    for row in load("federation")["rows"]:
        for role, size in row["memory"].items():
            highest[role] = max(highest.get(role, 0), size)
    return markdown(["process", "memory"], [[role, human_bytes(size)] for role, size in highest.items()])


def network() -> str:
    """The same run over a good link and a bad one."""
    lines = [
        [
            f"{run['delay_ms']:.0f} ms",
            f"{100 * run['loss']:g} %",
            f"{run['packets']:,}",
            str(run["packets_lost"]),
            ", ".join(f"{seconds:.1f} s" for seconds in run["seconds_a_round"]),
            str(sum(len(failed) for failed in run["failed"])),
            f"{100 * run['accuracy']:.2f}",
        ]
        for run in load("network")["runs"]
    ]
    return markdown(["delay", "loss", "packets", "lost", "rounds", "members that failed a round", "accuracy"], lines)


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    **accuracy_tables.TABLES,
    **task_tables.TABLES,
    **depth_tables.TABLES,
    **drift_tables.TABLES,
    **entropy_tables.TABLES,
    **experts_tables.TABLES,
    **privacy_tables.TABLES,
    **newcomers_tables.TABLES,
    **poison_tables.TABLES,
    **serving_tables.TABLES,
    **shots_tables.TABLES,
    **law_tables.TABLES,
    **quality_tables.TABLES,
    **condensed_tables.TABLES,
    "privacy-attacks": ("", privacy_tables.attacks),
    "cohort": ("cohort", cohort),
    "engines": ("engines", engines),
    "federation": ("federation", federation),
    "federation-memory": ("federation", federation_memory),
    "network": ("network", network),
    "memory": ("memory", memory),
    "server": ("server", server),
    "server-similarity": ("server", server_similarity),
    "server-embedding": ("server", server_embedding),
    "encrypted-bytes": ("encrypted", encrypted_bytes),
    "encrypted": ("encrypted", encrypted),
    "threats": ("", threats),
}
"""Marker -> the results it needs (or "": none), and what makes it."""


def fill(text: str) -> str:
    """A page with every table made anew; a table whose results are not there stays empty."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise SystemExit(f"no table is called {match[2]!r}; allowed: {', '.join(TABLES)}")
        results, table = TABLES[match[2]]
        return match[1] + (table() if not results or load(results) else "") + match[3]

    return MARKED.sub(made, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            stale.append(page.name)
            if not check:
                page.write_text(filled, encoding="utf-8")
    print(f"{'out of date' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}", file=sys.stderr)
    raise SystemExit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
