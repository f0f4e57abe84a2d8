"""The command line: results on stdout, everything else on stderr; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from folklora.federation import run as library
from folklora.methods import METHODS
from folklora.recipe import Recipe

CLASSES = ("amber", "blue", "cyan", "dun")
ROW = {  # the list, and what the report needs beside it
    "method",
    "seed",
    "metric",
    "higher",
    "accuracy_mean",
    "accuracy_std_clients",
    "accuracy_worst_tenth",
    "accuracy_weighted",
    "accuracy_global",
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
    "bytes_once_per_client",
    "rounds",
    "seconds_train",
    "seconds_total",
    "aggregation_error",
}


Command = Callable[..., Any]  # the fixture `folklora`


@pytest.fixture(scope="module")
def document(tiny_model: Callable[[str], Path], tiny_data: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_model("bert")), "dtype": "float32"},
        "data": {"source": str(tiny_data), "clients": 4, "alpha": 1.0},
        "adapter": {"rank": 4},
        "method": {"name": "fedit"},
        "train": {"rounds": 2, "batch_size": 8, "lr": 5e-3},
    }


@pytest.fixture(scope="module")
def recipe(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(Recipe.parse(document).to_toml())
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "fedit"
    library.run(Recipe.read(recipe), path)
    return path


def mistake(ran: Any) -> str:
    """The one line of a user's mistake."""
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    assert "Traceback" not in ran.err
    return ran.err


# -- run, resume, report -----------------------------------------------------------------------------------------------


def test_run_shows_progress_a_table_and_where_the_report_is(folklora: Command, recipe: Path, tmp_path: Path) -> None:
    ran = folklora("run", recipe, "--out", tmp_path / "run", "--set", "train.rounds=3", "--set", "method.name=celora")
    assert ran.code == 0
    assert ran.err.count("round ") == 3
    assert "round   3 · loss " in ran.err
    assert "kB moved" in ran.err
    assert "celora" in ran.out
    assert f"report: {tmp_path / 'run' / 'report.html'}\n" in ran.out
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert Recipe.read(tmp_path / "run" / "recipe.toml").train.rounds == 3
    assert "already holds a run" in mistake(folklora("run", recipe, "--out", tmp_path / "run"))

    again = folklora("resume", tmp_path / "run")
    assert again.code == 0
    assert again.out == ran.out
    (tmp_path / "run" / "report.html").unlink()
    report = folklora("report", tmp_path / "run")
    assert report.code == 0
    assert report.out == f"report: {tmp_path / 'run' / 'report.html'}\n"
    assert (tmp_path / "run" / "report.html").exists()


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare_prints_one_json_document_and_nothing_else(folklora: Command, recipe: Path, tmp_path: Path) -> None:
    entries = "local,fedit,celora:similarity=uniform:train.lr=2e-3"
    command = ("compare", recipe, "--methods", entries, "--seeds", 2, "--out", tmp_path, "--json")
    ran = folklora(*command)
    assert ran.code == 0
    document = json.loads(ran.out)
    assert document == json.loads((tmp_path / "compare.json").read_text())
    assert [(row["method"], row["seed"]) for row in document["rows"]] == [
        (name, seed) for seed in (0, 1) for name in ("local", "fedit", "celora")
    ]
    for row in document["rows"]:
        assert row.keys() >= ROW
        for key in ROW - {"method", "metric", "accuracy_global", "aggregation_error"}:
            assert isinstance(row[key], int | float), key
        assert (row["accuracy_global"] is None) == (row["method"] != "fedit")
        assert (row["aggregation_error"] is None) == (row["method"] == "local")
        assert 0 <= row["accuracy_worst_tenth"] <= row["accuracy_mean"] <= 1
        assert 0 < row["seconds_train"] < row["seconds_total"]
    assert [row["variant"] for row in document["rows"][:3]] == entries.split(",")
    for name, row in zip(document["runs"], document["rows"], strict=True):
        saved = Recipe.read(tmp_path / name / "recipe.toml")
        assert (saved.method.name, saved.seed) == (row["method"], row["seed"])
        assert saved.train.lr == (2e-3 if row["method"] == "celora" else 5e-3)
        assert saved.method.options == ({"similarity": "uniform"} if row["method"] == "celora" else {})
    assert (tmp_path / "report.html").exists()
    for name in ("local", "fedit", "celora"):
        assert name in ran.err

    # What is finished is reused, what is not goes on, and one more method costs one more run.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint.json")}
    (tmp_path / document["runs"][1] / "summary.json").unlink()
    longer = folklora(*command[:3], f"{entries},ffa", *command[4:])
    assert longer.code == 0
    rows = json.loads(longer.out)["rows"]
    assert [row for row in rows if row["method"] in ("local", "celora")] == [
        row for row in document["rows"] if row["method"] != "fedit"
    ]
    resumed = next(row for row in rows if (row["method"], row["seed"]) == ("fedit", 0))
    for key in ROW - {"seconds_total", "seconds_train"}:
        assert resumed[key] == document["rows"][1][key]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(rows) == 8

    message = mistake(folklora(*command, "--set", "train.rounds=1"))
    assert "holds a run of another recipe" in message
    assert {path: path.stat().st_mtime_ns for path in before} == before

    report = folklora("report", tmp_path)
    assert report.out == f"report: {tmp_path / 'report.html'}\n"


