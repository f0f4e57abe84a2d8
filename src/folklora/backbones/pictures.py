"""Pictures to pixels as a checkpoint's image processor says, in two steps.

Once, when examples are encoded, it resizes and crops: what is kept are bytes, of the size that the model takes. In
every batch they are scaled and normalised. That both together are the processor's own result is checked when it is
loaded. Pillow does the first step, whether torchvision is there or not: numbers do not depend on what is installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.backbones.batch import Batch
from folklora.errors import BackboneError, ExampleError

MAX_SIDE = 4096
"""Pixels: no longer side is believed of an image processor's settings."""

MAX_RESIZED = 2**26
"""Pixels of a picture between resizing and cropping, which for a long thin one may be far more than the model takes."""

FUSED_FROM = 128
"""Tokens of a picture from which fused attention kernels pay: below, they cost more than the few weights they spare."""

SETTINGS = ("size", "crop_size", "do_resize", "do_center_crop", "do_pad", "resample", "image_processor_type")


@dataclass(frozen=True, slots=True)
class Pixels:
    """One encoded picture: uint8 [3, H, W] of the model's size; its length is the tokens that the model makes of it."""

    values: np.ndarray
    tokens: int

    def __len__(self) -> int:
        return self.tokens


@dataclass(frozen=True)
class PictureBatch(Batch):
    """Pictures of K clients: one a row, every token real; ``pixels`` [S, 3, H, W] uint8 stand for the token ids."""

    pixels: Tensor


def lay_out_pictures(groups: Sequence[Sequence[Pixels]]) -> PictureBatch:
    """Each client's pictures one behind the other; ``groups[k]`` are client k's."""
    flat = [picture for group in groups for picture in group]
    rows, length = len(flat), len(flat[0])
    offsets = (0, *np.cumsum([len(group) for group in groups]).tolist())
    first = torch.arange(rows) * length
    return PictureBatch(
        tokens=torch.zeros(rows, length, dtype=torch.int64),
        positions=torch.arange(length).repeat(rows, 1),
        segments=torch.arange(rows)[:, None].repeat(1, length),
        token_offsets=tuple(offset * length for offset in offsets),
        sequence_offsets=offsets,
        first=first,
        last=first + length - 1,
        packed=False,
        pixels=torch.from_numpy(np.stack([picture.values for picture in flat])),
    )


def _numbers(processor: Any, setting: str) -> np.ndarray:
    """A setting of an image processor that is a number, or one for each colour: [3] float64."""
    value = getattr(processor, setting)
    try:
        found = np.broadcast_to(np.asarray(value, dtype=np.float64), 3)
    except (TypeError, ValueError):
        found = np.full(3, np.nan)
    if not np.isfinite(found).all():
        raise BackboneError(f"the image processor's {setting} is {value!r}; allowed: numbers, one or three")
    return found


class PictureProcessor:
    """One of transformers' image processors, in two steps: `encode` and `normalise`.

    Attributes
    ----------
    size
        Height and width of what the model sees, in pixels.

    Raises
    ------
    BackboneError
        If it does more than resize, crop, scale and normalise, or makes pictures of no one size.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        for setting in (getattr(processor, "size", None), getattr(processor, "crop_size", None)):
            sides = [side for side in dict(setting or {}).values() if side is not None]
            if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides):
                raise BackboneError(f"the image processor's sides are {sides} pixels; allowed: 1 to {MAX_SIDE}")
        scale = _numbers(processor, "rescale_factor") if processor.do_rescale else np.ones(3)
        mean = _numbers(processor, "image_mean") if processor.do_normalize else np.zeros(3)
        std = _numbers(processor, "image_std") if processor.do_normalize else np.ones(3)
        if not std.all():
            raise BackboneError("the image processor's image_std is 0; allowed: numbers, one or three, and none 0")
        # (x scale - mean) / std, as one product and one sum for each channel
        self._gain = torch.tensor(scale / std).float()[:, None, None]
        self._shift = torch.tensor(-mean / std).float()[:, None, None]
        self.size = self._checked()

    def encode(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [3, H, W] of each picture, uint8 [height, width, 3].

        Raises
        ------
        DataError
            If one is something else, or too long for its width.
        """
        for number, picture in enumerate(pictures):
            self._refuse_other(number, picture)
        return [self._process(picture, do_rescale=False, do_normalize=False) for picture in pictures]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bytes [S, 3, H, W] to what the model takes, float32, on the device where they are."""
        return pixels.float() * self._gain.to(pixels.device) + self._shift.to(pixels.device)

    def digest(self) -> bytes:
        """What tells one such processor from another."""
        settings = {key: value for key, value in self._processor.to_dict().items() if key in SETTINGS}
        return json.dumps([settings, self._gain.tolist(), self._shift.tolist()], sort_keys=True, default=str).encode()

    def _process(self, picture: np.ndarray, **arguments: Any) -> np.ndarray:
        done = self._processor(images=[picture], input_data_format="channels_last", return_tensors="np", **arguments)
        values: np.ndarray = done["pixel_values"][0]
        return np.ascontiguousarray(values)

    def _refuse_other(self, index: int, picture: Any) -> None:
        allowed = "allowed: uint8 [height, width, 3]"
        if not isinstance(picture, np.ndarray):
            raise ExampleError(index, f"a picture of type {type(picture).__name__}; {allowed}")
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
            raise ExampleError(index, f"a picture of {picture.dtype} {list(picture.shape)}; {allowed}")
        edge = dict(getattr(self._processor, "size", None) or {}).get("shortest_edge")
        height, width = picture.shape[:2]
        if edge and edge * edge * max(height, width) > MAX_RESIZED * min(height, width):
            longest = MAX_RESIZED // (edge * edge)
            raise ExampleError(
                index,
                f"a picture of {height} x {width} pixels; allowed: no side more than {longest} times as long as the "
                "other",
            )

    def _checked(self) -> tuple[int, int]:
        """The size of what comes out, on two pictures of different shapes, on which both ways must agree."""
        sizes = set()
        for height, width in ((24, 17), (13, 31)):
            picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            try:
                whole, encoded = self._process(picture), self.encode([picture])[0]
            except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
                problem = str(error).strip().splitlines() or [type(error).__name__]
                raise BackboneError(f"the image processor fails on a picture: {problem[0]}") from None
            if (
                encoded.dtype != np.uint8
                or encoded.shape != whole.shape
                or encoded.shape[:-2] != (3,)
                or not np.allclose(self.normalise(torch.from_numpy(encoded)).numpy(), whole, atol=1e-4)
            ):
                raise BackboneError(
                    f"{type(self._processor).__name__} does more than resize, crop, scale and normalise pictures; "
                    "allowed: an image processor that does no more"
                )
            sizes.add(encoded.shape[-2:])
        if len(sizes) > 1:
            raise BackboneError(
                f"the image processor makes pictures of different sizes ({sorted(sizes)}); "
                "allowed: one size, by crop_size or by height and width"
            )
        return sizes.pop()
