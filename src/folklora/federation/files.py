"""Files and folders that are there whole or not at all, files that one process holds; a disk's refusal as one line."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch

from folklora.adapters.lowrank import Tensors
from folklora.errors import FolkLoraError, RunError


def tensors_of(data: bytes) -> Tensors:
    """What a safetensors file holds, by name in order: the library has another order at every call, and sums that
    follow one differ in their last bit."""
    return dict(sorted(safetensors.torch.load(data).items()))


def write_whole(path: Path, data: bytes, *, durable: bool = True, mode: int = 0o666) -> None:
    """Write a file beside its place and move it there.

    Parameters
    ----------
    durable
        Also if the power fails right afterwards.
    mode
        Permissions, from the first byte on; the process's mask is taken off.

    Raises
    ------
    OSError
        If the disk refuses; what was there before is then untouched.
    """
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        if durable:
            _sync(path.parent.parent)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder, written beside its place and moved there when all of it is on the disk.

    Raises
    ------
    RunError
        If there is something already, or the disk refuses; nothing is left behind then.
    """
    if os.path.lexists(path):
        raise RunError(f"{path} already exists; nothing was overwritten; allowed: a new name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with reported(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _sync(file)
            temporary.rename(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _sync(path: Path) -> None:
    """A name is on the disk only when its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reported(path: Path, raised: type[FolkLoraError] = RunError, kept: str = "") -> Iterator[None]:
    """What the disk refuses becomes one line.

    Parameters
    ----------
    path
        What is named where the refusal itself names no file.
    kept
        The end of the line.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        where = getattr(error, "filename", None) or path
        raise raised(f"{where}: cannot be written: {reason}{kept}") from error


@contextmanager
def held(lock: Path, taken: FolkLoraError, kept: str = "") -> Iterator[None]:
    """Hold a file for this process; the system lets go of it when the process ends, however it does.

    Parameters
    ----------
    taken
        What is raised where another process holds it; a refusal of the disk is of the same kind.
    kept
        As of `reported`.
    """
    with reported(lock, type(taken), kept):
        file = lock.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        yield
