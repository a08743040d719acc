"""The password: asked for around the whole app, with few guesses.

Plain ASGI; `guard` checks what is asked for.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .access import Account
from .guard import refuse

MAX_WRONG_LOGINS = 5
LOGIN_WINDOW_SECONDS = 60.0
MOST_GUESSERS = 10_000
"""Networks whose wrong passwords are remembered; while so many guess within a minute, all others have to wait."""


class PasswordGate:
    """Asks for the password of an app, and refuses a network for a minute after five wrong ones.

    Args:
        clock: Monotonic time in seconds.
    """

    def __init__(self, app: ASGIApp, account: Account, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._account, self._clock = app, account, clock
        # The times of wrong passwords by network, those of the last minute.
        self._wrong: dict[str, list[float]] = {}
        # One password at a time, or many guesses at once would all count as the first.
        self._checking = asyncio.Lock()
        # Hashing a password takes a tenth of a second, and every request for an image carries it.
        self._accepted = secrets.token_bytes(32)
        self._known: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or ask for the password."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization", "")
        wait_seconds, accepted = await self._check(given, network_of((scope.get("client") or ("", 0))[0]))
        if wait_seconds > 0:
            await refuse(scope, receive, send, 429, f"Too many wrong passwords. Try again in {wait_seconds} s.")
        elif accepted:
            await self._app(scope, receive, send)
        else:
            challenge = {"www-authenticate": 'Basic realm="sdlora studio", charset="UTF-8"'}
            message = "Log in with the name and password of the studio."
            await refuse(scope, receive, send, 401, message, challenge)

    async def _check(self, header: str, network: str) -> tuple[int, bool]:
        """The seconds that a network must wait before its next password, and whether this one is right."""
        token = hmac.digest(self._accepted, header.encode("utf-8"), "sha256")
        if not header or token in self._known:
            return self._wait_seconds(network), bool(header)
        async with self._checking:
            if (wait_seconds := self._wait_seconds(network)) > 0:
                return wait_seconds, False
            accepted = await asyncio.to_thread(self._is_right, header)
            if accepted:
                self._known.add(token)
            else:
                # To the end, so that the networks stay in the order of their last wrong password.
                self._wrong[network] = [*self._wrong.pop(network, []), self._clock()][-MAX_WRONG_LOGINS:]
            return 0, accepted

    def _wait_seconds(self, network: str) -> int:
        """How long a network must wait; 0 if it may try now."""
        oldest = self._clock() - LOGIN_WINDOW_SECONDS
        while self._wrong and next(iter(self._wrong.values()))[-1] < oldest:
            del self._wrong[next(iter(self._wrong))]
        recent = [when for when in self._wrong.get(network, []) if when >= oldest]
        if len(recent) < MAX_WRONG_LOGINS and (recent or len(self._wrong) < MOST_GUESSERS):
            return 0
        first = recent[0] if recent else next(iter(self._wrong.values()))[-1]
        return int(first - oldest) + 1

    def _is_right(self, header: str) -> bool:
        kind, _, encoded = header.partition(" ")
        try:
            name, _, password = base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")
        except ValueError:  # not base64, not UTF-8, or not ASCII
            return False
        return kind.lower() == "basic" and self._account.accepts(name, password)


def network_of(address: str) -> str:
    """What is likely to belong to one person: an IPv4 address, or the network that an IPv6 address names (64 bits)."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or ipaddress.IPv6Address(int(found) >> 64 << 64)
    return str(found)
