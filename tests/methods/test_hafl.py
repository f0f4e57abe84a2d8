"""HAFL: which pairs are chosen, what is sent of them, and the server's mean of each pair over its owners."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.adapters.lowrank import Site
from folklora.data.partition_file import to_json
from folklora.errors import MessageError
from folklora.federation.codec import decode, encode
from folklora.federation.engine import Upload
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Rounds, Silent
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.methods.contract import Message
from folklora.methods.hafl import best_first, standing
from folklora.methods.work import Trained

SITES = ("layer.0.query", "layer.1.value")
ALPHA = 6.0  # of the federation in conftest
SCHEMES = pytest.mark.parametrize("scheme", ["truncation", "freezing"])


def index(message: Message, site: str) -> list[int]:
    return [int(i) for i in message.tensors[f"index/{site}"]]


def start(federation: Callable[..., Any], most: int, **other: Any) -> Any:
    """The common start of all pairs."""
    return federation("fedit", ranks=(most,), **other).clients["ann"].tensors


def train(fed: Any, round: int, client: str, importance: dict[str, list[float]]) -> Message:
    """Random training of one client whose scores are made up: one number a pair, the mean over its numbers."""
    own = fed.clients[client]
    (work,) = fed.method.work(round, own)
    assert work.terms.importance
    random = torch.Generator().manual_seed(round)
    tensors, scores = dict(work.tensors), {}
    for key in work.trained:
        noise = torch.randn(tensors[key].shape, generator=random) * work.terms.masks.get(key, torch.ones(()))
        tensors[key] = tensors[key] + noise
        kind, _, site = key.partition("/")
        pairs = torch.tensor(importance[site]) if site in importance else torch.zeros(())
        scores[key] = torch.zeros_like(tensors[key]) + (pairs[:, None] if kind == "A" else pairs)
    fed.method.learned(round, own, {"": Trained(tensors, 1.0, 4, 0.04, scores)})
    return decode(encode(fed.method.send(round, own)))


# -- the server --------------------------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize("budgets", [(2, 5, 3), (1, 1, 6), (4, 4, 4), (3,)])
def test_each_pair_is_the_mean_of_those_who_trained_it(
    federation: Callable[..., Any], scheme: str, budgets: tuple[int, ...]
) -> None:
    owners_by_hand(federation, scheme, budgets, (30, 12, 18), {})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shapes_budgets_and_examples(federation: Callable[..., Any], data: st.DataObject) -> None:
    """Pairs that many, one or no client owns, layers as narrow as their rank."""
    budgets = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    widths = st.integers(max(budgets), 12)
    sites = tuple(Site(f"layer.{i}", data.draw(widths), data.draw(widths)) for i in range(data.draw(st.integers(1, 3))))
    examples = [data.draw(st.integers(2, 50)) for _ in budgets]
    other = {"sites": sites, "seed": data.draw(st.integers(0, 99)), "alpha": data.draw(st.floats(0.5, 32))}
    scheme = data.draw(st.sampled_from(["truncation", "freezing"]))
    owners_by_hand(federation, scheme, budgets, examples, other)


def owners_by_hand(
    federation: Callable[..., Any],
    scheme: str,
    budgets: Sequence[int],
    counts: Sequence[int],
    other: dict[str, Any],
) -> None:
    """Three rounds, the second with one client, against sums over owners in NumPy."""
    fed = federation("hafl", {"scheme": scheme}, ranks=budgets, examples=counts, **other).begin()
    sites = [site.name for site in fed.method.context.sites]
    most = max(budgets)
    common = start(federation, most, **other)
    server = {site: (common[f"A/{site}"].numpy().copy(), np.zeros_like(common[f"B/{site}"].numpy())) for site in sites}
    examples = dict(zip(fed.clients, counts, strict=False))
    for round in (1, 2, 3):
        who = None if round != 2 else ["ann"]
        messages = fed.step(round, who)
        for site in sites:
            a, b = server[site]
            for i in range(most):
                total, row, column = 0.0, np.zeros(a.shape[1]), np.zeros(b.shape[0])
                for client, message in messages.items():
                    at = sorted(index(message, site))
                    if i not in at:
                        continue
                    # A pair's share of the update is s_k b a; the server's own scale is that of the widest.
                    scale = 1.0 if scheme == "freezing" else most / len(at)
                    total += examples[client]
                    row += examples[client] * message.tensors[f"A/{site}"][at.index(i)].double().numpy()
                    column += examples[client] * scale * message.tensors[f"B/{site}"][:, at.index(i)].double().numpy()
                if total:
                    a[i], b[:, i] = row / total, column / total
            np.testing.assert_allclose(fed.state[f"global/A/{site}"].numpy(), a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(fed.state[f"global/B/{site}"].numpy(), b, rtol=1e-5, atol=1e-6)
            server[site] = a, b
        fed.deliver()


@SCHEMES
def test_where_everyone_owns_everything_it_is_fedit(federation: Callable[..., Any], scheme: str) -> None:
    plain, fed = federation("fedit").begin(), federation("hafl", {"scheme": scheme}).begin()
    for round in (1, 2, 3):
        who = ["ann", "cid"] if round == 2 else None
        for each in (plain, fed):
            each.step(round, who)
            each.deliver()
        for client in fed.clients:
            for key, tensor in plain.clients[client].tensors.items():
                torch.testing.assert_close(fed.clients[client].tensors[key], tensor, rtol=1e-6, atol=1e-7)


@SCHEMES
def test_a_pair_that_nobody_trained_is_unchanged(federation: Callable[..., Any], scheme: str) -> None:
    fed = federation("hafl", {"scheme": scheme}, ranks=(2, 5, 3)).begin()
    fed.step(1)
    fed.deliver()
    known = fed.state
    messages = fed.step(2, ["ann"])
    for site in SITES:
        trained = index(messages["ann"], site)
        rest = [i for i in range(5) if i not in trained]
        assert len(trained) == 2
        for now, was in ((fed.state[f"global/{f}/{site}"], known[f"global/{f}/{site}"]) for f in "AB"):
            now, was = (now, was) if now.shape[0] == 5 else (now.T, was.T)
            assert torch.equal(now[rest], was[rest])
            assert (now[trained] - was[trained]).abs().amax(1).gt(0).all()


def test_zero_padding_would_dilute_what_owners_agree_on(federation: Callable[..., Any]) -> None:
    """One owner's pair comes back as it was, however many do not own it."""
    for name, kept in (("zeropad", (18 / 60) ** 2), ("hafl", 1.0)):
        fed = federation(name, ranks=(2, 2, 5)).begin()
        messages = fed.step(1)
        site = SITES[0]
        alone = [2, 3, 4]
        if name == "hafl":
            others = {*index(messages["ann"], site), *index(messages["bob"], site)}
            alone = [i for i in range(5) if i not in others]
        own = messages["cid"].tensors
        sent = own[f"B/{site}"][:, alone] @ own[f"A/{site}"][alone]
        back = fed.state[f"global/B/{site}"][:, alone] @ fed.state[f"global/A/{site}"][alone]
        torch.testing.assert_close(back, kept * sent, rtol=1e-4, atol=1e-6)


