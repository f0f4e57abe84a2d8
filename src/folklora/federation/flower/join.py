"""`folklora join`: one member at work, for as many runs as come, until it is told to stop.

Flower's SuperNode keeps the connection, in a process of its own that is started again whenever it ends; the backbone
and the member's data stay in this process.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from folklora.errors import FederationError
from folklora.federation.files import write_whole
from folklora.federation.flower.membership import Membership
from folklora.federation.flower.processes import Daemon, ended_by_signals, is_loopback, supernode
from folklora.sections import COLUMNS

log = logging.getLogger(__name__)

BACK_OFF = 5.0
"""Seconds between two attempts to reach a server that is away, at most."""
SHORTEST, LONGEST = 0.05, 0.5
"""Seconds between two looks for work: after some, and when there has been none for long."""
EXPIRED = 10
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED."""
DIAL = 5.0
"""Seconds that one attempt takes at most."""
CONNECTED, NO_MEMBER = "SuperNode ID:", "belongs to no member"
"""What a SuperNode logs when its SuperLink has let it in, and when the gate will not."""
REASONS = {
    "Client error '401": "the server was restarted",
    "Failed to activate": "the server has not noticed yet that the last one is gone; half a minute at most",
}
"""What it logs, and what that means here."""
TAKEN, SENT, LOST = "Receiving:", "Sent successfully", "Failed to send"
"""When it takes an order, and when the answer is gone."""


class Connection:
    """The SuperNode of a member: dials, and dials again, for as long as this process lives.

    Parameters
    ----------
    membership
        Who this is, and where the server is.
    insecure
        Plain HTTP, to a server on this machine.

    Attributes
    ----------
    greeted
        Whether the SuperNode that runs now has been let in.
    """

    def __init__(self, membership: Membership, *, insecure: bool = False) -> None:
        self.membership = membership
        self.insecure = insecure
        home = membership.folder / "flower"
        home.mkdir(mode=0o700, exist_ok=True)
        self.secret = secrets.token_bytes(32)
        write_whole(home / "secret", self.secret, mode=0o600)
        server, ca, key = membership.address, membership.ca, membership.key
        self.node: Daemon = supernode(home, home / "secret", server, ca, key, plain=insecure)
        self._pause = 1.0
        self._next = 0.0
        self.greeted = False
        self._waiting = False
        self._reason = ""

    def attend(self) -> bool:
        """Do what there is to do for the connection; whether there is a SuperNode that may have work.

        Raises
        ------
        FederationError
            It is no use: another authority signed the server's certificate, or the key is no member's.
        """
        if self.node.alive:
            if not self.greeted and CONNECTED in self.node.text():
                log.info("connected to %s", self.membership.address)
                self.greeted, self._waiting, self._pause, self._reason = True, False, 1.0, ""
            return True
        if self.node.pid is not None:
            self._ended()
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, BACK_OFF)
        if not self._reachable():
            return False
        self.node.start()
        self.greeted = False
        return True

    def _ended(self) -> None:
        said, reason = self.node.text(), self.node.reason()
        self.node.stop()
        if NO_MEMBER in said:
            raise FederationError(
                f"{self.membership.address} does not know the key of member {self.membership.name!r}: "
                f"{self.membership.folder / 'key.pub'} is not in the server's folder"
            )
        for sign, meaning in REASONS.items():
            reason = meaning if sign in reason else reason
        if reason != self._reason:
            log.warning("the connection ended (%s); dialling again", reason)
        self._reason = reason
        self._next = time.monotonic() + self._pause

    def _reachable(self) -> bool:
        """Whether somebody answers there who is the server."""
        try:
            with socket.create_connection((self.membership.host, self.membership.port), DIAL) as dialled:
                if not self.insecure:
                    trusted = ssl.create_default_context(cafile=self.membership.ca)
                    with trusted.wrap_socket(dialled, server_hostname=self.membership.host):
                        pass
            return True
        except ssl.SSLCertVerificationError as error:
            if error.verify_code == EXPIRED:  # it will be renewed, and then all members should be there
                self._wait_for(f"the certificate of {self.membership.address} has run out")
                return False
            raise FederationError(
                f"{self.membership.address} is not the server of this federation: {error.verify_message} "
                f"({self.membership.ca} says who may be)"
            ) from None
        except OSError as error:
            self._wait_for(f"no server at {self.membership.address} ({error.strerror or error})")
            return False

    def _wait_for(self, reason: str) -> None:
        if not self._waiting:
            log.warning("%s; waiting for it", reason)
            self._waiting = True

    def farewell(self) -> None:
        """Let the last answer leave: the SuperNode has it, and says so when it is gone."""
        end = time.monotonic() + DIAL
        while self.node.alive and time.monotonic() < end:
            said = self.node.text()
            if said.rfind(TAKEN) < max(said.rfind(SENT), said.rfind(LOST)):
                break
            time.sleep(SHORTEST)

    def close(self) -> None:
        self.node.stop()


def join(
    folder: str | Path,
    member: str | None = None,
    *,
    data: str | None = None,
    text: str | None = None,
    label: str | None = None,
    rehearse: str | None = None,
    model: str | None = None,
    columns: Mapping[str, str] | None = None,
    device: str | None = None,
    key: str | None = None,
    once: bool = False,
    insecure: bool = False,
) -> None:
    """Work for a member until told to stop, or, with ``once``, until a run says goodbye.

    Parameters
    ----------
    folder
        A federation's, or the one that was handed to the member.
    data, text, label, rehearse, model, columns, device
        See `folklora.federation.parties.Own`.
    key
        The file of the members' common key (`folklora.federation.keys`).
    insecure
        Plain HTTP, to a server on this machine.

    Raises
    ------
    FolkLoraError
        The folder is not a member's, a file is missing, another process works for it, or the server refuses it.
    """
    membership = Membership.read(folder, member)
    if insecure and not is_loopback(membership.host):
        raise FederationError(f"--insecure with {membership.host}; allowed: a server on this machine (127.0.0.1)")
    for option, value in (("--data", data), ("--model", model)):
        if value is not None and not Path(value).exists():
            raise FederationError(f"{option} {value}: no such file or folder")
    for key, name in (columns or {}).items():
        if key not in COLUMNS or not name:
            raise FederationError(f"--column {key}={name}; allowed: KEY=NAME, KEY one of {', '.join(COLUMNS)}")
    if device not in (None, "auto", "cpu", "cuda"):
        raise FederationError(f"--device {device}; allowed: auto, cpu, cuda")
    from folklora.federation.folder import locked
    from folklora.federation.keys import read_key

    common = None if key is None else read_key(key)
    with (
        locked(membership.folder),
        ended_by_signals(),
        closing(Connection(membership, insecure=insecure)) as connection,
    ):
        log.info("member %r of federation %r", membership.name, membership.federation)
        connection.attend()  # so that it dials while the libraries are loaded, which takes seconds
        from folklora.federation.flower.apps import client_app
        from folklora.federation.flower.executor import SuperNode
        from folklora.federation.parties import Own
        from folklora.federation.resident import Resident

        own = Own(data, text, label, rehearse, model, tuple((columns or {}).items()), device, common)
        resident = Resident(membership.name, membership.folder, own)
        app = client_app(resident.answer)
        tasks, pause = None, SHORTEST
        while not (once and resident.over):
            if connection.attend():
                if tasks is None or tasks.address != connection.node.address:
                    tasks = SuperNode(connection.node.address, connection.secret)
                if tasks.answer(app):
                    pause = SHORTEST
                    continue
            time.sleep(pause)
            pause = min(1.2 * pause, LONGEST)
        connection.farewell()
