"""The GAN: what it makes has the classes' places and spread, and repeats."""

from __future__ import annotations

import torch

from folklora.data.augmentation.gan import Settings, adversarial

WIDTH = 12


def clusters(each: int, noise: float = 1.0, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each) * 2  # classes 0, 2, 4
    centres = 2 * torch.randn(2 * classes, WIDTH, generator=random)
    return centres[labels] + noise * torch.randn(len(labels), WIDTH, generator=random), labels


def made(real: tuple[torch.Tensor, torch.Tensor], count: int = 30, seed: int = 0, **settings: int):
    return adversarial(real, count, torch.Generator().manual_seed(seed), Settings(**settings))


def test_features_lie_at_their_own_class_and_are_not_copies() -> None:
    real = clusters(8)
    features, labels = made(real)
    assert labels.tolist() == [0] * 30 + [2] * 30 + [4] * 30
    assert features.dtype == torch.float32
    nearest = torch.cdist(features, real[0]).min(1)
    assert float((real[1][nearest.indices] == labels).double().mean()) > 0.9
    assert float(nearest.values.min()) > 0.05
    for c in (0, 2, 4):  # neither collapsed nor blown up beside the real spread of 1 in 12 dimensions
        assert 0.3 < float(features[labels == c].var(0).sum() / WIDTH) < 3


def test_the_same_seed_makes_the_same_bits_and_moves_no_other_generator() -> None:
    real = clusters(3)
    state = torch.random.get_rng_state()
    one, other = made(real, steps=20), made(real, steps=20)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[0], made(real, seed=1, steps=20)[0])
    assert torch.equal(state, torch.random.get_rng_state())


def test_it_stays_in_the_span_of_the_real_features() -> None:
    features, labels = clusters(2)
    whole = torch.cat([features, torch.zeros(len(features), 5)], 1)
    assert float(made((whole, labels), steps=20)[0][:, WIDTH:].abs().max()) < 1e-5


def test_too_little_to_learn_from_makes_nothing() -> None:
    features, labels = clusters(3)
    for real in ((features[:2], labels[:2]), (torch.ones(6, WIDTH), labels[:6]), (features[:0], labels[:0])):
        drawn, of = made(real)
        assert drawn.shape == (0, WIDTH)
        assert len(of) == 0


def test_a_single_class_of_three() -> None:
    features, labels = clusters(3)
    drawn, of = made((features[:3], labels[:3]), steps=20)
    assert of.tolist() == [0] * 30
    assert bool(torch.isfinite(drawn).all())