# -- which pairs -------------------------------------------------------------------------------------------------------


def test_a_pairs_score_is_the_mean_over_its_row_and_column(federation: Callable[..., Any]) -> None:
    fed = federation("hafl", {"scheme": "freezing"}, ranks=(3, 3)).begin()
    own = fed.clients["ann"]
    random = torch.Generator().manual_seed(3)
    scores = {key: torch.rand(tensor.shape, generator=random) for key, tensor in own.tensors.items()}
    fed.method.learned(1, own, {"": Trained(dict(own.tensors), 1.0, 4, 0.04, scores)})
    message = fed.method.send(1, own)
    for site, d in zip(SITES, (22, 15), strict=True):
        a, b = scores[f"A/{site}"].numpy(), scores[f"B/{site}"].numpy()
        by_hand = [(a[i].sum() + b[:, i].sum()) / d for i in range(3)]
        np.testing.assert_allclose(own.notes[f"score/{site}"].numpy(), by_hand, rtol=1e-5)
        assert index(message, site) == list(np.argsort(by_hand)[::-1])


def test_freezing_trains_the_pairs_it_scored_highest_and_no_other(federation: Callable[..., Any]) -> None:
    fed = federation("hafl", {"scheme": "freezing"}, ranks=(2, 5, 3)).begin()
    own = fed.clients["ann"]
    assert fed.method.adapter.rank(own.tensors) == fed.method.rank({}, "ann") == 5
    scores = {SITES[0]: [0.1, 0.9, 0.2, 0.8, 0.3], SITES[1]: [0.5, 0.4, 0.3, 0.2, 0.1]}
    first = train(fed, 1, "ann", scores)
    for site in SITES:  # what was trained was chosen before these scores were known
        assert sorted(index(first, site)) == fed.method.first_choice("ann")[site].tolist()
        assert [scores[site][i] for i in index(first, site)] == sorted(
            (scores[site][i] for i in index(first, site)), reverse=True
        )
    before = dict(own.tensors)
    second = train(fed, 2, "ann", {site: [1.0, 2.0, 3.0, 4.0, 5.0] for site in SITES})
    assert index(second, SITES[0]) == [3, 1]  # chosen by the old scores, in the order of the new
    assert index(second, SITES[1]) == [1, 0]
    for site, pairs in zip(SITES, ([1, 3], [0, 1]), strict=True):
        for factor in "AB":
            now, was = own.tensors[f"{factor}/{site}"], before[f"{factor}/{site}"]
            now, was = (now, was) if factor == "A" else (now.T, was.T)
            moved = [i for i in range(5) if not torch.equal(now[i], was[i])]
            assert moved == pairs
            sent = second.tensors[f"{factor}/{site}"]
            assert torch.equal(sent if factor == "A" else sent.T, now[pairs])
    assert not torch.equal(own.tensors["head/weight"], before["head/weight"])


