"""What may be requested: the routes, where requests come from, their size, and the files that they name.

Everything that no page of the studio asks for is refused before Gradio sees it. Plain ASGI, so that no route can be
reached around it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdlora.common.text import format_bytes

from ..state.uploads import MOST_BYTES_IN_ALL
from .upload_owners import UploadOwners, with_session

MOST_JSON_BYTES = 4 * 2**20
"""Of a request to Gradio; dropping the 2000 files that an upload may have sends about 1 MiB."""
BODY_SECONDS = 30.0

_RUN = ("/gradio_api/run/predict", "/gradio_api/queue/join")
_UPLOAD = "/gradio_api/upload"
_READ = frozenset({"GET", "HEAD"})
# By path, the methods that a page uses and the parameters that it sends. Gradio's other routes, among them those to
# files, its proxy, its documentation, its run history and its code editor, are refused.
_ROUTES: tuple[tuple[re.Pattern[str], frozenset[str], frozenset[str]], ...] = tuple(
    (re.compile(path), frozenset(methods), frozenset(parameters))
    for path, methods, parameters in (
        (r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt", _READ, ()),
        (r"/(assets|static)/[\w./@+-]+", _READ, ()),
        (r"/gradio_api/queue/data", ("GET",), ("session_hash",)),
        (r"/gradio_api/upload_progress", ("GET",), ("upload_id",)),
        (r"/gradio_api/upload", ("POST",), ("upload_id",)),
        ("|".join(_RUN), ("POST",), ()),
        (r"/studio/.*", (*_READ, "POST", "PUT", "DELETE"), ()),
    )
)
_BODY_KEYS = frozenset({"data", "event_data", "fn_index", "trigger_id", "session_hash"})
_MOST_LEVELS = 20
_MOST_NAME_BYTES = 255  # no file system takes more
_WORD = re.compile(r"[\w-]{1,100}")

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
SAFE_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
# Texts; images are compressed already, and a stream of events would be held up.
_COMPRESSED = re.compile(r"/|/config|/theme\.css|/gradio_api/run/predict|.*\.(js|css|svg)")
# The names of Gradio's files contain a hash of their content.
_CACHED = {"cache-control": "private, max-age=31536000, immutable"}
# Gradio would build addresses from these. What a trusted proxy says is in the scope already.
_FORWARDED = re.compile(rb"(x-)?forwarded(-.*)?|x-gradio-.*|x-direct-url|x-original-.*", re.IGNORECASE)


class RequestFilter:
    """Refuses requests that no page of the studio makes to an app, and adds headers that isolate its pages."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._compressed = app, GZipMiddleware(app, minimum_size=500, compresslevel=5)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await (self._app(scope, receive, send) if scope["type"] == "lifespan" else refuse(scope, receive, send))
            return
        refusal = _refusal(scope)
        if refusal is not None:
            await refuse(scope, receive, send, *refusal)
            return
        added = SAFE_HEADERS | (_CACHED if scope["path"].startswith("/assets/") else {})

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = added if message["status"] < 400 else SAFE_HEADERS
                # No content needs no protection, and tabs ask all the time whether there is any.
                own = {} if message["status"] == 204 else own
                kept = [(key, value) for key, value in message["headers"] if not _is_replaced(key, own)]
                message["headers"] = kept + [(key.encode(), value.encode()) for key, value in own.items()]
            await send(message)

        headers = [(key, value) for key, value in scope["headers"] if not _FORWARDED.fullmatch(key)]
        app = self._compressed if _COMPRESSED.fullmatch(scope["path"]) else self._app
        await app({**scope, "headers": headers}, _limited(receive, MOST_BYTES_IN_ALL), guarded)


def _is_replaced(header: bytes, added: Mapping[str, str]) -> bool:
    """Whether a header of a response is left out: Gradio lets pages of any local port read its answers."""
    name = header.decode("latin-1").lower()
    return name in added or name.startswith("access-control-")


def is_allowed(method: str, path: str) -> bool:
    """Whether a page of the studio makes such a request."""
    return any(pattern.fullmatch(path) and method in methods for pattern, methods, _ in _ROUTES)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    headers = Headers(scope=scope)
    path, parts = scope["path"], scope["path"].split("/")
    if any(part.startswith(".") or len(part.encode("utf-8")) > _MOST_NAME_BYTES for part in parts):
        return 404, "Page not found."
    # No page's path has a percent sign once it is decoded, so that one was encoded twice.
    if re.search(r"[%\\\0]|//", path):
        return 404, "Page not found."
    if not is_allowed(scope["method"], path):
        return 404, "Page not found."
    if not _is_same_origin(headers, is_read=scope["method"] in _READ):
        return 403, "The request came from another site."
    length = headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,15}", length) or int(length) > MOST_BYTES_IN_ALL:
        return 413, f"An upload may be up to {format_bytes(MOST_BYTES_IN_ALL)}. Upload fewer images at a time."
    parameters = next(found for pattern, _, found in _ROUTES if pattern.fullmatch(path))
    pairs = [pair.partition("=") for pair in scope.get("query_string", b"").decode("latin-1").split("&")]
    kept = {key: value for key, _, value in pairs if key in parameters}
    if not all(map(_WORD.fullmatch, kept.values())):
        return 404, "Page not found."
    # Gradio reads more parameters than its pages send.
    scope["query_string"] = "&".join(f"{key}={value}" for key, value in kept.items()).encode("latin-1")
    return None


