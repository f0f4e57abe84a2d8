"""Tasks without a head of their own (language models, CLIP): every method is itself without one, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.errors import MethodError, RecipeError
from folklora.federation.codec import check, encode
from folklora.federation.traffic import describe_methods, forecast
from folklora.methods import METHODS, build, data_similarity
from folklora.methods.work import Trained
from folklora.randomness import torch_generator
from folklora.sections import MessageSection

Federations = Callable[..., Any]
MIXED = {name for name, cls in METHODS.items() if cls.mixed_ranks}
# Methods that send few bits, as they are where nothing is lost: a scale for each number.
LOSSLESS: dict[str, dict[str, Any]] = {"fedlpp": {"block": 1}, "haflq": {"block": 1, "bits": 64.0}}
# FolkLoRA as it is with a head: without one it is another method, unless it is told not to be.
OURS: dict[str, dict[str, Any]] = {"folklora": {"basis": "frozen"}}
PLAIN: list[tuple[str, dict[str, Any]]] = [
    *((name, LOSSLESS.get(name, OURS.get(name, {}))) for name in METHODS if not METHODS[name].needs_head),
    *(
        ("celora", {"basis": basis, "similarity": similarity})
        for basis in ("private", "frozen", "aligned")
        for similarity in ("data", "model", "uniform", "size")
    ),
    ("celora", {"components": 0}),
    ("celora", {"projection": 3}),
    ("celora", {"similarity": "data", "components": 0, "dp_epsilon": 50.0, "dp_clip": 8.0}),
    ("folklora", {"similarity": "both"}),
    ("fedawa", {"weights": "layer", "server_optimizer": "sgd"}),
    ("lorafair", {"form": "least_squares"}),
    ("fedex", {"residual_rank": 2}),
    ("fedsb", {"core_start": "zero"}),
    ("hafl", {"scheme": "freezing"}),
    ("haflq", {"scheme": "freezing", **LOSSLESS["haflq"]}),
    ("apfl", {"alpha": 0.0}),
    ("apfl", {"alpha": 1.0}),
]
SGD = {"optimizer": "sgd"}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((name, options, {}) for name, options in PLAIN),
    ("ravan", {"heads": 2, "budget": 1}, {"alpha": 8.0}),
    *(
        (name, {"proximal": 0.1, **OURS.get(name, {})}, {})
        for name, cls in METHODS.items()
        if "proximal" in cls.combines and name in MIXED
    ),
    ("celora", {"similarity": "size", "scaffold": True}, SGD),
    ("fedit", {"scaffold": True, "proximal": 0.1, "fedopt": "adam"}, SGD),
    *((name, {"scaffold": True}, SGD) for name in ("ffa", "fedsa", "rolora", "loraxs", "fedsb")),
    *((name, {"fedopt": "yogi"}, {}) for name in ("ffa", "fedsa", "rolora", "federa", "loraxs", "fedsb", "folklora")),
]
variants = pytest.mark.parametrize(("name", "options", "other"), VARIANTS, ids=str)


def ranks_of(name: str, options: dict[str, Any]) -> tuple[int, ...]:
    return (2, 5, 3) if name in MIXED and not options.get("scaffold") else (3, 3, 3)


def move(fed: Any, round: int, who: Sequence[str] | None = None) -> None:
    """Training by noise of each client, round and tensor: a tensor more or less changes none of the others."""
    for client in who or fed.clients:
        results = {}
        for work in fed.method.work(round, fed.clients[client]):
            tensors, scores = dict(work.tensors), {}
            for key in work.trained:
                random = torch_generator(7, f"{work.branch}/{key}", client, round)
                noise = 0.3 * torch.randn(tensors[key].shape, generator=random)
                tensors[key] = tensors[key] + noise * work.terms.masks.get(key, torch.ones(()))
                scores[key] = torch.rand(tensors[key].shape, generator=random)
            results[work.branch] = Trained(tensors, 1.0, 4, 0.04, scores if work.terms.importance else {})
        fed.method.learned(round, fed.clients[client], results)


def play(fed: Any) -> list[dict[str, torch.Tensor]]:
    """Three rounds, an absent client in the second; everything that anybody said or holds, in order."""
    everyone, seen = list(fed.clients), []
    sketches = fed.sketches()
    for message in sketches.values():
        fed.method.check_sketch(message)
        seen.append(message.tensors)
    fed.begin()
    seen += [m.tensors for m in (fed.method.welcome(fed.state, client) for client in everyone) if m is not None]
    for round, who in ((1, everyone), (2, everyone[:2]), (3, everyone)):
        move(fed, round, who)
        messages = fed.messages(round, who)
        for client, message in messages.items():
            check(message, fed.method.expected(round, fed.state, client), ("examples",))
            fed.method.check_update(round, fed.state, client, message)
            seen.append(message.tensors)
        if messages:
            fed.state = fed.method.server(round, fed.state, messages)
        fed.deliver()
        seen += [m.tensors for m in (fed.method.reply(fed.state, client) for client in everyone) if m is not None]
    seen.append(fed.state)
    for client in fed.clients.values():
        seen += [client.tensors, client.notes, fed.method.model(client)]
    return seen


def of_a_head(name: str) -> bool:
    return "head" in name.split("/")


# -- what a method is without a head ---------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("classes", [1, 4])
def test_it_is_the_method_with_a_private_head_but_for_the_head(
    federation: Federations, name: str, options: dict[str, Any], other: dict[str, Any], classes: int
) -> None:
    """The oracle: a head at home is nobody's business, so without one everything else is the same to the last bit."""
    ranks = ranks_of(name, options)
    headless = federation(name, options, ranks, headless=True, **{**other, "classes": classes})
    head = {"head/weight": (classes, 6), "head/bias": (classes,)}
    private = {**options, "head": "private", "head_start": "zero"}
    headed = federation(name, private, ranks, **{**other, "classes": classes, "head": head})
    got, want = play(headless), play(headed)
    assert not any(of_a_head(key) for tensors in got for key in tensors)
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert list(mine) == [key for key in theirs if not of_a_head(key)]
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]), key
    assert any(of_a_head(key) for tensors in want for key in tensors)


