from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from folklora.data.mixtures import ClassMixtures
from folklora.data.statistics import ClassStatistics
from folklora.privacy.attacks.mixture import Means, identified, inverted, means_of, nearest_of, summands
from folklora.privacy.attacks.run import Plan, attack


def features(count: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_summands_are_those_of_an_exhaustive_search(count: int) -> None:
    x = features(14)
    for chosen in ([0, 3, 7, 9][:count], [13, 12, 2, 5][:count]):
        total = x[chosen].sum(0) + 0.01 * features(1, seed=9)[0]
        best = min(itertools.combinations(range(14), count), key=lambda c: float((x[list(c)].sum(0) - total).norm()))
        assert sorted(summands(x, total, count).tolist()) == sorted(best)


def test_means_are_read_from_statistics_and_mixtures() -> None:
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 3])
    x = features(7)
    told = means_of({f"statistics/{k}": v for k, v in ClassStatistics.of(x, labels, 4).to_tensors().items()})
    assert told.classes.tolist() == [0, 2, 3]
    assert told.counts.tolist() == [4, 2, 1]
    torch.testing.assert_close(told.means[2], x[6])
    fitted = means_of({f"mixture/{k}": v for k, v in ClassMixtures.fit(x, labels).to_tensors().items()})
    assert set(fitted.classes.tolist()) == {0, 2}  # a class of one has no mixture
    assert fitted.counts.sum() == pytest.approx(6)
    torch.testing.assert_close(fitted.means[fitted.classes == 2].sum(0), x[4:6].mean(0), rtol=1e-3, atol=1e-3)
    assert len(means_of({})) == 0


def test_the_mean_of_one_example_identifies_it() -> None:
    x = features(40)
    means = Means(np.array([0, 1]), torch.stack([x[2], x[:8].mean(0)]), np.array([1.0, 8.0]))
    found = identified(means, x, 8)
    assert found["single_hit"] == 1
    nearest, cosine = nearest_of(means.means, x)
    assert int(nearest[0]) == 2
    assert float(cosine[0]) == pytest.approx(1)
    stranger = identified(Means(np.array([0]), x[30:31], np.array([1.0])), x, 8)
    assert stranger["hit"] == 0
    assert stranger["rank_quantile"] > 0


def mixture(recipe: Any) -> dict[str, Any]:
    return attack(recipe, Plan("mixture", victims=3, warmup=0))


@pytest.mark.parametrize("method", ["celora", "folklora"])
def test_a_clients_examples_are_read_off_its_sketch(method: str, tiny_recipe: Callable[..., Any]) -> None:
    document = mixture(tiny_recipe(f"method.name={method}", "data.clients=12"))
    found = document["metrics"]
    assert found["hit"]["mean"] > 0.5
    assert found["hit"]["gain"] > 0.3
    assert found["summed_precision"]["mean"] > 0.5
    assert found["summed_precision"]["gain"] > 0.4
    assert document["victims"][0]["recovered"]
    assert document["sent"]


def test_a_private_release_says_little(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=folklora", "data.clients=12", "method.dp_epsilon=2.0", "method.dp_clip=5.0")
    document = mixture(recipe)
    found = document["metrics"]
    assert "hit" not in found or found["hit"]["gain"] < 0.3
    assert document["notes"] or "hit" in found


def test_a_method_without_a_sketch_says_nothing(tiny_recipe: Callable[..., Any]) -> None:
    document = mixture(tiny_recipe("method.name=fedit"))
    assert document["metrics"] == {}
    assert document["notes"]


def test_pixels_come_to_have_the_features_that_are_wanted(
    seeing_model: Callable[[str], Path], tiny_recipe: Callable[..., Any]
) -> None:
    from folklora.adapters.lowrank import LowRank
    from folklora.backbones.tasks import build_task
    from folklora.privacy.attacks.replica import Replica
    from folklora.sections import AdapterSection, ModelSection

    task = build_task(
        ModelSection(name=str(seeing_model("vit")), dtype="float32"), AdapterSection(), "image", ("a", "b")
    )
    replica = Replica(task, LowRank(task.backbone.sites, False, 16.0), "image")
    size = tuple(replica.backbone.pictures.size)
    secret = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    wanted = replica.features(secret)
    start = F.cosine_similarity(replica.features(torch.full_like(secret, 0.5)), wanted)
    found = inverted(replica, wanted, size, 150)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    own = F.cosine_similarity(replica.features(found), wanted)
    assert bool((own > start).all())
    assert float(own.min()) > 0.95
    assert bool((own > F.cosine_similarity(replica.features(found), wanted.flip(0))).all())


def test_pictures_are_inverted_and_shown(picture_recipe: Callable[..., Any], tmp_path: Path) -> None:
    document = attack(
        picture_recipe("vit", "method.name=celora"), Plan("mixture", victims=1, warmup=0, budget=2), tmp_path
    )
    (shown,) = document["victims"]
    assert len(shown["original"]) == len(shown["recovered"]) == len(shown["control"]) > 0
    assert all(uri.startswith("data:image/png") for uri in shown["recovered"])
    assert document["metrics"]["hit"]["mean"] > 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
