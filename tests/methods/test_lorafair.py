"""LoRA-FAIR against products built in full, in float64: the closed form, and the descent on dB itself by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folklora.adapters.lowrank import Site
from folklora.errors import MethodError, RecipeError
from folklora.methods import build, check_options
from folklora.methods.aggregation import aggregation_error
from folklora.methods.contract import Context, Message
from folklora.methods.lorafair import Means, descend, least_squares

problems = {
    "clients": st.integers(1, 6),
    "rank": st.integers(1, 4),
    "d_in": st.integers(4, 12),
    "d_out": st.integers(4, 12),  # from narrower than 2 r
    "scale": st.sampled_from([1e-2, 1.0, 30.0]),
    "seed": st.integers(0, 999),
}


def problem(
    clients: int, rank: int, d_in: int, d_out: int, scale: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [K], all A_k, all B_k, and the product that was meant, dense [d_out, d_in]."""
    rng = np.random.default_rng(seed)
    p = torch.from_numpy(rng.dirichlet(np.ones(clients)))
    a = torch.from_numpy(rng.normal(size=(clients, rank, d_in)) / d_in**0.5)
    b = torch.from_numpy(scale * (rng.normal(size=(d_out, rank)) + rng.normal(size=(clients, d_out, rank))))
    return p, a, b, sum(w * y @ x for w, x, y in zip(p, a, b, strict=True))


def printed(db: Tensor, mean_b: Tensor, mean_a: Tensor, wanted: Tensor, lam: float) -> Tensor:
    """The cosine form, dense, with the sign that makes sense."""
    product = (mean_b + db) @ mean_a
    return 1 - (wanted * product).sum() / (wanted.norm() * product.norm()) + lam * db.norm()


# -- least squares ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(**problems, lam=st.sampled_from([0.0, 1e-3, 0.01, 1.0]))
def test_the_closed_form(clients: int, rank: int, d_in: int, d_out: int, scale: float, seed: int, lam: float) -> None:
    p, a, b, wanted = problem(clients, rank, d_in, d_out, scale, seed)
    mean_a, mean_b = np.average(a, axis=0, weights=p), np.average(b, axis=0, weights=p)
    ridge = mean_a @ mean_a.T + lam * np.eye(rank)
    db = (wanted.numpy() - mean_b @ mean_a) @ mean_a.T @ np.linalg.inv(ridge)
    found = least_squares(Means.of(p, a, b), lam)
    np.testing.assert_allclose(found.numpy(), mean_b + db, rtol=1e-7, atol=1e-9 * scale)
    # And it is the minimiser: no slope there.
    leaf = torch.from_numpy(db).requires_grad_()
    product = (torch.from_numpy(mean_b) + leaf) @ torch.from_numpy(mean_a)
    ((wanted - product).square().sum() + lam * leaf.square().sum()).backward()
    assert float(leaf.grad.abs().max()) < 1e-9 * scale  # type: ignore[union-attr]


def test_rows_of_a_that_say_the_same_need_no_ridge() -> None:
    """A_bar of rank 1: without a ridge the normal equations are singular, and any minimiser will do."""
    p, a, b, _ = problem(3, 2, 6, 5, 1.0, 0)
    a[:, 1] = a[:, 0]
    wanted = torch.einsum("k,kor,kri->oi", p, b, a)
    mean = Means.of(p, a, b)
    corrected = least_squares(mean, 0.0)
    mean_a = torch.einsum("k,kri->ri", p, a)
    best = wanted @ torch.linalg.pinv(mean_a) @ mean_a
    torch.testing.assert_close(corrected @ mean_a, best)


@settings(max_examples=40)
@given(**problems, lam=st.sampled_from([0.0, 0.01, 10.0]))
def test_never_farther_from_what_was_meant_than_fedit(
    clients: int, rank: int, d_in: int, d_out: int, scale: float, seed: int, lam: float
) -> None:
    p, a, b, _ = problem(clients, rank, d_in, d_out, scale, seed)
    ids = [f"c{k}" for k in range(clients)]
    context = Context(
        seed=0,
        ranks=dict.fromkeys(ids, rank),
        sites=(Site("s", d_in, d_out),),
        alpha=3.0,
        dropout=0.0,
        classes=2,
        width=3,
        head={"head/weight": (2, 3), "head/bias": (2,)},
        norms={},
        rounds=1,
        learning_rate=1e-3,
        batch_size=4,
        local_epochs=1,
        optimizer="adamw",
        weight=lambda site: torch.zeros(d_out, d_in),
    )
    head = {"head/weight": torch.zeros(2, 3), "head/bias": torch.zeros(2)}
    messages = {
        client: Message({"A/s": a[k].float(), "B/s": b[k].float(), **head}, {"examples": float(p[k])})
        for k, client in enumerate(ids)
    }
    errors = {}
    for name, options in (("fedit", {}), ("lorafair", {"form": "least_squares", "lambda": lam})):
        method = build(name, options, context)
        state = method.server(1, {}, messages)
        reply, weights = method.reply(state, ids[0]), method.mixing(state, messages)
        assert reply is not None
        assert weights is not None
        trained = [message.tensors for message in messages.values()]
        errors[name] = aggregation_error(method.adapter, trained, [reply.tensors] * clients, weights)
    assert errors["lorafair"] <= errors["fedit"] + 1e-5


