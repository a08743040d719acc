"""A studio's server inside of the test's own process, and requests sent to it byte for byte."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from sdlora.ui.server.access import listen
from sdlora.ui.server.server import _Server, server_config


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Live:
    port: int

    def ask(self, path: str, method: str = "GET", *, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request with its path as it is; `host` and others may be given as headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"host": f"127.0.0.1:{self.port}", **given}.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def send(self, method: str, path: str, content: Any, **headers: str) -> Answer:
        """Send JSON."""
        return self.ask(path, method, body=json.dumps(content).encode(), content_type="application/json", **headers)


@contextmanager
def live(app: ASGIApp, *, trusted_proxies: Sequence[str] = ()) -> Iterator[Live]:
    ports: list[int] = []
    ready = threading.Event()

    def opened(port: int) -> None:
        ports.append(port)
        ready.set()

    server = _Server(server_config(app, trusted_proxies=trusted_proxies), opened)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run, args=([listen("127.0.0.1", 0)],), daemon=True)
    thread.start()
    assert ready.wait(60)
    yield Live(ports[0])
    server.should_exit = True
    thread.join(30)
