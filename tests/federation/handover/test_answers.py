"""Asking a client's own model: about texts and pictures, with labels, with candidates, with prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folklora.data.pictures import read_picture
from folklora.errors import DataError, RunError
from folklora.federation.answers import predict
from folklora.federation.handover import merge
from folklora.federation.rundir import RunDirectory
from folklora.recipe import Recipe

Finished = Callable[..., Path]

CLASSES = ("w1", "w2", "w3")


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_pictures_get_the_labels_that_were_evaluated(finished: Finished, shown: Path, name: str) -> None:
    """Each client's own test pictures give the accuracy that the run reported."""
    run = finished(name)
    splits = json.loads((run / "partition.json").read_text())["clients"]
    summary = json.loads((run / "summary.json").read_text())["clients"]
    every = sorted(shown.glob("*/*.png"))
    for client in ("0", "1"):
        asked = [every[i] for i in splits[client]["test"]]
        answers = predict(run, client, (), asked)
        assert [answer["image"] for answer in answers] == list(map(str, asked))
        assert all(answer["label"] in CLASSES and 1 / 3 <= answer["probability"] <= 1 for answer in answers)
        right = [answer["label"] == file.parent.name for answer, file in zip(answers, asked, strict=True)]
        assert sum(right) / len(right) == pytest.approx(summary[client]["accuracy"])


@pytest.mark.parametrize("name", ["clip", "captions"])
def test_texts_are_ranked_for_a_picture_as_the_merged_model_ranks_them(
    finished: Finished, shown: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    run = finished(name, "method.name=celora")
    texts, asked = ["w4 w1", "w4 w2 w7", "w11", "w3 {}"], [shown / "w1" / "0.png", shown / "w3" / "4.png"]
    answers = predict(run, "0", texts, asked)
    assert [answer["image"] for answer in answers] == list(map(str, asked))
    merge(run, "0", tmp_path / "merged")
    stock = AutoModel.from_pretrained(tmp_path / "merged").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")(texts, padding=True, return_tensors="pt")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    pixels = processor([read_picture(file) for file in asked], return_tensors="pt")
    with torch.no_grad():
        found = stock(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], **pixels)
    for answer, wanted in zip(answers, found.logits_per_image.softmax(1), strict=True):
        told = {each["text"]: each["probability"] for each in answer["ranking"]}
        assert [told[text] for text in texts] == pytest.approx(wanted.tolist(), abs=1e-4)
        assert list(told.values()) == sorted(told.values(), reverse=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompt_is_answered_as_the_merged_model_goes_on(finished: Finished, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = finished(name, "method.name=celora", "eval.max_new_tokens=6")
    prompts = ["w1 w2", "w20 w21 w22", "w7"]
    answers = predict(run, "1", prompts)
    assert [answer["text"] for answer in answers] == prompts
    merge(run, "1", tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    template = json.loads((tmp_path / "merged" / "task.json").read_text())["template"]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(template.format(prompt), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tokenizer("")["input_ids"][:1] + ids])
        for _ in range(6):
            with torch.no_grad():
                token = stock(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], dim=1)
        said = ids[0, -6:].tolist()
        end = said.index(tokenizer.sep_token_id) if tokenizer.sep_token_id in said else None
        assert answer["answer"] == tokenizer.decode(said[:end], skip_special_tokens=True)
    assert len({answer["answer"] for answer in answers}) > 1


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(shown: Path, tmp_path: Path) -> dict[str, Path]:
    cut = tmp_path / "cut.png"
    cut.write_bytes((shown / "w1" / "0.png").read_bytes()[:100])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    return {name: tmp_path / f"{name}.png" for name in ("cut", "text", "empty", "absent")} | {"folder": tmp_path}


@pytest.mark.parametrize("problem", ["cut", "text", "empty", "absent", "folder"])
def test_a_picture_that_is_none_is_one_line(
    finished: Finished, shown: Path, broken: dict[str, Path], problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        predict(finished("vit"), "0", (), [shown / "w1" / "0.png", broken[problem]])
    assert str(broken[problem]) in str(caught.value)
    assert "allowed:" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "texts", "images", "expected"),
    [
        ("text", [], 0, "nothing .* allowed: texts"),
        ("text", ["w1"], 1, "1 texts and 1 pictures .* allowed: texts"),
        ("text", ["w1", " "], 0, "text 2 is empty"),
        ("text", ["w1", "w\udcff"], 0, "text 2 is not valid Unicode"),  # as Python reads an argument that is no UTF-8
        ("vit", ["w1"], 0, 'model.task = "classification"; allowed: pictures'),
        ("vit", ["w1"], 1, "allowed: pictures"),
        ("clip", ["w1"], 0, "allowed: pictures, perhaps with texts to choose from"),
        ("clip", ["w1", ""], 1, "text 2 is empty"),
        ("captions", [], 1, "allowed: pictures, and texts to choose from"),
        ("llama", [], 1, 'model.task = "causal-lm"; allowed: texts'),
    ],
)
def test_what_a_task_is_not_asked(
    finished: Finished, shown: Path, name: str, texts: list[str], images: int, expected: str
) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        predict(finished(name), "0", texts, [shown / "w1" / "0.png"] * images)
    assert "\n" not in str(caught.value)


