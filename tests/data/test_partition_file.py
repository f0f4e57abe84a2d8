"""``partition.json``: what is written is read back, and nothing else is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from folklora.data.partition import partition
from folklora.data.partition_file import from_json, to_json
from folklora.data.split import Split
from folklora.data.table import Table, fingerprint
from folklora.errors import DataError
from folklora.sections import DataSection


def shares(clients: dict[str, Split]) -> dict[str, list[int]]:
    return {c: sorted([*of.train.tolist(), *of.validation.tolist(), *of.test.tolist()]) for c, of in clients.items()}


def test_json_round_trip_keeps_clients_and_their_order() -> None:
    texts, groups = [f"text {i}" for i in range(60)], [f"{'zé'[i % 2]}{i % 4}" for i in range(60)]
    table = Table(texts, np.repeat([0, 1], 30), ("a", "b"), groups)
    clients = partition(table, DataSection(partition="natural", by="w"), 0)
    text = to_json(table, clients)
    document = json.loads(text)
    assert set(document) == {"fingerprint", "classes", "clients", "counts"}
    assert document["clients"]["z0"]["test"] == clients["z0"].test.tolist()
    for client, of in clients.items():
        assert document["counts"][client] == [int((table.labels[of.train] == label).sum()) for label in (0, 1)]
    found, classes, back, _ = from_json(text, examples=60)
    assert found == fingerprint(table)
    assert classes == table.classes
    assert list(back) == list(clients)
    assert shares(back) == shares(clients)
    assert all(part.dtype == np.int64 for of in back.values() for part in (of.train, of.validation, of.test))


def document(**changes: object) -> str:
    first = {"train": [0, 1], "validation": [2], "test": [3]}
    second = {"train": [4], "validation": [5], "test": [6]}
    clients = {"0": first, "1": second}
    counts = {"0": [1, 1], "1": [0, 1]}
    return json.dumps({"fingerprint": "0" * 64, "classes": ["x", "y"], "clients": clients, "counts": counts} | changes)


def one_client(**changes: object) -> dict[str, object]:
    return {"clients": {"0": {"train": [0, 1], "validation": [2], "test": [3]} | changes}, "counts": {"0": [2, 0]}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Invalid JSON"),
        ("[1, 2]", "partition.json"),
        ("{}", "fingerprint"),
        (document(fingerprint="short"), "fingerprint"),
        (document(extra=1), "extra"),
        (document(classes=["x"]), "classes: only one"),
        (document(classes=["x", "x"]), "a name occurs twice"),
        (document(clients={}), "clients"),
        (document(**one_client(test=[])), "clients: 0: test"),
        (document(**one_client(test=[-1])), "clients: 0: test: 0"),
        (document(**one_client(test=[2**63])), "clients: 0: test: 0"),
        (document(**one_client(test=[3.5])), "clients: 0: test: 0"),
        (document(**one_client(test=["3"])), "clients: 0: test: 0"),
        (document(**one_client(test=[7])), "example 7 of 7; allowed: 0 to 6"),
        (document(**one_client(test=[3, 3])), "example 3 is also in client '0', test"),
        (document(**one_client(test=[1])), "example 1 is also in client '0', train"),
        (document(clients={c: {"train": [0], "validation": [1], "test": [2]} for c in "ab"}), "also in client 'a'"),
        (document(counts=None), "counts"),
        (document(counts={"0": [1, 1]}), "counts: not those of `clients`"),
        (document(counts={"0": [2, 0], "1": [1]}), "counts: client '1' has 1 numbers; allowed: 2, one a class"),
        (document(counts={"0": [3, -1], "1": [1, 0]}), "counts: 0: 1"),
        (document(counts={"0": [2, 1], "1": [1, 0]}), "counts: client '0' has 3 examples; allowed: 2"),
    ],
)  # fmt: skip
def test_garbage_is_not_a_partition(text: str, problem: str) -> None:
    assert len(from_json(document(), examples=7)[2]) == 2
    with pytest.raises(DataError) as caught:
        from_json(text, examples=7)
    message = str(caught.value)
    assert problem in message
    assert "\n" not in message
    assert "allowed: " in message