@pytest.mark.parametrize(("name", "options", "other"), [v for v in VARIANTS if v[0] != "celora"], ids=str)
def test_no_statistics_travel_for_a_head_that_is_not_there(
    federation: Federations, name: str, options: dict[str, Any], other: dict[str, Any]
) -> None:
    fed = federation(name, options, ranks_of(name, options), headless=True, **other)
    said = {key.partition("/")[0] for message in fed.sketches().values() for key in message.tensors}
    reads_data = options.get("similarity") == "both"
    assert said == ({"gradient", "count"} if name == "fedsb" else {"statistics"} if reads_data else set())
    assert (fed.method.once is None) == (not said)
    assert (fed.method.sketch_numbers() == 0) == (not said)


@pytest.mark.parametrize(
    ("options", "celoras"),
    [
        ({}, {}),
        ({"temperature": 0.1, "proximal": 0.1}, {"temperature": 0.1, "proximal": 0.1}),
        ({"basis": "frozen"}, {"basis": "frozen", "similarity": "size", "components": 0}),
        ({"similarity": "data"}, {"basis": "frozen", "similarity": "data", "components": 0}),
        ({"fedopt": "adam"}, {"basis": "frozen", "similarity": "size", "components": 0, "fedopt": "adam"}),
    ],
    ids=str,
)
def test_folklora_is_celora_and_what_it_is_told(
    federation: Federations, options: dict[str, Any], celoras: dict[str, Any]
) -> None:
    """Without a head it has nothing of its own to add, and cores in a common frame alone say too little."""
    one, other = (
        play(federation(*entry, ranks=(2, 5, 3), headless=True))
        for entry in (("folklora", options), ("celora", celoras))
    )
    for mine, theirs in zip(one, other, strict=True):
        assert list(mine) == list(theirs)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].needs_head])
def test_what_is_common_to_all_is_a_global_model(federation: Federations, name: str) -> None:
    """Whatever the recipe says of a head that is not there."""
    for options in ({}, {"head": "private"}):
        fed = federation(name, {**LOSSLESS.get(name, {}), **options}, headless=True).begin()
        for round in (1, 2):
            fed.step(round)
            fed.deliver()
            model = fed.method.global_model(fed.state, "bob", dict(fed.clients["bob"].tensors))
            assert (model is not None) == METHODS[name].has_global_model
            for client in fed.clients.values() if model is not None else ():
                assert model.keys() == client.tensors.keys()
                for key, tensor in model.items():
                    # FedLPP's clients hold a copy on a grid of few levels: with one number a block, but for rounding.
                    torch.testing.assert_close(
                        tensor, client.tensors[key], rtol=1e-6 if name == "fedlpp" else 0, atol=0
                    )


