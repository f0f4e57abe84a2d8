"""Generated text at the end of a run, and conversations with a client's model, against transformers' own `generate`."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import WORDS, save_tokenizer, tiny_config
from typer.testing import CliRunner, Result

from folklora.backbones.causal import CausalLM
from folklora.backbones.text_metrics import exact_match, rouge_l
from folklora.cli import app
from folklora.errors import DataError, FolkLoraError
from folklora.federation.chat import Conversation, open_conversation
from folklora.federation.handover import merge
from folklora.federation.run import client_model, run
from folklora.recipe import Recipe
from folklora.talk import talk
from folklora.training.generation import Sampling

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TOPICS = [f"topic-{i}" for i in range(4)]
METRICS = ["rouge_l", "exact_match"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``talker``, a small random-weight Llama with a chat template, ``plain``, the same without; and data."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tmp_path_factory.mktemp("places")
    for name in ("talker", "plain"):
        folder = place / name
        folder.mkdir()
        config = tiny_config("llama", save_tokenizer(folder))
        config.update({"initializer_range": 0.4, "tie_word_embeddings": False})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE if name == "talker" else None
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(folder)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(160):
        question = " ".join(f"w{word}" for word in rng.integers(WORDS, size=rng.integers(2, 6)))
        answer = " ".join(f"w{i % 4 + step}" for step in range(1 + i % 3))
        rows.append({"prompt": question, "response": answer, "topic": TOPICS[i % 4]})
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def recipe(places: Path, *overrides: str, name: str = "talker") -> Recipe:
    document = {
        "model": {"name": str(places / name), "task": "causal-lm", "dtype": "float32"},
        "data": {"source": str(places / "chats.jsonl"), "partition": "natural", "by": "topic"},
        "adapter": {"rank": 4},
        "train": {"rounds": 2, "batch_size": 8, "lr": 3e-2},
        "method": {"name": "fedsa"},
        "eval": {"generate": METRICS, "max_new_tokens": 6, "examples": 5},
    }
    return Recipe.parse(document, overrides)


@pytest.fixture(scope="module")
def played(places: Path) -> tuple[Path, dict[str, Any]]:
    """A finished run, and its summary."""
    return places / "run", run(recipe(places), places / "run")


def said(model: Any, tokenizer: Any, messages: list[tuple[str, str]], most: int) -> str:
    """What transformers' own loop says."""
    dialogue = [{"role": role, "content": content} for role, content in messages]
    ids = tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    end = tokenizer.convert_tokens_to_ids("[SEP]")
    found = model.generate(ids, max_new_tokens=most, do_sample=False, eos_token_id=end, pad_token_id=0)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def checkpoint(run_: Path, client: str, to: Path) -> tuple[Any, Any]:
    """A client's model as stock transformers has it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = merge(run_, client, to)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# -- at the end of a run ---------------------------------------------------------------------------------------------


def test_metrics_of_generated_answers_are_those_of_the_models_that_clients_end_with(
    played: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, summary = played
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for client in TOPICS:
        model, tokenizer = checkpoint(path, client, tmp_path / client)
        setup = client_model(path, client).setup
        test = setup.data.splits[client].test
        assert len(test) == 8
        chats = [setup.data.table.inputs[i] for i in test[[0, 1, 3, 4, 6]]]  # five of eight, evenly
        pairs = [(chat[-1][1], said(model, tokenizer, list(chat[:-1]), 6)) for chat in chats]
        for name, metric in (("rouge_l", rouge_l), ("exact_match", exact_match)):
            found[name].append(float(np.mean([metric(*pair) for pair in pairs])))
    assert len({*found["rouge_l"], 0.0, 1.0}) > 3  # clients differ, and the numbers tell something
    for name in METRICS:
        assert summary["row"][f"{name}_mean"] == pytest.approx(np.mean(found[name]))


def test_a_network_run_has_the_same_metrics(
    places: Path, played: tuple[Path, dict[str, Any]], federated: Callable[..., Any]
) -> None:
    fed = federated(recipe(places), TOPICS)
    row = fed.play()["row"]
    for name in METRICS:
        assert row[f"{name}_mean"] == pytest.approx(played[1]["row"][f"{name}_mean"])
    for client in TOPICS:  # and each member's own folder talks like the run
        theirs, ours = (open_conversation(where, client, max_new_tokens=8) for where in (fed.folder(client), played[0]))
        assert "".join(theirs.say("w5 w6")) == "".join(ours.say("w5 w6"))


def test_text_is_generated_once_and_only_if_asked_for(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from folklora.training import evaluation

    asked: list[int] = []
    real = evaluation.answers_of
    monkeypatch.setattr(evaluation, "answers_of", lambda *given: asked.append(len(given[2])) or real(*given))
    assert "rouge_l_mean" not in run(recipe(places, "eval.generate=[]"), tmp_path / "none")["row"]
    assert asked == []
    row = run(recipe(places, 'eval.generate=["rouge_l"]'), tmp_path / "one")["row"]
    assert asked == [len(TOPICS)]  # not in validations, not of models before the last reply
    assert "exact_match_mean" not in row


def test_a_model_that_cannot_be_asked_is_refused_before_work_starts(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", True)
    with pytest.raises(FolkLoraError, match="keeps a state"):
        run(recipe(places), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- a conversation --------------------------------------------------------------------------------------------------


def test_a_conversation_is_that_of_the_merged_checkpoint(played: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = played
    model, tokenizer = checkpoint(path, "topic-2", tmp_path / "merged")
    talking = open_conversation(path, "topic-2", max_new_tokens=7)
    messages: list[tuple[str, str]] = []
    answers = []
    for question in ("w1 w2", "w30", "w4 w1"):
        messages.append(("user", question))
        expected = said(model, tokenizer, messages, 7)
        pieces = list(talking.say(question))
        assert "".join(pieces) == expected
        assert all(pieces)
        messages.append(("assistant", expected))
        answers.append(expected)
    assert talking.turns == messages
    assert max(len(answer.split()) for answer in answers) > 1  # pieces are words: one came after the other
    talking.reset()
    assert "".join(talking.say("w30")) == said(model, tokenizer, [("user", "w30")], 7)


def test_an_answer_that_is_not_read_to_its_end_is_not_remembered(played: tuple[Path, dict[str, Any]]) -> None:
    talking = open_conversation(played[0], "topic-0")
    next(talking.say("w1 w2"))
    assert talking.turns == []


def test_the_oldest_turns_are_forgotten_where_there_is_no_room(
    played: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    talking = open_conversation(played[0], "topic-0", max_new_tokens=4)
    for number in range(12):
        "".join(talking.say(f"w{number} w1 w2"))
    assert len(talking.turns) < 24
    assert talking.turns[-2] == ("user", "w11 w1 w2")
    assert talking.turns[0][0] == "user"
    assert "its oldest question is forgotten" in caplog.text
    caplog.clear()
    "".join(talking.say("w1 " * 500))
    positions = talking.task.backbone.max_length
    assert f"the prompt has 503 tokens, all but the last {positions - 4} are cut: " in caplog.text
    assert f"model.max_length = {positions}, and beside 4 tokens (max_new_tokens) of an answer" in caplog.text
    assert len(talking.turns) == 2


def test_without_a_chat_template_each_question_stands_alone(places: Path, tmp_path: Path) -> None:
    run(recipe(places, "train.rounds=0", "eval.generate=[]", name="plain"), tmp_path / "run")
    talking = open_conversation(tmp_path / "run", "topic-0", max_new_tokens=5)
    first = ["".join(talking.say("w1 w2")) for _ in range(2)]
    assert first[0] == first[1]
    assert (talking.keeps, talking.turns) == (False, [])


def test_a_template_in_the_chat_template_s_place_leaves_each_question_alone(places: Path, tmp_path: Path) -> None:
    run(recipe(places, "train.rounds=0", "eval.generate=[]", "model.template='ask {} say '"), tmp_path / "run")
    asked = typed(tmp_path / "run", "--max-new-tokens", "2", typing="w1\nw1\n")
    assert asked.stderr == (
        "note: each question stands alone: the tokenizer has no chat template, or model.template takes its place\n"
    )
    first, second = asked.stdout.splitlines()
    assert first == second


def test_a_model_that_diverged_is_told_from_one_that_says_nothing(played: tuple[Path, dict[str, Any]]) -> None:
    talking = open_conversation(played[0], "topic-0")
    for tensor in talking.model.tensors.values():
        tensor.fill_(np.nan)
    with pytest.raises(FolkLoraError, match="client topic-0: its model diverged and gives no finite number"):
        "".join(talking.say("w1 w2"))
    assert talking.turns == []


def test_what_is_drawn_follows_from_the_seed_and_the_place_in_the_conversation(
    played: tuple[Path, dict[str, Any]],
) -> None:
    def answers(seed: int) -> list[str]:
        talking = open_conversation(played[0], "topic-0", max_new_tokens=8, sampling=Sampling(5.0, 1.0, seed))
        found = []
        for _ in range(2):
            talking.reset()
            found.append("".join(talking.say("w1 w2")))
        return found

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    assert answers(1)[0] != answers(1)[1]


def test_what_cannot_be_talked_with_is_refused(
    played: tuple[Path, dict[str, Any]], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(FolkLoraError, match="no client 'nobody'"):
        open_conversation(played[0], "nobody")
    with pytest.raises(DataError, match="the prompt is empty"):
        list(open_conversation(played[0], "topic-0").say("  "))
    run(tiny_recipe("train.rounds=0"), tmp_path / "classifier")
    with pytest.raises(FolkLoraError, match='model.task = "classification" writes no text'):
        open_conversation(tmp_path / "classifier", "0")


# -- at the terminal -------------------------------------------------------------------------------------------------


def typed(path: Path, *options: str, typing: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["chat", str(path), "--client", "topic-1", *options], input=typing)


def test_lines_that_are_piped_in_are_a_conversation(played: tuple[Path, dict[str, Any]]) -> None:
    talking = open_conversation(played[0], "topic-1", max_new_tokens=6)
    first, second = ["".join(talking.say(text)) for text in ("w1 w2", "w3")]
    talking.reset()
    fresh = "".join(talking.say("w3"))
    lines = "w1 w2\n\nw3\n/reset\nw3\n/quit\nw9\n"
    plain = typed(played[0], "--max-new-tokens", "6", typing=lines)
    assert plain.exit_code == 0
    assert plain.stdout == f"{first}\n{second}\n{fresh}\n"
    document = typed(played[0], "--max-new-tokens", "6", "--json", typing=lines)
    assert json.loads(document.stdout) == [
        {"prompt": "w1 w2", "answer": first},
        {"prompt": "w3", "answer": second},
        {"prompt": "w3", "answer": fresh},
    ]


def test_one_prompt_has_one_answer(played: tuple[Path, dict[str, Any]]) -> None:
    options = ("--prompt", "w1 w2", "--temperature", "2", "--seed", "3", "--max-new-tokens", "6")
    talking = open_conversation(played[0], "topic-1", max_new_tokens=6, sampling=Sampling(2.0, 1.0, 3))
    answer = "".join(talking.say("w1 w2"))
    assert typed(played[0], *options, typing="w9\n").stdout == f"{answer}\n"
    assert json.loads(typed(played[0], *options, "--json").stdout) == [{"prompt": "w1 w2", "answer": answer}]


def test_bytes_that_are_no_text_are_refused(
    played: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w1\n\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="standard input: not UTF-8 text"):
        talk(open_conversation(played[0], "topic-1", max_new_tokens=2))


def test_they_are_refused_where_the_locale_lets_them_through(
    played: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"w1\n\xff\xfe\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", typed)
    with pytest.raises(DataError, match="the prompt is not valid Unicode; allowed: a text"):
        talk(open_conversation(played[0], "topic-1", max_new_tokens=2), as_json=True)
    assert [turn["prompt"] for turn in json.loads(capsys.readouterr().out)] == ["w1"]  # what was said is not lost


@pytest.mark.parametrize("keys", [b"w1 w2\n\x04", b"w1 w2\n/quit\n"])
def test_a_terminal_is_prompted_until_it_ends(
    played: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keys: bytes,
) -> None:
    keyboard, terminal = os.openpty()
    os.write(keyboard, keys)
    answer = "".join(open_conversation(played[0], "topic-1", max_new_tokens=3).say("w1 w2"))
    with os.fdopen(terminal, "r") as stdin, os.fdopen(keyboard, "wb"):
        monkeypatch.setattr("sys.stdin", stdin)
        talk(open_conversation(played[0], "topic-1", max_new_tokens=3))
    assert capsys.readouterr().out == f"{answer}\n"


def test_ctrl_c_ends_with_what_was_said(played: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = Conversation.say, iter(range(9))

    def say(self: Conversation, text: str) -> Any:
        if next(count):
            raise KeyboardInterrupt
        return real(self, text)

    monkeypatch.setattr(Conversation, "say", say)
    stopped = typed(played[0], "--json", typing="w1\nw2\nw3\n")
    assert stopped.exit_code == 130
    assert [each["prompt"] for each in json.loads(stopped.stdout)] == ["w1"]


def test_what_a_model_says_moves_no_cursor(
    played: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conversation, "say", lambda self, text: iter(["a\x1b[2Jb\n", "c\td\x07"]))
    assert typed(played[0], "--prompt", "w1").stdout == "a\\x1b[2Jb\nc\td\\x07\n"


def test_a_character_appears_when_its_last_byte_is_there(
    played: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spelt = {0: "", 1: "a", 2: "a\ufffd", 3: "a\ufffd", 4: "aé", 5: "aé\ufffd"}
    monkeypatch.setattr(CausalLM, "decode", lambda self, ids: spelt[len(ids)])
    monkeypatch.setattr(CausalLM, "end_tokens", ())
    talking = open_conversation(played[0], "topic-1", max_new_tokens=5)
    assert list(talking.say("w1")) == ["a", "é", "\ufffd"]
