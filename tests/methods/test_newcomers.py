"""What a server makes of the sketch of a client that took part in no round, recomputed in NumPy from what it saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from folklora.data.mixtures import ClassMixtures
from folklora.data.statistics import ClassStatistics
from folklora.methods import build, data_similarity
from folklora.methods.contract import Client, Context, Message
from folklora.methods.discriminant import linear_discriminant
from folklora.methods.embedding import LinearTransport
from folklora.methods.heads import candidates
from folklora.methods.transport import data_distances, distances_to

ALPHA = 6.0  # of the federation in conftest
SITES = ("layer.0.query", "layer.1.value")
FROZEN = {"basis": "frozen", "head": "sketched", "lambda": 0.4, "temperature": 0.2}
IDS = ("ann", "bob", "cid", "dot")
LATE = "eve"


class Begun:
    """Four clients that play, and a fifth that is there when all is over."""

    def __init__(
        self,
        federation: Callable[..., Any],
        context: Callable[..., Context],
        name: str,
        options: Mapping[str, Any],
        ranks: tuple[int, ...] = (3, 3, 3, 3, 3),
    ) -> None:
        everybody = federation(name, options, ranks=ranks, newcomers=True)
        data = {client: everybody.clients[client].data for client in (*IDS, LATE)}
        self.fed = federation(name, options, ranks=ranks[:4], data=data, newcomers=True)
        agreed = context(dict(zip((*IDS, LATE), ranks, strict=True)), newcomers=True, rounds=0)
        self.method = build(name, dict(options), agreed)
        rank = ranks[4]
        self.client = Client(LATE, rank, len(data[LATE].train[1]), self.method.initial(LATE), data[LATE], 1)

    @property
    def data(self) -> dict[str, Any]:
        return {**{name: client.data for name, client in self.fed.clients.items()}, LATE: self.client.data}

    def join(self) -> tuple[Message | None, Message | None]:
        sketch = self.method.sketch(self.client)
        if sketch is not None:
            self.fed.method.check_sketch(sketch)
        welcome, reply = self.method.newcomer(self.fed.state, LATE, sketch)
        if welcome is not None:
            self.method.settle(self.client, welcome)
        if reply is not None:
            self.method.receive(self.client, reply)
        return welcome, reply

    def mixtures(self, components: int) -> dict[str, ClassMixtures]:
        """What each would have sent, before float32 rounded it."""
        found = {}
        for name in (*IDS, LATE):
            sketch = self.method.sketch(replace(self.client, id=name, data=self.data[name]))
            assert sketch is not None
            prefix = "mixture/" if components else "statistics/"
            own = {n.removeprefix(prefix): t for n, t in sketch.tensors.items() if n.startswith(prefix)}
            if components:
                found[name] = ClassMixtures.from_tensors(own, 4, 6, components)
            else:
                found[name] = ClassMixtures.from_statistics(ClassStatistics.from_tensors(own, 4, 6))
        return found


@pytest.fixture
def begun(federation: Callable[..., Any], context: Callable[..., Context]) -> Callable[..., Begun]:
    return lambda *given, **options: Begun(federation, context, *given, **options)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def scaled(tensors: Mapping[str, torch.Tensor], most: int) -> np.ndarray:
    """``s C`` padded with zeros, [L, most, most] float64."""
    out = np.zeros((len(SITES), most, most))
    for layer, site in enumerate(SITES):
        core = tensors[f"C/{site}"].double().numpy()
        out[layer, : len(core), : len(core)] = ALPHA / len(core) * core
    return out


# -- cores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3, 3), (2, 5, 3, 4, 4)])
@pytest.mark.parametrize("components", [2, 0])
@pytest.mark.parametrize("similarity", ["data", "both"])
def test_it_gets_the_last_cores_of_the_others_by_its_data(
    begun: Callable[..., Begun], ranks: tuple[int, ...], components: int, similarity: str
) -> None:
    each = begun("celora", {**FROZEN, "components": components, "similarity": similarity}, ranks=ranks)
    each.fed.begin()
    first = each.fed.step(1)
    second = each.fed.step(2, IDS[:3])  # dot was away: its last core is that of the first round
    told = {**first, **second}
    _, reply = each.join()
    mixtures = each.mixtures(components)
    between = data_distances([mixtures[name] for name in IDS]).numpy()
    scale = np.median(between[np.triu_indices(4, 1)])
    to = data_distances([mixtures[name] for name in (*IDS, LATE)]).numpy()[4, :4]
    shares = softmax(np.exp(-to / scale) / FROZEN["temperature"])
    assert shares.std() > 0.01  # or the test says little
    most = max(ranks[:4])
    wanted = np.einsum("j,jlpq->lpq", shares, np.stack([scaled(told[name].tensors, most) for name in IDS]))
    rank = ranks[4]
    assert reply is not None
    np.testing.assert_allclose(scaled(reply.tensors, rank), wanted[:, :rank, :rank], rtol=1e-5, atol=1e-6)
    for site in SITES:
        assert torch.equal(each.client.tensors[f"C/{site}"], reply.tensors[f"C/{site}"])
        # The frame its core stands in is that of the others, cut to its rank.
        widest = each.fed.clients[IDS[int(np.argmax(ranks[:4]))]]
        assert torch.equal(each.client.tensors[f"A/{site}"], widest.tensors[f"A/{site}"][:rank])


def test_beyond_a_thousand_it_is_placed_among_the_points_of_the_others(
    begun: Callable[..., Begun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_similarity, "WHOLE", 2)
    each = begun("celora", {**FROZEN, "similarity": "data"})
    each.fed.begin()
    told = each.fed.step(1)
    _, reply = each.join()
    mixtures = each.mixtures(3)
    state = each.fed.state
    embed = LinearTransport(
        **{n: state[f"embedding/{n}"] for n in ("centre", "axes", "anchors", "masses", "origin", "directions")}
    )
    points = embed([mixtures[name] for name in (*IDS, LATE)]).double().numpy()
    np.testing.assert_allclose(points[:4], state["similarity/points"].numpy(), rtol=1e-4, atol=1e-5)
    to = np.linalg.norm(points[:4] - points[4], axis=1)
    shares = softmax(np.exp(-to / float(state["similarity/scale"])) / FROZEN["temperature"])
    wanted = np.einsum("j,jlpq->lpq", shares, np.stack([scaled(told[name].tensors, 3) for name in IDS]))
    assert reply is not None
    np.testing.assert_allclose(scaled(reply.tensors, 3), wanted, rtol=1e-4, atol=1e-5)
    assert not [name for name in state if name.startswith("sketch/")]


@pytest.mark.parametrize("similarity", ["model", "data"])
def test_where_data_say_nothing_it_gets_the_mean_of_those_who_sent_one(
    begun: Callable[..., Begun], similarity: str
) -> None:
    each = begun("celora", {**FROZEN, "similarity": similarity})
    each.fed.begin()
    told = each.fed.step(1, IDS[:3])
    if similarity == "data":  # one example of each class is no mixture
        x, y = each.client.data.train
        rows = [int((y == label).nonzero()[0]) for label in y.unique()]
        each.client.data.train = x[rows], y[rows]
    _, reply = each.join()
    assert reply is not None
    wanted = np.mean([scaled(message.tensors, 3) for message in told.values()], axis=0)
    np.testing.assert_allclose(scaled(reply.tensors, 3), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", ["uniform", "size"])
def test_one_core_for_all_is_the_newcomers_too(begun: Callable[..., Begun], similarity: str) -> None:
    each = begun("celora", {**FROZEN, "similarity": similarity})
    each.fed.begin()
    each.fed.step(1)
    _, reply = each.join()
    others = each.fed.method.reply(each.fed.state, "ann")
    assert reply is not None
    assert others is not None
    assert reply.tensors.keys() == others.tensors.keys()
    assert all(torch.equal(reply.tensors[name], tensor) for name, tensor in others.tensors.items())
    assert each.method.newcomer_lacks is None


@pytest.mark.parametrize("similarity", ["both", "size"])
@pytest.mark.parametrize("basis", ["private", "aligned"])
@pytest.mark.parametrize("head", ["sketched", "shared", "private"])
def test_cores_between_bases_of_others_say_nothing_to_it(
    begun: Callable[..., Begun], similarity: str, basis: str, head: str
) -> None:
    each = begun("celora", {"basis": basis, "similarity": similarity, "head": head})
    each.fed.begin()
    each.fed.step(1)
    welcome, reply = each.join()
    kinds = {name.partition("/")[0] for part in (welcome, reply) if part for name in part.tensors}
    assert kinds == (set() if head == "private" else {"head"})
    lacks = each.method.newcomer_lacks
    assert lacks is not None
    assert ("a head" if head == "private" else "cores") in lacks


def test_before_the_first_round_there_is_the_head_alone(begun: Callable[..., Begun]) -> None:
    each = begun("celora", FROZEN)
    each.fed.begin()
    welcome, reply = each.join()
    assert welcome is not None
    assert set(welcome.tensors) == {"head/weight", "head/bias"}
    assert reply is None


def test_distances_to_one_are_a_row_of_all_distances(begun: Callable[..., Begun]) -> None:
    mixtures = begun("celora", FROZEN).mixtures(3)
    none = torch.zeros(0)
    empty = ClassMixtures(none.long(), none, none.view(0, 1), none.view(0, 1, 1), none.view(0, 1, 1))
    others = [*(mixtures[name] for name in IDS), empty]
    whole = data_distances([mixtures[LATE], *others])[0, 1:]
    torch.testing.assert_close(distances_to(mixtures[LATE], others), whole, rtol=1e-10, atol=1e-10)
    assert torch.isinf(distances_to(empty, others)).all()


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("sketch", {}), ("local", {"head": "sketched"}), ("folklora", {"head_start": "sketched"}), ("celora", FROZEN)],
)
def test_its_own_statistics_are_in_the_head_it_gets(
    begun: Callable[..., Begun], name: str, options: dict[str, Any]
) -> None:
    each = begun(name, options)
    each.fed.begin()
    if each.fed.method.rounds():
        each.fed.step(1)
    welcome, _ = each.join()
    everything = [of.train for of in each.data.values()]
    x, y = (torch.cat(parts) for parts in zip(*everything, strict=True))
    weight, bias = linear_discriminant(ClassStatistics.merge([ClassStatistics.of(*own, 4) for own in everything]))
    assert welcome is not None
    assert len(x) == len(y)
    torch.testing.assert_close(welcome.tensors["head/weight"], weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(welcome.tensors["head/bias"], bias, rtol=1e-4, atol=1e-4)
    assert torch.equal(each.client.tensors["head/weight"], welcome.tensors["head/weight"])
    assert each.method.newcomer_lacks is None
    # Without its statistics it would be another one.
    assert not torch.allclose(each.fed.state["start/head/weight"], weight, rtol=1e-3, atol=1e-3)


def test_a_head_that_is_chosen_is_the_best_as_it_stands(begun: Callable[..., Begun]) -> None:
    """Others choose what trains best; a newcomer does not train before it predicts."""
    each = begun("folklora", {})
    each.fed.begin()
    each.fed.step(1)
    welcome, _ = each.join()
    assert welcome is not None
    x, y = each.client.data.validation
    starts = candidates(welcome.tensors["head/weight"], welcome.tensors["head/bias"], each.client.data.train[1])
    wrong = [int(((x @ c.weight.T + c.bias).argmax(1) != y).sum()) for c in starts]
    taken = each.client.tensors["head/weight"], each.client.tensors["head/bias"]
    equal = [torch.equal(c.weight, taken[0]) and torch.equal(c.bias, taken[1]) for c in starts]
    assert wrong[equal.index(True)] == min(wrong) < max(wrong)


def test_a_head_that_is_averaged_is_the_newcomers_too(begun: Callable[..., Begun]) -> None:
    each = begun("fedit", {"head_start": "sketched"})
    each.fed.begin()
    each.fed.step(1)
    each.join()
    assert torch.equal(each.client.tensors["head/weight"], each.fed.state["global/head/weight"])


@pytest.mark.parametrize("augment", ["none", "sketch"])
def test_a_head_that_is_fitted_is_fitted_by_the_newcomer(begun: Callable[..., Begun], augment: str) -> None:
    each = begun("fedit", {"head": "private", "head_start": "fitted", "augment": augment})
    each.fed.begin()
    each.fed.step(1)
    welcome, reply = each.join()
    assert welcome is not None
    assert reply is not None
    assert bool(welcome.tensors) == (augment == "sketch")
    x, y = each.client.data.train
    right = (x @ each.client.tensors["head/weight"].T + each.client.tensors["head/bias"]).argmax(1) == y
    assert right.float().mean() > 0.7
    assert each.method.newcomer_lacks is None
