"""Runs on a backbone with one shared block: depths by minibatch, by device and by choice, in both engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import folklora.federation.local as local_room
from folklora.errors import FolkLoraError, MessageError, RecipeError, RunError
from folklora.federation.answers import predict
from folklora.federation.depth_choice import at_depth
from folklora.federation.depths import Depths
from folklora.federation.member import Member
from folklora.federation.run import client_model, resume, run
from folklora.federation.setup import prepare
from folklora.recipe import Recipe
from folklora.training.evaluation import evaluate
from folklora.training.prediction import Question
from folklora.training.prediction import predict as answers_of

T = 6
AUTO = ("depth.train=[2, 3, 6]", "depth.steps=auto", "depth.tolerance=0.1")
CLIENTS = ("0", "1", "2", "3")


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe], tiny_model: Callable[[str], Path]) -> Callable[..., Recipe]:
    """``recipe("depth.steps=3", ...)`` -> two rounds of four clients on a tiny ALBERT."""
    model = f"model.name={tiny_model('albert')}"
    # A member trains alone. Beside others, sums differ in their last digits, and Adam makes much of those.
    return lambda *settings: tiny_recipe(model, "data.limit=120", "train.cohort=1", *settings)


@pytest.fixture(scope="module")
def chosen_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path], tiny_data: Path) -> Path:
    """A finished run whose clients chose, for tests that damage a copy of it."""
    model = {"name": str(tiny_model("albert")), "dtype": "float32"}
    data = {"source": str(tiny_data), "clients": 4, "partition": "dirichlet", "alpha": 1.0, "limit": 120}
    asked = Recipe.parse({"model": model, "data": data}, ("adapter.rank=4", "train.rounds=1", *AUTO))
    run(asked, path := tmp_path_factory.mktemp("chosen") / "run")
    return path


def scored(path: Path, client: str, steps: int, split: str, recipe: Recipe) -> float:
    """How the client's final model does in so many steps, asked alone."""
    model = client_model(path, client)
    examples, labels = model.setup.examples(getattr(model.setup.data.splits[client], split))
    question = Question(client, model.rank, model.tensors, examples, steps)
    return evaluate(model.setup.task, model.setup.method.adapter, [question], {client: labels})[client].value


# -- what a run is at one depth ----------------------------------------------------------------------------------------


def test_all_steps_are_the_run_without_depth(
    recipe: Callable[..., Recipe], tmp_path: Path, facts: Callable[[Path], dict[str, Any]]
) -> None:
    plain, told = run(recipe(), tmp_path / "plain"), run(recipe("depth.steps=6"), tmp_path / "told")
    assert "depth_mean" not in plain["row"]
    assert "depth" not in plain["clients"]["0"]
    assert told["row"]["depth_mean"] == T
    one, other = facts(tmp_path / "plain"), facts(tmp_path / "told")
    for name in one:
        if name.startswith(("clients/", "server/")) or name == "metrics":
            assert one[name] == other[name], name