def test_compare_refuses_what_a_method_cannot_do_before_any_work(
    folklora: Command, recipe: Path, tmp_path: Path
) -> None:
    ran = folklora("compare", recipe, "--methods", "fedit,fedit:scaffold=true", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "scaffold" in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_compare_refuses_runs_that_are_judged_differently_before_any_work(
    folklora: Command, recipe: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    words = "local:model.task=causal-lm:model.template=say {}:data.prompt=text:data.response=label:data.label=label"
    on_gpt2 = ("--set", f"model.name={tiny_model('gpt2')}")
    ran = folklora("compare", recipe, "--methods", f"local,{words}", "--out", tmp_path / "out", *on_gpt2)
    assert "local by accuracy and local:model.task=causal-lm" in mistake(ran)
    assert "by loss: runs that are judged differently cannot be compared; allowed: one metric" in ran.err
    assert not (tmp_path / "out").exists()


def test_compare_without_json_shows_a_table(folklora: Command, recipe: Path, tmp_path: Path) -> None:
    methods = "local, sketch:adapter.rank=[1,2,3,4]"
    ran = folklora("compare", recipe, "--methods", methods, "--out", tmp_path)
    assert ran.code == 0
    assert Recipe.read(tmp_path / "sketch__adapter.rank=[1,2,3,4]-s0" / "recipe.toml").adapter.rank == [1, 2, 3, 4]
    assert "local" in ran.out
    assert "sketch" in ran.out
    assert f"report: {tmp_path / 'report.html'}" in ran.out


def test_compare_keeps_what_the_recipe_cannot_spell_in_toml(recipe: Path, tmp_path: Path) -> None:
    """No clipping is no value, and no value is not the default here."""
    unclipped = Recipe.read(recipe, ["train.clip=none"])
    assert library.variant(unclipped, "local", 0).train.clip is None
    for _ in range(2):  # and what was written is the same recipe when it is read back
        library.compare(unclipped, ["local"], 1, tmp_path)
    assert Recipe.read(tmp_path / "local-s0" / "recipe.toml").train.clip is None


def test_options_of_the_recipe_go_to_the_method_it_names(document: dict[str, Any]) -> None:
    recipe = Recipe.parse({**document, "method": {"name": "celora", "basis": "frozen", "lambda": 0.3}})
    assert library.variant(recipe, "celora", 0).method.options == {"basis": "frozen", "lambda": 0.3}
    assert library.variant(recipe, "celora:basis=aligned", 0).method.options == {"basis": "aligned", "lambda": 0.3}
    assert library.variant(recipe, "fedit", 3).method.options == {}
    assert library.variant(recipe, "fedit", 3).seed == 3
    assert library.variant(recipe, "fedit:data.alpha=0.1", 0).data.alpha == 0.1


# -- methods, inspect --------------------------------------------------------------------------------------------------


def test_methods_in_json_and_as_a_table(folklora: Command) -> None:
    described = json.loads(folklora("methods", "--json", "--d-in", 64, "--d-out", 32, "--rank", 4).out)
    assert {entry["name"] for entry in described} == set(METHODS)
    by_name = {entry["name"]: entry for entry in described}
    assert by_name["celora"]["bytes_per_layer_up"] == 4 * 4 * 4
    assert by_name["fedit"]["bytes_per_layer_down"] == (64 + 32) * 4 * 4
    table = folklora("methods")
    assert table.code == 0
    for name in METHODS:
        assert name in table.out
    assert "2503.23869" in table.out


def test_inspect_trains_nothing(
    folklora: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(folklora("inspect", recipe, "--json").out)
    assert list(found["clients"]) == list("0123")
    assert found["method"]["name"] == "fedit"
    shown = folklora("inspect", recipe, "--set", "method.name=celora")
    assert shown.code == 0
    assert "celora: 2 rounds" in shown.out
    assert "4 clients, 4 classes, common test set: 60" in shown.out
    assert not list(tmp_path.iterdir())


def test_names_with_brackets_are_no_markup(
    folklora: Command, document: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """Classes, clients and folders are the user's words."""
    with (tiny_data / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "site"])
        for i, row in enumerate(rows):
            writer.writerow([row["text"], f"[/red]{row['label']}", ("[bold]", "[/x]", "..", "a/b")[i % 4]])
    data = {"source": str(tmp_path / "data.csv"), "partition": "natural", "by": "site"}
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe.parse({**document, "data": data}).to_toml())
    shown = folklora("inspect", path)
    assert shown.code == 0
    assert "[/x]" in shown.out
    assert "[/red]amber" in shown.out
    out = tmp_path / "[run]"
    ran = folklora(
        "run", path, "--out", out, "--set", "train.failures=0.5", "--set", "train.rounds=1", "--set", "seed=3"
    )
    assert ran.code == 0
    assert f"report: {out / 'report.html'}" in ran.out
    assert "failed: " in ran.err
    answered = folklora("predict", out, "w1 [bold] :100: a\x1b[2J", "--client", "..")
    assert answered.code == 0
    assert "w1 [bold] :100: a\\x1b[2J\n" in answered.out
    assert answered.out.startswith("[/red]")


def test_wrong_words_and_pictures_are_one_line_and_no_run_is_begun(
    folklora: Command, tiny_speaker: Path, tiny_chats: Path, seeing_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in tiny_chats.read_text().splitlines()]

    def told(model: dict[str, Any], source: Path, *changes: str) -> str:
        data = {"source": str(source), "clients": 2, "partition": "iid"}
        path = tmp_path / "recipe.toml"
        path.write_text(Recipe.parse({"model": {"device": "cpu", **model}, "data": data}, changes).to_toml())
        line = mistake(folklora("run", path, "--out", tmp_path / "run"))
        assert not (tmp_path / "run").exists()
        return line

    speaker = {"name": str(tiny_speaker), "task": "causal-lm"}
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({**row, "response": "" if i == 6 else "w1"}) for i, row in enumerate(rows)))
    assert f"{file}: line 7, column 'response': empty; allowed: a non-empty string" in told(speaker, file)
    talk = [{"role": role, "content": "w1"} for role in ("user", "assistant", "user", "assistant")]
    file.write_text("\n".join(json.dumps({"talk": talk}) for _ in rows))
    line = told(speaker, file, "data.messages=talk")
    assert f"{file}: line 1: a conversation of the roles user, assistant, user, assistant needs a chat template" in line

    for label in ("w1", "w2"):
        (tmp_path / "shown" / label).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (9, 9), (20 * i, 90, 9)).save(tmp_path / "shown" / label / f"{i}.png")
    broken = tmp_path / "shown" / "w2" / "4.png"
    broken.write_bytes(broken.read_bytes()[:50])
    looker = {"name": str(seeing_model("clip")), "task": "image-text"}
    line = told(looker, tmp_path / "shown", "data.image=image")
    assert "shown: w2/4.png, column 'image': damaged or cut off: " in line
    assert "; allowed: a PNG, JPEG, WEBP, BMP or GIF picture" in line


