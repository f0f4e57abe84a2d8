"""The tables of `benchmarks/regularity.py` and `entropy.py`, from results made up here, and the chains behind them."""

from __future__ import annotations

import entropy_tables
import numpy as np
import pytest
import regularity


@pytest.mark.parametrize(("states", "jumps"), [(5, 0.4), (7, 1.0), (3, 0.0)])
def test_a_chain_moves_as_its_rate_says(states, jumps):
    x = regularity.chain(states, jumps, 40_000, np.random.default_rng(0))
    moves = np.zeros((states, states))
    np.add.at(moves, (x[:-1], x[1:]), 1)
    shares = moves / moves.sum(1, keepdims=True)
    expected = np.full((states, states), jumps / states) + (1 - jumps) * np.roll(np.eye(states), 1, axis=1)
    assert shares == pytest.approx(expected, abs=0.03)
    by_hand = -sum(p * np.log(p) for p in expected[0] if p > 0)
    assert regularity.rate(states, jumps) == pytest.approx(by_hand)


def test_noise_replaces_so_many_texts_and_no_length():
    texts = [["a"] * n for n in range(1, 11)]
    found = regularity.noisy(texts, 0.3, np.array(["b"], dtype=object), np.random.default_rng(0))
    assert [len(text) for text in found] == list(range(1, 11))
    assert sum(text[0] == "b" for text in found) == 3


def test_an_amount_of_words_is_kept_to():
    texts = [["a"] * 7] * 10
    assert sum(map(len, regularity.some(texts, 30, np.random.default_rng(0)))) == 30


def test_the_table_of_noise(monkeypatch):
    row = {"corpus": "some", "words": 1000, "texts": 80.0, "sd": 0.02}
    rows = [
        {**row, "share": 0.0, "mean": 0.8, "auc": None, "order_left": 1.0},
        {**row, "share": 0.5, "mean": 0.95, "auc": 0.987, "order_left": 0.25},
        {**row, "share": 1.0, "mean": 1.0, "auc": 1.0, "order_left": -0.001},
    ]
    monkeypatch.setattr(entropy_tables, "load", lambda name: {"noise": rows, "draws": 30})
    table = entropy_tables.noise()
    assert "| some | 1,000 | 80 | 0.80 ± 0.02 | 0.99, 25 % | 1.00, 0 % |" in table
    assert "25 %, 0 %." in table


def test_ranges_are_shown_where_there_are_some(monkeypatch):
    cell = {"content": "some", "tokens": 1000, "largest_gap": 1e-15}
    cell["ours_seconds"] = cell["antropy_seconds"] = {"median": 0.0021}
    cell["times_faster"] = {"median": 19.6, "min": 18.1, "max": 22.4}
    once = {**cell, "times_faster": {"median": 1684.1, "min": 1684.1, "max": 1684.1}}
    monkeypatch.setattr(entropy_tables, "load", lambda name: {"against_antropy": [cell, once], "order": 2})
    table = entropy_tables.speed()
    assert "| some | 1,000 | 2.1 ms | 2.1 ms | 20 (18 to 22) |" in table
    assert "| some | 1,000 | 2.1 ms | 2.1 ms | 1,684 |" in table


def test_without_results_they_say_so(monkeypatch):
    monkeypatch.setattr(entropy_tables, "load", lambda name: None)
    assert all(made() == "*Not run yet.*\n" for _, made in entropy_tables.TABLES.values())
