"""Condensed data: the sliced distance against POT, what condensing reaches, and what both ends keep to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ot
import pytest
import torch

from folklora.errors import MessageError, MethodError, RecipeError
from folklora.methods import build, check_options
from folklora.methods.condensation import (
    Examples,
    FeatureView,
    between,
    class_means,
    condense,
    fit,
    in_ball,
    noise_like,
    with_maps,
)
from folklora.methods.contract import Message
from folklora.methods.sliced import directions, sliced_wasserstein
from folklora.randomness import torch_generator

Federations = Callable[..., Any]
CONDENSED = ("feddm", "fedaf")


def generator(name: str = "x") -> torch.Generator:
    return torch_generator(5, name)


# -- the sliced Wasserstein distance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(7, 7, 3), (1, 1, 4), (12, 12, 1), (9, 1, 5)])
def test_the_sliced_distance_is_that_of_pot(n: int, m: int, d: int) -> None:
    x, y = (torch.randn(count, d, generator=generator(f"{count}{i}")) for i, count in enumerate((n, m)))
    along = directions(20, d, generator())
    whole = y if m == n else y.expand(n, d)
    wanted = ot.sliced_wasserstein_distance(x.numpy(), whole.numpy(), projections=along.T.numpy(), p=2)
    assert float(sliced_wasserstein(x, y, along)) == pytest.approx(float(wanted) ** 2, rel=1e-5)


def test_directions_are_unit_vectors() -> None:
    torch.testing.assert_close(directions(50, 6, generator()).norm(dim=1), torch.ones(50))


def test_the_sliced_distance_has_the_slope_of_finite_differences() -> None:
    x, y = (torch.randn(6, 3, dtype=torch.float64, generator=generator(name)) for name in "xy")
    along = directions(8, 3, generator()).double()
    assert torch.autograd.gradcheck(lambda a, b: sliced_wasserstein(a, b, along), (x.requires_grad_(), y))


def test_sets_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="6 points and 2; allowed: as many, or one"):
        sliced_wasserstein(torch.zeros(6, 3), torch.zeros(2, 3), directions(4, 3, generator()))


# -- condensing and fitting --------------------------------------------------------------------------------------------


def two_classes(count: int = 60, width: int = 6) -> Examples:
    labels = torch.arange(count) % 2
    inputs = torch.randn(count, width, generator=generator("real")) * 0.5
    inputs[:, 0] += torch.where(labels == 0, -2.0, 2.0)
    return Examples(inputs, torch.ones_like(labels), labels)


def head(width: int, classes: int, scale: float = 0.3) -> dict[str, torch.Tensor]:
    return {
        "head/weight": scale * torch.randn(classes, width, generator=generator("head")),
        "head/bias": torch.zeros(classes),
    }


@pytest.mark.parametrize("maps", [False, True])
def test_made_up_examples_get_the_means_of_the_real_ones(maps: bool) -> None:
    real, labels, random = two_classes(), torch.tensor([0, 0, 0, 1, 1, 1]), generator()
    model = head(6, 2)
    start = noise_like(real, (6, 6), random)
    draw = (lambda: with_maps(model, 6, random)) if maps else (lambda: model)
    made = condense(start, labels, real, draw, FeatureView(), steps=300, rate=0.1, batch=60, generator=random)
    sets = ((real.inputs, real.labels), (start, labels), (made, labels))
    wanted, before, after = (class_means(x, y, 2) for x, y in sets)
    assert float((after - wanted).norm()) < 0.1 * float((before - wanted).norm())


def test_random_maps_see_what_a_linear_head_does_not() -> None:
    """Two distributions of one mean: only with maps does the loss have a slope."""
    inputs = torch.cat([torch.full((50, 4), 2.0), torch.full((50, 4), -2.0)])
    real = Examples(inputs, torch.ones(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64))
    start = 0.1 * torch.randn(10, 4, generator=generator("start"))
    labels = torch.zeros(10, dtype=torch.int64)
    spreads = []
    for maps in (False, True):
        random, model = generator(), head(4, 2)
        draw = (lambda m=model, r=random: with_maps(m, 4, r)) if maps else (lambda m=model: m)
        made = condense(start, labels, real, draw, FeatureView(), steps=300, rate=1.0, batch=100, generator=random)
        spreads.append(float((made - made.mean(0)).norm(dim=1).mean()))
    assert spreads[0] < 0.5
    assert spreads[1] > 2


def test_what_is_added_to_the_loss_pulls() -> None:
    real, labels, random = two_classes(), torch.tensor([0, 1]), generator()
    model, wanted = head(6, 2), torch.tensor([3.0, -3.0])
    start = noise_like(real, (2, 6), random)

    def logits(weight: float) -> torch.Tensor:
        made = condense(
            start, labels, real, lambda: model, FeatureView(), steps=300, rate=0.1, batch=60, generator=generator(),
            extra=lambda logits, _: weight * (logits - wanted).square().mean(),
        )  # fmt: skip
        return FeatureView()(model, made, [1, 1])[1]

    assert float((logits(100.0) - wanted).norm()) < 0.5 * float((logits(0.0) - wanted).norm())


def test_the_server_learns_and_stays_in_the_ball() -> None:
    real, model = two_classes(), head(6, 2, 0.0)
    names = ["head/weight", "head/bias"]
    kwargs: dict[str, Any] = {"steps": 200, "rate": 0.05, "batch": 16}
    free = fit(model, names, real, FeatureView(), generator=generator(), **kwargs)
    logits = FeatureView()({**model, **free}, real.inputs, [])[1]
    assert float((logits.argmax(1) == real.labels).float().mean()) > 0.97
    kept = fit(model, names, real, FeatureView(), generator=generator(), radius=0.5, **kwargs)
    length = torch.cat([(kept[name] - model[name]).flatten() for name in names]).norm()
    assert float(length) == pytest.approx(0.5, rel=1e-4)
    assert not model["head/weight"].any()  # what it was given is as it was


def test_models_are_drawn_uniformly_from_the_ball() -> None:
    model = {"a": torch.zeros(2), "b": torch.ones(1), "c": torch.zeros(1)}
    random = generator()
    moves = []
    for _ in range(2000):
        drawn = in_ball(model, ["a", "b"], 3.0, random)
        assert drawn["c"] is model["c"]
        moves.append(torch.cat([drawn["a"], drawn["b"] - 1]))
    lengths = torch.stack(moves).norm(dim=1)
    assert float(lengths.max()) <= 3 + 1e-5
    assert float(lengths.mean()) == pytest.approx(3 * 3 / 4, rel=0.02)  # E|x| = r d / (d + 1), d = 3
    assert float(torch.stack(moves).mean(0).abs().max()) < 0.15


def test_re_sampling_is_the_mixture_of_both() -> None:
    mixed = between({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.zeros(2)}, 0.9)
    assert mixed["a"].tolist() == pytest.approx([0.9, 0.9])
    assert mixed["b"].tolist() == [1.0]


def test_noise_begins_with_the_moments_of_what_is_there_and_no_padding() -> None:
    inputs = torch.randn(40, 5, 3, generator=generator()) + torch.tensor([5.0, 0.0, -5.0])
    lengths = torch.arange(40) % 5 + 1
    for i, length in enumerate(lengths.tolist()):
        inputs[i, length:] = 1e6
    real = Examples(inputs, lengths, torch.zeros(40, dtype=torch.int64))
    made = noise_like(real, (300, 7, 3), generator("noise"))
    torch.testing.assert_close(made.mean((0, 1)), torch.tensor([5.0, 0.0, -5.0]), atol=0.3, rtol=0)
    torch.testing.assert_close(made.std((0, 1)), torch.ones(3), atol=0.2, rtol=0)


# -- what both ends keep to --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDENSED)
def test_uploads_are_as_long_as_counts_say(federation: Federations, name: str) -> None:
    fed = federation(name, {"ipc": 3}).begin()
    for client, message in fed.step(1).items():
        counts = torch.bincount(fed.clients[client].data.train[1], minlength=4)
        assert fed.state["counts/train"][list(fed.clients).index(client)].tolist() == counts.tolist()
        assert message.tensors["condensed/inputs"].shape == (int(counts.clamp(max=3).sum()), 6)
        if name == "fedaf":
            assert message.tensors["logits/mean"].shape == message.tensors["soft/mean"].shape == ((counts > 0).sum(), 4)


@pytest.mark.parametrize("name", CONDENSED)
def test_it_learns_the_classes(federation: Federations, name: str) -> None:
    fed = federation(name, {"steps": 60, "server_steps": 100, "ipc": 3}, examples=(60, 60, 60)).begin()
    for round in (1, 2):
        fed.step(round)
        fed.deliver()
    right = []
    for client in fed.clients.values():
        features, labels = client.data.validation
        logits = features @ client.tensors["head/weight"].T + client.tensors["head/bias"]
        right.append(float((logits.argmax(1) == labels).float().mean()))
    assert np.mean(right) > 0.7


@pytest.mark.parametrize("name", CONDENSED)
def test_no_real_example_is_sent(federation: Federations, name: str) -> None:
    fed = federation(name, {"ipc": 10, "steps": 1}).begin()
    sent = fed.step(1)["ann"].tensors["condensed/inputs"]
    assert float(torch.cdist(sent, fed.clients["ann"].data.train[0]).min()) > 0.05


def test_the_union_is_the_same_whatever_is_asked_first(federation: Federations) -> None:
    states = []
    for order in (None, ["cid", "ann", "bob"]):
        fed = federation("fedaf").begin()
        messages = fed.messages(1, order)
        states.append(fed.method.server(1, fed.state, {c: messages[c] for c in ("ann", "bob", "cid")}))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_v_is_the_mean_over_the_owners_of_a_class(federation: Federations) -> None:
    fed = federation("fedaf", {"head_start": "sketched"}).begin()
    messages = fed.step(1)
    counts = fed.state["counts/train"]
    for label in range(4):
        rows = [
            m.tensors["logits/mean"][int((counts[i, :label] > 0).sum())]
            for i, m in enumerate(messages.values())
            if counts[i, label] > 0
        ]
        torch.testing.assert_close(fed.state["logits/mean"][label], torch.stack(rows).mean(0))
    before = fed.state["logits/mean"]
    fed.step(2, ["bob"])
    away = counts[1] == 0
    assert torch.equal(fed.state["logits/mean"][away], before[away])
    fed.deliver(["ann"])
    assert torch.equal(fed.clients["ann"].notes["logits/mean"], fed.state["logits/mean"])


def test_mean_logits_of_a_client_are_those_of_its_examples(federation: Federations) -> None:
    fed = federation("fedaf", {"head_start": "sketched", "temperature": 3.0, "server_batch": 7}).begin()
    client = fed.clients["ann"]
    sent = fed.messages(1, ["ann"])["ann"].tensors
    features, labels = client.data.train
    logits = (features @ client.tensors["head/weight"].T + client.tensors["head/bias"]).double().numpy()
    soft = np.exp(logits / 3) / np.exp(logits / 3).sum(1, keepdims=True)
    for row, label in enumerate(labels.unique().tolist()):
        own = labels.numpy() == label
        np.testing.assert_allclose(sent["logits/mean"][row].numpy(), logits[own].mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sent["soft/mean"][row].numpy(), soft[own].mean(0), rtol=1e-4, atol=1e-5)


def test_soft_labels_pull_the_server_towards_them(federation: Federations) -> None:
    """All clients say that every class looks alike: with a heavy weight the server's answers become flat."""
    spreads = []
    for weight in (0.0, 100.0):
        fed = federation("fedaf", {"lam_glob": weight, "server_steps": 200}).begin()
        messages = {
            c: Message({**m.tensors, "soft/mean": torch.full_like(m.tensors["soft/mean"], 0.25)}, m.numbers)
            for c, m in fed.messages(1).items()
        }
        state = fed.method.server(1, fed.state, messages)
        spreads.append(float(state["global/head/weight"].norm()))
    assert spreads[1] < 0.5 * spreads[0]


