"""Server optimisers against the paper's formulas and torch's optimisers, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.errors import RecipeError
from folklora.federation.run import run
from folklora.federation.traffic import per_round
from folklora.methods import EXTENSIONS, METHODS, build, check_options
from folklora.methods.options import FEDOPT
from folklora.methods.server_optimizer import step

RULES = tuple(FEDOPT)
UNIFORM = {"similarity": "uniform"}
TAKING = [(name, UNIFORM if name == "celora" else {}) for name in METHODS if "fedopt" in METHODS[name].combines]
taking = pytest.mark.parametrize(("name", "options"), TAKING, ids=str)
MORE_THAN_A_MEAN = ("fedawa", "fedlpp", "lorafair", "ravan", "hetlora", "hafl", "haflq")
"""Whose server says something else than the weighted mean of equal names."""


def by_the_paper(rule: str, s: Mapping[str, float], x: float, deltas: list[float]) -> list[float]:
    """One number through algorithm 2, and FedAvgM, in Python's floats."""
    m, v, seen = 0.0, s.get("tau", 0.0) ** 2, []
    for delta in deltas:
        if rule == "momentum":
            m = s["beta1"] * m + delta
            x += s["lr"] * m
        else:
            m = s["beta1"] * m + (1 - s["beta1"]) * delta
            if rule == "adagrad":
                v += delta**2
            elif rule == "yogi":
                v -= (1 - s["beta2"]) * delta**2 * np.sign(v - delta**2)
            else:
                v = s["beta2"] * v + (1 - s["beta2"]) * delta**2
            x += s["lr"] * m / (np.sqrt(v) + s["tau"])
        seen.append(x)
    return seen


unit = st.floats(0, 0.999)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    rounds=st.integers(1, 6),
    lr=st.floats(1e-3, 2),
    betas=st.tuples(unit, unit),
    tau=st.floats(1e-4, 1),
    seed=st.integers(0, 2**31),
)
def test_each_number_goes_as_the_paper_says(
    rule: str, shape: list[int], rounds: int, lr: float, betas: tuple[float, float], tau: float, seed: int
) -> None:
    given_settings = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "tau": tau}
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=random)
    x, moments = start, {}
    means, seen = [], []
    for _ in range(rounds):
        means.append(x + torch.randn(shape, generator=random))
        after, moments = step(rule, given_settings, x, means[-1], moments)
        seen.append((x, after))
        x = after
    for where in np.ndindex(*shape):
        deltas = [
            float(mean[where].double() - before[where].double()) for mean, (before, _) in zip(means, seen, strict=True)
        ]
        want = by_the_paper(rule, given_settings, float(start[where]), deltas)
        got = [float(after[where]) for _, after in seen]
        # A float32 model after every round, and moments of such: errors of a few units in the last place each.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * max(1.0, lr * rounds))


@pytest.mark.parametrize("rule", ["momentum", "adagrad", "adam"])
def test_where_torch_has_the_same_optimiser(rule: str) -> None:
    """Adam without its bias correction: lr and eps of each step undo it, and the first v is tau^2."""
    s = {"lr": 0.3, "beta1": 0.0 if rule == "adagrad" else 0.8, "beta2": 0.95, "tau": 0.02}
    random = torch.Generator().manual_seed(4)
    x, moments = torch.randn(5, 3, generator=random), {}
    theirs = x.double().clone().requires_grad_()
    optimizer: torch.optim.Optimizer
    match rule:
        case "momentum":
            optimizer = torch.optim.SGD([theirs], lr=s["lr"], momentum=s["beta1"])
        case "adagrad":
            optimizer = torch.optim.Adagrad([theirs], lr=s["lr"], eps=s["tau"], initial_accumulator_value=s["tau"] ** 2)
        case _:
            optimizer = torch.optim.Adam([theirs], betas=(s["beta1"], s["beta2"]))
            zero = torch.zeros_like(theirs)
            optimizer.state[theirs] = {"step": torch.tensor(0.0), "exp_avg": zero, "exp_avg_sq": zero + s["tau"] ** 2}
    for t in range(1, 9):
        delta = torch.randn(5, 3, generator=random)
        if rule == "adam":
            one, two = 1 - s["beta1"] ** t, 1 - s["beta2"] ** t
            optimizer.param_groups[0].update(lr=s["lr"] * one / two**0.5, eps=s["tau"] / two**0.5)
        theirs.grad = -delta.double()
        optimizer.step()
        x, moments = step(rule, s, x, x + delta, moments)
        torch.testing.assert_close(x.double(), theirs.detach(), rtol=1e-4, atol=1e-5)


