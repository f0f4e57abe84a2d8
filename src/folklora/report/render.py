"""A page as data, its pictures, and the one HTML file they become."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jinja2
from matplotlib.figure import Figure

from folklora.errors import RunError
from folklora.report.style import DPI, ThemeName, png
from folklora.report.tables import human_bytes

PIXELS_PER_INCH = 122  # on the page: a picture of the usual width fills the column


@dataclass(frozen=True)
class Card:
    """A key number of the headline."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table of the page; `texts` are the columns set left, `folded` ones stand under the pictures."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset({0})
    note: str = ""
    folded: bool = False
    first_is_best: bool = False


@dataclass(frozen=True)
class Image:
    """A picture in both themes, base64; sizes in pixels."""

    name: str
    caption: str
    light: str
    dark: str
    width: int
    height: int
    shown: int


@dataclass(frozen=True)
class Preformatted:
    """A text shown as it stands, folded."""

    title: str
    body: str


@dataclass(frozen=True)
class Page:
    """All that the template shows; ``audit`` is the document of `folklora.report.audit`, of which the page tells what
    matters most."""

    kind: str
    title: str
    lead: str
    facts: Sequence[str]
    source: str
    notices: Sequence[str] = ()
    cards: Sequence[Card] = ()
    tables: Sequence[Sheet] = ()
    images: Sequence[Image] = ()
    texts: Sequence[Preformatted] = ()
    audit: Mapping[str, Any] | None = None


Subject = TypeVar("Subject", contravariant=True)


class Drawable(Protocol[Subject]):
    """A picture of a run or of a comparison."""

    @property
    def name(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def draw(self) -> Callable[[Subject, ThemeName], Figure | None]: ...


def draw(subject: Subject, folder: Path, pictures: Iterable[Drawable[Subject]]) -> list[Image]:
    """Draw every picture that has something to show; the light one also becomes a file."""
    images = []
    for picture in pictures:
        light, dark = picture.draw(subject, "light"), picture.draw(subject, "dark")
        if light is None or dark is None:
            continue
        data = png(light, "light")
        replace_file(folder / f"{picture.name}.png", data)
        width, height = (float(side) for side in light.get_size_inches())
        images.append(
            Image(
                name=picture.name,
                caption=picture.caption,
                light=base64.b64encode(data).decode(),
                dark=base64.b64encode(png(dark, "dark")).decode(),
                width=int(width * DPI),
                height=int(height * DPI),
                shown=round(width * PIXELS_PER_INCH),
            )
        )
    return images


def write_page(path: Path, page: Page) -> Path:
    """Put a page's file in its place; returns its path."""
    return fill(path, "page.html.j2", page=page)


def fill(path: Path, template: str, **shown: Any) -> Path:
    """Fill a template of this package, every text escaped, and put the file in its place; returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = human_bytes
    replace_file(path, environment.get_template(template).render(**shown).encode())
    return path


def _template(name: str) -> str:
    return resources.files("folklora.report").joinpath(name).read_text(encoding="utf-8")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a half."""
    temporary: str | None = None
    try:
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)  # mkstemp makes it private; a report is there to be read
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error}") from None
