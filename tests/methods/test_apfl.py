"""APFL against its formulas; what it has in common with Ditto is tested there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.errors import MethodError, RecipeError
from folklora.federation.run import client_model, run
from folklora.federation.rundir import RunDirectory
from folklora.methods import build, check_options
from folklora.methods.apfl import LEAST
from folklora.methods.work import Trained

LR = 0.05  # of `Federation.descend`


def group(record: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in record.items() if n.startswith(prefix)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    alpha=st.floats(0.01, 1),
    adaptive=st.booleans(),
    steps=st.integers(1, 20),
    rank=st.integers(1, 4),
    who=st.lists(st.lists(st.sampled_from(["ann", "bob"]), min_size=1, unique=True), min_size=1, max_size=4),
)
def test_model_and_share_go_as_the_paper_says(
    federation: Callable[..., Any],
    quadratic: Callable[..., Any],
    alpha: float,
    adaptive: bool,
    steps: int,
    rank: int,
    who: list[list[str]],
) -> None:
    """``v <- v - lr alpha grad f(v_bar)`` step by step in NumPy; alpha by the mean of ``<v - w, grad f(v_bar)>``."""
    options = {"alpha": alpha, "adaptive": adaptive, **({"alpha_lr": 1e-3} if adaptive else {})}
    fed = federation("apfl", options, ranks=(rank, rank), optimizer="sgd").begin()
    share = dict.fromkeys(fed.clients, max(alpha, LEAST) if adaptive else alpha)
    v: dict[str, dict[str, np.ndarray]] = {}
    for round, present in enumerate(who, start=1):
        fed.deliver(present)
        for client in present:
            w = {name: t.double().numpy() for name, t in fed.clients[client].tensors.items()}
            mine, first, slope = v.setdefault(client, w), share[client], 0.0
            moved = {}
            for name, old in mine.items():
                h, a = (t.numpy() for t in quadratic(client, name, fed.clients[client].tensors[name].shape))
                new = old
                for _ in range(steps):
                    gradient = h * (first * new + (1 - first) * w[name] - a)
                    slope += ((old - w[name]) * gradient).sum() / steps
                    new = new - LR * first * gradient
                moved[name] = new
            v[client] = moved
            if adaptive:
                share[client] = min(1.0, max(LEAST, first - 1e-3 * slope))
        fed.descend(round, present, steps=steps)
        fed.state = fed.method.server(round, fed.state, fed.messages(round, present))
        for client, mine in v.items():
            own = fed.method.own(fed.clients[client])
            assert fed.method.alpha(fed.clients[client]) == pytest.approx(share[client], rel=1e-3)
            predicted = fed.method.model(fed.clients[client])
            for name, tensor in own.items():
                # v is what v_bar moved over alpha: so is its rounding.
                np.testing.assert_allclose(tensor.double().numpy(), mine[name], rtol=1e-3, atol=2e-6 / alpha)
                w_now = fed.clients[client].tensors[name].double()
                want = share[client] * tensor.double() + (1 - share[client]) * w_now
                torch.testing.assert_close(predicted[name].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.09), ("adamw", 0.3)])
def test_the_rate_undoes_what_the_mixture_does_to_the_gradient(
    federation: Callable[..., Any], optimizer: str, rate: float
) -> None:
    fed = federation("apfl", {"alpha": 0.3}, optimizer=optimizer).begin()
    common, own = fed.method.work(1, fed.clients["ann"])
    assert common.terms.rate == 1.0
    assert own.terms.rate == pytest.approx(rate)


def test_adamw_through_the_mixture_is_adamw_at_the_rate() -> None:
    """The oracle is autograd: v trained by torch's AdamW through ``alpha v + (1 - alpha) w``."""
    random = torch.Generator().manual_seed(0)
    alpha, w, a = 0.3, torch.randn(20, generator=random).double(), torch.randn(20, generator=random).double()
    v = torch.randn(20, generator=random).double().requires_grad_()
    mixed = (alpha * v + (1 - alpha) * w).detach().requires_grad_()
    through = torch.optim.AdamW([v], lr=0.02, weight_decay=0.0)
    direct = torch.optim.AdamW([mixed], lr=0.02 * alpha, weight_decay=0.0)
    for _ in range(30):
        for optimizer, value in ((through, alpha * v + (1 - alpha) * w), (direct, mixed)):
            optimizer.zero_grad()
            ((value - a) ** 4).sum().backward()
            optimizer.step()
    torch.testing.assert_close(alpha * v + (1 - alpha) * w, mixed, rtol=1e-4, atol=1e-4)  # eps is not scaled