def test_settings_not_given_are_the_papers() -> None:
    assert check_options("fedit", {"fedopt": "adam"}).fedopt_settings == {
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.99,
        "tau": 1e-3,
    }
    chosen = check_options("fedit", {"fedopt": "yogi", "fedopt_beta1": 0.0, "fedopt_lr": 0.5})
    assert chosen.fedopt_settings == {"lr": 0.5, "beta1": 0.0, "beta2": 0.99, "tau": 1e-3}
    assert check_options("fedit", {"fedopt": "momentum"}).fedopt_settings == {"lr": 1.0, "beta1": 0.9}


# -- in a federation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [each for each in TAKING if each[0] not in MORE_THAN_A_MEAN], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_replies_follow_the_optimiser(
    federation: Callable[..., Any], name: str, options: dict[str, Any], rule: str
) -> None:
    """From means by hand, in every round of changing participants; the first step is from what all start from."""
    fed = federation(name, {**options, "fedopt": rule, "fedopt_lr": 0.1}, ranks=(3,) * 4).begin()
    scaled = fed.method.adapter.scale(3) if name in {"celora", "folklora"} else 1.0
    chosen = fed.method.options.fedopt_settings
    x = {key: tensor.double().numpy() for key, tensor in fed.method.initial("ann").items()}
    deltas: dict[str, list[np.ndarray]] = {}
    start = dict(x)
    for round, who in enumerate((["ann", "bob"], ["bob", "cid", "dot"], ["ann", "dot"], ["cid"]), start=1):
        messages = fed.step(round, who)
        n = [1 if options == UNIFORM else fed.clients[client].examples for client in who]
        for key in messages[who[0]].tensors:
            mean = np.average([m.tensors[key].double().numpy() for m in messages.values()], axis=0, weights=n)
            factor = scaled if key.startswith("C/") else 1.0  # a core's optimiser sees s C
            deltas.setdefault(key, []).append(factor * (mean - x[key]))
        for client in fed.clients:
            reply = fed.method.reply(fed.state, client).tensors
            for key, history in deltas.items():
                factor = scaled if key.startswith("C/") else 1.0
                got = factor * reply[key].double().numpy()
                where = tuple(np.unravel_index(round % got.size, got.shape))
                want = by_the_paper(rule, chosen, float(factor * start[key][where]), [float(d[where]) for d in history])
                assert got[where] == pytest.approx(want[-1], rel=1e-4, abs=1e-5)
                if name != "rolora" and not np.allclose(history[-1], 0):
                    assert np.abs(got - factor * x[key] - history[-1]).max() > 1e-4  # it is not the mean
        x |= {key: reply[key].double().numpy() for key in deltas}
        fed.deliver()


@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        *((name, {}, (3,) * 4) for name in MORE_THAN_A_MEAN),
        *((name, {}, (2, 4, 3, 1)) for name in ("zeropad", "replication", "hetlora", "hafl", "haflq")),
        ("fedawa", {"weights": "layer", "server_epochs": 20}, (3,) * 4),
        ("lorafair", {"form": "least_squares"}, (3,) * 4),
        ("ravan", {"heads": 2, "budget": 1, "score": "random"}, (3,) * 4),
        ("fedlpp", {"head_start": "sketched"}, (3,) * 4),
    ],
    ids=str,
)
def test_what_the_server_would_say_is_where_its_optimiser_goes(
    federation: Callable[..., Any],
    context: Callable[..., Any],
    name: str,
    options: dict[str, Any],
    ranks: tuple[int, ...],
) -> None:
    """The new model of the method alone, from the same state, is what stands in the mean's place."""
    rule = {"fedopt": "yogi", "fedopt_lr": 0.1}
    fed = federation(name, {**options, **rule}, ranks=ranks).begin()
    alone = build(name, options, context(ranks))
    # FedLPP's clients hold coarse copies of what FedIT's start from, narrow ones parts of it; RAVAN's cores are zero.
    first = build("fedit", {}, context((max(ranks),) * len(ranks))).initial("ann")
    x = {f"global/{key}": tensor for key, tensor in first.items()}
    x |= {key.replace("start/", "global/"): tensor for key, tensor in fed.state.items() if key.startswith("start/")}
    start, deltas = dict(x), {}
    for round, who in enumerate((["ann", "bob"], ["bob", "cid", "dot"], ["ann", "dot"]), start=1):
        before = dict(fed.state)
        messages = fed.step(round, who)
        said = alone.server(round, before, messages)
        names = [key for key in said if key.startswith("global/")]
        assert {key.split("/")[1] for key in names} >= ({"H"} if name == "ravan" else {"A", "B"})
        for key in names:
            x.setdefault(key, torch.zeros_like(said[key]))
            start.setdefault(key, x[key])
            deltas.setdefault(key, []).append((said[key].double() - x[key].double()).numpy())
            got = fed.state[key].double().numpy()
            for where in (tuple(np.unravel_index(place % got.size, got.shape)) for place in (0, 7 * round, -1)):
                history = [float(d[where]) for d in deltas[key]]
                want = by_the_paper("yogi", fed.method.options.fedopt_settings, float(start[key][where]), history)
                assert got[where] == pytest.approx(want[-1], rel=1e-4, abs=1e-5), key
            x[key] = fed.state[key]
        fed.deliver()


