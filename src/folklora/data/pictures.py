"""Pictures: opened from files, bytes or arrays, and folders of them by class.

Only the decoders of five common formats run, on nothing larger than the limits in `folklora.data.columns`; what is
larger, damaged or cut off is refused by its row.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from folklora.data.columns import (
    MOST_BYTES,
    MOST_PIXELS,
    Columns,
    either,
    require_columns,
    short,
    why_not_text,
)
from folklora.errors import DataError, first_line

Picture = np.ndarray
"""uint8 ``[H, W, 3]``, red, green and blue."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
VALUES = "the path of a picture, its bytes, or an array"


def opened(columns: Columns, column: str, rows: Iterable[int]) -> list[Picture]:
    """The pictures of some rows, upright, in RGB; what is transparent lies on white. Of animations the first frame.

    Raises
    ------
    DataError
        A picture is damaged, too large, or not in the folder; or all are too large together.
    """
    pictures = []
    left = MOST_BYTES
    folder = columns.folder.resolve()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's doubts about metadata and sizes; sizes are checked here
        for row in rows:
            picture = _picture(columns, row, column, folder)
            left -= picture.nbytes
            if left < 0:
                problem = f"pictures of more than {MOST_BYTES / 2**30:g} GiB"
                raise DataError(f"{columns.file}: {problem}; allowed: smaller ones, or fewer by data.limit")
            pictures.append(picture)
    return pictures


def read_picture(path: Path) -> Picture:
    """The picture in a file, as `opened` gives it; raises `DataError`."""
    try:
        if not path.is_file():
            raise _Refused("no such file")
        return _decoded(path)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except _Refused as refused:
        raise DataError(f"{path}: {refused}") from None


def _picture(columns: Columns, row: int, column: str, folder: Path) -> Picture:
    value = columns.values[column][row]
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value if value.ndim == 3 else np.repeat(value[..., None], 3, axis=2))
    if isinstance(value, Mapping):  # Hugging Face's: the bytes, else the path
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    try:
        if isinstance(value, bytes):
            if not value:
                raise _Refused("empty")
            return _decoded(io.BytesIO(value))
        problem = why_not_text(value)
        if problem:
            raise _Refused(problem, VALUES)
        return _decoded(_inside(folder, value))
    except _Refused as refused:
        raise columns.blame(row, column, str(refused)) from None


class _Refused(Exception):
    def __init__(self, problem: str, allowed: str = f"a {either(FORMATS)} picture") -> None:
        super().__init__(f"{problem}; allowed: {allowed}")


def _inside(folder: Path, name: str) -> Path:
    """The file of that name in the folder; a link or ``..`` that leads out of it is not followed."""
    allowed = f"a file in {folder}, named from there"
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise _Refused(f"{short(name)} leads out of the folder", allowed)
        if not path.is_file():
            raise _Refused(f"{short(name)}: no such file", allowed)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a NUL, or a ring of links
        raise _Refused(f"{short(name)} is no path: {first_line(error)}", allowed) from None
    return path


def _decoded(source: Path | io.BytesIO) -> Picture:
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise _Refused(f"{image.width} x {image.height} pixels", f"at most {MOST_PIXELS} of them")
            image.load()
            return np.array(_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)
    except _Refused:
        raise
    except Image.DecompressionBombError:
        raise _Refused("too many pixels", f"at most {MOST_PIXELS} of them") from None
    except UnidentifiedImageError:  # whose message is an object's address
        raise _Refused("not a picture, or its header is damaged") from None
    except Exception as error:  # a damaged picture raises whatever its first broken part does
        raise _Refused(f"damaged or cut off: {first_line(error)}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which a conversion would clip
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((grey.clip(0, 65535) + 128) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# Folders


def read_class_folders(root: Path, image: str, label: str, wanted: list[str]) -> tuple[Columns, Columns | None]:
    """A folder of class folders with pictures; or one with a ``train`` and perhaps a ``test`` folder of that kind.

    Hidden files, and files beside the class folders that are no pictures, are not read.
    """
    train, test = root / "train", root / "test"
    if not (train.is_dir() and any(child.is_dir() for child in train.iterdir())):
        return _class_folders(root, image, label, wanted), None  # "train" may be a class
    common = _class_folders(test, image, label, [image, label]) if test.is_dir() else None
    return _class_folders(train, image, label, wanted), common


def _class_folders(folder: Path, image: str, label: str, wanted: list[str]) -> Columns:
    paths: list[str] = []
    classes: list[str] = []
    for entry in _visible(folder):
        if not entry.is_dir():
            if entry.suffix.lower() in SUFFIXES:
                raise DataError(f"{entry}: a picture beside class folders; allowed: all in folders named by class")
            continue
        for file in _visible(entry):
            if file.suffix.lower() not in SUFFIXES or not file.is_file():
                raise DataError(f"{file}: not a picture; allowed: {either(SUFFIXES)} files")
            paths.append(f"{entry.name}/{file.name}")
            classes.append(entry.name)
    values: dict[str, Any] = {image: paths, label: classes}
    require_columns(str(folder), list(values), wanted)
    return Columns(str(folder), paths, values, folder)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
