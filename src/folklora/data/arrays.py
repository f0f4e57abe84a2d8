"""Arrays to columns: numpy's ``.npz``, and the IDX files of MNIST and its like.

Headers are read first and what they say is checked against the file, before anything of that size is allocated;
arrays of objects, which are pickles, are refused.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from folklora.data.columns import Columns, either, numbered_rows, plausible_bytes, require_columns
from folklora.errors import DataError, first_line

ARRAYS = "numbers, booleans or strings [n], or pictures uint8 [n, H, W] or [n, H, W, 3]"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path, wanted: list[str]) -> Columns:
    """Each array is a column: pictures, labels, captions."""
    try:
        with zipfile.ZipFile(path) as archive:
            require_columns(str(path), [name.removesuffix(".npy") for name in archive.namelist()], wanted)
            arrays = {name: _member(archive, path, name) for name in wanted}
            # Strings become Python's here: numpy's may hold numbers that are no characters.
            values = {name: array if array.ndim > 1 else array.tolist() for name, array in arrays.items()}
    except DataError:
        raise
    except Exception as error:  # a damaged archive raises whatever its first broken part does
        raise DataError(f"{path}: not a readable .npz file: {first_line(error)}; allowed: numpy's .npz") from None
    return _columns(str(path), values, path.parent)


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    where = f"{path}: column {name!r}"
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where}: compressed by method {info.compress_type}; allowed: np.savez_compressed's")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in HEADERS:
            raise DataError(f"{where}: format {version}; allowed: {either(map(str, HEADERS))}")
        shape, _, dtype = HEADERS[version](member, max_header_size=10_000)
        plain = len(shape) == 1 and dtype.kind in "biufU"
        picture = dtype == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3))
        if not (plain or picture) or min(shape) < 0 or 0 in shape[1:]:
            kind = "objects" if dtype.hasobject else str(dtype)
            raise DataError(f"{where}: {kind} {list(shape)}; allowed: {ARRAYS}")
        size = math.prod(shape) * dtype.itemsize
        if member.tell() + size != info.file_size or size > plausible_bytes(path):
            raise DataError(f"{where}: its header says {size} bytes, the file holds others; allowed: a whole file")
        numbered_rows(where, shape[0])
        member.seek(0)
        return np.lib.format.read_array(member, allow_pickle=False, max_header_size=10_000)


def idx_files(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The files of pictures and labels of a split, as MNIST names them."""
    prefix = {"train": "train", "test": "t10k"}[split]
    for suffix in ("", ".gz"):
        pair = folder / f"{prefix}-images-idx3-ubyte{suffix}", folder / f"{prefix}-labels-idx1-ubyte{suffix}"
        if all(file.is_file() for file in pair):
            return pair
    return None


def read_idx(files: tuple[Path, Path], image: str, label: str, wanted: list[str]) -> Columns:
    pictures, labels = files
    values: dict[str, Any] = {image: _idx(pictures, 3), label: _idx(labels, 1).tolist()}
    require_columns(str(pictures), list(values), wanted)
    return _columns(str(pictures), values, pictures.parent)


def _idx(path: Path, axes: int) -> np.ndarray:
    """An IDX file of unsigned bytes: a magic number, the sizes in big endian, the values."""
    allowed = f"an IDX file of unsigned bytes with {axes} axes"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
                raise DataError(f"{path}: not such a file; allowed: {allowed}")
            shape = [int(size) for size in np.frombuffer(head[4:], dtype=">u4")]
            size = math.prod(shape)
            if size > plausible_bytes(path) or 0 in shape[1:]:
                raise DataError(f"{path}: its header says {shape}, which the file cannot hold; allowed: {allowed}")
            numbered_rows(str(path), shape[0])
            content = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not readable as gzip: {first_line(error)}; allowed: {allowed}") from None
    if len(content) != size:
        raise DataError(f"{path}: its header says {size} values, it has others; allowed: {allowed}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _columns(file: str, values: dict[str, Any], folder: Path) -> Columns:
    counts = {name: len(column) for name, column in values.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise DataError(f"{file}: columns differ in rows: {said}; allowed: one value a row in each")
    return Columns(file, numbered_rows(file, next(iter(counts.values()))), values, folder)
