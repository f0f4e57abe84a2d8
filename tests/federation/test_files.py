"""Files and folders that are there whole or not at all, also after the power failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from folklora.errors import RunError
from folklora.federation.files import whole_folder, write_whole


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_anybody_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure cannot be had here: what is handed to the disk, and in which order, can."""
    place = tmp_path / "new" / "file"
    synced: list[tuple[int, bool]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, place.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(place, b"data")
    folder, file = place.parent.stat().st_ino, place.stat().st_ino
    assert synced == [(tmp_path.stat().st_ino, False), (file, False), (folder, True)]
    synced.clear()
    write_whole(place, b"more", durable=False)
    assert synced == []
    assert place.read_bytes() == b"more"


def test_what_was_there_stays_where_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "file"
    write_whole(place, b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(place, b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert place.read_bytes() == b"before"


def test_a_folder_is_there_when_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "new" / "folder"
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    with whole_folder(place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("data")
        assert not place.exists()
        assert not synced
    assert {path.relative_to(place).as_posix() for path in place.rglob("*")} == {"sub", "sub/file"}
    assert list(place.parent.iterdir()) == [place]
    assert synced == {path.stat().st_ino for path in (place.parent, place, *place.rglob("*"))}


@pytest.mark.parametrize("there", ["folder", "file", "link to nowhere"])
def test_what_is_there_is_not_overwritten_by_a_folder(tmp_path: Path, there: str) -> None:
    place = tmp_path / "place"
    if there == "folder":
        place.mkdir()
    elif there == "file":
        place.write_text("data")
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match="already exists; nothing was overwritten"), whole_folder(place):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == [place]


def filled(place: Path, then: Callable[[], object] = lambda: None) -> None:
    with whole_folder(place) as folder:
        (folder / "file").write_text("data")
        then()


def test_a_folder_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    def stopped() -> None:
        raise KeyboardInterrupt

    def taken() -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "of another").write_text("data")

    with pytest.raises(RunError, match="full: cannot be written: No space left on device"):
        filled(tmp_path / "full", full)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "stopped", stopped)
    with pytest.raises(RunError, match="cannot be written"):
        filled(tmp_path / "taken", taken)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        filled(tmp_path / "file" / "below")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken"}
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["of another"]