def test_truncation_holds_the_pairs_of_highest_standing(federation: Callable[..., Any]) -> None:
    fed = federation("hafl", ranks=(2, 4)).begin()
    first = fed.method.first_choice("ann")
    scores = {site: [0.4, 0.3, 0.2, 0.9] for site in SITES}
    fed.state = fed.method.server(1, fed.state, {"bob": train(fed, 1, "bob", scores)})
    for site in SITES:
        np.testing.assert_allclose(fed.state[f"standing/{site}"].numpy(), [0.75, 0.5, 0.25, 1.0])
    fed.state = safetensors.torch.load(safetensors.torch.save(fed.state))
    reply = fed.method.reply(fed.state, "ann")
    for site in SITES:
        assert index(reply, site) == [0, 3]
        assert torch.equal(reply.tensors[f"A/{site}"], fed.state[f"global/A/{site}"][[0, 3]])
        torch.testing.assert_close(reply.tensors[f"B/{site}"], 2 / 4 * fed.state[f"global/B/{site}"][:, [0, 3]])
    fed.deliver()
    fed.deliver()
    message = train(fed, 2, "ann", {site: [0.1, 0.2] for site in SITES})
    assert all(index(message, site) == [3, 0] for site in SITES)
    assert {tuple(pairs.tolist()) for pairs in first.values()} != {(0, 3)}
    fed.state = fed.method.server(2, fed.state, {"ann": message})
    for site in SITES:  # only what was sent again changes its standing
        np.testing.assert_allclose(fed.state[f"standing/{site}"].numpy(), [0.5, 0.5, 0.25, 1.0])


