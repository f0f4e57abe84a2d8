"""At which learning rates `condensed.py` runs."""

from __future__ import annotations

import condensed
import pytest


@pytest.mark.parametrize(
    ("chosen", "rates"),
    [
        ({"fedit": "3e-2"}, ["3e-2", condensed.RATE, condensed.RATE]),
        ({"fedit": "3e-2", "feddm": "1e-1"}, ["3e-2", "1e-1", condensed.RATE]),
        ({"feddm:ipc=3": "1e-3", "feddm": "1e-1", "fedaf": "3e-3"}, [condensed.RATE, "1e-3", "3e-3"]),
    ],
)
def test_a_chosen_rate_is_that_of_all_of_a_methods_variants(chosen: dict[str, str], rates: list[str]) -> None:
    cells = condensed.plan(["fedit", "feddm:ipc=3", "fedaf:ipc=1"], 2, chosen)
    assert [cell.rate for cell in cells] == rates * 2
