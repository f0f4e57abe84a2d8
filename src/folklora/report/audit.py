"""`folklora audit`: one page that a privacy officer reads, from a run directory alone, and the same as JSON.

What left each client and what stayed, what attacks on record recovered, the epsilon spent, the encryption and the rules
against liars in force, and what is not protected. Nothing is judged here that the facts do not show; the page is made
of the document and of nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from folklora.errors import FolkLoraError
from folklora.report.attacked import AttackRecord, Measured, cut
from folklora.report.facts import Facts
from folklora.report.figures_audit import AUDIT_PICTURES
from folklora.report.findings import WEIGHTS, findings
from folklora.report.inventory import (
    MOST_CLIENTS,
    in_one_sentence,
    newcomers_bytes,
    reported,
    sent,
    stayed,
    traffic,
)
from folklora.report.measures import measure
from folklora.report.protections import encryption, epsilon, robustness
from folklora.report.render import Image, draw, fill, replace_file
from folklora.report.style import short

Document = dict[str, Any]

JSON, PAGE = "audit.json", "audit.html"
MOST_ATTACKS = 12
MOST_EXAMPLES = 3
"""Victims of an attack that are shown, and examples of a victim."""

KNOWLEDGE = {
    "labels": "the labels of the examples",
    "lengths": "how many tokens each text has",
    "bases": "the client's private factors",
    "rehearsed": "what private factors look like after training on public examples",
}


def audit(path: str | Path) -> Document:
    """Audit a run, finished or not: write ``audit.json``, ``audit.html`` and the figure; returns the document.

    Raises
    ------
    FolkLoraError
        The folder is no run directory, one of its files is not what it should be, or nothing can be written there.
    """
    return write_audit(Facts.of(path))[0]


def write_audit(facts: Facts) -> tuple[Document, list[Image]]:
    """`audit`, and the pictures for whoever shows them too."""
    path, document = facts.run.path, document_of(facts)
    images = draw(document, path / "figures", AUDIT_PICTURES)
    replace_file(path / JSON, json.dumps(document, indent=1, allow_nan=False).encode())
    fill(path / PAGE, "audit.html.j2", audit=document, images=images)
    return document, images


def try_audit(path: str | Path) -> tuple[Document | None, list[Image], str]:
    """For a report, which a run's audit must not keep from being written: (None, [], why) where it cannot be."""
    try:
        return (*write_audit(Facts.of(path)), "")
    except FolkLoraError as error:
        return None, [], str(error)


def document_of(facts: Facts) -> Document:
    """All that the page says, as plain data."""
    run, method = facts.run, facts.method
    lines = sent(facts)
    found = findings(facts)
    counts: dict[str, int] = {weight: sum(finding.weight == weight for finding in found) for weight in WEIGHTS}
    spent, secured = epsilon(facts), encryption(facts)
    told = attacks(facts)
    return {
        "schema": 1,
        "run": {
            "name": run.path.resolve().name,
            "method": method.name,
            "title": method.title,
            "engine": "simulation" if facts.simulated else "network",
            "finished": run.finished,
            "rounds": len(run.rounds),
            "planned": method.rounds(),
            "clients": len(run.clients),
            "seed": facts.recipe.seed,
            "shapes_known": facts.known,
        },
        "summary": [
            {"about": "Left the clients", "says": in_one_sentence(facts, lines)},
            {"about": "Recovered", "says": told["says"]},
            {"about": "Promised", "says": spent["says"]},
            {"about": "Encrypted", "says": secured["says"]},
            {"about": "Not protected", "says": _counted(counts)},
        ],
        "left": {
            "lines": [asdict(line) for line in lines],
            "reported": [asdict(line) for line in reported(facts)],
            "up": sum(line.bytes_up for line in run.lines) + newcomers_bytes(facts)[0],
            "down": sum(line.bytes_down for line in run.lines) + newcomers_bytes(facts)[1],
            "newcomers": len(run.newcomers),
            "clients": [asdict(line) for line in traffic(facts)],
            "clients_not_listed": max(0, len(run.clients) - MOST_CLIENTS),
        },
        "stayed": [asdict(line) for line in stayed(facts)],
        "owned": _owned(facts),
        "attacks": told,
        "epsilon": spent,
        "encryption": secured,
        "robustness": robustness(facts),
        "findings": [asdict(finding) for finding in found],
        "weights": dict(WEIGHTS),
    }