def _is_same_origin(headers: Headers, *, is_read: bool) -> bool:
    """Whether a request comes from a page of this host, from a link, or from a program, which sends no origin."""
    origin = headers.get("origin")
    if origin is not None:
        try:
            return urlsplit(origin).netloc == headers.get("host")
        except ValueError:
            return False
    return is_read or headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


def _limited(receive: Receive, most_bytes: int) -> Receive:
    """Like `receive`, but ends a request whose body is longer than allowed, whatever its header says."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > most_bytes else message

    return limited


class GradioGuard:
    """Checks what pages send to Gradio: its shape, and that every file it names was uploaded by the same browser.

    Gradio itself checks the latter only in apps that it has launched, and not in those that are mounted.

    Args:
        app: The app to protect.
        inputs: The number of inputs of each of Gradio's functions.
        uploads: The folder that Gradio keeps uploads in.
    """

    def __init__(self, app: ASGIApp, inputs: Mapping[int, int], uploads: Path) -> None:
        self._app, self._inputs, self._owners = app, inputs, UploadOwners(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] not in _RUN:
            if scope["type"] == "http" and scope["path"] == _UPLOAD:
                send = self._owners.remembering(scope, send)
            elif scope["type"] == "http" and scope["path"] == "/":
                send = with_session(scope, send)
            await self._app(scope, receive, send)
            return
        if Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            await refuse(scope, receive, send, 415, "The request is not JSON.")
            return
        try:
            body = await asyncio.wait_for(_read(receive), BODY_SECONDS)
        except TimeoutError:
            await refuse(scope, receive, send, 408, "The request did not arrive in time.")
            return
        if body is None:
            limit = format_bytes(MOST_JSON_BYTES)
            await refuse(
                scope, receive, send, 413, f"What the page sends may be up to {limit} long. Shorten the texts."
            )
        elif (reason := self._fault(scope, body)) is not None:
            await refuse(scope, receive, send, 400, f"{reason} Reload the page.")
        else:
            await self._app(scope, _replayed(body, receive), _with_fault_of_input(send))

    def _fault(self, scope: Scope, body: bytes) -> str | None:
        """What is wrong with a request's body, or None."""
        try:
            content = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_once)
            json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a character cannot be stored
        except (ValueError, RecursionError):
            return "The request is not valid JSON."
        if not isinstance(content, dict) or not content.keys() <= _BODY_KEYS:
            return "The request is not one of this page."
        data, function, session = content.get("data"), content.get("fn_index"), content.get("session_hash")
        if not isinstance(function, int) or not isinstance(data, list) or self._inputs.get(function) != len(data):
            return "The request does not fit this version of the page."
        if not isinstance(session, str) or not _WORD.fullmatch(session):
            return "The request has no session."
        if not isinstance(content.get("trigger_id"), (int, type(None))):
            return "The request is not one of this page."
        files = _files(content)
        if files is None:
            return "The request is nested too deeply."
        is_own = all(self._owners.owns(scope, file) for file in files)
        return None if is_own else "A file in the request was not uploaded here."


async def _read(receive: Receive) -> bytes | None:
    """A request's body, or None if it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_JSON_BYTES or message["type"] == "http.disconnect":
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are given once, so that all readers find the same values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _files(value: Any) -> list[Any] | None:
    """Every value that Gradio could read as a file's path, at any depth; None if there are too many levels."""
    found: list[Any] = []
    level = [value]
    for _ in range(_MOST_LEVELS):
        found += [one["path"] for one in level if isinstance(one, dict) and "path" in one]
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [entry for entries in inner for entry in entries]
        if not level:
            return found
    return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Yields a body that has been read already, then whatever comes."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return whole.pop() if whole else await receive()

    return replayed


def _with_fault_of_input(send: Send) -> Send:
    """Turns Gradio's 500 for a value that a control cannot have into a 400; faults of the studio stay as they are."""
    held: list[Message] = []

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 500:
            held.append(message)
            return
        if held:
            start = held.pop()
            # Gradio names the fault if the input has it, and nothing otherwise.
            is_input = message.get("body", b"").startswith(b'{"error":"')
            await send({**start, "status": 400 if is_input else 500})
        await send(message)

    return sent


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    code: int = 403,
    message: str = "",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer a request with an error."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await PlainTextResponse(message, code, {**SAFE_HEADERS, **(headers or {})})(scope, receive, send)