@pytest.mark.parametrize("name", CONDENSED)
@pytest.mark.parametrize("value", [1e5, -1e5])
def test_numbers_that_no_honest_client_sends_are_refused(federation: Federations, name: str, value: float) -> None:
    fed = federation(name).begin()
    message = fed.messages(1, ["ann"])["ann"]
    message.tensors["condensed/inputs"][0, 0] = value
    with pytest.raises(MessageError, match="condensed/inputs holds numbers beyond 10000"):
        fed.method.check_update(1, fed.state, "ann", message)


def test_negative_probabilities_are_refused(federation: Federations) -> None:
    fed = federation("fedaf").begin()
    message = fed.messages(1, ["ann"])["ann"]
    message.tensors["soft/mean"][0, 0] = -0.5
    with pytest.raises(MessageError, match="soft/mean holds negative numbers"):
        fed.method.check_update(1, fed.state, "ann", message)


@pytest.mark.parametrize("counts", [[-1, 2, 3, 4], [0, 0, 0, 0], [1, 2, 3]])
def test_counts_that_cannot_be_are_refused(federation: Federations, counts: Sequence[int]) -> None:
    fed = federation("feddm")
    with pytest.raises(MessageError):
        fed.method.check_sketch(Message({"counts/train": torch.tensor(counts, dtype=torch.int32)}))


