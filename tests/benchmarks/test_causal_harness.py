"""`causal.py` on a model of two small layers: what it measures is what it says, and it goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causal
import pytest

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setitem(causal.SIZES, "5M", TINY)
    monkeypatch.setattr(causal, "peak", lambda *_: 1.0)

    def run(**given: str) -> dict[str, Any]:
        chosen = {"clients": "1,3", "batch": "2", "lengths": "8", "steps": "2", "repeats": "2", "threads": "1"} | given
        options = [part for name, value in chosen.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["causal.py", *options, "--results", str(tmp_path)])
        causal.main()
        found: dict[str, Any] = json.loads((tmp_path / "causal-cpu-5M.json").read_text())
        return found

    return run


def test_both_arms_learn_the_same(measured: Callable[..., dict[str, Any]]) -> None:
    found = measured()
    assert [(cell["length"], cell["batch"], cell["clients"]) for cell in found["cells"]] == [(8, 2, 1), (8, 2, 3)]
    for cell in found["cells"]:
        assert cell["mean_loss"]["ours"] == pytest.approx(cell["mean_loss"]["peft"], abs=2e-4)
        assert cell["times_faster"]["min"] > 0
    assert found["environment"]["device"] == "cpu"


def test_what_is_measured_is_kept_and_not_measured_again(
    measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = causal.measure, []

    def stopped(*given: Any) -> dict[str, Any]:
        calls.append(given[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(causal, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            measured()
    monkeypatch.setattr(causal, "measure", lambda *given: calls.append(given[2]) or real(*given))
    found = measured()
    assert calls == [(8, 2, 1), (8, 2, 3), (8, 2, 3)]
    assert len(found["cells"]) == 2
    assert len(measured(steps="1")["cells"]) == 2  # of another kind: what was there is not mixed in
    assert len(calls) == 5
