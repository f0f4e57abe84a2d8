"""Flower's own processes, started and stopped: where they keep things, when they are ready, and that none is left.

None of them connects to the outside: telemetry, update checks and the installation of dependencies are off. Their
configuration lives in a folder of ours, never in the user's home.
"""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from folklora.errors import FederationError
from folklora.federation.flower.daemon import GRACE, PLAIN

LOOPBACK = "127.0.0.1"
READY = 60.0
"""Seconds that a process has to come up; it takes two or three."""
SHOWN = 20_000
"""Bytes of the end of a log that are looked at."""


def environment(home: Path) -> dict[str, str]:
    """This process's environment with Flower's connections to the outside switched off."""
    return {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


class Daemon:
    """A SuperLink or a SuperNode that runs as long as this process does, in a process group of its own.

    Parameters
    ----------
    kind
        Which.
    arguments
        Of ``flower-superlink`` or ``flower-supernode``, but for the port, which is this object's to choose.
    home
        Flower's own folder and the log; made with mode 0700.
    """

    def __init__(self, kind: Literal["superlink", "supernode"], arguments: Sequence[str], home: Path) -> None:
        self.kind = kind
        self.arguments = list(arguments)
        self.home = home
        self.log = home / f"{kind}.log"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)

    @property
    def address(self) -> str:
        """Where its interfaces on this machine listen."""
        return f"{LOOPBACK}:{self.port}"

    def start(self) -> None:
        """Start it and return when it listens.

        Raises
        ------
        FederationError
            It ended, or did not listen within `READY` seconds; says what its log says.
        """
        for attempt in range(3):
            self.port = free_port()
            self._began = self._logged()
            self._spawn()
            deadline = time.monotonic() + READY
            while self.alive and time.monotonic() < deadline:
                if self._listens():
                    return
                time.sleep(0.05)
            self.stop()
            # Between our asking for a free port and its taking it, another process may have.
            if attempt == 2 or "address already in use" not in self.text().lower():
                raise FederationError(f"Flower's {self.kind} does not start: {self.reason()}; see {self.log}")

    def _spawn(self) -> None:
        command = [sys.executable, "-m", "folklora.federation.flower.daemon", self.kind]
        command += ["--host", LOOPBACK, "--port", str(self.port), *self.arguments]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.home),
                start_new_session=True,  # Ctrl-C in a terminal is for this process, which stops the other in order
            )

    def _listens(self) -> bool:
        try:
            with socket.create_connection((LOOPBACK, self.port), 1):
                return True
        except OSError:
            return False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ends(self, within: float) -> bool:
        """Whether it is gone, or will be by itself within some seconds."""
        try:
            return self._process is None or self._process.wait(within) is not None
        except subprocess.TimeoutExpired:
            return False

    def stop(self) -> None:
        """End it: it says goodbye if it can, and is gone when this returns."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(GRACE + 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _logged(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def text(self) -> str:
        """What it has logged since it was started last, or the end of that."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(self._began, self._logged() - SHOWN))
                data = log.read(SHOWN)
        except OSError:
            return ""
        return re.sub(r"\x1b\[[0-9;]*m", "", data.decode("utf-8", "replace"))

    def reason(self) -> str:
        """The last thing in its log that looks like a reason, in one line."""
        lines = [line.strip() for line in self.text().splitlines()]
        found = [line for line in lines if line and not re.match(r"INFO|For more information", line)]
        telling = [line for line in found if re.match(r"(ERROR|.*Error\b|Failed|\[code)", line)]
        status = self._process.poll() if self._process else None
        if not telling and status is not None and status < 0:
            return f"killed by signal {-status}"
        return re.sub(r"^(ERROR|WARNING)\s*:\s*", "", (telling or found or ["no reason given"])[-1])[:300]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # Ctrl-C too: nobody will call `__exit__`
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()


def superlink(home: Path, secret: Path, certificate: Path, key: Path, ca: Path) -> Daemon:
    """A SuperLink on loopback, which knows nobody yet; its state is in memory: what must last is in the run directory.

    Parameters
    ----------
    secret
        A file that whoever runs its ServerApp has too.
    certificate, key, ca
        The server's certificate, its key, and the authority's certificate.
    """
    arguments = ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    arguments += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certfile", str(ca)]
    arguments += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    return Daemon("superlink", arguments, home)


def supernode(home: Path, secret: Path, server: str, ca: Path, key: Path, *, plain: bool = False) -> Daemon:
    """A SuperNode that connects to ``server`` (host:port).

    Parameters
    ----------
    ca, key
        The authority's certificate and the member's private key.
    plain
        Without TLS; it signs its requests all the same.
    """
    arguments = ["--isolation", "process", "--superexec-auth-secret-file", str(secret), "--superlink", server]
    arguments += ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
    # It gives up after some 30 s without the server; whoever supervises it starts it again.
    arguments += ["--max-retries", "5", *([PLAIN] if plain else [])]
    return Daemon("supernode", arguments, home)


def is_loopback(host: str) -> bool:
    """Whether it is this machine that answers there, and nobody else can dial it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends what is within as Ctrl-C does: everything that was started is stopped."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
