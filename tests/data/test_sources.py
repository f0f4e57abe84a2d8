"""Reading tables: every format gives the same table, every broken input one line that a user can act on."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from folklora.data.sources import EMBEDDED, Table, fingerprint, load, load_test
from folklora.errors import DataError
from folklora.sections import DataSection

ROWS = [
    ("good, very", "yes", "anna"),
    ('a "quote"', "no", "bob"),
    ("two\nlines", "yes", "anna"),
    ("naïve ☃", "no", "cy"),
]


def table_of(path: Path | str, **options: object) -> Table:
    return load(DataSection(source=str(path), **options), 0)[0]


def write_csv(path: Path, rows: list[tuple[str, ...]] = ROWS, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", "label", "who")[: len(rows[0])], *rows])
    return path


def write_jsonl(path: Path, rows: list[tuple[object, ...]] = ROWS) -> Path:
    lines = [json.dumps(dict(zip(("text", "label", "who"), row, strict=False)), ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def columns_of(rows: list[tuple[object, ...]]) -> dict[str, list[object]]:
    return {name: list(values) for name, values in zip(("text", "label", "who"), zip(*rows, strict=True), strict=False)}


def write_parquet(path: Path, rows: list[tuple[object, ...]] = ROWS) -> Path:
    pq.write_table(pa.table(columns_of(rows)), path)
    return path


def write_saved(path: Path, rows: list[tuple[object, ...]] = ROWS) -> Path:
    datasets.Dataset.from_dict(columns_of(rows)).save_to_disk(str(path))
    return path


def test_embedded_banking77_is_the_published_one() -> None:
    table, test = load(DataSection(), 0)
    assert test is not None
    assert (len(table), len(test), len(table.classes)) == (10003, 3080, 77)
    assert table.classes == test.classes == tuple(sorted(table.classes))
    assert set(np.bincount(test.labels)) == {40}
    assert table.inputs[0] == "I am still waiting on my card?"
    assert table.classes[table.labels[0]] == "card_arrival"
    assert table.groups is None
    assert {"LICENSE", "SOURCE.txt", "README.md"} <= {f.name for f in EMBEDDED["banking77"].iterdir()}


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_csv(folder / "a.csv"),
        lambda folder: write_csv(folder / "a.TSV", delimiter="\t"),
        lambda folder: write_jsonl(folder / "a.jsonl"),
        lambda folder: write_parquet(folder / "a.parquet"),
        lambda folder: write_saved(folder / "saved"),
    ],
    ids=["csv", "tsv", "jsonl", "parquet", "save_to_disk"],
)
def test_every_format_gives_the_same_table(tmp_path: Path, write) -> None:
    table = table_of(write(tmp_path), by="who")
    assert table.inputs == [row[0] for row in ROWS]
    assert table.classes == ("no", "yes")
    assert table.labels.tolist() == [1, 0, 1, 0]
    assert table.labels.dtype == np.int64
    assert table.groups == ["anna", "bob", "anna", "cy"]


def test_columns_are_named_by_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffy,x\n1,one\n0,zero\n", encoding="utf-8")  # a byte order mark, as from Excel
    table = table_of(tmp_path / "a.csv", text="x", label="y")
    assert (table.inputs, table.labels.tolist(), table.groups) == (["one", "zero"], [1, 0], None)


def test_json_lines_may_hold_other_line_separators_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a\u2028b", "label": 1}\n\n{"text": "c\x85d", "label": 2}', encoding="utf-8"
    )
    assert table_of(tmp_path / "a.jsonl").inputs == ["a\u2028b", "c\x85d"]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "-1", "9"], ("-1", "9", "10")),
        ([10, 9, 2], ("2", "9", "10")),
        (["2.5", "10", "2"], ("2", "2.5", "10")),
        (["10", "9", "b"], ("10", "9", "b")),
        ([True, False, True], ("false", "true")),
        ([1, "1", 0], ("0", "1")),
    ],
)
def test_classes_are_sorted_whatever_the_order_of_rows(tmp_path: Path, labels: list, classes: tuple) -> None:
    rows = [(f"text {i}", label) for i, label in enumerate(labels)]
    for variant in (rows, rows[::-1]):
        table = table_of(write_jsonl(tmp_path / "a.jsonl", variant))
        assert table.classes == classes
        names = [str(label).lower() if isinstance(label, bool) else str(label) for _, label in variant]
        assert [table.classes[i] for i in table.labels] == names


def test_class_label_names_are_the_classes(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "d"))
    table, test = load(DataSection(source=str(tmp_path / "d")), 0)
    assert (table.classes, table.labels.tolist()) == (("neg", "pos"), [1, 0])
    assert test is not None
    assert test.labels.tolist() == [0]

    unknown = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    unknown.save_to_disk(str(tmp_path / "u"))
    with pytest.raises(DataError, match=r"row 2, column 'label': missing"):
        table_of(tmp_path / "u")


def test_folder_with_train_and_test_files(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv")
    assert load(DataSection(source=str(tmp_path)), 0)[1] is None
    write_jsonl(tmp_path / "test.jsonl", [("only", "yes")])  # no column "who": clients are a matter of training
    table, test = load(DataSection(source=str(tmp_path), by="who"), 0)
    assert table.inputs == [row[0] for row in ROWS]
    assert test is not None
    assert (test.inputs, test.labels.tolist(), test.classes, test.groups) == (["only"], [1], table.classes, None)


def test_data_test_replaces_the_sources_own(tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [("where is it?", "card_arrival")])
    table, test = load(DataSection(test=str(own)), 0)
    assert test is not None
    assert test.inputs == ["where is it?"]
    assert test.classes[test.labels[0]] == "card_arrival"
    assert len(table) == 10003


# limit


def test_limit_is_stratified_seeded_and_keeps_rare_classes(tmp_path: Path) -> None:
    sizes = {"a": 600, "b": 300, "c": 99, "d": 1}
    rows = [(f"{name}{i}", name) for name, size in sizes.items() for i in range(size)]
    path = write_csv(tmp_path / "a.csv", rows)
    full = table_of(path)
    small = [load(DataSection(source=str(path), limit=100), seed)[0] for seed in (0, 0, 1)]
    for table in small:
        counts = Counter(table.classes[label] for label in table.labels)
        assert sum(counts.values()) == 100
        assert counts["d"] == 1
        for name, size in sizes.items():
            assert abs(counts[name] - 100 * size / 1000) <= 1
        assert all(text[0] == table.classes[label] for text, label in zip(table.inputs, table.labels, strict=True))
        assert table.inputs == [text for text in full.inputs if text in set(table.inputs)]  # the source's order
    assert small[0].inputs == small[1].inputs != small[2].inputs
    assert table_of(path, limit=5000).inputs == full.inputs
    assert np.bincount(table_of(path, limit=4).labels).tolist() == [1, 1, 1, 1]
    with pytest.raises(DataError, match=r"limit = 3 .* allowed: data.limit >= 4"):
        table_of(path, limit=3)


def test_limit_keeps_groups_with_their_rows(tmp_path: Path) -> None:
    rows = [(f"t{i}", str(i % 2), f"g{i}") for i in range(50)]
    table = table_of(write_csv(tmp_path / "a.csv", rows), limit=9, by="who")
    assert table.groups == [text.replace("t", "g") for text in table.inputs]


# Errors


def error_of(path: Path | str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        table_of(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "allowed: " in message
    return message


def test_missing_source_lists_the_embedded_names(tmp_path: Path) -> None:
    message = error_of(tmp_path / "absent.csv")
    assert "absent.csv" in message
    assert '"banking77"' in message
    assert "data.test" in error_of("banking77", test=str(tmp_path / "absent.csv"))
    assert "name too long" in error_of("x" * 5000).lower()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv")
    path.chmod(0)
    assert "a.csv: cannot be read" in error_of(path)


CONTENTS = {
    "unknown suffix": ("a.xlsx", b"", "unknown file type '.xlsx'", ".csv, .tsv, .jsonl or .parquet"),
    "no suffix": ("a", b"", "unknown file type ''", ".parquet"),
    "missing column": ("a.csv", b"txt,label\na,b\n", "no column 'text'", "'txt', 'label'"),
    "doubled column": ("a.csv", b"text,label,label\na,b,c\n", "2 columns 'label'", "allowed: one"),
    "missing key": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "a"}', "line 2: no column 'label'", "'text'"),
    "empty csv": ("a.csv", b"", "empty file", ""),
    "empty jsonl": ("a.jsonl", b"\n", "empty file", ""),
    "header only": ("a.csv", b"text,label\n", "no examples", ""),
    "few fields": ("a.csv", b'text,label\n"a\nb",1\n"c\nd"\n', "line 4: 1 fields", "allowed: 2"),
    "many fields": ("a.tsv", b"text\tlabel\na\t1\n\nb\t2\t3\n", "line 4: 3 fields", "allowed: 2"),
    "open quote": ("a.csv", b'text,label\na,1\n"b,2\n', "line 3: broken row", ""),
    "not JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text: 1}\n', "line 2: not JSON", ""),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "line 1: not JSON", ""),
    "not an object": ("a.jsonl", b'["a", 1]\n', "line 1: ['a', 1] is no JSON object", ""),
    "empty text": ("a.csv", b'text,label\n"x\ny",1\n  ,2\n', "line 4, column 'text': empty", "non-empty string"),
    "missing text": ("a.jsonl", b'{"text": null, "label": 1}\n', "line 1, column 'text': missing", ""),
    "number as text": ("a.jsonl", b'{"text": 3, "label": 1}\n', "line 1, column 'text': 3 is of type int", ""),
    "lone surrogate": ("a.jsonl", b'{"text": "\\ud800", "label": 1}\n', "column 'text': not valid Unicode", ""),
    "missing label": ("a.csv", b"text,label\na,1\nb,\n", "line 3, column 'label': missing", "an integer"),
    "null label": ("a.jsonl", b'{"text": "a", "label": null}\n', "line 1, column 'label': missing", ""),
    "float label": ("a.jsonl", b'{"text": "a", "label": 1.5}\n', "column 'label': 1.5 is of type float", ""),
    "list label": ("a.jsonl", b'{"text": "a", "label": [1]}\n', "column 'label': [1] is of type list", ""),
    "single class": ("a.csv", b"text,label\na,1\nb,1\n", "a single class, '1'", "two or more"),
    "not UTF-8": ("a.csv", b"text,label\na,1\nb\xe9,2\n", "line 3: not UTF-8", ""),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8", ""),
    "not Parquet": ("a.parquet", b"PAR1 no", "not a readable Parquet file", ""),
    "empty Parquet": ("a.parquet", b"", "not a readable Parquet file", ""),
}


@pytest.mark.parametrize(("name", "content", "problem", "allowed"), CONTENTS.values(), ids=CONTENTS)
def test_broken_file(tmp_path: Path, name: str, content: bytes, problem: str, allowed: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path / name)
    assert str(tmp_path / name) in message
    assert problem in message
    assert allowed in message.replace(str(tmp_path), "")


def test_broken_parquet_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [("a", "x"), (None, "y")])
    assert "row 2, column 'text': missing" in error_of(path)
    assert "no column 'by'" in error_of(path, by="by")
    assert "1.0 is of type float" in error_of(write_parquet(path, [("a", 1.0), ("b", 2.0)]))


@pytest.mark.parametrize("where", ["parquet", "save_to_disk"])
def test_class_names_of_a_data_set_of_hugging_face_are_its_labels(tmp_path: Path, where: str) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    path = tmp_path / "a.parquet"
    made.to_parquet(str(path)) if where == "parquet" else made.save_to_disk(str(path))
    table, _ = load(DataSection(source=str(path)), 0)
    assert [table.classes[label] for label in table.labels] == ["yes", "no", "yes"]


def test_a_parquet_file_that_only_says_it_is_of_hugging_face_is_read_as_it_is(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": ["x", "y"]})
    for told in (
        b"{",
        b"[" * 100_000,
        b"5",
        b'{"info": {"features": {"label": 5}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["p", "q"]}}}}',
    ):
        pq.write_table(table.replace_schema_metadata({b"huggingface": told}), tmp_path / "a.parquet")
        found, _ = load(DataSection(source=str(tmp_path / "a.parquet")), 0)
        assert found.classes == ("x", "y")


def test_missing_group_value(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("a", "1", "x"), ("b", "2", "")])
    assert "line 3, column 'who': missing" in error_of(path, by="who")


def test_test_label_that_training_never_saw(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "test.csv", [("a", "yes"), ("b", "perhaps")])
    message = error_of(tmp_path)
    assert "test.csv: line 3, column 'label': label 'perhaps'" in message
    assert "'no', 'yes'" in message


def test_broken_folders(tmp_path: Path) -> None:
    assert "no training data in this folder" in error_of(tmp_path)
    write_csv(tmp_path / "train.csv")
    write_jsonl(tmp_path / "train.jsonl")
    assert "train.csv and train.jsonl; allowed: one file named train.*" in error_of(tmp_path)

    saved = write_saved(tmp_path / "saved")
    assert "(train): no column 'absent'" in error_of(saved, text="absent")
    next(saved.glob("*.arrow")).write_bytes(b"garbage")
    assert "not a readable Hugging Face data set" in error_of(saved)

    data = datasets.Dataset.from_dict(columns_of(ROWS))
    datasets.DatasetDict({"dev": data}).save_to_disk(str(tmp_path / "dict"))
    assert "has the splits 'dev'" in error_of(tmp_path / "dict")


# The fingerprint


def test_fingerprint_changes_with_the_data_and_only_then() -> None:
    def of(inputs: list[str], labels: list[int], classes: tuple[str, ...] = ("x", "y")) -> str:
        return fingerprint(Table(inputs, np.array(labels), classes, None))

    base = of(["ab", "c"], [0, 1])
    assert base == of(["ab", "c"], [0, 1])
    assert len(base) == 64
    int(base, 16)
    others = {
        of(["a", "bc"], [0, 1]),
        of(["c", "ab"], [0, 1]),
        of(["ab", "c"], [1, 0]),
        of(["ab", "c"], [0, 1], ("x", "z")),
        of(["ab"], [0]),
    }
    assert len(others | {base}) == 6


def test_the_common_test_set_has_a_limit_of_its_own() -> None:
    section = DataSection(limit=200, test_limit=154)
    table, test = load(section, seed=3)
    assert test is not None
    assert (len(table), len(test)) == (200, 154)
    assert np.bincount(test.labels, minlength=77).tolist() == [2] * 77  # 40 of each class before
    _, again = load(section, seed=3)
    assert again is not None
    assert again.inputs == test.inputs
    with pytest.raises(DataError, match=r"data\.test_limit = 5 is less than the 77 classes"):
        load(DataSection(test_limit=5), seed=3)


# -- classes that were agreed on -------------------------------------------------------------------------------------


def test_named_classes_keep_their_order_and_may_have_no_rows(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv")
    table = table_of(file, classes=["yes", "perhaps", "no"])
    assert table.classes == ("yes", "perhaps", "no")
    assert table.labels.tolist() == [0, 2, 0, 2]
    limited = table_of(file, classes=["yes", "perhaps", "no"], limit=3)
    assert len(limited) == 3


def test_a_label_outside_the_named_classes_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"line 3, column 'label': label 'no' is not among data.classes; allowed: 'yes'"
    ):
        table_of(write_csv(tmp_path / "a.csv"), classes=["yes", "never"])


def test_with_named_classes_a_common_test_set_needs_no_other_file(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "test.csv")
    section = DataSection(source="nobody-has-this.csv", test=str(file), classes=["no", "yes"])
    test = load_test(section, 0)
    assert test is not None
    assert test.labels.tolist() == [1, 0, 1, 0]
    assert load_test(section.model_copy(update={"test": None}), 0) is None
    assert load_test(section.model_copy(update={"classes": None}), 0) is None
