"""Minibatches laid out ahead are the minibatches; what a thread raises is raised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from folklora.training import cohort, prefetch
from folklora.training.prefetch import Prefetch, pinned

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 3])
def test_training_does_not_depend_on_it(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    place = world("bert", core=True, dropout=0.2)
    jobs = place.jobs((23, 9, 40, 3), (3, 1, 8, 4))
    plain = place.fit(jobs, local_epochs=2, cohort=count)
    taken: list[bool] = []

    class Always(Prefetch):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device, always=True)

        def now(self, lay_out: Callable[[], Any]) -> Any:
            taken.append(self.coming is not None)
            return super().now(lay_out)

    monkeypatch.setattr(cohort, "Prefetch", Always)
    ahead = place.fit(jobs, local_epochs=2, cohort=count)
    assert any(taken)
    assert not all(taken)
    for client, fitted in plain.items():
        assert fitted.loss == ahead[client].loss
        assert all(torch.equal(tensor, ahead[client].tensors[name]) for name, tensor in fitted.tensors.items())


def test_on_the_cpu_nothing_is_done_ahead() -> None:
    with Prefetch(CPU) as ahead:
        ahead.ahead(lambda: pytest.fail("not asked for"))
        assert ahead.now(lambda: 5) == 5


def test_an_error_in_the_thread_is_the_callers() -> None:
    def fail() -> None:
        raise ValueError("no such token")

    with Prefetch(CPU, always=True) as ahead:
        ahead.ahead(fail)
        with pytest.raises(ValueError, match="no such token"):
            ahead.now(partial(pytest.fail, "asked twice"))


def test_pinning_reaches_nested_tensors_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Inner:
        tokens: Tensor
        offsets: tuple[int, ...]

    @dataclass(frozen=True)
    class Outer:
        inner: Inner
        targets: Tensor
        packed: bool

    monkeypatch.setattr(prefetch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # needs a GPU
    found = pinned(Outer(Inner(torch.zeros(2), (0, 2)), torch.ones(3), True))
    assert found.inner.tokens.tolist() == [1, 1]
    assert found.inner.offsets == (0, 2)
    assert found.targets.tolist() == [2, 2, 2]
    assert found.packed
