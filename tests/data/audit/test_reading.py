"""Files as an audit reads them, good and bad: whatever is wrong is one line that names the place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from folklora.data.audit.reading import read_rows, read_rows_as
from folklora.errors import DataError
from folklora.sections import DataSection


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_texts_of_every_format(tmp_path: Path) -> None:
    rows = [{"said": "one two", "kind": "a"}, {"said": "three", "kind": "b"}]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    files = [
        written(tmp_path, "rows.csv", "said,kind\none two,a\nthree,b\n"),
        written(tmp_path, "rows.tsv", "said\tkind\none two\ta\nthree\tb\n"),
        written(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        tmp_path / "rows.parquet",
    ]
    for file in files:
        found = read_rows(file, text="said", label="kind")
        assert (list(found.examples), found.labels, found.kind) == (["one two", "three"], ["a", "b"], "text")
        assert (found.name, found.column) == (file.name, "said")
    assert read_rows(files[0], text="said").labels is None
    assert list(read_rows(files[0], text="said").places) == ["line 2", "line 3"]


def test_sequences_however_they_are_written(tmp_path: Path) -> None:
    pq.write_table(pa.table({"items": [[1, 2], None, [3]]}), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet", items="items").examples) == [(1, 2), (), (3,)]
    tsv = written(tmp_path, "rows.tsv", "items\n4 9 4\n\tx\n".replace("\tx", "[5, 6]"))
    assert list(read_rows(tsv, items="items").examples) == [("4", "9", "4"), (5, 6)]
    lines = ['{"items": [1, "a", 2]}', '{"items": null}', '{"items": "a b"}', '{"items": []}']
    jsonl = written(tmp_path, "rows.jsonl", "\n".join(lines))
    assert list(read_rows(jsonl, items="items").examples) == [(1, "a", 2), (), ("a", "b"), ()]


def test_rows_without_a_word_are_counted_not_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl", '{"text": "one"}\n{"text": ""}\n{"text": null}\n{"text": "  "}\n')
    assert list(read_rows(file).examples) == ["one", "", "", ""]


@pytest.mark.parametrize(
    ("name", "content", "columns", "said"),
    [
        ("rows.csv", None, {}, "no such file"),
        ("rows.txt", "text\none\n", {}, "unknown file type '.txt'"),
        ("rows.csv", "", {}, "empty file"),
        ("rows.csv", "text,label\n", {}, "no examples; allowed: at least one row"),
        ("rows.jsonl", "", {}, "empty file"),
        ("rows.csv", "message,label\none,a\n", {}, "no column 'text'; allowed: one of 'message', 'label'"),
        ("rows.csv", "text\none\n", {"label": "kind"}, "no column 'kind'; allowed: one of 'text'"),
        ("rows.jsonl", '{"text": 3}\n', {}, "line 1, column 'text': 3 is of type int; allowed: a string"),
        ("rows.jsonl", '{"text": ["a"]}\n', {}, "line 1, column 'text'"),
        ("rows.jsonl", '{"text": ""}\n{"text": null}\n', {}, "empty in all 2 rows"),
        ("rows.jsonl", '{"text": "a"}\n{"text": {"b": 1}}\n', {"items": "text"}, "line 2, column 'text'"),
        ("rows.jsonl", '{"items": [1.5]}\n', {"items": "items"}, "allowed: a list of integers or words"),
        ("rows.jsonl", '{"items": [true]}\n', {"items": "items"}, "allowed: a list of integers or words"),
        ("rows.jsonl", '{"items": [[1]]}\n', {"items": "items"}, "allowed: a list of integers or words"),
        ("rows.jsonl", '{"items": 4}\n', {"items": "items"}, "allowed: a list of integers or words"),
        ("rows.jsonl", '{"text": "a", "kind": null}\n', {"label": "kind"}, "line 1, column 'kind': missing"),
        ("rows.jsonl", "not json\n", {}, "line 1: not JSON"),
        ("rows.parquet", "not parquet", {}, "not a readable Parquet file"),
        ("rows.csv", 'text\n"one\n', {}, "broken row"),
        ("rows.csv", "text\none\n", {"text": "text", "items": "text"}, "--text text with --items text"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    folklora: Callable[..., Any], tmp_path: Path, name: str, content: str | None, columns: dict[str, str], said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        written(tmp_path, name, content)
    with pytest.raises(DataError) as refusal:
        read_rows(path, **columns)
    assert said in str(refusal.value)
    told = folklora(
        "inspect", "--data", path, *(part for key, value in columns.items() for part in (f"--{key}", value))
    )
    assert told.code == 2
    assert told.out == ""
    assert told.err == f"error: {refusal.value}\n"
    assert told.err.count("\n") == 1


def test_a_files_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.csv")
    path.write_text("text\none\n")
    assert read_rows(path).name == "\\udcff.csv"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "folder.csv")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(tmp_path / "rows.csv")


def test_one_field_may_hold_a_long_sequence(tmp_path: Path) -> None:
    long = " ".join(["12", "7"] * 50_000)  # more than csv's own limit for a field
    rows = read_rows(written(tmp_path, "rows.tsv", f"items\n{long}\n1 2\n"), items="items")
    assert [len(example) for example in rows.examples] == [100_000, 2]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([10**9], pa.int32()).cast(pa.date32()),
        pa.array([2**62]).cast(pa.duration("s")),
        pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")),
    ],
    ids=["a date beyond calendars", "a span beyond them", "a string that is no text"],
)
def test_parquet_values_that_cannot_be_had(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": ["one"], "kind": column}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"not a readable Parquet file: .*; allowed: Parquet"):
        read_rows(tmp_path / "rows.parquet", label="kind")


# -- with a recipe's columns -------------------------------------------------------------------------------------------


def test_a_members_own_file_has_the_recipes_columns(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.csv", "query,intent\none,a\ntwo,a\n")
    found = read_rows_as(file, DataSection(text="query", label="intent"), "text")
    assert (list(found.examples), found.labels) == (["one", "two"], ["a", "a"])
    other = written(tmp_path, "own.csv", "words,meaning\none,a\n")
    assert read_rows_as(other, DataSection(text="query"), "text", text="words", label="meaning").labels == ["a"]
    plain = written(tmp_path, "plain.csv", "text,label\none,a\n")
    assert read_rows_as(plain, DataSection(), "text").labels == ["a"]


def test_the_turns_of_a_chat_are_one_text(tmp_path: Path) -> None:
    pairs = written(tmp_path, "pairs.jsonl", '{"prompt": "why", "response": "so", "topic": "x"}\n')
    assert list(read_rows_as(pairs, DataSection(), "chat").examples) == ["why\nso"]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why"},
             {"role": "assistant", "content": "so"}]  # fmt: skip
    file = written(tmp_path, "chats.jsonl", json.dumps({"turns": turns}) + "\n")
    found = read_rows_as(file, DataSection(messages="turns"), "chat")
    assert (list(found.examples), found.labels) == (["be brief\nwhy\nso"], None)


def test_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are pictures; allowed: texts"):
        read_rows_as(tmp_path / "rows.csv", DataSection(), "image")