# -- export, predict ---------------------------------------------------------------------------------------------------


def test_predict_is_the_model_that_was_evaluated(folklora: Command, finished: Path, tiny_data: Path) -> None:
    """Each client's own test examples through the command give the accuracy that the run reported."""
    with (tiny_data / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    splits = json.loads((finished / "partition.json").read_text())["clients"]
    summary = json.loads((finished / "summary.json").read_text())["clients"]
    for client in ("0", "3"):
        texts = [rows[i]["text"] for i in splits[client]["test"]]
        answers = json.loads(folklora("predict", finished, *texts, "--client", client, "--json").out)
        assert [answer["text"] for answer in answers] == texts
        assert all(answer["label"] in CLASSES and 1 / 4 <= answer["probability"] <= 1 for answer in answers)
        right = [answer["label"] == rows[i]["label"] for answer, i in zip(answers, splits[client]["test"], strict=True)]
        assert sum(right) / len(right) == pytest.approx(summary[client]["accuracy"])


def test_requests_of_many_clients_are_answered_as_lines(folklora: Command, finished: Path, tmp_path: Path) -> None:
    asked = [("3", "w1 w2"), ("0", "w40 [bold]"), ("3", "w9")]
    lines = [json.dumps({"client": client, "text": text}) for client, text in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    ran = folklora("predict", finished, "--requests", tmp_path / "asked.jsonl")
    assert (ran.code, ran.err) == (0, "")
    said = [json.loads(line) for line in ran.out.splitlines()]
    assert [(each["client"], each["text"]) for each in said] == asked
    for client, text in asked:
        (alone,) = json.loads(folklora("predict", finished, text, "--client", client, "--json").out)
        assert alone["label"] == said[asked.index((client, text))]["label"]
    command = ("predict", finished, "--requests", tmp_path / "asked.jsonl")
    assert json.loads(folklora(*command, "--json").out) == said
    assert folklora(*command, "--out", tmp_path / "said.jsonl").out == f"answers: {tmp_path / 'said.jsonl'}\n"
    assert (tmp_path / "said.jsonl").read_text() == ran.out
    assert "already exists" in mistake(folklora(*command, "--out", tmp_path / "said.jsonl"))
    (tmp_path / "asked.jsonl").write_text(lines[0] + '\n{"client": "9", "text": "w1"}')
    assert "asked.jsonl: line 2, column 'client': no client '9'; allowed: '0', '1'" in mistake(folklora(*command))
    rounded = folklora("predict", finished, "w1 w2", "--client", "3", "--dtype", "bfloat16", "--json")
    assert json.loads(rounded.out)[0]["probability"] != said[0]["probability"]


def test_evaluate_says_what_the_run_said(folklora: Command, finished: Path) -> None:
    row = json.loads((finished / "summary.json").read_text())["row"]
    shown = f"{100 * row['accuracy_mean']:.1f} %"
    ran = folklora("evaluate", finished, "--split", "test")
    assert ran.out.startswith(f"accuracy on test, 4 clients, float32: {shown}, worst tenth ")
    assert ran.out.endswith(f"; the run said {shown}\n")
    found = json.loads(folklora("evaluate", finished, "--dtype", "bfloat16", "--json").out)
    assert (found["split"], found["precision"], list(found["clients"])) == (
        "validation",
        "bfloat16",
        ["0", "1", "2", "3"],
    )


def test_export_writes_a_folder_once(folklora: Command, finished: Path, tmp_path: Path) -> None:
    ran = folklora("export", finished, "--client", "1", "--to", tmp_path / "peft")
    assert ran.code == 0
    assert ran.out == f"adapter: {tmp_path / 'peft'}\n"
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4
    mistake(folklora("export", finished, "--client", "1", "--to", tmp_path / "peft"))
    assert folklora("export", finished, "--client", "1", "--to", tmp_path / "tuned", "--tuned").code == 0
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "tuned"))
    assert one != other  # FedIT: the server's mean, and the client's own training


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "absent.toml"), "absent.toml: no such recipe file"),
        (("run", "."), "cannot be read as text"),
        (("run", "{recipe}", "--set", "train.rouds=3"), "unknown key `train.rouds`; did you mean `rounds`?"),
        (("run", "{recipe}", "--set", "train.lr=fast"), "train.lr = 'fast'"),
        (("run", "{recipe}", "--set", "nonsense"), "key=value"),
        (("run", "{recipe}", "--set", "method.name=fedti"), "did you mean 'fedit'"),
        (("run", "{recipe}", "--set", "method.similarity=data"), "unknown key `method.similarity`"),
        (("run", "{recipe}", "--set", "data.source=absent.csv"), "absent.csv"),
        (("run", "{recipe}", "--set", "model.name=/absent/model"), "/absent/model"),
        (("run", "{recipe}", "--set", "data.label=topic"), "no column 'topic'"),
        (("run", "{recipe}", "--set", "data.clients=1000"), "data.clients = 1000"),
        (("run", "{recipe}", "--set", "adapter.rank=[1,2]"), "one rank a client"),
        (("run", "{recipe}", "--set", "adapter.rank=[1,2,3,4]"), "method.name = 'fedit'"),
        (("run", "{recipe}", "--set", "adapter.rank=64"), "adapter.rank = 64"),
        (("run", "{recipe}", "--set", "adapter.targets=nothing"), "adapter.targets = 'nothing'"),
        (("run", "{recipe}", "--out", "/dev/null/run"), "cannot be written"),
        (("run", "{recipe}", "--out", "/proc/run"), "cannot be written"),
        (("inspect", "absent.toml"), "no such recipe file"),
        (("inspect", "{recipe}", "--set", "method.name=x"), "method.name = 'x'"),
        (("compare", "{recipe}", "--methods", "fedit,celoar"), "did you mean 'celora'"),
        (("compare", "{recipe}", "--methods", "fedit,fedit"), "names 'fedit' twice"),
        (("compare", "{recipe}", "--methods", " , "), "--methods is empty"),
        (("compare", "{recipe}", "--methods", "celora:basis=round"), "method.basis = 'round'"),
        (("compare", "{recipe}", "--methods", "celora:basis"), "key=value"),
        (("resume", "absent"), "not a run directory"),
        (("resume", "{finished}/server"), "not a run directory"),
        (("report", "absent"), "absent"),
        (("export", "{finished}", "--client", "9", "--to", "x"), "no client '9'; allowed: '0', '1', '2', '3'"),
        (("predict", "{finished}", "text", "--client", "nobody"), "no client 'nobody'"),
        (("predict", "{finished}", "text", " ", "--client", "0"), "text 2 is empty"),
        (("predict", "absent", "text", "--client", "0"), "not a run directory"),
        (("predict", "{finished}", "--requests", "absent.jsonl"), "absent.jsonl: cannot be read"),
        (("predict", "absent", "--requests", "absent.jsonl"), "not a run directory"),
        (("evaluate", "absent"), "not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    expected: str,
    folklora: Command,
    recipe: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(recipe=recipe, finished=finished) for argument in arguments]
    assert expected in mistake(folklora(*filled))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("run",), ("inspect",), ("compare", "--methods", "fedit")])
