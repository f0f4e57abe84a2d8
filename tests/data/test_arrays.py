"""Arrays from files: what numpy and MNIST's tools wrote comes back, and no header is believed."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from folklora.data import columns
from folklora.data.sources import Table, load
from folklora.errors import DataError
from folklora.sections import DataSection

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
LABELS = np.array([3, 0, 3, 1, 0, 1])


def table_of(path: Path, form: Any = "image", **options: Any) -> Table:
    return load(DataSection(source=str(path), **options), 0, form)[0]


def error_of(path: Path, form: Any = "image", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        table_of(path, form, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "allowed: " in message
    assert str(path) in message
    return message


def save(path: Path, **columns: Any) -> Path:
    np.savez_compressed(path, **columns)
    return path


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_columns(tmp_path: Path, write: Any, order: Any) -> None:
    path = tmp_path / "a.npz"
    write(path, pictures=np.asarray(COLOUR, order=order), y=LABELS.astype(">i2"), site=np.array(list("aabbcc")))
    table = table_of(path, image="pictures", label="y", by="site")
    np.testing.assert_array_equal(np.stack(table.inputs), COLOUR)
    assert all(picture.flags.c_contiguous for picture in table.inputs)
    assert (table.classes, table.labels.tolist()) == (("0", "1", "3"), [2, 0, 2, 1, 0, 1])
    assert table.groups == list("aabbcc")


def test_grey_arrays_get_three_colours(tmp_path: Path) -> None:
    table = table_of(save(tmp_path / "a.npz", image=GREY, label=LABELS))
    np.testing.assert_array_equal(np.stack(table.inputs), np.stack([GREY] * 3, axis=-1))


def test_arrays_with_captions(tmp_path: Path) -> None:
    names = np.array(["naïve ☃", "b", "cc", "d", "e", "f"])
    path = save(tmp_path / "a.npz", image=COLOUR, caption=names, ok=np.array([True, False] * 3))
    table = table_of(path, "caption", caption="caption", label="ok")
    assert [caption for _, caption in table.inputs] == names.tolist()
    assert (table.classes, table.labels.tolist()) == (("false", "true"), [1, 0] * 3)


def test_numbers_may_be_the_places_of_named_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", image=COLOUR, label=LABELS)
    table = table_of(path, classes=["top", "dress", "bag", "boot"])
    assert (table.classes, table.labels.tolist()) == (("top", "dress", "bag", "boot"), LABELS.tolist())
    assert "row 1, column 'label': label '3' is not among data.classes" in error_of(path, classes=["a", "b", "c"])
    # Names that are numbers are names.
    assert table_of(path, classes=["3", "1", "0"]).labels.tolist() == [0, 2, 0, 1, 2, 1]


def test_folders_of_arrays(tmp_path: Path) -> None:
    save(tmp_path / "train.npz", image=COLOUR, label=LABELS)
    save(tmp_path / "test.npz", image=COLOUR[:2], label=LABELS[:2])
    table, test = load(DataSection(source=str(tmp_path)), 0, "image")
    assert test is not None
    assert (len(table), test.labels.tolist()) == (6, [2, 0])
    with pytest.raises(DataError, match="no training data in this folder"):
        load(DataSection(source=str(tmp_path)), 0, "text")


@settings(max_examples=40)
@given(data=st.data(), shape=st.tuples(*(st.integers(1, 5) for _ in range(3))))
def test_arrays_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: tuple[int, ...]
) -> None:
    colours = data.draw(st.sampled_from([(), (3,)]))
    pixels = data.draw(arrays.arrays(np.uint8, (*shape, *colours)))
    kind = st.sampled_from(["u1", "<i4", ">i8", "?"])
    names = data.draw(
        arrays.arrays(kind, shape[0]) | st.lists(st.integers(0, 9).map(str), min_size=shape[0], max_size=shape[0])
    )
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez(path, image=pixels, caption=np.array([f"t{i}" for i in range(shape[0])]), label=np.array(names))
    table = table_of(path, "caption", by="label")
    for (picture, _), expected in zip(table.inputs, pixels, strict=True):
        np.testing.assert_array_equal(picture, np.broadcast_to(expected.reshape(*shape[1:], -1), picture.shape))
    expected = [str(bool(n)).lower() if np.asarray(names).dtype == bool else str(n) for n in names]
    assert table.groups == expected


# Hostile arrays


def npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(text)) + text + body


def described(shape: str, dtype: str = "|u1") -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}"


def archive(path: Path, image: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    label = io.BytesIO()
    np.save(label, LABELS)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("label.npy", label.getvalue())
        file.writestr("image.npy", image, method)
    return path


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (COLOUR.astype(np.float32) / 255, "float32 [6, 5, 4, 3]"),
        (COLOUR.astype(np.int64), "int64 [6, 5, 4, 3]"),
        (np.full((6, 5, 4), np.nan), "float64 [6, 5, 4]"),
        (COLOUR[..., :2], "uint8 [6, 5, 4, 2]"),
        (COLOUR[:, 0, 0, :1], "uint8 [6, 1]"),
        (COLOUR[:, None], "uint8 [6, 1, 5, 4, 3]"),
        (np.uint8(3), "uint8 []"),
        (COLOUR[:, :0], "uint8 [6, 0, 4, 3]"),
        (np.array([{"a": 1}] * 6, dtype=object), "objects [6]"),
        (np.array([b"a"] * 6), "|S1 [6]"),
        (np.zeros(6, dtype="M8[s]"), "datetime64[s] [6]"),
        (np.zeros(6, dtype=[("a", "u1")]), "[('a', 'u1')] [6]"),
        (np.zeros(6), "row 1, column 'image': 0.0 is of type float"),
        (COLOUR[:5], "columns differ in rows: 'image' 5, 'label' 6"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_arrays_are_refused(tmp_path: Path, image: np.ndarray, problem: str) -> None:
    message = error_of(save(tmp_path / "a.npz", image=image, label=LABELS))
    assert problem in message


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (np.array([0.0, np.nan] * 3), "row 1, column 'label': 0.0 is of type float"),
        (COLOUR, "row 1, column 'label': array("),
        (np.array(["a", ""] * 3), "row 2, column 'label': missing"),
        (np.full(6, 0x110000, dtype=np.uint32).view("<U1"), "not a readable .npz file"),
        (np.full(6, 0xD800, dtype=np.uint32).view("<U1"), "not valid Unicode|not a readable .npz file"),
    ],
    ids=["NaN", "pictures", "empty", "beyond Unicode", "surrogate"],
)
def test_labels_that_are_none(tmp_path: Path, label: np.ndarray, problem: str) -> None:
    message = error_of(save(tmp_path / "a.npz", image=COLOUR, label=label))
    assert any(part in message for part in problem.split("|"))


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"", "not a readable .npz file"),
        (b"\x80\x04\x95.", "not a readable .npz file"),
        (npy(described("(6, 5, 4)"), b"\0" * 119), "its header says 120 bytes, the file holds others"),
        (npy(described("(6, 5, 4)"), b"\0" * 121), "its header says 120 bytes, the file holds others"),
        (npy(described("(6, 1000000, 1000000)"), b"\0" * 120), "its header says 6000000000000 bytes"),
        (npy(described(f"({10**30}, 1, 1)"), b"\0" * 120), "its header says"),
        (npy(described("(-6, -5, 4)"), b"\0" * 120), "uint8 [-6, -5, 4]"),
        (npy(described("(6, 5.0, 4)"), b"\0" * 120), "not a readable .npz file"),
        (npy(described("(True, 5, 4)"), b"\0" * 20), "columns differ in rows|not a readable"),
        (npy(described(f"({10**12},)", "<U0")), "1000000000000 rows; allowed: at most"),
        (npy(described("(6,)", "|O"), b"cos\nsystem\n(S'false'\ntR."), "objects [6]"),
        (npy("__import__('os').system('false')"), "not a readable .npz file"),
        (npy("[" * 9000), "not a readable .npz file"),
        (npy("{'descr': '|u1'}"), "not a readable .npz file"),
        (npy(described("(6, 5, 4)") + " " * 20_000, b"\0" * 120), "not a readable .npz file"),
        (npy(described("(6, 5, 4)"), b"\0" * 120, b"\x03\x00"), "format (3, 0); allowed: (1, 0) or (2, 0)"),
    ],
    ids=range(16),
)
def test_headers_are_not_believed(tmp_path: Path, image: bytes, problem: str) -> None:
    message = error_of(archive(tmp_path / "a.npz", image))
    assert any(part in message for part in problem.split("|"))


def test_the_second_version_of_headers(tmp_path: Path) -> None:
    image = npy(described("(6, 5, 4)"), GREY.tobytes(), b"\x02\x00")
    np.testing.assert_array_equal(np.stack(table_of(archive(tmp_path / "a.npz", image)).inputs)[..., 1], GREY)


def test_damaged_archives(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.npz", image=COLOUR, label=LABELS).read_bytes()
    path = tmp_path / "a.npz"
    for content in (b"", b"PK", whole[:-1], whole[:100], whole[50:], b"not a zip"):
        path.write_bytes(content)
        assert "not a readable .npz file" in error_of(path)
    assert "label'; allowed" in error_of(save(path, image=COLOUR))
    assert "compressed by method 12" in error_of(archive(path, b"x", zipfile.ZIP_BZIP2))


@settings(max_examples=120)
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = save(tmp_path_factory.mktemp("npz") / "a.npz", image=GREY[:3], label=LABELS[:3])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        table = table_of(path)
    except DataError:
        return
    np.testing.assert_array_equal(np.stack(table.inputs)[..., 0], GREY[:3])  # what has a checksum cannot differ


def test_an_archive_that_claims_much_of_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (6, 2000, 2000)
    bomb = archive(tmp_path / "bomb.npz", npy(described(str(shape)), bytes(24_000_000)))
    assert bomb.stat().st_size < 30_000
    monkeypatch.setattr(columns, "MOST_BYTES", 23_999_999)
    assert "its header says 24000000 bytes" in error_of(bomb)

    # The directory claims what the header claims; the file is far too small for either.
    monkeypatch.undo()
    size = 6 * 20_000 * 20_000
    image = npy(described("(6, 20000, 20000)"))
    path = archive(tmp_path / "a.npz", image)
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02")
    content = content[: entry + 24] + struct.pack("<I", size + len(image)) + content[entry + 28 :]
    path.write_bytes(content)
    assert f"its header says {size} bytes" in error_of(path)


# MNIST's files


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def save_idx(folder: Path, prefix: str, images: bytes, labels: bytes, packed: bool = True) -> Path:
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_mnists_files(tmp_path: Path, packed: bool) -> None:
    labels = LABELS.astype(np.uint8)
    save_idx(tmp_path, "train", idx(GREY), idx(labels), packed)
    assert load(DataSection(source=str(tmp_path)), 0, "image")[1] is None
    save_idx(tmp_path, "t10k", idx(GREY[:2]), idx(labels[:2]), packed)
    table, test = load(DataSection(source=str(tmp_path)), 0, "image")
    np.testing.assert_array_equal(np.stack(table.inputs), np.stack([GREY] * 3, axis=-1))
    assert (table.classes, table.labels.tolist()) == (("0", "1", "3"), [2, 0, 2, 1, 0, 1])
    assert test is not None
    assert test.labels.tolist() == [2, 0]


GOOD = idx(GREY)


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (b"", "not such a file"),
        (GOOD[:10], "not such a file"),
        (idx(GREY, kind=13), "not such a file"),
        (idx(COLOUR), "not such a file"),
        (GOOD[:-1], "its header says 120 values, it has others"),
        (GOOD + b"\0", "its header says 120 values, it has others"),
        (idx(GREY[:, :0]), "its header says [6, 0, 4]"),
        (GOOD[:4] + struct.pack(">3I", *([2**32 - 1] * 3)), "which the file cannot hold"),
        (GOOD[:4] + struct.pack(">3I", 4000, 4000, 4000), "which the file cannot hold"),
        (idx(GREY[:5]), "columns differ in rows: 'image' 5, 'label' 6"),
    ],
    ids=range(10),
)
def test_broken_mnist_files(tmp_path: Path, images: bytes, problem: str) -> None:
    save_idx(tmp_path, "train", images, idx(LABELS.astype(np.uint8)))
    assert problem in error_of(tmp_path)


def test_mnist_files_that_are_no_gzip(tmp_path: Path) -> None:
    save_idx(tmp_path, "train", GOOD, idx(LABELS.astype(np.uint8)))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (GOOD, whole[:-9], whole[:30], whole[:40] + b"\0\0" + whole[42:]):
        path.write_bytes(content)
        message = error_of(tmp_path)
        assert "not readable as gzip" in message or "it has others" in message
