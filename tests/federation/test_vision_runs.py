"""Whole runs over pictures: a recipe over an ``.npz``, two rounds, an interruption, and what of it comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from folklora.errors import BackboneError, FolkLoraError
from folklora.federation.rounds import Silent
from folklora.federation.run import resume, run
from folklora.recipe import Recipe


@pytest.fixture
def recipe(seeing_model: Callable[[str], Path], coloured: Path) -> Callable[..., Recipe]:
    def make(kind: str, *overrides: str) -> Recipe:
        model: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
        data: dict[str, Any] = {"source": str(coloured), "clients": 3, "alpha": 1.0, "image": "image"}
        if kind == "vit":
            model |= {"name": str(seeing_model("vit"))}
        else:
            model |= {"name": str(seeing_model(kind.partition(" ")[0])), "task": "image-text", "template": "{}"}
        if kind.endswith("captions"):
            data |= {"caption": "caption", "partition": "natural", "by": "room"}
        document = {
            "model": model,
            "data": data,
            "adapter": {"rank": 2, "dropout": 0.1},
            "method": {"name": "fedit"},
            "train": {"rounds": 2, "batch_size": 8, "lr": 1e-2, "local_epochs": 2},
        }
        return Recipe.parse(document, overrides)

    return make


class Interrupted(Exception): ...


class Impatient(Silent):
    """Ends the process's patience after the first round."""

    def line(self, metrics: Mapping[str, Any]) -> None:
        if metrics["round"] == 1:
            raise Interrupted


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("vit", ["method.name=celora"]),
        ("clip", ["method.name=celora"]),
        ("clip", ["adapter.tower=image", "method.name=fedsa"]),
        ("siglip", ["adapter.tower=text"]),
        ("clip captions", []),
        ("siglip captions", ["adapter.tower=image"]),
    ],
)
def test_interrupted_and_resumed_is_as_if_nothing_had_been(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    facts: Callable[[Path], dict[str, Any]],
    kind: str,
    overrides: list[str],
) -> None:
    made = recipe(kind, *overrides)
    summary = run(made, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(made, tmp_path / "stopped", Impatient())
    assert not (tmp_path / "stopped" / "summary.json").exists()
    resume(tmp_path / "stopped")
    assert facts(tmp_path / "stopped") == facts(tmp_path / "whole")
    row = summary["row"]
    assert 0 <= row["accuracy_mean"] <= 1
    assert ("text_to_image_mean" in row) == kind.endswith("captions")


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_colours_are_learned(recipe: Callable[..., Recipe], tmp_path: Path, kind: str) -> None:
    """Chance is a third."""
    summary = run(recipe(kind, "train.rounds=4", "adapter.dropout=0.0"), tmp_path / "run")
    assert summary["row"]["accuracy_mean"] > 0.8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.task=image-text"], "model of kind text"),
        (["data.image=image"], "model of kind text"),
    ],
)
def test_a_model_of_another_kind(
    recipe: Callable[..., Recipe], tiny_model: Callable[[str], Path], tmp_path: Path, overrides: list[str], message: str
) -> None:
    made = recipe("vit", f"model.name={tiny_model('bert')}", *overrides)
    with pytest.raises(BackboneError, match=message):
        run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_template_without_a_place_is_refused_before_work_starts(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(FolkLoraError, match="template"):
        recipe("clip", "model.template=a photo")


@pytest.mark.parametrize("kind", ["vit", "clip", "clip captions"])
def test_over_the_network_engine_it_is_the_same(
    recipe: Callable[..., Recipe], tmp_path: Path, federated: Callable[..., Any], kind: str
) -> None:
    made = recipe(kind, "method.name=celora", "train.cohort=1")
    whole = run(made, tmp_path / "whole")
    clients = ("room-0", "room-1", "room-2") if kind.endswith("captions") else ("0", "1", "2")
    row = federated(made, clients).play()["row"]
    seconds = [name for name in row if name.startswith("seconds")]
    assert {name: row[name] for name in row if name not in [*seconds, "aggregation_error"]} == pytest.approx(
        {name: whole["row"][name] for name in row if name not in [*seconds, "aggregation_error"]}
    )
