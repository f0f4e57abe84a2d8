"""Files that are there whole or not at all, also after the power failed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from folklora.federation.files import write_whole


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