# -- the cosine ------------------------------------------------------------------------------------------------------


def dense_descent(
    p: Tensor, a: Tensor, b: Tensor, wanted: Tensor, lam: float, steps: int, lr: float
) -> tuple[Tensor, list[float]]:
    """torch's SGD on dB [d_out, r] through the dense product: the best point, and the objective on the way."""
    mean_a, mean_b = torch.einsum("k,kij->ij", p, a), torch.einsum("k,kij->ij", p, b)
    db = torch.zeros_like(mean_b, requires_grad=True)
    optimizer = torch.optim.SGD([db], lr=lr)
    values: list[float] = []
    best = db.detach().clone()
    for _ in range(steps + 1):
        value = printed(db, mean_b, mean_a, wanted, lam)
        if not values or value.item() < min(values):
            best = db.detach().clone()
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return mean_b + best, values


@settings(max_examples=25)
@given(**{**problems, "scale": st.sampled_from([0.3, 1.0])}, lam=st.sampled_from([0.0, 0.01, 0.1]))
def test_descent_in_a_small_basis_is_descent_on_the_correction_itself(
    clients: int, rank: int, d_in: int, d_out: int, scale: float, seed: int, lam: float
) -> None:
    p, a, b, wanted = problem(clients, rank, d_in, d_out, scale, seed)
    expected, values = dense_descent(p, a, b, wanted, lam, 15, 0.01)
    (found,) = descend([Means.of(p, a, b)], lam, 15, 0.01)
    mean_a, mean_b = torch.einsum("k,kij->ij", p, a), torch.einsum("k,kij->ij", p, b)
    assert float(printed(found - mean_b, mean_b, mean_a, wanted, lam)) == pytest.approx(min(values), abs=1e-9)
    if clients > 1:  # one client alone has nothing to correct: rounding decides which way
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_sites_descend_together_as_they_do_alone() -> None:
    shapes = [(9, 12), (5, 4), (30, 7)]  # the second is narrower than 2 r = 6
    asked = [problem(4, 3, d_in, d_out, 1.0, i) for i, (d_in, d_out) in enumerate(shapes)]
    together = descend([Means.of(p, a, b) for p, a, b, _ in asked], 0.01, 200, 0.02)
    for (p, a, b, wanted), found in zip(asked, together, strict=True):
        expected, values = dense_descent(p, a, b, wanted, 0.01, 200, 0.02)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        assert min(values) < values[0] - 1e-3


@settings(max_examples=40)
@given(**problems, lam=st.sampled_from([0.0, 0.01, 1.0]), lr=st.sampled_from([1e-3, 0.1, 100.0]))
def test_never_worse_than_the_start_whatever_the_step(
    clients: int, rank: int, d_in: int, d_out: int, scale: float, seed: int, lam: float, lr: float
) -> None:
    p, a, b, wanted = problem(clients, rank, d_in, d_out, scale, seed)
    (found,) = descend([Means.of(p, a, b)], lam, 20, lr)
    mean_a, mean_b = torch.einsum("k,kij->ij", p, a), torch.einsum("k,kij->ij", p, b)
    start = printed(torch.zeros_like(mean_b), mean_b, mean_a, wanted, lam)
    assert float(printed(found - mean_b, mean_b, mean_a, wanted, lam)) <= float(start) + 1e-12


def test_many_steps_without_a_price_reach_the_best_cosine() -> None:
    """That of DW*'s projection on the rows of A_bar, which is what least squares finds; scale is another matter."""
    p, a, b, wanted = problem(4, 3, 10, 8, 1.0, 3)
    mean = Means.of(p, a, b)
    mean_a = torch.einsum("k,kri->ri", p, a)
    (found,) = descend([mean], 0.0, 3000, 0.5)
    cosines = [
        float((wanted * product).sum() / (wanted.norm() * product.norm()))
        for product in (x @ mean_a for x in (mean.b, found, least_squares(mean, 0.0)))
    ]
    assert cosines[0] < cosines[2] - 0.005
    assert cosines[1] == pytest.approx(cosines[2], abs=1e-6)


