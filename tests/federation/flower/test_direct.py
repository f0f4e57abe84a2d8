"""Flower's clients go where they are told: no proxy of the environment, no redirect. Real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("flwr")

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest

from folklora.federation.flower import executor


class Listener(ThreadingHTTPServer):
    """Answers everything in one way, and remembers what it was asked."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        self.asked: list[str] = []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                listener.asked.append(self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_CONNECT = do_POST

            def log_message(self, *_: Any) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


@contextmanager
def listening(status: int = 200, **headers: str) -> Iterator[Listener]:
    with Listener(status, headers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(address: str) -> None:
    with executor._task_client(address, b"x" * 32, None) as client:
        client.AcquireTask(AcquireTaskRequest())


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as proxy, listening() as server:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
        ask(server.address)
        assert httpx.post(f"http://{server.address}/").status_code == 200  # anybody else's client does ask it
    assert len(server.asked) == 1
    assert len(proxy.asked) == 1
    assert not server.asked[0].startswith("http://")


def test_a_redirect_is_not_followed() -> None:
    with listening() as elsewhere, listening(307, Location=f"http://{elsewhere.address}/inside") as server:
        with pytest.raises(httpx.HTTPStatusError, match="307"):
            ask(server.address)
        assert server.asked
    assert not elsewhere.asked


def test_a_member_lost_in_words_is_one_line() -> None:
    from flwr.app.error import Error

    said = executor.problem(Error(1, "first\n\x1b[2Jsecond" + "x" * 10_000))
    assert said.isprintable()
    assert said.startswith("first\\n\\x1b[2Jsecond")
    assert len(said) < 400
