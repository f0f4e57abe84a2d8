"""The audit of real small runs: what it says left is what left, hostile files stay text, the page is the document."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from folklora.errors import FolkLoraError, RunError
from folklora.federation.run import run
from folklora.recipe import Recipe
from folklora.report.attacked import LONGEST, MOST_PIXELS
from folklora.report.audit import MOST_ATTACKS, audit
from folklora.report.measures import measure
from folklora.report.page import write_report

Document = dict[str, Any]
SILENT = {"kind", "rule", "weight", "key", "name", "unit", "schema", "engine", "shapes_known", "finished", "pictures"}
"""Keys whose values are names for programs: what they mean is on the page in words."""


@pytest.fixture(scope="module")
def recipe_of(tiny_model: Callable[[str], Path], tiny_data: Path) -> Callable[..., Recipe]:
    def make(*overrides: str) -> Recipe:
        document = {
            "model": {"name": str(tiny_model("bert")), "dtype": "float32"},
            "data": {"source": str(tiny_data), "clients": 4, "alpha": 1.0},
            "adapter": {"rank": 4},
            "train": {"rounds": 2, "batch_size": 8, "lr": 5e-3},
        }
        return Recipe.parse(document, overrides)

    return make


@pytest.fixture(scope="module")
def played(recipe_of: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``played("method.name=fedit", ...)`` -> the directory of that run, played once."""
    made: dict[tuple[str, ...], Path] = {}

    def play(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("runs") / overrides[0].rpartition("=")[2]
            run(recipe_of(*overrides), made[overrides])
        return made[overrides]

    return play


@pytest.fixture
def copied(played: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`played`, to be changed by one test."""
    written = shutil.ignore_patterns("audit.*", "report.html")

    def copy(*overrides: str) -> Path:
        return Path(shutil.copytree(played(*overrides), tmp_path / "run", ignore=written))

    return copy


def text_of(page: Path) -> str:
    """What a reader sees, in one line."""
    source = page.read_text(encoding="utf-8")
    body = source[source.index("<main>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def leaves(document: Any, key: str = "") -> Iterator[str]:
    """Strings that people should find on the page."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield from leaves(value, name)
    elif isinstance(document, list):
        for value in document:
            yield from leaves(value, key)
    elif isinstance(document, str) and key not in SILENT and not document.startswith("data:"):
        yield document


def lines(path: Path) -> list[Document]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def attack(path: Path, name: str = "tag", **changed: Any) -> Path:
    """A result as `folklora attack` writes it."""
    record = {
        "attack": name,
        "title": name.upper(),
        "method": "celora",
        "variant": "celora",
        "seed": 0,
        "view": "sent",
        "knowledge": {"labels": True, "lengths": True, "bases": False, "rehearsed": False, "rounds": 1, "prior": None},
        "batch": 1,
        "warmup": 1,
        "steps": 1,
        "budget": 200,
        "form": "text",
        "metrics": {"token_recall": {"mean": 0.71, "control": 0.12, "gain": 0.59, "higher": True, "values": [0.71]}},
        "victims": [{"client": "2", "original": ["w1 w2"], "recovered": ["w2 w1"], "control": ["w9"]}],
        **changed,
    }
    file = path / "attacks" / f"{name}-celora-s0.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record))
    return file


def picture(side: int = 12) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- what left -------------------------------------------------------------------------------------------------------


def test_what_left_is_what_was_counted(played: Callable[..., Path]) -> None:
    path = played("method.name=celora")
    document = audit(path)
    once, *rounds = lines(path)
    sent = {line["kind"]: line for line in document["left"]["lines"]}
    assert set(sent) == {"C", "mixtures"}
    assert sent["mixtures"]["bytes"] == once["bytes_up"]
    assert sent["C"]["bytes"] == sum(line["bytes_up"] for line in rounds)
    kept = json.loads((path / "checkpoint.json").read_text())["clients"]["0"]
    cores = {name: tensor for name, tensor in load_file(path / kept).items() if "/C/" in f"/{name}"}
    numbers = sum(tensor.size for tensor in cores.values())
    assert sent["C"]["numbers"] == (numbers, numbers)
    assert sent["C"]["shapes"] == "4 x 4"
    parts = document["left"]["clients"]
    assert sum(part["once"] for part in parts) == once["bytes_up"]
    assert sum(part["up"] for part in parts) == sum(line["bytes_up"] for line in rounds)
    assert sum(part["down"] for part in parts) == sum(line["bytes_down"] for line in [once, *rounds])


def test_what_newcomers_sent_is_counted_too(played: Callable[..., Path]) -> None:
    path = played("method.name=folklora", "newcomers.share=0.25")
    joined = json.loads((path / "summary.json").read_text())["newcomers"]
    (sketch,) = (line for line in audit(path)["left"]["lines"] if line["kind"] == "statistics")
    before = lines(path)[0]["bytes_up"]
    assert joined["bytes_up_per_client"] > 0
    assert sketch["bytes"] == before + joined["bytes_up_per_client"] * len(joined["clients"])
    assert "newcomer" in sketch["often"]
    assert "with those of 1 newcomer." in text_of(path / "audit.html")


def test_a_message_of_many_kinds_is_shared_out_among_them(played: Callable[..., Path]) -> None:
    path = played("method.name=fedit")
    found = audit(path)["left"]["lines"]
    assert {line["kind"] for line in found} == {"A", "B", "head"}
    up = sum(line["bytes_up"] for line in lines(path))
    assert abs(sum(line["bytes"] for line in found) - up) <= len(found)
    (a,) = [line for line in found if line["kind"] == "A"]
    assert a["bytes"] / up == pytest.approx(a["numbers"][0] / sum(line["numbers"][0] for line in found), rel=1e-3)


def test_factors_that_take_turns_are_said_to(played: Callable[..., Path]) -> None:
    found = {line["kind"]: line for line in audit(played("method.name=rolora"))["left"]["lines"]}
    assert {kind: line["often"] for kind, line in found.items()} == {
        "A": "every second round",
        "B": "every second round",
        "head": "each round that the client takes part in",
    }
    up = [line["bytes_up"] for line in lines(played("method.name=rolora"))[1:]]
    assert found["A"]["bytes"] < max(up)
    assert found["B"]["bytes"] < max(up)


def test_what_was_not_its_turn_yet_has_not_left(played: Callable[..., Path]) -> None:
    """Round 1 is B's with A frozen, says the paper; round 2 never came."""
    found = audit(played("method.name=rolora", "train.rounds=1"))["left"]["lines"]
    assert {line["kind"] for line in found if line["bytes"]} == {"B", "head"}


def test_clients_that_differ(played: Callable[..., Path]) -> None:
    document = audit(played("method.name=zeropad", "adapter.rank=[2,4,4,4]"))
    (a,) = [line for line in document["left"]["lines"] if line["kind"] == "A"]
    assert a["numbers"][0] * 2 == a["numbers"][1]
    numbers = [part["numbers"] for part in document["left"]["clients"]]
    assert numbers[0] < numbers[1] == numbers[2] == numbers[3]


def test_nothing_left_where_nothing_is_sent(played: Callable[..., Path]) -> None:
    document = audit(played("method.name=local"))
    assert document["left"]["lines"] == []
    assert document["left"]["up"] == 0
    found = {finding["rule"] for finding in document["findings"]}
    assert not found & {"updates-readable", "no-noise", "liars", "not-attacked", "sketch-in-clear"}
    assert {line["kind"] for line in document["owned"] if line["leaves"]} == set()


# -- runs of any age ---------------------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    for name in ("metrics.jsonl", "summary.json", "checkpoint.json"):
        (path / name).unlink()
    document = audit(path)
    assert document["run"]["finished"] is False
    assert document["run"]["rounds"] == 0
    assert [line["kind"] for line in document["left"]["lines"]] == ["C", "mixtures"]
    assert document["left"]["up"] == 0
    assert document["summary"][0]["says"].startswith("Nothing has left a client yet")
    assert ", not finished" in text_of(path / "audit.html")


def test_a_run_without_shapes_on_record(copied: Callable[..., Path]) -> None:
    path = copied("method.name=fedit")
    known = audit(path)
    (path / "contract.json").unlink()
    document = audit(path)
    assert document["run"]["shapes_known"] is False
    assert [line["kind"] for line in document["left"]["lines"]] == [line["kind"] for line in known["left"]["lines"]]
    assert {line["shapes"] for line in document["left"]["lines"]} == {"not on record"}
    assert {line["numbers"] for line in document["left"]["lines"]} == {None}
    assert document["findings"] == known["findings"]
    assert "before shapes were put on record" in text_of(path / "audit.html")


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_no_attack_is_said_and_not_called_safety(played: Callable[..., Path]) -> None:
    document = audit(played("method.name=celora"))
    assert document["attacks"]["says"].startswith("No attack has been run on this run")
    assert any(finding["rule"] == "not-attacked" for finding in document["findings"])


def test_the_strongest_attack_on_what_was_sent_comes_first(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    attack(path, "tag")
    weak = {"token_recall": {"mean": 0.2, "control": 0.12, "gain": 0.08, "higher": True}}
    attack(path, "dlg", metrics=weak)
    bound = {"token_recall": {"mean": 1.0, "control": 0.0, "gain": 1.0, "higher": True}}
    attack(path, "span", view="gradient", metrics=bound)
    document = audit(path)
    assert [result["attack"] for result in document["attacks"]["results"]] == ["tag", "dlg", "span"]
    assert "recovered 71 % of a text's tokens from what was really sent" in document["attacks"]["says"]
    assert "came to 12 %" in document["attacks"]["says"]
    (found,) = [finding for finding in document["findings"] if finding["rule"] == "attack-recovered"]
    assert "71 %" in found["what"]
    text = text_of(path / "audit.html")
    assert "w2 w1" in text
    assert "They are private data" in text
    assert "the exact gradient of one step, which nobody sent" in text


def test_less_can_be_more_leakage(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    attack(
        path, "labels", metrics={"label_distance_sketch": {"mean": 0.1, "control": 0.6, "gain": -0.5, "higher": False}}
    )
    document = audit(path)
    assert any(finding["rule"] == "attack-recovered" for finding in document["findings"])
    assert "(less is more leakage)" in document["attacks"]["results"][0]["metrics"][0]["words"]


def test_results_on_whole_clients(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    told = {"client": "2", "original": {"amber": 0.6, "dun": 0.4}, "recovered": {"bias": {"amber": 0.55}}}
    attack(path, "labels", victims=[told])
    counted = {"tpr_at_0.01_lira_online": {"mean": 0.3, "control": 0.01, "gain": 0.29, "higher": True}}
    attack(path, "membership", metrics=counted, victims=[{"client": "1", "members": 30, "others": 9}], notes=["few"])
    text = " ".join([audit(path)["attacks"]["says"], text_of(path / "audit.html")])
    assert "amber 60 %, dun 40 %" in text
    assert "bias: amber 55 %" in text
    assert "members found at few false alarms: 0.01 lira online" in text
    assert "few" in text


def test_pictures_are_shown_as_pictures(copied: Callable[..., Path]) -> None:
    path, uri = copied("method.name=celora"), picture()
    victims = [{"client": "1", "original": [uri], "recovered": [uri], "control": [uri]}]
    attack(path, "inverting", form="image", victims=victims)
    audit(path)
    assert (path / "audit.html").read_text().count(f'<img src="{html.escape(uri)}"') == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"form": "image", "victims": [{"client": "1", "original": ["data:image/svg+xml;base64,PHN2Zz4="]}]}, "PNG"),
        ({"form": "image", "victims": [{"client": "1", "original": ["javascript:alert(1)"]}]}, "PNG"),
        ({"form": "image", "victims": [{"client": "1", "recovered": ["data:image/png;base64,PHN2Zz4="]}]}, "PNG"),
        ({"form": "image", "victims": [{"client": "1", "original": [picture(MOST_PIXELS + 1)]}]}, "PNG"),
        ({"form": "image", "victims": [{"client": "1", "original": [picture() + '" onload="alert(1)']}]}, "PNG"),
        ({"attack": "<b>"}, "attack"),
        ({"view": "guessed"}, "view"),
        ({"metrics": {"Token Recall": {"mean": 1}}}, "metrics"),
        ({"metrics": {"token_recall": {"mean": float("nan")}}}, "metrics.token_recall.mean"),
        ({"batch": -1}, "batch"),
        ({"title": "x" * 10_000}, "title"),
        ({"victims": [{"client": "1", "original": 3}]}, "victims.0.original"),
    ],
)
def test_a_result_that_is_none_is_refused_by_name(
    copied: Callable[..., Path], changed: dict[str, Any], said: str
) -> None:
    path = copied("method.name=celora")
    file = attack(path, "tag")
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, **changed}))
    with pytest.raises(RunError) as refusal:
        audit(path)
    assert str(file) in str(refusal.value)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (path / "audit.json").exists()
    page = write_report(path)  # which its audit must not keep from being written
    assert "There is no privacy audit of this run" in text_of(page)