def test_standing_is_the_mean_over_senders() -> None:
    sent = [torch.tensor([3, 0]), torch.tensor([0, 1, 3, 4]), torch.tensor([1])]
    got = standing(sent, torch.tensor([9.0, 9, 0.3, 9, 9]))
    np.testing.assert_allclose(got.numpy(), [(0.5 + 1) / 2, (0.75 + 1) / 2, 0.3, (1 + 0.5) / 2, 0.25])
    assert best_first(got).tolist() == [1, 0, 3, 2, 4]
    assert best_first(torch.tensor([0.0, 1.0, 0.0, 1.0])).tolist() == [1, 3, 0, 2]


@SCHEMES
def test_before_anything_is_known_the_choice_is_random_and_the_seeds(
    federation: Callable[..., Any], context: Callable[..., Any], scheme: str
) -> None:
    many = {f"client {i}": 2 for i in range(40)} | {"wide": 6}
    method = federation("hafl", {"scheme": scheme}, ranks=many, examples=(9,) * 41).method
    chosen = {client: method.first_choice(client) for client in many}
    assert all(pairs.tolist() == sorted(set(pairs.tolist())) for c in chosen.values() for pairs in c.values())
    for site in SITES:
        counts = np.bincount(np.concatenate([c[site].numpy() for n, c in chosen.items() if n != "wide"]), minlength=6)
        assert counts.sum() == 80
        assert counts.min() > 3  # 13.3 each in the mean: nothing is left out
    assert any(not torch.equal(c[SITES[0]], c[SITES[1]]) for c in chosen.values())
    other = federation("hafl", {"scheme": scheme}, ranks=many, examples=(9,) * 41, seed=1).method
    assert any(not torch.equal(chosen[c][SITES[0]], other.first_choice(c)[SITES[0]]) for c in many)
    common = start(federation, 6)
    for client in ("client 3", "wide"):
        tensors, pairs = method.initial(client), chosen[client]
        for site in SITES:
            rows = pairs[site] if scheme == "truncation" else torch.arange(6)
            assert torch.equal(tensors[f"A/{site}"], common[f"A/{site}"][rows])


@SCHEMES
def test_a_client_costs_what_it_trains(federation: Callable[..., Any], scheme: str) -> None:
    """m (d_in + d_out) numbers and m indices of four bytes, per layer."""
    fed = federation("hafl", {"scheme": scheme, "head": "private"}, ranks=(2, 5, 3)).begin()
    for message, m in zip(fed.step(1).values(), (2, 5, 3), strict=True):
        carried = {k: t for k, t in message.tensors.items() if not k.startswith("norm/")}
        assert sum(t.numel() for t in carried.values()) == m * (10 + 12 + 1) + m * (8 + 7 + 1)
        assert all(t.dtype == (torch.int32 if k.startswith("index/") else torch.float32) for k, t in carried.items())


# -- what is refused ---------------------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize("lie", [[0, 5], [-1, 2], [3, 3], [2**31 - 1, 0]])
def test_indices_that_cannot_be_are_refused(federation: Callable[..., Any], scheme: str, lie: list[int]) -> None:
    fed = federation("hafl", {"scheme": scheme}, ranks=(2, 5, 3)).begin()
    message = fed.step(1)["ann"]
    fed.method.check_update(1, fed.state, "ann", message)
    bad = Message({**message.tensors, f"index/{SITES[1]}": torch.tensor(lie, dtype=torch.int32)}, message.numbers)
    with pytest.raises(MessageError, match=re.escape(f"'index/{SITES[1]}' names pairs {lie}; allowed: 0 to 4, each")):
        fed.method.check_update(1, fed.state, "ann", bad)


# -- real runs ---------------------------------------------------------------------------------------------------------


