"""The client's own choice: folds, what stands in for what is held out, and that it chooses what serves it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from folklora.data.augmentation import choose
from folklora.data.augmentation.choose import KINDS, Augmenter, stratified
from folklora.data.statistics import ClassStatistics
from folklora.methods.fitting import fit_head

CLASSES, WIDTH = 4, 10
Labelled = tuple[Tensor, Tensor]


def population(each: int, seed: int, noise: float = 1.0) -> Labelled:
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(CLASSES).repeat_interleave(each)
    return centres[labels] + noise * torch.randn(len(labels), WIDTH, generator=random), labels


def fit(real: Labelled, generated: Labelled, kind: str) -> tuple[Tensor, Tensor]:
    return fit_head(real, generated, CLASSES, 1, torch.Generator().manual_seed(0))


def test_folds_deal_every_class_out_and_keep_some_of_it() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] + [3] * 3)
    folds = stratified(labels, 3, torch.Generator().manual_seed(0))
    rows = torch.cat(list(folds))
    assert len(rows) == len(set(rows.tolist())) == 12
    assert 9 not in rows  # the only one of class 2
    for held in folds:
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[held] = False
        assert set(labels[rest].tolist()) == {0, 1, 2, 3}
        assert int((labels[held] == 0).sum()) in (2, 3)


def test_with_one_shot_of_each_class_there_is_nothing_to_validate_on() -> None:
    real = population(1, 0)
    assert not stratified(real[1], 3, torch.Generator())
    shared = ClassStatistics.of(*population(50, 1), CLASSES)
    assert Augmenter(real, CLASSES, 0, "ann", shared).choose(fit) == "none"


def test_two_shots_of_one_class_are_enough() -> None:
    features, labels = population(2, 0)
    real = features[[0, 1, 2, 4, 6]], labels[[0, 1, 2, 4, 6]]
    assert Augmenter(real, CLASSES, 0, "ann").choose(fit) in KINDS


def test_it_takes_everybodys_statistics_where_they_help() -> None:
    others = population(200, 1, noise=1.5)
    for seed in range(5):
        real = population(4, 10 + seed, noise=1.5)
        pooled = ClassStatistics.merge([ClassStatistics.of(*each, CLASSES) for each in (others, real)])
        assert Augmenter(real, CLASSES, seed, "ann", pooled).choose(fit) == "sketch"


def test_it_takes_none_where_made_up_features_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every maker gives its features another class's name."""

    def swapped(real: Labelled, *_: object) -> Labelled:
        return real[0].repeat(5, 1), ((real[1] + 1) % CLASSES).repeat(5)

    monkeypatch.setattr(choose, "per_class", swapped)
    monkeypatch.setattr(choose, "adversarial", swapped)
    features, labels = population(50, 1)
    wrong = ClassStatistics.of(features, (labels + 1) % CLASSES, CLASSES)
    for seed in range(5):
        real = population(4, 10 + seed, noise=0.5)
        pooled = ClassStatistics.merge([wrong, ClassStatistics.of(*real, CLASSES)])
        assert Augmenter(real, CLASSES, seed, "ann", pooled).choose(fit) == "none"


def test_it_takes_the_gan_where_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A maker that knows the classes as they are."""
    monkeypatch.setattr(choose, "adversarial", lambda *_: population(100, 5, noise=1.5))
    assert Augmenter(population(4, 12, noise=1.5), CLASSES, 0, "ann").choose(fit) == "gan"


def test_what_is_held_out_is_in_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a client is alone, everybody's statistics without its held-out examples are those of what it keeps."""
    real = population(4, 0)
    seen: list[tuple[ClassStatistics, Tensor]] = []
    honest = choose.draws

    def spy(statistics: ClassStatistics, labels: Tensor, *rest: object) -> Labelled:
        seen.append((statistics, labels))
        return honest(statistics, labels, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "draws", spy)
    kept: list[Labelled] = []

    def noting(real: Labelled, generated: Labelled, kind: str) -> tuple[Tensor, Tensor]:
        if kind == "sketch":
            kept.append(real)
        return fit(real, generated, kind)

    alone = ClassStatistics.of(*real, CLASSES)
    Augmenter(real, CLASSES, 0, "ann", alone).choose(noting)
    assert len(seen) == len(kept) == 3
    for (statistics, _), rest in zip(seen, kept, strict=True):
        want = ClassStatistics.of(*rest, CLASSES)
        for field in dataclasses.fields(want):
            torch.testing.assert_close(getattr(statistics, field.name), getattr(want, field.name))


def test_kinds_repeat_and_differ_by_client() -> None:
    real = population(3, 0)
    shared = ClassStatistics.of(*population(20, 1), CLASSES)
    for kind in KINDS[1:]:
        one, again, other = (
            Augmenter(real, CLASSES, 0, who, shared).generated(kind)[0] for who in ("ann", "ann", "bob")
        )
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
    assert len(Augmenter(real, CLASSES, 0, "ann", shared).generated("none")[1]) == 0
    assert len(Augmenter(real, CLASSES, 0, "ann").generated("sketch")[1]) == 0
