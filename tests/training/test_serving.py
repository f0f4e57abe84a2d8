"""A pool of clients' models against each client asked alone: stacked and merged, in both precisions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from folklora.training.prediction import Question, predict
from folklora.training.serving import Model, Pool

RANKS = {"north": 3, "south": 5, "west": 1, "east": 4}
LOGITS = {"rtol": 1e-4, "atol": 2e-5}


def models(place: Any) -> dict[str, Model]:
    return {client: Model(rank, place.tensors(rank, k)) for k, (client, rank) in enumerate(RANKS.items())}


def requests(place: Any, count: int = 40, seed: int = 0) -> list[tuple[str, list[int]]]:
    """Of all clients in no order."""
    owners = np.random.default_rng(seed).choice(list(RANKS), count)
    return list(zip(map(str, owners), place.examples(count, seed)[0], strict=True))


def alone(place: Any, client: str, example: Any) -> np.ndarray:
    model = models(place)[client]
    return predict(place.task, place.adapter, [Question("x", model.rank, model.tensors, [example])])["x"][0]


@pytest.mark.parametrize("tokens", [1, 60, 4096])
@pytest.mark.parametrize(("architecture", "core"), [("bert", True), ("roberta", False), ("gpt2", True)])
def test_a_mixed_list_is_answered_in_its_order_as_each_client_alone(
    world: Callable[..., Any], architecture: str, core: bool, tokens: int
) -> None:
    place = world(architecture, core=core, norm=True)
    asked = requests(place)
    found = Pool(place.task, place.adapter, models(place)).answers(asked, tokens=tokens)
    assert found.dtype == np.float32
    for (client, example), answer in zip(asked, found, strict=True):
        np.testing.assert_allclose(answer, alone(place, client, example), **LOGITS)


def test_one_by_one_is_all_at_once(world: Callable[..., Any]) -> None:
    place = world("bert", core=True)
    pool, asked = Pool(place.task, place.adapter, models(place)), requests(place)
    one_by_one = np.concatenate([pool.answers([each]) for each in asked])
    np.testing.assert_allclose(one_by_one, pool.answers(asked), **LOGITS)
    np.testing.assert_allclose(one_by_one[::-1], pool.answers(asked[::-1]), **LOGITS)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])  # whose Conv1D keeps its weights the other way round
@pytest.mark.parametrize("base", [False, True])
def test_a_single_client_is_merged_and_answers_the_same(
    world: Callable[..., Any], architecture: str, base: bool
) -> None:
    place = world(architecture, core=True, norm=True)
    model = models(place)["south"]
    if base:
        for i, site in enumerate(place.adapter.sites):
            draw = torch.randn(site.d_out, site.d_in, generator=torch.Generator().manual_seed(i))
            model.tensors[f"base/{site.name}"] = 0.1 * draw
    asked = [("south", example) for example in place.examples(12, 1)[0]]
    known = {**models(place), "south": model} if not base else {"south": model}
    merged = Pool(place.task, place.adapter, known)
    stacked = Pool(place.task, place.adapter, known, most=0)
    assert (merged.merges, stacked.merges) == (True, False)
    wanted = predict(place.task, place.adapter, [Question("x", model.rank, model.tensors, [e for _, e in asked])])["x"]
    for pool in (merged, stacked):
        np.testing.assert_allclose(pool.answers(asked), wanted, **LOGITS)
    (stacks, _), (bare_stacks, _) = (pool([Question("south", 5, model.tensors, [])]) for pool in (stacked, merged))
    assert {name.partition("/")[0] for name in stacks.keys() - bare_stacks.keys()} == {
        "A",
        "B",
        *(["base"] if base else []),
    }
    bare = predict(place.task, place.adapter, [Question("x", 1, {**place.tensors(1, 0, "fresh")}, [asked[0][1]])])
    assert not np.allclose(bare["x"][0], wanted[0], atol=1e-2)


def test_a_pool_leaves_the_backbone_as_it_was(world: Callable[..., Any]) -> None:
    place = world("bert", core=True)
    model, examples = models(place)["east"], place.examples(5, 2)[0]
    question = Question("east", model.rank, model.tensors, examples)
    before = predict(place.task, place.adapter, [question])["east"]
    Pool(place.task, place.adapter, {"east": model}).answers([("east", each) for each in examples])
    np.testing.assert_array_equal(predict(place.task, place.adapter, [question])["east"], before)


@pytest.mark.parametrize("single", [False, True])
def test_bfloat16_is_rounded_and_no_more(world: Callable[..., Any], single: bool) -> None:
    """What is computed in bfloat16 is not float32's, and is near it."""
    place = world("bert", core=True)
    known = {"west": models(place)["west"]} if single else models(place)
    asked = [(next(iter(known)) if single else client, example) for client, example in requests(place)]
    exact = Pool(place.task, place.adapter, known).answers(asked)
    rounded = Pool(place.task, place.adapter, known, dtype=torch.bfloat16).answers(asked)
    assert rounded.dtype == np.float32
    gap = np.abs(rounded - exact)
    assert 0 < gap.max() < 0.05 * np.abs(exact).max()
    print("labels that agree in bfloat16:", (rounded.argmax(1) == exact.argmax(1)).mean())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_client_that_is_not_finite_harms_nobody(world: Callable[..., Any], architecture: str) -> None:
    place = world(architecture, core=True)
    pool, asked = Pool(place.task, place.adapter, models(place)), requests(place)
    wanted = pool.answers(asked)
    broken = models(place)
    for name, tensor in broken["south"].tensors.items():
        if name.startswith("A/"):
            tensor.fill_(float("inf"))
    found = Pool(place.task, place.adapter, broken).answers(asked)
    theirs = np.array([client == "south" for client, _ in asked])
    assert not np.isfinite(found[theirs]).any()
    np.testing.assert_allclose(found[~theirs], wanted[~theirs], **LOGITS)


def test_a_hundred_clients_of_mixed_ranks(world: Callable[..., Any]) -> None:
    place = world("bert", core=True)
    known = {f"c{k}": Model(1 + k % 6, place.tensors(1 + k % 6, k)) for k in range(100)}
    pool = Pool(place.task, place.adapter, known)
    examples = place.examples(120, 3)[0]
    asked = [(f"c{37 * i % 100}", example) for i, example in enumerate(examples)]
    found = pool.answers(asked)
    for i in (0, 7, 63, 119):
        model = known[asked[i][0]]
        own = predict(place.task, place.adapter, [Question("x", model.rank, model.tensors, [examples[i]])])["x"][0]
        np.testing.assert_allclose(found[i], own, **LOGITS)
    np.testing.assert_allclose(pool.answers(asked[20:23]), found[20:23], **LOGITS)


def test_nothing_is_asked(world: Callable[..., Any]) -> None:
    place = world("bert")
    assert Pool(place.task, place.adapter, models(place)).answers([]).shape == (0, 3)


def test_padded_rows_are_of_like_length(world: Callable[..., Any]) -> None:
    """GPT-2's classifier is packed by nobody: passes hold long with long, and no more than they may with padding."""
    place = world("gpt2")
    pool, asked = Pool(place.task, place.adapter, models(place)), requests(place)
    assert not place.task.backbone.packable
    parts = list(pool._parts(asked, 48))
    assert sorted(i for part in parts for i in part) == list(range(len(asked)))
    lengths = [[len(asked[i][1]) for i in part] for part in parts]
    assert all(len(part) * max(part) <= 48 for part in lengths)
    assert all(min(one) >= max(two) for one, two in pairwise(lengths))
