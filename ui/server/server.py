"""The studio's server: pages, routes for files and captions, access control, and the thread that starts queued runs.

`sdlora ui` calls `serve`.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import traceback
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from sdlora.common.text import format_bytes
from sdlora.config.toml import dump_toml
from sdlora.errors import SdloraError

from ..html.render import NAME, ROUTE, make_copy, render
from ..pages.app import HEAD, build, has_news, theme
from ..pages.context import Context
from ..settings.wording import in_words
from ..state.bin import Bin
from ..state.folders import Studio, StudioError
from ..state.queue import Jobs
from ..state.run_view import RunView, read_run
from ..state.try_lora import LoraSampler
from ..state.uploads import MOST_BYTES, MOST_CAPTION_BYTES
from .access import Account, Entrance
from .connections import LimitedConnection
from .guard import GradioGuard, RequestFilter
from .password import PasswordGate

DISPATCH_EVERY_SECONDS = 1.0
MOST_QUEUED = 200
"""Clicks of all tabs that wait for their turn; more are refused."""


def make_app(context: Context, *, host: str, account: Account | None = None, any_name: bool = False) -> ASGIApp:
    """The whole studio as an ASGI app.

    Args:
        context: The studio.
        host: The address it listens on; requests that name another host are refused.
        account: The account that may log in; None needs no login.
        any_name: Whether requests may name any host, since a proxy has names of its own; only with an account.
    """
    uploads = (context.studio.own / "uploads").resolve()
    # Before Gradio reads them: uploads stay in the studio's folder, and no statistics are sent.
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_routes(app, context)
    blocks = build(context)
    # What waits in the queue for its turn cannot be asked for directly.
    blocks.queue(api_open=False, max_size=MOST_QUEUED)
    gr.mount_gradio_app(
        app, blocks, path="/", theme=theme(), head=HEAD, footer_links=[], run_history=False, show_error=False,
        max_file_size=MOST_BYTES * 64, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
    )  # fmt: skip
    # From the outside in: the host, the request, the account, what is sent to Gradio.
    inputs = {number: len(function.inputs) for number, function in blocks.fns.items()}
    guarded: ASGIApp = GradioGuard(app, inputs, uploads)
    guarded = guarded if account is None else PasswordGate(guarded, account)
    hosts = ["localhost", "127.0.0.1", "[::1]"]
    if account is not None:
        # Any name if the studio listens on all addresses.
        hosts = ["*"] if any_name or host in ("0.0.0.0", "::") else [host, *hosts]
    return TrustedHostMiddleware(RequestFilter(guarded), allowed_hosts=hosts, www_redirect=False)


def _add_routes(app: FastAPI, context: Context) -> None:
    studio = context.studio

    @app.exception_handler(SdloraError)
    async def _error(_: Request, error: SdloraError) -> Response:
        # Half of a surrogate pair, which a request may hold, is no text.
        return JSONResponse({"error": in_words(str(error)).encode(errors="replace").decode()}, 400)

    @app.get(ROUTE + "/{name}")
    def _image(name: str) -> Response:
        file = studio.shown / name
        is_there = NAME.fullmatch(name) and not file.is_symlink() and (file.is_file() or make_copy(studio.shown, name))
        if not is_there:
            return PlainTextResponse("Image not found.", 404)
        kind = "image/png" if name.endswith(".png") else "image/jpeg"
        return FileResponse(file, media_type=kind, headers={"cache-control": "private, max-age=31536000, immutable"})

    @app.get("/studio/studio.css")
    @app.get("/studio/studio.js")
    def _asset(request: Request) -> Response:
        file = Path(__file__).parents[1] / "pages" / Path(request.url.path).name
        kind = "text/css" if file.suffix == ".css" else "text/javascript"
        return FileResponse(file, media_type=kind, headers={"cache-control": "no-cache"})

    @app.get("/studio/news/{token}")
    def _news(token: str) -> Response:
        # As few bytes as possible, since every tab asks this all the time.
        try:
            return Response(status_code=200 if has_news(context, token) else 204)
        except Exception:
            return Response(status_code=200)  # asking for the news tells what is wrong

    @app.put("/studio/caption")
    async def _caption(request: Request) -> Response:
        fields = await _json(request, "set", "picture", "caption")
        context.editor(fields["set"]).write_caption(fields["picture"], fields["caption"])
        view = await run_in_threadpool(context.view_set, replace(context.draft(), images=fields["set"]))
        card = next((card for card in view.cards if card.name == fields["picture"]), None)
        return JSONResponse({"doctor": "" if card is None else render("doctor.html", card=card)})

    @app.delete("/studio/picture")
    async def _remove(request: Request) -> Response:
        fields = await _json(request, "set", "picture")
        context.editor(fields["set"]).take_out(fields["picture"])
        return JSONResponse({})

    @app.get("/studio/draft.toml")
    def _draft() -> Response:
        config = context.draft().config(studio)
        return _toml(dump_toml(config), config.name or "lora")

    @app.get("/studio/run/{name}/config.toml")
    def _config(name: str) -> Response:
        view = _view(context, name)
        return _gone() if view is None else _toml((view.folder / "config.toml").read_text(encoding="utf-8"), name)

    @app.get("/studio/run/{name}/epoch/{epoch}")
    def _lora(name: str, epoch: int) -> Response:
        view = _view(context, name)
        if view is None or epoch not in view.loras:
            return _gone()
        kept = view.recommended()
        final = context.jobs.status(name).word == "done" and kept is not None and kept[0] == epoch
        return _attachment(view.loras[epoch], f"{name}.safetensors" if final else f"{name}-epoch-{epoch}.safetensors")

    @app.get("/studio/run/{name}/all.zip")
    def _all(name: str) -> Response:
        view = _view(context, name)
        if view is None or not view.loras:
            return _gone()
        handle, path = tempfile.mkstemp(suffix=".zip", dir=studio.own)
        with os.fdopen(handle, "wb") as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for epoch, file in view.loras.items():
                archive.write(file, f"{name}-epoch-{epoch}.safetensors")
            archive.write(view.folder / "config.toml", f"{name}.toml")
        return _attachment(Path(path), f"{name}.zip", BackgroundTask(Path(path).unlink))


def _view(context: Context, name: str) -> RunView | None:
    try:
        return read_run(context.studio, name)
    except StudioError:
        return None


def _gone() -> Response:
    return PlainTextResponse("File not found.", 404)


def _attachment(file: Path, name: str, then: BackgroundTask | None = None) -> Response:
    return FileResponse(file, media_type="application/octet-stream", filename=name, background=then)


def _toml(text: str, name: str) -> Response:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".toml", delete=False) as handle:
        handle.write(text)
    return _attachment(Path(handle.name), f"{name}.toml", BackgroundTask(Path(handle.name).unlink))


async def _json(request: Request, *names: str) -> dict[str, str]:
    """The text fields of a request in JSON."""
    malformed = StudioError(f"The request needs a JSON object with the texts {', '.join(names)}. Reload the page.")
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise malformed
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > 2 * MOST_CAPTION_BYTES:
            raise StudioError(f"A caption may be up to {format_bytes(MOST_CAPTION_BYTES)} long. Shorten it.")
    try:
        content = json.loads(body)
        found = {name: content[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise malformed from error
    if not all(isinstance(value, str) for value in found.values()):
        raise malformed
    return found


def _dispatch(context: Context, stopping: threading.Event) -> None:
    """Start queued runs when a device is free, once a second."""
    while not stopping.wait(DISPATCH_EVERY_SECONDS):
        try:
            context.jobs.dispatch()
        except Exception:
            # The queue must survive any failure of one job.
            context.log(traceback.format_exc())


class _Server(uvicorn.Server):
    """Reports its port as soon as it can be reached."""

    def __init__(self, config: uvicorn.Config, opened: Callable[[int], None]) -> None:
        super().__init__(config)
        self._opened = opened

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then report the port."""
        await super().startup(sockets)
        if self.started:
            self._opened(self.servers[0].sockets[0].getsockname()[1])


