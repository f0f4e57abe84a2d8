"""DLG, iDLG, Inverting Gradients, TAG and LAMP where they must succeed, and where there is nothing to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from folklora.errors import AttackError
from folklora.federation.rounds import Silent
from folklora.federation.run import variant
from folklora.methods import METHODS
from folklora.methods.base import Method
from folklora.privacy.attacks import find
from folklora.privacy.attacks.attacker import Attacker
from folklora.privacy.attacks.objective import cosine
from folklora.privacy.attacks.observation import Knowledge
from folklora.privacy.attacks.replica import Replica
from folklora.privacy.attacks.run import Plan, attack
from folklora.privacy.attacks.victims import choose
from folklora.privacy.attacks.warm import play
from folklora.privacy.attacks.witness import watch

WIDE = ("adapter.targets=.*layer.0.attention.self.(query|value)", "adapter.rank=32")
"""As many numbers as the layer's input has, so that a short text follows from a gradient."""

FULL = Knowledge(view="gradient")


def _recalls(document: dict[str, Any]) -> tuple[float, float]:
    found = document["metrics"]["token_recall"]
    assert found["gain"] == pytest.approx(found["mean"] - found["control"])
    return found["mean"], found["control"]


@pytest.mark.parametrize("name", ["dlg", "tag", "lamp"])
def test_the_full_gradient_of_one_text_gives_it_away(tiny_recipe: Callable[..., Any], name: str) -> None:
    found = attack(tiny_recipe("method.name=fedit", *WIDE), Plan(name, knowledge=FULL, budget=120, victims=1))
    assert found["victims"][0]["recovered"] == found["victims"][0]["original"] != [""]
    assert found["metrics"]["exact_match"]["mean"] == 1
    recall, control = _recalls(found)
    assert recall == 1
    assert control < 0.5  # shuffled, it says nothing


def test_what_is_really_sent_gives_it_away_too(tiny_recipe: Callable[..., Any]) -> None:
    """A step of AdamW is little more than signs, and still a text follows from it."""
    found = attack(tiny_recipe("method.name=fedit", *WIDE), Plan("lamp", budget=160, victims=2))
    recall, control = _recalls(found)
    assert recall >= 0.6
    assert recall - control > 0.3
    assert found["bytes"] > 0


@pytest.mark.parametrize(
    ("method", "warmup"),
    [("local", 1), ("celora", 0)],  # nothing travels; B = 0, and a core behind it has no gradient at all
)
def test_nothing_to_find(tiny_recipe: Callable[..., Any], method: str, warmup: int) -> None:
    for name in ("dlg", "tag", "lamp"):
        found = attack(
            tiny_recipe(f"method.name={method}"), Plan(name, knowledge=replace(FULL, bases=True), warmup=warmup)
        )
        assert all(entry["gain"] == 0 for entry in found["metrics"].values())
        assert all(victim["recovered"] == victim["control"] for victim in found["victims"])
        assert (found["bytes"] == 0) == (method == "local") == (not found["sent"])


def test_labels_are_read_where_a_head_is_sent(tiny_recipe: Callable[..., Any]) -> None:
    unlabelled = replace(FULL, labels=False)
    plan = Plan("idlg", knowledge=unlabelled, budget=4, victims=3, batch=2)
    assert attack(tiny_recipe("method.name=fedit"), plan)["metrics"]["label_accuracy"]["mean"] == 1
    # And are guessed along with the text where none is.
    found = attack(tiny_recipe("method.name=ffa", "method.head=private"), plan)
    assert 0 <= found["metrics"]["label_accuracy"]["mean"] <= 1
    # Who knows them has nothing to find out.
    assert "label_accuracy" not in attack(tiny_recipe("method.name=fedit"), Plan("dlg", budget=2))["metrics"]


