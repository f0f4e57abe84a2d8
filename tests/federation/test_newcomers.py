"""Clients that take part in no round: asked for a sketch when all is over, told what the server makes of it, scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from folklora.cli import app
from folklora.errors import FolkLoraError, RunError
from folklora.federation.codec import decode
from folklora.federation.faults import FaultyEngine
from folklora.federation.inspect import inspect
from folklora.federation.local import LocalEngine
from folklora.federation.member import Member
from folklora.federation.network import begin
from folklora.federation.newcomers import introduce
from folklora.federation.orders import Order
from folklora.federation.rounds import Silent
from folklora.federation.run import client_model, compare, resume, run
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.methods import METHODS
from folklora.privacy.attacks.warm import attackable
from folklora.report.page import write_compare_report, write_report
from folklora.report.reading import read_run
from folklora.report.tables import compare_table
from folklora.training.evaluation import evaluate
from folklora.training.prediction import Question

SHARE = "newcomers.share=0.25"
FROZEN = ["method.name=celora", "method.basis=frozen", "method.head=sketched"]


OTHERS: dict[str, list[str]] = {
    "fedit, control variates": ["method.name=fedit", "method.scaffold=true", "train.optimizer=sgd"],
    "fedit, Adam at the server": ["method.name=fedit", "method.fedopt=adam"],
    "fedit, a fitted head": ["method.name=fedit", "method.head=private", "method.head_start=fitted"],
    "replication, promoted": ["method.name=replication", "adapter.promote=6"],
    "hetlora, pruned": ["method.name=hetlora", "method.gamma=0.5", "adapter.rank=[2, 3, 4, 4]"],
    "hafl, freezing": ["method.name=hafl", "method.scheme=freezing", "adapter.rank=[2, 3, 4, 4]"],
    "celora, in one frame": [*FROZEN, "adapter.rank=[2, 3, 4, 4]"],
    "celora, private sketches": [*FROZEN, "method.components=0", "method.dp_epsilon=5.0"],
    "folklora, in few bits": ["method.name=folklora", "message.dtype=int8", "message.top_k=0.5"],
    "folklora, private examples": [
        "method.name=folklora",
        "method.head=private",
        "method.head_start=zero",
        "privacy.unit=example",
        "privacy.noise=1.0",
    ],
    "fedit, private clients": [
        "method.name=fedit",
        "privacy.unit=client",
        "privacy.noise=1.0",
        "train.participation=0.7",
    ],
    "fedit, a median": ["method.name=fedit", "robust.rule=median"],
}


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_a_newcomer_of_any_method_is_told_something_or_the_summary_says_what_it_lacks(
    tiny_recipe: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    recipe = tiny_recipe(*OTHERS.get(name, [f"method.name={name}"]), SHARE)
    summary, setup = run(recipe, tmp_path / "run"), prepare(recipe)
    (newcomer,) = setup.newcomers
    joined, directory = summary["newcomers"], RunDirectory(tmp_path / "run")
    assert list(joined["clients"]) == [newcomer]
    assert "failed" not in joined
    assert list(summary["clients"]) == list(setup.clients)
    assert newcomer not in setup.clients
    score = joined["clients"][newcomer]["accuracy"]
    assert joined["mean"] == score == summary["row"]["accuracy_newcomers"]
    assert ("lacks" in joined) == (setup.joining.newcomer_lacks is not None)
    # It had no part in anything before.
    for line in directory.metrics():
        assert newcomer not in {*line["participants"], *line["failed"], *line["bytes_up_clients"]}
        assert line["validation"] is None or newcomer not in line["validation"]["clients"]
    # Bytes are those of messages that are made again from what is on the disk.
    checkpoint = directory.checkpoint()
    assert checkpoint is not None
    assert newcomer not in checkpoint.clients
    sent = Member(setup, newcomer).sketch()
    message = None if sent is None else decode(sent, len(sent))
    state = directory.tensors(checkpoint, checkpoint.server)
    told = introduce(setup, state, newcomer, message, checkpoint.round)
    assert joined["bytes_up_per_client"] == len(sent or b"")
    assert joined["bytes_down_per_client"] == sum(len(part or b"") for part in told)
    # And what it predicts with can be had, and is what was scored.
    model = client_model(directory.path, newcomer)
    rows = setup.data.splits[newcomer].test
    examples, labels = setup.examples(rows)
    question = Question(newcomer, model.rank, model.tensors, examples)
    assert evaluate(setup.task, setup.method.adapter, [question], {newcomer: labels})[newcomer].value == score


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (["method.name=folklora"], True),
        (["method.name=fedit"], False),
        (["method.name=fedsb"], False),
        (["method.name=feddm"], False),
        (["method.name=celora"], False),
        (["method.name=celora", "method.basis=frozen"], True),
        (["method.name=celora", "method.basis=frozen", "method.similarity=model"], False),
    ],
)
def test_it_sends_no_sketch_of_which_nothing_is_made(
    tiny_recipe: Callable[..., Any], tmp_path: Path, settings: list[str], asked: bool
) -> None:
    joined = run(tiny_recipe(*settings, "train.rounds=1", SHARE), tmp_path / "run")["newcomers"]
    assert "failed" not in joined
    assert (joined["bytes_up_per_client"] > 0) == asked


def test_what_stays_home_with_the_others_is_named(tiny_recipe: Callable[..., Any]) -> None:
    """FedSA's newcomer has everybody's A between its data and a B that is zero."""
    for method, lacks in (("fedsa", "up factors"), ("fedit", None), ("ffa", None)):
        joining = prepare(tiny_recipe(f"method.name={method}", "method.head=shared", SHARE)).joining
        assert (joining.newcomer_lacks or "").startswith(lacks or "")
        assert (joining.newcomer_lacks is None) == (lacks is None)


def test_without_newcomers_nothing_is_kept_for_them(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    summary = run(tiny_recipe(*FROZEN), tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    checkpoint = directory.checkpoint()
    assert checkpoint is not None
    assert "newcomers" not in summary
    assert "accuracy_newcomers" not in summary["row"]
    state = directory.tensors(checkpoint, checkpoint.server)
    assert not [name for name in state if name.partition("/")[0] in {"pooled", "sketch", "newcomers", "embedding"}]


COMMON = sorted(name for name, method in METHODS.items() if method.has_global_model and name != "fedlpp")


@pytest.mark.parametrize("name", COMMON)
def test_where_there_is_a_model_for_all_it_is_the_newcomers(
    tiny_recipe: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Others may have been away, or lost what they were sent: it is the server's last."""
    run(tiny_recipe(f"method.name={name}", "method.head=shared", SHARE, "train.participation=0.7"), tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    setup, checkpoint = prepare(directory.recipe), directory.checkpoint()
    assert checkpoint is not None
    state, (newcomer,) = directory.tensors(checkpoint, checkpoint.server), setup.newcomers
    fresh = dict(setup.joining.initial(newcomer))
    welcome = setup.method.welcome(state, setup.clients[0])
    fresh |= welcome.tensors if welcome else {}
    wanted = setup.method.global_model(state, setup.clients[0], fresh)
    assert wanted is not None
    found = client_model(directory.path, newcomer).tensors
    for tensor in found:
        torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-6, atol=1e-7, msg=lambda m, n=tensor: n + m)