def server_config(app: ASGIApp, *, trusted_proxies: Sequence[str] = ()) -> uvicorn.Config:
    """How the app is served.

    Args:
        app: The studio.
        trusted_proxies: Addresses of proxies whose word on who asks is taken; nobody else's is.
    """
    return uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=2, http=LimitedConnection, ws="none", server_header=False,
        proxy_headers=bool(trusted_proxies), forwarded_allow_ips=list(trusted_proxies),
    )  # fmt: skip


def serve(*, runs: Path, entrance: Entrance, opened: Callable[[int], None] = lambda _: None) -> None:
    """Run the studio until it is interrupted; training continues without it.

    Args:
        runs: The folder of runs and images.
        entrance: Where it listens, and to whom.
        opened: Called with the port once pages are answered.
    """
    with entrance.connections:
        studio = Studio(runs, any_folder=entrance.account is None, stores=entrance.stores)
        studio.create()
        Bin(studio).empty()
        context = Context(studio, Jobs(studio), LoraSampler())
        app = make_app(context, host=entrance.host, account=entrance.account, any_name=bool(entrance.proxies))
        stopping = threading.Event()
        queue = threading.Thread(name="queue", target=_dispatch, args=(context, stopping), daemon=True)
        queue.start()
        try:
            _Server(server_config(app, trusted_proxies=entrance.proxies), opened).run([entrance.connections])
        finally:
            stopping.set()
            queue.join()
