"""A data audit as a page and as JSON: it says what was measured, it holds no example, and a browser shows it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folklora.data.audit.audit import MOST_GROUPS, MOST_LABELS, audit
from folklora.data.audit.duplicates import exact_duplicates, near_duplicates
from folklora.data.audit.entropy import regularity
from folklora.data.audit.quality import quality, tokens_of
from folklora.data.audit.reading import Rows, read_rows
from folklora.errors import DataError, RunError
from folklora.report.data_audit import audit_file, lead, number

SECRET = "zanzibar"  # a word that no page of ours has


def written(folder: Path, count: int = 200, labels: int = 3, name: str = "own data.jsonl") -> Path:
    """Texts with phrases, some copies, an empty one, each with a word that must not leave."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        start = int(random.integers(30))
        text = f"{SECRET}{i} " + " ".join(f"w{start + step}" for step in range(int(random.integers(3, 12))))
        if i % 10 == 9:
            text = rows[i - 5]["text"]
        rows.append({"text": "" if i == 4 else text, "label": f"<b>label {i % labels}</b>"})
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_of(page: Path) -> str:
    """What a reader sees, without tags."""
    body = page.read_text().partition("<body>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_the_document_says_what_was_measured(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path), label="label")
    document = audit(rows)
    texts, tokens = list(rows.examples), tokens_of(rows.examples)
    assert document["profile"]["examples"] == 200
    assert document["profile"]["empty"] == 2  # the ninth is its copy
    assert document["profile"]["tokens"] == len(tokens) == sum(len(str(text).split()) for text in texts)
    assert sum(document["profile"]["labels"].values()) == 200
    assert document["profile"]["effective_labels"]["value"] == pytest.approx(3, rel=0.01)
    assert sum(count for _, _, count in document["profile"]["histogram"]) == 200
    assert document["duplicates"]["exact"]["copies"] == exact_duplicates(texts).copies
    assert document["duplicates"]["near"]["share"] == near_duplicates(texts).share
    found = {measure["name"]: measure["value"] for measure in document["measures"]}
    assert found["Ratio to shuffled data"] == regularity(tokens).value
    assert document["quality"] == {by: round(quality(texts, by), 4) for by in ("duplicates", "regularity", "both")}  # type: ignore[arg-type]
    assert json.loads(json.dumps(document)) == document


def test_bars_of_lengths_hold_every_example() -> None:
    for lengths in ([0], [3, 3, 3], [1, 2, 400], [*range(1, 500), 100_000]):
        rows = Rows("x", "items", "c", [tuple(range(length)) for length in lengths], None, ["row 1"] * len(lengths))
        bars = audit(rows)["profile"]["histogram"]
        assert len(bars) <= 31
        for start, end, count in bars:
            assert count == sum(start <= length <= end for length in lengths)
        assert sum(count for _, _, count in bars) == len(lengths)


def test_groups_say_where_copies_are_and_whether_their_labels_differ(tmp_path: Path) -> None:
    lines = [{"text": f"one of {i} many other words here", "label": "a"} for i in range(5)]
    lines += [{"text": "the same words again and again", "label": label} for label in ("a", "a", "b")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (group,) = [g for g in audit(read_rows(file, label="label"))["duplicates"]["groups"] if g["alike"] == 3]
    assert group == {"examples": 3, "alike": 3, "labels": 2, "places": ["line 6", "line 7", "line 8"]}
    assert audit(read_rows(file))["duplicates"]["groups"][0]["labels"] is None


def test_no_example_is_on_the_page_or_beside_it(tmp_path: Path) -> None:
    document = audit_file(written(tmp_path), label="label", to=tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        *("audit.html", "audit.json", "release.json"),
        *("order.png", "copies.png", "lengths.png", "labels.png"),
    }
    for path in files:
        assert SECRET.encode() not in path.read_bytes()
    assert SECRET not in json.dumps(document)


def test_the_page_says_what_the_document_says(tmp_path: Path) -> None:
    document = audit_file(written(tmp_path), label="label", epsilon=2.0, to=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "audit.json").read_text()) == document
    text = text_of(tmp_path / "out" / "audit.html")
    for line in (*document["leaves"], *document["stays"], lead(document)):
        assert line in text
    for measure in document["measures"]:
        assert measure["name"] in text
        assert number(measure) in text
    assert "own data.jsonl" in text
    source = (tmp_path / "out" / "audit.html").read_text()
    assert "<b>label" not in source
    assert "<script" not in source
    assert "http" not in source.replace("http-equiv", "")


def test_what_may_leave_is_a_file_of_its_own(tmp_path: Path) -> None:
    document = audit_file(written(tmp_path), epsilon=1.0, to=tmp_path / "out")
    told = json.loads((tmp_path / "out" / "release.json").read_text())
    assert told == {"schema": 1, **document["release"]}
    assert set(told) == {"schema", "status", "distinct", "regularity", "examples", "blocks", "epsilon", "sensitivity",
                         "scale", "means", "step"}  # fmt: skip
    assert told["sensitivity"] == {"distinct": 1 / 200, "regularity": 1.0}
    assert told["scale"] == {"distinct": 2 / 200, "regularity": 2.0}


def test_what_cannot_be_measured_says_why(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\none two\nthree four\n")
    document = audit_file(file, to=tmp_path / "out")
    text = text_of(tmp_path / "out" / "audit.html")
    assert document["release"]["status"] == "thin"
    assert text.count("not measurable: ") >= 5
    for measure in document["measures"]:
        assert (measure["value"] is None) == (measure["why"] is not None)
    assert not (tmp_path / "out" / "figures" / "order.png").exists()
    assert not (tmp_path / "out" / "figures" / "labels.png").exists()


def test_many_labels_and_copies_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"say {i // 2} twice please", "label": f"l{i}"} for i in range(2 * (MOST_LABELS + 5))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = audit_file(file, label="label", to=tmp_path / "out")
    assert len(document["profile"]["labels"]) == MOST_LABELS < document["profile"]["labels_in_all"]
    assert len(document["duplicates"]["groups"]) == MOST_GROUPS
    assert f"The largest {MOST_GROUPS} of" in text_of(tmp_path / "out" / "audit.html")


def test_items_and_one_long_sequence(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    file = tmp_path / "rows.tsv"
    file.write_text("fold\titems\n1\t" + " ".join(map(str, random.integers(22, size=5000))) + "\n")
    document = audit_file(file, items="items", to=tmp_path / "out")
    found = {measure["name"]: measure["value"] for measure in document["measures"]}
    assert found["Ratio to shuffled data"] == pytest.approx(1, abs=0.03)
    assert document["release"]["blocks"] == 1
    assert "5,000 items in all" in text_of(tmp_path / "out" / "audit.html")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(folklora: Callable[..., Any], tmp_path: Path) -> None:
    file = written(tmp_path)
    told = folklora("inspect", "--data", file, "--label", "label", "--json", "--out", tmp_path / "out")
    assert told.code == 0
    assert json.loads(told.out) == json.loads((tmp_path / "out" / "audit.json").read_text())
    shown = folklora("inspect", "--data", file, "--out", tmp_path / "out")
    assert shown.code == 0
    assert f"audit: {tmp_path / 'out' / 'audit.html'}" in shown.out
    assert "What may leave" in shown.out
    plain = folklora("inspect", "--data", file)
    assert plain.code == 0
    assert "--out FOLDER" in plain.err


def test_with_a_recipe_its_columns_are_read(folklora: Callable[..., Any], tiny_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(tiny_recipe("data.text=query", "data.label=intent").to_toml())
    file = tmp_path / "own.csv"
    file.write_text("query,intent\n" + "".join(f"w{i} w1 w2,a\n" for i in range(5)))
    told = folklora("inspect", tmp_path / "recipe.toml", "--data", file, "--json")
    assert told.code == 0
    document = json.loads(told.out)
    assert document["data"] == {"name": "own.csv", "kind": "text", "column": "query", "labelled": True}
    assert document["profile"]["labels"] == {"a": 5}
    refused = folklora("inspect", tmp_path / "recipe.toml", "--data", file, "--items", "query")
    assert refused.code == 2
    assert refused.err.startswith("error: --items query with a recipe")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "neither a recipe nor --data"),
        (("--text", "a"), "neither a recipe nor --data"),
        (("RECIPE", "--label", "a"), "--label without --data"),
        (("RECIPE", "--out", "a"), "--out without --data"),
        (("RECIPE", "--epsilon", "1"), "--epsilon without --data"),
        (("RECIPE", "--data", "FILE", "--audit"), "--audit with --data"),
        (("--data", "FILE", "--epsilon", "0"), "epsilon = 0; allowed: a number above 0"),
        (("--data", "FILE", "--epsilon", "nan"), "epsilon = nan"),
    ],
)
def test_options_that_would_say_nothing_are_refused(
    folklora: Callable[..., Any], tiny_recipe: Any, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "recipe.toml").write_text(tiny_recipe().to_toml())
    places = {"RECIPE": str(tmp_path / "recipe.toml"), "FILE": str(written(tmp_path))}
    refused = folklora("inspect", *(places.get(each, each) for each in arguments))
    assert refused.code == 2
    assert refused.out == ""
    assert refused.err.startswith("error: ")
    assert refused.err.count("\n") == 1
    assert said in refused.err