def test_bytes_do_not_depend_on_depth_and_an_adapter_travels_once(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = ("method.name=fedit", "method.head=private")
    rows = [run(recipe(*settings, f"depth.steps={k}"), tmp_path / str(k))["row"] for k in (2, 6)]
    assert len({(row["bytes_up_per_client_round"], row["bytes_down_per_client_round"]) for row in rows}) == 1
    sites = prepare(recipe()).task.backbone.sites
    assert len(sites) == 2  # a query and a value, six layers or not
    numbers = sum(4 * (site.d_in + site.d_out) for site in sites)
    assert 4 * numbers <= rows[0]["bytes_up_per_client_round"] < 4 * numbers + 1024


def test_sketches_are_of_the_model_as_it_is_used(recipe: Callable[..., Recipe]) -> None:
    whole, short = prepare(recipe()), prepare(recipe("depth.steps=2"))
    named = Member(whole, "0").data.features("train")[0]
    assert not torch.equal(Member(short, "0").data.features("train")[0], named)
    classes = prepare(recipe("depth.device_steps=[2, 6]"))
    for client in CLIENTS:
        wanted = {2: short, 6: whole}[classes.steps(client) or 0]
        found = Member(classes, client).data.features("train")[0]
        assert torch.equal(found, Member(wanted, client).data.features("train")[0])


# -- depths by minibatch and by device ---------------------------------------------------------------------------------


def test_classes_of_devices_train_no_deeper_and_are_scored_as_they_are(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe("depth.device_steps=[2, 6]", "depth.device_shares=[0.25, 0.75]", "depth.train=[1, 2, 4]")
    seen: dict[str, set[int]] = {client: set() for client in CLIENTS}
    jobs = Member.jobs

    def watched(self: Member, round: int) -> Any:
        found = jobs(self, round)
        for job in found:
            seen[job.client] |= set(job.depths)
        return found

    monkeypatch.setattr(Member, "jobs", watched)
    summary = run(asked, tmp_path / "run")
    depth = {client: result["depth"] for client, result in summary["clients"].items()}
    assert sorted(depth.values()) == [2, 6, 6, 6]
    assert summary["row"]["depth_mean"] == 5.0
    assert seen == {client: {1, 2} if steps == 2 else {1, 2, 4} for client, steps in depth.items()}
    for client, steps in depth.items():
        assert summary["clients"][client]["accuracy"] == scored(tmp_path / "run", client, steps, "test", asked)
        assert client_model(tmp_path / "run", client).steps == steps
    # The same clients are the first class of ranks.
    ranks = prepare(recipe("adapter.device_ranks=[2, 6]", "adapter.device_shares=[0.25, 0.75]")).ranks
    assert dict(ranks) == depth


def test_a_network_run_is_the_local_run(
    recipe: Callable[..., Recipe], federated: Callable[..., Any], tmp_path: Path
) -> None:
    asked = recipe(*AUTO, "depth.device_steps=[3, 6]", "adapter.dropout=0.1", "newcomers.share=0.25")
    fed = federated(asked, rebuild=True)
    summary, local = fed.play(), run(asked, tmp_path / "local")
    for found, wanted in ((summary, local), (summary["newcomers"], local["newcomers"])):
        assert {c: r["depth"] for c, r in found["clients"].items()} == {
            c: r["depth"] for c, r in wanted["clients"].items()
        }
        for client, result in wanted["clients"].items():
            assert found["clients"][client]["accuracy"] == pytest.approx(result["accuracy"])
    assert set(summary["newcomers"]["clients"]).isdisjoint(summary["clients"])
    for client in CLIENTS:
        one, other = client_model(fed.folder(client), client), client_model(tmp_path / "local", client)
        assert one.steps == other.steps
        for name, tensor in other.tensors.items():
            torch.testing.assert_close(one.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    ours, theirs = (predict(path, "0", ["w1 w2"], depth="auto")[0] for path in (fed.folder("0"), tmp_path / "local"))
    assert ours["probability"] == pytest.approx(theirs["probability"], rel=1e-4)


def test_what_a_member_cannot_have_chosen_is_not_believed(
    recipe: Callable[..., Recipe], federated: Callable[..., Any]
) -> None:
    def lie(order: Any, answer: dict[str, Any]) -> list[dict[str, Any]]:
        if order.client == "1" and "steps" in answer:
            answer["steps"] = 4  # nothing that it was trained with
        return [answer]

    summary = federated(recipe(*AUTO), tamper=lie).play()
    assert summary["missing"] == ["1"]
    assert set(summary["clients"]) == {"0", "2", "3"}


# -- a choice at the end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", ["0.0", "0.1", "1.0"])
def test_clients_choose_the_fewest_steps_within_the_tolerance(
    recipe: Callable[..., Recipe], tmp_path: Path, tolerance: str
) -> None:
    asked = recipe(*AUTO, f"depth.tolerance={tolerance}")
    summary = run(asked, tmp_path / "run")
    for client, result in summary["clients"].items():
        validation = {steps: scored(tmp_path / "run", client, steps, "validation", asked) for steps in (2, 3, 6)}
        good = [steps for steps in (2, 3, 6) if validation[steps] >= validation[6] - float(tolerance) - 1e-9]
        assert result["depth"] == min(good), validation
        assert result["accuracy"] == scored(tmp_path / "run", client, min(good), "test", asked)
        assert at_depth(tmp_path / "run", client_model(tmp_path / "run", client), "auto").steps == min(good)
    if tolerance == "1.0":
        assert summary["row"]["depth_mean"] == 2.0


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ({"0": {"depth": "3"}}, "client '0': depth '3'; allowed: one of 2, 3, 6"),
        ({"0": {"depth": 3.0}}, "client '0': depth 3.0; allowed: one of 2, 3, 6"),
        ({"0": {"depth": 4}}, "client '0': depth 4; allowed: one of 2, 3, 6"),
        ({"0": {}}, "client '0': depth None; allowed: one of 2, 3, 6"),
        ({"0": 5}, "clients: not what a run ends with"),
        ([], "clients: not what a run ends with"),
        (None, "clients: not what a run ends with"),
    ],
)
def test_a_damaged_choice_is_one_line(tmp_path: Path, chosen_run: Path, written: Any, line: str) -> None:
    path = Path(shutil.copytree(chosen_run, tmp_path / "run"))
    summary = json.loads((path / "summary.json").read_text())
    summary["clients"] = written
    (path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RunError) as caught:
        predict(path, "0", ["w1"])
    assert str(caught.value) == f"{path / 'summary.json'}: {line}"


def test_the_test_split_is_read_at_one_depth(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    whole = local_room.evaluate

    def watched(task: Any, adapter: Any, questions: Sequence[Question], labels: Any, **options: Any) -> Any:
        asked.extend((q.client, q.depth or 0) for q in questions)
        return whole(task, adapter, questions, labels, **options)

    monkeypatch.setattr(local_room, "evaluate", watched)
    summary = run(recipe(*AUTO, "train.evaluate_every=2"), tmp_path / "run")
    # One validation at the most steps, and at the end everything at the chosen ones (the choice is elsewhere).
    assert set(asked[4:]) == {(client, result["depth"]) for client, result in summary["clients"].items()}
    assert {steps for _, steps in asked[:4]} == {T}


@pytest.mark.parametrize("moment", ["choose", "evaluate"])
def test_who_is_killed_at_the_choice_ends_as_a_whole_run(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    facts: Callable[[Path], dict[str, Any]],
    moment: str,
) -> None:
    asked = recipe(*AUTO, "depth.device_steps=[3, 6]", "adapter.dropout=0.2", "train.failures=0.3")
    run(asked, tmp_path / "whole")

    class Killed(Exception): ...

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    first = local_room.choose
    with monkeypatch.context() as patch:
        if moment == "choose":
            patch.setattr(local_room, "choose", killed)
        else:  # after the choice

            def then_killed(*given: Any) -> Any:
                found = first(*given)
                patch.setattr(local_room, "evaluate", killed)
                return found

            patch.setattr(local_room, "choose", then_killed)
        with pytest.raises(Killed):
            run(asked, tmp_path / "killed")
    assert not (tmp_path / "killed" / "summary.json").exists()
    resume(tmp_path / "killed")
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


def test_a_run_that_is_interrupted_between_minibatches_draws_the_same_depths(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    facts: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = recipe("depth.train=[2, 3, 6]", "adapter.dropout=0.2", "train.optimizer_state=kept")
    run(asked, tmp_path / "whole")
    finish, count = Member.finish, iter(range(100))

    class Killed(Exception): ...

    def watched(self: Member, round: int, fitted: Any) -> Any:
        if next(count) == 6:
            raise Killed
        return finish(self, round, fitted)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "finish", watched)
        with pytest.raises(Killed):
            run(asked, tmp_path / "killed")
    resume(tmp_path / "killed")
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


def test_the_report_says_how_deep_each_client_is(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from folklora.report.facts import Facts
    from folklora.report.inventory import reported
    from folklora.report.page import write_report
    from folklora.report.reading import read_run
    from folklora.report.tables import compare_table

    summary = run(recipe(*AUTO, "train.rounds=1"), tmp_path / "run")
    shown = read_run(tmp_path / "run")
    assert {client: each.depth for client, each in shown.results.items()} == {
        client: result["depth"] for client, result in summary["clients"].items()
    }
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Depth, mean" in page
    assert "| depth |" in compare_table([summary["row"]])
    assert any("shared block" in each.what for each in reported(Facts.of(tmp_path / "run")))


# -- served ------------------------------------------------------------------------------------------------------------


def test_a_model_is_asked_at_any_depth(recipe: Callable[..., Recipe], tmp_path: Path, folklora: Any) -> None:
    run(recipe("depth.steps=3", "train.rounds=1"), tmp_path / "run")
    model = client_model(tmp_path / "run", "2")
    texts = ["w1 w2 w3", "w40 w5"]
    said: dict[Any, list[float]] = {}
    for depth in (None, 1, 3, 6, "auto"):
        said[depth] = [each["probability"] for each in predict(tmp_path / "run", "2", texts, depth=depth)]  # type: ignore[arg-type]
        if isinstance(depth, int):
            question = Question("2", model.rank, model.tensors, model.setup.task.encode(texts), depth)
            logits = answers_of(model.setup.task, model.setup.method.adapter, [question])["2"]
            wanted = torch.softmax(torch.from_numpy(logits), 1).max(1).values
            np.testing.assert_allclose(said[depth], wanted.numpy(), rtol=1e-4)
    assert said[None] == said[3] != said[6]
    told = folklora("predict", tmp_path / "run", *texts, "--client", "2", "--depth", "6", "--json")
    assert [each["probability"] for each in json.loads(told.out)] == said[6]
    for wrong, line in (("7", "applies its shared block 6 times; allowed: 1 to 6"), ("deep", 'allowed: "auto"')):
        refused = folklora("predict", tmp_path / "run", "w1", "--client", "2", "--depth", wrong)
        assert refused.code == 2
        assert line in refused.err


def test_auto_of_a_run_in_which_nobody_chose(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    asked = recipe("depth.train=[2, 4, 6]", "depth.tolerance=0.05")
    run(asked, tmp_path / "run")
    for client in CLIENTS:
        validation = {steps: scored(tmp_path / "run", client, steps, "validation", asked) for steps in (2, 4, 6)}
        good = min(steps for steps, value in validation.items() if value >= validation[6] - 0.05 - 1e-9)
        model = client_model(tmp_path / "run", client)
        assert (model.steps, at_depth(tmp_path / "run", model, "auto").steps) == (6, good)


@pytest.mark.parametrize("steps", [3, 6])
def test_what_goes_home_says_its_depth_and_is_the_stock_model_at_all_steps(
    recipe: Callable[..., Recipe], tmp_path: Path, steps: int, folklora: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    asked = recipe("method.name=celora", f"depth.steps={steps}", "train.lr=0.05")
    run(asked, tmp_path / "run")
    for command, folder in (("export", "peft"), ("merge", "merged")):
        told = folklora(command, tmp_path / "run", "--client", "1", "--to", tmp_path / folder)
        assert ("stock libraries apply it 6 times" in told.err) == (steps < T)
        use = json.loads((tmp_path / folder / "task.json").read_text())
        assert (use["depth"], use["full_depth"]) == (steps, T)
    base = AutoModel.from_pretrained(asked.model.name).eval()
    stock = [
        PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval().base_model.model,
        AutoModel.from_pretrained(tmp_path / "merged").eval(),
    ]
    model = client_model(tmp_path / "run", "1")
    (ids,) = model.setup.task.encode(["w1 w2 w3 w4"])
    question = Question("1", model.rank, model.tensors, [ids], model.steps)
    ours = answers_of(model.setup.task, model.setup.method.adapter, [question])["1"][0]
    head = model.tensors["head/weight"], model.tensors["head/bias"]
    for other in stock:
        with torch.no_grad():
            theirs = other(input_ids=torch.tensor([list(ids)])).last_hidden_state.mean(1)[0] @ head[0].T + head[1]
        assert np.allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5) == (steps == T)


def test_depths_and_private_examples(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    privacy = ("method.name=fedit", "privacy.unit=example", "privacy.noise=0.5", "train.clip=none")
    summary = run(recipe("depth.train=[2, 6]", *privacy, "method.head=private", "train.rounds=1"), tmp_path / "run")
    assert summary["row"]["depth_mean"] == T
    assert summary["privacy"]["unit"] == "example"


# -- what cannot be ----------------------------------------------------------------------------------------------------

REFUSED = {
    "seven": (("depth.steps=7",), "depth.steps = 7: this albert applies its shared block 6 times; allowed: 1 to 6"),
    "trained": (("depth.train=[3, 9]",), "depth.train = 9: this albert"),
    "device": (("depth.device_steps=[3, 8]",), "depth.device_steps = 8: this albert"),
    "both": (("depth.steps=3", "depth.device_steps=[3, 6]"), 'allowed: steps = "full" or "auto"'),
    "nothing": (("depth.steps=auto",), "allowed: train, the numbers of steps to choose from"),
    "twice": (("depth.train=[3, 3]",), "each once"),
    "deep": (("depth.train=[4, 6]", "depth.device_steps=[3, 6]"), "at least one of train up to 3"),
    "shares": (("depth.device_steps=[3, 6]", "depth.device_shares=[0.5, 0.6]"), "allowed: a sum of 1"),
    "share": (("depth.device_shares=[1.0]",), "allowed: one a class"),
    "condensed": (("depth.train=[3, 6]", "method.name=feddm"), "allowed: depth.steps, or a method whose clients train"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(recipe: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    settings, line = REFUSED[name]
    with pytest.raises(FolkLoraError) as caught:
        run(recipe(*settings), tmp_path / "run")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["depth.steps=2", "depth.train=[1, 2]", "depth.device_steps=[1, 2]"])
def test_layers_of_their_own_are_refused(tiny_recipe: Callable[..., Recipe], tmp_path: Path, setting: str) -> None:
    with pytest.raises(FolkLoraError, match="this bert has 2 layers with weights of their own") as caught:
        run(tiny_recipe(setting), tmp_path / "run")
    assert setting.split("=")[0] in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_recipe_says_its_depth_and_says_it_again(recipe: Callable[..., Recipe]) -> None:
    asked = recipe(*AUTO, "depth.device_steps=[3, 6]", "depth.device_shares=[0.5, 0.5]")
    assert Recipe.from_toml(asked.to_toml()) == asked
    assert asked.depth.said
    assert not recipe().depth.said


def test_an_attack_knows_one_depth(recipe: Callable[..., Recipe], tmp_path: Path, folklora: Any) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe("depth.train=[2, 6]").to_toml())
    told = folklora("attack", path, "--attack", "dlg")
    assert told.code == 2
    assert "allowed: depth.steps alone" in told.err


def test_a_choice_is_checked() -> None:
    depths = Depths(6, {"a": 3, "b": 6}, (2, 3, 4), True, 0.1)
    assert (depths.training("a"), depths.choices("a"), depths.choices("b")) == ((2, 3), (2, 3), (2, 3, 4, 6))
    depths.check("a", 2, chosen=True)
    depths.check("a", None, chosen=False)
    for steps, chosen in ((4, True), (None, True), (2, False)):
        with pytest.raises(MessageError, match="allowed"):
            depths.check("a", steps, chosen=chosen)


def test_a_member_that_chose_nothing_says_so(recipe: Callable[..., Recipe], federated: Callable[..., Any]) -> None:
    fed = federated(recipe("depth.steps=3", "train.rounds=1"))
    fed.play()
    folder = fed.folder("0")
    assert predict(folder, "0", ["w1"]) == predict(folder, "0", ["w1"], depth=3)
    with pytest.raises(RunError, match="has chosen no depth") as caught:
        predict(folder, "0", ["w1"], depth="auto")
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="depth"):
        recipe("depth.step=3")
