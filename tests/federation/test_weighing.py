"""Clients that say fewer examples than they have, as their audits say: the mean that comes of it, everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.adapters.lowrank import Tensors
from folklora.data.audit.quality import quality, weighed
from folklora.errors import RecipeError
from folklora.federation.auditing import audit_clients
from folklora.federation.inspect import inspect
from folklora.federation.local import LocalEngine
from folklora.federation.poison import PoisonedData, struck, with_liars
from folklora.federation.setup import prepare
from folklora.methods.contract import Message
from folklora.report.audit import audit as audit_of_a_run

SMALL = ("data.limit=100", "train.rounds=1", "data.partition=iid")
FAULTY = ("poison.kind=duplicate", "poison.share=0.5", "poison.rows=0.6")


def said(engine: Callable[[Any], LocalEngine], heard: dict[str, Message]) -> Callable[[Any], LocalEngine]:
    """An engine whose members' uploads are noted as they leave."""

    def make(setup: Any) -> LocalEngine:
        made = engine(setup)
        for client, member in made.members.items():
            protect = member.outlet.protect

            def noting(round: int, message: Message, client: str = client, protect: Any = protect) -> Message:
                heard[client] = protect(round, message)
                return heard[client]

            member.outlet.protect = noting  # type: ignore[method-assign]
        return made

    return make


def local(setup: Any) -> LocalEngine:
    return with_liars(LocalEngine(setup))


def mean(messages: dict[str, Message], weights: dict[str, float]) -> Tensors:
    """FedIT by hand: sum of n_k theta_k over sum of n_k, float64."""
    total = sum(weights.values())
    return {
        name: sum(weights[client] / total * message.tensors[name].double() for client, message in messages.items())  # type: ignore[misc]
        for name in next(iter(messages.values())).tensors
    }


