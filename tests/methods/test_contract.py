"""What every method keeps to: what trains, what travels, what the server remembers, and that engines may rely on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from folklora.data.statistics import ClassStatistics
from folklora.errors import MessageError, MethodError, RecipeError
from folklora.federation.codec import check, decode, encode
from folklora.methods import METHODS, build, check_options
from folklora.methods.contract import Message
from folklora.methods.discriminant import linear_discriminant
from folklora.report.vocabulary import TELLS, WORDS

HEAD, NORM = {"head/weight", "head/bias"}, {"norm/ln.weight", "norm/ln.bias"}
# method -> (kinds that train, kinds that travel) in an odd and in an even round, by its own defaults; from the papers.
TABLE: dict[str, list[tuple[str, str]]] = {
    "local": [("A B head norm", "")] * 2,
    "sketch": [("", "")] * 2,
    "fedit": [("A B head norm", "A B head norm")] * 2,
    "ffa": [("B head norm", "B head norm")] * 2,
    "fedsa": [("A B head norm", "A")] * 2,
    "rolora": [("B head norm", "B head norm"), ("A head norm", "A head norm")],
    "fedawa": [("A B head norm", "A B head norm")] * 2,
    "fedlpp": [("A B head norm", "A B head norm")] * 2,
    "ditto": [("A B head norm", "A B head norm")] * 2,
    "apfl": [("A B head norm", "A B head norm")] * 2,
    "lorafair": [("A B head norm", "A B head norm")] * 2,
    "flora": [("A B head norm", "A B head norm")] * 2,
    "fedex": [("A B head norm", "A B head norm")] * 2,
    "federa": [("A B head norm", "A B head norm")] * 2,
    "loraxs": [("C head norm", "C head norm")] * 2,
    "fedsb": [("C head norm", "C head norm")] * 2,
    "ravan": [("C gain head norm", "H head norm")] * 2,
    "zeropad": [("A B head norm", "A B head norm")] * 2,
    "replication": [("A B head norm", "A B head norm")] * 2,
    "hetlora": [("A B head norm", "A B head norm rank")] * 2,
    "hafl": [("A B head norm", "A B head norm index")] * 2,
    "haflq": [("A B head norm", "A B head norm index")] * 2,
    "fedamole": [("A B T head norm", "A B T head norm token embedding")] * 2,
    "feddm": [("", "condensed labels")] * 2,
    "fedaf": [("", "condensed labels logits soft")] * 2,
    "celora": [("A B C head norm", "C")] * 2,
    "folklora": [("C head norm", "C")] * 2,
}
CORE = {"celora", "folklora", "loraxs", "fedsb", "ravan"}
MIXED = {"local", "sketch", "celora", "folklora", "flora", "zeropad", "replication", "hetlora", "hafl", "haflq"}
# Those with one model for all, whose head travels by default too.
GLOBAL = {"fedit", "ffa", "rolora", "fedawa", "lorafair", "flora", "fedex", "federa", "loraxs", "fedsb", "ravan"}
# What they send is data: no model goes up, and what comes down is the server's own.
CONDENSED = {"feddm", "fedaf"}
DATA = {"condensed": "condensed/inputs", "logits": "logits/mean", "soft": "soft/mean", "labels": "index/labels"}
WITH_A_HEAD = {"sketch", *CONDENSED}
GLOBAL |= {"ditto", "apfl", "zeropad", "replication", "hetlora", "hafl", "haflq"}
# What comes back as something else than the mean by examples: weights are learned; a mean is corrected; stacks.
NO_MEAN: dict[str, tuple[str, ...]] = {
    "fedawa": ("A/", "B/", "head/", "norm/"),
    "lorafair": ("B/",),
    "flora": ("A/", "B/"),
    "hetlora": ("A/", "B/", "index/"),
    "hafl": ("index/",),
    "haflq": ("index/",),
}
# What a client adds to the frozen weights itself; those of MERGES move updates there from the factors, so that only the
# sum of both is what was agreed.
MERGES = {"flora", "fedex"}
BASE = {*MERGES, "federa"}
# RAVAN sends the product of gains and cores: on receipt the gains are one again, and only the product is what was sent.
# It stacks two heads of rank 3 here.
HEADS = {"ravan": 2}
# Every client holds six experts of rank 3 beside the shared one, whoever chooses whom.
EXPERTS = {"fedamole": 7}
MIXTURE: dict[str, dict[str, Any]] = {"fedamole": {"min_experts": 6, "max_experts": 6}}
OF_A_SITE = {"A", "B", "C", "T", "H", "gain", "base", "index", "live", "token", "embedding"}
# Starts that follow from the frozen weights, not from the seed: exact but for rounding, or for LoRA-XS's tiny core.
SVD = {"federa": 1e-5, "loraxs": 1e-3}
HEAD_SHARED = {"head": "shared", "head_start": "sketched"}
# Methods that send few bits, as they are where nothing is lost: a scale for each number.
COARSE: dict[str, dict[str, Any]] = {"fedlpp": {"block": 1}, "haflq": {"block": 1, "bits": 64.0}}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {**COARSE, **MIXTURE}.get(name, {})) for name in TABLE),
    *((name, {**HEAD_SHARED, **{**COARSE, **MIXTURE}.get(name, {})}) for name in TABLE if name != "sketch"),
    *((name, {"head": "private", "head_start": "auto"}) for name in ("local", "fedit", "rolora", "celora")),
    ("folklora", {"head": "private", "head_start": "zero"}),
    ("local", {"augment": "auto"}),
    ("sketch", {"head_start": "fitted"}),
    ("fedit", {"head": "private", "augment": "gan"}),
    ("celora", {"augment": "sketch"}),
    ("folklora", {"head_start": "fitted", "augment": "gaussian"}),
    *(
        ("celora", {"basis": basis, "similarity": similarity})
        for basis in ("private", "frozen", "aligned")
        for similarity in ("data", "model", "uniform", "size")
    ),
    ("celora", {"components": 0, "head": "sketched"}),
    ("celora", {"projection": 3}),
    ("fedawa", {"weights": "layer", "server_optimizer": "sgd"}),
    ("lorafair", {"form": "least_squares"}),
    ("fedex", {"residual_rank": 2}),
    ("hafl", {"scheme": "freezing"}),
]
variants = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v))
everyone = pytest.mark.parametrize("name", METHODS)


def names_of(kinds: str, core: bool) -> set[str]:
    """The tensors of some kinds, spelt out."""
    sites = ("layer.0.query", "layer.1.value")
    factors = {f"{kind}/{site}" for kind in kinds.split() if kind in OF_A_SITE for site in sites}
    factors |= {"index/rank"} if "rank" in kinds.split() else set()
    factors |= {DATA[kind] for kind in kinds.split() if kind in DATA}
    return factors | (HEAD if "head" in kinds else set()) | (NORM if "norm" in kinds else set())


def shape_of(name: str, rank: int, heads: int = 1) -> tuple[int, ...]:
    fixed = {"head/weight": (4, 6), "head/bias": (4,), "norm/ln.weight": (5,), "norm/ln.bias": (5,), "index/rank": (1,)}
    d_in, d_out = (10, 12) if name.endswith("query") else (8, 7)
    stacked = heads * rank
    shapes = {"A": (stacked, d_in), "C": (stacked, stacked), "B": (d_out, stacked), "base": (d_out, d_in)}
    shapes |= {"H": (heads, rank, rank), "gain": (heads,), "index": (rank,)}
    shapes |= {"T": (rank, d_in), "live": (heads - 1,), "token": (rank,), "embedding": (heads - 1, rank)}
    return fixed.get(name) or shapes[name.partition("/")[0]]


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def same_model(fed: Any, one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], rtol: float) -> None:
    """Equal tensors; of a method that merges, or sends products, equal products and whatever else there is."""
    of_product = {"A", "B", "base"} if fed.method.name in MERGES else {"C", "gain"} if fed.method.name in HEADS else {}
    for got, want in zip(fed.dense(one), fed.dense(other), strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-5)
    for key, tensor in one.items():
        if key.partition("/")[0] not in of_product:
            torch.testing.assert_close(tensor, other[key], rtol=rtol, atol=1e-6)


def test_the_table_above_is_complete() -> None:
    assert set(TABLE) == set(METHODS)
    assert {name for name, method in METHODS.items() if method.mixed_ranks} == MIXED
    assert all(method.name == name and method.title for name, method in METHODS.items())


# -- the start -------------------------------------------------------------------------------------------------------


@variants
def test_the_first_model_is_the_frozen_backbone(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    ranks = (2, 5, 3) if name in MIXED else (3, 3, 3)
    fed = federation(name, options, ranks=ranks)
    for client in fed.clients.values():
        kinds = ("A B C head norm" if name in CORE else "A B head norm") + (" base" if name in BASE else "")
        kinds += " gain" if name in HEADS else " T live" if name in EXPERTS else ""
        assert set(client.tensors) == names_of(kinds, name in CORE)
        for key, tensor in client.tensors.items():
            # Where pairs are frozen, a client's rank is how many it trains: all hold the most there are.
            rank = max(ranks) if options.get("scheme") == "freezing" else client.rank
            assert tensor.shape == shape_of(key, rank, {**HEADS, **EXPERTS}.get(name, 1))
            assert tensor.dtype == torch.float32
            assert not tensor.requires_grad
        assert all(np.abs(product).max() <= SVD.get(name, 0.0) for product in fed.dense(client.tensors))
        assert not client.tensors["head/weight"].any()
        assert same(
            {k: client.tensors[k] for k in sorted(NORM)}, {k: fed.method.context.norms[k] for k in sorted(NORM)}
        )


@variants
def test_the_start_follows_from_the_seed_and_not_from_who_is_asked_first(
    context: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    ranks = {"ann": 2, "bob": 5, "cid": 3} if name in MIXED else {"ann": 3, "bob": 3, "cid": 3}
    one = build(name, options, context(ranks))
    other = build(name, options, context(dict(reversed(ranks.items()))))
    starts = {client: one.initial(client) for client in ranks}
    for client in reversed(ranks):
        assert same(other.initial(client), starts[client])
    moved = build(name, options, context(ranks, seed=1)).initial("ann")
    assert torch.equal(moved["A/layer.0.query"], starts["ann"]["A/layer.0.query"]) == (name in SVD)
    # Layers differ by more than their scale, which goes with 1 / sqrt(d_in).
    layers = [
        starts["ann"][f"A/{site}"].flatten()[:8] * d**0.5 for site, d in (("layer.0.query", 10), ("layer.1.value", 8))
    ]
    assert not torch.allclose(*layers, rtol=0.2)


@everyone
def test_what_a_client_owns_is_its_own_memory(context: Callable[..., Any], name: str) -> None:
    method = build(name, {}, context())
    first = method.initial("ann")
    for tensor in first.values():
        tensor.fill_(7)
    assert all(not torch.equal(tensor, first[key]) for key, tensor in method.initial("ann").items())
    assert all(torch.equal(t, torch.full_like(t, float("weight" in n))) for n, t in method.context.norms.items())


# -- what trains, what travels ---------------------------------------------------------------------------------------


@everyone
@pytest.mark.parametrize("round", [1, 2, 3])
@pytest.mark.parametrize("head", [None, "private", "shared"])
def test_what_trains_and_what_travels(federation: Callable[..., Any], name: str, round: int, head: str | None) -> None:
    if name in WITH_A_HEAD and head is not None:
        return
    fed = federation(name, {} if head is None else {"head": head, "head_start": "zero"}).begin()
    trains, travels = TABLE[name][(round - 1) % 2]
    if head is not None:
        travels = travels.replace("head ", "") + (" head" if head == "shared" else "")
    before = fed.snapshot()
    fed.train(round)
    for client in fed.clients.values():
        moved = {key for key, tensor in client.tensors.items() if not torch.equal(tensor, before[client.id][key])}
        assert moved == names_of(trains, name in CORE)
    messages = fed.messages(round)
    wanted = names_of(travels, name in CORE)
    assert set(messages) == (set(fed.clients) if wanted else set())
    assert set(fed.method.expected(round, fed.state, "ann")) == wanted
    for client, message in messages.items():
        assert set(message.tensors) == wanted
        assert message.numbers == {"examples": fed.clients[client].examples}


@variants
def test_what_is_sent_is_what_is_expected_at_every_rank(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = federation(name, options, ranks=(2, 5, 3) if name in MIXED else (3, 3, 3)).begin()
    for round in (1, 2):
        for client, message in fed.step(round).items():
            check(message, fed.method.expected(round, fed.state, client), ("examples",))
            for key, tensor in message.tensors.items():
                stacked = {**HEADS, **EXPERTS}.get(name, 1)
                assert name in CONDENSED or tensor.shape == shape_of(key, fed.clients[client].rank, stacked)


@everyone
def test_the_one_off_upload_is_statistics_or_mixtures_and_nothing_else(
    federation: Callable[..., Any], name: str
) -> None:
    statistics = {f"statistics/{part}" for part in ("classes", "counts", "means", "scatter")}
    mixture = {f"mixture/{part}" for part in ("classes", "counts", "components", "weights", "means", "variances")}
    gradient = {"gradient/layer.0.query", "gradient/layer.1.value", "count/gradient"}
    wanted = {"sketch": statistics, "folklora": statistics, "celora": mixture, "fedsb": gradient}.get(name, set())
    wanted = {"counts/train"} if name in CONDENSED else wanted
    fed = federation(name)
    sketches = fed.sketches()
    assert set(sketches) == (set(fed.clients) if wanted else set())
    assert all(set(message.tensors) == wanted and not message.numbers for message in sketches.values())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"similarity": "model"}, set()),
        ({"similarity": "uniform"}, set()),
        ({"similarity": "size"}, set()),
        ({"similarity": "both", "lambda": 0.0}, set()),
        ({"similarity": "data"}, {"mixture"}),
        ({"similarity": "data", "components": 0}, {"statistics"}),
        ({"similarity": "model", "head": "sketched"}, {"statistics"}),
        ({"similarity": "both", "head": "sketched"}, {"mixture", "statistics"}),
        ({"similarity": "both", "head": "sketched", "components": 0}, {"statistics"}),
    ],
)
def test_celora_sketches_only_what_its_options_read(
    federation: Callable[..., Any], options: dict[str, Any], parts: set[str]
) -> None:
    sketches = federation("celora", options).sketches()
    assert {name.partition("/")[0] for message in sketches.values() for name in message.tensors} == parts
    assert len(sketches) == (3 if parts else 0)


# -- replies and state -----------------------------------------------------------------------------------------------


@variants
def test_a_reply_changes_what_travelled_and_keeps_every_shape(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    if name in CONDENSED:  # a model comes down for data that goes up
        return
    fed = federation(name, options, ranks=(2, 5, 3) if name in MIXED else (3, 3, 3)).begin()
    travelled: set[str] = set()
    for round in (1, 2, 3):
        for message in fed.step(round).values():
            travelled |= set(message.tensors)
        before = fed.snapshot()
        fed.deliver()
        for client in fed.clients.values():
            assert list(client.tensors) == list(before[client.id])
            for key, tensor in client.tensors.items():
                assert tensor.dtype == torch.float32
                assert tensor.shape == before[client.id][key].shape
                merged = name in MERGES and key.startswith("base/")
                product = name in HEADS and f"H/{key.partition('/')[2]}" in travelled and key[0] in "Cg"
                assert key in travelled or merged or product or torch.equal(tensor, before[client.id][key])
            reply = fed.method.reply(fed.state, client.id)
            said = set(reply.tensors if reply else {})
            if name in MERGES:
                said = {key for key in said if not key.startswith(("up/", "down/", "base/"))}
            # Indices say which pairs went up; whoever is sent all of them needs none.
            up_only = ("index/", "token/", "embedding/")
            said, heard = ({key for key in keys if not key.startswith(up_only)} for keys in (travelled, said))
            assert heard == {key for key in said if name != "flora" or key[0] not in "AB"}
            assert reply is None or not reply.numbers


@variants
def test_state_is_tensors_that_a_checkpoint_can_hold(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = federation(name, options).begin()
    for round in (0, 1, 2):
        if round:
            fed.step(round, ["ann", "cid"] if round == 1 else ["bob", "cid"])
        for tensor in fed.state.values():
            assert type(tensor) is torch.Tensor
            assert not tensor.requires_grad
            assert bool(torch.isfinite(tensor).all())
        saved = safetensors.torch.load(safetensors.torch.save(fed.state))
        for client in fed.clients:
            for speak in (fed.method.welcome, fed.method.reply):
                said, again = speak(fed.state, client), speak(saved, client)
                assert (said is None) == (again is None)
                assert said is None or (set(said.tensors) == set(again.tensors))
                assert said is None or all(torch.equal(said.tensors[n], again.tensors[n]) for n in said.tensors)
        assert same(
            dict(sorted(fed.method.insight(saved).items())), dict(sorted(fed.method.insight(fed.state).items()))
        )
        # And the next round goes on from what was saved as from what was never saved.
        fed.train(round + 1)
        messages = fed.messages(round + 1)
        if messages:
            went_on = (fed.method.server(round + 1, state, messages) for state in (fed.state, saved))
            assert same(*(dict(sorted(state.items())) for state in went_on))


@variants
def test_the_server_changes_neither_the_old_state_nor_the_messages(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = federation(name, options).begin()
    fed.step(1)
    old, copies = fed.state, {key: tensor.clone() for key, tensor in fed.state.items()}
    fed.train(2)
    messages = fed.messages(2)
    sent = {client: {key: t.clone() for key, t in m.tensors.items()} for client, m in messages.items()}
    if messages:
        fed.method.server(2, old, messages)
    assert same(old, copies)
    assert all(same(message.tensors, sent[client]) for client, message in messages.items())


@variants
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_messages_survive_the_wire(
    federation: Callable[..., Any], name: str, options: dict[str, Any], dtype: str
) -> None:
    fed = federation(name, options)
    sketches = {i: fed.method.sketch(c) for i, c in fed.clients.items()}
    if any(sketches.values()):
        # Whatever the wire makes of a sketch, the server reads it.
        fed.state = fed.method.begin({i: decode(encode(m, dtype)) for i, m in sketches.items()})
    said = [(sketches["ann"], None), (fed.method.welcome(fed.state, "ann"), None)]
    fed.begin().train(1)
    sent = fed.method.send(1, fed.clients["ann"])
    fed.step(1)
    said += [(sent, fed.method.expected(1, fed.state, "ann")), (fed.method.reply(fed.state, "ann"), None)]
    tolerance = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 1 / 250}[dtype]
    for message, shapes in said:
        if message is None:
            continue
        arrived = decode(encode(message, dtype), shapes=shapes)
        if shapes is not None:
            check(arrived, shapes, ("examples",))
        assert arrived.numbers == message.numbers
        assert set(arrived.tensors) == set(message.tensors)
        for key, tensor in message.tensors.items():
            biggest = float(tensor.abs().max()) if dtype == "int8" else tensor.double().abs()
            assert bool(((arrived.tensors[key].double() - tensor).abs() <= tolerance * biggest + 1e-7).all())


# -- aggregation -----------------------------------------------------------------------------------------------------

TRAVELLING = [(name, options) for name, options in VARIANTS if name not in {"local", "sketch", *CONDENSED, *MIXTURE}]
travelling = pytest.mark.parametrize(("name", "options"), TRAVELLING, ids=str)


@travelling
def test_a_client_alone_gets_back_what_it_sent(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    for ranks, who in (((3,), ["ann"]), ((3, 3, 3), ["bob"])):
        fed = federation(name, options, ranks=ranks).begin()
        for round in (1, 2):
            fed.step(round, who)
            before = fed.snapshot()[who[0]]
            fed.deliver(who)
            same_model(fed, fed.clients[who[0]].tensors, before, 1e-6)


@travelling
def test_equal_clients_get_what_they_are(federation: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    fed = federation(name, options).begin()
    for round in (1, 2):
        fed.train(round)
        for client in fed.clients.values():
            client.tensors = dict(fed.clients["ann"].tensors)
        before = fed.snapshot()["ann"]
        fed.state = fed.method.server(round, fed.state, fed.messages(round))
        fed.deliver()
        for client in fed.clients.values():
            same_model(fed, client.tensors, before, 1e-5)


@travelling
def test_the_order_of_messages_is_no_matter_but_of_rounding(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    """The same mapping gives the same bits. Sums in another order round elsewhere, so `Rounds` orders it by client."""
    fed = federation(name, options, ranks=(3,) * 5).begin()
    fed.train(1)
    messages = fed.messages(1)
    state, again = (fed.method.server(1, fed.state, messages) for _ in range(2))
    assert same(state, again)
    reversed_state = fed.method.server(1, fed.state, dict(reversed(messages.items())))
    assert set(reversed_state) == set(state)
    for key, tensor in state.items():
        torch.testing.assert_close(reversed_state[key], tensor, rtol=1e-5, atol=1e-6)


@travelling
def test_clients_that_are_absent_change_nothing_for_those_present(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    many = federation(name, options, ranks=(3,) * 5).begin()
    present = ["bob", "dot", "eve"]
    few = federation(
        name, options, ranks=dict.fromkeys(present, 3), data={i: many.clients[i].data for i in present}
    ).begin()
    where = torch.tensor([many.method.context.clients.index(client) for client in present])
    if "similarity/data" in many.state:  # its scale, a median over all clients, is agreed on before round 1
        few.state["similarity/data"] = many.state["similarity/data"][where[:, None], where]
    for client in present:  # as is a sketched head
        few.clients[client].tensors = dict(many.clients[client].tensors)
    for round in (1, 2):
        many.step(round, present)
        few.step(round)
        for fed in (many, few):
            fed.deliver(present)
        for client in present:
            assert same(many.clients[client].tensors, few.clients[client].tensors)


@travelling
def test_shared_tensors_are_means_by_examples(
    federation: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    fed = federation(name, options).begin()
    for round in (1, 2):
        messages = fed.step(round)
        n = np.array([client.examples for client in fed.clients.values()], dtype=float)
        for key in messages["ann"].tensors:
            if key.startswith(("C/", *NO_MEAN.get(name, ()))):
                continue
            want = np.average([m.tensors[key].double().numpy() for m in messages.values()], axis=0, weights=n)
            for client in fed.clients:
                got = fed.method.reply(fed.state, client).tensors[key].numpy()
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@variants
def test_mixing_says_who_got_what_share(federation: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    fed = federation(name, options).begin()
    messages = fed.step(1, ["ann", "cid"])
    mixing = fed.method.mixing(fed.state, messages)
    # No one matrix for all layers.
    if name in {"local", "sketch", *CONDENSED, *MIXTURE} or options.get("weights") == "layer":
        assert mixing is None
        return
    assert mixing.shape == (2, 2)
    torch.testing.assert_close(mixing.double().sum(1), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    if name in {"fedawa", "hetlora"}:
        return  # weights that are learned, or norms
    by_size = {"celora": "both", "folklora": "size"}
    if options.get("similarity", by_size.get(name, "size")) == "size":
        torch.testing.assert_close(
            mixing.double(), torch.tensor([[30.0, 18.0]] * 2).double() / 48, rtol=1e-6, atol=1e-6
        )


# -- the one model of all --------------------------------------------------------------------------------------------


@everyone
def test_the_global_model_is_what_all_clients_hold(federation: Callable[..., Any], name: str) -> None:
    fed = federation(name).begin()
    for round in (1, 2, 3):
        fed.step(round)
        fed.deliver()
        model = fed.method.global_model(fed.state, "bob", dict(fed.clients["bob"].tensors))
        if name in {*GLOBAL, *CONDENSED}:
            assert all(same(model, client.tensors) for client in fed.clients.values())
        elif name == "sketch":
            assert same(model, fed.clients["ann"].tensors)
            assert model["head/weight"].any()
        elif name in COARSE:  # the server's is the finer one
            assert all(not same(model, client.tensors) for client in fed.clients.values())
        else:
            assert model is None


@pytest.mark.parametrize("name", sorted(GLOBAL))
def test_with_a_private_head_no_model_is_global(federation: Callable[..., Any], name: str) -> None:
    fed = federation(name, {"head": "private"}).begin()
    fed.step(1)
    assert fed.method.global_model(fed.state, "ann", dict(fed.clients["ann"].tensors)) is None


# -- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*TABLE} - {*CONDENSED}))
def test_a_sketched_head_is_the_central_discriminant(federation: Callable[..., Any], name: str) -> None:
    options = {"head": "sketched", "head_start": "sketched"}
    fed = federation(name, options).begin()
    features, labels = zip(*(client.data.train for client in fed.clients.values()), strict=True)
    central = ClassStatistics.of(torch.cat(features), torch.cat(labels), 4)
    weight, bias = linear_discriminant(central)
    for client in fed.clients.values():
        torch.testing.assert_close(client.tensors["head/weight"], weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(client.tensors["head/bias"], bias, rtol=1e-3, atol=1e-4)
    assert not fed.method.shared(1) & {"head"}
    assert fed.method.reply(fed.state, "ann") is None


@pytest.mark.parametrize("name", ["fedit", "celora"])
def test_a_shared_head_may_start_sketched(federation: Callable[..., Any], name: str) -> None:
    fed = federation(name, HEAD_SHARED).begin()
    started = {key: fed.clients["ann"].tensors[key].clone() for key in sorted(HEAD)}
    assert started["head/weight"].any()
    assert set(fed.method.welcome(fed.state, "ann").tensors) == HEAD
    # Whoever was away in round 1 still holds the start, and the server says so before anybody trained.
    assert same({key: fed.method.reply(fed.state, "cid").tensors[key] for key in sorted(HEAD)}, started)
    messages = fed.step(1, ["ann", "bob"])
    assert set(messages["ann"].tensors) >= HEAD
    reply = fed.method.reply(fed.state, "cid").tensors
    n = np.array([30, 12])
    for key in HEAD:
        want = np.average([messages[i].tensors[key].double().numpy() for i in ("ann", "bob")], axis=0, weights=n)
        np.testing.assert_allclose(reply[key].numpy(), want, rtol=1e-6, atol=1e-6)
        assert not torch.equal(reply[key], started[key])


def test_a_head_that_will_not_be_trained_is_chosen_as_it_starts(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sketch` has no rounds, whatever the recipe says: nothing a candidate might learn counts."""
    epochs: list[int] = []

    def spy(*_: Any, **given: Any) -> dict[str, torch.Tensor]:
        epochs.append(given["epochs"])
        return {}

    monkeypatch.setattr("folklora.methods.base.choose_head", spy)
    federation("sketch", {"head_start": "auto"}, rounds=7).begin()
    federation("folklora", rounds=7).begin()
    assert epochs == [0] * 3 + [7] * 3