# -- invariants ------------------------------------------------------------------------------------------------------

# A residual cut to two directions promises nothing, and whose experts move is not who it was.
MOVING = {"local", "fedamole"}
STEADY = [(name, options) for name, options in PLAIN if name not in MOVING and "residual_rank" not in options]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    variant=st.sampled_from(STEADY),
    rank=st.integers(2, 7),
    alpha=st.floats(0.5, 32),
    examples=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
def test_equal_clients_and_clients_alone_stay_what_they_are(
    federation: Federations,
    variant: tuple[str, dict[str, Any]],
    rank: int,
    alpha: float,
    examples: list[int],
    seed: int,
) -> None:
    name, options = variant
    options = {**options, "heads": 1} if name == "ravan" else options
    fed = federation(
        name, options, (rank,) * len(examples), examples=examples, headless=True, alpha=alpha, seed=seed
    ).begin()
    for round in (1, 2):
        move(fed, round)
        first = fed.clients["ann"]
        for client in fed.clients.values():
            client.tensors, client.notes = dict(first.tensors), dict(first.notes)
        before, norms = fed.dense(first.tensors), {k: t for k, t in first.tensors.items() if k.startswith("norm/")}
        messages = fed.messages(round)
        fed.state = fed.method.server(round, fed.state, messages)
        mixing = fed.method.mixing(fed.state, messages)
        if mixing is not None:
            torch.testing.assert_close(mixing.double().sum(1), torch.ones(len(examples)).double(), rtol=1e-5, atol=1e-5)
        fed.deliver()
        for client in fed.clients.values():
            for got, want in zip(fed.dense(client.tensors), before, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())
            for key, tensor in norms.items():
                torch.testing.assert_close(client.tensors[key], tensor, rtol=1e-5, atol=1e-6)


ALIKE = ["fedit", "fedsa", "fedawa", "fedlpp", "ditto", "apfl", "lorafair", "fedex", "zeropad", "replication", "hafl"]