class Watching(LocalEngine):
    """The local engine; it keeps what each client held before its training, and may tamper with one upload."""

    def __init__(self, setup: Any, tamper: bool = False) -> None:
        super().__init__(setup)
        self.tamper = tamper
        self.before: dict[tuple[str, int], Any] = {}

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        for client in clients:
            self.before[client, round] = dict(self.members[client].client.tensors)
        for upload in super().train(round, clients):
            if self.tamper and (upload.client, round) == ("1", 2):
                message = decode(upload.data or b"")
                name = next(name for name in message.tensors if name.startswith("index/"))
                bad = torch.full_like(message.tensors[name], 99)
                data = encode(Message({**message.tensors, name: bad}, message.numbers))
                yield replace(upload, data=data)
            else:
                yield upload


def play(recipe: Any, folder: Path, *, tamper: bool = False) -> tuple[Rounds, Watching]:
    setup = prepare(recipe)
    directory = RunDirectory.create(folder, recipe, to_json(setup.data.table, setup.data.splits))
    engine = Watching(setup, tamper)
    rounds = Rounds(setup, directory, engine, list(setup.data.splits), Silent())
    rounds.play()
    return rounds, engine


def test_a_bad_index_fails_its_client_and_nobody_else(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe("method.name=hafl", "adapter.rank=[2,4,3,2]", "train.rounds=3")
    rounds, _ = play(recipe, tmp_path / "run", tamper=True)
    failed = [line["failed"] for line in rounds.run.metrics()]
    assert [list(each) for each in failed] == [[], [], ["1"], []]
    assert re.search(r"^tensor 'index/.*' names pairs \[99, 99, 99, 99\]; allowed: 0 to 3, each once$", failed[2]["1"])


def test_in_real_training_what_rests_does_not_move(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(
        "method.name=hafl", "method.scheme=freezing", "adapter.rank=[1,4,2,3]", "train.weight_decay=0.1"
    )
    rounds, engine = play(recipe, tmp_path / "run")
    method, at_zero = rounds.method, 0
    for client, member in engine.members.items():
        before, now = engine.before[client, 2], member.client.tensors
        budget = method.context.ranks[client]
        for site in (s.name for s in method.context.sites):
            trained = sorted(int(i) for i in member.client.notes[f"sent/{site}"])
            assert len(trained) == budget
            rest = [i for i in range(4) if i not in trained]
            assert torch.equal(now[f"A/{site}"][rest], before[f"A/{site}"][rest])
            assert torch.equal(now[f"B/{site}"][:, rest], before[f"B/{site}"][:, rest])
            assert (now[f"A/{site}"][trained] - before[f"A/{site}"][trained]).abs().amax(1).gt(0).all()
            scores = member.client.notes[f"score/{site}"]
            assert scores.shape == (4,)
            at_zero += int((scores == 0).sum())
            assert float(scores.max()) > 0
    assert at_zero < 10  # resting pairs are scored too


def test_compression_knows_the_pairs_that_a_message_holds(federation: Callable[..., Any]) -> None:
    fed = federation("hafl", {"scheme": "freezing"}, ranks=(2, 5, 3)).begin()
    fed.step(1)
    fed.deliver()
    fed.train(2)
    sent = fed.messages(2)["ann"]
    told = fed.method.reply(fed.state, "ann").tensors
    known = fed.method.known(2, "ann", told, sent)
    for site in fed.method.context.sites:
        pairs = sent.tensors[f"index/{site.name}"].long().sort().values
        assert torch.equal(known[f"A/{site.name}"], told[f"A/{site.name}"][pairs])
        assert torch.equal(known[f"B/{site.name}"], told[f"B/{site.name}"][:, pairs])
    forged = {name: torch.full_like(t, 99) if name.startswith("index/") else t for name, t in sent.tensors.items()}
    with pytest.raises(MessageError, match="names pairs"):
        fed.method.known(2, "ann", told, Message(forged, sent.numbers))
