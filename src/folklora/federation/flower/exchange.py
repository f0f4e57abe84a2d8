"""One HTTP connection at the gate: its requests and answers within bounds of size and time, and who may ask what."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import socket
import ssl
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from folklora.errors import FederationError
from folklora.federation.flower import certificates

try:
    import h11
except ImportError:
    raise FederationError("a federation needs Flower: pip install 'folklora[flower]'") from None

ACTIVATE, PUSH_OBJECT = "/v1/fleet/activate-node", "/v1/fleet/push-object"
METHODS = (
    ACTIVATE,
    "/v1/fleet/deactivate-node",
    "/v1/fleet/send-node-heartbeat",
    "/v1/fleet/pull-messages",
    "/v1/fleet/push-messages",
    "/v1/fleet/get-run",
    "/v1/fleet/get-fab",
    "/v1/fleet/pull-object",
    PUSH_OBJECT,
    "/v1/fleet/confirm-message-received",
)
"""What a SuperNode with a registered key calls. Registering is not among them: the server does that itself."""
SMALL = 2**20
"""Bytes of the largest request that carries no message's contents."""

LINGER = 1.0
"""Seconds of silence after which a client that was refused while it was sending is taken to have stopped."""

PUBLIC_KEY, TIMESTAMP, SIGNATURE = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"
"""A SuperNode signs the time of its request, and nothing else of it: the rest is for TLS to protect."""
AHEAD, BEHIND = 5.0, 305.0
"""Seconds by which that time may differ from the server's; the SuperLink's own bounds."""
PASSED_ON = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"content-type",
        b"user-agent",
        PUBLIC_KEY,
        TIMESTAMP,
        SIGNATURE,
        b"flwr-package-name",
        b"flwr-package-version",
        b"flwr-component-name",
    }
)
_OF_THE_CONNECTION = frozenset({b"connection", b"keep-alive", b"trailer", b"transfer-encoding", b"upgrade"})

_ACTIVATION_FAILED = 2004
"""Flower's code: a SuperNode that is told it prints the reason and ends."""


class NotPassed(Exception):
    """A request that the gate answers itself, with an HTTP status; SuperNodes try again after 502, 503 and 504."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def allowed_size(path: str, message: int) -> int:
    """Bytes of a request's body, where one message may have ``message``."""
    return message + SMALL if path == PUSH_OBJECT else SMALL


def admitted(request: h11.Request, members: Mapping[bytes, str]) -> str:
    """The member that signed a request for one of `METHODS`; ``members`` by their keys as SuperNodes send them.

    Raises
    ------
    NotPassed
        404: any other request; 401: no member signed it, or at another time; 412: the same of a request to be let in,
        whose reason the SuperNode prints. Those are the SuperLink's own answers.
    """
    path = request.target
    if request.method != b"POST" or path.decode("ascii") not in METHODS:
        raise NotPassed(404, "not a request of members")
    headers = dict(request.headers)
    if any(sum(name == each for each, _ in request.headers) > 1 for name in (PUBLIC_KEY, TIMESTAMP, SIGNATURE)):
        raise NotPassed(401, "signed twice")  # the SuperLink would go by the first, and we by the last
    try:
        public, signature = (base64.b64decode(headers[name], validate=True) for name in (PUBLIC_KEY, SIGNATURE))
        timestamp = headers[TIMESTAMP]
    except (KeyError, binascii.Error):
        raise NotPassed(401, "not signed") from None
    refused = 412 if path.decode("ascii") == ACTIVATE else 401
    if (member := members.get(public)) is None:
        raise NotPassed(refused, "this key belongs to no member of the federation")
    if not certificates.signed_by(public, timestamp, signature):
        raise NotPassed(401, f"not signed with the key of {member!r}")
    if not -AHEAD < (age := _age(timestamp)) < BEHIND:
        differs = f"{age:.0f} s behind" if age > 0 else f"{-age:.0f} s ahead of"
        allowed = f"{AHEAD:.0f} s ahead to {BEHIND:.0f} s behind"
        raise NotPassed(refused, f"the clock of {member!r} is {differs} the server's; allowed: {allowed}")
    return member


