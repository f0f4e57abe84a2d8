"""The numbers behind the pictures, and pictures of odd runs."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from folklora.backbones.metric import ACCURACY, LOSS
from folklora.report.figures import RUN_PICTURES, client_scores, validation
from folklora.report.figures_compare import (
    client_profile,
    compare_pictures,
    curve,
    final_scores,
    score_per_byte,
    score_per_round,
    sent_per_client,
)
from folklora.report.heatmaps import partition, similarity, sizes
from folklora.report.reading import read_comparison, read_run
from folklora.report.style import THEMES, drawing, marks, png, spread_apart, title

WriteRun = Callable[..., dict[str, Any]]
WriteComparison = Callable[..., list[dict[str, Any]]]


def drawn(data: bytes) -> bool:
    """Whether the bytes are an image with a picture on it: more than paper and ink."""
    with Image.open(io.BytesIO(data)) as image:
        colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
        return min(image.size) > 100 and colors is not None and len(colors) > 20


def test_every_picture_of_a_run_is_drawn(ten_clients: Path) -> None:
    for picture in RUN_PICTURES:
        if picture.name not in ("sizes", "privacy", "similarity-before"):  # what these runs have nothing to show of
            assert drawn((ten_clients / "figures" / f"{picture.name}.png").read_bytes()), picture.name


def test_every_picture_of_a_comparison_is_drawn(comparison: tuple[Path, list[dict[str, Any]]]) -> None:
    for picture in compare_pictures(ACCURACY):
        assert drawn((comparison[0] / "figures" / f"{picture.name}.png").read_bytes()), picture.name


def test_bytes_sent_include_what_is_sent_once(comparison: tuple[Path, list[dict[str, Any]]]) -> None:
    run = read_run(comparison[0] / "celora-s0")
    sent = sent_per_client(run)
    assert sent == {number: 461_000 + 3_400 * number for number in range(7)}


def test_the_curve_is_the_mean_over_seeds(comparison: tuple[Path, list[dict[str, Any]]]) -> None:
    runs = [read_run(comparison[0] / f"fedit-s{seed}") for seed in range(3)]
    each = curve(runs)
    assert each is not None
    by_hand = np.array([[v["mean"] for v in _validations(run.path)] for run in runs])
    np.testing.assert_allclose(each.mean, by_hand.mean(axis=0))
    np.testing.assert_allclose(each.std, by_hand.std(axis=0, ddof=1))
    np.testing.assert_allclose(each.sent, 295_000 * np.arange(1, 7))


def _validations(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["validation"] for line in lines if line["validation"]]


def test_a_run_that_stopped_early_keeps_its_last_values(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "long", "fedit", 0, clients="abc", classes=3, rounds=5)
    write_run(tmp_path / "short", "fedit", 1, clients="abc", classes=3, rounds=2)
    each = curve([read_run(tmp_path / "long"), read_run(tmp_path / "short")])
    assert each is not None
    last = [_validations(tmp_path / name)[-1]["mean"] for name in ("long", "short")]
    assert each.rounds.tolist() == [1, 2, 3, 4, 5]
    assert each.mean[-1] == pytest.approx(np.mean(last))
    assert each.sent[-1] == pytest.approx(295_000 * (5 + 2) / 2)


def test_what_sends_nothing_is_a_level_line(comparison: tuple[Path, list[dict[str, Any]]]) -> None:
    read = read_comparison(comparison[0])
    figure = score_per_byte(read)
    assert figure is not None
    ax = figure.axes[0]
    each = curve([run for run in read.runs if run.method == "local"])
    assert each is not None
    level = [line for line in ax.lines if np.array_equal(line.get_ydata(), [each.mean[-1]] * 2)]
    assert len(level) == 1
    assert level[0].get_linestyle() == "--"
    legend = ax.get_legend()
    assert legend is not None
    texts = {text.get_text().split()[0]: text.get_text() for text in legend.get_texts()}
    assert "sends nothing" in texts["local"]
    assert "(test)" in texts["sketch"]
    assert "461 KB" in texts["sketch"]


def test_only_methods_that_send_nothing(tmp_path: Path, write_comparison: WriteComparison) -> None:
    write_comparison(tmp_path, ["local"], 1, clients="abc", classes=3, rounds=2)
    figure = score_per_byte(read_comparison(tmp_path))
    assert figure is not None
    assert drawn(png(figure, "light"))


def test_a_client_of_one_round_of_one_without_insight(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", "local", clients=["solo"], classes=2, rounds=1, insight=False)
    run = read_run(tmp_path / "run")
    figures = {picture.name: picture.draw(run, "dark") for picture in RUN_PICTURES}
    nothing = {"similarity", "similarity-before", "sizes", "traffic", "privacy"}
    assert {name for name, figure in figures.items() if figure is None} == nothing
    assert all(drawn(png(figure, "dark")) for figure in figures.values() if figure is not None)


@pytest.mark.parametrize(
    "of", [{"counts": False, "classes": 3}, {"classes": 1, "insight": False}], ids=["no counts", "no labels"]
)
def test_where_there_are_no_counts_of_classes_the_sizes_are_shown(
    tmp_path: Path, write_run: WriteRun, of: dict[str, Any]
) -> None:
    write_run(tmp_path / "run", rounds=2, clients="abc", **of)
    run = read_run(tmp_path / "run")
    assert partition(run) is None
    figure = sizes(run)
    assert figure is not None
    assert drawn(png(figure, "light"))


def test_a_hundred_clients_and_a_hundred_and_fifty_classes(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", clients=[f"phone-{i}" for i in range(100)], classes=150, rounds=80)
    run = read_run(tmp_path / "run")
    for draw in (partition, similarity, client_scores):
        figure = draw(run)
        assert figure is not None
        assert drawn(png(figure, "light"))


def test_rounds_without_validation_are_passed_over(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", rounds=7, every=3, clients="abc", classes=3)
    figure = validation(read_run(tmp_path / "run"))
    assert figure is not None
    assert np.array_equal(figure.axes[0].lines[0].get_xdata(), [3, 6])


def test_similarity_hides_the_diagonal_and_shows_weights_whole(three_clients: Path) -> None:
    figure = similarity(read_run(three_clients))
    assert figure is not None
    written = {ax.get_title(loc="left"): len(ax.texts) for ax in figure.axes if ax.get_title(loc="left")}
    assert written == {"Similarity of data": 6, "Similarity of models": 6, "Mixed similarity": 6, "Weights": 9}


def test_colours_stay_with_a_name_and_differ_in_a_picture() -> None:
    theme = THEMES["light"]
    assert marks(["celora"], theme)["celora"] == marks(["zeta", "fedit", "celora", "local"], theme)["celora"]
    assert marks(["a-new-method"], theme) == marks(["a-new-method"], theme)
    names = ["celora", "fedit", "local", "rolora", "one", "two", "three", "four", "five", "six"]
    assert len({mark.color for mark in marks(names, theme).values()}) == len(names)
    many = marks([*names, *(f"method {i}" for i in range(8))], theme)
    assert len(set(many.values())) == len(many)
    assert [name for name, mark in many.items() if mark.color == many["local"].color] == ["local"]


def test_a_variant_has_a_colour_of_its_own_and_leaves_its_method_the_usual_one() -> None:
    theme = THEMES["light"]
    names = ["celora:similarity=uniform", "celora", "celora:basis=frozen", "zeta:x=1", "zeta", "local", "local:rank=4"]
    found = marks(names, theme)
    assert found["celora"] == marks(["celora"], theme)["celora"]
    assert found["zeta"] == marks(["zeta"], theme)["zeta"]
    assert found["local"] == marks(["local"], theme)["local"]
    assert len({mark.color for mark in found.values()}) == len(names)


def test_long_variants_differ_in_a_picture() -> None:
    assert title("celora") == "celora"
    one, two = (title(f"celora:similarity=uniform:basis=frozen:train.lr=1e-{n}") for n in (3, 4))
    assert len(one) == 30
    assert one != two


def test_labels_of_many_methods_stay_inside_the_picture(tmp_path: Path, write_comparison: WriteComparison) -> None:
    write_comparison(tmp_path, [f"method-{i}" for i in range(14)], 1, clients="ab", classes=2, rounds=3, insight=False)
    for draw in (score_per_byte, score_per_round):
        figure = draw(read_comparison(tmp_path))
        assert figure is not None
        with drawing("light"):
            figure.draw_without_rendering()  # lays the figure out
        ax = figure.axes[0]
        legend = ax.get_legend()
        boxes = [Text.get_window_extent(text) for text in (legend.get_texts() if legend else ax.texts)]
        assert len(boxes) == 14
        for box in boxes:
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height
        boxes.sort(key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))


def test_labels_are_spread_no_further_than_needed() -> None:
    np.testing.assert_allclose(spread_apart([0.0, 1.0], 0.1), [0.0, 1.0])
    np.testing.assert_allclose(spread_apart([0.5, 0.5, 0.5], 0.1), [0.4, 0.5, 0.6])
    generator = np.random.default_rng(0)
    places = generator.random(12)
    spread = spread_apart(places, 0.05)
    assert np.all(np.diff(np.sort(spread)) >= 0.05 - 1e-12)
    assert (np.argsort(spread) == np.argsort(places)).all()


def test_a_picture_is_the_same_each_time(ten_clients: Path) -> None:
    run = read_run(ten_clients)
    with drawing("light"):
        one, two = client_scores(run), client_scores(run)
    assert one is not None
    assert two is not None
    assert png(one, "light") == png(two, "light")


# -- judged by a loss --------------------------------------------------------------------------------------------------


def test_every_picture_of_losses_is_drawn(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    named = {path.stem for path in (losses[0] / "figures").glob("*.png")}
    assert named == {"loss-per-byte", "loss-per-round", "test-loss", "client-profile"}
    for path in [*(losses[0] / "figures").glob("*.png"), *(losses[0] / "celora-s0" / "figures").glob("*.png")]:
        assert drawn(path.read_bytes()), path
    captions = " ".join(picture.caption for picture in compare_pictures(LOSS))
    assert "Down is better, left is cheaper" in captions
    assert "per cent" not in captions


def test_the_band_of_losses_ends_at_the_least(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    run = read_run(losses[0] / "celora-s0")
    figure = validation(run)
    assert figure is not None
    top, below = figure.axes
    last = _validations(run.path)[-1]
    written = {text.get_text() for text in top.texts}
    least, most = min(last["clients"].values()), max(last["clients"].values())
    assert written == {f"mean {last['mean']:.3f}", f"worst tenth {most:.3f}", f"best {least:.3f}"}
    assert (top.get_ylabel(), below.get_ylabel()) == ("validation loss", "training\nloss")
    assert not any("%" in label.get_text() for label in top.get_yticklabels())


def test_clients_with_the_least_loss_come_first(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    run = read_run(losses[0] / "celora-s0")
    figure = client_scores(run)
    assert figure is not None
    top, bottom = figure.axes
    order = sorted(run.results, key=lambda client: run.results[client].score)
    assert [label.get_text() for label in bottom.get_xticklabels()] == order
    heights = [bar.get_height() for bar in top.patches]
    assert heights == [run.results[client].score for client in order]
    assert top.get_ylim()[0] == 0
    assert top.get_ylim()[1] > max(heights)


def test_profiles_of_losses_fall_from_the_worst_to_the_best(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    read = read_comparison(losses[0])
    figure = client_profile(read)
    assert figure is not None
    seeds = [[result.score for result in run.results.values()] for run in read.finished_runs("celora")]
    panels = [ax for ax in figure.axes if ax.patches]
    panel = next(ax for ax in panels if ax.get_title(loc="left").startswith("celora"))
    np.testing.assert_allclose(
        [bar.get_height() for bar in panel.patches], np.mean([sorted(each, reverse=True) for each in seeds], axis=0)
    )
    highest = max(bar.get_height() for ax in panels for bar in ax.patches)
    assert all(ax.get_ylim()[0] == 0 and ax.get_ylim()[1] >= highest for ax in panels)


def test_no_stroke_runs_through_a_number(losses: tuple[Path, list[dict[str, Any]]]) -> None:
    """Of a loss, the worst tenth lies behind the mean, where the number stands."""
    figure = final_scores(read_comparison(losses[0]))
    assert figure is not None
    with drawing("light"):
        figure.draw_without_rendering()
    (ax,) = figure.axes
    rows = {row["method"]: row for row in losses[1]}
    assert len(ax.texts) == len(rows)
    to_the_right = [text.get_window_extent().x0 for text in ax.texts]
    strokes = [line for line in ax.lines if line.get_linewidth() == 2.4]
    ends = [ax.transData.transform((float(np.max(line.get_xdata())), 0))[0] for line in strokes]
    assert len(ends) == len(to_the_right)
    assert all(text > stroke + 2 for text, stroke in zip(to_the_right, ends, strict=True))