def test_where_nothing_can_be_written(folklora: Callable[..., Any], tmp_path: Path) -> None:
    file, blocked = written(tmp_path), tmp_path / "file"
    blocked.write_text("in the way")
    for folder in (blocked, blocked / "below"):
        with pytest.raises((DataError, RunError)):
            audit_file(file, to=folder)
        refused = folklora("inspect", "--data", file, "--out", folder)
        assert refused.code == 2
        assert refused.err.count("\n") == 1
    assert blocked.read_text() == "in the way"


def test_what_is_asked_wrong_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for wrong, said in (({"epsilon": 0.0}, "epsilon = 0"), ({"to": tmp_path / "file"}, "allowed: a folder")):
        with pytest.raises(DataError, match=said):
            audit_file(tmp_path / "nowhere.csv", **wrong)


def test_a_recipe_that_weighs_by_the_audit_is_said_to_tell_more(tiny_recipe: Any, tmp_path: Path) -> None:
    file = written(tmp_path)
    plain = audit_file(file, tiny_recipe())
    assert not any("quality" in line for line in plain["leaves"])
    document = audit_file(file, tiny_recipe("audit.weights=both"), to=tmp_path / "out")
    (line,) = (line for line in document["leaves"] if "quality" in line)
    assert f"{document['quality']['both']:.3g}" in line
    assert "without noise" in line
    assert line in text_of(tmp_path / "out" / "audit.html")


def test_less_than_no_uncertainty_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "a b\n" * 50)
    document = audit_file(tmp_path / "rows.csv", to=tmp_path / "out")
    assert document["surrogates"]["observed"] < 0  # as `approximate_entropy` says of very short texts
    assert not (tmp_path / "out" / "figures" / "order.png").exists()
    assert "below 0" in text_of(tmp_path / "out" / "audit.html")


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_in_a_browser(browser: Any, tmp_path: Path, theme: str) -> None:
    audit_file(written(tmp_path, 400, labels=40), label="label", epsilon=3.0, to=tmp_path / "out")
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for width in (1280, 360):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "out" / "audit.html").as_uri())
        wide = browser.execute_script(
            "return Math.max(document.body.scrollWidth, document.documentElement.scrollWidth)"
        )
        assert wide <= width
        assert all(browser.execute_script("return [...document.images].map(image => image.naturalWidth)"))
        assert len(browser.execute_script("return [...document.images].map(i => i.currentSrc)")) == 4
    shown = browser.execute_script("return document.images[0].currentSrc")
    other = browser.execute_script("return document.images[0].src")
    assert (shown == other) == (theme == "light")
    browser.find_element("link text", "What may leave").click()
    assert browser.current_url.endswith("#release")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
