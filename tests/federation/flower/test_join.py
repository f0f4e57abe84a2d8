"""What a member says of its own data is checked before it dials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from folklora.errors import FederationError
from folklora.federation.flower.credentials import init
from folklora.federation.flower.join import join


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": {"promt": "question"}}, "--column promt=question; allowed: KEY=NAME, KEY one of text, label"),
        ({"columns": {"prompt": ""}}, "--column prompt=; allowed"),
        ({"device": "gpu"}, "--device gpu; allowed: auto, cpu, cuda"),
    ],
)
def test_options_that_cannot_be_are_one_line(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    init(tmp_path / "fed", ["north"])
    with pytest.raises(FederationError) as refused:
        join(tmp_path / "fed", "north", **options)
    assert str(refused.value).startswith(words)