def test_what_only_the_backbone_can_refuse_leaves_nothing_behind(
    command: tuple[str, ...],
    folklora: Command,
    recipe: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("--set", "train.packed=always", "--set", f"model.name={tiny_model('llama')}")
    assert 'train.packed = "always": llama has no packed path' in mistake(folklora(*command, recipe, *settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("rnu",),
        ("run",),
        ("run", "{recipe}", "--ouT", "x"),
        ("run", "{recipe}", "extra"),
        ("compare", "{recipe}"),
        ("compare", "{recipe}", "--methods", "fedit", "--seeds", "0"),
        ("compare", "{recipe}", "--methods", "fedit", "--seeds", "two"),
        ("methods", "--rank", "0"),
        ("predict", "{finished}"),
        ("predict", "{finished}", "text"),
        ("predict", "{finished}", "text", "--client", "0", "--out", "x"),
        ("predict", "{finished}", "--requests", "x", "--client", "0"),
        ("predict", "{finished}", "text", "--requests", "x"),
        ("predict", "{finished}", "--requests", "x", "--dtype", "float16"),
        ("evaluate", "{finished}", "--split", "train"),
        ("export", "{finished}", "--client", "0"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: tuple[str, ...], folklora: Command, recipe: Path, finished: Path
) -> None:
    ran = folklora(*(argument.format(recipe=recipe, finished=finished) for argument in arguments))
    assert ran.code == 2
    assert ran.out == ""
    assert "Usage: folklora" in ran.err
    assert "Traceback" not in ran.err


def test_help_for_everybody(folklora: Command) -> None:
    ran = folklora("--help")
    assert ran.code == 0
    for command in ("run", "compare", "resume", "report", "methods", "inspect", "export", "predict"):
        assert command in ran.out
        assert folklora(command, "--help").code == 0


def test_a_mistake_of_ours_keeps_its_traceback(
    folklora: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(library, "run", broken)
    with pytest.raises(KeyError, match="ours"):
        folklora("run", recipe, "--out", tmp_path / "run")


def test_the_installed_command(tmp_path: Path) -> None:
    """The real thing once: exit code, streams, and no bar drawn into a pipe."""
    command = Path(sys.executable).with_name("folklora")
    start = [str(command)] if command.exists() else [sys.executable, "-m", "folklora.cli"]
    found = subprocess.run(
        [*start, "run", "absent.toml"], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "error: absent.toml: no such recipe file\n"


def test_export_of_a_coarse_backbone_says_so(folklora: Command, recipe: Path, tmp_path: Path) -> None:
    ran = folklora("run", recipe, "--out", tmp_path / "run", "--set", "model.bits=4", "--set", "train.rounds=1")
    assert ran.code == 0
    exported = folklora("export", tmp_path / "run", "--client", "0", "--to", tmp_path / "adapter")
    assert exported.code == 0
    assert "a backbone of 4 bits" in exported.err


def test_the_options_of_one_method(folklora: Command) -> None:
    shown = folklora("methods", "celora")
    assert shown.code == 0
    assert "method.temperature" in shown.out
    assert json.loads(folklora("methods", "celora", "--json").out)["name"] == "celora"
    unknown = folklora("methods", "celara")
    assert unknown.code == 2
    assert "did you mean 'celora'" in unknown.err


def test_a_peers_words_forge_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    from folklora.terminal import at_work

    with at_work("go on"):
        logging.getLogger("folklora.federation").warning("site-1: %s", "no\n12:00:00 all is well\x1b[2J")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("site-1: no\\n12:00:00 all is well\\x1b[2J\n")
