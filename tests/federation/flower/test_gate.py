"""The gate over real sockets and real TLS: what passes it, what does not, and what that costs."""

from __future__ import annotations

import http.server
import json
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.proto import control_pb2
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.retry.http_retry import _RETRYABLE_STATUS_CODES
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from folklora.errors import FederationError
from folklora.federation.flower import exchange
from folklora.federation.flower import gate as gate_module
from folklora.federation.flower.credentials import add, init
from folklora.federation.flower.gate import Gate, Limits, Traffic, origin
from folklora.federation.flower.membership import Federation

PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-object"
QUICK = Limits(patience=0.3, slowest=1e12)
"""For tests in which the gate must lose its patience."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return init(tmp_path_factory.mktemp("gate") / "study", ["north", "south"])


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return init(tmp_path_factory.mktemp("gate") / "other", ["north"])


def private_key(federation: Federation, member: str) -> ec.EllipticCurvePrivateKey:
    key = load_ssh_private_key((federation.member_folder(member) / "key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def signed(federation: Federation, member: str = "north", fast: float = 0.0) -> dict[str, str]:
    """The headers of a SuperNode whose clock is ``fast`` seconds fast, made with Flower's own functions."""
    return signed_at(federation, member, (datetime.now(UTC) + timedelta(seconds=fast)).isoformat())


def signed_at(federation: Federation, member: str, timestamp: str) -> dict[str, str]:
    key = private_key(federation, member)
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(sign_message(key, timestamp.encode())).decode(),
        "content-type": "application/protobuf",
    }


Answer = Callable[[str, bytes], tuple[int, bytes]]


