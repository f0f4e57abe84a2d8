"""The only door to the server: TLS, members only, and of Flower's interfaces only what their SuperNodes use.

Flower's SuperLink serves three interfaces on one port, and whoever reaches that port may submit code and register
nodes. So it listens on loopback, and a `Gate` stands on the public address. It passes on a request only if it is a POST
of one of `METHODS`, signed by a member's key (`admitted`, before its body is read), and of bounded size, which came
within a bounded time; all else is answered here and logged. The SuperLink still does its own authentication.

What one connection can cost is bounded, how many one address can have, and how many there are; a flood from many
addresses is a firewall's work.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from folklora.errors import FederationError
from folklora.federation.flower import certificates
from folklora.federation.flower.exchange import (
    METHODS,
    PASSED_ON,
    NotPassed,
    Wire,
    admitted,
    allowed_size,
    passed_back,
)

try:
    import h11
    import httpx
except ImportError:
    raise FederationError("a federation needs Flower: pip install 'folklora[flower]'") from None

log = logging.getLogger(__name__)


LINES = 100
"""Lines in the log about strangers in ten seconds, at most."""


@dataclass
class Traffic:
    """What was passed on: requests, and the bytes of their bodies and of the answers' bodies."""

    requests: int = 0
    received: int = 0
    sent: int = 0


@dataclass(frozen=True)
class Limits:
    """What members may ask of the gate."""

    body: int = 64 * 2**20
    """Bytes of one message (``push-object``); any other request is small and has a fixed bound."""
    connections: int = 512
    """At once; more wait."""
    from_one: int = 128
    """Connections of one address at once (of IPv6, of one /64 network); more are broken off."""
    at_once: int = 8
    """Requests of one member at once; more are told to come back (503)."""
    head: int = 16 * 2**10
    """Bytes of a request's line and headers."""
    patience: float = 30.0
    """Seconds: for a TLS handshake, the head of the next request, the SuperLink's answer, a piece sent to be taken."""
    slowest: float = 10_000.0
    """Bytes a second at which a body must come, after ``patience``."""


