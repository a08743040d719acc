"""Access control: hosts, passwords, the size of requests, and the paths that are served.

Plain ASGI around the whole app, so that no route can be reached around it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdlora.common.text import format_bytes
from sdlora.errors import ConfigError

from ..state.uploads import MOST_BYTES_IN_ALL

MAX_WRONG_LOGINS = 5
LOGIN_WINDOW_SECONDS = 60.0
_ROUNDS = 200_000
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
# The paths that a page of the studio requests. Gradio's routes to files, its proxy, its documentation and its run
# history are left out.
_ALLOWED_PATHS = re.compile(
    r"/|/(config|info|theme\.css|manifest\.json|favicon\.ico|robots\.txt)/?|/(assets|static)/[\w./@+-]+"
    r"|/gradio_api/(info|app_id|startup-events|queue/(join|data)|run/\w+|heartbeat/\w+|upload|upload_progress|cancel"
    r"|reset|component_server)/?|/studio/.*"
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, auth_file: Path | None) -> None:
    """Check whether the studio may listen on a host.

    Raises:
        ConfigError: Other machines can reach it, and there is no password.
    """
    if auth_file is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines connect, and anyone who reaches the studio can start programs on this "
            "machine. Add --auth-file FILE, a file with one line NAME:PASSWORD, or leave out --host."
        )


@dataclass(frozen=True)
class Account:
    """The account that may log in; only a salted hash of its password is kept."""

    name: str
    salt: bytes
    digest: bytes

    @staticmethod
    def read(file: Path) -> Account:
        """Read an account from a file with one line, NAME:PASSWORD.

        Raises:
            ConfigError: It cannot be read, other users can read it, or the password is too short.
        """
        try:
            line = file.read_text(encoding="utf-8").strip()
            mode = file.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--auth-file {file} cannot be read: {error}.") from error
        if mode & 0o077:
            raise ConfigError(f"--auth-file {file} can be read by other users. Restrict it with: chmod 600 {file}")
        name, separator, password = line.partition(":")
        if not separator or not name or len(password) < 8 or "\n" in line:
            raise ConfigError(
                f"--auth-file {file} must contain one line, NAME:PASSWORD, with a password of at least 8 characters."
            )
        salt = secrets.token_bytes(16)
        return Account(name, salt, _hash(password, salt))

    def accepts(self, name: str, password: str) -> bool:
        """Whether name and password are right, in constant time."""
        same = hmac.compare_digest(_hash(password, self.salt), self.digest)
        return hmac.compare_digest(name.encode(), self.name.encode()) and same


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", password.encode("utf-8"), salt, _ROUNDS)


class PasswordGate:
    """Asks for the password of an app, and refuses an address for a minute after five wrong ones.

    Args:
        clock: Monotonic time in seconds.
    """

    def __init__(self, app: ASGIApp, account: Account, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._account, self._clock = app, account, clock
        self._wrong: dict[str, deque[float]] = {}
        # Hashing a password takes a tenth of a second, and every request for an image carries it.
        self._accepted = secrets.token_bytes(32)
        self._known: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or ask for the password."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        address = (scope.get("client") or ("", 0))[0]
        given = Headers(scope=scope).get("authorization", "")
        wrong = self._recent(address)
        if len(wrong) >= MAX_WRONG_LOGINS:
            wait = int(LOGIN_WINDOW_SECONDS - (self._clock() - wrong[0])) + 1
            await _refuse(scope, receive, send, 429, f"Too many wrong passwords. Try again in {wait} s.")
        elif given and self._passes(given):
            await self._app(scope, receive, send)
        else:
            if given:
                wrong.append(self._clock())
            challenge = {"www-authenticate": 'Basic realm="sdlora studio", charset="UTF-8"'}
            await _refuse(scope, receive, send, 401, "Log in with the name and password of the studio.", challenge)

    def _recent(self, address: str) -> deque[float]:
        wrong = self._wrong.setdefault(address, deque(maxlen=MAX_WRONG_LOGINS))
        while wrong and self._clock() - wrong[0] > LOGIN_WINDOW_SECONDS:
            wrong.popleft()
        return wrong

    def _passes(self, header: str) -> bool:
        token = hmac.digest(self._accepted, header.encode("utf-8"), "sha256")
        if token in self._known:
            return True
        kind, _, encoded = header.partition(" ")
        try:
            name, _, password = base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        if kind.lower() != "basic" or not self._account.accepts(name, password):
            return False
        self._known.add(token)
        return True


class RequestFilter:
    """Refuses requests that no page of the studio makes to an app, and adds headers that isolate its pages."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = _refusal(scope)
        if refusal is not None:
            await _refuse(scope, receive, send, *refusal)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(k, v) for k, v in message["headers"] if k.decode("latin-1").lower() not in _HEADERS]
                message["headers"] = kept + [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
            await send(message)

        await self._app(scope, _limited(receive), guarded)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    headers = Headers(scope=scope)
    raw = scope.get("raw_path", b"").decode("latin-1")
    # Twice, for a path may have been encoded twice.
    path = unquote(unquote(raw or scope["path"]))
    if ".." in path.split("/") or "\\" in path or "\0" in path or "//" in path:
        return 404, "Page not found."
    if not _ALLOWED_PATHS.fullmatch(path) or any(part.startswith(".") for part in path.split("/")):
        return 404, "Page not found."
    if scope["method"] not in _SAFE_METHODS and not _is_same_origin(headers):
        return 403, "The request came from another site."
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MOST_BYTES_IN_ALL:
        return 413, f"An upload may be up to {format_bytes(MOST_BYTES_IN_ALL)}. Upload fewer images at a time."
    return None


def _is_same_origin(headers: Headers) -> bool:
    """Whether a request comes from a page of this host, or from a program, which sends no origin."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    return urlsplit(origin).netloc == headers.get("host")


def _limited(receive: Receive) -> Receive:
    """Like `receive`, but ends a request whose body is longer than allowed, whatever its header says."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > MOST_BYTES_IN_ALL else message

    return limited


async def _refuse(
    scope: Scope, receive: Receive, send: Send, code: int, message: str, headers: dict[str, str] | None = None
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await PlainTextResponse(message, code, {**_HEADERS, **(headers or {})})(scope, receive, send)
