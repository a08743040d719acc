"""Connections that ask for nothing keep nobody out, and end."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from helpers.live import Live, live
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from sdlora.ui.server import connections
from sdlora.ui.server.connections import MOST_OF_AN_ADDRESS


async def patient(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers at once, or reads what is sent first."""
    if scope["type"] != "http":
        return
    while scope["path"] == "/read" and (await receive()).get("more_body"):
        pass
    await PlainTextResponse("x" * 10**7 if scope["path"] == "/large" else "here")(scope, receive, send)


@contextmanager
def half_open(
    server: Live, number: int, start: bytes = b"GET / HTTP/1.1\r\nHost: x\r\n"
) -> Iterator[list[socket.socket]]:
    """Connections whose request never ends."""
    with ExitStack() as opened:
        found = [
            opened.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            for _ in range(number)
        ]
        for one in found:
            one.sendall(start)
        yield found


def num_closed(sockets: list[socket.socket], seconds: float) -> int:
    """How many of them the server has closed, or closes in time."""
    closed, until = 0, time.monotonic() + seconds
    for one in sockets:
        one.settimeout(max(0.001, until - time.monotonic()))
        try:
            closed += one.recv(1) == b""
        except ConnectionError:
            closed += 1
        except TimeoutError:
            pass
    return closed


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nX: "])
def test_half_open_requests_keep_nobody_out(start: bytes) -> None:
    with live(patient) as server, half_open(server, 300, start) as sockets:
        assert server.ask("/").status == 200
        assert num_closed(sockets, 0.5) >= 300 - MOST_OF_AN_ADDRESS


@pytest.mark.parametrize(
    "start", [b"GET / HTTP/1.1\r\n", b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"]
)
def test_unfinished_requests_end(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.1)
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.1)
    with live(patient) as server, half_open(server, 3, start) as sockets:
        assert num_closed(sockets, 5) == 3


def test_connection_is_used_again_for_as_long_as_there_are_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    with live(patient) as server, half_open(server, 1, b"") as (one,):
        for _ in range(4):
            time.sleep(0.2)
            one.sendall(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
            answer = b""
            while b"here" not in answer:
                part = one.recv(4096)
                assert part
                answer += part


def test_response_reaches_a_slow_reader_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.05)
    with live(patient) as server, half_open(server, 1, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n") as (one,):
        time.sleep(0.3)
        seen = 0
        while part := one.recv(2**20):
            seen += len(part)
        assert seen > 10**7