class Gate:
    """A context in which the door is open; ``port`` and ``address`` tell where, once it is.

    Parameters
    ----------
    host, port
        Where to listen; port 0 means any.
    upstream
        The SuperLink: ``https://127.0.0.1:8000``.
    keys
        Each member's public line (`Federation.public_keys`).
    certificate, key
        The server's, in PEM; without them plain HTTP is spoken, on loopback only.
    ca
        What an ``https`` upstream's certificate is checked with.

    Raises
    ------
    FederationError
        On entry: the address cannot be listened on, a file cannot be loaded, or plain HTTP beyond loopback.
    """

    def __init__(
        self,
        host: str,
        port: int,
        upstream: str,
        keys: Mapping[str, bytes],
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        ca: Path | None = None,
        limits: Limits = Limits(),
    ) -> None:
        self.host, self.port, self.upstream, self.limits = host, port, upstream, limits
        self._members = {certificates.member_spki(line): member for member, line in keys.items()}
        self._files = (certificate, key, ca)
        self._traffic = {path: Traffic() for path in METHODS}
        self._refused: Counter[int] = Counter()
        self._busy: Counter[str] = Counter()
        self._open: Counter[bytes] = Counter()
        self._oversized: dict[str, str] = {}
        self._noted: dict[tuple[str, int], float] = {}

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def traffic(self) -> dict[str, Traffic]:
        """So far, by path: ``/v1/fleet/push-object``."""
        return {path: replace(traffic) for path, traffic in self._traffic.items()}

    def refused(self) -> dict[int, int]:
        """Requests answered here, by HTTP status."""
        return dict(self._refused)

    def oversized(self) -> dict[str, str]:
        """Members that sent a message larger than allowed since this was last asked, and the reason they were told."""
        found, self._oversized = self._oversized, {}
        return found

    def __enter__(self) -> Gate:
        certificate, key, ca = self._files
        self._tls = _server_context(certificate, key) if certificate and key else None
        self._trust = _client_context(ca) if ca else None
        self._listener = self._listen()
        self.port = self._listener.getsockname()[1]
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="gate", daemon=True)
        self._thread.start()
        self._loop, self._leave = started.result()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # it ended by itself, and said why
            self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()

    def _listen(self) -> socket.socket:
        where = f"{self.host}, port {self.port}"
        if not 0 <= self.port <= 65535:  # some systems would take the rest after a division
            raise FederationError(f"{where}: cannot be listened on; allowed: a port from 0 (any) to 65535")
        try:
            flags = socket.AI_PASSIVE
            family, *_, found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=flags)[0]
            if self._tls is None and not ipaddress.ip_address(found[0]).is_loopback:
                raise FederationError(f"{where}: plain HTTP; allowed: on loopback only (127.0.0.1)")
            listener = socket.create_server(found, family=family, backlog=128)
        except (OSError, OverflowError, UnicodeError) as error:
            raise FederationError(f"{where}: cannot be listened on: {error}") from None
        listener.setblocking(False)
        return listener

    def _run(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if started.done():
                log.exception("the gate has closed by itself")
            else:
                started.set_exception(error)

    # -- in the gate's thread ----------------------------------------------------------------------------------------

    async def _serve(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        patience = self.limits.patience
        leave = asyncio.Event()
        connections: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(
            verify=self._trust or True,
            trust_env=False,  # a proxy is for the world outside, and the SuperLink is on loopback
            timeout=patience,
            # The SuperLink hangs up after 5 idle seconds: never use a connection about as old as that.
            limits=httpx.Limits(max_connections=self.limits.connections, keepalive_expiry=2.0),
        ) as self._client:
            door = asyncio.create_task(self._accept(connections))
            started.set_result((asyncio.get_running_loop(), leave))
            leaving = asyncio.create_task(leave.wait())
            try:
                await asyncio.wait([door, leaving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                ending = [door, leaving, *connections]
                for task in ending:
                    task.cancel()
                await asyncio.wait(ending)
                self._listener.close()
        if not leave.is_set():
            door.result()  # raises what ended it

    async def _accept(self, connections: set[asyncio.Task[None]]) -> None:
        loop = asyncio.get_running_loop()
        places = asyncio.Semaphore(self.limits.connections)
        while True:
            await places.acquire()
            try:
                accepted, address = await loop.sock_accept(self._listener)
            except OSError as error:  # it hung up before it was let in, or there are no more file descriptors
                log.warning("a connection could not be accepted: %s", error)
                places.release()
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._connection(accepted, str(address[0])))
            connections.add(task)
            task.add_done_callback(connections.discard)
            task.add_done_callback(lambda _: places.release())

    async def _connection(self, accepted: socket.socket, peer: str) -> None:
        try:
            with self._place(peer):
                await self._talk(accepted, peer)
        except NotPassed as refusal:
            accepted.close()
            self._note(peer, 2, f"turned away: {refusal}")
        except Exception as error:  # whatever no check of ours foresaw: it is the end of this connection alone
            self._note(peer, 3, f"its connection ended by a fault here: {error!r}")
            log.debug("a fault of the gate", exc_info=True)

    @contextlib.contextmanager
    def _place(self, peer: str) -> Iterator[None]:
        place = origin(peer)
        if self._open[place] >= self.limits.from_one:
            raise NotPassed(503, f"it has {self._open[place]} connections")
        self._open[place] += 1
        try:
            yield
        finally:
            self._open[place] -= 1
            if not self._open[place]:
                del self._open[place]

    async def _talk(self, accepted: socket.socket, peer: str) -> None:
        try:
            wire = await Wire.open(accepted, self._tls, self.limits.head, self.limits.patience)
        except OSError as error:
            accepted.close()
            self._note(peer, 0, f"no TLS connection: {error}")
            return
        try:
            while await self._exchange(wire, peer):
                pass
            await wire.close()
        except OSError as error:
            log.debug("%s: connection broken: %s", peer, error)
        finally:
            wire.abort()

    async def _exchange(self, wire: Wire, peer: str) -> bool:
        """One request and its answer; whether another may follow."""
        request, member = None, ""
        try:
            if (request := await wire.request()) is None:
                return False
            member = admitted(request, self._members)
            with self._turn(member):
                await self._pass_on(wire, request)
            return wire.next_cycle()
        except NotPassed as refusal:
            await self._refuse(wire, peer, refusal, request, member)
        except h11.RemoteProtocolError as error:
            await self._refuse(wire, peer, NotPassed(error.error_status_hint, str(error)), request, member)
        except TimeoutError:  # not an answer: a SuperNode tries again after a connection that broke
            self._note(peer, 1, "given up: it sent or took the bytes too slowly", member)
        return False

    @contextlib.contextmanager
    def _turn(self, member: str) -> Iterator[None]:
        if self._busy[member] >= self.limits.at_once:
            raise NotPassed(503, f"{self._busy[member]} requests of this member at once")
        self._busy[member] += 1
        try:
            yield
        finally:
            self._busy[member] -= 1

    async def _pass_on(self, wire: Wire, request: h11.Request) -> None:
        path = request.target.decode("ascii")
        allowed = allowed_size(path, self.limits.body)
        body = await wire.body(request, allowed, self.limits.slowest)
        traffic = self._traffic[path]
        traffic.requests += 1
        traffic.received += len(body)
        headers = [(name, value) for name, value in request.headers if name in PASSED_ON]
        try:
            async with self._client.stream("POST", self.upstream + path, headers=headers, content=body) as answer:
                await wire.send(h11.Response(status_code=answer.status_code, headers=passed_back(answer.headers.raw)))
                async for chunk in answer.aiter_raw():
                    traffic.sent += len(chunk)
                    await wire.send(h11.Data(data=chunk))
                await wire.send(h11.EndOfMessage())
        except httpx.TransportError as error:
            if wire.answering:
                raise ConnectionAbortedError(f"the SuperLink's answer broke off: {error!r}") from None
            # A SuperNode tries again after these two.
            status = 504 if isinstance(error, httpx.TimeoutException) else 503
            raise NotPassed(status, f"the SuperLink cannot be reached: {error!r}") from None

    async def _refuse(
        self, wire: Wire, peer: str, refusal: NotPassed, request: h11.Request | None, member: str
    ) -> None:
        self._refused[refusal.status] += 1
        if member and refusal.status == 413:
            self._oversized[member] = str(refusal)
        what = f"{request.method.decode('ascii')} {request.target[:200].decode('ascii')}" if request else "a request"
        self._note(peer, refusal.status, f"{what} refused: {refusal}", member)
        await wire.refuse(refusal, request)

    def _note(self, peer: str, status: int, text: str, member: str = "") -> None:
        """Log it, but one line in ten seconds for each sender and status, and `LINES` in all for those who are no
        members: nobody outside can fill the disk, or hide what members do."""
        who = f"member {member!r}" if member else peer
        now = time.monotonic()
        if now - self._noted.get((who, status), -10.0) < 10.0:
            return
        self._noted = {key: when for key, when in self._noted.items() if now - when < 10.0}
        if not member and len(self._noted) >= LINES:
            return
        self._noted[who, status] = now
        at = f" at {peer}" if member else ""
        log.warning("%s%s: %s%s", who, at, text, f" ({status})" if status >= 100 else "")


def origin(peer: str) -> bytes:
    """What an address counts as: itself, or with IPv6, where one sender has as many as it likes, its network."""
    packed = ipaddress.ip_address(peer).packed
    return packed if len(packed) == 4 else packed[:8]


def _server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key, password="")  # so that nobody is asked for one
    except (OSError, ValueError) as error:
        raise FederationError(f"{certificate}, {key}: cannot be loaded: {error}") from None
    return context


def _client_context(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise FederationError(f"{ca}: cannot be loaded: {error}") from None
