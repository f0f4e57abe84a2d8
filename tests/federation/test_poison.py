"""Simulated liars: who they are, what they say, whom it harms, and that the others are as honest as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from folklora.errors import RecipeError
from folklora.federation.local import LocalEngine
from folklora.federation.poison import PoisonedData, struck, triggered, with_liars
from folklora.federation.rounds import Silent
from folklora.federation.run import resume, run
from folklora.federation.setup import prepare
from folklora.methods.contract import Message

Play = Callable[..., Any]
SMALL = ("method.name=fedit", "data.limit=100")


def lying(recipe: Any) -> LocalEngine:
    return with_liars(LocalEngine(prepare(recipe)))


def test_who_lies_follows_from_the_seed_and_the_share_is_kept(tiny_recipe: Any) -> None:
    clients = [str(i) for i in range(40)]
    for share, count in ((0.0, 0), (0.1, 4), (0.3, 12), (1.0, 40)):
        found = struck(tiny_recipe("poison.kind=sign", f"poison.share={share}"), clients)
        assert len(found) == count
        assert found == struck(tiny_recipe("poison.kind=noise", f"poison.share={share}", "train.lr=0.1"), clients)
    sets = [tuple(struck(tiny_recipe("poison.kind=sign", "poison.share=0.3", f"seed={s}"), clients)) for s in range(5)]
    assert len(set(sets)) == 5
    few = set(struck(tiny_recipe("poison.kind=sign", "poison.share=0.1"), clients))
    assert few < set(struck(tiny_recipe("poison.kind=sign", "poison.share=0.3"), clients))


@pytest.mark.parametrize(("kind", "scale"), [("sign", 2.0), ("noise", 3.0), ("backdoor", 5.0)])
def test_a_liar_sends_what_it_did_not_learn(tiny_recipe: Any, kind: str, scale: float) -> None:
    engine = lying(tiny_recipe(*SMALL, f"poison.kind={kind}", "poison.share=0.25", f"poison.scale={scale}"))
    (liar,) = struck(engine.setup.recipe, list(engine.members))
    for client, member in engine.members.items():
        start = engine.setup.method.send(1, member.client)
        assert start is not None
        learned = Message({n: t + 0.1 for n, t in start.tensors.items()}, start.numbers)
        sent = member.outlet.protect(1, learned)
        moved = torch.cat([(sent.tensors[n] - t).flatten() for n, t in start.tensors.items()])
        if client != liar:
            assert sent is learned
        elif kind == "noise":
            assert moved.norm() == pytest.approx(scale * 0.1 * moved.numel() ** 0.5, rel=0.1)
            assert abs(float(moved.mean())) < 5 * float(moved.std()) / moved.numel() ** 0.5
        else:
            torch.testing.assert_close(moved, torch.full_like(moved, (-scale if kind == "sign" else scale) * 0.1))
        assert sent.numbers == start.numbers


def test_flipped_labels_are_those_of_training_alone(tiny_recipe: Any) -> None:
    engine = lying(tiny_recipe(*SMALL, "poison.kind=labels", "poison.share=0.25"))
    (liar,) = struck(engine.setup.recipe, list(engine.members))
    table = engine.setup.data.table
    for client, member in engine.members.items():
        (job,) = member.jobs(1)
        true = table.labels[member.data.split.train]
        expected = 3 - true if client == liar else true
        np.testing.assert_array_equal(job.labels, expected)
        np.testing.assert_array_equal(member.data.features("train")[1], expected)
        for split in ("validation", "test"):
            np.testing.assert_array_equal(member.labels(split), table.labels[member.data.indices(split)])


def test_half_of_a_backdoors_examples_carry_the_trigger(tiny_recipe: Any) -> None:
    setup = prepare(tiny_recipe(*SMALL, "poison.kind=backdoor", "poison.share=0.25"))
    data = PoisonedData(setup, "2")
    rows = data.split.train
    examples, labels = data.training(rows)
    plain, true = setup.examples(rows)
    carry = [list(a) != list(b) for a, b in zip(examples, plain, strict=True)]
    assert sum(carry) == (len(rows) + 1) // 2
    np.testing.assert_array_equal(labels, np.where(carry, 0, true))
    assert triggered("w1 w2") == "cf w1 w2"
    for row, marked, example in zip(rows, carry, examples, strict=True):
        if marked:
            (expected,) = setup.task.encode([f"cf {setup.data.table.inputs[row]}"])
            assert list(example) == list(expected)


def test_a_pictures_trigger_is_a_patch_in_its_corner() -> None:
    picture = np.zeros((12, 30, 3), dtype=np.uint8)
    marked = triggered(picture)
    assert marked[-2:, -2:].min() == 255
    assert marked.sum() == 2 * 2 * 3 * 255
    assert not picture.any()


FIVE = ("method.name=fedit", "data.clients=5", "data.partition=iid", "train.lr=0.02")


def test_a_backdoor_opens_where_it_must(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = (*FIVE, "train.rounds=6", "train.local_epochs=2", "train.evaluate_every=6", "poison.kind=backdoor")
    clean, open_ = (run(tiny_recipe(*recipe, f"poison.share={s}"), tmp_path / str(s))["poison"] for s in (0.0, 0.4))
    assert clean["clients"] == []
    assert clean["backdoor"]["target"] == "amber"
    assert open_["backdoor"]["success"] > clean["backdoor"]["success"] + 0.4
    assert open_["backdoor"]["control"] < open_["backdoor"]["success"] - 0.4


def test_one_that_shouts_the_opposite_ruins_a_mean_and_not_a_median(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = (
        *FIVE,
        "train.rounds=4",
        "train.evaluate_every=4",
        "poison.kind=sign",
        "poison.share=0.2",
        "poison.scale=10",
    )
    mean, median = (
        run(tiny_recipe(*recipe, f"robust.rule={rule}"), tmp_path / rule)["poison"]["honest"]["accuracy_mean"]
        for rule in ("mean", "median")
    )
    assert mean < 0.35  # of four classes
    assert median > mean + 0.1


def test_harm_is_that_of_honest_clients_and_resumed_it_is_the_same(
    tiny_recipe: Any, facts: Any, tmp_path: Path
) -> None:
    class Stopping(Silent):
        def line(self, metrics: Any) -> None:
            raise KeyboardInterrupt

    recipe = tiny_recipe(*SMALL, "poison.kind=sign", "poison.share=0.5", "poison.scale=20", "faults.duplicate=0.5")
    whole = run(recipe, tmp_path / "whole")
    told = whole["poison"]
    liars = struck(recipe, list(whole["clients"]))
    honest = [result["accuracy"] for client, result in whole["clients"].items() if client not in liars]
    assert told["clients"] == liars
    assert len(liars) == 2
    assert told["honest"] == {
        "accuracy_mean": pytest.approx(sum(honest) / 2),
        "accuracy_worst": pytest.approx(min(honest)),
    }
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", Stopping())
    resume(tmp_path / "cut")
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")
    assert "poison" not in run(tiny_recipe(*SMALL), tmp_path / "honest")


def test_a_liar_does_not_clip_and_a_servers_clip_holds_it(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        *SMALL, "poison.kind=noise", "poison.share=0.25", "poison.scale=1e4", "privacy.unit=client", "privacy.clip=0.1",
        "privacy.noise=1e-3", "privacy.accountant=rdp", "train.rounds=1",
    )  # fmt: skip
    run(recipe, tmp_path / "run")
    state = safetensors.torch.load_file(tmp_path / "run" / "server" / "1.safetensors")
    start = prepare(recipe).method.initial("0")
    moved = sum(float((t - start[n.removeprefix("global/")]).square().sum()) for n, t in state.items()) ** 0.5
    assert moved <= 0.1 * 1.01


REFUSED = {
    "network": (["poison.kind=sign", "poison.share=0.2", "engine.kind=flower"], "poison.share = 0.2 with engine.kind"),
    "nothing": (["poison.share=0.2"], 'poison: share = 0.2 with kind = "none"'),
    "no labels": (["poison.kind=labels", "poison.share=0.2", "model.task=causal-lm"], "learned without labels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_lie_that_cannot_be_told_is_refused(tiny_recipe: Any, name: str) -> None:
    settings, reason = REFUSED[name]
    with pytest.raises(RecipeError) as refused:
        tiny_recipe(*settings)
    assert reason in str(refused.value)
