"""Recovered pictures beside the originals: PNGs, as data URIs in a result and as one picture in a folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

ZOOM = 3
"""Pixels of the gallery for one of a picture: they are small."""

GAP = 4


def as_bytes(picture: Tensor) -> np.ndarray:
    """[3, height, width] in [0, 1] to uint8 [height, width, 3]."""
    values = (picture.clamp(0, 1) * 255).round().byte()
    found: np.ndarray = values.permute(1, 2, 0).cpu().numpy()
    return found


def data_uri(picture: Tensor) -> str:
    """A PNG as a ``data:`` URI."""
    buffer = io.BytesIO()
    Image.fromarray(as_bytes(picture)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(rows: Sequence[Sequence[Tensor]]) -> bytes:
    """A PNG of rows of pictures of one size: originals above, what was recovered below, then the control."""
    _, height, width = rows[0][0].shape
    most = max(len(row) for row in rows)
    down, across = height * ZOOM + GAP, width * ZOOM + GAP
    sheet = np.full((len(rows) * down + GAP, most * across + GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * down, GAP + j * across
            large = as_bytes(picture).repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
            sheet[top : top + height * ZOOM, left : left + width * ZOOM] = large
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
