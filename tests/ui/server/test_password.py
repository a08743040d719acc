"""Who knows the password comes in, and guesses are few, wherever they seem to come from."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.live import Live, live
from helpers.promises import Figure
from helpers.studios import auth_file
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from sdlora.errors import ConfigError
from sdlora.ui.pages.context import Context
from sdlora.ui.server import access, password
from sdlora.ui.server.access import Account, check_host
from sdlora.ui.server.password import MAX_WRONG_LOGINS, PasswordGate, network_of
from sdlora.ui.server.server import make_app


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def inside(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("inside")(scope, receive, send)


class Door:
    """A gate that is asked without a network."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.gate = PasswordGate(inside, Account.read(auth_file(folder)), self.clock)

    async def knock(self, authorization: str | bytes, address: str = "10.0.0.1") -> int:
        found: list[Message] = []

        async def send(message: Message) -> None:
            found.append(message)

        async def receive() -> Message:
            raise AssertionError("nothing of a body is read before the log-in")

        value = authorization if isinstance(authorization, bytes) else authorization.encode()
        headers = [(b"authorization", value)] if value else []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "client": (address, 1)}
        await self.gate(scope, receive, send)
        return int(found[0]["status"])


def test_guesses_at_the_same_time_count_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_ROUNDS", 10)
    door = Door(tmp_path)

    async def storm() -> list[int]:
        return await asyncio.gather(*(door.knock(basic("me", f"guess {n}")) for n in range(50)))

    codes = asyncio.run(storm())
    assert (codes.count(401), codes.count(429)) == (MAX_WRONG_LOGINS, 50 - MAX_WRONG_LOGINS)


def test_malformed_passwords_are_wrong_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_ROUNDS", 10)
    door = Door(tmp_path)
    odd = ["Basic \u00e9\u00e9".encode("latin-1"), "Basic ???", "Bearer x", "Basic " + "A" * 5000, b"Basic \xff"]
    assert [asyncio.run(door.knock(header)) for header in odd] == [401] * 5
    assert asyncio.run(door.knock(basic("me", "correct horse"))) == 429


def test_waiting_lasts_to_the_end_of_the_window_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_ROUNDS", 10)
    door = Door(tmp_path)
    for _ in range(MAX_WRONG_LOGINS):
        asyncio.run(door.knock(basic("me", "wrong")))
    door.clock.now = password.LOGIN_WINDOW_SECONDS - 0.1
    assert asyncio.run(door.knock(basic("me", "correct horse"))) == 429
    door.clock.now = password.LOGIN_WINDOW_SECONDS + 0.1
    assert asyncio.run(door.knock(basic("me", "correct horse"))) == 200


def test_table_of_wrong_guesses_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_ROUNDS", 10)
    monkeypatch.setattr(password, "MOST_GUESSERS", 20)
    door = Door(tmp_path)

    async def guess(first: int, last: int) -> list[int]:
        return [await door.knock(basic("me", "wrong"), f"10.0.1.{number}") for number in range(first, last)]

    assert asyncio.run(guess(0, 40)) == [401] * 20 + [429] * 20
    assert len(door.gate._wrong) == 20
    door.clock.now = 61.0
    assert asyncio.run(guess(40, 41)) == [401] and len(door.gate._wrong) == 1
    for address in ("", "unix", "nobody"):
        assert asyncio.run(door.knock("", address)) == 401
    assert len(door.gate._wrong) == 1, "who gives no password is not remembered"


def test_ipv6_network_counts_as_one_guesser() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") != network_of("10.0.0.2")


@pytest.fixture
def locked(context: Context, tmp_path: Path) -> Iterator[tuple[Live, Clock]]:
    clock = Clock()
    with live(PasswordGate(make_app(context, host="127.0.0.1"), Account.read(auth_file(tmp_path)), clock)) as found:
        yield found, clock


def test_the_password_is_asked_and_guesses_are_few(locked: tuple[Live, Clock], figure: Figure) -> None:
    server, clock = locked
    with pytest.raises(ConfigError, match="--auth-file"):
        check_host("0.0.0.0", None)
    for path in ("/", "/studio/draft.toml", "/config", "/studio/studio.css"):
        assert server.ask(path).status == 401
    assert server.ask("/", authorization=basic("me", "correct horse")).status == 200
    for header in (basic("you", "correct horse"), "Basic ???", "Bearer x", basic("me", ""), basic("me", "wrong")):
        assert server.ask("/", authorization=header, x_forwarded_for=f"10.0.0.{len(header)}").status == 401
    refused = server.ask("/", authorization=basic("me", "correct horse"), x_forwarded_for="10.0.0.99")
    assert (refused.status, MAX_WRONG_LOGINS) == (429, 5)
    assert b"Try again in" in refused.body
    clock.now = 61.0
    assert server.ask("/", authorization=basic("me", "correct horse")).status == 200
    figure("Exposure", f"refused without a password; after {MAX_WRONG_LOGINS} wrong ones a minute's wait")


def test_trusted_proxy_says_who_guesses(tmp_path: Path) -> None:
    gate = PasswordGate(inside, Account.read(auth_file(tmp_path)))
    wrong, right = basic("me", "wrong"), basic("me", "correct horse")
    with live(gate, trusted_proxies=["127.0.0.1"]) as server:

        def ask(header: str, client: str) -> Any:
            return server.ask("/", authorization=header, x_forwarded_for=client).status

        for forged in range(5):  # the proxy adds the address it sees behind the one that is claimed
            assert ask(wrong, f"10.9.9.{forged}, 10.0.0.1") == 401
        assert ask(right, "10.9.9.9, 10.0.0.1") == 429
        assert ask(right, "10.0.0.2") == 200
