"""How a client chooses the start of its head: what it may choose from, and that it chooses what serves it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.data.statistics import ClassStatistics
from folklora.methods import heads
from folklora.methods.discriminant import linear_discriminant
from folklora.methods.heads import candidates, choose_head
from folklora.randomness import torch_generator

Labelled = tuple[Tensor, Tensor]
CLASSES, WIDTH = 10, 16


def population(seed: int, count: int, classes: list[int], noise: float = 0.6, spin: int = 0) -> Labelled:
    """Gaussian classes around fixed centres; ``spin`` gives class c the centre of class c + spin."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=random)]
    places = centres[(labels + spin) % CLASSES]
    return places + noise * torch.randn(count, WIDTH, generator=random), labels


def discriminant(data: Labelled) -> tuple[Tensor, Tensor]:
    return linear_discriminant(ClassStatistics.of(*data, CLASSES))


def choose(
    weight: Tensor, bias: Tensor, train: Labelled, validation: Labelled, epochs: int = 3, seed: int = 0, **other: object
) -> tuple[str, dict[str, Tensor]]:
    """The chosen start, and which candidate it is."""
    arguments = {"steps_lr": 1e-2, "batch_size": 8, "client": "ann", **other}
    head = choose_head(weight, bias, train, validation, epochs=epochs, seed=seed, **arguments)  # type: ignore[arg-type]
    for option in candidates(weight, bias, train[1]):
        if torch.equal(option.weight, head["head/weight"]) and torch.equal(option.bias, head["head/bias"]):
            return option.label, head
    raise AssertionError("what was chosen is none of the candidates: not a start")


def accuracy(head: dict[str, Tensor], data: Labelled) -> float:
    logits = data[0] @ head["head/weight"].T + head["head/bias"]
    return float((logits.argmax(1) == data[1]).float().mean())


def test_candidates_are_zero_and_the_sketch_by_scale_prior_and_classes() -> None:
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 3, generator=random), torch.randn(4, generator=random)
    labels = torch.tensor([0, 0, 2, 0])
    found = {option.label: option for option in candidates(weight, bias, labels)}
    scales = ("1", "0.5", "0.25", "0.1")
    kinds = ("pooled prior", "own prior", "own classes")
    assert list(found) == ["zero", "zero, own classes", *(f"sketched x {s}, {kind}" for s in scales for kind in kinds)]
    # By Laplace's rule: counts 3, 0, 1, 0 of 4 examples in 4 classes.
    prior = np.log(np.array([4, 1, 2, 1]) / 8)
    mask = np.array([0.0, -10, 0, -10])
    for label, option in found.items():
        scale = float(label.split()[2].rstrip(",")) if label.startswith("sketched") else 0.0
        shift = {"own prior": prior, "own classes": mask}.get(label.split(", ")[-1], np.zeros(4))
        np.testing.assert_allclose(option.weight.numpy(), scale * weight.numpy(), rtol=1e-6)
        np.testing.assert_allclose(option.bias.numpy(), scale * bias.numpy() + shift, rtol=1e-6, atol=1e-6)


def test_informative_statistics_and_little_data_choose_the_sketch() -> None:
    everyone = list(range(CLASSES))
    weight, bias = discriminant(population(0, 2000, everyone))
    train, validation = population(1, 15, everyone), population(2, 40, everyone)
    for epochs in (0, 3):
        label, head = choose(weight, bias, train, validation, epochs)
        assert label.startswith("sketched")
        assert accuracy(head, population(3, 500, everyone)) > 0.9


def test_statistics_of_other_labels_choose_zero() -> None:
    """Everybody else calls this client's classes by other names: what they know is wrong here."""
    everyone = list(range(CLASSES))
    weight, bias = discriminant(population(0, 2000, everyone, noise=0.2))
    train, validation = population(1, 80, [0, 1, 2], spin=1), population(2, 40, [0, 1, 2], spin=1)
    label, head = choose(weight, bias, train, validation)
    assert label.startswith("zero")
    assert not head["head/weight"].any()


def test_clients_with_few_classes_of_their_own_keep_to_them() -> None:
    """The pooled classes come in confusable pairs, and this client has one of each pair."""
    random = torch.Generator().manual_seed(5)
    centres = torch.randn(5, WIDTH, generator=random).repeat_interleave(2, 0)
    labels = torch.arange(CLASSES).repeat(100)
    pooled = centres[labels] + 0.3 * torch.randn(1000, WIDTH, generator=random), labels
    weight, bias = discriminant(pooled)

    def own(count: int) -> Labelled:
        y = 2 * torch.randint(5, (count,), generator=random)
        return centres[y] + 0.3 * torch.randn(count, WIDTH, generator=random), y

    train, validation = own(20), own(40)
    label, head = choose(weight, bias, train, validation, epochs=0)
    assert "own" in label
    assert accuracy(head, own(400)) > 0.85
    assert accuracy({"head/weight": weight, "head/bias": bias}, own(400)) < 0.7


