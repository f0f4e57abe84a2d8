"""No slope is so small that it falls out of the numbers a processor is fast with, and none that matters is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.backbones.backbone import Backbone
from folklora.backbones.classification import Classification
from folklora.backbones.contrastive import contrastive_losses
from folklora.backbones.slopes import LEAST, felt


def subnormal(tensor: Tensor) -> int:
    return int(((tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)).sum())


def test_slopes_are_those_in_float64_where_they_are_felt_and_nothing_elsewhere() -> None:
    logits = torch.cat([torch.zeros(40, 1), torch.linspace(-110, 2, 40)[:, None]], dim=1).requires_grad_()
    labels = torch.zeros(40, dtype=torch.int64)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    assert logits.grad is not None
    assert subnormal(logits.grad) > 0  # as it would be
    logits.grad = None
    seen = felt(logits)
    assert seen is logits
    F.cross_entropy(seen, labels, reduction="sum").backward()
    exact = logits.detach().double().softmax(1) - F.one_hot(labels, 2)
    torch.testing.assert_close(
        logits.grad[:, 1].double(), exact[:, 1].where(exact[:, 1] > LEAST, 0.0), rtol=1e-5, atol=0
    )
    assert (logits.grad == 0).any(1).sum() > 10


def test_what_is_no_number_stays_none() -> None:
    logits = torch.tensor([[torch.nan, 1.0]], requires_grad=True)
    F.cross_entropy(felt(logits), torch.tensor([0])).backward()
    assert logits.grad is not None
    assert logits.grad.isnan().all()
    assert felt(torch.ones(2)).grad_fn is None  # nothing to hang a hook on
    assert torch.autograd.gradcheck(lambda x: felt(x * 2), torch.ones(2, dtype=torch.float64, requires_grad=True))


def test_a_sure_classifier_sends_nothing_small_through_its_backbone(
    tiny_model: Callable[[str], Path], company: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = company(Classification(Backbone.load(str(tiny_model("bert"))), 3))
    texts, labels = [[[2, 7, 9, 3]], [[2, 5, 6, 3], [2, 8, 3]]], [[0], [1, 2]]
    _, unsure = group.losses(texts, labels)
    group.owned[0]["head/bias"] = torch.tensor([92.0, 0.0, -3.0])
    _, sure = group.losses(texts, labels)
    for name, grad in sure.items():
        assert subnormal(grad) == 0
        assert not grad[0].any()
        torch.testing.assert_close(grad[1], unsure[name][1], rtol=1e-5, atol=1e-8)
        assert grad[1].any() or name.startswith("norm")
    monkeypatch.setattr("folklora.backbones.slopes.LEAST", 0.0)
    _, raw = group.losses(texts, labels)
    assert sum(subnormal(grad[0]) for grad in raw.values()) > 0  # as it would be


@pytest.mark.parametrize("sigmoid", [False, True])
def test_sure_pairs_neither(sigmoid: bool) -> None:
    logits = (200 * torch.eye(3) - 95)[None].requires_grad_()
    contrastive_losses(
        logits, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, 3, dtype=torch.bool), sigmoid=sigmoid
    ).sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()
