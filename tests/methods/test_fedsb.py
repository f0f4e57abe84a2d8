"""Fed-SB: the frame is that of the pooled first step, whatever the scale; from then on the mean of R is the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import Site, Tensors
from folklora.adapters.peft import fold
from folklora.data.statistics import ClassStatistics
from folklora.errors import MessageError, MethodError, RecipeError
from folklora.federation.codec import encode
from folklora.federation.member import Member
from folklora.federation.setup import prepare
from folklora.methods import build, check_options
from folklora.methods.aggregation import aggregation_error
from folklora.methods.contract import Client, Context, Message
from folklora.methods.discriminant import linear_discriminant
from folklora.training.gradients import weight_gradients

ETA = 0.1
Federations = Callable[..., Any]


def first_step(gradients: list[np.ndarray], counts: list[int], eta: float, rank: int) -> np.ndarray:
    """The oracle: the rank-r part of ``-eta sign(G)``, G the mean gradient over the pooled examples."""
    pooled = np.average(np.stack(gradients).astype(float), axis=0, weights=counts)
    u, sigma, vt = np.linalg.svd(-eta * np.sign(pooled))
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def wanted(fed: Any, most: int, eta: float, missing: tuple[str, ...] = ()) -> list[np.ndarray]:
    clients = [client for name, client in fed.clients.items() if name not in missing]
    counts = [min(most, client.examples) for client in clients]
    return [
        first_step([c.data.gradients[f"grad/{s.name}"].numpy() for c in clients], counts, eta, clients[0].rank)
        for s in fed.method.context.sites
    ]


# -- the frame -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [3.0, 16.0])
@pytest.mark.parametrize("missing", [(), ("bob",)])
def test_the_first_model_is_the_backbone_and_the_low_rank_part_of_the_first_step(
    federation: Federations, alpha: float, missing: tuple[str, ...]
) -> None:
    fed = federation("fedsb", {"eta": ETA, "gradient_examples": 15}, alpha=alpha).begin(missing)
    want = wanted(fed, 15, ETA, missing)
    for client in fed.clients.values():  # one whose gradient was lost gets the frame of the others
        for got, dense in zip(fed.dense(client.tensors), want, strict=True):
            np.testing.assert_allclose(got, dense, atol=1e-6 * ETA * np.sqrt(dense.size))
        for site in fed.method.context.sites:
            a, b, core = (client.tensors[f"{factor}/{site.name}"].double() for factor in "ABC")
            torch.testing.assert_close(a @ a.T, torch.eye(3).double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(b.T @ b, torch.eye(3).double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(core, torch.diag(core.diag()))
            assert bool((core.diag()[:-1] >= core.diag()[1:]).all())


def test_counts_are_weights_and_end_at_the_agreed_number(federation: Federations) -> None:
    weighted = federation("fedsb", {"eta": ETA, "gradient_examples": 30}).begin()
    counted = [int(m.tensors["count/gradient"]) for m in weighted.sketches().values()]
    assert counted == [30, 12, 18]
    capped = federation("fedsb", {"eta": ETA, "gradient_examples": 5})
    assert [int(m.tensors["count/gradient"]) for m in capped.sketches().values()] == [5, 5, 5]
    want = wanted(weighted, 30, ETA)
    np.testing.assert_allclose(weighted.dense(weighted.clients["ann"].tensors)[0], want[0], atol=1e-6)
    assert np.abs(want[0] - wanted(weighted, 5, ETA)[0]).max() > 1e-3  # so the weights are seen


def test_a_core_that_starts_at_zero_keeps_the_frame(federation: Federations) -> None:
    sigma, zero = (federation("fedsb", {"eta": ETA, "core_start": start}).begin() for start in ("sigma", "zero"))
    for site in zero.method.context.sites:
        for factor in "AB":
            name = f"{factor}/{site.name}"
            assert torch.equal(zero.clients["ann"].tensors[name], sigma.clients["ann"].tensors[name])
    assert not any(product.any() for product in zero.dense(zero.clients["ann"].tensors))


@dataclass
class Layer:
    """A client whose model is one linear layer under a softmax head; it notes which heads it was asked with."""

    x: Tensor
    y: Tensor
    asked: list[Tensors] = field(default_factory=list)

    def features(self, split: str) -> tuple[Tensor, Tensor]:
        return self.x[:, :6], self.y

    def weight_gradients(self, head: Tensors, examples: int) -> Tensors:
        self.asked.append({**head, "examples": torch.tensor(examples)})
        found = {}
        for site in (Site("layer.0.query", 10, 12), Site("layer.1.value", 8, 7)):
            weight = torch.zeros(site.d_out, site.d_in, requires_grad=True)
            hidden = self.x[:examples, : site.d_in] @ weight.T
            logits = hidden[:, :6] @ head["head/weight"].T + head["head/bias"]
            F.cross_entropy(logits, self.y[:examples]).backward()
            found[f"grad/{site.name}"] = weight.grad
        return found


def drawn(sizes: tuple[int, ...]) -> dict[str, Layer]:
    random = torch.Generator().manual_seed(4)
    names = ("ann", "bob", "cid")
    return {
        name: Layer(torch.randn(n, 10, generator=random), torch.randint(4, (n,), generator=random))
        for name, n in zip(names, sizes, strict=True)
    }


def layered(federation: Federations, options: Mapping[str, Any], data: Mapping[str, Layer]) -> Any:
    for layer in data.values():
        layer.train = (layer.x, layer.y)  # type: ignore[attr-defined]
    return federation("fedsb", options, data=data)


def test_the_federated_gradient_is_the_pooled_one(federation: Federations) -> None:
    sizes = (9, 30, 14)
    apart = drawn(sizes)
    fed = layered(federation, {"eta": ETA, "gradient_examples": 20}, apart).begin()
    kept = [layer.x[:20] for layer in apart.values()], [layer.y[:20] for layer in apart.values()]
    pooled = Layer(torch.cat(kept[0]), torch.cat(kept[1])).weight_gradients(apart["ann"].asked[0], 10**6)
    for got, site in zip(fed.dense(fed.clients["cid"].tensors), fed.method.context.sites, strict=True):
        want = first_step([pooled[f"grad/{site.name}"].numpy()], [1], ETA, 3)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_head_of_the_gradient_is_common_and_no_other_than_agreed(federation: Federations) -> None:
    data = drawn((9, 30, 14))
    layered(federation, {"gradient_examples": 20}, data).begin()
    heads = [layer.asked[0]["head/weight"] for layer in data.values()]
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert all(
        int(layer.asked[0]["examples"]) == 20 and not layer.asked[0]["head/bias"].any() for layer in data.values()
    )
    other = drawn((9, 30, 14))
    layered(lambda *a, **k: federation(*a, **k, seed=1), {"gradient_examples": 20}, other).begin()
    assert not torch.equal(other["ann"].asked[0]["head/weight"], heads[0])
    assert 0.5 < float(heads[0].std()) / 0.02 < 1.5


def test_a_head_of_ones_own_is_the_discriminant_of_ones_own_statistics(federation: Federations) -> None:
    data = drawn((9, 30, 14))
    layered(federation, {"gradient_head": "own"}, data).begin()
    for layer in data.values():
        weight, bias = linear_discriminant(ClassStatistics.of(layer.x[:, :6], layer.y, 4))
        assert torch.equal(layer.asked[0]["head/weight"], weight)
        assert torch.equal(layer.asked[0]["head/bias"], bias)


@pytest.mark.parametrize("start", ["sketched", "auto"])
def test_the_frame_and_the_head_come_in_one_welcome(federation: Federations, start: str) -> None:
    options = {"head": "private", "head_start": start, "eta": ETA}
    fed = federation("fedsb", options).begin()
    plain = federation("fedsb", {"eta": ETA}).begin()
    welcome = fed.method.welcome(fed.state, "ann").tensors
    assert {"head/weight", "A/layer.0.query", "B/layer.0.query", "C/layer.0.query"} <= set(welcome)
    for name, tensor in plain.method.welcome(plain.state, "ann").tensors.items():
        assert torch.equal(welcome[name], tensor)
        assert all(torch.equal(client.tensors[name], tensor) for client in fed.clients.values())
    if start == "sketched":
        assert torch.equal(fed.clients["ann"].tensors["head/weight"], welcome["head/weight"])


def test_the_welcome_stays_what_it_was_and_settling_twice_changes_nothing(federation: Federations) -> None:
    fed = federation("fedsb", {"eta": ETA}).begin()
    first = fed.method.welcome(fed.state, "ann")
    settled = dict(fed.clients["ann"].tensors)
    fed.method.settle(fed.clients["ann"], first)
    assert all(torch.equal(tensor, settled[name]) for name, tensor in fed.clients["ann"].tensors.items())
    fed.step(1)
    later = fed.method.welcome(fed.state, "ann")
    assert all(torch.equal(later.tensors[name], tensor) for name, tensor in first.tensors.items())


def test_nobody_no_frame(federation: Federations) -> None:
    fed = federation("fedsb")
    with pytest.raises(MethodError, match="no client sent a gradient"):
        fed.begin(missing=tuple(fed.clients))


def test_gradients_that_cancel_leave_the_backbone_alone(federation: Federations) -> None:
    fed = federation("fedsb", {"eta": ETA}, ranks=(3, 3), examples=(10, 10))
    for sign, client in zip((1, -1), fed.clients.values(), strict=True):
        client.data.gradients = {n: sign * t for n, t in fed.clients["ann"].data.gradients.items()}
    fed.begin()
    assert not any(product.any() for product in fed.dense(fed.clients["ann"].tensors))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fed.state.values())


def test_the_one_off_messages_are_as_large_as_said(federation: Federations) -> None:
    fed = federation("fedsb")
    sketch = fed.method.sketch(fed.clients["ann"])
    numbers = 10 * 12 + 8 * 7
    assert sum(t.numel() for n, t in sketch.tensors.items() if n.startswith("gradient/")) == numbers
    assert len(encode(sketch)) > 4 * numbers
    fed.begin()
    welcome = fed.method.welcome(fed.state, "ann")
    assert sum(t.numel() for t in welcome.tensors.values()) == 3 * (10 + 12 + 3) + 3 * (8 + 7 + 3)


# -- refusals --------------------------------------------------------------------------------------------------------

LIES: dict[str, Callable[[Tensors], Tensors]] = {
    "no count": lambda t: {n: v for n, v in t.items() if n != "count/gradient"},
    "a count of nothing": lambda t: {**t, "count/gradient": torch.tensor([0], dtype=torch.int32)},
    "a count beyond what was agreed": lambda t: {**t, "count/gradient": torch.tensor([65], dtype=torch.int32)},
    "a negative count": lambda t: {**t, "count/gradient": torch.tensor([-1], dtype=torch.int32)},
    "half an example": lambda t: {**t, "count/gradient": torch.tensor([0.5])},
    "two counts": lambda t: {**t, "count/gradient": torch.tensor([3, 3], dtype=torch.int32)},
    "another count": lambda t: {**t, "count/other": torch.tensor([3], dtype=torch.int32)},
    "another layer": lambda t: {**t, "gradient/layer.9": torch.zeros(12, 10)},
    "a layer less": lambda t: {n: v for n, v in t.items() if n != "gradient/layer.1.value"},
    "transposed": lambda t: {**t, "gradient/layer.0.query": t["gradient/layer.0.query"].T},
    "infinite": lambda t: {**t, "gradient/layer.0.query": t["gradient/layer.0.query"] / 0},
    "factors": lambda t: {**t, "A/layer.0.query": torch.zeros(3, 10)},
    "statistics nobody asked for": lambda t: {**t, "statistics/counts": torch.zeros(2)},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_sketch_that_is_not_what_was_agreed_is_refused(federation: Federations, lie: str) -> None:
    fed = federation("fedsb")
    honest = fed.sketches()["ann"]
    fed.method.check_sketch(honest)
    with pytest.raises(MessageError):
        fed.method.check_sketch(Message(LIES[lie](honest.tensors)))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"eta": 0.0}, "method.eta = 0.0"),
        ({"eta": float("nan")}, "method.eta = nan"),
        ({"gradient_head": "zero"}, "method.gradient_head = 'zero': input should be 'random' or 'own'"),
        ({"gradient_examples": 0}, "method.gradient_examples = 0"),
        ({"core_start": "one"}, "method.core_start = 'one'"),
        ({"init": "public"}, "unknown key `method.init`"),
    ],
)
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options("fedsb", options)
    assert complaint in str(caught.value)


# -- the rounds ------------------------------------------------------------------------------------------------------


def test_every_round_gives_the_dense_mean(federation: Federations) -> None:
    fed = federation("fedsb", {"eta": ETA}).begin()
    n = np.array([client.examples for client in fed.clients.values()], dtype=float)
    for round in range(1, 4):
        messages = fed.step(round)
        trained = list(fed.snapshot().values())
        updates = [fed.dense(tensors) for tensors in trained]
        fed.deliver()
        received = list(fed.snapshot().values())
        for site in range(2):
            want = np.average([update[site] for update in updates], axis=0, weights=n)
            for tensors in received:
                assert np.linalg.norm(fed.dense(tensors)[site] - want) < 1e-6 * np.linalg.norm(want)
        mixing = fed.method.mixing(fed.state, messages)
        assert aggregation_error(fed.method.adapter, trained, received, mixing) < 1e-6


def test_whoever_was_away_stands_in_the_same_frame(federation: Federations) -> None:
    fed = federation("fedsb", {"eta": ETA}).begin()
    fed.step(1, ["ann", "cid"])
    assert fed.method.reply(fed.state, "bob").tensors.keys() == fed.method.reply(fed.state, "ann").tensors.keys()
    fed.deliver()
    once = fed.snapshot()
    fed.deliver()  # the same reply twice
    for client in fed.clients.values():
        for name, tensor in client.tensors.items():
            assert torch.equal(tensor, once["ann"][name])
            assert torch.equal(tensor, once[client.id][name])


def test_export_to_peft_is_the_same_function(federation: Federations) -> None:
    fed = federation("fedsb", {"eta": ETA}).begin()
    fed.step(1)
    fed.deliver()
    tensors = fed.clients["ann"].tensors
    folded = fold(tensors, fed.method.adapter)
    for site, want in zip(fed.method.context.sites, fed.dense(tensors), strict=True):
        got = fed.method.context.alpha / 3 * folded[f"B/{site.name}"].double() @ folded[f"A/{site.name}"].double()
        np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


@settings(max_examples=30)
@given(data=st.data())
def test_any_shape_rank_scale_and_weights(data: st.DataObject) -> None:
    d_in, d_out = (data.draw(st.integers(1, 9)) for _ in range(2))
    rank = data.draw(st.integers(1, min(d_in, d_out)))
    alpha = data.draw(st.floats(0.1, 64))
    counts = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=4))
    eta = data.draw(st.sampled_from([1e-6, 1e-3, 1.0]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    gradients = [torch.randn(d_out, d_in, generator=random) for _ in counts]
    ids = [f"client-{k}" for k in range(len(counts))]
    context = Context(
        seed=0,
        ranks=dict.fromkeys(ids, rank),
        sites=(Site("layer", d_in, d_out),),
        alpha=alpha,
        dropout=0.0,
        classes=2,
        width=3,
        head={"head/weight": (2, 3), "head/bias": (2,)},
        norms={},
        rounds=1,
        learning_rate=1e-3,
        batch_size=1,
        local_epochs=1,
        optimizer="adamw",
        weight=lambda site: torch.zeros(d_out, d_in),
    )
    method = build("fedsb", {"eta": eta, "gradient_examples": 100}, context)
    sketches = {
        name: Message({"gradient/layer": gradient, "count/gradient": torch.tensor([count], dtype=torch.int32)})
        for name, gradient, count in zip(ids, gradients, counts, strict=True)
    }
    for message in sketches.values():
        method.check_sketch(message)
    state = method.begin(sketches)
    client = Client(ids[0], rank, 1, method.initial(ids[0]), None, 0)  # type: ignore[arg-type]
    assert not method.adapter.update(client.tensors, "layer").any()
    method.settle(client, method.welcome(state, ids[0]))
    got = method.adapter.update(client.tensors, "layer").numpy()
    pooled = np.average(np.stack([g.double().numpy() for g in gradients]), axis=0, weights=counts)
    sigma = np.linalg.svd(-eta * np.sign(pooled), compute_uv=False)
    # Where singular values coincide (a matrix of signs has many that do) the rank-r part is not unique; how near it
    # comes is.
    assert np.linalg.matrix_rank(got, tol=1e-4 * eta) <= rank
    left = np.linalg.norm(-eta * np.sign(pooled) - got)
    assert left == pytest.approx(np.sqrt((sigma[rank:] ** 2).sum()), rel=1e-4, abs=1e-5 * eta)


# -- with a model ----------------------------------------------------------------------------------------------------


def test_in_a_real_run_the_start_is_the_pooled_first_step(tiny_recipe: Callable[..., Any]) -> None:
    """Gradients of a real backbone: members' sketches against one call on all their examples."""
    setup = prepare(tiny_recipe("method.name=fedsb", "method.eta=0.01", "method.gradient_examples=1000"))
    members = {client: Member(setup, client) for client in setup.data.splits}
    sketches = {client: setup.method.sketch(member.client) for client, member in members.items()}
    state = setup.method.begin(sketches)
    pooled = np.concatenate([split.train for split in setup.data.splits.values()])
    examples, labels = setup.examples(pooled)
    head = setup.method._gradient_head(members["0"].client)
    gradients = weight_gradients(setup.task, examples, labels, head)
    for site in setup.method.context.sites:
        a, b, core = (state[f"start/{factor}/{site.name}"].double() for factor in "ABC")
        gradient = gradients[f"grad/{site.name}"].double()
        step = -0.01 * torch.sign(gradient)
        # Signs of what is all but zero are noise: they may differ, and with them a little of the step.
        unsure = float((gradient.abs() < 1e-4 * gradient.abs().max()).double().mean())
        got = setup.method.adapter.scale(4) * b @ core @ a
        best = torch.linalg.svdvals(step)[4:].norm()
        assert float((step - got).norm()) <= float(best) + 0.01 * step.numel() ** 0.5 * (2 * unsure**0.5 + 1e-3)
        assert unsure < 0.01


def test_an_interrupted_run_ends_as_one_that_was_not(
    tiny_recipe: Callable[..., Any], resumed: Callable[[Any], dict[str, Any]]
) -> None:
    recipe = tiny_recipe("method.name=fedsb", "train.rounds=3", "train.failures=0.3", "train.optimizer_state=kept")
    row = resumed(recipe)["row"]
    assert row["aggregation_error"] < 1e-5
    # Four sites of 32 x 32 up; A, B and C of rank 4 down; names and shapes beside them.
    assert 4 * 4 * (32 * 32 + 4 * 68) < row["bytes_once_per_client"] < 4 * 4 * (32 * 32 + 4 * 68) + 2000
