"""The pictures of pages as a user draws them; what each shows is tested with its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import accuracy_tables
import figures
import pytest
import table_parts


@pytest.mark.parametrize("check", [False, True])
def test_where_nothing_was_measured_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], check: bool
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "accuracy.json").write_text(json.dumps({"rows": [], "settings": {"seeds": 3}}))
    monkeypatch.setattr(table_parts, "RESULTS", table_parts.RESULTS)  # put back afterwards: `main` moves it
    arguments = ["figures.py", "--results", str(results), "--to", str(tmp_path / "to"), *["--check"] * check]
    monkeypatch.setattr(sys, "argv", arguments)
    accuracy_tables.accuracy_results.cache_clear()
    try:
        with pytest.raises(SystemExit) as ended:
            figures.main()
    finally:
        accuracy_tables.accuracy_results.cache_clear()
    assert ended.value.code == 0
    assert capsys.readouterr().err == f"{'out of date' if check else 'drawn'}: nothing\n"
    assert not (tmp_path / "to").exists()
