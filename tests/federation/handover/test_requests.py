"""Requests out of a file: many clients' in one go, as one by one; what is wrong in it is one line, before all work."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.errors import DataError, FolkLoraError, RunError
from folklora.federation import requests as asking
from folklora.federation.answers import predict
from folklora.federation.requests import predict_requests
from folklora.federation.rescoring import evaluate
from folklora.federation.run import client_model, client_models
from folklora.federation.rundir import RunDirectory

Finished = Callable[..., Path]


def written(folder: Path, rows: Sequence[Any], name: str = "requests.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_texts_of_all_clients_are_answered_in_order_as_one_by_one(finished: Finished, tmp_path: Path) -> None:
    run = finished("text", "method.name=celora", "adapter.rank=[2,3]")
    rng = np.random.default_rng(0)
    rows = [
        {"client": str(rng.integers(2)), "text": " ".join(f"w{w}" for w in rng.integers(40, size=1 + i % 9))}
        for i in range(25)
    ]
    found = predict_requests(run, written(tmp_path, rows))
    assert [{name: each[name] for name in ("client", "text")} for each in found] == rows
    for row, answer in zip(rows, found, strict=True):
        (alone,) = predict(run, row["client"], [row["text"]])
        assert answer["label"] == alone["label"]
        assert answer["probability"] == pytest.approx(alone["probability"], abs=1e-5)
    rounded = predict_requests(run, written(tmp_path, rows), precision="bfloat16")
    gaps = [abs(one["probability"] - other["probability"]) for one, other in zip(found, rounded, strict=True)]
    assert 0 < max(gaps) < 0.1
    print(
        "labels that agree in bfloat16:",
        np.mean([a["label"] == b["label"] for a, b in zip(found, rounded, strict=True)]),
    )


def test_clients_may_be_named_by_numbers_and_blank_lines_are_none(finished: Finished, tmp_path: Path) -> None:
    rows = [{"client": 1, "text": "w1 w2"}, "", {"text": "w1 w2", "client": "1"}, "   "]
    one, other = predict_requests(finished("text"), written(tmp_path, rows))
    assert one == other
    assert list(one) == ["client", "text", "label", "probability"]


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_pictures_lie_beside_their_requests(finished: Finished, shown: Path, tmp_path: Path, name: str) -> None:
    run = finished(name)
    rows = [{"client": str(i % 2), "image": f"w{1 + i % 3}/{i}.png"} for i in range(7)]
    path = written(shown, rows, f"{name}-{tmp_path.name}.jsonl")
    found = predict_requests(run, path)
    path.unlink()
    assert [answer["image"] for answer in found] == [row["image"] for row in rows]
    for row, answer in zip(rows, found, strict=True):
        (alone,) = predict(run, row["client"], (), [shown / row["image"]])
        assert answer["label"] == alone["label"]
        assert answer["probability"] == pytest.approx(alone["probability"], abs=1e-5)


def test_each_picture_has_its_own_texts_to_choose_from(finished: Finished, shown: Path, tmp_path: Path) -> None:
    run = finished("captions")
    choices = (["w4 w1", "w4 w2 w7"], ["w11", "w3 {}", "w4 w1"], ["w4 w1", "w4 w2 w7"])
    rows = [{"client": str(i % 2), "image": f"w1/{i}.png", "texts": texts} for i, texts in enumerate(choices)]
    path = written(shown, rows, f"{tmp_path.name}.jsonl")
    found = predict_requests(run, path)
    path.unlink()
    for row, answer in zip(rows, found, strict=True):
        (alone,) = predict(run, row["client"], row["texts"], [shown / row["image"]])
        assert [each["text"] for each in answer["ranking"]] == [each["text"] for each in alone["ranking"]]
        numbers = [[each["probability"] for each in told["ranking"]] for told in (answer, alone)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_are_answered_in_one_batch_as_one_by_one(finished: Finished, tmp_path: Path, name: str) -> None:
    run = finished(name, "method.name=celora", "eval.max_new_tokens=6", "adapter.rank=[2,3]")
    rows = [
        {"client": str(i % 2), "prompt": " ".join(f"w{(7 * i + j) % 40}" for j in range(1 + i % 4))} for i in range(9)
    ]
    found = predict_requests(run, written(tmp_path, rows))
    assert [(each["client"], each["prompt"]) for each in found] == [(row["client"], row["prompt"]) for row in rows]
    for row, answer in zip(rows, found, strict=True):
        assert answer["answer"] == predict(run, row["client"], [row["prompt"]])[0]["answer"]
    assert len(predict_requests(run, written(tmp_path, rows), precision="bfloat16")) == 9


def test_a_diverged_client_says_nothing_and_harms_nobody(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished("text")
    rows = [{"client": str(i % 2), "text": f"w{i} w{i + 1}"} for i in range(10)]
    path = written(tmp_path, rows)
    before = predict_requests(run, path)

    def diverged(*arguments: Any, **named: Any) -> Any:
        models = client_models(*arguments, **named)
        for tensor in models["1"].tensors.values():
            tensor.fill_(torch.inf)
        return models

    monkeypatch.setattr(asking, "client_models", diverged)
    for i, (answer, was) in enumerate(zip(predict_requests(run, path, tmp_path / "out.jsonl"), before, strict=True)):
        if i % 2:
            assert (answer["label"], answer["probability"]) == (None, None)
        else:
            assert answer["label"] == was["label"]
            assert answer["probability"] == pytest.approx(was["probability"], abs=1e-5)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 10


def test_a_language_model_that_diverged_answers_null(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished("llama", "method.name=celora", "eval.max_new_tokens=6", "adapter.rank=[2,3]")
    path = written(tmp_path, [{"client": client, "prompt": "w1 w2"} for client in "010"])
    before = predict_requests(run, path)

    def diverged(*arguments: Any, **named: Any) -> Any:
        models = client_models(*arguments, **named)
        for tensor in models["1"].tensors.values():
            tensor.fill_(torch.nan)
        return models

    monkeypatch.setattr(asking, "client_models", diverged)
    assert predict_requests(run, path) == [before[0], {**before[1], "answer": None}, before[2]]


def test_an_answer_is_as_long_as_is_asked_for(finished: Finished, tmp_path: Path) -> None:
    run = finished("llama", "method.name=celora", "eval.max_new_tokens=6", "adapter.rank=[2,3]")
    path = written(tmp_path, [{"client": "0", "prompt": f"w{i} w{i + 1}"} for i in range(20)])
    one, six, many = ([each["answer"] for each in predict_requests(run, path, max_new_tokens=n)] for n in (1, 6, 20))
    assert predict_requests(run, path) == predict_requests(run, path, max_new_tokens=6)
    assert all(long.startswith(short) for long, short in zip(many + six, six + one, strict=True))
    assert sum(map(len, one)) < sum(map(len, six)) < sum(map(len, many))
    assert predict(run, "0", ["w3 w4"], max_new_tokens=1)[0]["answer"] == one[3]
    with pytest.raises(DataError, match="max_new_tokens = 0; allowed: 1 or more"):
        predict(run, "0", ["w1 w2"], max_new_tokens=0)
    with pytest.raises(DataError, match='max_new_tokens for a run with model.task = "classification"; allowed: with'):
        predict(finished("text"), "0", ["w1"], max_new_tokens=3)
    with pytest.raises(DataError, match="max_new_tokens for a run with"):
        predict_requests(finished("text"), path, max_new_tokens=3)


def test_a_prompt_that_is_cut_is_told(finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished("llama", "method.name=celora", "eval.max_new_tokens=6", "adapter.rank=[2,3]")
    rows = [{"client": str(i % 2), "prompt": "w1 " * length} for i, length in enumerate((2, 900, 3, 800))]
    predict_requests(run, written(tmp_path, rows))
    assert "2 of 4 prompts are cut on the left: it must fit into model.max_length = " in caplog.text


def test_answers_go_into_a_new_file(finished: Finished, tmp_path: Path) -> None:
    run, path = finished("text"), written(tmp_path, [{"client": "0", "text": "w1 Ä"}])
    found = predict_requests(run, path, tmp_path / "out" / "answers.jsonl")
    text = (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == found
    assert "Ä" in text
    with pytest.raises(RunError, match=r"answers\.jsonl already exists; nothing was overwritten"):
        predict_requests(run, path, tmp_path / "out" / "answers.jsonl")
    with pytest.raises(RunError, match="cannot be written"):
        predict_requests(run, path, "/proc/answers.jsonl")


def test_a_place_that_takes_no_answers_is_refused_before_there_are_any(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = finished("text"), written(tmp_path, [GOOD])
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(asking, "client_models", lambda *_: pytest.fail("models were loaded"))
    for place in ("/proc/answers.jsonl", tmp_path / "file" / "answers.jsonl"):
        with pytest.raises(RunError, match="cannot be written"):
            predict_requests(run, path, place)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_another_wrote_meanwhile_is_not_overwritten(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path, out = finished("text"), written(tmp_path, [GOOD]), tmp_path / "answers.jsonl"
    answer = asking.respond

    def slowly(*given: Any) -> Any:
        out.write_text("another's")
        return answer(*given)

    monkeypatch.setattr(asking, "respond", slowly)
    with pytest.raises(RunError, match=r"answers\.jsonl already exists; nothing was overwritten"):
        predict_requests(run, path, out)
    assert out.read_text() == "another's"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["answers.jsonl", "requests.jsonl"]


GOOD = {"client": "0", "text": "w1"}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("text", {"client": "7", "text": "w1"}, "line 3, column 'client': no client '7'; allowed: '0', '1'"),
        ("text", {"client": None, "text": "w1"}, "line 3, column 'client': missing; allowed: a string"),
        ("text", {"client": [1], "text": "w1"}, "line 3, column 'client': [1] is of type list; allowed: a string"),
        ("text", {"client": "0"}, "line 3: no 'text'; allowed: 'client', 'text'"),
        ("text", {"text": "w1"}, "line 3: no 'client'; allowed: 'client', 'text'"),
        ("text", {"client": "0", "text": " "}, "line 3, column 'text': empty; allowed: a non-empty string"),
        ("text", {"client": "0", "text": 5}, "line 3, column 'text': 5 is of type int; allowed: a non-empty string"),
        ("text", '{"client": "0", "text": "\\ud800"}', "line 3, column 'text': not valid Unicode"),
        ("text", {"client": "0", "text": "w1", "image": "x"}, "line 3: unknown 'image'; allowed: 'client', 'text'"),
        ("text", "[1, 2]", "line 3: [1, 2] is no JSON object; allowed: one JSON object a line"),
        ("text", '{"client": "0",', "line 3: not JSON: "),
        ("text", '{"client": "0", "client": "1", "text": "w1"}', "line 3: not JSON: 'client' is there twice"),
        ("llama", {"client": "0", "text": "w1"}, "line 3: unknown 'text'; allowed: 'client', 'prompt'"),
        ("vit", {"client": "0", "image": "absent.png"}, "line 3, column 'image': 'absent.png': no such file"),
        ("vit", {"client": "0", "image": "/etc/passwd"}, "'/etc/passwd' leads out of the folder"),
        ("vit", {"client": "0", "image": "../x.png"}, "'../x.png' leads out of the folder"),
        ("vit", {"client": "0", "image": "requests.jsonl"}, "line 3, column 'image': not a picture"),
        ("vit", {"client": "0", "image": "w1/0.png", "texts": ["a"]}, "unknown 'texts'; allowed: 'client', 'image'"),
        ("captions", {"client": "0", "image": "w1/0.png"}, "no 'texts'; allowed: 'client', 'image', 'texts'"),
        ("clip", {"client": "0", "image": "w1/0.png", "texts": []}, "[]; allowed: a list of texts to choose from"),
        (
            "clip",
            {"client": "0", "image": "w1/0.png", "texts": ["a", ""]},
            "column 'texts': empty; allowed: a non-empty",
        ),
        ("clip", {"client": "0"}, "no 'image'; allowed: 'client', 'image', and perhaps 'texts'"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_is_answered(
    finished: Finished,
    shown: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    row: Any,
    expected: str,
) -> None:
    run = finished(name)
    good = {
        "text": GOOD,
        "llama": {"client": "0", "prompt": "w1"},
        "captions": {"client": "0", "image": "w1/1.png", "texts": ["w1", "w2"]},
    }.get(name, {"client": "0", "image": "w1/1.png"})
    (tmp_path / "w1").symlink_to(shown / "w1")
    here = tmp_path / "real"
    here.mkdir()
    for file in ("0.png", "1.png"):
        (here / "w1").mkdir(exist_ok=True)
        (here / "w1" / file).write_bytes((shown / "w1" / file).read_bytes())
    path = written(here, [good, "", row, good])
    monkeypatch.setattr(asking, "client_models", lambda *_: pytest.fail("models were loaded"))
    with pytest.raises(DataError) as caught:
        predict_requests(run, path, here / "out.jsonl")
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert not (here / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "empty file"), (b"\n \n", "empty file"), (b"\xff", "not UTF-8")]
)
def test_a_file_without_requests(finished: Finished, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "requests.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=expected):
        predict_requests(finished("text"), tmp_path / "requests.jsonl")
    for absent in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            predict_requests(finished("text"), absent)


@pytest.mark.parametrize("method", ["fedit", "celora", "fedex", "apfl", "fedamole"])
def test_models_of_all_clients_are_those_of_each(finished: Finished, method: str) -> None:
    run = finished("text", f"method.name={method}")
    together = client_models(run)
    assert list(together) == ["0", "1"]
    for client, model in together.items():
        alone = client_model(run, client)
        assert model.rank == alone.rank
        assert model.tensors.keys() == alone.tensors.keys()
        assert all(torch.equal(tensor, alone.tensors[name]) for name, tensor in model.tensors.items())
    with pytest.raises(RunError, match="no client 'x'; allowed: '0', '1'"):
        client_models(run, ["0", "x"])


@pytest.mark.parametrize("method", ["celora", "fedex", "fedamole"])
def test_what_is_served_is_what_was_evaluated(finished: Finished, method: str) -> None:
    """In float32 the test split gives the run's own numbers, client by client."""
    run = finished("text", f"method.name={method}")
    summary = json.loads((run / "summary.json").read_text())
    found = evaluate(run, "test")
    assert found["run"] == summary["row"]["accuracy_mean"]
    assert found["mean"] == pytest.approx(summary["row"]["accuracy_mean"])
    assert found["clients"] == pytest.approx({k: each["accuracy"] for k, each in summary["clients"].items()})
    last = RunDirectory(run).metrics()[-1]["validation"]
    assert evaluate(run)["clients"] == pytest.approx(last["clients"])
    assert evaluate(run, precision="bfloat16")["precision"] == "bfloat16"


