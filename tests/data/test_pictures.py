"""Pictures: every container gives the same pixels, and every damaged, oversized or escaping one is one line."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from folklora.data import pictures
from folklora.data.sources import Table, fingerprint, load
from folklora.errors import DataError
from folklora.sections import DataSection

RNG = np.random.default_rng(0)
PIXELS = [RNG.integers(0, 256, (5 + i, 7, 3), dtype=np.uint8) for i in range(4)]
LABELS = ["cat", "dog", "cat", "dog"]
SITES = ["a", "b", "b", "a"]
TITLES = ["one cat", "one dog", "another cat", "another dog"]


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def table_of(path: Path, form: Any = "image", **options: Any) -> Table:
    return load(DataSection(source=str(path), **options), 0, form)[0]


def assert_pictures(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.uint8
        assert one.flags.c_contiguous
        np.testing.assert_array_equal(one, other)


def write(folder: Path, kind: str) -> Path:
    """The four pictures in one kind of source."""
    beside = {"label": LABELS, "site": SITES, "caption": TITLES}
    files = []
    for i, pixels in enumerate(PIXELS):
        (folder / "pics").mkdir(exist_ok=True)
        files.append(f"pics/{i}.png")
        (folder / files[-1]).write_bytes(encoded(pixels))
    path = folder / f"a.{kind}"
    rows = [dict(zip(["image", *beside], row, strict=True)) for row in zip(files, *beside.values(), strict=True)]
    contents = [encoded(pixels) for pixels in PIXELS]
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "bytes.parquet":
        pq.write_table(pa.table({"image": contents, **beside}), path)
    elif kind == "dict.parquet":
        cells = [{"bytes": contents[0], "path": "/elsewhere/0.png"}, *({"bytes": None, "path": f} for f in files[1:])]
        pq.write_table(pa.table({"image": cells, **beside}), path)
    else:
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
            | {name: datasets.Value("string") for name in ("site", "caption")}
        )
        cells = [{"bytes": content, "path": None} for content in contents]
        values = {"image": cells, **beside, "label": [["cat", "dog"].index(label) for label in LABELS]}
        datasets.Dataset.from_dict(values, features=features).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "bytes.parquet", "dict.parquet", "saved"])
def test_every_container_gives_the_same_pictures(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    table = table_of(path, by="site")
    assert_pictures(table.inputs, PIXELS)
    assert (table.classes, table.labels.tolist(), table.groups) == (("cat", "dog"), [0, 1, 0, 1], SITES)
    pairs = table_of(path, "caption", caption="caption")
    assert_pictures([picture for picture, _ in pairs.inputs], PIXELS)
    assert [title for _, title in pairs.inputs] == TITLES
    assert (pairs.classes, pairs.labels.tolist()) == (("all",), [0, 0, 0, 0])
    assert table_of(path, "caption", caption="caption", label="label").labels.tolist() == [0, 1, 0, 1]


def save_classes(folder: Path, **classes: list[np.ndarray]) -> Path:
    for name, members in classes.items():
        (folder / name).mkdir(parents=True)
        for i, pixels in enumerate(members):
            (folder / name / f"{i}.png").write_bytes(encoded(pixels))
    return folder


def test_class_folders(tmp_path: Path) -> None:
    folder = save_classes(tmp_path / "all", dog=PIXELS[2:], cat=PIXELS[:2])
    (folder / "README.md").write_text("what this is")
    (folder / "cat" / ".DS_Store").write_bytes(b"?")
    (folder / ".cache").mkdir()
    table, test = load(DataSection(source=str(folder)), 0, "image")
    assert test is None
    assert_pictures(table.inputs, PIXELS)
    assert (table.classes, table.labels.tolist()) == (("cat", "dog"), [0, 0, 1, 1])
    assert table_of(folder, by="label").groups == ["cat", "cat", "dog", "dog"]


def test_class_folders_below_train_and_test(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", cat=PIXELS[:2], dog=PIXELS[2:])
    assert load(DataSection(source=str(tmp_path)), 0, "image")[1] is None
    save_classes(tmp_path / "test", dog=PIXELS[:1])
    table, test = load(DataSection(source=str(tmp_path)), 0, "image")
    assert test is not None
    assert_pictures(table.inputs, PIXELS)
    assert_pictures(test.inputs, PIXELS[:1])
    assert (test.classes, test.labels.tolist()) == (("cat", "dog"), [1])
    own = save_classes(tmp_path / "own", cat=PIXELS[3:])
    _, test = load(DataSection(source=str(tmp_path), test=str(own)), 0, "image")
    assert test is not None
    assert_pictures(test.inputs, PIXELS[3:])


def test_a_folder_with_a_test_folder_is_tested_with_that(tmp_path: Path) -> None:
    """And never with what is trained on."""
    save_classes(tmp_path / "train", cat=PIXELS[:2], dog=PIXELS[2:])
    save_classes(tmp_path / "test", dog=PIXELS[:1])
    _, test = load(DataSection(source=str(tmp_path), test=str(tmp_path)), 0, "image")
    assert test is not None
    assert_pictures(test.inputs, PIXELS[:1])


def test_train_may_be_a_class(tmp_path: Path) -> None:
    save_classes(tmp_path, train=PIXELS[:1], tram=PIXELS[1:])
    assert table_of(tmp_path).classes == ("train", "tram")


# Decoding


def decoded(content: bytes) -> np.ndarray:
    return pictures._decoded(io.BytesIO(content))


@settings(max_examples=40)
@given(
    pixels=arrays.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3))),
    kind=st.sampled_from(["PNG", "BMP", "WEBP"]),
)
def test_lossless_formats_keep_every_pixel(pixels: np.ndarray, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_pictures([decoded(encoded(pixels, kind, **options))], [pixels])


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert_pictures([decoded(buffer.getvalue())], [np.full((4, 6, 3), [255, 0, 0], dtype=np.uint8)])


def test_grey_and_its_sixteen_bits() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    assert_pictures([decoded(encoded(grey))], [np.stack([grey] * 3, axis=2)])
    deep = np.arange(64).reshape(8, 8) * 1040
    expected = np.rint(deep / 65535 * 255).astype(np.uint8)
    assert_pictures([decoded(encoded(deep.astype(np.uint16)))], [np.stack([expected] * 3, axis=2)])


def test_what_is_transparent_lies_on_white() -> None:
    pixels = RNG.integers(0, 256, (9, 9, 4), dtype=np.uint8)
    opacity = pixels[..., 3:] / 255
    expected = pixels[..., :3] * opacity + 255 * (1 - opacity)
    assert np.abs(decoded(encoded(pixels)) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert decoded(buffer.getvalue()).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_a_camera_held_upright() -> None:
    # 6: the sensor's top is the right of what was seen, so the picture turns clockwise.
    exif = Image.Exif()
    exif[0x0112] = 6
    assert_pictures([decoded(encoded(PIXELS[0], exif=exif))], [np.rot90(PIXELS[0], -1)])


def test_other_colours_than_three() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(buffer, "JPEG")
    found = decoded(buffer.getvalue())
    assert found.shape == (8, 8, 3)
    assert (found[..., 0] < 60).all()  # cyan is no red
    assert decoded(encoded(np.eye(8, dtype=bool))).tolist() == (np.eye(8)[..., None].repeat(3, 2) * 255).tolist()


# Hostile pictures


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int) -> bytes:
    """A few bytes that claim to be large."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def error_of(path: Path, form: Any = "image", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        table_of(path, form, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "allowed: " in message
    assert "0x" not in message  # no object's address: the same in every run
    return message


