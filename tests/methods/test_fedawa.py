"""FedAWA against its objective as it is printed: dense client vectors, autograd and optimisers by hand, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from folklora.adapters.lowrank import Site, Tensors
from folklora.errors import MethodError, RecipeError
from folklora.methods import build, check_options
from folklora.methods.contract import Context, Message
from folklora.methods.fedawa import FedAWAOptions, improve, objective

ONE_SITE = (Site("only", 9, 7),)
LAYERS = ("layer.0.query", "layer.1.value", "head/", "norm/ln.")


# -- the oracle ------------------------------------------------------------------------------------------------------


def printed(logits: Tensor, theta_g: Tensor, thetas: Tensor) -> Tensor:
    """L of one flattened model, line by line: logits [K], theta_g [P], thetas [K, P]."""
    p = torch.softmax(logits, dim=0)
    tau = thetas - theta_g
    cosines = torch.stack([torch.nn.functional.cosine_similarity(theta_g, theta, dim=0) for theta in thetas])
    distances = torch.stack([torch.linalg.norm(each - sum(w * t for w, t in zip(p, tau, strict=True))) for each in tau])
    return (p * (1 - cosines)).sum() + (p * distances).sum()


def learn(logits: Tensor, theta_g: Tensor, thetas: Tensor, optimizer: str, lr: float, epochs: int) -> Tensor:
    """Adam (betas 0.5, 0.999) or SGD (momentum 0.9, weight decay 5e-4), written out."""
    m, v = torch.zeros_like(logits), torch.zeros_like(logits)
    for step in range(1, epochs + 1):
        leaf = logits.clone().requires_grad_()
        (g,) = torch.autograd.grad(printed(leaf, theta_g, thetas), leaf)
        if optimizer == "adam":
            m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g * g
            logits = logits - lr * (m / (1 - 0.5**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        else:
            m = 0.9 * m + g + 5e-4 * logits
            logits = logits - lr * m
    return logits


def groups(tensors: Tensors, weights: str) -> list[list[str]]:
    """Names of what is weighed together, found by how names look."""
    if weights == "model":
        return [list(tensors)]
    return [[name for name in tensors if layer in name] for layer in LAYERS]


def flat(tensors: Tensors, names: list[str]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names])


@pytest.mark.parametrize("weights", ["model", "layer"])
@pytest.mark.parametrize("start", ["log", "sizes"])
@pytest.mark.parametrize(
    ("optimizer", "lr", "epochs"), [("adam", None, 1), ("adam", 0.05, 7), ("sgd", None, 1), ("sgd", 0.3, 5)]
)
def test_three_rounds_against_the_formulas(
    federation: Callable[..., Any], weights: str, start: str, optimizer: str, lr: float | None, epochs: int
) -> None:
    options = {"weights": weights, "logits": start, "server_optimizer": optimizer, "server_epochs": epochs}
    fed = federation("fedawa", {**options, **({} if lr is None else {"server_lr": lr})}, ranks=(3,) * 4).begin()
    lr = lr or {"adam": 1e-3, "sgd": 0.01}[optimizer]
    common = dict(fed.clients["ann"].tensors)  # what all start from
    known: dict[tuple[str, int], Tensor] = {}
    for round, who in enumerate((["ann", "cid", "dot"], ["bob", "dot"], ["ann", "bob", "cid"]), start=1):
        fed.deliver(who)
        messages = fed.step(round, who)
        sizes = torch.tensor([fed.clients[client].examples for client in who]).double()
        fresh = sizes.log() if start == "log" else sizes / sizes.sum()
        mean: Tensors = {}
        for number, names in enumerate(groups(common, weights)):
            logits = torch.stack([known.get((who[i], number), fresh[i]) for i in range(len(who))])
            thetas = torch.stack([flat(messages[client].tensors, names) for client in who])
            logits = learn(logits, flat(common, names), thetas, optimizer, lr, epochs)
            known |= {(client, number): logits[i] for i, client in enumerate(who)}
            p = torch.softmax(logits, dim=0)
            for name in names:
                mean[name] = sum(w * messages[c].tensors[name].double() for w, c in zip(p, who, strict=True))
        reply = fed.method.reply(fed.state, "eve").tensors
        assert set(reply) == set(common)
        for name, tensor in mean.items():
            torch.testing.assert_close(reply[name].double(), tensor, rtol=1e-6, atol=1e-7)
        common = {name: reply[name] for name in common}
    order = [sorted(names) for names in fed.method.layers(messages).values()]
    for number, names in enumerate(groups(common, weights)):
        column = fed.state["logits"][:, order.index(sorted(names))]
        wanted = [float(known[client, number]) for client in fed.method.context.clients]
        assert column.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@given(
    clients=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_the_objective_and_its_slope(clients: int, sizes: list[int], scale: float, seed: int) -> None:
    """From Gram matrices around any origin: what is printed; and autograd agrees with finite differences of that."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    theta_g = [scale * draw(size) for size in sizes]
    thetas = [centre + scale * draw(clients, size) for centre, size in zip(theta_g, sizes, strict=True)]
    logits = draw(len(sizes), clients)
    cost = torch.stack(
        [1 - torch.cosine_similarity(one[None], many) for one, many in zip(theta_g, thetas, strict=True)]
    )
    gram = torch.stack([(many - origin) @ (many - origin).T for origin, many in zip(theta_g, thetas, strict=True)])
    wanted = torch.stack([printed(*each) for each in zip(logits, theta_g, thetas, strict=True)])
    # Where one client is all, its distance is zero: a root, so half the digits.
    torch.testing.assert_close(objective(logits, gram, cost), wanted, rtol=1e-6, atol=1e-6 * scale)
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(leaf, gram, cost).sum(), leaf)
    for k in range(clients):
        nudge = torch.zeros_like(logits)
        nudge[:, k] = 1e-5
        ahead, behind = (
            torch.stack([printed(*each) for each in zip(logits + sign * nudge, theta_g, thetas, strict=True)])
            for sign in (1, -1)
        )
        torch.testing.assert_close(slope[:, k], (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_small_step_goes_down(optimizer: str) -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        thetas, theta_g = torch.randn(5, 30, generator=g).double(), torch.randn(30, generator=g).double()
        logits = torch.randn(1, 5, generator=g).double()
        gram, cost = (thetas @ thetas.T)[None], (1 - torch.cosine_similarity(theta_g[None], thetas))[None]
        options = check_options("fedawa", {"server_optimizer": optimizer, "server_lr": 1e-4})
        assert isinstance(options, FedAWAOptions)
        learned = improve(logits, gram, cost, options)
        assert printed(learned[0], theta_g, thetas) < printed(logits[0], theta_g, thetas) - 1e-9


# -- what must hold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model", "layer"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_between_equal_clients_nothing_is_to_be_learned(
    federation: Callable[..., Any], weights: str, optimizer: str
) -> None:
    options = {"weights": weights, "server_optimizer": optimizer, "server_epochs": 50}
    fed = federation("fedawa", options).begin()
    fed.train(1)
    for client in fed.clients.values():
        client.tensors = dict(fed.clients["ann"].tensors)
    fed.state = fed.method.server(1, fed.state, fed.messages(1))
    p = torch.softmax(fed.state["logits"], dim=0)
    sizes = torch.tensor([30.0, 12, 18]).double()
    # Weight decay draws SGD's logits together by itself: (1 - lr * decay) ^ steps is 3e-4 off one.
    torch.testing.assert_close(
        p, (sizes / 60)[:, None].expand_as(p), rtol=1e-9 if optimizer == "adam" else 1e-2, atol=0
    )


def test_one_client_weighs_one_and_learns_nothing(federation: Callable[..., Any]) -> None:
    fed = federation("fedawa", {"server_epochs": 20, "server_lr": 1.0}, ranks=(3,)).begin()
    messages = fed.step(1)
    assert fed.state["logits"].flatten().tolist() == pytest.approx([math.log(30)])
    assert fed.method.mixing(fed.state, messages).tolist() == [[1.0]]
    reply = fed.method.reply(fed.state, "ann").tensors
    assert all(torch.equal(reply[name], tensor) for name, tensor in messages["ann"].tensors.items())


def test_with_one_layer_both_forms_are_one(federation: Callable[..., Any]) -> None:
    found = []
    for weights in ("model", "layer"):
        options = {"weights": weights, "head": "private", "server_epochs": 5, "server_lr": 0.1}
        fed = federation("fedawa", options, sites=ONE_SITE, norms={}).begin()
        for round in (1, 2):
            fed.step(round)
            fed.deliver()
        found.append(fed.state)
    assert set(found[0]) == set(found[1])
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])


