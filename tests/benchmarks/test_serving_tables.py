"""The tables of `benchmarks/serving.py`, from cells made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
import serving_tables
import table_parts


def spread(median: float) -> dict[str, float]:
    return {"median": median, "min": 0.9 * median, "max": 1.1 * median}


def cell(clients: int, batch: int, ms: float) -> dict[str, Any]:
    """In bfloat16 rivals take twice, three and four times as long as ours; float32 copies are held of few."""
    rivals = {"switch": 2.0, "mixed": 3.0, "merged": 4.0, **({"stacked": 1.25} if batch == 1 else {})}
    float32 = {name: ratio for name, ratio in rivals.items() if name in ("switch", "mixed") or clients == 1}
    faster = {"float32": float32, "bfloat16": rivals}
    return {
        "clients": clients,
        "batch": batch,
        "times_faster_than": {p: {name: spread(ratio) for name, ratio in own.items()} for p, own in faster.items()},
        "ms_a_request": {
            p: {"ours": spread(ms), **{name: spread(ms * ratio) for name, ratio in own.items()}}
            for p, own in faster.items()
        },
    }


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"same_labels": 0.9961, "largest_logit_difference": 2e-5}
    document = {
        "cells": [cell(clients, batch, 10.0 / batch) for clients in (1, 100) for batch in (1, 32)],
        "agreement": {
            "requests": 256,
            "logits_deviation": 1.5,
            "arms": {"float32 ours": told, "bfloat16 stacked": told, "bfloat16 merged": told},
        },
        "validation_accuracy": {"float32": 0.9, "bfloat16": 0.895},
    }
    (tmp_path / "serving.json").write_text(json.dumps(document))
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)


@pytest.mark.usefixtures("measured")
def test_the_page_says_what_was_measured() -> None:
    rounded, full = (serving_tables.ratios(precision)() for precision in ("bfloat16", "float32"))
    times = "| 2.00 (1.80 to 2.20) | 3.00 (2.70 to 3.30) |"
    assert f"| 100 | 32 | 0.3 {times} 4.00 (3.60 to 4.40) |" in rounded
    assert f"| 100 | 32 | 0.3 {times} not held |" in full
    merging = serving_tables.merging()
    assert "| 1 | 1 | 1.25 (1.12 to 1.38) | 1.25 (1.12 to 1.38) |" in merging
    assert "| 100 | 1 | - | 1.25 (1.12 to 1.38) |" in merging
    assert "| 32 |" not in merging
    agreement = serving_tables.agreement()
    assert "| ours | float32 | 99.6 % | 2e-05 |" in agreement
    assert "stacked" not in agreement
    assert "90.00 % in float32, 89.50 % in bfloat16" in agreement
    assert serving_tables.speeds() is not None


def test_nothing_is_measured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)
    assert all(made() == table_parts.NOT_RUN for _, made in serving_tables.TABLES.values())
    assert serving_tables.speeds() is None


def test_a_ratio_is_a_rivals_time_over_that_of_ours_just_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour slows both turns of a repeat threefold: the ratio does not move."""
    clock, slow, turns = [0.0], [1.0], [0]
    monkeypatch.setattr(serving.time, "process_time", lambda: clock[0])

    def arm(seconds: float) -> Any:
        def answers(asked: list[Any]) -> np.ndarray:
            clock[0] += seconds * len(asked) * slow[0]
            turns[0] += 1
            slow[0] = 3.0 if turns[0] // 4 % 2 else 1.0
            return np.zeros(0)

        return answers

    found = {"float32": {"ours": arm(1.0), "switch": arm(2.0)}}
    told = serving.measure(found, [[("a", [1, 2]), ("b", [3, 4])]], 6)
    assert told["times_faster_than"]["float32"]["switch"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert told["ms_a_request"]["float32"]["ours"]["max"] == 3000.0
    assert told["tokens_a_request"] == 2.0