def test_training_decides_not_the_start_alone() -> None:
    """A sketch that is half right beats a zero head at the start, and loses to it once both have learnt."""
    weight, bias = discriminant(population(0, 2000, list(range(CLASSES)), noise=0.2))
    features, labels = population(1, 120, [0, 1, 2, 3], noise=0.2)
    swapped = torch.where(labels < 2, labels, 5 - labels)  # this client calls 2 what others call 3
    train, validation = (features[:80], swapped[:80]), (features[80:], swapped[80:])
    assert choose(weight, bias, train, validation, epochs=0)[0].startswith("sketched")
    assert choose(weight, bias, train, validation, epochs=10)[0].startswith("zero")


def test_the_choice_repeats_and_changes_nothing_it_was_given() -> None:
    weight, bias = discriminant(population(0, 500, list(range(CLASSES))))
    train, validation = population(1, 30, [0, 1, 2, 3]), population(2, 12, [0, 1, 2, 3])
    given = [t.clone() for t in (weight, bias, *train, *validation)]
    state = torch.random.get_rng_state()
    one = choose_head(weight, bias, train, validation, steps_lr=1e-2, batch_size=8, epochs=3, seed=0, client="ann")
    torch.manual_seed(123)
    two = choose_head(weight, bias, train, validation, steps_lr=1e-2, batch_size=8, epochs=3, seed=0, client="ann")
    torch.random.set_rng_state(state)
    assert all(torch.equal(one[name], two[name]) for name in ("head/weight", "head/bias"))
    assert all(torch.equal(a, b) for a, b in zip(given, (weight, bias, *train, *validation), strict=True))
    for tensor in one.values():
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
        assert tensor.dtype == torch.float32
    # What comes back is the client's own memory: training it moves nobody else's.
    one["head/weight"].fill_(7)
    assert torch.equal(weight, given[0])


@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_one_class_only(epochs: int) -> None:
    weight, bias = discriminant(population(0, 500, list(range(CLASSES))))
    train, validation = population(1, 12, [4]), population(2, 5, [4])
    _, head = choose(weight, bias, train, validation, epochs)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in head.values())
    assert accuracy(head, population(3, 50, [4])) == 1.0


def test_validation_may_hold_classes_that_training_does_not() -> None:
    everyone = list(range(CLASSES))
    weight, bias = discriminant(population(0, 2000, everyone))
    train, validation = population(1, 20, [0, 1, 2]), population(2, 20, [7, 8, 9])
    label, head = choose(weight, bias, train, validation)
    assert label.startswith("sketched")
    assert "own classes" not in label
    assert accuracy(head, population(3, 200, [7, 8, 9])) > 0.7


def test_one_example_on_either_side() -> None:
    weight, bias = discriminant(population(0, 500, list(range(CLASSES))))
    choose(weight, bias, population(1, 1, [3]), population(2, 1, [3]))
    zeros = torch.zeros(CLASSES, WIDTH), torch.zeros(CLASSES)
    choose(*zeros, population(1, 1, [3]), population(2, 1, [5]))  # statistics of nobody


def value_of_one(start: heads.Candidate, train: Labelled, validation: Labelled, seed: int, epochs: int) -> float:
    """The oracle: this start alone in a torch layer; its best epoch by errors, and among equals by likelihood."""
    layer = torch.nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(start.weight)
        layer.bias.copy_(start.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-2, weight_decay=0.0)
    order = torch_generator(seed, "head", "ann")
    seen = []
    for epoch in range(epochs + 1):
        if epoch:
            shuffled = torch.randperm(len(train[1]), generator=order)
            for i in range(0, len(shuffled), 8):
                picks = shuffled[i : i + 8]
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(train[0][picks]), train[1][picks]).backward()
                optimizer.step()
        with torch.no_grad():
            logits = layer(validation[0])
            errors = int((logits.argmax(1) != validation[1]).sum())
            seen.append((errors, float(torch.nn.functional.cross_entropy(logits, validation[1]))))
    errors, loss = min(seen)
    return errors + loss / 1e6


def test_side_by_side_is_each_candidate_by_itself() -> None:
    weight, bias = discriminant(population(0, 60, list(range(CLASSES)), noise=1.5))
    chosen = set()
    for seed in range(8):
        classes = list(range(CLASSES)) if seed % 2 else [0, 1, 2, 3]
        train, validation = population(10 + seed, 42, classes, noise=1.2), population(30 + seed, 25, classes, noise=1.2)
        options = candidates(weight, bias, train[1])
        values = [value_of_one(option, train, validation, seed, epochs=4) for option in options]
        label, _ = choose(weight, bias, train, validation, seed=seed, epochs=4, steps_lr=3e-2)
        assert label == options[int(np.argmin(values))].label
        chosen.add(label)
    assert len(chosen) > 2  # the examples do not all ask for the same