@pytest.mark.parametrize("name", ALIKE)
def test_one_client_in_a_federation_is_training_alone(federation: Federations, name: str) -> None:
    """Methods that start and train as plain LoRA does: beside nobody, they are plain LoRA."""
    fed, alone = (federation(each, LOSSLESS.get(each, {}), (3,), headless=True).begin() for each in (name, "local"))
    for round in (1, 2, 3):
        for each in (fed, alone):
            move(each, round)
        messages = fed.messages(round)
        fed.state = fed.method.server(round, fed.state, messages)
        fed.deliver()
        for got, want in zip(
            fed.dense(fed.clients["ann"].tensors), alone.dense(alone.clients["ann"].tensors), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# -- data without labels ---------------------------------------------------------------------------------------------


def gaussians_apart(one: torch.Tensor, other: torch.Tensor, extra: float) -> float:
    """W2 between diagonal Gaussians of two clients' features, by the textbook."""
    x, y = one.double().numpy(), other.double().numpy()
    deviations = np.sqrt(x.var(0) + extra) - np.sqrt(y.var(0) + extra)
    return float(np.sqrt(((x.mean(0) - y.mean(0)) ** 2).sum() + (deviations**2).sum()))


def wanted_similarity(fed: Any, extra: float) -> np.ndarray:
    features = [client.data.train[0] for client in fed.clients.values()]
    d = np.array([[gaussians_apart(x, y, extra) for y in features] for x in features])
    return np.exp(-d / np.median(d[np.triu_indices(len(d), 1)]))


@pytest.mark.parametrize(("components", "extra"), [(0, 0.0), (1, 1e-5)])
def test_similarity_of_data_without_labels_is_that_of_gaussians(
    federation: Federations, components: int, extra: float
) -> None:
    options = {"similarity": "data", "components": components}
    fed = federation("celora", options, (3,) * 5, headless=True).begin()
    np.testing.assert_allclose(fed.state["similarity/data"].numpy(), wanted_similarity(fed, extra), atol=1e-5)


def test_beyond_what_is_held_whole_it_is_nearly_that(federation: Federations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_similarity, "WHOLE", 2)
    fed = federation("celora", {"similarity": "data", "components": 0}, (3,) * 5, headless=True).begin()
    points, scale = fed.state["similarity/points"], fed.state["similarity/scale"]
    assert bool(fed.state["similarity/placed"].all())
    got = torch.exp(-torch.cdist(points, points) / scale)
    np.testing.assert_allclose(got.numpy(), wanted_similarity(fed, 0.0), atol=1e-4)
    fed.step(1)
    fed.deliver()


def test_a_client_of_one_example_is_like_itself_only(federation: Federations) -> None:
    fed = federation("celora", {"similarity": "data"}, examples=(30, 1, 18), headless=True).begin()
    assert fed.state["similarity/data"][1].tolist() == [0, 1, 0]
    fed = federation("celora", {"similarity": "data"}, examples=(1, 1, 1), headless=True).begin()
    assert torch.equal(fed.state["similarity/data"], torch.eye(3))


@pytest.mark.parametrize(("name", "options"), [("fedsb", {}), ("ravan", {"heads": 2, "budget": 1})])
def test_gradients_are_asked_for_under_no_head(federation: Federations, name: str, options: dict[str, Any]) -> None:
    fed = federation(name, options, headless=True).begin()
    fed.step(1)
    assert all(client.data.asked == [{}] for client in fed.clients.values())


# -- before anything runs --------------------------------------------------------------------------------------------


@variants
def test_what_will_travel_once_is_foretold(
    federation: Federations, name: str, options: dict[str, Any], other: dict[str, Any]
) -> None:
    fed = federation(name, options, headless=True, **other)
    counts = {i: torch.bincount(client.data.train[1], minlength=1) for i, client in fed.clients.items()}
    told = forecast(fed.method, counts, MessageSection())
    once = sum(len(encode(message)) for message in fed.sketches().values())
    fed.begin()
    once += sum(len(encode(m)) for m in (fed.method.welcome(fed.state, client) for client in fed.clients) if m)
    # The counts of a noisy sketch are no whole numbers; those of a forecast are as long.
    assert told.once == pytest.approx(once / len(fed.clients), abs=4 if "dp_epsilon" in options else 0)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        (
            "fedit",
            {"head": "shared"},
            'method.head = "shared", and the task has no head of its own; allowed: "private"',
        ),
        ("fedit", {"head": "sketched"}, 'method.head = "sketched"'),
        ("local", {"head_start": "sketched"}, 'method.head_start = "sketched"'),
        ("folklora", {"head": "sketched"}, 'method.head = "sketched"'),
        ("folklora", {"head_start": "auto"}, 'method.head_start = "auto"'),
        ("celora", {"head": "private", "head_start": "sketched"}, 'head_start = "sketched"'),
        ("fedsb", {"gradient_head": "own"}, 'method.gradient_head = "own"'),
        ("fedit", {"head": "shared", "fedopt": "adam"}, 'method.head = "shared"'),
        ("sketch", {}, "method.name = 'sketch' makes a head and nothing else"),
        ("sketch", {"head_start": "auto"}, "method.name = 'sketch' makes a head and nothing else"),
    ],
)
def test_what_speaks_of_a_head_is_refused_in_one_line(
    context: Callable[..., Any], name: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((RecipeError, MethodError)) as caught:
        build(name, options, context(classes=1, head={}))
    assert complaint in str(caught.value)
    assert "allowed: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    build(name, options, context())


@pytest.mark.parametrize("options", [{"head": "private"}, {"head": "private", "head_start": "zero"}])
@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].needs_head])
def test_to_say_that_there_is_none_is_no_mistake(
    context: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    method = build(name, options, context(classes=1, head={}))
    assert (method.options.start, method.options.head_travels) == ("zero", False)


def test_who_needs_a_head_is_told() -> None:
    needs = {row["name"]: row["needs_head"] for row in describe_methods(16, 16, 2)}
    assert needs == {name: name in {"sketch", "feddm", "fedaf"} for name in METHODS}


def test_a_rate_for_a_head_that_is_not_there_is_refused(context: Callable[..., Any]) -> None:
    with pytest.raises(MethodError, match=r"train\.head_lr is set, and the task has no head of its own"):
        build("fedit", {}, context(classes=1, head={}, head_rate=0.1))
    build("fedit", {}, context(head_rate=0.1))


@pytest.mark.parametrize("name", ["feddm", "fedaf", "sketch"])
def test_a_rate_for_a_head_that_no_client_trains_is_refused(context: Callable[..., Any], name: str) -> None:
    with pytest.raises(MethodError, match=rf"train\.head_lr is set, and method\.name = '{name}' trains no head at its"):
        build(name, {}, context(head_rate=0.1))