def parquet_of(path: Path, *images: Any) -> Path:
    labels = ["x", "y", "z"][: len(images)]
    pq.write_table(pa.table({"image": list(images), "label": labels}), path)
    return path


GOOD = encoded(PIXELS[0])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty"),
        (None, "missing"),
        (b"hello", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"\x80\x04\x95.", "not a picture"),
        (encoded(PIXELS[0], "TIFF"), "not a picture"),
        (encoded(PIXELS[0], "PPM"), "not a picture"),
        (GOOD[:20], "not a picture|damaged"),
        (GOOD[: len(GOOD) // 2], "damaged or cut off"),
        (encoded(PIXELS[0], "JPEG")[:-60], "damaged or cut off"),
        (encoded(PIXELS[0], "BMP")[:-20], "damaged or cut off"),
        (GOOD[:60] + b"\xff" * 9 + GOOD[69:], "not a picture|damaged"),
        (png_of(30_000, 30_000), "pixels; allowed: at most 67108864"),
        (png_of(10_000, 10_000), "10000 x 10000 pixels; allowed: at most 67108864"),
        (png_of(2**31 - 1, 2**31 - 1), "pixels; allowed: at most 67108864"),
        (png_of(0, 5), "not a picture|damaged"),
        (png_of(5000, 5000), "damaged or cut off"),
    ],
    ids=range(17),
)
def test_a_broken_picture_is_named_by_its_row(tmp_path: Path, content: bytes | None, problem: str) -> None:
    message = error_of(parquet_of(tmp_path / "a.parquet", GOOD, content))
    assert "a.parquet: row 2, column 'image': " in message
    assert any(part in message for part in problem.split("|"))


