"""The folder of a federation, read back: who belongs to it, where its server is, what each proves itself with.

::

    DIR/federation.toml                     name, host, port, members
    DIR/ca.crt, ca.key                      signs the server's certificate; ca.key may be kept elsewhere until `renew`
    DIR/server/server.crt, server.key
    DIR/members/NAME/member.toml, ca.crt, key, key.pub      the folder to hand to NAME

`folklora.federation.flower.credentials` makes it.
"""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_validator

from folklora.errors import FederationError
from folklora.federation.flower import certificates
from folklora.recipe import describe_validation_error
from folklora.sections import Section

FEDERATION, MEMBER = "federation.toml", "member.toml"
PORT = 9443
LARGEST = 2**20
"""Bytes of any file here."""

_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def _member_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"{name!r}; allowed: up to 64 letters, digits, '.', '_', '-', the first a letter or digit")
    return name


def _host(host: str) -> str:
    """A DNS name or an IP address that others can dial."""
    try:
        # What follows a % means something on one machine only, and no certificate can say it.
        dialled = not ipaddress.ip_address(host).is_unspecified and "%" not in host
    except ValueError:
        labels = host.split(".")
        # A name whose last label is a number would be read as a mistyped IPv4 address.
        dialled = len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not _NUMBER.fullmatch(labels[-1])
    if not dialled:
        raise ValueError(f"{host!r}; allowed: the DNS name or IP address that members dial, no scheme, no port")
    return host


