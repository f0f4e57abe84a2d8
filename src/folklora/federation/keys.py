"""The key of encrypted aggregation as a file: made once by one member, handed to the others, never to the server."""

from __future__ import annotations

import os
from pathlib import Path

from folklora.errors import FederationError
from folklora.federation.files import reported, write_whole
from folklora.privacy.ckks import Key

LONGEST = 1024
"""Bytes that no key's file exceeds."""


def make_key(path: str | Path) -> Key:
    """Write a new key, readable by its owner only.

    Raises
    ------
    FederationError
        If there is something already, the disk refuses, or TenSEAL is not installed.
    """
    path = Path(path)
    key = Key.new()
    if path.exists() or path.is_symlink():
        raise FederationError(f"{path} already exists; nothing was overwritten; allowed: a new name")
    write_key(path, key)
    return key


def write_key(path: Path, key: Key) -> None:
    with reported(path, FederationError):
        write_whole(path, key.line().encode(), mode=0o600)


def read_key(path: str | Path) -> Key:
    """Raises FederationError for a file that is missing, holds no key, or can be read by others on this computer."""
    try:
        with Path(path).open("rb") as file:
            text, mode = file.read(LONGEST).decode("ascii"), os.fstat(file.fileno()).st_mode
    except UnicodeDecodeError:
        text, mode = "", 0
    except OSError as error:
        raise FederationError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        key = Key.parse(text)
    except FederationError as error:
        raise FederationError(f"{path}: {error}") from None
    if mode & 0o077:
        raise FederationError(f"{path}: others on this computer can read it; run: chmod 600 {path}")
    return key