def test_a_broken_file_is_named_by_its_path(tmp_path: Path) -> None:
    folder = save_classes(tmp_path / "all", cat=PIXELS[:2], dog=PIXELS[2:])
    (folder / "dog" / "1.png").write_bytes(GOOD[:50])
    assert "all: dog/1.png, column 'image': " in error_of(folder)


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]))
    content = bytearray(encoded(PIXELS[0], kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    try:
        found = decoded(bytes(content))
    except pictures._Refused:
        return
    assert found.dtype == np.uint8
    assert found.shape[2] == 3


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("../secret.png", "leads out of the folder"),
        ("pics/../../secret.png", "leads out of the folder"),
        ("/etc/hostname", "leads out of the folder"),
        ("link.png", "leads out of the folder"),
        ("linked/secret.png", "leads out of the folder"),
        ("ring.png", "ring.png"),
        ("a\0.png", "is no path"),
        ("x" * 5000, "is no path"),
        ("absent.png", "no such file"),
        ("pics", "no such file"),
        ("pipe.png", "no such file"),
        ("", "empty"),
        (3, "3 is of type int"),
        (None, "missing"),
        ({"bytes": None, "path": "../secret.png"}, "leads out of the folder"),
        ({"bytes": None, "path": None}, "missing"),
        ({}, "missing"),
        ([[0, 1], [2, 3]], "[[0, 1], [2, 3]] is of type list"),
    ],
)
def test_only_files_in_the_folder_are_opened(tmp_path: Path, value: Any, problem: str) -> None:
    folder = tmp_path / "data"
    (folder / "pics").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(GOOD)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    (folder / "ring.png").symlink_to(folder / "ring.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "good.png").write_bytes(GOOD)
    rows = [{"image": "good.png", "label": "x"}, {"image": value, "label": "y"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = error_of(folder / "a.jsonl")
    assert "line 2, column 'image': " in message
    assert problem in message


def test_pictures_are_too_large_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet_of(tmp_path / "a.parquet", GOOD, GOOD)
    monkeypatch.setattr(pictures, "MOST_BYTES", 2 * 5 * 7 * 3)
    assert len(table_of(file)) == 2
    monkeypatch.setattr(pictures, "MOST_BYTES", 2 * 5 * 7 * 3 - 1)
    assert "a.parquet: pictures of more than" in error_of(file)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 34)
    assert "7 x 5 pixels; allowed: at most 34" in error_of(file)


def test_the_limit_opens_only_what_it_leaves(tmp_path: Path) -> None:
    rows = [(encoded(np.full((2, 2, 3), i, dtype=np.uint8)) if i else b"broken", "xy"[i % 2]) for i in range(20)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [r[0] for r in rows], "label": [r[1] for r in rows]}), file)
    found, refused = [], []
    for seed in range(6):
        try:
            found.append(load(DataSection(source=str(file), limit=10), seed, "image")[0])
        except DataError as error:
            refused.append(str(error))
    for table in found:
        assert [int(picture[0, 0, 0]) % 2 for picture in table.inputs] == table.labels.tolist()
    assert found
    assert refused
    assert all("row 1, column 'image'" in message for message in [*refused, error_of(file)])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("loose.png", "loose.png: a picture beside class folders"),
        ("cat/notes.txt", "notes.txt: not a picture; allowed: .png, .jpg"),
        ("cat/scan.tiff", "scan.tiff: not a picture"),
        ("cat/deeper/0.png", "deeper: not a picture"),
    ],
)
def test_class_folders_hold_nothing_else(tmp_path: Path, name: str, problem: str) -> None:
    folder = save_classes(tmp_path / "all", cat=PIXELS[:2], dog=PIXELS[2:])
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(GOOD)
    assert problem in error_of(folder)


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    assert "no training data in this folder" in error_of(tmp_path)
    assert "or class folders with pictures" in error_of(tmp_path)
    folder = save_classes(tmp_path / "one", cat=PIXELS)
    assert "a single class, 'cat'" in error_of(folder)
    assert "no column 'caption'; allowed: one of 'image', 'label'" in error_of(folder, "caption")
    assert "no column 'site'" in error_of(folder, by="site")
    (tmp_path / "none" / "empty").mkdir(parents=True)
    assert "no examples" in error_of(tmp_path / "none")
    with pytest.raises(DataError, match="no training data"):
        load(DataSection(source=str(folder)), 0, "text")


@pytest.mark.parametrize("title", ["", None, 3])
def test_captions_are_texts(tmp_path: Path, title: Any) -> None:
    (tmp_path / "good.png").write_bytes(GOOD)
    rows = [{"image": "good.png", "caption": "fine"}, {"image": "good.png", "caption": title}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "line 2, column 'caption': " in error_of(tmp_path / "a.jsonl", "caption")


def test_fingerprints_of_every_form() -> None:
    def of(*inputs: Any) -> str:
        return fingerprint(Table(list(inputs), np.zeros(len(inputs), dtype=np.int64), ("all",), None))

    flat = np.arange(12, dtype=np.uint8)
    tables = [
        (flat.reshape(2, 2, 3),),
        (flat.reshape(1, 4, 3),),
        (flat.reshape(2, 2, 3) + np.uint8(1),),
        (flat.reshape(2, 2, 3)[:1], flat.reshape(2, 2, 3)[1:]),
        ((flat.reshape(2, 2, 3), "a"),),
        ((flat.reshape(2, 2, 3), "b"),),
        (flat.tobytes().decode(),),
        ("a", "b"),
        (("a", "b"),),
        ((("user", "ab"), ("assistant", "c")),),
        ((("user", "a"), ("assistant", "bc")),),
        ((("user", "ab"),), (("assistant", "c"),)),
        ((("user", "ab", "assistant", "c"),),),
    ]
    assert len({of(*inputs) for inputs in tables}) == len(tables)
    assert of(flat.reshape(2, 2, 3)) == of(np.asfortranarray(flat.reshape(2, 2, 3)))
