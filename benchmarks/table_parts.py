"""What all pages' tables are made of: results, Markdown, a variant's name, a mean and its spread, a picture's link."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
NOT_RUN = "*Not run yet.*\n"

Row = dict[str, Any]


def load(name: str) -> Any:
    """``results/<name>.json``, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def label(variant: str) -> str:
    """``celora:similarity=data`` -> ``celora `similarity=data```."""
    method, *settings = variant.split(":")
    return method + "".join(f" `{s.removeprefix('adapter.').removeprefix('train.')}`" for s in settings)


def spread(values: Iterable[float], form: Callable[[float], str], planned: int = 0) -> str:
    """Mean and, of more than one, standard deviation; ``-`` of none: ``81.2 ± 4.0``, ``81.2 ± 4.0 (2 of 3)``."""
    found = list(values)
    if not found:
        return "-"
    text = form(statistics.fmean(found)) + (f" ± {form(statistics.stdev(found))}" if len(found) > 1 else "")
    return text if len(found) >= planned else f"{text} ({len(found)} of {planned})"


def counted(count: int, what: str) -> str:
    """``1 setting``, ``2 settings``."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def decimals(digits: int) -> Callable[[float], str]:
    """A form of numbers for `spread`."""
    return lambda value: f"{value:.{digits}f}"


def percent(shares: Iterable[float], planned: int = 0) -> str:
    """As `spread`, of shares, with one decimal."""
    return spread((100 * share for share in shares), decimals(1), planned)


def picture(file: str, what: str) -> Callable[[], str]:
    """The link to a picture that `figures.py` has drawn."""

    def link() -> str:
        return f"![{what}](figures/{file}.png)\n" if (FIGURES / f"{file}.png").exists() else NOT_RUN

    return link
