"""What `quality.py` audits, runs and keeps, with runs that only write down what they were asked for; and its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
import quality_tables
import table_parts
from sklearn.metrics import roc_auc_score

from folklora.data.audit.quality import regularities, regularity_of_blocks
from folklora.federation.poison import struck
from folklora.federation.setup import data_of
from folklora.recipe import Recipe


class Bench:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[Recipe] = []
        self.patch = monkeypatch
        monkeypatch.setattr(quality, "perform", self.perform)

    def perform(self, recipe: Recipe, path: Path) -> None:
        """Faults cost the clients that are struck a tenth, and weights give half of it back."""
        self.asked.append(recipe)
        clients = [str(i) for i in range(10)]
        bad = struck(recipe, clients)
        loss = 0.05 if recipe.audit.weights != "none" else 0.1
        of = {client: {"accuracy": 0.8 - loss * (client in bad) - 0.01 * recipe.seed} for client in clients}
        path.mkdir(parents=True)
        summary: dict[str, Any] = {"row": {"rounds": 5, "seconds_total": 1.0}, "clients": of}
        if bad:
            summary["poison"] = {"clients": bad}
        (path / "summary.json").write_text(json.dumps(summary))

    def run(self, *given: str) -> tuple[int, dict[str, Any]]:
        base = ["quality.py", "--data", str(self.folder), "--runs", str(self.folder / "runs"), "--results",
                str(self.folder), "--threads", "1"]  # fmt: skip
        self.patch.setattr(sys, "argv", [*base, *given])
        with pytest.raises(SystemExit) as left:
            quality.main()
        file = self.folder / "quality.json"
        return int(left.value.code or 0), json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_every_fault_runs_with_and_without_weights(bench: Bench) -> None:
    status, document = bench.run("--seeds", "2", "--audit-seeds", "0")
    assert status == 0
    assert len(document["rows"]) == len(bench.asked) == 2 * 2 * (3 + 2 * 2 * 3)
    for recipe in bench.asked:
        assert recipe.poison.share == (0.5 if recipe.poison.kind != "none" else 0)
        assert recipe.audit.weights in ("none", "regularity", "duplicates")
        if recipe.poison.kind != "none":
            assert recipe.audit.weights in ("none", quality.KINDS[recipe.poison.kind])
    pairs = {(r["method"], r["kind"], r["rows"], r["weights"], r["seed"]) for r in document["rows"]}
    assert len(pairs) == len(document["rows"])
    again, same = bench.run("--seeds", "2", "--audit-seeds", "0")
    assert (again, same) == (0, document)
    assert len(bench.asked) == len(document["rows"])
    (row,) = [r for r in document["rows"] if (r["method"], r["kind"], r["rows"], r["weights"], r["seed"])
              == ("fedit", "scramble", 0.5, "none", 1)]  # fmt: skip
    assert row["struck_clients"] == pytest.approx(row["clean_clients"] - 0.1)
    assert row["accuracy"] == pytest.approx(0.74)


def test_what_is_listed_is_left(bench: Bench) -> None:
    status, _ = bench.run("--only", "clean", "--list", "--seeds", "1")
    assert status == 0
    assert bench.asked == []
    bench.run("--only", "clean", "--seeds", "1")
    told = [(recipe.method.name, recipe.audit.weights) for recipe in bench.asked]
    assert told == [(name, by) for name in ("fedit", "folklora") for by in ("none", "regularity", "duplicates")]


def test_auc_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    bad, good = random.integers(6, size=20).tolist(), random.integers(5, size=30).tolist()
    wanted = roc_auc_score([1] * 20 + [0] * 30, bad + good)
    assert quality.auc(bad, good) == pytest.approx(wanted)
    assert quality.auc([None, 1.0], [0.0]) is None


def test_audits_strike_the_clients_that_runs_would(tmp_path: Path) -> None:
    cell = quality.Audits("banking77", ("data.limit=1500",), 3)
    recipe = cell.recipe("scramble", 0.3)
    data = data_of(recipe)
    client = struck(recipe, list(data.splits))[0]
    train = data.splits[client].train
    plain = [data.table.inputs[row] for row in train]
    changed = {
        kind: np.mean([one != other for one, other in zip(cell.texts(kind, 0.3, client), plain, strict=True)])
        for kind in ("scramble", "duplicate", "near")
    }
    for share in changed.values():
        assert share == pytest.approx(0.3, abs=0.03)
    copied, edited = cell.texts("duplicate", 0.3, client), cell.texts("near", 0.3, client)
    assert len(set(copied)) < len(set(edited))
    assert [len(text.split()) for text in copied] == [len(text.split()) for text in edited]
    assert cell.texts("labels", 1.0, client) == plain
    row = quality.audited(cell)
    assert {fault["kind"] for fault in row["faults"]} == {"scramble", "duplicate", "near", "labels"}
    found = regularity_of_blocks(regularities(cell.texts("scramble", 0.5, client))).value
    (means,) = [fault["struck"] for fault in row["faults"] if (fault["kind"], fault["rows"]) == ("scramble", 0.5)]
    assert means["regularity of blocks"] == pytest.approx(found, abs=0.05)
    (copies,) = [fault["auc"] for fault in row["faults"] if (fault["kind"], fault["rows"]) == ("duplicate", 0.5)]
    assert copies["copies, exact"] == 1.0


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_rows_say(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = {"kind": "scramble", "rows": 0.5, "struck": dict.fromkeys(quality.MEASURES, 0.9)}
    clean = dict.fromkeys(quality.MEASURES, 0.7)
    audits = [
        {"setting": "banking77", "seed": seed, "train_examples": [10, 30], "clean": clean,
         "faults": [{**fault, "auc": {**dict.fromkeys(quality.MEASURES, 0.8 + 0.2 * seed), "zlib ratio": None}},
                    {**fault, "kind": "near", "auc": dict.fromkeys(quality.MEASURES, 0.5)}]}
        for seed in (0, 1)
    ]  # fmt: skip
    bench.run("--seeds", "2", "--audit-seeds", "0")
    file = bench.folder / "quality.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "audits": audits}))
    monkeypatch.setattr(table_parts, "RESULTS", bench.folder)
    table = quality_tables.auc("banking77")()
    assert "| random words | 50% | 0.90 ± 0.10 |" in table
    assert "| - |" in table
    assert "*Partial: 2 of 10 seeds.*" in table
    assert "10 to 30 examples, 20 on average" in table
    runs = quality_tables.runs()
    assert "| fedit | random words | 50% | regularity | 2 | 74.5 | 77.0 | +2.5 (+2.5 to +2.5) |" in runs
    assert "| folklora | no faults |  | duplicates | 2 | 79.5 | 79.5 | +0.0 (+0.0 to +0.0) |" in runs
    assert quality_tables.measured() is not None


def test_nothing_is_shown_of_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)
    assert "Not run yet" in quality_tables.auc("snips")()
    assert "Not run yet" in quality_tables.runs()
    assert quality_tables.measured() is None