@pytest.mark.parametrize(("name", "targets"), [("dlg", "(q_proj|v_proj)"), ("inverting", "layers.0.*")])
def test_the_full_gradient_of_one_picture(picture_recipe: Callable[..., Any], name: str, targets: str) -> None:
    recipe = picture_recipe("fine", "adapter.rank=32", f"adapter.targets=.*{targets}")
    found = attack(recipe, Plan(name, knowledge=FULL, budget=300, victims=1))["metrics"]
    assert found["mse"]["higher"] is False
    assert found["mse"]["mean"] < 0.5 * found["mse"]["control"]
    assert found["psnr"]["gain"] > 3
    assert found["perceptual"]["mean"] < 0.2 * found["perceptual"]["control"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pictures_by_prompts(picture_recipe: Callable[..., Any], kind: str) -> None:
    found = attack(picture_recipe(kind), Plan("inverting", knowledge=FULL, budget=40, victims=1, batch=2))["metrics"]
    assert found["perceptual"]["gain"] < 0


def test_a_language_model(chat_recipe: Callable[..., Any]) -> None:
    recipe = chat_recipe("adapter.targets=.*layers.0.*(q_proj|v_proj)", "adapter.rank=32")
    recall, control = _recalls(attack(recipe, Plan("lamp", knowledge=FULL, budget=160, victims=2)))
    assert recall - control > 0.2


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.condenses])
def test_every_method_is_attacked_or_refused(tiny_recipe: Callable[..., Any], method: str) -> None:
    found = attack(tiny_recipe(f"method.name={method}"), Plan("tag", budget=2, victims=1))
    assert {"token_recall", "rouge_l"} <= found["metrics"].keys()
    assert bool(found["sent"]) == (method not in {"local", "sketch"})
    assert all(name.startswith(("token/", "embedding/")) for name in found["unmatched"])
    assert bool(found["unmatched"]) == (method == "fedamole")


def test_a_method_that_sends_no_trained_tensor_is_refused(
    tiny_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["ravan"], "as_trained", Method.as_trained)
    with pytest.raises(AttackError, match=r"'ravan' sends 'H/.*allowed: a method that sends trained tensors"):
        attack(tiny_recipe("method.name=ravan", "method.head=private"), Plan("tag", budget=2, victims=1))


@pytest.mark.parametrize(
    "method", ["fedit", "hafl", "flora", "fedlpp", "fedex", "ditto", "folklora", "ravan", "ravan:heads=3:budget=2"]
)
def test_the_truth_explains_what_was_seen(tiny_recipe: Callable[..., Any], method: str) -> None:
    """What every attack rests on: of all inputs the real ones come nearest, whatever a method does to its messages."""
    warm = play(variant(tiny_recipe(), method, 0), 1, Silent())
    replica = Replica(warm.setup.task, warm.setup.method.adapter, "text")
    _, victims = choose(warm.setup, 1, 3, 0)
    for view, least in (("gradient", 0.02), ("sent", 0.2)):
        knowledge = Knowledge(view=view, bases=True)  # type: ignore[arg-type]
        for victim in victims:
            (seen,) = watch(warm, victim, knowledge, replica, steps=1)
            lens, observation = Attacker(replica, knowledge), seen.observation
            canvas, (labels, _) = lens.canvas(observation), lens.labels(observation)
            assert labels is not None
            paints = [canvas.paint(victim.examples)] + [
                canvas.noise(torch.Generator().manual_seed(seed)) for seed in range(3)
            ]
            true, *others = (
                float(lens.distance(observation, canvas.inputs(paint), labels, cosine, slope=False)) for paint in paints
            )
            assert true < min(least, *others)


def test_later_rounds_of_the_same_batch_are_matched_at_once(tiny_recipe: Callable[..., Any]) -> None:
    warm = play(tiny_recipe("method.name=fedit"), 1, Silent())
    replica = Replica(warm.setup.task, warm.setup.method.adapter, "text")
    _, (victim,) = choose(warm.setup, 2, 1, 0)
    first, second = (one.observation for one in watch(warm, victim, FULL, replica, steps=1, rounds=2))
    assert (first.round, second.round) == (2, 3)
    assert any(not torch.equal(first.before[name], second.before[name]) for name in first.gradient)
    lens = Attacker(replica, FULL)
    canvas = lens.canvas(first)
    inputs, labels = canvas.inputs(canvas.noise(torch.Generator().manual_seed(0))), torch.from_numpy(victim.labels)
    one, other = (float(lens.distance(seen, inputs, labels, cosine, slope=False)) for seen in (first, second))
    lens.further = [second]
    assert float(lens.distance(first, inputs, labels, cosine, slope=False)) == pytest.approx((one + other) / 2)


