"""Metrics of attacks, against what they must be by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.privacy.attacks.labels import labels_of
from folklora.privacy.attacks.metrics import (
    BEST_PSNR,
    Texts,
    label_accuracy,
    picture_metrics,
    summary,
    text_metrics,
)
from folklora.privacy.attacks.objective import cosine, signed, squared, tag, total_variation


def _texts(*texts: str) -> Texts:
    return Texts([[ord(c) for c in text.replace(" ", "")] for text in texts], list(texts))


def test_a_text_in_another_order_shares_its_tokens_alone() -> None:
    found = text_metrics(_texts("a b c d"), _texts("d c b a"))
    assert found["token_recall"] == found["rouge_1"] == 1
    assert found["exact_match"] == found["rouge_2"] == 0
    assert found["rouge_l"] == pytest.approx(1 / 4)


def test_a_token_counts_as_often_as_it_occurs() -> None:
    assert text_metrics(_texts("a a b"), _texts("a b c"))["token_recall"] == pytest.approx(2 / 3)


def test_a_batch_has_no_order() -> None:
    found = text_metrics(_texts("a b", "c d"), _texts("c d", "a b"), [[ord("b")], [ord("x")]])
    assert found["exact_match"] == 1
    assert found["canary_recall"] == pytest.approx(1 / 2)


def _see(pictures: Tensor) -> Tensor:
    return pictures.flatten(1)


def test_pictures_that_are_the_same() -> None:
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = picture_metrics(pictures, pictures.flip(0), _see)
    assert found["mse"] == 0
    assert found["psnr"] == BEST_PSNR
    assert found["ssim"] == pytest.approx(1)
    assert found["perceptual"] == pytest.approx(0, abs=1e-6)


def test_a_picture_that_is_off_by_a_tenth() -> None:
    original = torch.full((1, 3, 8, 8), 0.5)
    found = picture_metrics(original, original + 0.1, _see)
    assert found["mse"] == pytest.approx(0.01, rel=1e-5)
    assert found["psnr"] == pytest.approx(20, rel=1e-5)  # 10 log10(1 / 0.01)


def test_labels_are_a_multiset() -> None:
    assert label_accuracy(np.array([1, 1, 2]), torch.tensor([2, 1, 0])) == pytest.approx(2 / 3)


def test_gains_are_over_the_control_and_what_is_no_number_is_left_out() -> None:
    found = summary([{"mse": 1.0, "psnr": math.nan}, {"mse": 3.0}], [{"mse": 5.0}, {"mse": 5.0}])
    assert found == {
        "mse": {
            "mean": 2.0,
            "control": 5.0,
            "gain": -3.0,
            "higher": False,
            "values": [1.0, 3.0],
            "controls": [5.0, 5.0],
        }
    }


@pytest.mark.parametrize("labels", [[4], [0, 0, 3], [1, 2, 3, 3], [2, 2, 2, 2]])
def test_labels_are_read_off_the_gradient_of_a_head(labels: list[int]) -> None:
    """A real softmax regression, at the start of training and of classes that it does not know yet."""
    generator = torch.Generator().manual_seed(len(labels))
    features = torch.randn(len(labels), 6, generator=generator)
    weight = (0.05 * torch.randn(5, 6, generator=generator)).requires_grad_()
    bias = torch.zeros(5, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, torch.tensor(labels))
    by_weight, by_bias = torch.autograd.grad(loss, (weight, bias))
    found = labels_of({"head/weight": by_weight, "head/bias": by_bias}, len(labels))
    assert found is not None
    assert found.tolist() == sorted(labels)


def test_no_head_no_labels() -> None:
    assert labels_of({"A/x": torch.ones(2)}, 1) is None
    assert labels_of({"head/bias": torch.zeros(3)}, 1) is None


def test_objectives_are_zero_at_the_truth_and_nowhere_near() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {"a": torch.randn(4, 3, generator=generator), "b": 1e-4 * torch.randn(5, generator=generator)}
    other = {name: tensor.flip(0) for name, tensor in seen.items()}
    for objective in (squared, cosine, lambda g, s: tag(g, s, 0.01)):
        assert float(objective(seen, seen)) == pytest.approx(0, abs=1e-6)
        assert float(objective(other, seen)) > 0.5
    # A small tensor counts as much as a big one.
    half = {"a": seen["a"], "b": other["b"]}
    assert float(cosine(half, seen)) == pytest.approx(
        (1 - float(torch.nn.functional.cosine_similarity(other["b"], seen["b"], dim=0))) / 2, rel=1e-4
    )


def test_a_tensor_that_cannot_tell_is_left_out() -> None:
    seen = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert float(squared({"a": torch.tensor([3.0, 9.0]), "b": torch.ones(2)}, seen)) == pytest.approx(25 / (25 + 90))


def test_signs_are_what_adamw_makes_of_a_gradient() -> None:
    gradient = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    parameter = torch.zeros(2000, requires_grad=True)
    parameter.grad = gradient.clone()
    torch.optim.AdamW([parameter], lr=1.0, weight_decay=0).step()
    found = signed({"a": gradient})["a"]
    assert float(torch.nn.functional.cosine_similarity(found, -parameter.detach(), dim=0)) > 0.98


def test_total_variation() -> None:
    stripes = torch.tensor([[0.0, 1.0, 0.0]]).expand(1, 1, 2, 3)
    assert float(total_variation(stripes)) == pytest.approx(1)
    assert float(total_variation(torch.full((1, 3, 4, 4), 0.3))) == 0