@taking
def test_momentum_of_nothing_is_the_mean(federation: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    plain = federation(name, options).begin()
    same = federation(name, {**options, "fedopt": "momentum", "fedopt_beta1": 0.0}).begin()
    for round in (1, 2, 3):
        for fed in (plain, same):
            fed.step(round, ["ann", "cid"] if round == 2 else None)
            fed.deliver()
        for client in plain.clients:
            for key, tensor in plain.clients[client].tensors.items():
                assert torch.equal(same.clients[client].tensors[key], tensor)


@taking
def test_without_it_a_method_is_what_it_was(context: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    plain = build(name, options, context())
    assert type(plain) is METHODS[name]
    with_it = build(name, {**options, "fedopt": "adam"}, context())
    assert with_it.name == name
    for client in ("ann", "bob"):
        assert per_round(plain, client, "float32") == per_round(with_it, client, "float32")


def test_a_factor_that_rests_keeps_its_place_and_its_moments(federation: Callable[..., Any]) -> None:
    fed = federation("rolora", {"fedopt": "adam", "fedopt_lr": 0.1}).begin()
    for round in (1, 2, 3):
        before = dict(fed.state)
        fed.step(round)
        fed.deliver()
        resting = "A/" if round % 2 else "B/"
        for key, tensor in before.items():
            rests = f"/{resting}" in key
            assert torch.equal(fed.state[key], tensor) == rests, key
    assert {key.split("/")[1] for key in fed.state if key.startswith("moment/")} == {"m", "v"}


@pytest.mark.parametrize("rule", RULES)
def test_a_shared_head_that_starts_sketched_is_stepped_from_its_start(
    federation: Callable[..., Any], rule: str
) -> None:
    fed = federation("fedit", {"fedopt": rule, "head_start": "sketched"}).begin()
    start = fed.state["start/head/weight"].double().numpy()
    messages = fed.step(1, ["bob"])
    delta = messages["bob"].tensors["head/weight"].double().numpy() - start
    got = fed.method.reply(fed.state, "ann").tensors["head/weight"]
    want = by_the_paper(rule, fed.method.options.fedopt_settings, float(start[1, 2]), [float(delta[1, 2])])
    assert float(got[1, 2]) == pytest.approx(want[0], rel=1e-5)


def test_cores_of_mixed_ranks_are_stepped_at_the_largest(federation: Callable[..., Any]) -> None:
    fed = federation("folklora", {"fedopt": "momentum", "fedopt_lr": 0.5}, ranks=(2, 5, 3)).begin()
    messages = fed.step(1)
    n = np.array([client.examples for client in fed.clients.values()], dtype=float)
    site = fed.method.context.sites[0].name
    padded = np.zeros((3, 5, 5))
    for k, (client, message) in enumerate(messages.items()):
        r = fed.clients[client].rank
        padded[k, :r, :r] = fed.method.adapter.scale(r) * message.tensors[f"C/{site}"].double().numpy()
    want = 0.5 * np.average(padded, axis=0, weights=n)  # from zero, where a common frame starts
    fed.deliver()
    for client in fed.clients.values():
        r = client.rank
        got = fed.method.adapter.scale(r) * client.tensors[f"C/{site}"].numpy()
        np.testing.assert_allclose(got, want[:r, :r], rtol=1e-5, atol=1e-6)


@taking
def test_a_saved_state_goes_on_as_one_in_memory(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = federation(name, {**options, "fedopt": "yogi"}).begin()
    for round in (1, 2):
        fed.step(round)
        fed.deliver()
    old = {key: tensor.clone() for key, tensor in fed.state.items()}
    saved = safetensors.torch.load(safetensors.torch.save(fed.state))
    fed.train(3)
    messages = fed.messages(3)
    one, two = (fed.method.server(3, state, messages) for state in (fed.state, saved))
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert set(fed.state) == set(old)
    assert all(torch.equal(fed.state[key], tensor) for key, tensor in old.items())
    assert fed.method.mixing(one, messages) is None


# -- what combines with what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", EXTENSIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_an_option_or_refuses_it_by_name(name: str, option: str) -> None:
    value = {"proximal": 0.1, "scaffold": True, "fedopt": "adam"}[option]
    options = {option: value, **(UNIFORM if name == "celora" else {})}
    if option in METHODS[name].combines:
        assert getattr(check_options(name, options), option) == value
        return
    with pytest.raises(RecipeError) as caught:
        check_options(name, options)
    message = str(caught.value)
    assert f"method {name!r}: method.{option} = {value!r} does not combine with it; allowed: " in message
    assert "fedit" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        (
            "fedit",
            {"fedopt_lr": 0.1},
            'fedopt_lr = 0.1 with fedopt = "none"; allowed: fedopt = momentum, adagrad, adam',
        ),
        ("fedit", {"fedopt": "momentum", "fedopt_tau": 0.1}, "allowed: fedopt = adagrad, adam, yogi"),
        ("fedit", {"fedopt": "adagrad", "fedopt_beta2": 0.1}, "allowed: fedopt = adam, yogi"),
        ("fedit", {"fedopt": "adam", "fedopt_beta1": 1.0}, "method.fedopt_beta1 = 1.0"),
        ("fedit", {"fedopt": "adam", "fedopt_tau": 0.0}, "method.fedopt_tau = 0.0"),
        ("fedit", {"fedopt": "sgd"}, "method.fedopt = 'sgd': input should be 'none', 'momentum'"),
        ("celora", {"fedopt": "adam"}, 'similarity = "both" and basis = "private": clients have no core in common'),
        ("folklora", {"fedopt": "adam", "basis": "aligned"}, 'allowed: similarity = "uniform" or "size"'),
        ("celora", {"scaffold": True, "similarity": "data"}, "scaffold = true with similarity"),
    ],
)
def test_what_cannot_be_is_one_line(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options(name, options)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_of_them_compose(federation: Callable[..., Any]) -> None:
    options = {"proximal": 0.1, "scaffold": True, "fedopt": "adam"}
    fed = federation("fedit", options, optimizer="sgd").begin()
    alone = federation("fedit", {"fedopt": "adam"}, examples=(30,) * 3).begin()  # SCAFFOLD's mean is plain
    for round in (1, 2):
        for each in (fed, alone):
            each.step(round)
            each.deliver()
        (work,) = fed.method.work(round + 1, fed.clients["ann"])
        assert work.terms.proximal == 0.1
        assert set(work.terms.anchor) == set(work.terms.correction) == work.trained
        # The fake training does not feel any pull: what is left is the optimiser's.
        for key, tensor in alone.clients["ann"].tensors.items():
            torch.testing.assert_close(fed.clients["ann"].tensors[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_real_run(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    rows = {}
    for rule in ("none", "adam"):
        summary = run(tiny_recipe("method.name=fedit", f"method.fedopt={rule}"), tmp_path / rule)
        rows[rule] = summary["row"]
    assert rows["none"]["aggregation_error"] > 0
    assert rows["adam"]["aggregation_error"] is None
    for key in ("bytes_up_per_client_round", "bytes_down_per_client_round"):
        assert rows["none"][key] == rows["adam"][key]
    assert all(row["accuracy_global"] is not None and row["accuracy_mean"] > 0.2 for row in rows.values())


@pytest.mark.parametrize("rule", ["adagrad", "adam", "yogi"])
def test_an_enormous_delta_is_forgotten_as_any_other(rule: str) -> None:
    """Its square is no float32; infinite it would stay so."""
    settings = {"lr": 1.0, "beta1": 0.0, "beta2": 0.5, "tau": 1e-3}
    x, moments = step(rule, settings, torch.zeros(3), torch.full((3,), 1e30), {})
    assert torch.isfinite(x).all()
    assert torch.isfinite(moments["v"]).all()
    if rule == "adam":
        for _ in range(200):
            _, moments = step(rule, settings, torch.zeros(3), torch.ones(3), moments)
        assert torch.allclose(moments["v"], torch.ones(3))
