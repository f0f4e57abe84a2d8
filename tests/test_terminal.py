"""What the command line shows of a round."""

from __future__ import annotations

from typing import Any

import pytest

from folklora.terminal import Shown

LINE: dict[str, Any] = {
    "round": 3, "train_loss": 1.5, "validation": None, "bytes_up": 1000, "bytes_down": 500, "failed": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("validation", "shown"),
    [
        (None, "loss 1.500 · 1.5 kB moved"),
        ({"mean": 0.7129}, "loss 1.500 · validation 71.3 % · 1.5 kB moved"),
        ({"mean": 0.7129, "metric": "accuracy", "higher": True}, "validation 71.3 % ·"),
        (
            {"mean": 2.3451, "metric": "loss", "higher": False, "beside": {"perplexity": 10.4377, "rouge_l": 0.25}},
            "validation loss 2.345 (perplexity 10.4, rouge l 25.0 %) ·",
        ),
    ],
)
def test_the_line_of_a_round(validation: Any, shown: str, capfd: pytest.CaptureFixture[str]) -> None:
    Shown().line({**LINE, "validation": validation})
    said = " ".join(capfd.readouterr().err.split())
    assert said.startswith("round 3 · ")
    assert shown in said
