"""The run directory: the only state of a run, written so that a kill at any moment loses at most the round in flight.

A round is committed by renaming one small file, ``checkpoint.json``, which names every file that belongs to it with its
SHA-256. Files are never overwritten: a client that trained in round t gets ``clients/<id>/<t>.safetensors``; what no
kept checkpoint names is swept away afterwards. The checkpoint before is kept too, so a file that rots on disk costs
one round. The layout is described in ``docs/architecture.md``.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import safetensors.torch

from folklora.adapters.lowrank import Tensors
from folklora.errors import RunError
from folklora.federation.files import held, reported, tensors_of, write_whole
from folklora.recipe import Recipe

CURRENT, PREVIOUS, BEST = "checkpoint.json", "checkpoint-previous.json", "checkpoint-best.json"
BEST_BEFORE = "checkpoint-best-previous.json"
"""The best round before the best: whoever steps back may step back behind it."""
METRICS = "metrics.jsonl"
KEPT = "; what was committed is untouched"
_reported = partial(reported, kept=KEPT)


@dataclass(frozen=True)
class Checkpoint:
    """What a committed round consists of; file names are relative to the run directory."""

    round: int
    clients: dict[str, str]
    server: str
    digests: dict[str, str]
    metrics_bytes: int
    delivered: dict[str, str] = field(default_factory=dict)
    best_round: int | None = None
    stale: int = 0

    def to_json(self) -> str:
        """With a SHA-256 of itself: it vouches for every other file, and nothing else vouches for it."""
        document = asdict(self)
        return json.dumps({**document, "sha256": _digest(document)})

    @classmethod
    def from_json(cls, text: str) -> Checkpoint:
        """Raises ValueError for anything but what `to_json` wrote."""
        document = json.loads(text)
        if not isinstance(document, dict) or document.pop("sha256", None) != _digest(document):
            raise ValueError("it is not what was committed")
        return cls(**document)


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


class RunDirectory:
    """One run on disk. Everything that fails here is a `RunError` that names the file; what was committed stays."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- creating and opening ------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | Path, recipe: Recipe, partition: str, others: Mapping[str, bytes] | None = None
    ) -> RunDirectory:
        """A new run; refuses a directory that already holds one.

        Parameters
        ----------
        others
            More files that it begins with. ``recipe.toml``, which makes it a run, is written last.

        Raises
        ------
        RunError
            If the directory holds a run or cannot be written.
        """
        run = cls(Path(path))
        with _reported(run.path):
            if (run.path / "recipe.toml").exists():
                raise RunError(f"{path} already holds a run; use `folklora resume {path}`, or another --out")
            run._refuse_strangers()
            (run.path / "clients").mkdir(parents=True, exist_ok=True)
            (run.path / "server").mkdir(exist_ok=True)
            run.write("partition.json", partition.encode())
            for name, data in (others or {}).items():
                run.write(name, data)
            run.write("recipe.toml", recipe.to_toml().encode())
        return run

    def _refuse_strangers(self) -> None:
        """A run sweeps its folders and trusts its files: none may be somebody else's, such as a project's server/."""
        for name in ("clients", "server", METRICS, CURRENT, PREVIOUS, BEST, BEST_BEFORE, "summary.json"):
            path = self.path / name
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                raise RunError(f"{path} is there already and belongs to no run; use another --out")

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run.

        Raises
        ------
        RunError
            If there is none.
        """
        if not (Path(path) / "recipe.toml").is_file():
            raise RunError(f"{path}: not a run directory (no recipe.toml in it)")
        return cls(Path(path))

    @property
    def recipe(self) -> Recipe:
        return Recipe.read(self.path / "recipe.toml")

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one process; a second one is refused rather than left to write over the first."""
        with held(self.path / "lock", RunError(f"{self.path}: another process is running this run"), KEPT):
            yield

    # -- committing a round --------------------------------------------------------------------------------------

    def commit(
        self,
        before: Checkpoint | None,
        round: int,
        clients: Mapping[str, Tensors],
        server: Tensors,
        line: Mapping[str, Any],
        *,
        delivered: Mapping[str, str],
        best_round: int | None = None,
        stale: int = 0,
    ) -> Checkpoint:
        """Make round ``round`` the state of the run.

        Parameters
        ----------
        before
            The checkpoint this one follows; clients that did not change keep its files.
        clients
            The records of the clients that changed.
        line
            The round's line in ``metrics.jsonl``.
        """
        files = dict(before.clients) if before else {}
        digests = dict(before.digests) if before else {}
        with _reported(self.path):
            for client, tensors in clients.items():
                files[client] = f"clients/{_folder(client)}/{round}.safetensors"
                digests[files[client]] = self._write_tensors(files[client], tensors)
            state = f"server/{round}.safetensors"
            digests[state] = self._write_tensors(state, server)
            metrics_bytes, digests[METRICS] = self._append(line, before.metrics_bytes if before else 0)
            used = {state, METRICS, *files.values()}
            digests = {name: digest for name, digest in digests.items() if name in used}
            after = Checkpoint(round, files, state, digests, metrics_bytes, dict(delivered), best_round, stale)
            # All of it is on the disk before anything names it; one call, for there may be a thousand clients.
            os.sync()
            if (self.path / CURRENT).exists():
                self.write(PREVIOUS, (self.path / CURRENT).read_bytes())
            encoded = after.to_json().encode()
            if best_round == round:
                if before is not None and (best := self._best_of(before)) is not None:
                    self.write(BEST_BEFORE, best.to_json().encode())
                self.write(BEST, encoded)
            self.write(CURRENT, encoded)
            self.sweep()
        return after

    def _append(self, line: Mapping[str, Any], after: int) -> tuple[int, str]:
        """Write a line at byte ``after``; the length and the SHA-256 of the whole file."""
        path = self.path / METRICS
        with path.open("r+b" if path.exists() else "w+b") as file:
            # A line of a round that was never committed is cut off before the new one is written.
            file.truncate(after)
            file.seek(after)
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            file.seek(0)
            data = file.read()
            return len(data), hashlib.sha256(data).hexdigest()

    def _write_tensors(self, name: str, tensors: Tensors) -> str:
        data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
        self.write(name, data, durable=False)
        return hashlib.sha256(data).hexdigest()

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write a file whole or not at all; ``durable``: also if the power fails right afterwards."""
        path = self.path / name
        with _reported(path):
            write_whole(path, data, durable=durable)

    def secret(self) -> int:
        """The server's, drawn once from the system; only the server may know it (0600).

        Raises
        ------
        RunError
            If a run that has begun lost it.
        """
        path = self.path / "secret"
        if not path.exists() and self.checkpoint() is None:
            with _reported(path):
                write_whole(path, str(secrets.randbits(63)).encode(), mode=0o600)
        try:
            return int(path.read_bytes())
        except (OSError, ValueError):
            raise RunError(f"{path}: missing or damaged; allowed: the file that this run began with") from None

    def sweep(self) -> None:
        """Remove files that no kept checkpoint names."""
        named = {name for checkpoint in self.kept() for name in (checkpoint.server, *checkpoint.clients.values())}
        with _reported(self.path):
            for folder in ("clients", "server"):
                for path in (self.path / folder).rglob("*"):
                    if path.is_file() and path.relative_to(self.path).as_posix() not in named:
                        path.unlink()

    # -- reading back --------------------------------------------------------------------------------------------

    def checkpoint(self, *, previous: bool = False, best: bool = False) -> Checkpoint | None:
        """The last committed round (or the one before, or the best so far); None if nothing was committed."""
        found = self._read_checkpoint(PREVIOUS if previous else CURRENT)
        if not best or found is None or found.best_round is None:
            return None if best else found
        if (kept := self._best_of(found)) is None:
            raise RunError(f"{self.path / BEST} is not that of the best round, {found.best_round}; {self._advice()}")
        return kept

    def kept(self) -> list[Checkpoint]:
        """All that a run may come back to: the last round, the one before, and the best as each of them knows it."""
        last = [found for name in (CURRENT, PREVIOUS) if (found := self._read_checkpoint(name, quiet=True))]
        return last + [best for found in last if (best := self._best_of(found))]

    def _best_of(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """A round that was stepped back from, or never committed, may have left the name of a better one."""
        found = (self._read_checkpoint(name, quiet=True) for name in (BEST, BEST_BEFORE))
        return next((best for best in found if best is not None and best.round == checkpoint.best_round), None)

    def _read_checkpoint(self, name: str, *, quiet: bool = False) -> Checkpoint | None:
        path = self.path / name
        if not path.exists():
            if name == CURRENT and (self.path / PREVIOUS).exists() and not quiet:
                raise RunError(f"{path} is missing; {self._advice()}")
            return None
        try:
            return Checkpoint.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, OSError) as error:
            if quiet:
                return None
            raise RunError(f"{path} cannot be read ({error}); {self._advice()}") from None

    def tensors(self, checkpoint: Checkpoint, name: str) -> Tensors:
        """A file of a checkpoint, verified against its SHA-256.

        Raises
        ------
        RunError
            If it is missing or not what was written; says how to go on from the round before.
        """
        return tensors_of(self._verified(checkpoint, name))

    def _verified(self, checkpoint: Checkpoint, name: str, size: int | None = None) -> bytes:
        """The first ``size`` bytes of a file (default: all), if they are what was committed."""
        path = self.path / name
        try:
            data = path.read_bytes()[:size]
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; {self._advice()}") from None
        if hashlib.sha256(data).hexdigest() != checkpoint.digests.get(name):
            raise RunError(f"{path} is corrupted (its SHA-256 is not what was committed); {self._advice()}")
        return data

    def _advice(self) -> str:
        earlier = self._read_checkpoint(PREVIOUS, quiet=True)
        if earlier is None:
            return "no earlier round is kept"
        return f"round {earlier.round} is kept: `folklora resume {self.path} --previous`"

    def step_back(self) -> Checkpoint:
        """Make the previous checkpoint the current one; not while another process runs the run."""
        with self.locked(), _reported(self.path):
            earlier = self.checkpoint(previous=True)
            if earlier is None:
                raise RunError(f"{self.path}: no earlier round is kept")
            self.write(CURRENT, (self.path / PREVIOUS).read_bytes())
            (self.path / "summary.json").unlink(missing_ok=True)
        return earlier

    def metrics(self) -> list[dict[str, Any]]:
        """The committed lines of ``metrics.jsonl``; verified like `tensors`."""
        current = self.checkpoint()
        if current is None:
            return []
        data = self._verified(current, METRICS, current.metrics_bytes)
        return [json.loads(line) for line in data.splitlines()]


def _folder(client: str) -> str:
    """A file name for any client id: unlike `quote`, it leaves no ``.`` and ``..``."""
    return quote(client, safe="").replace(".", "%2E")
