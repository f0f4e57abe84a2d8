"""Language models through the whole federation: every method, both engines, interrupted and not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folklora.backbones.metric import LOSS
from folklora.errors import FolkLoraError
from folklora.federation.parties import Own
from folklora.federation.run import client_model, run
from folklora.federation.rundir import RunDirectory
from folklora.methods import METHODS
from folklora.recipe import Recipe

HEADLESS = sorted(name for name in METHODS if not METHODS[name].needs_head)


@pytest.mark.parametrize("method", HEADLESS)
def test_every_method_lowers_the_loss_of_a_language_model(
    speaking: Callable[..., Recipe], tmp_path: Path, method: str
) -> None:
    rates = {"ravan": 0.1, "loraxs": 3e-2, "fedsb": 3e-2}
    summary = run(
        speaking(f"method.name={method}", f"train.lr={rates.get(method, 1e-2)}", "train.rounds=3"), tmp_path / "run"
    )
    row, lines = summary["row"], RunDirectory(tmp_path / "run").metrics()
    assert (row["metric"], row["higher"]) == ("loss", False)
    assert row["perplexity_mean"] > 1
    assert lines[-1]["train_loss"] < lines[1]["train_loss"]
    assert not any(line["failed"] for line in lines)
    model = client_model(tmp_path / "run", "topic-1")
    assert not any(name.startswith("head/") for name in model.tensors)
    assert (row["bytes_up_per_client_round"] > 0) == (method != "local")


def test_what_is_nothing_but_a_head_is_refused(speaking: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(FolkLoraError, match="sketch"):
        run(speaking("method.name=sketch"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["celora", "fedit", "flora", "fedsb"])
def test_a_network_run_of_a_language_model_is_the_local_run(
    speaking: Callable[..., Recipe], federated: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    recipe = speaking(f"method.name={method}", "train.cohort=1", "train.optimizer=sgd", "train.lr=0.05")
    fed = federated(recipe, [f"topic-{i}" for i in range(4)])
    summary, local = fed.play(), run(recipe, tmp_path / "local")
    for name in ("loss_mean", "perplexity_mean", "bytes_up_per_client_round", "bytes_down_per_client_round"):
        assert summary["row"][name] == pytest.approx(local["row"][name], rel=1e-5), name
    for client, result in local["clients"].items():
        assert summary["clients"][client]["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_members_columns_have_names_of_their_own(
    speaking: Callable[..., Recipe], federated: Callable[..., Any], tiny_chats: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in tiny_chats.read_text().splitlines()]
    for topic in {row["topic"] for row in rows}:
        own = [{"question": row["prompt"], "answer": row["response"]} for row in rows if row["topic"] == topic]
        (tmp_path / f"{topic}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    local = speaking("method.name=fedit", "train.cohort=1", "train.optimizer=sgd", "train.lr=0.05")
    wanted = run(local, tmp_path / "local")
    recipe = local.model_copy(update={"data": local.data.model_copy(update={"source": "nobody-has-this.jsonl"})})

    def own_of(client: str) -> Own:
        columns = (("prompt", "question"), ("response", "answer"))
        return Own(str(tmp_path / f"{client}.jsonl"), model=recipe.model.name, columns=columns, device="cpu")

    found = federated(recipe, [f"topic-{i}" for i in range(4)], own_of).play()
    for client, result in wanted["clients"].items():
        assert found["clients"][client]["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_a_resumed_run_of_a_language_model_is_the_uninterrupted_run(
    speaking: Callable[..., Recipe], tmp_path: Path
) -> None:
    from folklora.federation.rounds import Silent
    from folklora.federation.run import resume

    recipe = speaking("method.name=celora", "adapter.dropout=0.2", "train.rounds=3", "train.participation=0.75")
    whole = run(recipe, tmp_path / "whole")

    class Stopping(Silent):
        def line(self, metrics: Any) -> None:
            if metrics["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "stopped", Stopping())
    resumed = resume(tmp_path / "stopped")
    drop = lambda row: {name: value for name, value in row.items() if not name.startswith("seconds")}
    assert drop(resumed["row"]) == drop(whole["row"])
    for client in whole["clients"]:
        found, wanted = (client_model(tmp_path / name, client).tensors for name in ("stopped", "whole"))
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_early_stopping_keeps_the_lowest_loss(speaking: Callable[..., Recipe], tmp_path: Path) -> None:
    summary = run(
        speaking("method.name=local", "train.rounds=30", "train.lr=0.3", "train.patience=1"), tmp_path / "run"
    )
    means = [line["validation"]["mean"] for line in RunDirectory(tmp_path / "run").metrics() if line["validation"]]
    assert summary["stopped_early"]
    assert summary["row"]["validation_mean"] == pytest.approx(min(means), rel=1e-6)
    assert LOSS.merit(min(means)) == max(map(LOSS.merit, means))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.response=answer"], "answer"),
        (["model.name=minilm"], "causal-lm"),
        (["data.partition=dirichlet", "data.by=nobody"], "no column 'nobody'"),
        (["data.partition=shards", "data.label=nothing"], "no column 'nothing'"),
        (["method.head=shared", "method.name=fedit"], "head"),
        (["data.image=picture"], "image"),
        (["train.packed=always", "model.attention=nothing"], "attention"),
    ],
)
def test_what_cannot_be_is_refused_before_work_starts(
    speaking: Callable[..., Recipe], tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(FolkLoraError, match=words) as raised:
        run(speaking(*overrides), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