def test_a_language_model_is_evaluated_by_its_loss(finished: Finished) -> None:
    run = finished("llama", "method.name=fedit")
    row = json.loads((run / "summary.json").read_text())["row"]
    found = evaluate(run, "test")
    assert (found["metric"], found["mean"]) == ("loss", pytest.approx(row["loss_mean"], rel=1e-5))
    rounded = evaluate(run, "test", precision="bfloat16")
    assert 0 < abs(rounded["mean"] - found["mean"]) < 0.05 * found["mean"]


def test_the_test_split_is_for_finished_runs(finished: Finished, tmp_path: Path) -> None:
    import shutil

    run = shutil.copytree(finished("text"), tmp_path / "run")
    (run / "summary.json").unlink()
    with pytest.raises(FolkLoraError, match="the test split is read when all rounds are over; allowed: --split valid"):
        evaluate(run, "test")
    assert evaluate(run)["split"] == "validation"
    for damaged in ("{}", "[1]", '{"row": {}}'):
        (run / "summary.json").write_text(damaged)
        with pytest.raises(RunError, match=r"summary\.json: row: no accuracy_mean"):
            evaluate(run, "test")


def test_a_member_answers_requests_out_of_its_own_folder(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], tmp_path: Path
) -> None:
    fed = federated(tiny_recipe("method.name=celora", "train.rounds=1"))
    fed.play()
    path = written(tmp_path, [{"client": "2", "text": text} for text in ("w1 w2", "w40")])
    found = predict_requests(fed.folder("2"), path)
    assert found == [{"client": "2", **answer} for answer in predict(fed.folder("2"), "2", ["w1 w2", "w40"])]
    with pytest.raises(DataError, match="no client '2'; allowed: '1'"):
        predict_requests(fed.folder("1"), path)
    with pytest.raises(RunError, match="the members' models are at the members"):
        predict_requests(fed.path, path)
    with pytest.raises(RunError, match="a member's folder has no rows to evaluate on"):
        evaluate(fed.folder("2"))
