"""Pictures to pixels: as the checkpoint's image processor says, in two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from folklora.backbones.pictures import PictureProcessor, Pixels, lay_out_pictures
from folklora.errors import BackboneError, DataError

SQUARE = {"height": 12, "width": 12}


def processor(kind: str, **settings: Any) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    match kind:
        case "clip":
            return CLIPImageProcessorPil(**{"size": {"shortest_edge": 14}, "crop_size": SQUARE, **settings})
        case "siglip":
            return SiglipImageProcessorPil(**{"size": SQUARE, **settings})
    return ViTImageProcessorPil(**{"size": SQUARE, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_rescale": False},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"rescale_factor": 1 / 127.5},
        {"resample": 0},
    ],
)
@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_both_steps_together_are_the_stock_processor(
    noise: Callable[..., list[np.ndarray]], kind: str, settings: dict[str, Any]
) -> None:
    stock = processor(kind, **settings)
    ours = PictureProcessor(stock)
    shapes = [(1, 1), (1, 9), (50, 3), (12, 12), (3, 3)]
    raw = noise(4) + [np.full((*shape, 3), 77, dtype=np.uint8) for shape in shapes]
    encoded = ours.encode(raw)
    assert {(picture.dtype, picture.shape) for picture in encoded} == {(np.dtype(np.uint8), (3, 12, 12))}
    assert ours.size == (12, 12)
    expected = stock(images=raw, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    got = ours.normalise(torch.from_numpy(np.stack(encoded))).numpy()
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("path.png", "of type str"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4), dtype=np.uint8), r"\[4, 4\]"),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"\[3, 4, 4\]"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"\[4, 4, 4\]"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\[0, 4, 3\]"),
    ],
)
def test_what_is_no_picture(picture: Any, message: str) -> None:
    good = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(DataError, match=rf"example 2: a picture .*{message}.*; allowed: uint8 \[height, width, 3\]"):
        PictureProcessor(processor("vit")).encode([good, picture])


def test_a_long_thin_picture_does_not_fill_the_memory() -> None:
    """Its short side is stretched to the model's: 1 x 400000 would become 14 x 5.6 million pixels."""
    ours = PictureProcessor(processor("clip"))
    ours.encode([np.zeros((1, 400, 3), dtype=np.uint8)])
    with pytest.raises(DataError, match="example 1: a picture of 1 x 400000 pixels; allowed"):
        ours.encode([np.zeros((1, 400_000, 3), dtype=np.uint8)])


def test_a_processor_that_makes_pictures_of_different_sizes() -> None:
    with pytest.raises(BackboneError, match="different sizes .* allowed"):
        PictureProcessor(processor("clip", do_center_crop=False))


@pytest.mark.parametrize("settings", [{"size": {"height": 10**6, "width": 12}}, {"size": {"shortest_edge": 10**9}}])
def test_a_size_is_not_trusted(settings: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match="allowed: 1 to 4096"):
        PictureProcessor(processor("clip", **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": "x"},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_mean": [0.5, float("nan"), 0.5]},
        {"rescale_factor": "x"},
        {"rescale_factor": None},
    ],
)
@pytest.mark.filterwarnings("error")
def test_settings_that_are_no_numbers(settings: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match="allowed: numbers, one or three"):
        PictureProcessor(processor("clip", **settings))


def test_a_processor_that_does_more() -> None:
    class Sharper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, **arguments: Any) -> Any:
            done = self.inner(**arguments)
            if arguments.get("do_normalize", True):
                done["pixel_values"] = done["pixel_values"] ** 3
            return done

    with pytest.raises(BackboneError, match="does more than resize, crop, scale and normalise"):
        PictureProcessor(Sharper(processor("vit")))


def test_settings_tell_processors_apart() -> None:
    digest = lambda **settings: PictureProcessor(processor("clip", **settings)).digest()
    assert digest() == digest()
    different = [digest(), digest(image_mean=[0.0, 0.0, 0.0]), digest(resample=0), digest(size={"shortest_edge": 13})]
    assert len(set(different)) == 4


def test_a_batch_of_pictures() -> None:
    groups = [[Pixels(np.full((3, 2, 2), i, dtype=np.uint8), 5) for i in numbers] for numbers in ([0, 1], [2], [3, 4])]
    batch = lay_out_pictures(groups)
    assert batch.tokens.shape == (5, 5)
    assert batch.token_offsets == (0, 10, 15, 25)
    assert batch.sequence_offsets == (0, 2, 3, 5)
    assert batch.token_clients().tolist() == [0] * 10 + [1] * 5 + [2] * 10
    assert batch.sequence_clients().tolist() == [0, 0, 1, 2, 2]
    assert batch.segments.tolist() == [[i] * 5 for i in range(5)]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4]] * 5
    assert batch.first.tolist() == [0, 5, 10, 15, 20]
    assert batch.last.tolist() == [4, 9, 14, 19, 24]
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert len(groups[0][0]) == 5
