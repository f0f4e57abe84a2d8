"""Who has what before and after the change: rows keep their part, nothing is in two hands, the seed says all."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from folklora.data.drift import drifted
from folklora.data.partition import partition
from folklora.data.partition_file import from_json, to_json
from folklora.data.split import Split
from folklora.data.table import ONE_CLASS, Table
from folklora.errors import DataError
from folklora.recipe import Recipe
from folklora.sections import DataSection, DriftSection

PARTS = ("train", "validation", "test")


def table(count: int = 600, classes: int = 6) -> Table:
    rng = np.random.default_rng(1)
    names = tuple(f"c{i}" for i in range(classes))
    return Table([f"text {i}" for i in range(count)], rng.integers(classes, size=count), names, None)


def shared(
    kind: str, share: float = 0.5, seed: int = 0, data: Table | None = None, **section: Any
) -> tuple[dict[str, Split], dict[str, Split]]:
    """First and later."""
    known = data or table()
    own = DataSection.model_validate({"clients": 8, "partition": "dirichlet", "alpha": 0.5, **section})
    return drifted(
        known, partition(known, own, seed), own, DriftSection.model_validate({"kind": kind, "share": share}), seed
    )


def rows(*splits: Split, parts: tuple[str, ...] = PARTS) -> list[int]:
    return [row for own in splits for part in parts for row in getattr(own, part).tolist()]


def classes_of(data: Table, own: Split) -> set[int]:
    return set(data.labels[rows(own)].tolist())


@pytest.mark.parametrize("kind", ["labels", "classes"])
@pytest.mark.parametrize("scheme", [{}, {"alpha": 0.2}, {"partition": "pathological"}, {"partition": "shards"}])
def test_a_row_is_in_one_place_at_a_time_and_keeps_its_part(kind: str, scheme: dict[str, Any]) -> None:
    data = table(classes=4)
    if scheme.get("partition") == "pathological":
        scheme = {**scheme, "classes_per_client": 3}
    first, later = shared(kind, data=data, **scheme)
    assert len(later) == 4
    for now in (first, {**first, **later}):
        held = rows(*now.values())
        assert len(held) == len(set(held))
        assert all(len(getattr(own, part)) for own in now.values() for part in PARTS)
        assert all(np.array_equal(getattr(o, p), np.sort(getattr(o, p))) for o in now.values() for p in PARTS)
    # Over the whole run, and over all clients.
    ever = {part: {*rows(*first.values(), *later.values(), parts=(part,))} for part in PARTS}
    assert all(not ever[one] & ever[other] for one, other in combinations(PARTS, 2))


def test_labels_are_shared_out_anew_among_those_who_drift() -> None:
    data = table()
    before = partition(data, DataSection(clients=8, alpha=0.5), 0)
    first, later = shared("labels", data=data)
    assert first.keys() == before.keys()
    assert all(rows(first[client]) == rows(before[client]) for client in before)
    assert sorted(rows(*later.values())) == sorted(rows(*(first[client] for client in later)))
    shifts = []
    for client, own in later.items():
        one, other = (np.bincount(data.labels[rows(s)], minlength=6) for s in (first[client], own))
        shifts.append(np.abs(one / one.sum() - other / other.sum()).sum() / 2)
    assert np.mean(shifts) > 0.2  # total variation; that of two draws at alpha = 0.5 of six classes is about a half


def test_new_classes_join_those_that_a_client_has() -> None:
    data = table()
    before = partition(data, DataSection(clients=8, alpha=0.5), 0)
    first, later = shared("classes", data=data)
    for client, own in later.items():
        had, has = classes_of(data, first[client]), classes_of(data, own)
        assert had < has
        for part in PARTS:
            assert set(getattr(first[client], part)) < set(getattr(own, part)) or part == "validation"
        assert sorted(rows(own)) == sorted(rows(before[client]))
        assert 2 * (len(own) - len(first[client])) <= len(own)
        joined = set(rows(own)) - set(rows(first[client]))
        assert {int(data.labels[row]) for row in joined} == has - had  # a class joins whole
    for client in before.keys() - later.keys():
        assert rows(first[client]) == rows(before[client])


def test_the_seed_says_who_drifts_and_to_what() -> None:
    def told(seed: int) -> Any:
        return {client: rows(own) for client, own in shared("labels", seed=seed)[1].items()}

    assert told(3) == told(3)
    assert told(3) != told(4)
    assert len(shared("labels", share=1.0)[1]) == 8
    assert len(shared("classes", share=0.01)[1]) == 1
    assert shared("none")[1] == {}


def test_whoever_got_nothing_of_a_part_is_given_one() -> None:
    """Four examples a client, one of them to validate on: shared out anew, many would have none of a part."""
    data = table(count=60, classes=2)
    whole = {"partition": "shards", "shards_per_client": 1, "clients": 15, "min_examples": 3}
    for seed in range(5):
        _, later = shared("labels", 1.0, seed, data, **whole)
        assert all(len(getattr(own, part)) for own in later.values() for part in PARTS)


def test_who_cannot_drift_is_refused() -> None:
    with pytest.raises(DataError, match=r"drift.share = 0.1 of 8 clients is one"):
        shared("labels", share=0.1)
    with pytest.raises(DataError, match=r"8 clients are to begin without some of their classes, and 0 have enough"):
        shared("classes", share=1.0, partition="pathological", classes_per_client=1)
    plain = replace(table(), labels=np.zeros(600, dtype=np.int64), classes=ONE_CLASS)
    with pytest.raises(DataError, match="the examples have no labels"):
        shared("classes", data=plain, partition="iid")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.partition=iid"], 'drift.kind = "labels" with data.partition = "iid"'),
        (["train.patience=3"], "with train.patience"),
        (["privacy.unit=example", "privacy.noise=1.0"], 'with privacy.unit = "example"'),
        (["poison.kind=sign", "poison.share=0.5"], 'with poison.kind = "sign"'),
        (["engine.kind=flower"], "drift.share = 1.0 with engine.kind"),
        (["drift.round=1"], "drift.round"),
    ],
)
def test_recipes_that_cannot_be_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)) as caught:
        Recipe.parse({}, ["drift.kind=labels", *overrides])
    assert "\n" not in str(caught.value)


def test_the_file_says_both() -> None:
    data = table()
    first, later = shared("classes", data=data)
    text = to_json(data, first, later)
    _, _, clients, after = from_json(text, examples=len(data))
    assert {client: rows(own) for client, own in clients.items()} == {c: rows(own) for c, own in first.items()}
    assert {client: rows(own) for client, own in after.items()} == {c: rows(own) for c, own in later.items()}
    assert "later" not in to_json(data, first)
    for wrong in (
        text.replace('"later_clients": {"', '"later_clients": {"9'),
        text.replace('"later_counts": {"', '"later_counts": {"9'),
    ):
        with pytest.raises(DataError, match="later_c"):
            from_json(wrong)
