"""HAFLQ: who gets how many bits, against a search over all shares, and that a budget is kept to the byte."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.adapters.lowrank import Site
from folklora.errors import MethodError, RecipeError
from folklora.federation.codec import decode, encode
from folklora.methods import build
from folklora.methods.contract import Message
from folklora.methods.haflq import STEPS, bits_by_importance, pair_bytes
from folklora.quantization import rounded

GRIDS = dict(STEPS)


def weighted_error(shares: tuple[int, ...]) -> float:
    return sum(4.0**-bits / (i + 1) for i, bits in enumerate(shares))


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(4, 60), st.integers(4, 60), st.floats(2, 20), st.sampled_from([1, 8, 64]))
def test_bits_go_where_they_remove_most_error(pairs: int, d_in: int, d_out: int, bits: float, block: int) -> None:
    site = Site("x", d_in, d_out)
    got = bits_by_importance(site, pairs, bits, block)
    budget = bits / 8 * pairs * (d_in + d_out)
    cost = {b: pair_bytes(site, grid, block) for b, grid in STEPS}
    spent = sum(cost[b] for b in got)
    assert list(got) == sorted(got, reverse=True)
    if pairs * cost[2] > budget:
        assert set(got) == {2}
        return
    assert spent <= budget
    # What is left would not pay for another step, and no allowed share is much better: greedy may miss by one step.
    rest = budget - spent
    ladder = list(GRIDS)
    steps = [cost[ladder[ladder.index(b) + 1]] - cost[b] for b in got if b < 8]
    assert all(step > rest for step in steps)
    best = min(
        weighted_error(shares) for shares in product(GRIDS, repeat=pairs) if sum(cost[b] for b in shares) <= budget
    )
    assert weighted_error(got) <= best + 4.0**-2


def test_a_large_budget_gives_everything_eight_bits_and_a_small_one_two() -> None:
    site = Site("x", 384, 384)
    assert set(bits_by_importance(site, 8, 9.0, 64)) == {8}
    assert set(bits_by_importance(site, 8, 2.0, 64)) == {2}
    middle = bits_by_importance(site, 8, 4.0, 64)
    assert middle[0] > middle[-1]


@pytest.mark.parametrize("scheme", ["truncation", "freezing"])
@pytest.mark.parametrize("bits", [2.0, 8.0, 12.0])
def test_pairs_arrive_with_their_own_bits(federation: Callable[..., Any], scheme: str, bits: float) -> None:
    fed = federation("haflq", {"scheme": scheme, "bits": bits, "block": 8}, ranks=(2, 5, 3)).begin()
    plain = federation("hafl", {"scheme": scheme}, ranks=(2, 5, 3)).begin()
    for each in (fed, plain):
        each.train(1)
    for name, client in fed.clients.items():
        message, want = fed.method.send(1, client), plain.method.send(1, plain.clients[name])
        assert all(torch.equal(message.tensors[n], want.tensors[n]) for n in want.tensors)
        arrived = decode(encode(message), shapes=fed.method.expected(1, fed.state, name)).tensors
        for site in fed.method.context.sites:
            index = message.tensors[f"index/{site.name}"].tolist()
            shares = bits_by_importance(site, len(index), bits, 8)
            for row, pair in enumerate(sorted(index)):
                grid = GRIDS[shares[index.index(pair)]]
                a, b = want.tensors[f"A/{site.name}"][row], want.tensors[f"B/{site.name}"][:, row]
                assert torch.equal(arrived[f"A/{site.name}"][row], rounded(a, grid, 8))
                assert torch.equal(arrived[f"B/{site.name}"][:, row], rounded(b.contiguous(), grid, 8))
        assert torch.equal(arrived["head/weight"], want.tensors["head/weight"])


def test_the_factors_keep_to_the_budget_to_the_byte(federation: Callable[..., Any]) -> None:
    sites = (Site("one", 64, 96), Site("two", 50, 70))
    fed = federation("haflq", {"bits": [3.0, 4.0, 6.0], "scheme": "truncation"}, ranks=(4, 6, 5), sites=sites, norms={})
    fed.begin().train(1)
    for (name, client), bits in zip(fed.clients.items(), (3.0, 4.0, 6.0), strict=True):
        message = fed.method.send(1, client)
        factors = {n: t for n, t in message.tensors.items() if n[0] in "AB"}
        data = encode(Message(factors, {}, message.encodings))
        headers = 12 + sum(1 + len(n) + 2 + 8 + 3 for n in factors)
        budget = sum(bits / 8 * client.rank * (site.d_in + site.d_out) for site in sites)
        assert budget - 2 * 100 < len(data) - headers <= budget
        # Known beforehand, whatever turned out important.
        assert len(encode(fed.method.typical_upload(1, name))) == len(encode(message))


def test_with_bits_to_spare_it_is_hafl(federation: Callable[..., Any]) -> None:
    fed = federation("haflq", {"bits": 64.0, "block": 1}, ranks=(2, 5, 3)).begin()
    plain = federation("hafl", {}, ranks=(2, 5, 3)).begin()
    for round in (1, 2, 3):
        for each in (fed, plain):
            each.step(round)
            each.deliver()
        for name, tensor in plain.state.items():
            torch.testing.assert_close(fed.state[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 1.5}, "method.bits = 1.5"),
        ({"bits": [1.0, 4.0, 4.0]}, "method.bits"),
        ({"bits": []}, "lists 0 numbers"),
        ({"bits": [4.0, 4.0]}, "lists 2 numbers"),
        ({"block": 0}, "method.block = 0"),
        ({"scheme": "x"}, "method.scheme"),
    ],
)
def test_bad_options(context: Callable[..., Any], options: dict[str, Any], complaint: str) -> None:
    with pytest.raises((RecipeError, MethodError), match=complaint) as caught:
        build("haflq", options, context())
    assert "\n" not in str(caught.value)
