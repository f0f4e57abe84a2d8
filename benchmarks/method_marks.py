"""How pictures of results show a method or a variant of one: its name, and a mark for what it sends and leaves."""

from __future__ import annotations

from accuracy_tables import own_model

from folklora.methods import METHODS
from folklora.report.style import Theme, title


def name(variant: str) -> str:
    """``fedit:train.optimizer=sgd:scaffold=true`` -> ``fedit optimizer=sgd scaffold``."""
    method, *options = variant.split(":")
    told = [o.removeprefix("train.").removeprefix("adapter.").removesuffix("=true") for o in options]
    return title(" ".join((method, *told)), 34)


def kind(variant: str, theme: Theme) -> tuple[str, str, str]:
    """Family, colour and marker: what travels, and whether all end with one model."""
    cls = METHODS[variant.partition(":")[0]]
    if not cls.travels:
        return "no adapter travels", theme.palette[9], "D"
    if cls.core:
        return "a small core travels", theme.palette[2], "s"
    if own_model(cls):
        return "factors travel, a model each", theme.palette[1], "^"
    return "factors travel, one model for all", theme.palette[0], "o"
