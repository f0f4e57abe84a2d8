"""Runs whose examples are private: the same in every engine, at the price that the accountant says, or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folklora.errors import RecipeError
from folklora.federation.member import Member
from folklora.federation.run import run
from folklora.federation.setup import prepare
from folklora.privacy import example
from folklora.privacy.accounting import epsilon_spent, event
from folklora.recipe import Recipe

PRIVATE = ("privacy.unit=example", "privacy.noise=0.8", "privacy.clip=0.5", "method.name=fedit")


def test_every_engine_plays_the_same_and_tells_no_loss(
    tiny_recipe: Callable[..., Recipe], play: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    recipe = tiny_recipe(*PRIVATE, "adapter.dropout=0.1")
    local, network = play(recipe), federated(recipe)
    scores = [
        [each[client]["accuracy"] for client in "0123"]
        for each in (local.summary["clients"], network.play()["clients"])
    ]
    assert scores[0] == scores[1]
    ours, theirs = ([{**line, "aggregation_error": None} for line in each.lines] for each in (local, network))
    assert ours == theirs  # the error cannot be measured where private factors stay at home
    assert [line["train_loss"] for line in local.lines] == [None] * 3
    answered = [order.kind for order in network.carrier.orders]
    assert answered.count("train") == 8


def test_it_differs_from_a_run_that_is_not_private_and_repeats_itself(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, facts: Callable[[Path], dict[str, Any]]
) -> None:
    recipe = tiny_recipe(*PRIVATE)
    found = []
    for name, each in (("a", recipe), ("b", recipe), ("c", tiny_recipe("method.name=fedit"))):
        run(each, tmp_path / name)
        found.append(facts(tmp_path / name))
    assert found[0] == found[1]
    assert all(found[0][name] != found[2][name] for name in found[0] if name.startswith("clients/"))


def test_epsilon_of_each_client_is_its_own(tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]) -> None:
    played = play(tiny_recipe(*PRIVATE, "train.local_epochs=2"))
    sizes = {client: len(split.train) for client, split in played.setup.data.splits.items()}
    for done, line in enumerate(played.lines[1:], start=1):
        told = line["privacy"]
        assert (told["unit"], told["delta"]) == ("example", 1e-5)
        for client, n in sizes.items():
            steps = done * 2 * math.ceil(n / 8)
            expected = epsilon_spent([(event(0.8, min(1.0, 8 / n)), steps)], 1e-5, "pld")
            assert told["clients"][client] == pytest.approx(expected)
        assert told["epsilon"] == max(told["clients"].values())


def test_who_did_not_train_spent_nothing(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(*PRIVATE)
    method = prepare(recipe).method
    found = example.spent(recipe, method, {"a": 40, "b": 40, "c": 40}, {"a": 2, "b": 1})
    assert found["a"] > found["b"] > found["c"] == 0


@pytest.mark.parametrize("name", ["fedit", "ditto"])
def test_noise_is_found_that_spends_the_budget_over_all_rounds(tiny_recipe: Callable[..., Recipe], name: str) -> None:
    recipe = tiny_recipe(f"method.name={name}", "privacy.unit=example", "privacy.epsilon=3.0", "train.rounds=4")
    method = prepare(recipe).method
    sizes = {"large": 60, "small": 20, "tiny": 5}
    spent = example.spent(recipe, method, sizes, 4)
    assert all(2.95 <= epsilon <= 3.0 for epsilon in spent.values())
    assert all(epsilon < 2.9 for epsilon in example.spent(recipe, method, sizes, 3).values())
    assert example.rounds_within(recipe, method, sizes) == 4
    # What is a larger share of a client's examples, or happens twice, wants more noise.
    noises = [example.noise(recipe, method, n) for n in (60, 20, 5)]
    assert noises == sorted(noises)
    plain = tiny_recipe("method.name=fedit", "privacy.unit=example", "privacy.epsilon=3.0", "train.rounds=4")
    twice = example.noise(plain, prepare(plain).method, 60) < example.noise(recipe, method, 60)
    assert twice == (name == "ditto")


def test_a_private_sketch_is_paid_out_of_the_same_budget(tiny_recipe: Callable[..., Recipe]) -> None:
    options = ("method.name=folklora", "method.head_start=sketched", "privacy.unit=example", "privacy.epsilon=3.0")
    recipe = tiny_recipe(*options, "method.dp_epsilon=1.0", "method.dp_delta=1e-6")
    method = prepare(recipe).method
    alone = example.spent(recipe, method, {"a": 60}, 0)["a"]
    assert 0.5 < alone < 1.0  # at delta = 1e-5
    assert 2.95 <= example.spent(recipe, method, {"a": 60}, 2)["a"] <= 3.0
    costly = tiny_recipe(*options, "method.dp_epsilon=6.0")
    with pytest.raises(RecipeError, match="what else is released spends"):
        example.noise(costly, prepare(costly).method, 60)


def test_what_a_private_sketch_costs_is_told_before_the_first_round(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, folklora: Callable[..., Any]
) -> None:
    options = ("method.name=folklora", "method.head_start=sketched", "method.dp_epsilon=1.0", "method.dp_delta=1e-5")
    recipe = tiny_recipe(*PRIVATE[:3], *options, "train.rounds=1")
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    ran = folklora("run", path, "--out", tmp_path / "run")
    assert ran.code == 0
    first, last = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["round"] == 0
    assert first["privacy"]["epsilon"] == pytest.approx(1.0, rel=1e-2)
    assert set(first["privacy"]["clients"]) == set("0123")
    assert last["privacy"]["epsilon"] > first["privacy"]["epsilon"]
    (told,) = (line for line in ran.err.splitlines() if "round   0" in line)
    assert "epsilon 1 (delta 1e-05)" in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["row"]["epsilon"] == last["privacy"]["epsilon"]


def test_rounds_that_a_budget_affords(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(*PRIVATE, "privacy.epsilon=8.0", "train.rounds=50")
    method, sizes = prepare(recipe).method, {"a": 60, "b": 20}
    rounds = example.rounds_within(recipe, method, sizes)
    assert 0 < rounds < 50
    after = [max(example.spent(recipe, method, sizes, count).values()) for count in (rounds, rounds + 1)]
    assert after[0] <= 8.0 < after[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("method.name=celora",), r'similarity = "both".*allowed: similarity = "model"'),
        (("method.name=folklora",), r'head_start = "auto".*allowed: head = "private" with head_start = "zero"'),
        (("method.name=folklora", "method.dp_epsilon=1.0"), r'head_start = "auto"'),
        (("method.name=fedit", "method.head_start=sketched"), r'head_start = "sketched".*head_start = "zero"'),
        (("method.name=sketch",), r'head_start = "sketched"'),
        (("method.name=fedsb",), r"bases of weight gradients.*loraxs"),
        (("method.name=ravan", "adapter.rank=8", "method.budget=2"), r'score = "gradient".*allowed: score ='),
        (("method.name=fedit", "train.clip=0.5"), r'train\.clip = 0\.5.*allowed: "none"'),
    ],
)
def test_what_would_not_be_private_is_refused(
    tiny_recipe: Callable[..., Recipe], options: tuple[str, ...], words: str
) -> None:
    recipe = tiny_recipe("privacy.unit=example", "privacy.noise=1.0", *options)
    with pytest.raises(RecipeError, match=words) as refused:
        prepare(recipe)
    assert "\n" not in str(refused.value)
    prepare(tiny_recipe(*options))


def test_a_loss_that_compares_examples_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    captions = ("model.task=image-text", "data.image=picture", "data.caption=text", "method.name=fedit")
    method = prepare(tiny_recipe("method.name=fedit")).method
    with pytest.raises(RecipeError, match=r"data\.caption: the loss compares .*allowed: pictures with labels"):
        example.refuse(tiny_recipe("privacy.unit=example", "privacy.noise=1.0", *captions), method)
    example.refuse(tiny_recipe(*captions), method)


@pytest.mark.parametrize(
    "options",
    [
        ("method.name=celora", "method.similarity=model"),
        ("method.name=celora", "method.dp_epsilon=1.0", "method.components=0"),
        ("method.name=folklora", "method.head=private", "method.head_start=zero"),
        ("method.name=folklora", "method.head_start=sketched", "method.dp_epsilon=1.0"),
        ("method.name=fedit", "train.clip=none"),
        ("method.name=fedit", "method.scaffold=true", "train.optimizer=sgd"),
        ("method.name=ravan", "adapter.rank=8"),
    ],
)
def test_what_is_private_is_not(tiny_recipe: Callable[..., Recipe], options: tuple[str, ...]) -> None:
    prepare(tiny_recipe("privacy.unit=example", "privacy.noise=1.0", *options))


@pytest.mark.parametrize("secret", [None, 5])
def test_another_start_has_other_noise_where_the_secret_is_one(
    tiny_recipe: Callable[..., Recipe], secret: int | None
) -> None:
    """A server may say two things in one round; in a simulation a last bit must not change everything."""
    setup = prepare(tiny_recipe(*PRIVATE))

    def seed(round: int = 1, nudge: float = 0.0, steps: float = 3.0) -> int:
        member = Member(setup, "0", secret)
        member.client.tensors["head/bias"] += nudge
        member.moments = {"": {"steps/head/bias": torch.tensor(steps, dtype=torch.float64)}}
        (job,) = member.jobs(round)
        assert job.private is not None
        return job.private.seed

    assert seed() == seed() != seed(round=2)
    assert (seed() != seed(nudge=1e-7)) == (seed() != seed(steps=4.0)) == (secret is not None)


def test_secrets_stay_where_they_are(tiny_recipe: Callable[..., Recipe], play: Callable[..., Any]) -> None:
    """Neither a run's files nor its lines hold the seed of any noise."""
    played = play(tiny_recipe(*PRIVATE))
    seeds = [str(job.private.seed) for member in played.engine.members.values() for job in member.jobs(1)]
    assert len(set(seeds)) == 4
    text = json.dumps(played.directory.metrics()) + "".join(
        file.read_bytes().decode("latin-1") for file in played.directory.path.rglob("*") if file.is_file()
    )
    assert not any(seed in text for seed in seeds)
