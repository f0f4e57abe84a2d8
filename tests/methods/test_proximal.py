"""FedProx: what is pulled, to where, and that the trainer feels it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folklora.federation.local import LocalEngine
from folklora.federation.run import run
from folklora.federation.setup import prepare
from folklora.federation.traffic import per_round
from folklora.methods import METHODS, build
from folklora.methods.work import Terms
from folklora.training.terms import TermRows

TAKING = [name for name in METHODS if "proximal" in METHODS[name].combines]


@pytest.mark.parametrize("name", TAKING)
def test_what_trains_and_travels_is_pulled_to_the_start_of_the_round(federation: Callable[..., Any], name: str) -> None:
    # Whoever is not told goes on with the experts it has.
    still = {"assignment": "static"} if name == "fedamole" else {}
    fed = federation(name, {"proximal": 0.3, **still}).begin()
    for round in (1, 2, 3):
        for client in fed.clients.values():
            common, *others = fed.method.work(round, client)
            travels = fed.method.shared(round)
            travels |= {"C", "gain"} if "H" in travels else set()  # RAVAN's heads go up as products of these
            shared = {key for key in common.trained if key.partition("/")[0] in travels}
            assert shared
            assert set(common.terms.anchor) == shared
            assert common.terms.proximal == 0.3
            assert all(torch.equal(t, common.tensors[key]) for key, t in common.terms.anchor.items())
            assert all(work.terms.proximal != 0.3 for work in others)
        fed.step(round, ["ann", "cid"])
        fed.deliver(["ann"])  # bob and cid start the next round from what they hold


def test_a_private_head_is_not_pulled(federation: Callable[..., Any]) -> None:
    fed = federation("fedit", {"proximal": 0.3, "head": "private"}).begin()
    (work,) = fed.method.work(1, fed.clients["ann"])
    assert {key.partition("/")[0] for key in work.trained - set(work.terms.anchor)} == {"head"}


@pytest.mark.parametrize("name", TAKING)
def test_it_costs_no_byte(context: Callable[..., Any], name: str) -> None:
    plain, pulled = build(name, {}, context()), build(name, {"proximal": 1.0}, context())
    assert per_round(plain, "ann", "float32") == per_round(pulled, "ann", "float32")
    assert type(plain) is METHODS[name]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_is_added_is_the_gradient_of_the_papers_term(data: st.DataObject) -> None:
    """Of ``mu / 2 ||theta - theta_g||^2`` by torch's own differentiation: clients of any number and shapes, each with a
    mu of its own, some pulled in part or not at all."""
    shapes = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4))
    names, sizes = [f"t{i}" for i in range(len(shapes))], [int(torch.Size(shape).numel()) for shape in shapes]
    mus = data.draw(st.lists(st.sampled_from([0.0, 0.01, 1.0, 37.5]), min_size=1, max_size=4))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    values, grads = (torch.randn(len(mus), sum(sizes), generator=random) for _ in range(2))

    def fill(row: Tensor, tensors: dict[str, Tensor]) -> None:
        for name, columns in zip(names, row.split(sizes), strict=True):
            if name in tensors:
                columns.copy_(tensors[name].flatten())

    asked = []
    for mu in mus:
        pulled = [name for name in names if data.draw(st.booleans())]
        anchor = {name: torch.randn(shapes[names.index(name)], generator=random) for name in pulled if mu}
        asked.append(Terms(anchor=anchor, proximal=mu if anchor else 0.0))
    rows = TermRows(asked, len(mus), sum(sizes), torch.device("cpu"))
    for k, terms in enumerate(asked):
        rows.seat(k, terms, fill)
    got = grads.clone()
    rows.before_moving(values, got)
    for k, terms in enumerate(asked):
        theta = values[k].clone().requires_grad_()
        parts = dict(zip(names, theta.split(sizes), strict=True))
        distance = sum((parts[name] - t.flatten()).square().sum() for name, t in terms.anchor.items())
        (terms.proximal / 2 * distance + (grads[k] * theta).sum()).backward()
        torch.testing.assert_close(got[k], theta.grad, rtol=1e-5, atol=1e-6)


# -- real training -----------------------------------------------------------------------------------------------------


def trained(recipe: Any) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, torch.Tensor]]]:
    """Each client's tensors before and after its first local training."""
    engine = LocalEngine(prepare(recipe))
    start = {client: dict(member.client.tensors) for client, member in engine.members.items()}
    assert all(upload.failure is None for upload in engine.train(1, list(engine.members)))
    return start, {client: dict(member.client.tensors) for client, member in engine.members.items()}


def farthest(start: Any, end: Any) -> dict[str, float]:
    return {
        client: max(float((end[client][key] - tensor).norm()) for key, tensor in tensors.items())
        for client, tensors in start.items()
    }


def test_no_pull_is_fedit_and_a_strong_one_holds_the_start(tiny_recipe: Callable[..., Any]) -> None:
    settings = ("method.name=fedit", "train.optimizer=sgd", "train.lr=0.05", "train.local_epochs=3")
    start, free = trained(tiny_recipe(*settings))
    # So weak a pull is lost in rounding: the training is FedIT's bit for bit, though it goes through the same steps.
    _, weak = trained(tiny_recipe(*settings, "method.proximal=1e-30"))
    assert all(torch.equal(weak[client][key], tensor) for client in free for key, tensor in free[client].items())
    # lr * mu = 1: each step goes back to the anchor and adds one clipped gradient step to it.
    _, held = trained(tiny_recipe(*settings, "method.proximal=20.0"))
    far, near = farthest(start, free), farthest(start, held)
    assert max(near.values()) <= 0.05 * 1.001
    assert min(near.values()) > 0
    assert all(near[client] < far[client] / 2 for client in far)
    # Nearer, the stronger, at the same learning rate.
    _, between = trained(tiny_recipe(*settings, "method.proximal=2.0"))
    middle = farthest(start, between)
    assert all(near[client] < middle[client] < far[client] for client in far)


def test_a_real_run(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    row = run(tiny_recipe("method.name=fedsa", "method.proximal=0.1"), tmp_path / "run")["row"]
    assert row["accuracy_mean"] > 0.2
    assert row["aggregation_error"] > 0