def test_an_unknown_client_is_one_line(finished: Finished, shown: Path) -> None:
    with pytest.raises(RunError, match="no client '9'; allowed: '0', '1'"):
        predict(finished("vit"), "9", (), [shown / "w1" / "0.png"])


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_commands(
    finished: Finished, shown: Path, tmp_path: Path, folklora: Callable[..., tuple[int, str, str]]
) -> None:
    run, picture = finished("clip"), tmp_path / "[red] a.png"
    shutil.copyfile(shown / "w2" / "1.png", picture)
    asked = ("--client", "1", "--image", picture)
    code, said, noise = folklora("predict", run, *asked, "--image", shown / "w1" / "0.png", "--json")
    assert code == 0, noise
    assert json.loads(said) == predict(run, "1", (), [picture, shown / "w1" / "0.png"])
    code, said, _ = folklora("predict", run, *asked, "w4 w1", "w5")
    (answer,) = predict(run, "1", ["w4 w1", "w5"], [picture])
    lines = [f"{each['text']}  ({100 * each['probability']:.1f} %)  {picture}" for each in answer["ranking"]]
    assert (code, said.splitlines()) == (0, lines)
    code, said, noise = folklora("predict", run, "--client", "1", "--image", tmp_path / "absent.png")
    assert (code, said, noise.count("\n")) == (2, "", 1)
    assert noise == f"error: {tmp_path / 'absent.png'}: no such file; allowed: a PNG, JPEG, WEBP, BMP or GIF picture\n"
    merged = ("merge", run, "--client", "1", "--to", tmp_path / "merged")
    assert folklora(*merged)[:2] == (0, f"model: {tmp_path / 'merged'}\n")
    code, said, noise = folklora(*merged)
    assert (code, said, noise.count("\n")) == (2, "", 1)


def test_an_answer_is_printed(finished: Finished, folklora: Callable[..., tuple[int, str, str]]) -> None:
    code, said, noise = folklora("predict", finished("llama"), "--client", "0", "w1 w2")
    (answer,) = predict(finished("llama"), "0", ["w1 w2"])
    assert (code, said) == (0, f"{answer['answer']}\n"), noise


@pytest.mark.parametrize(
    ("answer", "seen"),
    [("1:100:5 [red]\n:smile:", "1:100:5 [red]\n:smile:"), ("a\x1b[2Jb", "a\\x1b[2Jb"), (None, "no finite number")],
)
def test_what_a_model_says_is_shown_as_it_is(
    finished: Finished,
    folklora: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    seen: str,
) -> None:
    said = [{"text": "w1", "answer": answer}]
    monkeypatch.setattr("folklora.federation.answers.predict", lambda *given, **named: said)
    code, out, _ = folklora("predict", finished("llama"), "--client", "0", "w1")
    assert (code, out) == (0, f"{seen}\n" if answer else "no finite number: the model of client 0 diverged  w1\n")


def test_a_member_asks_its_own_folder(finished: Finished, shown: Path, federated: Any) -> None:
    document = RunDirectory.open(finished("vit")).recipe.model_dump()
    document["engine"]["kind"] = "flower"
    fed = federated(Recipe.parse(document), ("0", "1"))
    fed.play()
    asked = [shown / "w1" / "0.png", shown / "w2" / "3.png"]
    assert predict(fed.folder("1"), "1", (), asked) == predict(finished("vit"), "1", (), asked)
