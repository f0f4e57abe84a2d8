from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from folklora.errors import AttackError
from folklora.federation.rounds import Silent
from folklora.privacy.attacks import lira
from folklora.privacy.attacks.membership import assumed, confidences
from folklora.privacy.attacks.observation import Knowledge
from folklora.privacy.attacks.roc import curve
from folklora.privacy.attacks.run import Plan, attack
from folklora.privacy.attacks.shadows import shadows, victim, windows
from folklora.privacy.attacks.warm import play

# -- the curve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_a_curve_is_what_counting_gives(ties: bool) -> None:
    rng = np.random.default_rng(0)
    members = rng.random(2500) < 0.5
    scores = rng.normal(members * 0.7)
    scores = scores.round(1) if ties else scores
    found = curve(scores, members)
    pairs = stats.mannwhitneyu(scores[members], scores[~members]).statistic
    assert found.auc == pytest.approx(pairs / (members.sum() * (~members).sum()))
    for rate in (0.01, 0.001):
        accused = [t for t in np.unique(scores) if (scores[~members] >= t).mean() <= rate]
        expected = max((scores[members] >= t).mean() for t in accused) if accused else 0.0
        assert found.tpr_at(rate) == pytest.approx(expected)
    best = max(((scores[members] >= t).mean() + (scores[~members] < t).mean()) / 2 for t in np.unique(scores))
    assert found.balanced_accuracy == pytest.approx(max(best, 0.5))


def test_what_too_few_others_cannot_tell_is_not_told() -> None:
    members = np.arange(1100) < 101
    found = curve(np.arange(1100.0), members)
    assert found.negatives == 999
    assert math.isnan(found.tpr_at(1e-3))
    assert found.tpr_at(1e-2) == 0
    with pytest.raises(ValueError, match="0 of 3"):
        curve(np.zeros(3), np.zeros(3, dtype=bool))


# -- likelihoods -----------------------------------------------------------------------------------------------------


