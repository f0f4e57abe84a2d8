"""Conversations: every format gives the same ones, and what is no conversation is named by its row."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.data.chat import Chat
from folklora.data.sources import Table, agreed_classes, load, load_test
from folklora.data.table import ONE_CLASS, encoded
from folklora.errors import DataError, ExampleError
from folklora.sections import DataSection

ROWS = [
    {"prompt": "Name a fruit.", "context": "", "response": "Apple", "who": "ann"},
    {"prompt": "Sum up.", "context": "Once upon\na time", "response": "A tale, short", "who": "bob"},
    {"prompt": "naïve ☃?", "context": "  ", "response": 'say "yes"', "who": "ann"},
]
CHATS = [
    (("user", "Name a fruit."), ("assistant", "Apple")),
    (("user", "Once upon\na time\n\nSum up."), ("assistant", "A tale, short")),
    (("user", "naïve ☃?"), ("assistant", 'say "yes"')),
]


def table_of(path: Path, **options: Any) -> Table:
    return load(DataSection(source=str(path), **options), 0, "chat")[0]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "csv":  # whose cells hold text only
        cells = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(columns), *cells])
    elif kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    return path


KINDS = ["csv", "jsonl", "parquet", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_answers_to_the_same_questions(tmp_path: Path, kind: str) -> None:
    table = table_of(write(tmp_path, kind, ROWS), context="context", by="who")
    assert table.inputs == CHATS
    assert (table.classes, table.labels.tolist(), table.groups) == (ONE_CLASS, [0, 0, 0], ["ann", "bob", "ann"])


def test_an_example_that_a_model_cannot_take_is_named_by_its_place(tmp_path: Path) -> None:
    def refuse(chats: Sequence[Chat]) -> list[Any]:
        raise ExampleError(1, "odd; allowed: even")

    file = write(tmp_path, "jsonl", ROWS)
    table = table_of(file, context="context", by="who").only(np.array([2, 1]))
    with pytest.raises(DataError, match=f"{re.escape(str(file))}: line 2: odd; allowed: even"):
        encoded(refuse, table)
    with pytest.raises(ExampleError, match="example 2: odd"):
        encoded(refuse, replace(table, places=()))
    assert encoded(list, table) == [CHATS[2], CHATS[1]]


TALK: Chat = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "!"))
PLAIN: Chat = (("user", "Hi"), ("assistant", "Hello"))


def spelt(chat: Chat, sharegpt: bool) -> list[dict[str, str]]:
    if not sharegpt:
        return [{"role": role, "content": content} for role, content in chat]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": content} for role, content in chat]


@pytest.mark.parametrize("sharegpt", [False, True], ids=["roles", "sharegpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_messages_in_either_spelling(tmp_path: Path, kind: str, sharegpt: bool) -> None:
    rows = [{"talk": spelt(chat, sharegpt), "topic": topic} for chat, topic in ((TALK, "x"), (PLAIN, "y"))]
    table = table_of(write(tmp_path, kind, rows), messages="talk", label="topic")
    assert table.inputs == [TALK, PLAIN]
    assert (table.classes, table.labels.tolist()) == (("x", "y"), [0, 1])


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), max_size=3)
CONVERSATIONS = st.builds(
    lambda start, question, between, answer: (*start, ("user", question), *between, ("assistant", answer)),
    st.lists(st.tuples(st.just("system"), st.text(st.characters(exclude_categories=["Cs"]), max_size=9)), max_size=1),
    TEXT,
    TURNS,
    TEXT,
)


@settings(max_examples=25)
@given(chats=st.lists(CONVERSATIONS, min_size=1, max_size=4), sharegpt=st.booleans())
def test_conversations_survive_every_file(
    tmp_path_factory: pytest.TempPathFactory, chats: list[Chat], sharegpt: bool
) -> None:
    folder = tmp_path_factory.mktemp("chats")
    for kind in ("csv", "jsonl", "parquet"):
        rows = [{"id": i, "messages": spelt(chat, sharegpt)} for i, chat in enumerate(chats)]
        assert table_of(write(folder, kind, rows), messages="messages").inputs == chats


def test_a_common_test_set_of_conversations_needs_no_other_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "test.jsonl", ROWS)
    section = DataSection(source="nobody-has-this.jsonl", test=str(file))
    test = load_test(section, 0, "chat")
    assert test is not None
    assert test.inputs[0] == CHATS[0]
    assert agreed_classes(section, "chat") == ONE_CLASS
    assert agreed_classes(DataSection(label="who"), "chat") is None
    assert load_test(DataSection(source="absent.jsonl", test=str(file), label="who"), 0, "chat") is None


def test_limit_of_examples_without_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "site": f"s{i}"} for i in range(30)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    table = table_of(file, limit=7, by="site")
    numbers = [int(group[1:]) for group in table.groups or []]
    assert len(table) == 7
    assert numbers == sorted(numbers)
    assert table.inputs == [(("user", f"p{i}"), ("assistant", f"r{i}")) for i in numbers]
    assert numbers != list(range(7))


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        table_of(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "allowed: " in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"response": ""}, "line 4, column 'response': empty"),
        ({"response": " \n"}, "line 4, column 'response': empty"),
        ({"response": None}, "line 4, column 'response': missing"),
        ({"response": 42}, "line 4, column 'response': 42 is of type int"),
        ({"response": float("nan")}, "line 4, column 'response': nan is of type float"),
        ({"response": "\ud800"}, "line 4, column 'response': not valid Unicode"),
        ({"prompt": ""}, "line 4, column 'prompt': empty"),
        ({"context": ["a"]}, "line 4, column 'context': ['a'] is of type list"),
        ({"who": ""}, "line 4, column 'who': missing"),
    ],
)
def test_a_broken_answer_is_named_by_its_row(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*ROWS, ROWS[0] | change])
    assert problem in error_of(file, context="context", by="who")


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "missing"),
        ([], "missing"),
        ("hello", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"hello"', "not JSON|'hello' is no list"),
        ({"role": "user", "content": "q"}, "is no list"),
        (["q", "a"], "message 1: 'q'"),
        ([QUESTION, {"content": "a"}], "message 2: {'content': 'a'}"),
        ([QUESTION, {"role": "assistant"}], "message 2: content is missing"),
        ([QUESTION, {"role": "assistant", "content": None}], "message 2: content is missing"),
        ([QUESTION, {"role": "assistant", "content": ""}], "message 2: content is empty"),
        ([QUESTION, {"role": "assistant", "content": [{"type": "text"}]}], "message 2: content is [{'type': 'text'}]"),
        ([{"from": "human", "value": ""}, {"from": "gpt", "value": "a"}], "message 1: content is empty"),
        ([QUESTION, {"role": "tool", "content": "a"}], "message 2: role 'tool'; allowed: system, user"),
        ([QUESTION, {"role": ["user"], "content": "a"}], "message 2: role ['user']"),
        ([QUESTION, {"role": "system", "content": "s"}, ANSWER], "message 2: role 'system'; allowed: a system's"),
        ([QUESTION, ANSWER, QUESTION], "ends with the roles user, assistant, user"),
        ([ANSWER], "ends with the roles assistant"),
        ([{"role": "system", "content": "s"}, ANSWER], "ends with the roles system, assistant"),
    ],
)
def test_what_is_no_conversation_is_named_by_its_row(tmp_path: Path, messages: Any, problem: str) -> None:
    rows = [{"talk": [QUESTION, ANSWER]}, {"talk": messages}]
    message = error_of(write_jsonl(tmp_path / "a.jsonl", rows), messages="talk")
    assert "line 2, column 'talk': " in message
    assert any(part in message for part in problem.split("|"))


def test_columns_and_classes_that_are_not_there(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert "no column 'question'; allowed: one of 'prompt'" in error_of(file, prompt="question")
    assert "no column 'messages'" in error_of(file, messages="messages")
    with pytest.raises(DataError, match=r"data.classes without data.label; allowed: both"):
        table_of(file, classes=["x", "y"])
    assert table_of(file, classes=["bob", "ann"], label="who").labels.tolist() == [1, 0, 1]
