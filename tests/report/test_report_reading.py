"""Reading a run directory: what is there is read, what is broken is named with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from folklora.backbones.metric import ACCURACY, LOSS
from folklora.errors import RunError
from folklora.report.reading import read_comparison, read_run

WriteRun = Callable[..., dict[str, Any]]
WriteComparison = Callable[..., list[dict[str, Any]]]


def test_a_run_is_read_as_it_was_written(ten_clients: Path) -> None:
    run = read_run(ten_clients)
    assert (run.method, run.seed, run.finished) == ("celora", 0, True)
    assert len(run.clients) == 10
    assert len(run.classes) == 77
    assert len(run.rounds) == 10
    assert run.once is not None
    assert run.once.bytes_up == 4_610_000
    assert run.counts is not None
    assert run.counts.sum(axis=1).tolist() == [run.examples[client].train for client in run.clients]
    assert set(run.insights) == {"similarity/data", "similarity/model", "similarity/mixed", "weights"}
    np.testing.assert_allclose(run.insights["weights"].sum(axis=1), 1, rtol=1e-5)


def test_a_run_that_has_only_begun(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", finished=False, insight=False)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run = read_run(tmp_path / "run")
    assert (run.rounds, run.once, run.row, run.finished) == ((), None, None, False)
    assert (run.method, run.seed) == ("celora", 0)


def test_a_line_cut_off_in_being_written_is_of_no_round(tmp_path: Path, write_run: WriteRun) -> None:
    """As a kill leaves it: the next commit cuts it away, and until then the rounds before it can be looked at."""
    write_run(tmp_path / "run", rounds=3, finished=False)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "tra')
    assert [line.round for line in read_run(tmp_path / "run").rounds] == [1, 2, 3]


def _spoil_metrics(path: Path, line: int, text: str) -> None:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[line - 1] = text
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


SPOILT: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: (p / "recipe.toml").unlink(), "not a run directory"),
    (lambda p: (p / "recipe.toml").write_text("seed ="), "recipe.toml: not valid TOML"),
    (lambda p: (p / "partition.json").unlink(), "partition.json: missing"),
    (lambda p: (p / "partition.json").write_text('{"clients": {}}'), "partition.json: clients"),
    (lambda p: (p / "partition.json").write_bytes(b"\xff\xfe\x00"), "partition.json: cannot be read as text"),
    (lambda p: (p / "metrics.jsonl").unlink(), "metrics.jsonl: missing"),
    (lambda p: _spoil_metrics(p, 3, '{"round": 2, "tra'), "metrics.jsonl, line 3: Invalid JSON"),
    (lambda p: _spoil_metrics(p, 2, '{"round": "one"}'), "metrics.jsonl, line 2: round"),
    (lambda p: _spoil_metrics(p, 4, '{"round": 1}'), "metrics.jsonl, line 4: round 1 stands after round 2"),
    (lambda p: (p / "summary.json").write_text("[1]"), "summary.json"),
    (lambda p: (p / "insight.safetensors").write_bytes(b"\x00" * 20), "insight.safetensors: not a readable"),
    (
        lambda p: save_file({"weights": np.zeros((2, 3), np.float32)}, p / "insight.safetensors"),
        r"insight.safetensors: weights has shape \[2, 3\]; expected \[3, 3\]",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[message[:40] for _, message in SPOILT])
def test_what_is_broken_is_named_in_one_line(
    tmp_path: Path, write_run: WriteRun, spoil: Callable[[Path], object], message: str
) -> None:
    write_run(tmp_path / "run", clients="abc", classes=3, rounds=3)
    spoil(tmp_path / "run")
    with pytest.raises(RunError, match=message) as caught:
        read_run(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_counts_must_fit_the_classes(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", clients="abc", classes=3)
    document = json.loads((tmp_path / "run" / "partition.json").read_text())
    document["counts"]["b"] = [1, 2]
    (tmp_path / "run" / "partition.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="counts of client 'b' has 2 of 3 classes"):
        read_run(tmp_path / "run")


def test_no_directory_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match="no such folder"):
        read_comparison(tmp_path / "nowhere")
    with pytest.raises(RunError, match="not a folder of compared runs"):
        read_comparison(tmp_path)


def test_an_unfinished_comparison_reads_the_runs_begun(tmp_path: Path, write_comparison: WriteComparison) -> None:
    write_comparison(tmp_path, ["celora", "fedit"], 1, clients="abc", classes=3, rounds=2)
    (tmp_path / "compare.json").unlink()
    (tmp_path / "fedit-s0" / "summary.json").unlink()
    comparison = read_comparison(tmp_path)
    assert not comparison.finished
    assert [row["method"] for row in comparison.rows] == ["celora"]
    assert [run.method for run in comparison.runs] == ["celora", "fedit"]


VARIANTS = ["celora", "celora:similarity=uniform", "celora:basis=frozen:train.lr=5e-3"]


def test_variants_of_a_method_are_kept_apart(tmp_path: Path, write_comparison: WriteComparison) -> None:
    write_comparison(tmp_path, VARIANTS, 2, clients="abc", classes=3, rounds=2)
    comparison = read_comparison(tmp_path)
    assert comparison.labels == tuple(name for name in VARIANTS for _ in range(2))
    assert [run.path.name for run in comparison.finished_runs(VARIANTS[1])] == [
        "celora__similarity=uniform-s0",
        "celora__similarity=uniform-s1",
    ]
    # Before compare.json is written, the folders' names tell the variants.
    (tmp_path / "compare.json").unlink()
    assert sorted(set(read_comparison(tmp_path).labels)) == sorted(VARIANTS)
    assert {row["variant"] for row in read_comparison(tmp_path).rows} == set(VARIANTS)


def test_a_run_in_progress_beside_those_listed(tmp_path: Path, write_comparison: WriteComparison) -> None:
    rows = write_comparison(tmp_path, VARIANTS[:2], 1, clients="abc", classes=3, rounds=2)
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows[:1], "runs": ["celora-s0"]}))
    assert read_comparison(tmp_path).finished  # what another comparison left there is none of this one
    (tmp_path / "celora__similarity=uniform-s0" / "summary.json").unlink()
    comparison = read_comparison(tmp_path)
    assert not comparison.finished
    assert comparison.labels == tuple(VARIANTS[:2])
    assert len(comparison.rows) == 1


def test_a_row_for_every_run(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text('{"rows": [{"method": "x"}], "runs": []}')
    with pytest.raises(RunError, match="1 rows for 0 runs"):
        read_comparison(tmp_path)


def test_a_comparison_does_not_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text('{"rows": [{"method": "x"}], "runs": ["../elsewhere"]}')
    with pytest.raises(RunError, match="not the name of a folder"):
        read_comparison(tmp_path)


def test_a_run_says_what_it_is_judged_by(losses: tuple[Path, list[dict[str, Any]]], ten_clients: Path) -> None:
    run, told = read_run(losses[0] / "celora-s0"), json.loads((losses[0] / "celora-s0" / "summary.json").read_text())
    assert run.metric == LOSS
    assert read_comparison(losses[0]).metric == LOSS
    assert read_run(ten_clients).metric == ACCURACY  # it was written before there were others
    for client, result in run.results.items():
        line = told["clients"][client]
        assert (result.score, result.tuned, result.chosen) == (line["loss"], line["loss_tuned"], line["loss_chosen"])
        assert result.beside == {"perplexity": line["perplexity"]}
        assert result.examples.train == line["examples"]["train"]
    assert run.evaluated[-1][1].beside.keys() == {"perplexity"}


def test_an_unfinished_run_is_judged_by_what_its_validations_say(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", clients="abc", classes=3, rounds=2, loss=True, finished=False)
    assert read_run(tmp_path / "run").metric == LOSS
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert read_run(tmp_path / "run").metric is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["row"].update(metric=["loss"]), "summary.json: row.metric: "),
        (lambda d: d["row"].update(metric="a/../b"), "summary.json: row.metric: "),
        (lambda d: d["clients"]["b"].pop("loss"), "summary.json: clients.b.loss: no number"),
        (lambda d: d["clients"]["b"].update(loss="1"), "summary.json: clients.b.loss: no number"),
        (lambda d: d["row"].pop("metric"), "summary.json: clients.a.accuracy: no number"),
    ],
)
def test_results_in_no_metric_are_named(
    tmp_path: Path, write_run: WriteRun, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    write_run(tmp_path / "run", clients="abc", classes=3, rounds=2, loss=True)
    document = json.loads((tmp_path / "run" / "summary.json").read_text())
    change(document)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=said):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_runs_that_are_judged_differently_are_not_compared(
    tmp_path: Path, write_run: WriteRun, finished: bool, listed: bool
) -> None:
    """Also where one of them is under way, or ``compare.json`` is not written yet."""
    options: dict[str, Any] = {"clients": "abc", "classes": 3, "rounds": 2}
    row = write_run(tmp_path / "fedit-s0", "fedit", **options)
    other = write_run(tmp_path / "local-s0", "local", **options, loss=True, finished=finished)
    if listed:
        rows, runs = ([row, other], ["fedit-s0", "local-s0"]) if finished else ([row], ["fedit-s0"])
        (tmp_path / "compare.json").write_text(json.dumps({"rows": rows, "runs": runs}))
    with pytest.raises(
        RunError, match=f"{tmp_path}: fedit-s0 by accuracy and local-s0 by loss: .* allowed: one metric"
    ):
        read_comparison(tmp_path)