def test_layers_weigh_clients_by_themselves(federation: Callable[..., Any]) -> None:
    """A client far from the others in one layer loses weight there, in both factors, and nowhere else."""
    states = []
    for shift in (0.0, 5.0):
        fed = federation("fedawa", {"weights": "layer", "server_epochs": 30, "server_lr": 0.01}).begin()
        fed.train(1)
        far = fed.clients["bob"].tensors
        far["B/layer.0.query"] = far["B/layer.0.query"] + shift
        messages = fed.messages(1)
        states.append(fed.method.server(1, fed.state, messages))
    names = list(fed.method.layers(messages))
    assert sorted(names) == sorted(LAYERS)
    where = names.index("layer.0.query")
    near, moved = (torch.softmax(state["logits"], dim=0) for state in states)
    others = [i for i in range(len(names)) if i != where]
    assert torch.equal(near[:, others], moved[:, others])
    assert float(moved[1, where]) < float(near[1, where]) - 0.01
    reply = fed.method.reply(states[1], "ann").tensors
    for name in ("A/layer.0.query", "B/layer.0.query"):
        wanted = sum(w * m.tensors[name].double() for w, m in zip(moved[:, where], messages.values(), strict=True))
        torch.testing.assert_close(reply[name].double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weights", ["model", "layer"])
def test_who_is_absent_keeps_its_logit(federation: Callable[..., Any], weights: str) -> None:
    fed = federation("fedawa", {"weights": weights, "server_epochs": 3}, ranks=(3,) * 5).begin()
    fed.step(1, ["ann", "cid"])
    first = fed.state["logits"]
    assert fed.state["known"].tolist() == [1, 0, 1, 0, 0]
    assert not first[[1, 3, 4]].any()
    fed.step(2, ["cid", "eve"])
    second = fed.state["logits"]
    assert torch.equal(second[:2], first[:2])
    assert not torch.equal(second[2], first[2])
    assert torch.allclose(second[4], torch.tensor(9.0).double().log(), atol=0.01)
    assert fed.state["known"].tolist() == [1, 0, 1, 0, 1]


def test_logits_survive_a_checkpoint(federation: Callable[..., Any]) -> None:
    straight, resumed = (federation("fedawa", {"server_epochs": 3}).begin() for _ in range(2))
    for round in (1, 2, 3):
        for fed in (straight, resumed):
            fed.step(round, ["ann", "bob"] if round == 2 else None)
            fed.deliver()
        resumed.state = safetensors.torch.load(safetensors.torch.save(resumed.state))
    assert set(straight.state) == set(resumed.state)
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in straight.state.items())


