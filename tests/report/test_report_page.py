"""The HTML page: self-contained, escaped, honest about what is missing, and sound in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from folklora.errors import RunError
from folklora.report.page import write_compare_report, write_report

WriteRun = Callable[..., dict[str, Any]]
WriteComparison = Callable[..., list[dict[str, Any]]]


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else(
    three_clients: Path, ten_clients: Path, comparison: tuple[Path, list[dict[str, Any]]]
) -> None:
    for folder in (three_clients, ten_clients, comparison[0]):
        page = Reader(folder / "report.html")
        for tag, attributes in page.tags:
            for name in ("src", "href", "srcset", "data", "action"):
                target = attributes.get(name) or "data:"
                beside = (tag, name, target) == ("a", "href", "audit.html") and (folder / target).is_file()
                assert target.startswith("data:") or beside, (tag, name)
        style = re.search(r"<style>(.*?)</style>", (folder / "report.html").read_text(), re.S)
        assert style is not None
        assert "url(" not in style[1]
        assert "@import" not in style[1]
        assert sum(tag == "img" for tag, _ in page.tags) == len(list((folder / "figures").glob("*.png")))


def test_names_are_text_and_never_markup(three_clients: Path) -> None:
    source = (three_clients / "report.html").read_text()
    page = Reader(three_clients / "report.html")
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "<script>alert(1)</script>" in page.text


def test_the_headline_is_the_summary(tmp_path: Path, write_run: WriteRun) -> None:
    row = write_run(tmp_path / "run", clients="abc", classes=3, rounds=3, insight=False)
    text = Reader(write_report(tmp_path / "run")).text
    assert f"{100 * row['accuracy_mean']:.1f} % test accuracy on average over 3 clients" in text
    assert "3.40 KB sent per client and round" in text
    assert "461 KB" in text
    assert "not finished" not in text
    assert "dropped out (simulated)" in text
    assert "Drop-outs and failures: 1" in text
    assert "2 of 3" in text  # the client that dropped out took part in two rounds
    assert (tmp_path / "run" / "recipe.toml").read_text() in text


def test_a_run_that_stopped_early_says_so_and_what_it_was_computed_with(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", clients="abc", classes=3, rounds=4, insight=False, stopped_early=True)
    text = Reader(write_report(tmp_path / "run")).text
    assert "Stopped early: 4 of 4 rounds" in text
    assert "torch 2.13.0" in text
    assert "475 KB" in text  # sent by each client: 461 KB once, 3.4 KB in each of four rounds
    assert "Each client's choice" in text


def test_a_method_without_rounds_promises_no_reply(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", "sketch", clients="abc", classes=3, rounds=0, insight=False)
    text = Reader(write_report(tmp_path / "run")).text
    assert "for 461 KB per client, once." in text
    assert "0 rounds" in text
    assert "Each client's choice" not in text


def test_an_unfinished_run_says_so(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", clients="abc", classes=3, rounds=4, every=2, finished=False, insight=False)
    text = Reader(write_report(tmp_path / "run")).text
    assert "not finished: 4 of 4 rounds" in text
    assert "validation accuracy on average over 3 clients after round 4" in text


def test_a_run_without_any_round(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", "sketch", clients="abc", classes=3, rounds=0, finished=False, insight=False)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "no round has been evaluated yet" in Reader(write_report(tmp_path / "run")).text


def test_the_comparison_names_the_best(comparison: tuple[Path, list[dict[str, Any]]]) -> None:
    text = Reader(comparison[0] / "report.html").text
    assert "6 methods on banking77" in text
    assert "celora reaches the highest mean test accuracy" in text
    assert "over 3 seeds" in text
    assert "writes the page of that run" in text
    assert "not finished" not in text


def test_a_comparison_of_variants(tmp_path: Path, write_comparison: WriteComparison) -> None:
    names = ["celora", "celora:similarity=uniform", "fedit"]
    write_comparison(tmp_path, names, 2, clients="abc", classes=3, rounds=2)
    text = Reader(write_compare_report(tmp_path)).text
    assert "3 variants of 2 methods on banking77" in text
    assert all(f"Recipe of {name}, seed 0" in text for name in names)


def test_an_unfinished_comparison_says_so(tmp_path: Path, write_comparison: WriteComparison) -> None:
    write_comparison(tmp_path, ["celora", "fedit"], 1, clients="abc", classes=3, rounds=2)
    (tmp_path / "compare.json").unlink()
    (tmp_path / "fedit-s0" / "summary.json").unlink()
    text = Reader(write_compare_report(tmp_path)).text
    assert "not finished: 1 of the 2 runs" in text
    assert "fedit-s0" in text


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", clients="abc", classes=3, rounds=1, insight=False)
    (tmp_path / "run" / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match="cannot be written: No space left"):
        write_report(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_text() == "old"
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]


def test_both_pages_in_a_browser(
    browser: Any, three_clients: Path, comparison: tuple[Path, list[dict[str, Any]]]
) -> None:
    for folder, title in ((three_clients, "fedit on banking77"), (comparison[0], "6 methods on banking77")):
        for width in (1280, 420):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get((folder / "report.html").as_uri())
            browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
            assert browser.title == f"{title} · FolkLoRA"
            assert browser.execute_script("return innerWidth") == width
            wide = browser.execute_script(
                "return Math.max(document.body.scrollWidth, document.documentElement.scrollWidth)"
            )
            assert wide <= width
            images = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
            assert images
            assert all(images)
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_of_a_run_that_is_judged_by_its_loss(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    row = losses[1][0]
    text = Reader(losses[0] / "celora-s0" / "report.html").text
    assert f"Test loss {row['loss_mean']:.3f} on average over 5 clients" in text
    assert f"± {row['loss_std_clients']:.3f} std over clients" in text
    assert re.search(rf"Test perplexity, mean\s*{row['perplexity_mean']:.1f}", text)
    assert "accuracy" not in text
    assert " %" not in text


def test_the_page_of_a_run_under_way_that_is_judged_by_its_loss(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", clients="abc", classes=3, rounds=4, finished=False, insight=False, loss=True)
    text = Reader(write_report(tmp_path / "run")).text
    assert re.search(r"Validation loss \d\.\d{3} on average over 3 clients after round 4", text)
    assert "Validation perplexity, mean" in text


def test_the_comparison_of_losses_names_the_lowest(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    text = Reader(losses[0] / "report.html").text
    assert "celora reaches the lowest mean test loss, " in text
    assert "accuracy" not in text
    assert " %" not in text