@pytest.mark.parametrize("name", ["dlg", "idlg", "tag", "lamp"])
def test_an_attack_takes_what_it_was_given_and_no_more(tiny_recipe: Callable[..., Any], name: str) -> None:
    warm = play(tiny_recipe("method.name=fedit"), 1, Silent())
    replica = Replica(warm.setup.task, warm.setup.method.adapter, "text")
    _, (victim,) = choose(warm.setup, 1, 1, 0)
    (seen,) = watch(warm, victim, FULL, replica, steps=1)
    for budget in (1, 7, 33):
        lens = Attacker(replica, FULL)
        find(name)().run(lens, seen.observation, budget, torch.Generator().manual_seed(0))
        assert lens.spent == budget


def test_more_steps_are_seen_as_one_way(tiny_recipe: Callable[..., Any]) -> None:
    """The pseudo-gradient of SGD is the mean of the gradients on the way, whatever the learning rate's course."""
    recipe = tiny_recipe(
        "method.name=fedit", "train.optimizer=sgd", "train.lr=1e-4", "train.schedule=linear", "train.clip=none"
    )
    warm = play(recipe, 1, Silent())
    replica = Replica(warm.setup.task, warm.setup.method.adapter, "text")
    _, (victim,) = choose(warm.setup, 2, 1, 0)
    (exact,) = watch(warm, victim, FULL, replica, steps=3)
    (seen,) = watch(warm, victim, Knowledge(bases=True), replica, steps=3)
    for name in ("head/weight", "head/bias"):
        wanted = exact.observation.gradient[name]
        torch.testing.assert_close(
            seen.observation.gradient[name], wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())
        )


def test_a_client_that_is_rehearsed_has_what_it_never_sends(tiny_recipe: Callable[..., Any]) -> None:
    """Its own head, believed to be zero otherwise, points where the victim's does."""
    warm = play(tiny_recipe("method.name=fedsa", "data.partition=iid"), 1, Silent())
    replica = Replica(warm.setup.task, warm.setup.method.adapter, "text")
    public, (victim,) = choose(warm.setup, 1, 1, 0)
    (true,) = watch(warm, victim, Knowledge(bases=True), replica, steps=1)
    (plain,) = watch(warm, victim, Knowledge(), replica, steps=1)
    (believed,) = watch(warm, victim, Knowledge(), replica, steps=1, public=public)
    name = "head/weight"
    assert not plain.observation.before[name].any()
    heads = [seen.observation.before[name].flatten() for seen in (true, believed)]
    assert float(torch.nn.functional.cosine_similarity(*heads, dim=0)) > 0.3
    assert not torch.equal(*heads)
    # What was last replied is known in any case.
    assert all(torch.equal(true.observation.before[n], plain.observation.before[n]) for n in true.observation.gradient)


def test_victims_are_the_same_for_every_method_and_not_public(tiny_recipe: Callable[..., Any]) -> None:
    found = []
    for method in ("fedit", "local"):
        setup = play(tiny_recipe(f"method.name={method}"), 0, Silent()).setup
        public, victims = choose(setup, 3, 5, 7)
        assert not set(public.tolist()) & {int(row) for victim in victims for row in victim.rows}
        assert all(set(v.rows.tolist()) <= set(setup.data.splits[v.client].train.tolist()) for v in victims)
        found.append([(victim.client, victim.rows.tolist()) for victim in victims])
    assert found[0] == found[1]
    assert len(np.unique([client for client, _ in found[0]])) == 4  # of four clients, before one is asked again