@pytest.mark.parametrize("head", ["zero", "sketched"])
def test_the_first_global_model_is_what_all_start_from(federation: Callable[..., Any], head: str) -> None:
    """Client vectors of round 1 are what training added; with a head of zeros no cosine is defined in its layer."""
    options = {"weights": "layer", "head": "shared", "head_start": head}
    fed = federation("fedawa", options).begin()
    start = dict(fed.clients["ann"].tensors)
    fed.train(1)
    messages = fed.messages(1)
    layers = fed.method.layers(messages)
    _, cost = fed.method.geometry(fed.state, messages, layers)
    for row, names in zip(cost, layers.values(), strict=True):
        for value, message in zip(row, messages.values(), strict=True):
            one, other = flat(start, names), flat(message.tensors, names)
            wanted = 1 - float(one @ other / (one.norm() * other.norm())) if one.any() else 1.0
            assert float(value) == pytest.approx(wanted, abs=1e-12)
    assert bool((cost[list(layers).index("head/")] == 1).all()) == (head == "zero")


# -- the pitfall -----------------------------------------------------------------------------------------------------


def test_the_objective_wants_one_client_alone_and_few_steps_prevent_it(federation: Callable[..., Any]) -> None:
    """No p is below the best one-hot p, where only that client's cosine counts; many steps go there."""
    fed = federation("fedawa", ranks=(3,) * 5).begin()
    fed.train(1)
    messages = fed.messages(1)
    gram, cost = fed.method.geometry(fed.state, messages, fed.method.layers(messages))
    g = torch.Generator().manual_seed(0)
    lowest = float(cost.min())
    for _ in range(200):
        logits = 3 * torch.randn(1, 5, generator=g).double()
        assert float(objective(logits, gram, cost)) > lowest
    alone = torch.full((1, 5), -60.0).double()
    alone[0, int(cost.argmin())] = 60.0
    assert float(objective(alone, gram, cost)) == pytest.approx(lowest, abs=1e-9)

    shares = []
    for epochs in (1, 300, 3000):
        again = federation("fedawa", {"server_epochs": epochs, "server_lr": 0.01}, ranks=(3,) * 5).begin()
        messages = again.step(1)
        shares.append(again.method.mixing(again.state, messages)[0])
    by_size = torch.tensor([30.0, 12, 18, 24, 9]).double() / 93
    assert float((shares[0] - by_size).abs().max()) < 0.01  # one step: all but FedAvg
    assert float(shares[1].max()) > float(by_size.max()) + 0.1
    assert float(shares[2].max()) > 0.99


