"""Making a federation's folder: an authority, the server's certificate, a key pair for each member.

Private keys are created with mode 0600 in folders of mode 0700. Nothing is ever overwritten but the list of members
(`add`) and the server's certificate (`renew`), each by one rename. The layout: `folklora.federation.flower.membership`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from folklora.errors import FederationError
from folklora.federation.files import write_whole
from folklora.federation.flower import certificates
from folklora.federation.flower.membership import (
    FEDERATION,
    MEMBER,
    PORT,
    Federation,
    Membership,
    at,
    read_file,
    read_secret,
)

DAYS = 730
"""How long a server's certificate holds."""
CA_DAYS = 3650
"""How long the authority's holds, at least."""


def init(
    folder: str | Path, members: list[str], host: str = "127.0.0.1", port: int = PORT, days: int = DAYS
) -> Federation:
    """Make a federation: an authority, the server's certificate for ``days`` days, a key pair for each member.

    Raises
    ------
    FederationError
        A name, the host, the port or the number of days is not allowed, something is there already, or it cannot be
        written; nothing is left behind.
    """
    folder = Path(folder)
    name = "".join(c for c in folder.absolute().name if c.isprintable())[:64] or "federation"
    document = {"name": name, "host": host, "port": port, "members": list(members)}
    federation = Federation.parse(document, folder, folder)
    _check_days(days)

    def fill(made: Path) -> None:
        ca_key, ca = certificates.authority(name, max(days, CA_DAYS))
        write_whole(made / "ca.key", ca_key, mode=0o600)
        write_whole(made / "ca.crt", ca)
        key = certificates.server_key()
        (made / "server").mkdir(mode=0o700)
        write_whole(made / "server" / "server.key", key, mode=0o600)
        write_whole(made / "server" / "server.crt", certificates.server_certificate(host, days, key, ca_key, ca))
        (made / "members").mkdir(mode=0o700)
        for member in members:
            (made / "members" / member).mkdir(mode=0o700)
            _fill_member(made / "members" / member, federation, member, ca, None)
        write_whole(made / FEDERATION, federation.to_toml().encode())

    _make(folder, fill)
    return federation


def add(folder: str | Path, name: str, public_key: str | Path | None = None) -> Membership:
    """One more member, with a new key pair, or with ``public_key``, a file: the private half stays with who made it.

    Raises
    ------
    FederationError
        The name or the key is not allowed, something is there already, or it cannot be written.
    """
    folder = Path(folder)
    public = None
    if public_key is not None:
        with at(public_key):
            public = certificates.member_public(read_file(Path(public_key)))
    Federation.open(folder)
    with _locked(folder):
        before = Federation.open(folder)
        document = before.model_dump()
        after = Federation.parse({**document, "members": [*before.members, name]}, folder, folder)
        for other, known in before.public_keys().items():
            if known == public:
                raise FederationError(f"{public_key}: is the key of member {other!r}; allowed: one of its own for each")
        ca = read_file(before.ca)
        home = before.member_folder(name)
        _make(home, lambda made: _fill_member(made, before, name, ca, public))
        try:
            with _written(folder / FEDERATION):
                write_whole(folder / FEDERATION, after.to_toml().encode())
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
    return Membership.load(home / MEMBER)


def renew(folder: str | Path, days: int = DAYS) -> Federation:
    """A new certificate for the server's key and the host that ``federation.toml`` names now; members notice nothing.

    Raises
    ------
    FederationError
        ``ca.key`` is missing, or the authority itself has expired: then a new federation is needed.
    """
    _check_days(days)
    federation = Federation.open(folder)
    with _locked(federation.folder):
        with at(federation.ca):
            authority = certificates.load_certificate(ca := read_file(federation.ca))
        with at(federation.server_key):
            certificates.load_private_key(key := read_secret(federation.server_key))
        with at(federation.folder / "ca.key"):
            ca_key = read_secret(federation.folder / "ca.key")
            certificate = certificates.server_certificate(federation.host, days, key, ca_key, ca)
            certificates.check_server(certificates.load_certificate(certificate), key, authority, federation.host)
        with _written(federation.server_certificate):
            write_whole(federation.server_certificate, certificate)
    return Federation.read(folder)


def _fill_member(folder: Path, federation: Federation, name: str, ca: bytes, public: bytes | None) -> None:
    if public is None:
        private, public = certificates.member_keys()
        write_whole(folder / "key", private, mode=0o600)
    write_whole(folder / "key.pub", public)
    write_whole(folder / "ca.crt", ca)
    member = Membership(name=name, federation=federation.name, host=federation.host, port=federation.port)
    write_whole(folder / MEMBER, member.to_toml().encode())


def _check_days(days: int) -> None:
    if not 1 <= days <= 36500:
        raise FederationError(f"days = {days}; allowed: 1 to 36500")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FederationError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time: two that add a member at once would lose one from the list."""
    with _written(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    """A new folder of mode 0700, whole or not at all; an empty one that is there already is taken."""
    with _written(folder):
        if folder.is_symlink() or folder.is_file():
            raise FederationError(f"{folder} is there already; nothing is overwritten")
        if folder.is_dir() and (there := next(folder.iterdir(), None)):
            raise FederationError(f"{there} is there already; nothing is overwritten")
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            fill(made)
            made.rename(folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