def _counted(counts: Mapping[str, int]) -> str:
    some = [f"{count} of {weight} weight" for weight, count in counts.items() if count]
    return f"{sum(counts.values())} things: {', '.join(some)}."


def _owned(facts: Facts) -> list[Document]:
    """Numbers of each kind that the client with the largest rank has, and whether they leave; for the picture."""
    if not facts.known:
        return []
    numbers: dict[str, int] = {}
    for name, shape in facts.owned.items():
        size = 1
        for side in shape:
            size *= side
        numbers[name.partition("/")[0]] = numbers.get(name.partition("/")[0], 0) + size
    return [{"kind": kind, "numbers": count, "leaves": kind in facts.kinds} for kind, count in numbers.items()]


# -- attacks -------------------------------------------------------------------------------------------------------


def attacks(facts: Facts) -> Document:
    """What attacks on record recovered, the strongest first."""
    records = facts.attacks[:MOST_ATTACKS]
    if not records:
        return {
            "says": "No attack has been run on this run, so what its messages give away is not known. "
            "To measure it: folklora attack RUN --attack NAME.",
            "results": [],
            "not_shown": 0,
        }
    first, many = records[0], len(facts.attacks)
    which = "The one attack" if many == 1 else f"The strongest of {many} attacks"
    return {
        "says": f"{which} on record, {first.name}, {first.came_to}.",
        "results": [_result(record) for record in records],
        "not_shown": len(facts.attacks) - len(records),
    }


def _result(record: AttackRecord) -> Document:
    told = [words for key, words in KNOWLEDGE.items() if record.knowledge.get(key) is True]
    kept = [words for key, words in KNOWLEDGE.items() if record.knowledge.get(key) is False and key != "rehearsed"]
    prior = record.knowledge.get("prior")
    return {
        "attack": record.attack,
        "title": record.name,
        "variant": cut(record.variant or record.method),
        "view": "What was really sent."
        if record.view == "sent"
        else "An upper bound: the exact gradient of one step, which nobody sent.",
        "setting": f"{record.batch} example{'s' * (record.batch != 1)} a batch, {record.steps} local "
        f"step{'s' * (record.steps != 1)}, after round {record.warmup}, {record.budget} tries, seed {record.seed}",
        "knew": [*told, *([f"what texts like these look like ({cut(str(prior))})"] if prior else [])],
        "did_not_know": kept,
        "metrics": [_metric(name, metric) for name, metric in record.metrics.items()],
        "notes": [cut(note) for note in record.notes],
        "examples": _examples(record),
    }


def _metric(name: str, metric: Measured) -> Document:
    told = measure(name)
    return {
        "name": name,
        "words": told.words if metric.higher else f"{told.words} (less is more leakage)",
        "attack": told.number(metric.mean),
        "control": "" if metric.control is None else told.number(metric.control),
        "gain": "" if metric.gain is None else told.number(metric.gain, gain=True),
    }


def _examples(record: AttackRecord) -> list[Document]:
    """The first victims, their examples beside what was made of the messages."""
    found = []
    for victim in record.victims[:MOST_EXAMPLES]:
        for place, original in enumerate(victim.original[:MOST_EXAMPLES]):
            beside = {
                key: getattr(victim, key)[place] if place < len(getattr(victim, key)) else ""
                for key in ("recovered", "control")
            }
            pictures = record.form == "image" and not victim.shares
            told = {key: text if pictures else cut(text) for key, text in {"original": original, **beside}.items()}
            found.append({"client": short(victim.client, 40), "pictures": pictures, **told})
    return found
