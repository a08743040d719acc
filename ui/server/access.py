"""Who may ask for what: hosts, passwords, the size of what is sent, and which files are never served.

Plain ASGI around the whole app, so that nothing behind it is reached by another way.
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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdlora.common.text import format_bytes
from sdlora.errors import ConfigError

from ..state.uploads import MOST_BYTES_IN_ALL

MOST_WRONG_LOGINS = 5
LOGIN_WINDOW_SECONDS = 60.0
_ROUNDS = 200_000
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
# All that a page of the studio asks for. Among what is left out are Gradio's ways to its files, its proxy, its
# documentation and its run history.
_OPEN = re.compile(
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
    """Whether only this machine itself reaches a host's address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, auth_file: Path | None) -> None:
    """See whether the studio may listen there.

    Raises:
        ConfigError: Other machines reach it, and there is no password.
    """
    if auth_file is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in, and whoever reaches the studio can start programs on this one. "
            "Give --auth-file FILE, a file with one line, NAME:PASSWORD; or leave --host out."
        )


@dataclass(frozen=True)
class Account:
    """The one who may log in; of the password only a salted hash is kept."""

    name: str
    salt: bytes
    digest: bytes

    @staticmethod
    def read(file: Path) -> Account:
        """From a file with one line, NAME:PASSWORD.

        Raises:
            ConfigError: It cannot be read, others on the machine may read it, or the password is too short.
        """
        try:
            line = file.read_text(encoding="utf-8").strip()
            mode = file.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--auth-file {file} cannot be read: {error}.") from error
        if mode & 0o077:
            raise ConfigError(f"--auth-file {file} can be read by other people. Close it with: chmod 600 {file}")
        name, separator, password = line.partition(":")
        if not separator or not name or len(password) < 8 or "\n" in line:
            raise ConfigError(
                f"--auth-file {file} must hold one line, NAME:PASSWORD, with 8 characters or more after :"
            )
        salt = secrets.token_bytes(16)
        return Account(name, salt, _hash(password, salt))

    def accepts(self, name: str, password: str) -> bool:
        """Whether these are its name and password; takes as long whichever is wrong."""
        same = hmac.compare_digest(_hash(password, self.salt), self.digest)
        return hmac.compare_digest(name.encode(), self.name.encode()) and same


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", password.encode("utf-8"), salt, _ROUNDS)


class Logins:
    """Asks for the password, and no more than five times a minute of an address that gives a wrong one.

    Args:
        app: What is behind it.
        account: Who may pass.
        clock: Seconds that only grow.
    """

    def __init__(self, app: ASGIApp, account: Account, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._account, self._clock = app, account, clock
        self._wrong: dict[str, deque[float]] = {}
        # Hashing a password takes a tenth of a second, and every image of a page brings it along.
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
        if len(wrong) >= MOST_WRONG_LOGINS:
            wait = int(LOGIN_WINDOW_SECONDS - (self._clock() - wrong[0])) + 1
            await _refuse(scope, receive, send, 429, f"Too many wrong passwords. Try again in {wait} s.")
        elif given and self._passes(given):
            await self._app(scope, receive, send)
        else:
            if given:
                wrong.append(self._clock())
            challenge = {"www-authenticate": 'Basic realm="sdlora studio", charset="UTF-8"'}
            await _refuse(scope, receive, send, 401, "The studio needs its name and password.", challenge)

    def _recent(self, address: str) -> deque[float]:
        wrong = self._wrong.setdefault(address, deque(maxlen=MOST_WRONG_LOGINS))
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


class Fence:
    """Refuses what no page of the studio asks for, and adds the headers that keep a page to itself.

    Args:
        app: What is behind it.
    """

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

        await self._app(scope, _counted(receive), guarded)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    headers = Headers(scope=scope)
    raw = scope.get("raw_path", b"").decode("latin-1")
    # Twice, for a path may have been encoded twice.
    path = unquote(unquote(raw or scope["path"]))
    if ".." in path.split("/") or "\\" in path or "\0" in path or "//" in path:
        return 404, "There is no such page."
    if not _OPEN.fullmatch(path) or any(part.startswith(".") for part in path.split("/")):
        return 404, "There is no such page."
    if scope["method"] not in _SAFE_METHODS and not _is_ours(headers):
        return 403, "This was sent by a page that is not the studio's."
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MOST_BYTES_IN_ALL:
        return 413, f"An upload may be up to {format_bytes(MOST_BYTES_IN_ALL)}. Upload fewer images at a time."
    return None


def _is_ours(headers: Headers) -> bool:
    """Whether a request comes from a page of this very host, or from a program, which sends no origin."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    return urlsplit(origin).netloc == headers.get("host")


def _counted(receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The same, ending a request that sends more than it may without saying so beforehand."""
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