@pytest.mark.parametrize("name", CONDENSED)
def test_who_said_no_counts_is_not_read_and_harms_nobody(federation: Federations, name: str) -> None:
    fed = federation(name).begin(missing=["bob"])
    with pytest.raises(MessageError, match="never said how many examples of each class"):  # an empty message too
        fed.method.expected(1, fed.state, "bob")
    fed.step(1, ["ann", "cid"])
    fed.deliver()
    with pytest.raises(MethodError, match="no client said how many"):
        federation(name).begin(missing=["ann", "bob", "cid"])


@pytest.mark.parametrize("name", CONDENSED)
def test_examples_of_other_classes_than_were_counted_are_refused(federation: Federations, name: str) -> None:
    """Data that changed may make an upload of the same shape, which would be read under other labels."""
    fed = federation(name, {"ipc": 2}).begin()
    data = fed.clients["ann"].data
    features = data.train[0][:12]
    counted, now = ((torch.arange(12) % 2) * 2 + shift for shift in (0, 1))
    data.train = features, counted
    fed.state = fed.method.refresh(1, fed.state, {"ann": fed.method.sketch(fed.clients["ann"])})
    message = fed.messages(1, ["ann"])["ann"]
    fed.method.check_update(1, fed.state, "ann", message)
    data.train = features, now
    message = fed.messages(1, ["ann"])["ann"]
    assert {n: tuple(t.shape) for n, t in message.tensors.items()} == fed.method.expected(1, fed.state, "ann")
    with pytest.raises(MessageError, match="index/labels are not those of the classes that it counted"):
        fed.method.check_update(1, fed.state, "ann", message)


