"""A member's private state of one run, in a folder of its own: nothing of it ever leaves the member.

::

    brief.json       what the run is: recipe, members, labels; the member's own data and backbone
    secret           the seed of the noise and the keys that protect this member's messages (0600)
    key              a copy of the members' common key, where uploads are encrypted (0600)
    state.json       the commit point: each version with its file and SHA-256, and what the member's model is now
    noted.json       what was told once and must never be told otherwise (secure aggregation); no step back undoes it
    versions/        the private tensors as some round left them, safetensors
    parts/           the welcome and the replies that the server may name again, by their SHA-256

A version is written before the member answers, and one small file, ``state.json``, makes it so: a member killed at any
moment has either the version before or the whole new one. What the server cannot come back to is swept away.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from folklora.adapters.lowrank import Tensors
from folklora.errors import RunError
from folklora.federation.files import held, reported, tensors_of, write_whole
from folklora.federation.keys import read_key, write_key
from folklora.federation.orders import Digest, MemberName
from folklora.privacy.ckks import Key


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Brief(_File):
    """What a run is, and what this member brings to it.

    Attributes
    ----------
    recipe, clients, classes
        As the server told them; the recipe as TOML.
    model
        The backbone that this member computes with: embedded name or folder.
    fingerprint, backbone
        SHA-256 of the member's rows and of that backbone.
    """

    run: str
    client: MemberName
    recipe: str
    clients: list[MemberName]
    classes: list[str]
    model: str
    fingerprint: Digest
    backbone: Digest


class Kept(_File):
    """A version's file in ``versions/``."""

    file: Annotated[str, Field(pattern=r"^-?[0-9]+-[0-9a-f]{16}\.safetensors$")]
    sha256: Digest


class Notes(_File):
    """What was said once: key -> a digest of what."""

    noted: dict[str, str] = {}


class State(_File):
    """Attributes
    ----------
    versions
        Round -> the private tensors as it left them.
    model, reply
        What the member's model is now: private tensors, and the reply to be applied to them, if any.
    steps
        How often it chose to apply a shared block, if it has chosen.
    """

    versions: dict[int, Kept] = {}
    model: Kept | None = None
    reply: Digest | None = None
    steps: int | None = None


_Document = TypeVar("_Document", bound=BaseModel)


class MemberFolder:
    """One run at one member; what the disk refuses is a `RunError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- what the run is -----------------------------------------------------------------------------------------

    def brief(self) -> Brief | None:
        """None if this folder knows of no run."""
        return self._read("brief.json", Brief)

    def begin(self, brief: Brief, key: Key | None = None) -> None:
        with reported(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (self.path / "secret").exists():
                write_whole(self.path / "secret", str(secrets.randbits(256)).encode(), mode=0o600)
            if key is not None:
                write_key(self.path / "key", key)
            write_whole(self.path / "brief.json", brief.model_dump_json().encode())

    def key(self) -> Key | None:
        """The members' common key; None where the run does not encrypt."""
        return read_key(self.path / "key") if (self.path / "key").exists() else None

    def secret(self) -> int:
        """Drawn once, from the system; the same in every round, so that repeated noise does not average out."""
        try:
            return int((self.path / "secret").read_bytes())
        except (OSError, ValueError):
            raise RunError(
                f"{self.path / 'secret'}: missing or damaged; allowed: the file that this run began with"
            ) from None

    def setdefault(self, key: str, value: str, /) -> str:
        """Note a value if there is none under this key, on the disk before it is returned; what is noted."""
        with reported(self.path):
            notes = self._read("noted.json", Notes) or Notes()
            if key not in notes.noted:
                notes = Notes(noted={**notes.noted, key: value})
                write_whole(self.path / "noted.json", notes.model_dump_json().encode())
        return notes.noted[key]

    # -- versions ------------------------------------------------------------------------------------------------

    def state(self) -> State:
        return self._read("state.json", State) or State()

    def load(self, version: int) -> Tensors | None:
        """The private tensors of a version; None if they are not here, or not what was written."""
        return self.tensors(self.state().versions.get(version))

    def tensors(self, kept: Kept | None) -> Tensors | None:
        if kept is None:
            return None
        try:
            data = (self.path / "versions" / kept.file).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != kept.sha256:
            return None
        return tensors_of(data)

    def save(self, version: int, tensors: Tensors, keep: Collection[int], hold: Collection[str]) -> None:
        """Make ``tensors`` that version, and what the model is now; of all others, ``keep`` and ``hold`` stay."""
        with reported(self.path):
            kept = self._write_tensors(version, tensors)
            versions = {number: each for number, each in self.state().versions.items() if number in keep}
            self._write_state(State(versions={**versions, version: kept}, model=kept))
            named = {each.file for each in (*versions.values(), kept)} | set(hold)
            for path in (*(self.path / "versions").iterdir(), *(self.path / "parts").glob("*")):
                if path.name not in named:
                    path.unlink(missing_ok=True)

    def stand(self, version: int, tensors: Tensors | None, reply: str | None, steps: int | None = None) -> None:
        """Note what the model is now: a version, or ``tensors`` that come of it and are none, a reply, its depth."""
        with reported(self.path):
            state = self.state()
            model = state.versions[version] if tensors is None else self._write_tensors(version, tensors)
            after = state.model_copy(update={"model": model, "reply": reply, "steps": steps})
            if after != state:
                self._write_state(after)

    def _write_tensors(self, version: int, tensors: Tensors) -> Kept:
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        digest = hashlib.sha256(data).hexdigest()
        kept = Kept(file=f"{version}-{digest[:16]}.safetensors", sha256=digest)
        write_whole(self.path / "versions" / kept.file, data)
        return kept

    def _write_state(self, state: State) -> None:
        write_whole(self.path / "state.json", state.model_dump_json().encode())

    # -- what the server said ------------------------------------------------------------------------------------

    def hold(self, digest: str, data: bytes) -> None:
        with reported(self.path):
            write_whole(self.path / "parts" / digest, data)

    def part(self, digest: str) -> bytes | None:
        """Bytes of this SHA-256, if they are here."""
        try:
            data = (self.path / "parts" / digest).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == digest else None

    # ------------------------------------------------------------------------------------------------------------

    def _read(self, name: str, document: type[_Document]) -> _Document | None:
        try:
            text = (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{self.path / name}: cannot be read: {error.strerror}") from None
        try:
            return document.model_validate_json(text)
        except ValidationError as error:
            raise RunError(f"{self.path / name}: damaged ({error.errors()[0]['msg']})") from None


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold a member's folder for one process.

    Raises
    ------
    RunError
        If another process has it, or it cannot be written.
    """
    with reported(home):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with held(home / "lock", RunError(f"{home}: another process works for this member")):
        yield
