"""From axes to recipes: which layers, which rank, which share of the data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from folklora.errors import RecipeError
from folklora.federation.setup import prepare
from folklora.planning.axes import Axes, Cell, cell_of, layers_of, parse_axes, recipe_of
from folklora.recipe import Recipe


@pytest.fixture(scope="module")
def recipe(tiny_model: Callable[[str], Path], tiny_data: Path) -> Recipe:
    return Recipe.parse(
        {
            "model": {"name": str(tiny_model("bert")), "dtype": "float32"},
            "data": {"source": str(tiny_data), "clients": 3, "partition": "iid"},
            "adapter": {"rank": 4},
            "method": {"name": "fedit"},
        }
    )


def test_levels_rise_and_what_is_not_named_is_the_recipes(recipe: Recipe) -> None:
    assert parse_axes(["adapter.rank=4, 1,2"], recipe) == Axes((2,), (1, 2, 4), (1.0,))
    axes = parse_axes(["layers=2,1", "data=1,0.25,0.5"], recipe)
    assert axes == Axes((1, 2), (4,), (0.25, 0.5, 1.0))
    assert len(axes.cells()) == 6
    assert {cell.data for cell in axes.small()} == {0.25, 0.5}  # two layers are too few levels to leave one out
    assert {cell.layers for cell in axes.small()} == {1, 2}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["layer=1,2"], "no such axis; did you mean 'layers'? (allowed: adapter.rank, layers, data)"),
        (["layers"], "allowed: NAME=LEVEL,LEVEL,..."),
        (["layers=1", "layers=2"], "is given twice"),
        (["layers=1,1"], "names a level twice"),
        (
            [
                "adapter.rank=" + ",".join(map(str, range(1, 201))),
                "data=" + ",".join(f"{i / 99:.4f}" for i in range(1, 52)),
            ],
            "10,200 combinations; allowed: at most 10,000",
        ),
        (["layers=1,3"], "the recipe adapts 2 layers; allowed: 1 to 2"),
        (["layers=0"], "'0'; allowed: whole numbers from 1"),
        (["adapter.rank=2.5"], "'2.5'; allowed: whole numbers from 1"),
        (["data=0"], "'0'; allowed: shares above 0, at most 1"),
        (["data=nan"], "'nan'; allowed: shares above 0, at most 1"),
        (["data=0.5,"], "''; allowed: shares above 0"),
    ],
)
def test_axes_that_cannot_be(recipe: Recipe, texts: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_axes(texts, recipe)


def test_fewer_layers_are_the_topmost_and_all_are_the_recipe_itself(recipe: Recipe) -> None:
    layers = layers_of(recipe)
    assert list(layers) == ["encoder.layer.0.", "encoder.layer.1."]
    top = recipe_of(Cell(1, 2, 0.5), recipe, 3)
    assert [site.name for site in prepare(top).method.adapter.sites] == [
        f"encoder.layer.1.{name}" for name in layers["encoder.layer.1."]
    ]
    assert (top.adapter.rank, top.data.train_share, top.seed) == (2, 0.5, 3)
    assert cell_of(top) == Cell(1, 2, 0.5)
    assert recipe_of(Cell(2, 4, 1.0), recipe, 0) == recipe
    assert cell_of(recipe) == Cell(2, 4, 1.0)


def test_ten_layers_come_behind_the_second() -> None:
    from folklora.planning.axes import _layers

    assert list(_layers([f"h.{i}.q" for i in (10, 2, 1)] + ["lm_head"])) == ["h.1.", "h.2.", "h.10."]


def test_clients_with_ranks_of_their_own_have_no_place(recipe: Recipe) -> None:
    mixed = Recipe.parse({**recipe.model_dump(), "adapter": {"rank": [1, 2, 4]}})
    with pytest.raises(RecipeError, match=r"the recipe has several ranks; allowed: adapter\.rank=\.\.\."):
        parse_axes(["layers=1,2"], mixed)
    with pytest.raises(RecipeError, match="its clients have several ranks"):
        cell_of(mixed)
    assert recipe_of(Cell(2, 2, 1.0), mixed, 0).adapter.rank == 2