def test_counts_are_asked_for_again_where_that_is_wanted(federation: Federations) -> None:
    fed = federation("feddm", {"refresh": 2}).begin()
    assert [fed.method.refreshes(round) for round in (1, 2, 3, 4, 5)] == [False, False, True, False, True]
    said = Message({"counts/train": torch.tensor([0, 0, 5, 0], dtype=torch.int32)})
    state = fed.method.refresh(3, fed.state, {"bob": said})
    assert fed.method.expected(3, state, "bob") == {"condensed/inputs": (5, 6), "index/labels": (5,)}
    assert fed.method.expected(3, state, "ann") == fed.method.expected(3, fed.state, "ann")
    assert not federation("feddm").method.refreshes(3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"head": "private"}, "method.head = 'private'"),
        ({"head_start": "auto"}, "method.head_start = 'auto'"),
        ({"ipc": 0}, "method.ipc = 0"),
        ({"length": 2}, "method.length = 2"),
        ({"radius": 0.0}, "method.radius = 0.0"),
        ({"space": "pixels"}, "method.space = 'pixels'"),
        ({"init": "real"}, "method.init = 'real'"),
        ({"scaffold": True}, "does not combine"),
        ({"temperature": 2.0}, "unknown key `method.temperature`"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options("feddm", options)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "what"), [({"space": "embeddings"}, "space"), ({"init": "public"}, "init")])
def test_what_needs_texts_is_refused_without_them(
    context: Callable[..., Any], options: dict[str, Any], what: str
) -> None:
    with pytest.raises(MethodError, match=f'method.{what} = .* no texts.*allowed: space = "features", init = "noise"'):
        build("feddm", options, context())