@given(
    examples=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    rank=st.integers(1, 5),
    epochs=st.integers(1, 20),
    lr=st.sampled_from([1e-3, 0.1, 10.0]),
    optimizer=st.sampled_from(["adam", "sgd"]),
)
def test_what_clients_get_is_the_mean_by_the_weights_it_says(
    examples: list[int], rank: int, epochs: int, lr: float, optimizer: str
) -> None:
    ids = [f"c{i}" for i in range(len(examples))]
    context = Context(
        seed=1,
        ranks=dict.fromkeys(ids, rank),
        sites=ONE_SITE,
        alpha=4.0,
        dropout=0.0,
        classes=3,
        width=4,
        head={"head/weight": (3, 4), "head/bias": (3,)},
        norms={},
        rounds=2,
        learning_rate=1e-3,
        batch_size=4,
        local_epochs=1,
        optimizer="adamw",
        weight=lambda site: torch.zeros(7, 9),
    )
    options = {"server_epochs": epochs, "server_lr": lr, "server_optimizer": optimizer}
    method = build("fedawa", options, context)
    g = torch.Generator().manual_seed(rank)
    messages = {}
    for client, count in zip(ids, examples, strict=True):
        shapes = method.expected(1, {}, client)
        tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        messages[client] = Message(tensors, {"examples": float(count)})
    state = method.server(1, {}, messages)
    weights = method.mixing(state, messages)
    assert weights is not None
    assert torch.equal(weights, weights[:1].expand(len(ids), -1))
    assert bool((weights >= 0).all())
    assert float(weights[0].sum()) == pytest.approx(1)
    reply = method.reply(state, ids[0])
    assert reply is not None
    for name, tensor in reply.tensors.items():
        wanted = sum(w * m.tensors[name].double() for w, m in zip(weights[0], messages.values(), strict=True))
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weights": "tensor"}, "method.weights = 'tensor': input should be 'model' or 'layer'"),
        ({"logits": "uniform"}, "method.logits = 'uniform': input should be 'log' or 'sizes'"),
        ({"server_epochs": 0}, "method.server_epochs = 0"),
        ({"server_optimizer": "adamw"}, "method.server_optimizer = 'adamw'"),
        ({"server_lr": 0.0}, "method.server_lr = 0.0"),
        ({"server_lr": float("nan")}, "method.server_lr = nan"),
        ({"head_start": "auto"}, "needs a head that stays home"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options("fedawa", options)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mixed_ranks_are_refused(context: Callable[..., Any]) -> None:
    with pytest.raises(MethodError, match="averages factors of one rank"):
        build("fedawa", {}, context((2, 3)))
