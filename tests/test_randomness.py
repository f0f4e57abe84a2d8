"""Derived randomness: one stream for each (seed, purpose, client, round), and nothing else enters."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from folklora.randomness import derive, numpy_generator, torch_generator

# Computed once and written down: a run of last year must resume and repeat today, on any machine.
KNOWN = {
    (0, "order", "", 0): 2562920779389970539,
    (0, "order", "3", 7): 3796475763015869447,
    (12345, "init/A", "site é", 1): 6202970745504175515,
}
Fields = tuple[int, str, str, int]
FIELDS = st.tuples(st.integers(0, 2**63 - 1), st.text(max_size=6), st.text(max_size=6), st.integers(0, 10**6))


def test_known_values() -> None:
    assert {fields: derive(*fields) for fields in KNOWN} == KNOWN


@given(FIELDS, FIELDS)
def test_different_fields_give_different_seeds(one: Fields, other: Fields) -> None:
    assert (derive(*one) == derive(*other)) == (one == other)


def test_fields_do_not_run_into_each_other() -> None:
    seeds = {
        derive(1, "ab", "c", 1),
        derive(1, "a", "bc", 1),
        derive(1, "abc", "", 1),
        derive(11, "abc", "", 0),
        derive(1, "a", "b:1", 1),
        derive(1, "a:1", "b", 1),
        derive(1, "1:a", "", 1),
    }
    assert len(seeds) == 7


@given(FIELDS)
def test_seeds_fit_every_generator(fields: Fields) -> None:
    assert 0 <= derive(*fields) < 2**63


def test_seeds_are_spread_evenly() -> None:
    """Sampling clients and simulated failures compare these numbers with fractions of 2^63."""
    draws = np.array(
        [derive(s, "failure", str(c), r) for s, c, r in itertools.product(range(10), range(20), range(20))]
    )
    shares = np.histogram(draws / 2**63, bins=10, range=(0, 1))[0] / len(draws)
    assert np.abs(shares - 0.1).max() < 0.02  # four standard deviations of a share of 4000


def test_generators_repeat_and_do_not_touch_the_global_ones() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for _ in range(2):
        first = torch.rand(4, generator=torch_generator(3, "order", "a", 2))
        again = torch.rand(4, generator=torch_generator(3, "order", "a", 2))
        other = torch.rand(4, generator=torch_generator(3, "order", "a", 3))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert np.array_equal(numpy_generator(3, "x").random(4), numpy_generator(3, "x").random(4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_another_process_derives_the_same() -> None:
    """Python's own hash() would not."""
    code = "from folklora.randomness import derive; print(derive(5, 'order', 'client', 3))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) == derive(5, "order", "client", 3)
