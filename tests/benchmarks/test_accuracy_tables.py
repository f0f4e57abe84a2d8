"""The tables: what they mark, what they leave unsaid, and that pictures come out of the same results."""

from __future__ import annotations

from typing import Any

import accuracy_tables as tables
import figures
import pytest

SETTING, OTHER = "banking77 dirichlet 0.5", "snips dirichlet 0.1"


def row(variant: str, setting: str, seed: int, accuracy: float, sent: float = 100.0) -> dict[str, Any]:
    return {
        "variant": variant,
        "setting": setting,
        "seed": seed,
        "method": variant.partition(":")[0],
        **{f"accuracy_{k}": accuracy for k in ("mean", "worst_tenth", "weighted", "tuned_mean", "chosen_mean")},
        "accuracy_global": None,
        "aggregation_error": None,
        "bytes_up_per_client_round": sent,
        "bytes_down_per_client_round": sent,
        "bytes_once_per_client": 7.0,
        "rounds": 5,
        "lr": 0.01,
        "seconds_train": 2.0,
        "curve": [[1000, accuracy]],
    }


ACCURACIES = {"local": (0.50, 0.52, 0.51), "fedit": (0.70, 0.72, 0.71), "celora": (0.71, 0.71, 0.72)}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> tables.Results:
    rows = [
        row(variant, SETTING, seed, value, sent=0.0 if variant == "local" else 100.0)
        for variant, values in ACCURACIES.items()
        for seed, value in enumerate(values)
    ]
    rows += [row("celora:adapter.rank=90", SETTING, seed, 0.8, sent=300.0) for seed in range(3)]
    rows += [row("fedit", OTHER, 0, 0.9)]
    described = {
        "seeds": 3,
        "settings": {SETTING: {}, OTHER: {"participation": 0.2}},
        "parts": {
            "methods": {SETTING: list(ACCURACIES), OTHER: list(ACCURACIES)},
            "equal bytes": {SETTING: ["celora:adapter.rank=90"]},
        },
        "equal_bytes": {SETTING: {"celora": "celora:adapter.rank=90"}},
        "ranks": {},
    }
    made = tables.Results(rows, described)
    monkeypatch.setattr(tables, "accuracy_results", lambda: made)
    return made


def lines(text: str) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {each[0]: each[1:] for each in cells}


def test_the_best_is_bold_the_level_is_marked_and_the_behind_is_not(results: tables.Results) -> None:
    found = lines(tables.TABLES["accuracy"][1]())
    assert found["celora"][0] == "**71.3 ± 0.6**"
    assert found["fedit"][0] == "71.0 ± 1.0 ≈"
    assert found["local"][0] == "51.0 ± 1.0"
    assert 0 < float(found[tables.COUNTS][0]) < 19


def test_missing_seeds_are_counted_and_one_seed_judges_nobody(results: tables.Results) -> None:
    text = tables.TABLES["accuracy"][1]()
    found = lines(text)
    assert found["fedit"][1] == "**90.0 (1 of 3)**"
    assert found["local"][1] == "-"
    assert found[tables.COUNTS][1] == "-"
    assert "*Partial: 10 of 18 runs are done.*" in text
    assert tables.TABLES["ranks"][1]() == tables.NOT_RUN
    assert tables.TABLES["accuracy-clients"][1]() == tables.NOT_RUN


def test_bytes_in_all_count_what_was_sent_once_and_who_took_part(results: tables.Results) -> None:
    assert results.moved("fedit", SETTING) == 7 + 5 * 200
    assert results.moved("fedit", OTHER) == 7 + 0.2 * 5 * 200
    assert results.moved("celora", OTHER) is None


def test_at_equal_bytes_a_method_stands_with_its_other_rank_and_what_sends_nothing_does_not(
    results: tables.Results,
) -> None:
    assert tables.bought(results, SETTING) == {"fedit": "fedit", "celora": "celora:adapter.rank=90"}
    found = lines(tables.TABLES["equal-bytes"][1]())
    assert found["celora"] == ["**80.0 ± 0.0**", "90", "0.01", "600 B"]
    assert found["fedit"] == ["71.0 ± 1.0", "as it is", "0.01", "200 B"]
    assert "local" not in found


def test_mean_ranks_are_of_the_common_rank_and_say_what_they_leave_out(results: tables.Results) -> None:
    text = tables.TABLES["mean-ranks"][1]()
    assert set(lines(text)) == {"method", "---", "local", "fedit", "celora"}
    assert lines(text)["local"][0] == "3.0"
    assert "3 methods in 1 setting, 3 blocks" in text
    assert "Left out, since something is missing: no method; 1 blocks." in text


def test_the_cheapest_of_those_level_with_the_best_is_named(results: tables.Results) -> None:
    found = lines(tables.TABLES["choosing"][1]())
    assert found[SETTING] == ["celora, 71.3", "fedit", "celora, 1.01 KB"]
    assert OTHER not in found  # one seed tells nothing


def test_every_picture_can_be_drawn_of_partial_results(results: tables.Results) -> None:
    drawn = {name: draw() for name, draw in figures.pictures(results).items()}
    assert set(drawn) <= set(tables.PICTURES)
    assert drawn["bytes-banking77"] is not None
    assert drawn["bytes-sgd"] is None
    assert drawn["mean-ranks"] is not None