def copies_left(texts: list[str]) -> float:
    """The share that is different, by hand: here copies are exact or far from it."""
    return len(set(texts)) / len(texts)


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """60 texts of each of four sites: the first repeats phrases, the last copies itself, the others talk at random."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(240):
        site, length = i % 4, int(random.integers(4, 12))
        start = int(random.integers(40))
        words = range(start, start + length) if site == 0 else random.integers(60, size=length)
        text = " ".join(f"w{word}" for word in words)
        if site == 3 and i >= 100:
            text = rows[i - 80]["text"]
        rows.append({"text": text, "label": ("amber", "blue")[int(random.integers(2))], "site": f"site-{site}"})
    path = tmp_path / "sites.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("by", ["duplicates", "regularity", "both"])
def test_fedit_by_hand(tiny_recipe: Any, play: Callable[..., Any], sites: Path, by: str) -> None:
    heard: dict[str, Message] = {}
    natural = (f"data.source={sites}", "data.partition=natural", "data.by=site", "train.rounds=1")
    recipe = tiny_recipe("method.name=fedit", *natural, f"audit.weights={by}")
    played = play(recipe, said(local, heard))
    weights = {}
    for client, member in played.engine.members.items():
        split = played.setup.data.splits[client]
        texts = member.data.inputs(split.train)
        weights[client] = max(1.0, round(len(split.train) * quality(texts, by)))  # type: ignore[arg-type]
        assert heard[client].numbers["examples"] == weights[client]
    ordered, noise, copied = (weights[f"site-{i}"] for i in (0, 1, 3))
    assert noise == 42 if by == "duplicates" else ordered > 2 * noise
    assert copied < 0.6 * 42
    expected = mean(heard, weights)
    for name, tensor in expected.items():
        torch.testing.assert_close(played.rounds.state[f"global/{name}"].double(), tensor, rtol=1e-5, atol=1e-7)
    # And another than the plain mean.
    plain = mean(heard, {client: float(len(played.setup.data.splits[client].train)) for client in heard})
    assert any((plain[name] - expected[name]).abs().max() > 1e-5 for name in plain)


def test_copies_count_once(tiny_recipe: Any) -> None:
    recipe = tiny_recipe("method.name=fedit", *SMALL, *FAULTY, "audit.weights=duplicates")
    engine = local(prepare(recipe))
    bad = struck(recipe, list(engine.members))
    for client, member in engine.members.items():
        rows = member.data.split.train
        left = copies_left(member.data.inputs(rows))
        assert (left < 0.5) == (client in bad)
        assert member.outlet.weight == pytest.approx(left * len(rows), rel=0.13)  # half of a step, and whole numbers


@pytest.mark.parametrize("secure", ["masks", "ckks"])
def test_the_same_where_nobody_can_read_it(tiny_recipe: Any, play: Callable[..., Any], secure: str) -> None:
    pytest.importorskip("cryptography" if secure == "masks" else "tenseal.sealapi")
    settings = ("method.name=fedit", *SMALL, *FAULTY, "audit.weights=duplicates", "train.optimizer=sgd")
    clear, hidden = (play(tiny_recipe(*settings, f"secure.kind={kind}"), local) for kind in ("none", secure))
    weights = {client: member.outlet.weight for client, member in clear.engine.members.items()}
    assert weights == {client: member.outlet.weight for client, member in hidden.engine.members.items()}
    assert sorted(set(weights.values()))[0] < min(len(split.train) for split in clear.setup.data.splits.values())
    for client, member in clear.engine.members.items():
        found = hidden.engine.members[client].client.tensors
        for name, tensor in member.client.tensors.items():
            np.testing.assert_allclose(found[name], tensor, rtol=0, atol=2e-4, err_msg=name)


def test_both_engines_weigh_alike(tiny_recipe: Any, play: Callable[..., Any], federated: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=fedit", "data.limit=100", "train.rounds=2", "audit.weights=both")
    plain, fed = play(recipe), federated(recipe)
    fed.play()
    assert [line["validation"] for line in fed.lines[1:]] == [line["validation"] for line in plain.lines[1:]]
    other = play(tiny_recipe("method.name=fedit", "data.limit=100", "train.rounds=2"))
    assert [line["bytes_up"] for line in other.lines] == [line["bytes_up"] for line in plain.lines]


def test_without_it_nothing_is_audited(tiny_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folklora.federation.member.quality", lambda *_: pytest.fail("nobody asked"))
    engine = LocalEngine(prepare(tiny_recipe("method.name=fedit", *SMALL)))
    for client, member in engine.members.items():
        assert member.outlet.weight == len(engine.setup.data.splits[client].train)


def test_changed_data_are_audited_again(tiny_recipe: Any) -> None:
    recipe = tiny_recipe(
        "method.name=fedit", "data.limit=100", "audit.weights=regularity", "drift.kind=labels", "drift.round=2"
    )
    engine = LocalEngine(prepare(recipe))
    for client, member in engine.members.items():
        member.enter(1)
        before = member.outlet.weight
        member.enter(2)
        texts = member.data.inputs(engine.setup.split(client, 2).train)
        assert member.outlet.weight == weighed(len(texts), quality(texts, "regularity"))
        member.enter(1)
        assert member.outlet.weight == before


def test_chats_are_audited(tiny_recipe: Any, tiny_speaker: Path, tiny_chats: Path) -> None:
    settings = (f"model.name={tiny_speaker}", "model.task=causal-lm", f"data.source={tiny_chats}", "data.clients=2",
                "data.partition=iid", "method.name=fedit", "audit.weights=both")  # fmt: skip
    engine = LocalEngine(prepare(tiny_recipe(*settings)))
    found = audit_clients(engine.setup.recipe)["clients"]
    for client, member in engine.members.items():
        assert member.outlet.weight == found[client]["counts_as"] < found[client]["examples"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("privacy.unit=client", "privacy.noise=1.0", "method.head_start=zero"), "everybody counts the same"),
        (("privacy.unit=example", "privacy.noise=1.0", "method.head_start=zero"), "would leave without noise"),
        (("robust.rule=median",), 'rule = "mean"'),
        (("method.name=local",), "does not ask how many examples"),
        (("method.name=sketch",), "does not ask how many examples"),
        (("method.name=celora", "method.similarity=uniform"), "does not ask how many examples"),
    ],
)
def test_refused_before_work_starts(tiny_recipe: Any, settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        prepare(tiny_recipe("method.name=fedit", *settings, "audit.weights=both"))
    assert said in str(refusal.value)
    assert 'audit.weights = "both"' in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_pictures_are_not_audited(tiny_recipe: Any, seeing_model: Any, noise: Any, tmp_path: Path) -> None:
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i, picture in enumerate(noise(20)):
            Image.fromarray(picture).save(tmp_path / "pictures" / label / f"{i}.png")
    settings = (f"model.name={seeing_model('vit')}", f"data.source={tmp_path / 'pictures'}", "data.image=image",
                "method.name=fedit", "data.clients=2", "data.partition=iid")  # fmt: skip
    with pytest.raises(RecipeError, match="pictures"):
        prepare(tiny_recipe(*settings, "audit.weights=both"))
    with pytest.raises(RecipeError, match="pictures"):
        audit_clients(tiny_recipe(*settings))


def test_the_runs_audit_says_that_a_weight_leaves(tiny_recipe: Any, play: Callable[..., Any]) -> None:
    lines = [
        [line["what"] for line in audit_of_a_run(play(tiny_recipe("method.name=fedit", *SMALL, extra)).directory.path)[
            "left"
        ]["reported"]]
        for extra in ("audit.weights=none", "audit.weights=both")
    ]  # fmt: skip
    assert len(set(lines[1]) - set(lines[0])) == 1
    assert "as how many examples it counts" in (set(lines[1]) - set(lines[0])).pop()


# -- faults ------------------------------------------------------------------------------------------------------------


def test_scrambled_texts_are_trained_on_and_audited(tiny_recipe: Any) -> None:
    recipe = tiny_recipe("method.name=fedit", *SMALL, "poison.kind=scramble", "poison.share=0.25", "poison.rows=0.5")
    engine = local(prepare(recipe))
    (bad,) = struck(recipe, list(engine.members))
    table = engine.setup.data.table
    words = {word for text in table.inputs for word in text.split()}
    for client, member in engine.members.items():
        rows = member.data.split.train
        texts, plain = member.data.inputs(rows), [table.inputs[row] for row in rows]
        changed = [one != other for one, other in zip(texts, plain, strict=True)]
        assert sum(changed) <= (int(0.5 * len(rows) + 0.5) if client == bad else 0)
        assert sum(changed) > (0.4 * len(rows) if client == bad else -1)  # a word may come out as it was
        assert [len(t.split()) for t in texts] == [len(t.split()) for t in plain]
        assert {word for text in texts for word in text.split()} <= words
        (job,) = member.jobs(1)
        for text, example in zip(texts, job.examples, strict=True):
            assert list(example) == list(engine.setup.task.encode([text])[0])
        np.testing.assert_array_equal(job.labels, table.labels[rows])
        found, labels = member.data.features("train")
        same = (found == engine.setup.frozen_features()[torch.from_numpy(rows)]).all(1).numpy()
        assert (~same & ~np.array(changed)).sum() == 0
        assert (same & np.array(changed)).sum() == 0
        np.testing.assert_array_equal(labels, table.labels[rows])
        for split in ("validation", "test"):
            np.testing.assert_array_equal(member.labels(split), table.labels[member.data.indices(split)])


def test_copied_rows_bring_their_labels(tiny_recipe: Any) -> None:
    recipe = tiny_recipe("method.name=fedit", *SMALL, "poison.kind=duplicate", "poison.share=1", "poison.rows=0.5")
    setup = prepare(recipe)
    for client, split in setup.data.splits.items():
        data = PoisonedData(setup, client)
        rows = data.false.stand_ins(split.train)
        assert set(rows) < set(split.train)
        assert len(set(rows)) <= len(rows) - int(0.5 * len(rows) + 0.5)
        examples, labels = data.training(split.train)
        np.testing.assert_array_equal(labels, setup.data.table.labels[rows])
        np.testing.assert_array_equal(data.labels("train"), labels)
        assert data.inputs(split.train) == [setup.data.table.inputs[row] for row in rows]
        assert [list(e) for e in examples] == [list(setup.encoded[row]) for row in rows]
        torch.testing.assert_close(data.features("train")[0], setup.frozen_features()[torch.from_numpy(rows)])
    whole = PoisonedData(prepare(tiny_recipe("method.name=fedit", *SMALL, "poison.kind=duplicate")), "0")
    assert len(set(whole.false.stand_ins(whole.split.train))) == 1


def test_a_share_of_rows_without_such_a_fault_is_refused(tiny_recipe: Any) -> None:
    with pytest.raises(RecipeError, match='rows = 0.5 with kind = "sign"; allowed'):
        tiny_recipe("poison.kind=sign", "poison.rows=0.5")


# -- the clients of a recipe -------------------------------------------------------------------------------------------


def test_every_client_of_a_recipe(tiny_recipe: Any, tmp_path: Path, folklora: Callable[..., Any]) -> None:
    settings = ("method.name=fedit", *SMALL, *FAULTY)
    recipe = tiny_recipe(*settings)
    found = audit_clients(recipe)
    assert found["weights"] == "both"
    engine = local(prepare(tiny_recipe(*settings, "audit.weights=both")))
    bad = struck(recipe, list(engine.members))
    for client, entry in found["clients"].items():
        assert entry["counts_as"] == engine.members[client].outlet.weight
        assert (entry["copies"] > 0.5) == (client in bad)
    assert list(found["clients"]) == list(inspect(recipe)["clients"])
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    told = folklora("inspect", tmp_path / "recipe.toml", "--audit", "--json")
    assert told.code == 0
    assert json.loads(told.out) == json.loads(json.dumps(found))
    shown = folklora("inspect", tmp_path / "recipe.toml", "--audit")
    assert shown.code == 0
    assert "quality" in shown.out