def _age(timestamp: bytes) -> float:
    """Seconds since a time that was signed; raises NotPassed if it is none."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(timestamp.decode("ascii"))).total_seconds()
    except (ValueError, TypeError, OverflowError):  # no time, or none of a known zone
        raise NotPassed(401, "signed, but not at a time") from None


def passed_back(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of an answer without those that concern the connection it came on."""
    return [(name, value) for name, value in headers if name.lower() not in _OF_THE_CONNECTION]


class Wire:
    """A connection that was accepted, as HTTP events."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: int, patience: float) -> None:
        self.reader, self.writer, self.patience = reader, writer, patience
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=head)

    @classmethod
    async def open(cls, accepted: socket.socket, tls: ssl.SSLContext | None, head: int, patience: float) -> Wire:
        """Shake hands.

        Raises
        ------
        OSError
            It speaks no TLS, trusts another authority, hung up, or took longer than ``patience`` seconds.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        timeouts = {"ssl_handshake_timeout": patience, "ssl_shutdown_timeout": 1.0} if tls else {}
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted, ssl=tls, **timeouts)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop), head, patience)

    async def request(self) -> h11.Request | None:
        """The next request; None if the other side hung up, or has not sent one for too long."""
        try:
            async with asyncio.timeout(self.patience):
                event = await self._next()
        except TimeoutError:
            return None
        return event if isinstance(event, h11.Request) else None

    async def _next(self) -> object:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            # A head in small pieces: its bound is looked at between two of them only.
            self.http.receive_data(await self.reader.read(2**12 if self.http.their_state is h11.IDLE else 2**16))
        return event

    def next_cycle(self) -> bool:
        """After an answer: whether the connection can take another request."""
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.http.start_next_cycle()
            return True
        return False

    @property
    def answering(self) -> bool:
        """Whether an answer has begun."""
        return self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE)

    async def body(self, request: h11.Request, allowed: int, slowest: float) -> bytes:
        """The request's body, at ``slowest`` bytes a second or faster.

        Raises
        ------
        NotPassed
            413: it is longer than ``allowed``; said before it is read, if the request tells.
        TimeoutError
            It came too slowly. Not an answer: the SuperNode is to try again.
        """
        # h11 has checked that it is a number, and holds the sender to it.
        announced = int(dict(request.headers).get(b"content-length", b"0"))
        body = bytearray()
        async with asyncio.timeout(self.patience + min(announced or allowed, allowed) / slowest):
            while True:
                if max(announced, len(body)) > allowed:
                    size = f"{announced} bytes" if announced else "chunks"
                    raise NotPassed(413, f"a body of {size}; allowed: {allowed} bytes")
                event = await self._next()
                if not isinstance(event, h11.Data):
                    return bytes(body)
                body += event.data

    async def send(self, event: h11.Event) -> None:
        self.writer.write(self.http.send(event) or b"")
        async with asyncio.timeout(self.patience):
            await self.writer.drain()

    async def refuse(self, refusal: NotPassed, request: h11.Request | None) -> None:
        """Answer with a status and a reason, as the SuperLink does, and end the connection."""
        if self.answering:
            return
        detail: dict[str, object] = {"detail": str(refusal)}
        if refusal.status == 412:
            detail["code"] = _ACTIVATION_FAILED
        text = json.dumps(detail).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(text))), ("Connection", "close")]
        with contextlib.suppress(OSError):
            await self.send(h11.Response(status_code=refusal.status, headers=headers))
            if request is None or request.method != b"HEAD":
                await self.send(h11.Data(data=text))
            await self.send(h11.EndOfMessage())
            if not self._all_here():
                # Whoever is still sending would not see the answer if the connection broke now.
                async with asyncio.timeout(self.patience):
                    while await asyncio.wait_for(self.reader.read(2**16), LINGER):
                        pass

    def _all_here(self) -> bool:
        """Whether the request has come to its end."""
        with contextlib.suppress(h11.RemoteProtocolError):
            while isinstance(self.http.next_event(), h11.Data):
                pass
        return self.http.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)

    async def close(self) -> None:
        """Let what was sent arrive."""
        self.writer.close()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(self.patience):
                await self.writer.wait_closed()

    def abort(self) -> None:
        self.writer.transport.abort()