def test_without_any_sketch_there_is_no_sketched_head(federation: Callable[..., Any]) -> None:
    fed = federation("sketch")
    with pytest.raises(MethodError, match="no client sent class statistics"):
        fed.begin(missing=tuple(fed.clients))


def test_one_missing_sketch_leaves_the_others_head(federation: Callable[..., Any]) -> None:
    fed = federation("folklora").begin(missing=["bob"])
    assert fed.state["start/head/weight"].any()
    fed.step(1)
    fed.deliver()


# -- refusals --------------------------------------------------------------------------------------------------------


@everyone
def test_ranks_that_cannot_be(context: Callable[..., Any], name: str) -> None:
    if name in MIXED:
        build(name, {}, context((2, 3)))
    else:
        with pytest.raises(MethodError, match=r"adapter.rank has \[2, 3\]; allowed: one rank"):
            build(name, {}, context((2, 3)))
    build(name, {}, context((7, 7)))
    with pytest.raises(MethodError, match=r"adapter.rank = 8 exceeds .* allowed: 1 to 7"):
        build(name, {}, context((8, 8)))


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("fedavg", {}, "method.name = 'fedavg': no such method"),
        ("cellora", {}, "did you mean 'celora'?"),
        ("fedit", {"lambda": 0.5}, "unknown key `method.lambda`"),
        ("celora", {"lamda": 0.5}, "unknown key `method.lamda`; did you mean `lambda`?"),
        ("celora", {"lambda": 1.5}, "method.lambda = 1.5: input should be less than or equal to 1"),
        ("celora", {"lambda": "high"}, "method.lambda = 'high'"),
        ("celora", {"temperature": 0.0}, "method.temperature = 0.0"),
        ("celora", {"temperature": 1e-310}, "method.temperature = 1e-310"),
        ("celora", {"temperature": float("inf")}, "method.temperature = inf"),
        ("celora", {"temperature": float("nan")}, "method.temperature = nan"),
        ("celora", {"similarity": "cosine"}, "method.similarity = 'cosine': input should be 'data', 'model'"),
        ("celora", {"basis": "shared"}, "method.basis = 'shared': input should be 'private', 'frozen' or 'aligned'"),
        ("celora", {"components": -1}, "method.components = -1"),
        ("folklora", {"components": -1}, "method.components = -1"),
        ("folklora", {"components": 65}, "method.components = 65"),
        ("celora", {"components": 2.5}, "method.components = 2.5"),
        ("celora", {"dp_epsilon": 1.0}, "allowed: components = 0"),
        ("celora", {"dp_epsilon": float("inf"), "components": 0}, "method.dp_epsilon = inf"),
        ("celora", {"dp_epsilon": 1.0, "components": 0, "dp_delta": 1.0}, "method.dp_delta = 1.0"),
        ("folklora", {"projection": 3}, "allowed: components >= 1, or projection = 0"),
        ("sketch", {"head": "private"}, "method.head = 'private': input should be 'sketched'"),
        ("sketch", {"head_start": "zero"}, 'is head = "private"'),
        ("local", {"head": "sketched", "head_start": "zero"}, 'is head = "private"'),
        ("fedit", {"head_start": "auto"}, 'head_start = "auto" needs a head that stays home'),
        ("folklora", {"head": "shared"}, 'head_start = "auto" needs a head that stays home'),
        ("fedit", {"head": True}, "method.head = True"),
        ("fedit", {"head_start": "fitted"}, 'head_start = "fitted" needs a head that stays home'),
        ("fedit", {"augment": "gan"}, 'augment = "gan" needs a head that stays home; allowed: head = "private"'),
        ("folklora", {"augment": "auto"}, 'augment = "auto" with head_start = "auto"'),
        ("local", {"augment": "sketch", "head": "sketched"}, 'allowed: head_start = "fitted"'),
        ("local", {"augment": "vae"}, "method.augment = 'vae': input should be 'none', 'gaussian', 'sketch', 'gan'"),
        ("celora", {"head_start": "fitted", "refresh": 2}, 'refresh = 2 with head_start = "fitted"'),
    ],
)
def test_bad_options_are_one_clear_line(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises((RecipeError, MethodError)) as caught:
        check_options(name, options)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_projection_wider_than_the_features_is_refused_before_anything_runs(context: Callable[..., Any]) -> None:
    build("celora", {"projection": 6}, context())
    with pytest.raises(MethodError, match=r"method.projection = 7 .* allowed: 0 \(none\) to 6"):
        build("celora", {"projection": 7}, context())


@pytest.mark.parametrize(
    ("options", "start", "travels"),
    [
        ({}, "zero", False),
        ({"head": "shared"}, "zero", True),
        ({"head": "sketched"}, "sketched", False),
        ({"head": "shared", "head_start": "sketched"}, "sketched", True),
        ({"head": "private", "head_start": "sketched"}, "sketched", False),
        ({"head": "private", "head_start": "auto"}, "auto", False),
        ({"head": "sketched", "head_start": "auto"}, "auto", False),
        ({"head": "private", "head_start": "zero"}, "zero", False),
        ({"augment": "gan"}, "fitted", False),
        ({"head_start": "fitted"}, "fitted", False),
        ({"head": "sketched", "head_start": "fitted", "augment": "auto"}, "fitted", False),
    ],
)
def test_how_head_options_are_read(options: dict[str, Any], start: str, travels: bool) -> None:
    read = check_options("local", options)
    assert (read.start, read.head_travels) == (start, travels)


@variants
def test_only_the_agreed_sketch_is_taken(federation: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    fed = federation(name, options)
    sketches = fed.sketches()
    honest = sketches.get("ann", Message())
    if sketches:
        fed.method.check_sketch(honest)
    part = "statistics" if "statistics/means" in honest.tensors else "mixture"
    lies = [
        Message({**honest.tensors, "head/weight": torch.zeros(4, 6)}),
        Message({**honest.tensors, f"{part}/notes": torch.zeros(1)}),
        Message(honest.tensors, {"examples": 10.0}),
    ]
    for key, tensor in honest.tensors.items():
        lies.append(Message({n: t for n, t in honest.tensors.items() if n != key}))
        lies.append(Message({**honest.tensors, key: tensor[:-1]}))
        lies.append(Message({**honest.tensors, key: tensor.double() * float("nan")}))
    for lie in lies:
        with pytest.raises(MessageError):
            fed.method.check_sketch(lie)


def test_defaults_follow_the_papers() -> None:
    assert [check_options(name, {}).head for name in ("fedit", "ffa", "rolora")] == ["shared"] * 3
    assert [check_options(name, {}).head for name in ("local", "fedsa", "celora")] == ["private"] * 3
    published = check_options("celora", {}).model_dump()
    assert (published["basis"], published["similarity"], published["components"]) == ("private", "both", 3)
    assert published["init_std"] == 1e-3


def test_rolora_starts_with_b(federation: Callable[..., Any]) -> None:
    """While B = 0 the gradient of A is zero: a first round of A would train nothing."""
    fed = federation("rolora").begin()
    trained = [next(iter(fed.method.trained(round) & {"A", "B"})) for round in (1, 2, 3, 4)]
    assert trained[0] == "B"
    assert all(one != other for one, other in pairwise(trained))


@pytest.mark.parametrize("options", [{}, {"experts": "cores"}], ids=str)
@everyone
def test_an_audit_has_words_for_whatever_is_sent(
    context: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    if not set(options) <= set(METHODS[name].options_type.model_fields):
        options = {}
    method = build(name, options, context())
    kinds = {each.split("/")[0] for round in (1, 2) for each in method.expected(round, {}, "ann")}
    assert kinds <= WORDS.keys() & TELLS.keys()
