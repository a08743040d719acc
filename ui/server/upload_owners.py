"""Whose an uploaded file is: every browser has a session of its own, in a cookie, and only its own uploads.

`GradioGuard` asks here before Gradio sees a file's path.
"""

from __future__ import annotations

import json
import re
import secrets
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Scope, Send

_COOKIE = "sdlora-session"
_SESSION = re.compile(r"[0-9a-f]{32}")
_MOST_ANSWER_BYTES = 2 * 2**20  # the paths of as many files as an upload may have


class UploadOwners:
    """The sessions that have uploaded each file.

    Args:
        folder: The folder that Gradio keeps uploads in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owners: dict[Path, set[str]] = {}

    def owns(self, scope: Scope, file: Any) -> bool:
        """Whether the session of a request has uploaded a file, given as a path."""
        if not isinstance(file, str):
            return False
        try:
            path = Path(file).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return False
        is_upload = path.is_file() and path.is_relative_to(self._folder)
        return is_upload and _session(scope) in self._owners.get(path, ())

    def remembering(self, scope: Scope, send: Send) -> Send:
        """Like `send`, but takes note of the files that the answer to an upload names."""
        session, answer = _session(scope), bytearray()

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.body" and len(answer) <= _MOST_ANSWER_BYTES:
                answer.extend(message.get("body", b""))
                if session is not None and not message.get("more_body", False):
                    self._remember(session, bytes(answer))
            await send(message)

        return sent

    def _remember(self, session: str, answer: bytes) -> None:
        try:
            files = json.loads(answer)
        except ValueError:
            return  # an error in words
        self._owners = {path: owners for path, owners in self._owners.items() if path.exists()}
        for file in files if isinstance(files, list) else ():
            self._owners.setdefault(Path(file).resolve(), set()).add(session)


def with_session(scope: Scope, send: Send) -> Send:
    """Like `send`, but gives a browser that has no session a new one."""
    if _session(scope) is not None:
        return send

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            cookie = f"{_COOKIE}={secrets.token_hex(16)}; Path=/; HttpOnly; SameSite=Lax"
            message["headers"] = [*message["headers"], (b"set-cookie", cookie.encode())]
        await send(message)

    return sent


def _session(scope: Scope) -> str | None:
    try:
        found = SimpleCookie(Headers(scope=scope).get("cookie", "")).get(_COOKIE)
    except CookieError:
        return None
    return found.value if found is not None and _SESSION.fullmatch(found.value) else None