FederationName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
MemberName = Annotated[str, AfterValidator(_member_name)]
Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Folder(Section):
    """A TOML file and the folder it was read from."""

    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        return self._folder

    def to_toml(self) -> str:
        """The file's text."""
        # Strings without control characters, numbers and flat lists are spelt as JSON spells them.
        return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in self.model_dump().items())

    @classmethod
    def parse(cls, document: Mapping[str, object], folder: Path, where: object) -> Self:
        """Validate a table; ``where`` is what an error names as its place."""
        try:
            found = cls.model_validate(document)
        except ValidationError as error:
            raise FederationError(f"{where}: {describe_validation_error(error, cls)}") from None
        found._folder = folder
        return found

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file; looks at nothing beside it."""
        try:
            document = tomllib.loads(read_file(path).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise FederationError(f"{path}: cannot be read as text: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise FederationError(f"{path}: not valid TOML: {error}") from None
        return cls.parse(document, path.parent, path)


class Membership(_Folder):
    """What a member joins with: ``member.toml`` and the files beside it."""

    name: MemberName
    federation: FederationName
    host: Host
    port: Port

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        """The private key, in the form that ``flower-supernode --auth-supernode-private-key`` reads."""
        return self.folder / "key"

    @property
    def address(self) -> str:
        """``host:port`` of the server, an IPv6 address in brackets."""
        return _address(self.host, self.port)

    @classmethod
    def read(cls, folder: str | Path, member: str | None = None) -> Membership:
        """The membership in a handed-over folder, or that of ``member`` in a whole federation's folder.

        Raises
        ------
        FederationError
            The folder is neither, or not of that member; its key is missing, readable by others, of a wrong kind or not
            the one in ``key.pub``; its certificate does not hold now.
        """
        folder = Path(folder)
        if not _is_file(folder / MEMBER):
            federation = Federation.open(folder, f"{FEDERATION} or {MEMBER}")
            folder = federation.member_folder(federation.choose(member))
        found = cls.load(folder / MEMBER)
        if member not in (None, found.name):
            raise FederationError(f"{folder}: is the folder of member {found.name!r}, not of {member!r}")
        with at(found.ca):
            certificates.load_certificate(read_file(found.ca))
        if not found.key.exists():
            raise FederationError(f"{found.key}: no such file; put the private key of {folder / 'key.pub'} there")
        with at(found.key):
            public = certificates.member_public_of(read_secret(found.key))
        with at(folder / "key.pub"):
            if certificates.member_public(read_file(folder / "key.pub")) != public:
                raise FederationError(f"is not the public key of {found.key}")
        return found


class Federation(_Folder):
    """A federation as its server knows it: ``federation.toml`` and the files beside it."""

    name: FederationName
    host: Host
    port: Port
    members: list[MemberName] = Field(min_length=1)

    @field_validator("members")
    @classmethod
    def _each_once(cls, members: list[str]) -> list[str]:
        seen: set[str] = set()
        for name in members:
            if name.casefold() in seen:  # there are file systems on which these are one folder
                raise ValueError(f"{name!r} twice; allowed: names that differ in more than upper and lower case")
            seen.add(name.casefold())
        return members

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def server_certificate(self) -> Path:
        return self.folder / "server" / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "server" / "server.key"

    @property
    def address(self) -> str:
        """``host:port`` that members dial, an IPv6 address in brackets."""
        return _address(self.host, self.port)

    def member_folder(self, name: str) -> Path:
        return self.folder / "members" / name

    def public_key(self, name: str) -> Path:
        """A member's OpenSSH public key, for ``flwr supernode register``."""
        return self.member_folder(name) / "key.pub"

    def public_keys(self) -> dict[str, bytes]:
        """The public line of each member.

        Raises
        ------
        FederationError
            One is missing, of a kind that Flower does not take, or another member's too.
        """
        keys: dict[str, bytes] = {}
        owners: dict[bytes, str] = {}
        for name in self.members:
            path = self.public_key(name)
            with at(path):
                keys[name] = certificates.member_public(read_file(path))
                if (owner := owners.setdefault(keys[name], name)) != name:
                    raise FederationError(f"is the key of member {owner!r} too; allowed: one of its own for each")
        return keys

    def choose(self, member: str | None) -> str:
        """``member`` if it belongs to the federation; None stands for the only one."""
        if member in self.members or (member is None and len(self.members) == 1):
            return member or self.members[0]
        problem = "which member?" if member is None else f"no member {member!r};"
        raise FederationError(f"{self.folder}: {problem} allowed: {', '.join(self.members)}")

    @classmethod
    def open(cls, folder: str | Path, wanted: str = FEDERATION) -> Federation:
        """As `read`, without a look at keys and certificates."""
        path = Path(folder) / FEDERATION
        if not _is_file(path):
            raise FederationError(f"{folder}: not a federation's folder (no {wanted} in it)")
        return cls.load(path)

    @classmethod
    def read(cls, folder: str | Path) -> Federation:
        """A federation that can be served: all its keys and certificates are there and hold now.

        Raises
        ------
        FederationError
            One line naming the file, what is wrong with it and what is allowed.
        """
        found = cls.open(folder)
        with at(found.ca):
            ca = certificates.load_certificate(read_file(found.ca))
        with at(found.server_key):
            key = read_secret(found.server_key)
            certificates.load_private_key(key)
        with at(found.server_certificate, f"; `folklora federation renew {found.folder}` makes a new one"):
            certificates.check_server(
                certificates.load_certificate(read_file(found.server_certificate)), key, ca, found.host
            )
        if (found.folder / "ca.key").exists():
            read_secret(found.folder / "ca.key")
        found.public_keys()
        return found


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def at(path: str | Path, advice: str = "") -> Iterator[None]:
    """Say which file it is about."""
    try:
        yield
    except FederationError as error:
        text = str(error)
        raise FederationError(text if text.startswith(str(path)) else f"{path}: {text}{advice}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise FederationError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_file(path: Path) -> bytes:
    """A file's bytes; more than `LARGEST`, or what cannot be read, is a `FederationError`."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise FederationError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > LARGEST:
        raise FederationError(f"{path}: larger than {LARGEST} bytes")
    return data


def read_secret(path: Path) -> bytes:
    """Likewise, of a private key: refused if anybody else on this computer can read it."""
    data = read_file(path)
    if path.stat().st_mode & 0o077:
        raise FederationError(f"{path}: others on this computer can read it; run: chmod 600 {path}")
    return data
