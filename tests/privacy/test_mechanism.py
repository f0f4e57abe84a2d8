"""The clip and the noise: norms that hold, standard deviations that are meant, and the same again when asked again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folklora.privacy.mechanism import added, applied, clipped, difference, noise, norm
from folklora.randomness import derive

SHAPES = {"A/x": (4, 30), "B/x": (25, 4), "head/bias": (7,)}


def update(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@given(st.integers(0, 10**6), st.floats(-12, 12), st.floats(1e-6, 1e6))
def test_no_update_is_longer_than_the_clip_and_none_turns(seed: int, power: float, clip: float) -> None:
    before = update(seed, 10**power)
    after = clipped(before, clip)
    whole = np.concatenate([t.numpy().ravel() for t in after.values()])
    assert np.linalg.norm(whole) <= clip * (1 + 1e-14)
    asked = np.concatenate([t.double().numpy().ravel() for t in before.values()])
    if np.linalg.norm(asked) <= clip:
        np.testing.assert_array_equal(whole, asked)
    else:
        np.testing.assert_allclose(whole, clip / np.linalg.norm(asked) * asked, rtol=1e-9)


def test_nothing_stays_nothing() -> None:
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert norm(clipped(zero, 1.0)) == 0


def test_noise_has_its_deviation_and_is_new_for_each_name_client_round_and_secret() -> None:
    like = {"one": torch.zeros(200, 500), "two": torch.zeros(200, 500)}
    draws = [
        noise(like, 2.5, secret, "privacy/noise", client, round)
        for secret, client, round in ((1, "a", 1), (2, "a", 1), (1, "b", 1), (1, "a", 2))
    ]
    flat = [tensor.numpy().ravel() for draw in draws for tensor in draw.values()]
    for numbers in flat:
        assert np.std(numbers) == pytest.approx(2.5, rel=0.01)
        assert abs(np.mean(numbers)) < 4 * 2.5 / math.sqrt(numbers.size)
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 5 / math.sqrt(flat[0].size)
    again = noise(like, 2.5, 1, "privacy/noise", "a", 1)
    assert all(torch.equal(again[name], draws[0][name]) for name in like)


def test_noise_cannot_be_searched_for_among_the_seeds_that_a_small_generator_tells_apart() -> None:
    """torch's generator on a CPU takes 32 bits of a seed: two secrets in some 80,000 have the same noise."""
    like, seen = {"one": torch.zeros(20)}, {}
    for secret in range(2**20):
        other = seen.setdefault(derive(secret, "privacy/noise/one", "a", 1) % 2**32, secret)
        if other != secret:
            break
    one, two = (noise(like, 1.0, each, "privacy/noise", "a", 1)["one"] for each in (secret, other))
    assert secret != other
    assert not torch.equal(one, two)


def test_an_update_is_what_a_reference_lacks_and_unknown_tensors_count_from_zero() -> None:
    new, known = update(1), {"A/x": update(2)["A/x"]}
    found = difference({**new, "index/x": torch.ones(3, dtype=torch.int32)}, known)
    assert found.keys() == SHAPES.keys()
    torch.testing.assert_close(found["A/x"], new["A/x"].double() - known["A/x"].double(), rtol=0, atol=0)
    torch.testing.assert_close(found["B/x"], new["B/x"].double(), rtol=0, atol=0)
    back = applied(found, known)
    assert all(torch.equal(back[name], tensor) for name, tensor in new.items())
    assert norm(added(found, found)) == pytest.approx(2 * norm(found))


def test_clipping_is_the_same_to_the_bit_in_whichever_order_tensors_come() -> None:
    """Files give them back in another order at every call, and a member is held to its digest."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        update = {f"t{i}": torch.randn(50 + i, generator=generator) for i in range(12)}
        one, other = clipped(update, 0.1), clipped(dict(reversed(update.items())), 0.1)
        assert all(torch.equal(one[name], other[name]) for name in update)
