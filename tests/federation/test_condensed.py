"""Clients that send data and a server that trains: both engines, interrupted and not, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folklora.errors import FolkLoraError
from folklora.federation.inspect import inspect
from folklora.federation.rounds import Silent
from folklora.federation.run import resume, run
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare

BRIEF = ["data.limit=80", "method.ipc=2", "method.steps=3", "method.server_steps=3", "train.rounds=3"]
VARIANTS: dict[str, list[str]] = {
    "feddm": ["method.name=feddm"],
    "fedaf": ["method.name=fedaf", "method.head_start=sketched"],
    "feddm, embeddings": ["method.name=feddm", "method.space=embeddings", "method.length=5", "adapter.norm=true"],
    "fedaf, embeddings": ["method.name=fedaf", "method.space=embeddings", "method.length=5", "method.init=public"],
    "feddm, public": ["method.name=feddm", "method.init=public", "message.dtype=int8"],
}
HARD = ["train.participation=0.75", "train.failures=0.3"]
variants = pytest.mark.parametrize("name", VARIANTS)


class Interrupted(Exception): ...


class Interrupting(Silent):
    def __init__(self, round: int) -> None:
        self.last = round

    def line(self, metrics: Any) -> None:
        if metrics["round"] == self.last:
            raise Interrupted


@variants
def test_interrupted_and_resumed_is_as_if_nothing_had_been(
    tiny_recipe: Callable[..., Any], tmp_path: Path, facts: Callable[[Path], dict[str, Any]], name: str
) -> None:
    recipe = tiny_recipe(*BRIEF, *VARIANTS[name], *HARD)
    run(recipe, tmp_path / "whole")
    for round in (1, 2):
        with pytest.raises(Interrupted):
            run(recipe, tmp_path / f"cut-{round}", Interrupting(round))
        resume(tmp_path / f"cut-{round}")
        wanted, found = facts(tmp_path / "whole"), facts(tmp_path / f"cut-{round}")
        assert found == wanted
    lines = RunDirectory(tmp_path / "whole").metrics()
    assert all(line["train_loss"] is None for line in lines)
    assert any("dropped out (simulated)" in line["failed"].values() for line in lines)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "," in name])
def test_a_network_run_is_the_local_run(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    recipe = tiny_recipe(*BRIEF, *VARIANTS[name], "train.participation=0.75")
    fed = federated(recipe, rebuild=True)
    summary, local = fed.play(), run(recipe, tmp_path / "local")
    assert summary["clients"] == local["clients"]
    for found, wanted in zip(fed.lines, RunDirectory(tmp_path / "local").metrics(), strict=True):
        for key in ("participants", "failed", "train_loss", "validation", "bytes_up_clients", "bytes_down_clients"):
            assert found[key] == wanted[key]


@variants
def test_bytes_are_what_was_foretold(tiny_recipe: Callable[..., Any], tmp_path: Path, name: str) -> None:
    recipe = tiny_recipe(*BRIEF, *VARIANTS[name])
    told = inspect(recipe)["method"]
    row = run(recipe, tmp_path / "run")["row"]
    for key in ("bytes_up_per_client_round", "bytes_down_per_client_round", "bytes_once_per_client"):
        assert told[key] == pytest.approx(row[key], abs=1)


def test_the_server_moves_adapters_only_where_embeddings_are_condensed(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any]
) -> None:
    for name, kinds in (("feddm", {"head"}), ("feddm, embeddings", {"A", "B", "head", "norm"})):
        played = play(tiny_recipe(*BRIEF, *VARIANTS[name]))
        reply = played.setup.method.reply(played.rounds.state, "0")
        assert {key.partition("/")[0] for key in reply.tensors} == kinds
        start = played.setup.method.initial("0")
        moved = {key.partition("/")[0] for key, tensor in reply.tensors.items() if not torch.equal(tensor, start[key])}
        assert moved == kinds
        assert played.row["accuracy_mean"] > 0


def test_who_has_other_classes_later_says_so_where_it_is_asked(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any]
) -> None:
    drift = ["drift.kind=labels", "drift.round=2", "drift.share=0.5"]
    agreed = play(tiny_recipe(*BRIEF, *VARIANTS["feddm"], *drift, "method.refresh=1"))
    assert not any(line["failed"] for line in agreed.lines)
    assert agreed.lines[2]["bytes_up"] > 0
    stuck = play(tiny_recipe(*BRIEF, *VARIANTS["feddm"], *drift))
    changed = set(stuck.lines[2]["drift"])
    assert set(stuck.lines[2]["failed"]) <= changed


def test_newcomers_get_the_server_s_model(tiny_recipe: Callable[..., Any], play: Callable[..., Any]) -> None:
    played = play(tiny_recipe(*BRIEF, *VARIANTS["fedaf"], "newcomers.share=0.25"))
    (newcomer,) = played.summary["newcomers"]["clients"]
    assert newcomer not in played.summary["clients"]


@pytest.mark.parametrize("name", ["feddm", "fedaf"])
@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["privacy.unit=example", "privacy.noise=1"], "with condensed data makes more of the training examples"),
        (["privacy.unit=client", "privacy.noise=1"], "class counts, sent once: it would leave clients without noise"),
        (["secure.kind=masks"], "takes more of uploads than their mean"),
        (["secure.kind=ckks"], "method.name ="),
        (["message.top_k=0.5"], "message.top_k = 0.5 with method.name"),
        (["robust.rule=median"], "whose clients send data: there is no update to judge"),
        (["robust.rule=clip"], "whose clients send data: there is no update to judge"),
        (["poison.kind=backdoor", "poison.share=0.25"], 'poison.kind = "backdoor" with method.name ='),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(
    tiny_recipe: Callable[..., Any], name: str, overrides: list[str], complaint: str
) -> None:
    with pytest.raises(FolkLoraError) as caught:
        prepare(tiny_recipe(f"method.name={name}", *overrides))
    told = str(caught.value)
    assert complaint in told
    assert name in told
    assert "allowed: " in told
    assert "\n" not in told


def test_a_text_longer_than_the_backbone_takes_is_refused(tiny_recipe: Callable[..., Any]) -> None:
    with pytest.raises(FolkLoraError, match="method.length = 65 .* allowed: 3 to 64"):
        prepare(tiny_recipe("method.name=feddm", "method.space=embeddings", "method.length=65"))
