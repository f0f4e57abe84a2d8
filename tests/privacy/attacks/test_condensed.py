"""What condensed data gives away: a class of one example is its example, and whoever sent something else is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.federation.run import run
from folklora.federation.rundir import RunDirectory
from folklora.privacy.attacks.condensed import nearest_tokens
from folklora.privacy.attacks.label_distribution import from_sketch
from folklora.privacy.attacks.replica import Replica
from folklora.privacy.attacks.run import Plan, attack

BRIEF = ("method.name=feddm", "data.limit=100", "method.steps=150", "method.server_steps=3", "method.ipc=1")


def test_condensed_means_give_the_examples_of_a_small_class_away(tiny_recipe: Callable[..., Any]) -> None:
    document = attack(tiny_recipe(*BRIEF, "data.alpha=0.3"), Plan("condensed", victims=3, warmup=0))
    metrics = document["metrics"]
    assert document["sent"]["condensed/inputs"][1] == 32
    assert document["bytes"] > 0
    assert metrics["hit"]["mean"] > metrics["hit"]["control"]
    assert metrics["summed_precision"]["mean"] > metrics["summed_precision"]["control"]
    assert document["victims"][0]["recovered"]
    assert not document["notes"]


def test_more_noise_says_less(tiny_recipe: Callable[..., Any]) -> None:
    """Without a step of condensing what is sent is noise, and says nothing of single examples."""
    recipes = (tiny_recipe(*BRIEF, f"method.steps={steps}", "method.rate=0.3") for steps in (1, 300))
    noise, condensed = (attack(recipe, Plan("condensed", victims=3, warmup=1)) for recipe in recipes)
    quantiles = [document["metrics"]["rank_quantile"]["mean"] for document in (condensed, noise)]
    assert quantiles[0] < quantiles[1]


def test_embeddings_are_read_as_their_nearest_tokens(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe(*BRIEF, "method.space=embeddings", "method.length=5", "method.steps=3", "data.limit=80")
    document = attack(recipe, Plan("condensed", victims=1, warmup=1))
    assert document["sent"]["condensed/inputs"][1:] == [5, 32]
    assert 0 < document["metrics"]["token_cosine"]["mean"] <= 1
    assert {"token_recall", "rouge_l", "hit"} <= set(document["metrics"])


def test_real_tokens_are_their_own_nearest(tiny_recipe: Callable[..., Any]) -> None:
    from folklora.federation.setup import prepare

    setup = prepare(tiny_recipe("data.limit=80"))
    replica = Replica(setup.task, setup.method.adapter, "text")
    tokens = torch.randint(4, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    texts, cosine = nearest_tokens(replica, replica.vectors[tokens])
    assert texts.tokens == tokens.tolist()
    assert cosine == pytest.approx(1, abs=1e-5)


def test_who_sends_nothing_that_is_read_is_named(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(*BRIEF, "method.steps=2", "faults.corrupt=0.4")
    run(recipe, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    silent = list(directory.metrics()[0]["failed"])
    assert silent
    document = attack(directory.path, Plan("condensed", victims=4, warmup=0))
    for client in silent:
        assert f"client {client}: it, or the control, sent nothing that is read" in document["notes"]


def test_who_condenses_nothing_is_told(tiny_recipe: Callable[..., Any]) -> None:
    document = attack(tiny_recipe("method.name=fedit", "data.limit=80"), Plan("condensed", victims=1, warmup=0))
    assert document["notes"] == ["method 'fedit' sends no condensed data"]


def test_gradient_attacks_have_nothing_to_match(tiny_recipe: Callable[..., Any]) -> None:
    from folklora.errors import AttackError

    with pytest.raises(AttackError, match="no gradient stands behind it; allowed: --attack"):
        attack(tiny_recipe(*BRIEF, "method.steps=2"), Plan("dlg", victims=1, warmup=0))


def test_counts_are_the_distribution_of_labels() -> None:
    found = from_sketch({"counts/train": torch.tensor([3, 0, 1], dtype=torch.int32)}, 3)
    np.testing.assert_allclose(found, [0.75, 0.0, 0.25])
