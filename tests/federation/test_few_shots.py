"""Runs of few shots with fitted heads: both engines, a resume, and members that met the run late."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.errors import RecipeError
from folklora.federation.codec import decode, encode
from folklora.federation.local import LocalEngine
from folklora.federation.run import client_model, resume, run
from folklora.federation.setup import prepare
from folklora.methods.contract import Message

FEW = ("train.cohort=1", "train.rounds=2", "data.limit=80", "data.shots=2", "method.head_start=fitted")
VARIANTS = (
    ("method.name=folklora", "method.augment=auto"),
    ("method.name=local", "method.augment=gan"),
    ("method.name=sketch", "method.augment=none"),
)


def said(summary: dict[str, Any]) -> dict[str, Any]:
    row = {k: v for k, v in summary["row"].items() if not k.startswith("seconds") and k != "aggregation_error"}
    return {"row": row, "clients": summary["clients"]}


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_network_run_is_the_local_run(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], tmp_path: Path, options: tuple[str, ...]
) -> None:
    recipe = tiny_recipe(*FEW, *options)
    fed = federated(recipe)
    summary, local = fed.play(), run(recipe, tmp_path / "local")
    for client in fed.members:
        one, other = client_model(fed.folder(client), client), client_model(tmp_path / "local", client)
        for name, tensor in one.tensors.items():
            np.testing.assert_allclose(tensor.numpy(), other.tensors[name].numpy(), rtol=2e-4, atol=2e-4)
    told = said(summary), said(local)
    assert told[0]["row"].keys() == told[1]["row"].keys()
    for name in ("bytes_once_per_client", "bytes_up_per_client_round", "bytes_down_per_client_round"):
        assert told[0]["row"][name] == told[1]["row"][name]
    assert told[0]["clients"].keys() == told[1]["clients"].keys()
    partition = json.loads((tmp_path / "local" / "partition.json").read_text())
    assert all(max(counts) <= 2 for counts in partition["counts"].values())


def test_an_interrupted_run_ends_as_a_whole_one(
    tiny_recipe: Callable[..., Any], tmp_path: Path, facts: Callable[[Path], dict[str, Any]]
) -> None:
    recipe = tiny_recipe(*FEW, *VARIANTS[0], "train.failures=0.4")
    run(recipe, tmp_path / "whole")

    class Interrupted(Exception): ...

    from folklora.federation.rounds import Silent

    class Interrupting(Silent):
        def line(self, metrics: Any) -> None:
            if metrics["round"] == 1:
                raise Interrupted

    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "cut", Interrupting())
    resume(tmp_path / "cut")
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")


def test_a_member_that_was_away_fits_its_head_when_it_comes(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    """Its welcome is what tells it to, also where there is nothing in it."""
    recipe = tiny_recipe(*FEW, "method.name=local", "method.augment=gaussian", "engine.wait=0")
    fed = federated(recipe)
    fed.carrier.away = {"2"}
    orders = fed.carrier.exchange

    def back(given: Any, deadline: float) -> Any:
        if any(order.kind == "train" for order in given.values()):
            fed.carrier.away = set()
        return orders(given, deadline)

    fed.carrier.exchange = back
    fed.play()
    assert "2" in fed.lines[0]["failed"]
    late, alone = fed.folder("2"), fed.folder("1")
    for folder, client in ((late, "2"), (alone, "1")):
        head = client_model(folder, client).tensors["head/weight"]
        assert float(head.abs().max()) > 0.05  # far beyond what two rounds from zero make of it


def test_private_examples_are_refused(tiny_recipe: Callable[..., Any]) -> None:
    for name in ("local", "folklora"):
        recipe = tiny_recipe(*FEW, f"method.name={name}", "privacy.unit=example", "privacy.noise=1")
        with pytest.raises(RecipeError, match='head_start = "fitted" makes more of the training examples'):
            prepare(recipe)


@pytest.mark.parametrize("augment", ["none", "sketch"])
@pytest.mark.parametrize(("part", "lie"), [("means", 3e38), ("scatter", 3e38), ("means", 9e5), ("counts", 3e38)])
def test_statistics_that_cannot_be_harm_nobody_s_run(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any], augment: str, part: str, lie: float
) -> None:
    """What all are sent is made of everybody's: numbers of one client must not end the run, whatever they are."""

    class Lying(LocalEngine):
        def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
            for client, data in super().sketches(clients, round):
                if client not in "12":
                    yield client, data
                    continue
                assert data is not None
                tensors = dict(decode(data).tensors)
                sign = 1 if client == "1" or part != "means" else -1
                tensors[f"statistics/{part}"] = torch.full(tensors[f"statistics/{part}"].shape, sign * lie)
                yield client, encode(Message(tensors))

    start = {"none": "sketched", "sketch": "fitted"}[augment]
    options = ("method.name=local", "method.head=private", f"method.head_start={start}", f"method.augment={augment}")
    played = play(tiny_recipe("train.rounds=1", *options), Lying)
    assert set(played.lines[0]["failed"]) == (set("12") if lie == 3e38 and part != "counts" else set())
    assert played.lines[1]["participants"] == ["0", "1", "2", "3"]
    assert played.lines[1]["failed"] == {}