class Upstream(http.server.ThreadingHTTPServer):
    """In the SuperLink's place: an HTTPS server on loopback that keeps what reaches it, and answers as told."""

    daemon_threads = True

    def __init__(self, federation: Federation, answer: Answer, port: int = 0) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.answer = answer
        self.connected: list[socket.socket] = []
        super().__init__(("127.0.0.1", port), _Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(federation.server_certificate, federation.server_key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.seen]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connected.append(request)
        super().process_request(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()
        for connected in self.connected:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """The gate may hang up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        status, answer = self.server.answer(self.path, body)
        self.send_response(status)
        self.send_header("content-type", "application/protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def standing(federation: Federation, answer: Answer = lambda *_: (200, b""), **options: Any) -> Iterator[Any]:
    """A gate before a fake SuperLink: ``(gate, upstream)``."""
    upstream = Upstream(federation, answer)
    try:
        with opened(federation, upstream.url, **options) as gate:
            yield gate, upstream
    finally:
        upstream.stop()


def opened(federation: Federation, upstream: str, **options: Any) -> Gate:
    return Gate(
        "127.0.0.1",
        0,
        upstream,
        federation.public_keys(),
        certificate=federation.server_certificate,
        key=federation.server_key,
        ca=federation.ca,
        **options,
    )


def client(federation: Federation, gate: Gate) -> httpx.Client:
    return httpx.Client(
        base_url=f"https://{gate.address}",
        verify=ssl.create_default_context(cafile=federation.ca),
        timeout=60,
        trust_env=False,
    )


def connection(federation: Federation, gate: Gate) -> ssl.SSLSocket:
    """A raw one."""
    context = ssl.create_default_context(cafile=federation.ca)
    return context.wrap_socket(socket.create_connection(("127.0.0.1", gate.port), 60), server_hostname="127.0.0.1")


def head(path: str, headers: dict[str, str], method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: gate", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def everything(raw: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    data = b""
    try:
        while piece := raw.recv(65536):
            data += piece
    except (ConnectionResetError, ssl.SSLEOFError):
        pass
    return data


# -- what passes --


def test_every_call_of_a_stock_supernode_passes_and_registering_does_not(federation: Federation) -> None:
    key = private_key(federation, "south")
    calls = [name for name in vars(FleetHttpClient) if name[0].isupper()]
    with (
        standing(federation) as (gate, upstream),
        FleetHttpClient.from_server_address(
            gate.address,
            False,
            federation.ca.read_bytes(),
            [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())],
        ) as supernode,
    ):
        for name in calls:
            request = getattr(FleetHttpClient, name).__annotations__["request"]()
            if name in ("RegisterNode", "UnregisterNode"):
                with pytest.raises(httpx.HTTPStatusError, match="404"):
                    getattr(supernode, name)(request)
            else:
                getattr(supernode, name)(request)
    assert sorted(upstream.paths) == sorted(exchange.METHODS)
    for _, headers, _ in upstream.seen:
        assert headers["flwr-component-name"] == "SuperNode"
        assert headers["content-type"] == "application/protobuf"
        assert {"flwr-public-key", "flwr-timestamp", "flwr-signature", "flwr-package-version"} <= set(headers)


def test_bodies_and_answers_pass_unchanged_and_are_counted_to_the_byte(federation: Federation) -> None:
    sizes = [0, 1, 65535, 65536, 3_000_001]
    bodies = [os.urandom(size) for size in sizes]
    with (
        standing(federation, lambda _, body: (200, body[::-1] + b"end")) as (gate, upstream),
        client(federation, gate) as http,
    ):
        for body in bodies:
            answer = http.post(PUSH, content=body, headers=signed(federation))
            assert (answer.status_code, answer.content) == (200, body[::-1] + b"end")
        chunks = iter([b"in", b"", b"chunks"])  # httpx sends an iterator as chunks
        assert http.post(PULL, content=chunks, headers=signed(federation)).content == b"sknuhcniend"
        total = sum(sizes)
        assert gate.traffic()[PUSH] == Traffic(len(sizes), total, total + 3 * len(sizes))
        assert gate.traffic()[PULL] == Traffic(1, 8, 11)
        assert sum(traffic.requests for traffic in gate.traffic().values()) == len(sizes) + 1
        assert gate.refused() == {}
    assert [body for _, _, body in upstream.seen] == [*bodies, b"inchunks"]


def test_the_superlinks_own_refusals_pass(federation: Federation) -> None:
    with standing(federation, lambda *_: (418, b'{"code": 7}')) as (gate, _), client(federation, gate) as http:
        answer = http.post(PULL, headers=signed(federation))
        assert (answer.status_code, answer.content) == (418, b'{"code": 7}')
        assert gate.refused() == {}


def test_a_proxy_for_the_world_outside_is_not_used(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with standing(federation) as (gate, _), client(federation, gate) as http:
        assert http.post(PULL, headers=signed(federation)).status_code == 200


def test_one_connection_carries_many_requests_also_sent_at_once(federation: Federation) -> None:
    request = head(PULL, {**signed(federation), "content-length": "3"})
    last = head(PULL, {**signed(federation), "content-length": "3", "connection": "close"})
    with standing(federation, lambda _, body: (200, body)) as (gate, upstream):
        with connection(federation, gate) as raw:
            raw.sendall(request + b"one" + request + b"two" + last + b"end")
            answers = everything(raw)
        assert answers.count(b"HTTP/1.1 200") == 3
        assert [answers.find(word) > 0 for word in (b"\r\n\r\none", b"\r\n\r\ntwo", b"\r\n\r\nend")] == [True] * 3
        assert [body for _, _, body in upstream.seen] == [b"one", b"two", b"end"]


def test_members_are_served_at_once(federation: Federation) -> None:
    together = threading.Barrier(6)

    def answer(_: str, body: bytes) -> tuple[int, bytes]:
        together.wait(60)  # breaks, and the answer with it, unless all six are here
        return 200, body

    def ask(i: int) -> bytes:
        with client(federation, gate) as http:
            member = ("north", "south")[i % 2]
            return http.post(PULL, content=bytes([i]), headers=signed(federation, member)).content

    with standing(federation, answer) as (gate, _), ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == [bytes([i]) for i in range(6)]


# -- what does not pass --


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/register-node"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/pull-messages/../../control/start-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "/v1/fleet//pull-messages"),
        ("POST", "/v1/fleet/pull-messages?next=/v1/control/start-run"),
        ("POST", "https://127.0.0.1/v1/fleet/pull-messages"),
        ("POST", "/V1/FLEET/PULL-MESSAGES"),
        ("GET", "/v1/fleet/pull-messages"),
        ("GET", "/docs"),
        ("GET", "/"),
        ("HEAD", "/v1/fleet/pull-messages"),
        ("OPTIONS", "*"),
        ("CONNECT", "127.0.0.1:22"),
    ],
)
def test_only_members_requests_pass_and_the_others_are_logged(
    federation: Federation, method: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with standing(federation) as (gate, upstream):
        with connection(federation, gate) as raw:
            raw.sendall(head(path, {**signed(federation), "content-length": "0"}, method))
            answer = everything(raw)
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert b"connection: close" in answer.lower()
        assert gate.refused() == {404: 1}
        assert upstream.seen == []
    assert f"127.0.0.1: {method} {path} refused: not a request of members (404)" in caplog.text


def test_what_no_member_signed_does_not_pass(
    federation: Federation, stranger: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    north, south = signed(federation), signed(federation, "south")
    wrong = {
        "unsigned": {},
        "no signature": {name: value for name, value in north.items() if name != "flwr-signature"},
        "another's signature": {**north, "flwr-signature": south["flwr-signature"]},
        "another time": {**north, "flwr-timestamp": datetime(2026, 1, 1, tzinfo=UTC).isoformat()},
        "not base64": {**north, "flwr-public-key": "?"},
        "not a signature": {**north, "flwr-signature": ""},
        "a stranger's": signed(stranger),
    }
    with standing(federation) as (gate, upstream), client(federation, gate) as http:
        for name, headers in wrong.items():
            answer = http.post(PUSH, content=b"x" * 100, headers=headers)
            assert answer.status_code == 401, name
        # Asking to be let in, a stranger is told as the SuperLink would tell it: its SuperNode prints that and ends.
        answer = http.post(exchange.ACTIVATE, headers=signed(stranger))
        assert answer.status_code == 412
        assert answer.json() == {
            "code": int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED),
            "detail": "this key belongs to no member of the federation",
        }
        assert gate.refused() == {401: len(wrong), 412: 1}
        assert upstream.seen == []
    assert "this key belongs to no member of the federation (412)" in caplog.text


def test_a_signature_of_another_time_does_not_pass(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    assert (exchange.AHEAD, exchange.BEHIND) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE)
    with standing(federation) as (gate, upstream), client(federation, gate) as http:
        for fast in (-exchange.BEHIND + 60, 0.0, exchange.AHEAD - 2):
            assert http.post(PULL, headers=signed(federation, fast=fast)).status_code == 200
        for fast, said in ((-exchange.BEHIND - 85, "39. s behind"), (exchange.AHEAD + 90, "[89]. s ahead of")):
            assert http.post(PULL, headers=signed(federation, fast=fast)).status_code == 401
            # Its SuperNode prints this and ends.
            answer = http.post(exchange.ACTIVATE, headers=signed(federation, fast=fast))
            assert answer.status_code == 412
            assert re.match(f"the clock of 'north' is {said} the server's; allowed: ", answer.json()["detail"])
        for timestamp in ("", "yesterday", "2026-11-20T12:00:00", "0001-01-01T00:00:00+23:59", "9" * 5000):
            assert http.post(PULL, headers=signed_at(federation, "north", timestamp)).status_code == 401
        assert len(upstream.seen) == 3
    assert "the clock of 'north'" in caplog.text


def test_what_is_signed_twice_does_not_pass(federation: Federation) -> None:
    # Of two, the gate might go by one and the SuperLink by the other.
    headers, south = signed(federation), signed(federation, "south")
    with standing(federation) as (gate, upstream), client(federation, gate) as http:
        for name in ("flwr-public-key", "flwr-timestamp", "flwr-signature"):
            for pair in (
                [*headers.items(), (name, south[name])],
                [(name.title(), south[name]), *headers.items()],
                [*headers.items(), (name, headers[name])],
            ):
                assert http.post(PULL, headers=pair).status_code == 401
        assert upstream.seen == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_reaches_nobody_and_the_other_members_go_on(
    federation: Federation, chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = 50_000 + exchange.SMALL
    with (
        standing(federation, limits=Limits(body=50_000)) as (gate, upstream),
        client(federation, gate) as http,
    ):
        for path, size in ((PUSH, allowed), (PULL, exchange.SMALL)):
            for more in (0, 1):
                body = b"x" * (size + more)
                content = iter([body[:70_000], body[70_000:]]) if chunked else body
                answer = http.post(path, content=content, headers=signed(federation))
                assert answer.status_code == (413 if more else 200)
                if more:
                    assert answer.json()["detail"].endswith(f"; allowed: {size} bytes")
        assert http.post(PUSH, content=b"x", headers=signed(federation, "south")).status_code == 200
        assert [(path, len(body)) for path, _, body in upstream.seen] == [
            (PUSH, allowed),
            (PULL, exchange.SMALL),
            (PUSH, 1),
        ]
        assert gate.traffic()[PUSH].received == allowed + 1
        assert gate.refused() == {413: 2}
    assert f"member 'north' at 127.0.0.1: POST {PUSH} refused: a body of" in caplog.text


def test_a_gigantic_body_is_refused_before_it_is_sent(federation: Federation) -> None:
    with standing(federation) as (gate, upstream):
        with connection(federation, gate) as raw:
            raw.sendall(head(PUSH, {**signed(federation), "content-length": str(2**60)}))
            answer = raw.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert upstream.seen == []


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x: " + b"y" * 40_000 + b"\r\n\r\n", 431),
        (b"POST " + b"/" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"not HTTP at all\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"\x00" * 100_000, 400),
    ],
)
def test_what_is_no_http_is_refused(federation: Federation, sent: bytes, status: int) -> None:
    with standing(federation) as (gate, upstream):
        with connection(federation, gate) as raw:
            raw.sendall(sent)
            assert everything(raw).startswith(f"HTTP/1.1 {status} ".encode())
        assert gate.refused() == {status: 1}
        assert upstream.seen == []


def test_a_truncated_body_reaches_nobody(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    with standing(federation) as (gate, upstream):
        with connection(federation, gate) as raw:
            raw.sendall(head(PUSH, {**signed(federation), "content-length": "1000"}) + b"x" * 999)
            raw.unwrap()  # says goodbye, as one does who has sent everything
        with client(federation, gate) as http:
            assert http.post(PULL, headers=signed(federation)).status_code == 200
        assert upstream.paths == [PULL]
        assert gate.traffic()[PUSH] == Traffic()
    assert f"member 'north' at 127.0.0.1: POST {PUSH} refused: peer closed connection" in caplog.text


# -- TLS --


def test_a_client_that_trusts_another_authority_sends_nothing(
    federation: Federation, stranger: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    with standing(federation) as (gate, upstream):
        with client(stranger, gate) as http, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            http.post(PULL, headers=signed(federation))
        with client(federation, gate) as http:
            assert http.post(PULL, headers=signed(federation)).status_code == 200
        assert len(upstream.seen) == 1
    assert "127.0.0.1: no TLS connection: [SSL: TLSV1_ALERT_UNKNOWN_CA]" in caplog.text


def test_plain_http_and_old_tls_are_refused(federation: Federation) -> None:
    old = ssl.create_default_context(cafile=federation.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with standing(federation) as (gate, upstream):
        with socket.create_connection(("127.0.0.1", gate.port), 60) as raw:
            raw.sendall(head(PULL, {**signed(federation), "content-length": "0"}))
            assert b"HTTP" not in everything(raw)
        with (
            pytest.raises((ssl.SSLError, ConnectionResetError)),
            socket.create_connection(("127.0.0.1", gate.port), 60) as raw,
        ):
            old.wrap_socket(raw, server_hostname="127.0.0.1")
        assert upstream.seen == []


def test_an_upstream_with_another_certificate_gets_nothing(federation: Federation, stranger: Federation) -> None:
    upstream = Upstream(stranger, lambda *_: (200, b""))
    try:
        with opened(federation, upstream.url) as gate, client(federation, gate) as http:
            assert http.post(PULL, headers=signed(federation)).status_code == 503
    finally:
        upstream.stop()
    assert upstream.seen == []


def test_plain_http_is_for_loopback_alone(federation: Federation) -> None:
    keys = federation.public_keys()
    upstream = Upstream(federation, lambda *_: (200, b"yes"))
    try:
        with Gate("127.0.0.1", 0, upstream.url, keys, ca=federation.ca) as gate:
            assert httpx.post(f"http://{gate.address}{PULL}", headers=signed(federation)).content == b"yes"
    finally:
        upstream.stop()
    for host in ("0.0.0.0", "::"):
        with pytest.raises(FederationError, match="plain HTTP; allowed: on loopback only"), Gate(host, 0, "", keys):
            pass


# -- time, number, failure --


def test_the_patient_gate_gives_up_on_who_sends_too_slowly(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    begun = head(PUSH, {**signed(federation), "content-length": "10"})
    with standing(federation, limits=QUICK) as (gate, upstream):
        with socket.create_connection(("127.0.0.1", gate.port), 60) as raw:
            assert everything(raw) == b""  # no handshake
        for sent in (b"", begun[:50], begun, begun + b"half"):
            with connection(federation, gate) as raw:
                raw.sendall(sent)
                # Not an answer: a SuperNode would give up on 408, and tries again after a broken connection.
                assert everything(raw) == b""
        assert upstream.seen == []
    assert "member 'north' at 127.0.0.1: given up: it sent or took the bytes too slowly" in caplog.text


def test_an_answer_that_nobody_takes_is_given_up(federation: Federation) -> None:
    given_up = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "member 'north' at 127.0.0.1: given up" in record.getMessage():
                given_up.set()

    logger, listener = logging.getLogger("folklora.federation.flower.gate"), Listener()
    logger.addHandler(listener)
    try:
        with (
            standing(federation, lambda *_: (200, b"x" * 50_000_000), limits=QUICK) as (gate, _),
            connection(federation, gate) as raw,
        ):
            raw.sendall(head(PULL, {**signed(federation), "content-length": "0"}))
            assert given_up.wait(60)
    finally:
        logger.removeHandler(listener)


def test_there_are_no_more_connections_than_allowed_and_the_others_wait(federation: Federation) -> None:
    let_in = threading.Event()

    def third() -> None:
        with connection(federation, gate):
            let_in.set()

    with standing(federation, limits=Limits(connections=2)) as (gate, _), ThreadPoolExecutor(1) as pool:
        with connection(federation, gate), connection(federation, gate):
            waiting = pool.submit(third)
            assert not let_in.wait(0.5)
        waiting.result(60)
    assert let_in.is_set()


def test_one_address_does_not_take_all_places(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    with standing(federation, limits=Limits(from_one=2)) as (gate, _):
        with connection(federation, gate), connection(federation, gate):
            with socket.create_connection(("127.0.0.1", gate.port), 60) as third:
                assert everything(third) == b""  # at once: before TLS
            with pytest.raises(OSError):
                connection(federation, gate)
        ends = time.monotonic() + 60
        while True:  # the gate sees in its own time that they left
            try:
                with client(federation, gate) as http:
                    assert http.post(PULL, headers=signed(federation)).status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < ends
    assert "127.0.0.1: turned away: it has 2 connections" in caplog.text


def test_places_are_counted_by_network_where_one_has_many_addresses() -> None:
    assert origin("192.0.2.1") != origin("192.0.2.2")
    assert origin("2001:db8::1") == origin("2001:db8::ffff:1") != origin("2001:db8:0:1::1")
    assert origin("fe80::1%lo") == origin("fe80::2%lo")


def test_a_member_that_asks_too_much_at_once_is_put_off_and_another_is_served(federation: Federation) -> None:
    arrived, release = threading.Semaphore(0), threading.Event()

    def answer(_: str, body: bytes) -> tuple[int, bytes]:
        if body == b"wait":
            arrived.release()
            release.wait(60)
        return 200, b""

    def ask(member: str, body: bytes) -> int:
        with client(federation, gate) as http:
            return http.post(PULL, content=body, headers=signed(federation, member)).status_code

    with standing(federation, answer, limits=Limits(at_once=2)) as (gate, _), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, "north", b"wait") for _ in range(2)]
        assert all(arrived.acquire(timeout=60) for _ in waiting)
        assert ask("north", b"more") == 503
        assert ask("south", b"more") == 200
        release.set()
        assert [future.result(60) for future in waiting] == [200, 200]
        assert ask("north", b"more") == 200
        assert gate.refused() == {503: 1}


def test_a_superlink_that_is_down_is_said_so_that_supernodes_try_again(federation: Federation) -> None:
    upstream = Upstream(federation, lambda *_: (200, b"back"))
    with opened(federation, upstream.url) as gate, client(federation, gate) as http:
        assert http.post(PULL, headers=signed(federation)).content == b"back"
        upstream.stop()
        assert http.post(PULL, headers=signed(federation)).status_code == 503
        again = Upstream(federation, lambda *_: (200, b"again"), upstream.server_port)
        try:
            assert http.post(PULL, headers=signed(federation)).content == b"again"
        finally:
            again.stop()
    assert {503, 504} <= _RETRYABLE_STATUS_CODES
    assert not {401, 404, 412, 413} & _RETRYABLE_STATUS_CODES


def test_a_superlink_that_does_not_answer_in_time(federation: Federation) -> None:
    release = threading.Event()

    def answer(*_: object) -> tuple[int, bytes]:
        release.wait(60)
        return 200, b""

    with standing(federation, answer, limits=QUICK) as (gate, _), client(federation, gate) as http:
        assert http.post(PULL, headers=signed(federation)).status_code == 504
        release.set()


def test_an_answer_that_breaks_off_is_not_passed_as_a_whole_one(federation: Federation) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def half_an_answer() -> None:
        raw, _ = listener.accept()
        with raw:
            raw.recv(65536)
            raw.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")

    thread = threading.Thread(target=half_an_answer)
    thread.start()
    with (
        listener,
        opened(federation, f"http://127.0.0.1:{listener.getsockname()[1]}") as gate,
        client(federation, gate) as http,
        pytest.raises(httpx.TransportError),
    ):
        http.post(PULL, headers=signed(federation))
    thread.join()


def test_an_answer_that_nobody_foresaw_ends_one_connection_and_is_one_line(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(60)
    two_lengths = b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"

    def answers() -> None:
        for answer in (two_lengths, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"):
            raw, _ = listener.accept()
            with raw:
                raw.recv(65536)
                raw.sendall(answer)

    thread = threading.Thread(target=answers, daemon=True)
    thread.start()
    with (
        listener,
        opened(federation, f"http://127.0.0.1:{listener.getsockname()[1]}") as gate,
        client(federation, gate) as http,
    ):
        with pytest.raises(httpx.TransportError):
            http.post(PULL, headers=signed(federation))
        assert http.post(PULL, headers=signed(federation)).status_code == 200
    thread.join()
    assert gate._busy == {"north": 0}  # looked at when all is over: an answer is there before its place is free
    assert "never retrieved" not in caplog.text
    assert caplog.text.count("127.0.0.1: its connection ended by a fault here: ") == 1


# -- opening and closing --


def test_closing_leaves_nothing_also_with_a_request_under_way(federation: Federation) -> None:
    arrived, release = threading.Event(), threading.Event()

    def answer(*_: object) -> tuple[int, bytes]:
        arrived.set()
        release.wait(60)
        return 200, b""

    upstream = Upstream(federation, answer)
    before = threading.active_count()
    with ExitStack() as closing:
        closing.callback(upstream.stop)
        closing.callback(release.set)
        with opened(federation, upstream.url) as gate:
            raw = closing.enter_context(connection(federation, gate))
            raw.sendall(head(PULL, {**signed(federation), "content-length": "0"}))
            assert arrived.wait(60)
        assert everything(raw) == b""
        assert not [thread for thread in threading.enumerate() if thread.name == "gate"]
        assert threading.active_count() <= before + 1  # the fake SuperLink's, which still thinks
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", gate.port), 60)


def test_an_address_in_use_and_files_that_do_not_load_are_one_line(
    federation: Federation, stranger: Federation
) -> None:
    keys = federation.public_keys()
    with (
        opened(federation, "https://127.0.0.1:1") as gate,
        pytest.raises(FederationError, match=f"127.0.0.1, port {gate.port}: cannot be listened on: .*in use"),
    ):
        Gate("127.0.0.1", gate.port, "", keys).__enter__()
    for host, port in (("nowhere.invalid", 0), ("a" * 64, 0), ("127.0.0.1", 65536)):
        with pytest.raises(FederationError, match="cannot be listened on"):
            Gate(host, port, "", keys).__enter__()
    with pytest.raises(FederationError, match=r"server.crt, .*server.key: cannot be loaded: .*MISMATCH"):
        Gate("127.0.0.1", 0, "", keys, certificate=federation.server_certificate, key=stranger.server_key).__enter__()
    with pytest.raises(FederationError, match="none: cannot be loaded"):
        Gate("127.0.0.1", 0, "", keys, ca=federation.folder / "none").__enter__()


def test_a_flood_of_refusals_does_not_fill_the_log(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    with standing(federation) as (gate, _), client(federation, gate) as http:
        for i in range(20):
            assert http.post(f"/v1/control/{i}").status_code == 404
        assert gate.refused() == {404: 20}
    assert caplog.text.count("(404)") == 1


def test_a_flood_from_many_addresses_does_not_fill_the_log_nor_hide_what_members_do(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    gate = opened(federation, "https://127.0.0.1:1")
    for i in range(5000):
        gate._note(f"2001:db8::{i:x}", 0, "no TLS connection")
    assert len(caplog.records) == gate_module.LINES
    gate._note("192.0.2.1", 413, "refused", "north")
    gate._note("192.0.2.1", 413, "refused", "north")
    assert [record.getMessage() for record in caplog.records[gate_module.LINES :]] == [
        "member 'north' at 192.0.2.1: refused (413)"
    ]


# -- Flower's own processes --


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for something that another process does; a minute at most, and not if it ends."""
    ends = time.monotonic() + 60
    while not true():
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_stock_supernode_joins_a_stock_superlink_through_the_gate(tmp_path: Path) -> None:
    federation = init(tmp_path / "study", ["north"])
    add(federation.folder, "south")
    federation = Federation.read(federation.folder)
    secret = tmp_path / "secret"
    secret.write_text("s" * 64)
    secret.chmod(0o600)
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }

    @contextmanager
    def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
        with (tmp_path / f"{program}.log").open("wb") as log:
            process = subprocess.Popen(
                [Path(sys.executable).with_name(program), "--isolation", "process", "--superexec-auth-secret-file"]
                + [str(argument) for argument in (secret, *arguments)],
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()

    def listens(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    port = free_port()
    upstream = f"https://127.0.0.1:{port}"
    trust = ssl.create_default_context(cafile=federation.ca)
    tls = ["--ssl-ca-certfile", federation.ca, "--ssl-certfile", federation.server_certificate]
    tls += ["--ssl-keyfile", federation.server_key]
    address = ["--host", "127.0.0.1", "--port", port]
    with (  # the gate closes before the SuperLink ends, which would wait for the gate's connections
        running("flower-superlink", *address, *tls, "--enable-supernode-auth", "--database", tmp_path / "db") as link,
        httpx.Client(verify=trust, headers={"content-type": "application/protobuf"}, timeout=60) as control,
        opened(federation, upstream) as gate,
    ):
        until(lambda: listens(port), link)

        def call(name: str, request: Any) -> bytes:
            answer = control.post(f"{upstream}/v1/control/{name}", content=request.SerializeToString())
            assert answer.status_code == 200
            return answer.content

        spki = public_key_to_bytes(private_key(federation, "north").public_key())
        call("register-node", control_pb2.RegisterNodeRequest(public_key=spki))
        key = federation.member_folder("north") / "key"
        connect = ["--superlink", gate.address, "--root-certificates", federation.ca]
        connect += ["--auth-supernode-private-key", key, "--port", free_port()]
        with running("flower-supernode", *connect) as node:
            until(lambda: gate.traffic()[PULL].requests > 0, node)  # it asks for work: it is in
            nodes = control_pb2.ListNodesResponse.FromString(call("list-nodes", control_pb2.ListNodesRequest()))
            assert [(node.status, node.public_key) for node in nodes.nodes_info] == [("online", spki)]
        assert gate.traffic()["/v1/fleet/deactivate-node"].requests == 1
        assert gate.refused() == {}
        # A member's key that the server has not registered: the SuperLink itself refuses it, through the gate.
        with client(federation, gate) as http:
            answer = http.post(PULL, headers=signed(federation, "south"))
            assert (answer.status_code, json.loads(answer.content)) == (
                401,
                {"detail": "Invalid SuperNode authentication"},
            )