def test_the_product_turns_towards_what_was_meant_and_not_away(federation: Callable[..., Any]) -> None:
    """As printed, the similarity is minimised: every layer's cosine would fall."""
    cosines: dict[str, list[float]] = {}
    for name in ("fedit", "lorafair"):
        fed = federation(name).begin()
        fed.step(1)
        trained = [fed.dense(tensors) for tensors in fed.snapshot().values()]
        fed.deliver()
        got = fed.dense(fed.snapshot()["ann"])
        p = np.array([30, 12, 18]) / 60
        cosines[name] = []
        for site, product in enumerate(got):
            wanted = sum(w * updates[site] for w, updates in zip(p, trained, strict=True))
            norms = np.linalg.norm(wanted) * np.linalg.norm(product)
            cosines[name].append(float((wanted * product).sum() / norms))
    assert all(ours > plain + 1e-3 for plain, ours in zip(cosines["fedit"], cosines["lorafair"], strict=True))


def test_a_dear_correction_is_none() -> None:
    """The norm is not squared: where the price exceeds the slope, dB = 0 is a minimum with a corner."""
    p, a, b, _ = problem(3, 2, 8, 6, 1.0, 1)
    mean = Means.of(p, a, b)
    (found,) = descend([mean], 100.0, 50, 0.01)
    torch.testing.assert_close(found, mean.b)


# -- in the method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cosine", "least_squares"])
def test_all_but_b_is_fedits(federation: Callable[..., Any], form: str) -> None:
    replies = {}
    for name, options in (("fedit", {}), ("lorafair", {"form": form})):
        fed = federation(name, options).begin()
        fed.step(1)
        replies[name] = fed.method.reply(fed.state, "ann").tensors
    assert set(replies["fedit"]) == set(replies["lorafair"])
    for name, tensor in replies["fedit"].items():
        assert torch.equal(tensor, replies["lorafair"][name]) != name.startswith("B/")


@pytest.mark.parametrize("form", ["cosine", "least_squares"])
def test_where_nothing_was_learned_nothing_is_corrected(federation: Callable[..., Any], form: str) -> None:
    """All B zero (a round that diverged for nobody but moved nothing), and B that cancel in the mean."""
    fed = federation("lorafair", {"form": form}, ranks=(3, 3), examples=(9, 9)).begin()
    fed.state = fed.method.server(1, fed.state, fed.messages(1))
    for site in fed.method.context.sites:
        assert not fed.method.reply(fed.state, "ann").tensors[f"B/{site.name}"].any()
    fed.train(1)
    for site in fed.method.context.sites:
        fed.clients["bob"].tensors[f"B/{site.name}"] = -fed.clients["ann"].tensors[f"B/{site.name}"]
    fed.state = fed.method.server(1, fed.state, fed.messages(1))
    for site in fed.method.context.sites:
        reply = fed.method.reply(fed.state, "ann").tensors[f"B/{site.name}"]
        assert bool(torch.isfinite(reply).all())
        assert bool(reply.any()) == (form == "least_squares")  # no product, no cosine: nowhere to turn from


def test_least_squares_lowers_the_reported_error_and_both_mean_the_same(federation: Callable[..., Any]) -> None:
    errors = {}
    for name, options in (("fedit", {}), ("lorafair", {"form": "least_squares"})):
        fed = federation(name, options).begin()
        errors[name] = []
        for round in (1, 2, 3):
            messages = fed.step(round)
            trained = list(fed.snapshot().values())
            mixing = fed.method.mixing(fed.state, messages)
            torch.testing.assert_close(mixing[0], torch.tensor([30.0, 12, 18]).double() / 60)
            fed.deliver()
            errors[name].append(aggregation_error(fed.method.adapter, trained, list(fed.snapshot().values()), mixing))
    assert errors["lorafair"][0] < 0.9 * errors["fedit"][0]


def test_nothing_is_as_large_as_the_layer(federation: Callable[..., Any]) -> None:
    """A dense update of this layer would take 290 GB."""
    wide = (Site("wide", 190_000, 190_000),)
    for options in ({"form": "least_squares"}, {"server_steps": 3}):
        fed = federation("lorafair", options, ranks=(2, 2), sites=wide).begin()
        fed.step(1)
        assert fed.method.reply(fed.state, "ann").tensors["B/wide"].any()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"form": "euclid"}, "method.form = 'euclid': input should be 'cosine' or 'least_squares'"),
        ({"lambda": -0.1}, "method.lambda = -0.1"),
        ({"server_steps": 0}, "method.server_steps = 0"),
        ({"server_lr": 0.0}, "method.server_lr = 0.0"),
        ({"form": "least_squares", "server_steps": 10}, 'allowed: form = "cosine"'),
        ({"form": "least_squares", "server_lr": 0.5}, 'server_lr = 0.5 with form = "least_squares"'),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options("lorafair", options)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mixed_ranks_are_refused(context: Callable[..., Any]) -> None:
    with pytest.raises(MethodError, match="averages factors of one rank"):
        build("lorafair", {}, context((2, 3)))