def test_a_newcomer_comes_with_the_data_of_the_end(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(*FROZEN, "newcomers.share=0.5", "drift.kind=labels", "method.refresh=1")
    summary, setup = run(recipe, tmp_path / "run"), prepare(recipe)
    assert set(setup.newcomers) & set(setup.data.later)
    for newcomer in setup.newcomers:
        model, rows = client_model(tmp_path / "run", newcomer), setup.split(newcomer, 2).test
        examples, labels = setup.examples(rows)
        question = Question(newcomer, model.rank, model.tensors, examples)
        score = evaluate(setup.task, setup.method.adapter, [question], {newcomer: labels})[newcomer]
        result = summary["newcomers"]["clients"][newcomer]
        assert result["accuracy"] == score.value
        assert result["examples"]["test"] == len(rows)


# -- over a network ----------------------------------------------------------------------------------------------------

NETWORK: dict[str, list[str]] = {
    "cores mixed by data": [*FROZEN, "method.similarity=data"],
    "sketches asked again": [*FROZEN, "method.similarity=data", "method.refresh=1"],
    "folklora": ["method.name=folklora"],
    "one model": ["method.name=fedit"],
    "merged updates": ["method.name=flora"],
    "nothing": ["method.name=local"],
    "masked": ["method.name=fedit", "secure.kind=masks"],
    "noise of all": ["method.name=fedit", "privacy.unit=client", "privacy.noise=1.0", "privacy.placement=client"],
    "the best round": ["method.name=fedit", "train.patience=1", "train.rounds=4", "train.lr=0.5"],
}


@pytest.mark.parametrize("name", NETWORK)
def test_a_newcomer_over_a_network_is_the_simulated_one(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    recipe = tiny_recipe("train.cohort=1", "data.limit=80", *NETWORK[name], SHARE)
    fed, local = federated(recipe), run(recipe, tmp_path / "local")
    summary = fed.play()
    (newcomer,) = summary["newcomers"]["clients"]
    result, simulated = (each["newcomers"]["clients"][newcomer] for each in (summary, local))
    assert result["accuracy"] == pytest.approx(simulated["accuracy"])
    assert result["examples"] == simulated["examples"]
    for key in ("bytes_up_per_client", "bytes_down_per_client"):
        assert summary["newcomers"][key] == local["newcomers"][key]
    for key in ("accuracy_mean", "accuracy_newcomers", "bytes_per_newcomer"):
        assert summary["row"][key] == pytest.approx(local["row"][key])
    orders = [order.kind for order in fed.carrier.orders if order.client == newcomer]
    assert orders == ["hello", "sketch", "score", "goodbye"]
    assert fed.carrier.up[newcomer] == summary["newcomers"]["bytes_up_per_client"]
    assert fed.carrier.down[newcomer] == summary["newcomers"]["bytes_down_per_client"]
    found, wanted = (client_model(path, newcomer).tensors for path in (fed.folder(newcomer), tmp_path / "local"))
    for tensor in wanted:
        torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-5, atol=1e-6)


def test_a_newcomer_need_not_be_there_before_it_is_asked(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    """It connects when the rounds are over."""
    recipe = tiny_recipe("data.limit=80", "method.name=fedit", SHARE, "engine.wait=5")
    fed = federated(recipe)
    (newcomer,) = begin(recipe, fed.homes / "look", fed.members).setup.newcomers
    fed.carrier.away = {newcomer}

    class Late(Silent):
        def line(self, metrics: Any) -> None:
            fed.carrier.away.clear()

    summary = fed.play(Late())
    assert list(summary["newcomers"]["clients"]) == [newcomer]


# -- killed, away, damaged ---------------------------------------------------------------------------------------------


class Killed(Exception): ...


@pytest.mark.parametrize("moment", ["round", "newcomers"])
def test_killed_and_resumed_it_is_told_the_same(
    tiny_recipe: Callable[..., Any], facts: Callable[[Path], dict[str, Any]], tmp_path: Path, moment: str
) -> None:
    recipe = tiny_recipe(*FROZEN, "train.rounds=3", "newcomers.share=0.4")
    run(recipe, tmp_path / "whole")

    class Killer(Silent):
        def phase(self, name: str, total: int) -> None:
            if name == ("newcomers" if moment == "newcomers" else "round 2"):
                raise Killed

    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", Killer())
    assert not RunDirectory(tmp_path / "killed").finished
    resume(tmp_path / "killed")
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


def test_a_server_killed_at_it_asks_again_and_members_answer_the_same(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    recipe = tiny_recipe(*FROZEN, "data.limit=80", SHARE)
    whole, killed = federated(recipe), federated(recipe)
    wanted = whole.play()["newcomers"]

    class Killer(Silent):
        def phase(self, name: str, total: int) -> None:
            if name == "newcomers":
                raise Killed

    with pytest.raises(Killed):
        killed.play(Killer())
    assert killed.resume()["newcomers"] == wanted


@pytest.mark.parametrize("fault", ["corrupt", "late", "offline"])
def test_a_newcomer_that_fails_is_named_and_ends_nothing(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    recipe = tiny_recipe(*FROZEN, "newcomers.share=0.5", f"faults.{fault}=0.5", "engine.wait=0")
    newcomers = prepare(recipe).newcomers
    monkeypatch.setattr(
        FaultyEngine,
        "strikes",
        lambda self, what, client, round, look=0: what == fault and client == newcomers[0],
    )
    played = play(recipe, lambda setup: FaultyEngine(LocalEngine(setup), recipe))
    joined = played.summary["newcomers"]
    assert list(joined["failed"]) == [newcomers[0]]
    assert joined["failed"][newcomers[0]]
    assert list(joined["clients"]) == [newcomers[1]]
    assert played.row["accuracy_newcomers"] == joined["clients"][newcomers[1]]["accuracy"]


def test_where_all_of_them_fail_the_run_still_has_its_result(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any]
) -> None:
    def tamper(order: Order, answer: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**answer, "data": b"nothing"}] if order.kind == "sketch" and order.client == newcomer else [answer]

    recipe = tiny_recipe(*FROZEN, "data.limit=80", SHARE)
    fed = federated(recipe, tamper=tamper)
    (newcomer,) = begin(recipe, fed.homes / "look", fed.members).setup.newcomers
    summary = fed.play()
    joined = summary["newcomers"]
    assert joined["clients"] == {}
    assert joined["mean"] is None
    assert list(joined["failed"]) == [newcomer]
    assert summary["row"]["accuracy_newcomers"] is None
    assert summary["row"]["accuracy_mean"] > 0
    json.dumps(summary, allow_nan=False)


# -- who they are, and what cannot be ----------------------------------------------------------------------------------


def test_who_they_are_follows_from_the_seed_and_concerns_nobody_else(tiny_recipe: Callable[..., Any]) -> None:
    setups = [prepare(tiny_recipe(SHARE, "method.name=fedit", f"seed={seed}")) for seed in range(8)]
    assert len({setup.newcomers for setup in setups}) > 1
    for setup in setups:
        again = prepare(tiny_recipe(SHARE, "method.name=local", f"seed={setup.recipe.seed}"))
        assert again.newcomers == setup.newcomers
        assert set(again.data.splits) == {*again.clients, *again.newcomers}


def test_a_newcomer_is_no_wider_than_what_the_server_made(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    ranks = dict.fromkeys("0123", 2)
    (newcomer,) = prepare(tiny_recipe(*FROZEN, SHARE)).newcomers
    ranks[newcomer] = 8
    recipe = tiny_recipe(*FROZEN, SHARE, f"adapter.rank={list(ranks.values())}")
    assert prepare(recipe).ranks[newcomer] == 2
    run(recipe, tmp_path / "run")
    assert client_model(tmp_path / "run", newcomer).rank == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["newcomers.share=0.1"], "0.1 of 4 clients is nobody; allowed: 0, or a share that is 1 to 3"),
        (["newcomers.share=0.95"], "0.95 of 4 clients is everybody; allowed: 0, or a share that is 1"),
        (["newcomers.share=1.0"], "newcomers.share = 1.0: input should be less than 1"),
        ([SHARE, "method.name=folklora", "secure.kind=ckks"], 'newcomers.share = 0.25 with secure.kind = "ckks"'),
        ([SHARE, "engine.min_clients=4"], "engine.min_clients = 4, of 3 clients 3 are sampled a round"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny_recipe: Callable[..., Any], settings: list[str], told: str) -> None:
    with pytest.raises(FolkLoraError) as error:
        prepare(tiny_recipe(*settings))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_an_attack_wants_everybody_in_it(tiny_recipe: Callable[..., Any]) -> None:
    with pytest.raises(FolkLoraError, match=r"newcomers.share = 0.25: attacks are on .*; allowed: 0"):
        attackable(tiny_recipe("method.name=fedit", SHARE))


def test_a_strangers_model_cannot_be_had_of_a_run_without_it(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe("method.name=fedit", SHARE)

    class Killer(Silent):
        def phase(self, name: str, total: int) -> None:
            raise Killed

    with pytest.raises(Killed):
        run(recipe, tmp_path / "run", Killer())
    with pytest.raises(RunError, match="nothing is committed yet"):
        client_model(tmp_path / "run", prepare(recipe).newcomers[0])


# -- what is shown of them ---------------------------------------------------------------------------------------------


def test_a_comparison_and_reports_tell_of_them(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe("train.rounds=1", "newcomers.share=0.5")
    document = compare(recipe, ["local", "fedit"], 1, tmp_path)
    table = compare_table(document["rows"])
    assert "| newcomers % |" in table
    assert "Newcomers: clients that took part in no round" in table
    page = write_compare_report(tmp_path).read_text(encoding="utf-8")
    assert "newcomers" in page
    (newcomer, other), clients = prepare(recipe).newcomers, prepare(recipe).clients
    found = read_run(tmp_path / "local-s0")
    assert (found.clients, tuple(found.newcomers)) == (clients, (newcomer, other))
    assert found.counts is not None
    assert len(found.counts) == len(clients)
    page = write_report(tmp_path / "local-s0").read_text(encoding="utf-8")
    assert "2 of 2 clients without a round; without a head" in page
    assert "There is no privacy audit" not in page
    assert "Newcomers" in write_report(tmp_path / "fedit-s0").read_text(encoding="utf-8")


def test_inspect_names_them_and_forecasts_the_others(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe("method.name=fedit", SHARE)
    found = inspect(recipe)
    assert found["newcomers"] == list(prepare(recipe).newcomers)
    assert list(found["clients"]) == list("0123")
    json.dumps(found)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "recipe.toml")])
    assert f"newcomers, who take part in no round: {found['newcomers'][0]}" in shown.output


def test_liars_are_among_those_who_take_part(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe("method.name=fedit", "newcomers.share=0.5", "poison.kind=sign", "poison.share=0.99")
    summary = run(recipe, tmp_path / "run")
    assert summary["poison"]["clients"] == list(prepare(recipe).clients)
