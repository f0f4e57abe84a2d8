"""The accuracy benchmark's plan, its bookkeeping, and several processes over one folder of runs."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accuracy
import harness_driver as driver
import pytest
from settings import Setting, goemotions, services, settings

from folklora.federation.run import variant
from folklora.federation.setup import validate
from folklora.methods import METHODS
from folklora.recipe import Recipe

SEED_0 = "banking77 dirichlet 0.5; methods"


@pytest.fixture
def bench(tmp_path: Path) -> accuracy.Bench:
    return driver.bench(tmp_path / "runs", tmp_path / "results")


def cells_of(bench: accuracy.Bench, only: str = SEED_0, seed: str = "0", method: str = "") -> list[accuracy.Cell]:
    return accuracy.filtered(accuracy.plan(bench.found, bench.equal), only, seed, method)


def leave(bench: accuracy.Bench, cell: accuracy.Cell, **changed: Any) -> Path:
    """Lay down a finished run of a cell, of a changed recipe perhaps."""
    entry = cell.entry(bench.rates())
    assert entry is not None
    recipe = variant(cell.setting.recipe(cell.seed), entry, cell.seed)
    path = cell.folder(bench.runs, entry)
    driver.leave(recipe.model_copy(update=changed), path)
    return path


def rows(bench: accuracy.Bench) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    return {(row["setting"], row["variant"], row["seed"]): row for row in bench.load("accuracy")["rows"]}


# -- the plan --


def test_every_run_of_the_plan_is_a_recipe_that_its_method_takes(bench: accuracy.Bench) -> None:
    """Options that a method does not know would only be found in the middle of the night."""
    rates = bench.rates()
    seen = set()
    for cell in accuracy.plan(bench.found, {}):
        entry = cell.entry(rates)
        assert entry is not None
        if entry not in seen and cell.setting.data["partition"] != "natural":
            validate(variant(cell.setting.recipe(cell.seed), entry, cell.seed))
            seen.add(entry)


def test_the_plan_begins_with_every_method_in_one_setting_and_repeats_no_run_of_a_part(bench: accuracy.Bench) -> None:
    cells = accuracy.plan(bench.found, {})
    first = [cell.variant for cell in cells[: len(accuracy.METHODS)]]
    assert {cell.label for cell in cells[: len(first)]} == {"banking77 dirichlet 0.5; methods; seed 0"}
    named = {variant.partition(":")[0] for variant in first} | set(accuracy.AT_ONE_RANK)
    assert named == set(METHODS)
    keys = [(cell.part, cell.key) for cell in cells]
    assert len(set(keys)) == len(keys)


def test_stages_name_settings_that_there_are(tmp_path: Path) -> None:
    for folder in ("snips", "goemotions", "sgd"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    (tmp_path / "data/goemotions/labels.txt").write_text("joy\n")
    for name in ("goemotions/train.tsv", "goemotions/test.tsv", "sgd/train.jsonl"):
        (tmp_path / "data" / name).touch()
    found = settings(tmp_path / "data", tmp_path / "made")
    assert {name for _, names, _ in accuracy.STAGES for name in names} == set(found)


def test_clients_of_unequal_rank_go_to_every_method_that_takes_them() -> None:
    for ranks in accuracy.RANKS.values():
        assert len(ranks) == 10
        able = {v.partition(":")[0] for v in accuracy.mixed_ranks() if json.dumps(ranks, separators=(",", ":")) in v}
        assert able == {name for name, method in METHODS.items() if method.mixed_ranks} - set(accuracy.NO_RATE)


def test_a_rate_is_that_of_the_method_of_the_option_or_of_none() -> None:
    rates = {"fedit": "1e-2", "celora": "3e-3", accuracy.OPTIONS[0]: "3e-2"}
    assert accuracy.rate_of("celora", rates) == "3e-3"
    assert accuracy.rate_of("celora:basis=frozen:adapter.rank=32", rates) == "3e-3"
    assert accuracy.rate_of(accuracy.OPTIONS[0], rates) == "3e-2"
    assert accuracy.rate_of(f"{accuracy.OPTIONS[0]}:adapter.rank=4", rates) == "3e-2"
    assert accuracy.rate_of(accuracy.OPTIONS[1], rates) is None  # tuned by itself, and not yet
    assert accuracy.rate_of("zeropad:adapter.rank=[2,4]", rates) == "1e-2"
    assert accuracy.rate_of("sketch", {}) == accuracy.NO_RATE["sketch"]
    assert accuracy.rate_of("ffa", rates) is None


def test_a_rank_at_equal_bytes_has_a_rate_of_its_own(bench: accuracy.Bench) -> None:
    first = accuracy.TUNING_SETTINGS[0]
    equal = {first: {"celora": "celora:adapter.rank=80"}, "sgd by service": {"celora": "celora:adapter.rank=70"}}
    bench.found = {**bench.found, "sgd by service": Setting("sgd by service", bench.found[first].data, {})}
    cells = [cell for cell in accuracy.plan(bench.found, equal) if cell.part == "equal bytes"]
    assert {cell.variant for cell in cells} == {entry for named in equal.values() for entry in named.values()}
    rates = {"celora": "1e-2"}
    assert {cell.entry(rates) for cell in cells} == {None}  # that of rank 8 says nothing of it
    rates[equal[first]["celora"]] = "1e-3"
    assert {cell.entry(rates) for cell in cells} == {f"{cell.variant}:train.lr=1e-3" for cell in cells}

    assert not any("adapter" in cell.variant for cell in bench.tuning_cells())
    bench.equal = equal
    asked = [(cell.setting.name, cell.rate) for cell in bench.tuning_cells() if "adapter" in cell.variant]
    assert asked == [(first, rate) for rate in accuracy.GRID]
    bench.collect()  # what was priced once is tuned wherever the results are read again
    later = accuracy.Bench(bench.runs, bench.results, bench.found)
    assert later.at_equal_bytes() == ("celora:adapter.rank=80",)
    later.equal = {**equal, "sgd by service": {"ffa": "ffa:adapter.rank=16"}}  # what the first setting does not have
    assert later.at_equal_bytes() == ("celora:adapter.rank=80", "ffa:adapter.rank=16")


def test_filters_let_through_what_all_of_them_name(bench: accuracy.Bench) -> None:
    cells = accuracy.plan(bench.found, {})
    found = accuracy.filtered(cells, "50 clients,ablations", "1, 2", "fedit")
    assert {cell.variant.partition(":")[0] for cell in found} == {"fedit"}
    assert {cell.seed for cell in found} == {1, 2}
    assert all("50 clients" in cell.label or "ablations" in cell.label for cell in found)
    assert accuracy.filtered(cells, "", "", "") == cells


def test_folders_are_those_of_earlier_runs(bench: accuracy.Bench) -> None:
    """What was run under these names before must be found again."""
    cell = next(c for c in cells_of(bench) if c.variant.startswith("folklora:adapter"))
    entry = cell.entry({"folklora": "3e-3"})
    assert entry is not None
    expected = "banking77-dirichlet-0.5/folklora__adapter.rank=64__adapter.alpha=128__train.lr=3e-3-s0"
    assert cell.folder(Path("runs"), entry) == Path("runs") / expected
    first = accuracy.tuning(bench.found, 800, {})[0]
    assert first.folder(Path("runs"), first.entry({}) or "").parent == Path("runs/tuning/banking77-dirichlet-0.5")


# -- what is on disk, and what is in the results --


def test_rows_come_from_disk_and_from_earlier_results_and_only_for_the_same_recipe(bench: accuracy.Bench) -> None:
    here, elsewhere, stale = cells_of(bench)[:3]
    leave(bench, here)
    leave(bench, elsewhere)
    bench.collect()
    assert set(rows(bench)) == {here.key, elsewhere.key}
    assert rows(bench)[here.key]["curve"] == [[20, 0.25]]

    # The second run's folder is gone: its row stays. A third's is of other data: it is no row of this plan.
    moved = accuracy.Bench(bench.runs, bench.results, bench.found)
    (elsewhere.folder(bench.runs, elsewhere.entry(bench.rates()) or "") / "summary.json").unlink()
    other = Recipe.parse({"data": {"limit": 99}}).data
    leave(moved, stale, data=other)
    moved.collect()
    assert set(rows(moved)) == {here.key, elsewhere.key}
    assert moved.finished(stale, stale.entry(moved.rates()) or "") is None

    # Another learning rate is chosen: rows of the old one say nothing of the new one.
    tuning = moved.load("tuning")
    method = elsewhere.variant
    moved.write("tuning", {**tuning, "chosen": {**tuning["chosen"], method: "3e-2"}})
    accuracy.Bench(bench.runs, bench.results, bench.found).collect()
    assert elsewhere.key not in rows(moved) or method in accuracy.NO_RATE


def test_what_was_collected_is_not_run_again_where_its_runs_are_gone(
    bench: accuracy.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(bench, method="fedit,celora")
    for _ in accuracy.TUNING_SETTINGS:
        tuned = [cell for cell in bench.tuning_cells() if cell.variant == "celora"]
        for cell in (*cells, *tuned):
            leave(bench, cell)
        bench.collect_tuning()
    assert {cell.setting.name for cell in tuned} == set(accuracy.TUNING_SETTINGS)
    for cell in cells:
        leave(bench, cell)  # at the rate that is chosen now
    bench.collect()
    before = rows(bench)
    shutil.rmtree(bench.runs)
    later = accuracy.Bench(bench.runs, bench.results, bench.found)
    assert accuracy.unfinished(later, [*cells, *tuned]) == []
    monkeypatch.setattr(accuracy, "perform", lambda *_: pytest.fail("it was run again"))
    assert accuracy.work(later, [*tuned, *cells], accuracy.Pace([])) == {}
    later.collect()
    assert rows(later) == before


def test_a_row_whose_rate_is_not_chosen_yet_is_kept(bench: accuracy.Bench) -> None:
    cell = cells_of(bench, method="fedit")[0]
    leave(bench, cell)
    bench.collect()
    before = rows(bench)
    bench.write("tuning", {**bench.load("tuning"), "chosen": {}})
    shutil.rmtree(bench.runs)
    accuracy.Bench(bench.runs, bench.results, bench.found).collect()
    assert rows(bench) == before


def test_rows_written_before_rows_told_their_recipe_are_kept(bench: accuracy.Bench) -> None:
    cell = cells_of(bench, method="fedit")[0]
    old = {"setting": cell.setting.name, "variant": cell.variant, "seed": 0, "lr": 0.01, "seconds_total": 1.0}
    told = {"train": {"rounds": 5, "batch_size": 16}, "examples": {cell.setting.name: 1500}}
    bench.write("accuracy", {"settings": told, "rows": [old]})
    bench.collect()
    assert rows(bench)[cell.key] == {**old, "recipe": cell.identity("fedit:train.lr=1e-2")}
    bench.write("accuracy", {"settings": {**told, "examples": {cell.setting.name: 99}}, "rows": [old]})
    bench.collect()
    assert rows(bench) == {}


def test_a_run_is_the_same_wherever_its_files_lie() -> None:
    one, other, third = (
        Recipe.parse({"data": {"source": source, "limit": 10}}) for source in ("/a/x.csv", "/b/x.csv", "/a/y.csv")
    )
    assert accuracy.same(one, other)
    assert not accuracy.same(one, third)
    assert not accuracy.same(one, Recipe.parse({"data": {"source": "/a/x.csv", "limit": 11}}))
    setting = Setting("s", {"source": "/a/x.csv", "limit": 10}, {})
    same = Setting("s", {"source": "/b/x.csv", "limit": 10}, {})
    assert accuracy.Cell("p", setting, 0, "fedit").identity("e") == accuracy.Cell("q", same, 0, "fedit").identity("e")
    assert accuracy.Cell("p", setting, 1, "fedit").identity("e") != accuracy.Cell("p", same, 0, "fedit").identity("e")


def test_a_rate_is_chosen_when_its_methods_grid_is_complete_and_the_earlier_choice_stands_until_then(
    bench: accuracy.Bench,
) -> None:
    def reach(setting: str, **scores: float) -> None:
        for cell in bench.tuning_cells():
            if cell.variant == "celora" and cell.setting.name == setting and cell.rate in scores:
                path = leave(bench, cell)
                row = json.loads((path / "summary.json").read_text())["row"]
                (path / "summary.json").write_text(json.dumps({"row": {**row, "validation_mean": scores[cell.rate]}}))
        bench.collect_tuning()

    def asked() -> list[str | None]:
        second = (cell for cell in bench.tuning_cells() if cell.setting.name == accuracy.TUNING_SETTINGS[1])
        return [cell.rate for cell in second if cell.variant == "celora"]

    mild, severe = accuracy.TUNING_SETTINGS
    reach(mild, **{"1e-3": 0.1, "3e-3": 0.3, "1e-2": 0.4, "3e-2": 0.35})
    assert asked() == []  # not before the first setting has spoken
    reach(mild, **{"1e-1": 0.19})
    assert asked() == ["3e-3", "1e-2", "3e-2"]  # the others reached less than half of the best
    reach(severe, **{"3e-3": 0.5, "1e-2": 0.6})
    assert bench.rates()["celora"] == "1e-2"  # what was chosen before
    reach(severe, **{"3e-2": 0.7})
    assert bench.rates()["celora"] == "3e-2"  # best on average, first in one setting only
    assert bench.load("tuning")["validation"][severe]["celora 3e-3"] == 0.5


def test_remaining_time_follows_the_setting_and_this_process() -> None:
    pace = accuracy.Pace([{"setting": "a", "seconds_total": s} for s in (1.0, 3.0, 100.0)])
    assert pace.left(["a", "a"]) == 6.0
    assert pace.left(["unknown"]) == 3.0
    pace.saw("a", 6.0)
    assert pace.left(["a"]) == 6.0
    assert accuracy.Pace([]).left(["a"]) == 30.0


# -- running --


def test_one_methods_bug_is_told_and_the_others_go_on(
    bench: accuracy.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def perform(recipe: Recipe, path: Path) -> dict[str, Any]:
        if recipe.method.name == "fedsa":
            raise RuntimeError("a bug")
        return driver.leave(recipe, path)

    monkeypatch.setattr(accuracy, "perform", perform)
    cells = cells_of(bench, method="fedit,fedsa,celora")
    failed = accuracy.work(bench, cells, accuracy.Pace([]))
    assert list(failed.values()) == ["RuntimeError: a bug"]
    assert {key[1] for key in rows(bench)} == {cell.variant for cell in cells} - {"fedsa"}
    assert [cell.variant for cell in accuracy.unfinished(bench, cells)] == ["fedsa"]
    assert "celora:train.lr=1e-2: 50.0 % in" in capsys.readouterr().err


def test_what_has_no_learning_rate_yet_is_left_and_said(bench: accuracy.Bench) -> None:
    bench.write("tuning", {**bench.load("tuning"), "chosen": {}})
    cells = cells_of(bench, method="fedsa")
    assert accuracy.work(bench, cells, accuracy.Pace([])) == {}
    assert not bench.runs.joinpath("banking77-dirichlet-0.5").exists()
    told = list(accuracy.listed(bench, cells, accuracy.Pace([])))
    assert told[0].endswith("0 of 1 done, 30 s, 1 without a learning rate (--tune)")


def performed(folder: Path) -> list[str]:
    return [line.split()[1] for line in (folder / "log").read_text().splitlines()]


def test_processes_share_the_runs_and_lose_no_row_even_if_one_is_killed(tmp_path: Path, bench: accuracy.Bench) -> None:
    fork = multiprocessing.get_context("fork")  # the imports take longer than all the rest

    def start(*arguments: Any) -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=driver.process, args=(tmp_path, *arguments))
        process.start()
        return process

    first = start(0.02, "fedsa")  # gets as far as fedsa, claims it and stays there
    deadline = time.monotonic() + 60
    while not (tmp_path / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    others = [start(0.02), start(0.02)]
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    variants = {cell.variant for cell in cells_of(bench)}
    assert {key[1] for key in rows(bench)} == variants - {"fedsa"}  # claimed by a living process: left alone

    first.kill()
    first.join()
    last = start()
    last.join(60)
    assert {key[1] for key in rows(bench)} == variants
    assert sorted(performed(tmp_path)) == sorted(set(performed(tmp_path)))
    assert len(performed(tmp_path)) == len(variants)


# -- data sets --


def test_goemotions_gives_the_comments_with_one_emotion(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "labels.txt").write_text("joy\nfear\n")
    (source / "train.tsv").write_text('so "happy", really\t0\tid1\nboth\t0,1\tid2\nscared\t1\tid3\n')
    (source / "test.tsv").write_text("calm\t1\tid4\n")
    found = goemotions(source, tmp_path / "made")
    assert found["label"] == "emotion"
    assert Path(found["source"]).read_text().splitlines() == [
        "text,emotion",
        '"so ""happy"", really",joy',
        "scared,fear",
    ]
    assert Path(found["test"]).read_text().splitlines() == ["text,emotion", "calm,fear"]


def test_services_gives_what_users_say_where_the_intent_changes(tmp_path: Path) -> None:
    turns = [
        ["U", "find a bus", ["Buses_1"], ["FindBus"]],
        ["S", "where to?", ["Buses_1"], []],
        ["U", "to Davis", ["Buses_1"], ["FindBus"]],
        ["U", "buy it", ["Buses_1"], ["BuyTicket"]],
        ["U", "and the weather", ["Buses_1", "Weather_1"], ["GetWeather"]],
        ["U", "thanks", ["Weather_1"], ["NONE"]],
    ]
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "1", "services": [], "turns": turns}) + "\n")
    lines = services(tmp_path, tmp_path / "made").read_text().splitlines()
    assert lines == [
        "text,intent,service",
        "find a bus,FindBus,Buses_1",
        "buy it,BuyTicket,Buses_1",
        "thanks,NONE,Weather_1",
    ]


def test_settings_without_their_data_are_left_out(tmp_path: Path) -> None:
    found = settings(tmp_path / "nowhere", tmp_path)
    assert {name.partition(" ")[0] for name in found} == {"banking77"}
    short = found["banking77 disjoint labels"].shortened(160, 1)
    assert (short.data["limit"], short.data["test_limit"], short.train["rounds"]) == (160, 160, 1)
    assert found["banking77 disjoint labels"].data["limit"] == 1500
