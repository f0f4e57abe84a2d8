"""A head that stays home and the classes that its client did not have before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from folklora.data.statistics import ClassStatistics
from folklora.methods.contract import Message
from folklora.methods.discriminant import linear_discriminant
from folklora.methods.heads import ABSENT
from folklora.methods.renewal import Renewal

SKETCHED = {"head": "sketched", "head_start": "sketched", "refresh": 1}


def only(data: tuple[Tensor, Tensor], classes: set[int]) -> tuple[Tensor, Tensor]:
    keep = torch.tensor([int(label) in classes for label in data[1]])
    return data[0][keep], data[1][keep]


@pytest.fixture
def changed(federation: Callable[..., Any]) -> Callable[..., Any]:
    """``changed(options)`` -> a federation whose first client begins with the classes 0 and 1, and gets the others."""

    def make(options: dict[str, Any]) -> tuple[Any, Any]:
        fed = federation("folklora", options, examples=(40, 30, 36))
        ann = fed.clients["ann"]
        whole = ann.data
        few = replace(whole, train=only(whole.train, {0, 1}), validation=only(whole.validation, {0, 1}))
        ann.data = few
        fed.begin()
        fed.step(1)
        fed.deliver()
        ann.data = whole
        return fed, ann

    return make


def refresh(fed: Any, round: int = 2) -> None:
    assert fed.method.refreshes(round)
    fed.state = fed.method.refresh(round, fed.state, fed.sketches())


def test_rows_of_new_classes_are_those_of_everybodys_statistics_of_now(changed: Callable[..., Any]) -> None:
    fed, ann = changed(SKETCHED)
    before = {name: tensor.clone() for name, tensor in ann.tensors.items() if name.startswith("head/")}
    refresh(fed)
    fed.deliver()
    pooled = ClassStatistics.merge([ClassStatistics.of(*c.data.features("train"), 4) for c in fed.clients.values()])
    weight, bias = linear_discriminant(pooled)
    for name, start in (("head/weight", weight), ("head/bias", bias)):
        above = [each[2:] - each[:2].mean(0) for each in (ann.tensors[name], start)]
        torch.testing.assert_close(*above, rtol=1e-3, atol=1e-3)
        assert torch.equal(ann.tensors[name][:2], before[name][:2])


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [2, 3], [0, 2]])
def test_new_rows_lie_at_the_level_of_the_head_they_join(labels: list[int]) -> None:
    """Logits mean nothing but their differences: what is added to all rows of either head must not matter. Features far
    from the origin make two discriminants differ by just that, and by much."""
    random = torch.Generator().manual_seed(0)
    start, kept, common = (torch.randn(4, 7, generator=random) for _ in range(3))
    new, x = torch.tensor([2, 3]), torch.randn(5, 6, generator=random)

    def answers(start: Tensor, kept: Tensor) -> Tensor:
        renewal = Renewal(start[:, :6], start[:, 6], new)
        head = renewal.with_rows({"head/weight": kept[:, :6], "head/bias": kept[:, 6]}, torch.tensor(labels))
        return (x @ head["head/weight"].T + head["head/bias"]).log_softmax(1)

    plain, far = answers(start, kept), 100 * common[:1]
    torch.testing.assert_close(answers(start + far, kept), plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(answers(start, kept + far), plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        answers(start, start + far), (x @ start[:, :6].T + start[:, 6]).log_softmax(1), atol=1e-3, rtol=1e-3
    )


def test_only_who_has_new_classes_is_told_and_only_until_it_took_part(changed: Callable[..., Any]) -> None:
    fed, _ = changed(SKETCHED)

    def told() -> set[str]:
        return {name for name in fed.clients if "new/classes" in fed.method.reply(fed.state, name).tensors}

    assert told() == set()
    refresh(fed)
    assert told() == {"ann"}
    assert fed.method.reply(fed.state, "ann").tensors["new/classes"].tolist() == [2, 3]
    others = [name for name in fed.clients if name != "ann"]
    fed.step(2, others)
    assert told() == {"ann"}  # it was away
    fed.deliver()
    fed.step(3)
    assert told() == set()
    refresh(fed, 4)
    assert told() == set()  # nothing is new any more


def test_the_same_reply_twice_changes_nothing(changed: Callable[..., Any]) -> None:
    for options in (SKETCHED, {"refresh": 1}):
        fed, ann = changed(options)
        refresh(fed)
        fed.deliver(["ann"])
        once = {name: tensor.clone() for name, tensor in ann.tensors.items()}
        notes = {name: tensor.clone() for name, tensor in ann.notes.items()}
        fed.deliver(["ann"])
        assert all(torch.equal(ann.tensors[name], tensor) for name, tensor in once.items())
        assert all(torch.equal(ann.notes[name], tensor) for name, tensor in notes.items())


def test_a_chosen_head_that_shuts_new_classes_out_is_chosen_again(changed: Callable[..., Any]) -> None:
    """It began with 0 and 1 alone in reach; kept as it is it never names another class."""
    fed, ann = changed({"refresh": 1})
    x, y = ann.data.features("validation")

    def right() -> float:
        logits = x @ ann.tensors["head/weight"].T + ann.tensors["head/bias"]
        return float((logits.argmax(1) == y)[y >= 2].float().mean())

    ann.tensors["head/bias"] = torch.tensor([0.0, 0.0, ABSENT, ABSENT])
    ann.tensors["head/weight"] = torch.zeros(4, 6)
    assert right() == 0.0
    refresh(fed)
    fed.deliver()
    assert right() > 0.5


def test_a_head_that_serves_is_kept(changed: Callable[..., Any]) -> None:
    fed, ann = changed({"refresh": 1})
    x, y = ann.data.features("validation")
    # Far beyond what statistics could do: the validation split by heart.
    perfect = torch.linalg.lstsq(
        torch.cat([x, torch.ones(len(x), 1)], 1), 100 * torch.nn.functional.one_hot(y, 4).float()
    ).solution
    ann.tensors["head/weight"], ann.tensors["head/bias"] = perfect[:-1].T.contiguous(), perfect[-1].clone()
    if not bool(((x @ perfect[:-1] + perfect[-1]).argmax(1) == y).all()):
        pytest.skip("these features cannot be told apart by a line")
    kept = ann.tensors["head/weight"].clone()
    refresh(fed)
    fed.deliver()
    assert torch.equal(ann.tensors["head/weight"], kept)


def test_a_shared_head_and_one_from_zero_get_nothing(federation: Callable[..., Any]) -> None:
    for options in (
        {"head": "shared", "head_start": "sketched", "refresh": 1},
        {"head": "private", "head_start": "zero", "similarity": "data", "refresh": 1},
    ):
        fed = federation("folklora", options, examples=(40, 30, 36)).begin()
        fed.step(1)
        fed.state = fed.method.refresh(2, fed.state, fed.sketches())
        reply = fed.method.reply(fed.state, "ann")
        assert not {name for name in reply.tensors if name.startswith(("start/", "new/"))}


def test_a_refresh_is_as_if_the_run_began_now(federation: Callable[..., Any]) -> None:
    """Similarities, statistics and the sketched head: of whom nothing came, by what it sent last."""
    options = {"similarity": "data", "components": 2, "refresh": 3}
    fed = federation("folklora", options, examples=(40, 30, 36)).begin()
    sketches = fed.sketches()
    other = federation("folklora", options, examples=(60, 50, 44))
    newer = {name: message for name, message in other.sketches().items() if name != "bob"}
    state = fed.method.refresh(4, fed.state, newer)
    expected = fed.method.begin({name: newer.get(name, sketches[name]) for name in fed.clients})
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(state["similarity/data"], fed.state["similarity/data"])
    assert fed.state.keys() <= state.keys()
    assert [round for round in range(1, 12) if fed.method.refreshes(round)] == [4, 7, 10]


def test_names_with_slashes_keep_their_sketches(federation: Callable[..., Any]) -> None:
    fed = federation("folklora", {"similarity": "data", "refresh": 1}, examples=(40, 30, 36)).begin()
    state = {"sketch/a/b/statistics/counts": torch.ones(1)}
    assert list(fed.method._last_sketches(state)) == ["a/b"]
    assert isinstance(fed.method._last_sketches(fed.state)["ann"], Message)
