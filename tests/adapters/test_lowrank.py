"""Shapes, scaling and starting values: against PEFT's own initialiser, closed-form distributions and linear algebra."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

from folklora.adapters.lowrank import (
    LowRank,
    Site,
    factor_generator,
    gaussian,
    kaiming,
    kind,
    orthonormal,
    select,
)

SITES = (Site("a.query", 6, 10), Site("b.value", 8, 4))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shapes_are_the_papers() -> None:
    shapes = LowRank(SITES, core=True, alpha=16.0).shapes(3)
    assert shapes == {
        "A/a.query": (3, 6),
        "C/a.query": (3, 3),
        "B/a.query": (10, 3),
        "A/b.value": (3, 8),
        "C/b.value": (3, 3),
        "B/b.value": (4, 3),
    }
    assert list(LowRank(SITES, core=False, alpha=16.0).shapes(2)) == [
        "A/a.query",
        "B/a.query",
        "A/b.value",
        "B/b.value",
    ]


def test_scale_and_largest_rank() -> None:
    adapter = LowRank(SITES, core=False, alpha=16.0)
    assert [adapter.scale(rank) for rank in (1, 4, 32)] == [16.0, 4.0, 0.5]
    assert adapter.max_rank() == 4


def test_kinds_are_what_stands_before_the_first_slash() -> None:
    tensors = {"A/x/y": torch.zeros(1), "head/weight": torch.ones(1), "B/x": torch.ones(1)}
    assert [kind(name) for name in tensors] == ["A", "head", "B"]
    assert list(select(tensors, frozenset({"B", "A"}))) == ["A/x/y", "B/x"]


@pytest.mark.parametrize("shape", [(4, 32), (8, 384), (1, 1)])
def test_kaiming_is_what_peft_calls_for_lora_a(shape: tuple[int, int]) -> None:
    theirs = torch.empty(shape)
    nn.init.kaiming_uniform_(
        theirs, a=math.sqrt(5), generator=generator()
    )  # peft.tuners.lora.layer.reset_lora_parameters
    torch.testing.assert_close(kaiming(shape, generator()), theirs, rtol=1e-6, atol=1e-7)


def test_kaiming_has_the_distribution_of_a_fresh_peft_layer() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoraConfig(r=16, target_modules=["0"]))
    theirs = next(p for name, p in model.named_parameters() if "lora_A" in name).detach()
    ours = kaiming((16, 64), generator())
    assert ours.abs().max() <= 1 / 8
    assert theirs.abs().max() <= 1 / 8
    assert stats.ks_2samp(ours.flatten(), theirs.flatten()).pvalue > 0.01
    assert stats.kstest(ours.flatten(), stats.uniform(-1 / 8, 1 / 4).cdf).pvalue > 0.01


def test_gaussian() -> None:
    drawn = gaussian((64, 64), generator(), 1e-3)
    assert drawn.dtype == torch.float32
    assert stats.kstest(drawn.flatten(), stats.norm(0, 1e-3).cdf).pvalue > 0.01


@pytest.mark.parametrize("shape", [(4, 32), (32, 4), (5, 5), (1, 7), (1, 1)])
def test_orthonormal_along_the_short_side(shape: tuple[int, int]) -> None:
    drawn = orthonormal(shape, generator())
    assert drawn.shape == shape
    assert drawn.dtype == torch.float32
    assert drawn.is_contiguous()
    short = drawn.double() if shape[0] <= shape[1] else drawn.double().T
    torch.testing.assert_close(short @ short.T, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (3, 3)])
def test_orthonormal_is_uniform(shape: tuple[int, int]) -> None:
    """A coordinate of a random unit vector in three dimensions is uniform in [-1, 1] (Archimedes): so is any entry."""
    drawn = torch.stack([orthonormal(shape, generator(seed)) for seed in range(500)])
    for entry in drawn.flatten(1).T:
        assert stats.kstest(entry, stats.uniform(-1, 2).cdf).pvalue > 1e-4
    if shape == (3, 3):
        signs = torch.linalg.det(drawn).sign()
        assert abs(float(signs.mean())) < 4 / math.sqrt(500)  # as many rotations as reflections


def test_a_factor_depends_on_seed_name_and_client_alone() -> None:
    draw = lambda *key: kaiming((3, 5), factor_generator(*key))
    torch.manual_seed(1)
    first = draw(7, "A/x")
    torch.manual_seed(2)
    torch.randn(3)
    assert torch.equal(first, draw(7, "A/x"))
    others = [draw(8, "A/x"), draw(7, "A/y"), draw(7, "A/x", "0"), draw(7, "A/x", "1")]
    assert all(not torch.equal(first, other) for other in others)
    assert not torch.equal(others[2], others[3])
    for start in (lambda g: orthonormal((3, 5), g), lambda g: gaussian((3, 5), g, 1.0)):
        assert torch.equal(start(factor_generator(7, "A/x")), start(factor_generator(7, "A/x")))