def drawn(count: int, examples: int, apart: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Confidences with a mean of each example's own, ``apart`` higher where the model saw it."""
    rng = np.random.default_rng(1)
    base = rng.normal(0, 3, examples)
    seen = rng.random((count, examples)) < 0.5
    members = rng.random(examples) < 0.5
    return rng.normal(base + apart * members), rng.normal(base + apart * seen), seen, members


@pytest.mark.parametrize("count", [16, 256])
def test_lira_comes_near_the_best_test_there_is(count: int) -> None:
    target, shadow, seen, members = drawn(count, 4000, 1.5)
    best = stats.norm.cdf(1.5 / math.sqrt(2))  # AUC of two normal distributions so far apart, means known
    online = curve(lira.online(target, shadow, seen), members).auc
    offline = curve(lira.offline(target, shadow, seen), members).auc
    alone = curve(target, members).auc
    assert alone < 0.7 < best - 0.08 < online <= best + 0.02
    assert alone < offline <= best + 0.02


def test_online_scores_are_log_likelihood_ratios() -> None:
    target, shadow, seen, _ = drawn(128, 5, 1.0)
    found = lira.online(target, shadow, seen)
    for i in range(5):
        yes, no = shadow[seen[:, i], i], shadow[~seen[:, i], i]
        expected = stats.norm.logpdf(target[i], yes.mean(), yes.std(ddof=1)) - stats.norm.logpdf(
            target[i], no.mean(), no.std(ddof=1)
        )
        assert found[i] == pytest.approx(expected)
        z = (target[i] - no.mean()) / no.std(ddof=1)
        assert lira.offline(target, shadow, seen)[i] == pytest.approx(z)


def test_an_example_that_all_or_none_saw_still_has_a_score() -> None:
    target, shadow, seen, _ = drawn(8, 50, 1.0)
    seen[:, 0], seen[:, 1] = True, False
    assert np.isfinite(lira.online(target, shadow, seen)).all()
    assert np.isfinite(lira.offline(target, shadow, seen)).all()


@pytest.mark.parametrize(("size", "count"), [(10, 8), (13, 9), (20, 4), (3, 40)])
def test_every_row_is_in_about_as_many_windows(size: int, count: int) -> None:
    pool = np.arange(100, 120)
    chosen = windows(pool, size, count, np.random.default_rng(0))
    assert len(chosen) == count
    assert all(len(np.unique(each)) == size and np.isin(each, pool).all() for each in chosen)
    often = np.bincount(np.concatenate(chosen), minlength=120)[100:]
    assert often.max() - often.min() <= 2 + count * size // (2 * len(pool))
    if size < len(pool):
        assert not np.array_equal(chosen[0], chosen[1])


# -- shadows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedit", "fedsa", "celora", "folklora"])
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_shadow_of_the_same_examples_sends_what_the_victim_sent(
    method: str, rounds: int, tiny_recipe: Callable[..., Any]
) -> None:
    # All examples in one batch: then nothing depends on their order, which is each one's own.
    steps = ("train.batch_size=1000", "train.rounds=3", "train.optimizer=sgd", "train.lr=2.0", "train.clip=none")
    warm = play(tiny_recipe(f"method.name={method}", *steps), rounds, Silent())
    target = victim(warm, "1")
    other = warm.setup.data.splits["2"].train
    twin, stranger = shadows(warm, "1", [target.rows, other], seed=5)
    assert set(twin.sent) == set(target.sent)
    for name, tensor in target.sent.items():
        torch.testing.assert_close(twin.sent[name], tensor, rtol=1e-4, atol=1e-6)
        if float((target.before[name] - tensor).abs().max()) > 1e-4:  # A hardly moves while B is nearly zero
            near, far = (float((each.sent[name] - tensor).abs().max()) for each in (twin, stranger))
            assert far > 10 * near
    for name, tensor in target.before.items():
        torch.testing.assert_close(twin.before[name], tensor, rtol=1e-4, atol=1e-6)


def test_private_tensors_are_the_shadows_mean(tiny_recipe: Callable[..., Any]) -> None:
    warm = play(tiny_recipe("method.name=fedsa"), 0, Silent())
    target = victim(warm, "0")
    cast = shadows(warm, "0", [target.rows[:10], target.rows[10:20]], seed=0)
    models = assumed([target, *cast])
    head = torch.stack([each.model["head/weight"] for each in cast]).mean(0)
    site = next(name for name in target.sent if name.startswith("A/"))
    for model, each in zip(models, [target, *cast], strict=True):
        torch.testing.assert_close(model["head/weight"], head)
        torch.testing.assert_close(model[site], each.sent[site])


def test_confidences_are_the_log_odds_of_the_true_label(tiny_recipe: Callable[..., Any]) -> None:
    warm = play(tiny_recipe("method.name=fedit"), 0, Silent())
    model = warm.setup.method.initial("0")
    generator = torch.Generator().manual_seed(0)
    model["head/weight"] = torch.randn(model["head/weight"].shape, generator=generator)
    rows = np.arange(6)
    features = warm.setup.frozen_features()[:6]
    p = (features @ model["head/weight"].T).softmax(1)[
        torch.arange(6), torch.from_numpy(warm.setup.data.table.labels[:6])
    ]
    (found,) = confidences(warm, [model], rows)
    np.testing.assert_allclose(found, torch.logit(p.double()).numpy(), rtol=1e-3, atol=1e-4)


# -- the attack ------------------------------------------------------------------------------------------------------

OVERFITTED = (
    "train.local_epochs=40",
    "train.lr=0.01",
    "data.partition=iid",
    "data.test_fraction=0.45",
    "adapter.rank=8",
)


def membership(recipe: Any, **plan: Any) -> dict[str, Any]:
    return attack(recipe, Plan("membership", **{"victims": 1, "warmup": 0, "budget": 6, **plan}))


def test_members_of_an_overfitted_model_are_found_out_and_a_strangers_are_not(tiny_recipe: Callable[..., Any]) -> None:
    found = membership(tiny_recipe("method.name=fedit", *OVERFITTED))
    for name in ("loss", "lira_online", "lira_offline"):
        metric = found["metrics"][f"auc_{name}"]
        assert metric["mean"] > 0.7, (name, metric)
        assert 0.3 < metric["control"] < 0.7, (name, metric)
    assert not any(name.startswith("tpr_at") for name in found["metrics"])
    assert any("0.1 % false alarms is not measured" in note for note in found["notes"])
    assert found["sent"]
    assert found["bytes"]


def test_nothing_is_known_of_who_was_in_where_nothing_travels(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=local", *OVERFITTED)
    found = membership(recipe)["metrics"]
    assert found["auc_loss"]["gain"] < 0.25
    own = membership(recipe, knowledge=Knowledge(bases=True))["metrics"]  # but it is in the models themselves
    assert own["auc_loss"]["mean"] > 0.7
    assert own["auc_lira_online"]["mean"] > 0.7


def test_few_shadows_are_refused(tiny_recipe: Callable[..., Any]) -> None:
    with pytest.raises(AttackError, match="at least 4"):
        membership(tiny_recipe("method.name=fedit"), budget=3)