def test_a_result_as_large_as_a_disk_is_not_read(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    file = attack(path, "tag")
    with file.open("r+b") as handle:
        handle.truncate(1 << 40)  # a hole, which no disk holds
    with pytest.raises(RunError, match="bytes; allowed: at most"):
        audit(path)


def test_strings_of_a_result_are_text_and_short(copied: Callable[..., Path]) -> None:
    path, bad = copied("method.name=celora"), "<script>alert('x')</script>"
    victims = [{"client": bad, "original": [bad, "a" * 10_000], "recovered": ["\x1b[31mred\u202e"], "control": []}]
    attack(path, "tag", title=bad, variant=bad, victims=victims, notes=[bad])
    document = audit(path)
    source = (path / "audit.html").read_text()
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    shown = document["attacks"]["results"][0]["examples"]
    assert len(shown[1]["original"]) == LONGEST + 1
    assert shown[0]["recovered"] == " [31mred "


def test_many_results_are_counted_and_not_all_shown(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    for i in range(MOST_ATTACKS + 3):
        attack(path, f"a{i}")
    document = audit(path)
    assert len(document["attacks"]["results"]) == MOST_ATTACKS
    assert document["attacks"]["not_shown"] == 3
    assert "3 weaker results are not shown" in text_of(path / "audit.html")


@pytest.mark.parametrize(
    ("name", "value", "gain", "said"),
    [
        ("token_recall", 0.714, False, "71 %"),
        ("token_recall", 0.714, True, "+71 points"),
        ("token_recall", -0.1, True, "-10 points"),
        ("token_recall", 0.004, True, "0 points"),
        ("auc_lira_online", 0.5234, False, "0.523"),
        ("ssim", -1e-9, False, "-1e-09"),
        ("never_heard_of", 12.0, False, "12"),
    ],
)
def test_numbers_of_attacks(name: str, value: float, gain: bool, said: str) -> None:
    assert measure(name).number(value, gain=gain) == said


def test_a_metric_nobody_knows_is_told_by_its_name(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    attack(path, "tag", metrics={"never_heard_of": {"mean": 0.9, "control": 0.1, "gain": 0.8, "higher": True}})
    document = audit(path)
    assert "came to 0.9 in never heard of" in document["attacks"]["says"]
    assert not any(finding["rule"] == "attack-recovered" for finding in document["findings"])


def test_an_attack_is_judged_by_what_it_gained_most(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    found = {
        "token_recall": {"mean": 0.26, "control": 0.2, "gain": 0.06},
        "summed_precision": {"mean": 0.39, "control": 0.07, "gain": 0.32},
        "exact_match": {"mean": 1.0, "control": 0.0, "gain": 1.0},
    }
    attack(path, "mixture", metrics=found)
    assert "was right in 39 % of its answers" in audit(path)["attacks"]["says"]


# -- page and document -------------------------------------------------------------------------------------------------


def test_the_page_says_all_that_the_document_says(copied: Callable[..., Path]) -> None:
    path = copied("method.name=celora")
    attack(path)
    (path / "recipe.toml").write_text(
        (path / "recipe.toml").read_text().replace('unit = "none"', 'unit = "example"\nepsilon = 4.0')
    )
    spent = [
        {**line, "privacy": {"unit": "example", "epsilon": 0.5 * line["round"], "delta": 1e-5, "clients": {"0": 0.25}}}
        for line in lines(path)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spent))
    document = audit(path)
    assert json.loads((path / "audit.json").read_text()) == json.loads(json.dumps(document))
    text = text_of(path / "audit.html")
    for said in leaves(document):
        assert " ".join(said.split()) in text, said
    assert "epsilon = 1 at delta = 1e-05 after round 2" in text
    assert "Epsilon by round: 0: 0, 1: 0.5, 2: 1." in text


def test_the_report_tells_what_matters_and_leads_to_the_audit(played: Callable[..., Path]) -> None:
    path = played("method.name=fedit")
    page = write_report(path)
    document = json.loads((path / "audit.json").read_text())
    text = text_of(page)
    for line in document["summary"]:
        assert line["says"] in text
    assert '<a href="audit.html">' in page.read_text()
    assert (path / "audit.html").is_file()


def test_the_command(folklora: Callable[..., Any], copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied("method.name=fedit")
    told = folklora("audit", path, "--json")
    assert told.code == 0
    assert json.loads(told.out) == json.loads((path / "audit.json").read_text())
    shown = folklora("audit", path)
    assert shown.code == 0
    assert f"audit: {path / 'audit.html'}" in shown.out
    (path / "contract.json").write_text('{"sites": []}')
    for bad in (tmp_path / "nowhere", tmp_path, path):
        refused = folklora("audit", bad)
        assert refused.code == 2
        assert refused.out == ""
        assert refused.err.startswith("error: ")
        assert refused.err.count("\n") == 1
        assert str(bad) in refused.err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sites", [{"name": "x", "d_in": 2**40, "d_out": 1}]),
        ("sites", [{"name": "x", "d_in": 0, "d_out": 1}]),
        ("ranks", {"0": 4}),
        ("ranks", {"0": 2**20, "1": 4, "2": 4, "3": 4}),
        ("classes", -1),
        ("surprise", 1),
    ],
)
def test_a_contract_that_cannot_be_is_refused(copied: Callable[..., Path], key: str, value: Any) -> None:
    path = copied("method.name=celora")
    contract = json.loads((path / "contract.json").read_text())
    (path / "contract.json").write_text(json.dumps({**contract, key: value}))
    with pytest.raises(FolkLoraError) as refusal:
        audit(path)
    assert "\n" not in str(refusal.value)


def test_the_page_in_a_browser(browser: Any, copied: Callable[..., Path]) -> None:
    path, uri = copied("method.name=celora"), picture()
    attack(path, "tag", victims=[{"client": "2", "original": ["w" * 390], "recovered": ["w1"], "control": []}])
    attack(path, "inverting", form="image", victims=[{"client": "1", "original": [uri], "recovered": [uri]}])
    write_report(path)
    for name in ("audit.html", "report.html"):
        for width in (1280, 420):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get((path / name).as_uri())
            wide = browser.execute_script(
                "return Math.max(document.body.scrollWidth, document.documentElement.scrollWidth)"
            )
            assert wide <= width
            assert all(browser.execute_script("return [...document.images].map(image => image.naturalWidth)"))
    browser.find_element("link text", "The whole audit").click()
    assert browser.current_url.endswith("/audit.html")
    assert len(base64.b64decode(browser.print_page())) > 10_000
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