def test_without_a_share_nothing_trains_beside(federation: Callable[..., Any]) -> None:
    fed = federation("apfl", {"alpha": 0.0}).begin()
    for round in (1, 2):
        assert [work.branch for work in fed.method.work(round, fed.clients["ann"])] == [""]
        fed.step(round)
        fed.deliver()
        assert all(same(fed.method.model(client), client.tensors) for client in fed.clients.values())
        assert not any(client.notes for client in fed.clients.values())


def test_an_adaptive_share_stays_where_it_can_learn(federation: Callable[..., Any]) -> None:
    """Steps far too large drive it to its ends, and from the lower one it comes back."""
    fed = federation("apfl", {"alpha": 0.0, "adaptive": True, "alpha_lr": 100.0}, optimizer="sgd").begin()
    seen = set()
    for round in range(1, 12):
        fed.deliver()
        fed.descend(round)
        fed.state = fed.method.server(round, fed.state, fed.messages(round))
        shares = [fed.method.alpha(client) for client in fed.clients.values()]
        assert all(LEAST <= share <= 1 for share in shares)
        seen |= set(shares)
    assert {LEAST, 1.0} <= seen


def test_what_cannot_be_is_one_line(context: Callable[..., Any]) -> None:
    for options in ({"alpha": 1.5}, {"alpha": -0.1}, {"alpha_lr": 0.0}, {"alpha_lr": 0.2}):
        with pytest.raises(RecipeError, match=r"alpha"):
            check_options("apfl", options)
    build("apfl", {"adaptive": True}, context(optimizer="sgd"))
    for given_, said in (({}, '"adamw"'), ({"optimizer": "sgd", "momentum": 0.9}, "momentum = 0.9")):
        with pytest.raises(
            MethodError, match=r"method.adaptive = true .* allowed: \"sgd\" with momentum = 0"
        ) as caught:
            build("apfl", {"adaptive": True}, context(**given_))
        assert said in str(caught.value)


# -- real runs ---------------------------------------------------------------------------------------------------------


def test_real_runs_at_both_ends(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """alpha = 0 is a FedIT run in every number, alpha = 1 has a local run's models, trained one at a time."""
    rows = {}
    for label, name, more in (
        ("fedit", "fedit", ()),
        ("local", "local", ()),
        ("none", "apfl", ("method.alpha=0.0",)),
        ("all", "apfl", ("method.alpha=1.0",)),
    ):
        recipe = tiny_recipe(f"method.name={name}", "train.cohort=1", "data.limit=120", *more)
        row = run(recipe, tmp_path / label)["row"]
        rows[label] = {key: value for key, value in row.items() if not key.startswith(("seconds", "method"))}
    assert rows["none"] == rows["fedit"]
    assert rows["all"]["accuracy_mean"] == rows["local"]["accuracy_mean"]
    assert rows["all"]["accuracy_global"] == rows["fedit"]["accuracy_global"]
    assert rows["all"]["bytes_up_per_client_round"] == rows["fedit"]["bytes_up_per_client_round"]
    local = RunDirectory.open(tmp_path / "local")
    checkpoint = local.checkpoint()
    assert checkpoint is not None
    for client, name in checkpoint.clients.items():
        alone = group(local.tensors(checkpoint, name), "model/")
        assert same(client_model(tmp_path / "all", client).tensors, alone)


def test_the_share_is_the_same_to_the_bit_in_whichever_order_tensors_come(federation: Callable[..., Any]) -> None:
    """A client's record is read back in another order than it was written in."""
    fed = federation("apfl", {"adaptive": True}, ranks=(4, 4), optimizer="sgd").begin()
    ann, random = fed.clients["ann"], torch.Generator().manual_seed(0)
    for _ in range(30):
        w, v, way = ({n: torch.randn(t.shape, generator=random) for n, t in ann.tensors.items()} for _ in range(3))
        shares = []
        for names in (list(w), list(reversed(w))):
            ann.tensors = {name: w[name] for name in names}
            ann.notes = {f"personal/{name}": v[name] for name in names}
            after = {name: tensor - 2e-2 * way[name] for name, tensor in fed.method.model(ann).items()}
            common = Trained(ann.tensors, 1.0, 1, 0.1)
            fed.method.learned(1, ann, {"": common, "personal": Trained(after, 1.0, 1, 0.1)})
            shares.append(float(ann.notes["alpha"]))
        assert shares[0] == shares[1]
