"""What the guard lets through: routes that pages use, asked for by these pages alone, with files uploaded here."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi import FastAPI
from helpers.live import Answer, Live, live
from helpers.studios import write_image
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from sdlora.ui.pages.context import Context
from sdlora.ui.server import guard
from sdlora.ui.server import server as server_module
from sdlora.ui.server.guard import MOST_JSON_BYTES, GradioGuard, RequestFilter, is_allowed
from sdlora.ui.server.server import make_app
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Jobs
from sdlora.ui.state.try_lora import LoraSampler

USED = {
    "GET /", "HEAD /", "GET /config", "GET /favicon.ico", "GET /robots.txt", "GET /theme.css",
    "GET /assets/{path:path}", "GET /static/{path:path}", "POST /gradio_api/run/{api_name}",
    "POST /gradio_api/queue/join", "GET /gradio_api/queue/data", "POST /gradio_api/upload",
    "GET /gradio_api/upload_progress",
}  # fmt: skip
REFUSED = {
    "/config/", "/login", "/login/", "/logout", "/manifest.json", "/monitoring", "/monitoring/summary",
    "/monitoring/{key}", "/openapi.json", "/pwa_icon", "/pwa_icon/{size}", "/svelte/{path:path}",
    "/gradio_api/api/{api_name}", "/gradio_api/api/{api_name}/", "/gradio_api/app_id", "/gradio_api/app_id/",
    "/gradio_api/call/v2/{api_name}", "/gradio_api/call/v2/{api_name}/", "/gradio_api/call/v2/{api_name}/{event_id}",
    "/gradio_api/call/{api_name}", "/gradio_api/call/{api_name}/", "/gradio_api/call/{api_name}/{event_id}",
    "/gradio_api/cancel", "/gradio_api/component_server", "/gradio_api/component_server/",
    "/gradio_api/custom_component/{id}/{environment}/{type}/{file_name}", "/gradio_api/deep_link",
    "/gradio_api/dev/reload", "/gradio_api/file/{path:path}", "/gradio_api/file={path_or_url:path}",
    "/gradio_api/heartbeat/{session_hash}", "/gradio_api/info", "/gradio_api/info/", "/gradio_api/login_check",
    "/gradio_api/login_check/", "/gradio_api/openapi.json", "/gradio_api/process_recording",
    "/gradio_api/proxy={url_path:path}", "/gradio_api/queue/status", "/gradio_api/reset", "/gradio_api/reset/",
    "/gradio_api/run-history/buckets", "/gradio_api/run-history/connect", "/gradio_api/run-history/records",
    "/gradio_api/run-history/records/{endpoint}/{record_id}/assets/{asset_id}", "/gradio_api/run/{api_name}/",
    "/gradio_api/runs", "/gradio_api/runs/", "/gradio_api/startup-events", "/gradio_api/stream/{event_id}",
    "/gradio_api/stream/{event_id}/close", "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}", "/gradio_api/theme.css",
    "/gradio_api/token", "/gradio_api/token/", "/gradio_api/undo-vibe-edit", "/gradio_api/undo-vibe-edit/",
    "/gradio_api/user", "/gradio_api/user/", "/gradio_api/vibe-code", "/gradio_api/vibe-code/",
    "/gradio_api/vibe-edit", "/gradio_api/vibe-edit/", "/gradio_api/vibe-starter-queries",
    "/gradio_api/vibe-starter-queries/",
}  # fmt: skip


def routes(router: Any) -> Iterator[tuple[str, str]]:
    """Every method and path of an app, with those of the apps and routers in it."""
    for route in router.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if getattr(inner, "routes", None):
            yield from routes(inner)
        else:
            yield from ((method, route.path) for method in route.methods)


def test_every_route_of_gradio_is_used_or_refused() -> None:
    app = gr.mount_gradio_app(FastAPI(openapi_url=None, docs_url=None, redoc_url=None), gr.Blocks(), path="/")
    found = set(routes(app))
    assert len(found) > 80, "the routes are read from Gradio's app"
    fill = {"{path:path}": "x.js", "{api_name}": "predict"}
    allowed = set()
    for method, path in found:
        example = path
        for name, value in fill.items():
            example = example.replace(name, value)
        if is_allowed(method, example):
            allowed.add(f"{method} {path}")
    assert allowed == USED
    new = {path for method, path in found if f"{method} {path}" not in USED} - REFUSED
    assert not new, "Gradio has new routes: decide whether pages use them, and name them here"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    (folder / "secret.toml").write_text("seed = 5\n[data]\nfolder = 'builtin:zumi'\n")
    write_image(folder / "secret.png")
    return folder


@pytest.fixture(scope="module")
def studio(machine: Path) -> Studio:
    made = Studio(machine / "runs", any_folder=False)
    made.create()
    uploads = made.own / "uploads"
    uploads.mkdir()
    (uploads / "link.toml").symlink_to(machine / "secret.toml")
    return made


@pytest.fixture(scope="module")
def server(studio: Studio) -> Iterator[Live]:
    with live(make_app(Context(studio, Jobs(studio), LoraSampler()), host="127.0.0.1")) as found:
        yield found


@pytest.fixture(scope="module")
def takers(server: Live) -> dict[str, tuple[int, list[str]]]:
    """Functions that take files, each with its kinds of inputs."""
    config = json.loads(server.ask("/config").body)
    kinds = {part["id"]: part["type"] for part in config["components"]}
    found = {f"{one['id']}": (one["id"], [kinds[number] for number in one["inputs"]]) for one in config["dependencies"]}
    return {name: one for name, one in found.items() if {"file", "uploadbutton"} & set(one[1])}


def hand_in(server: Live, taker: tuple[int, list[str]], file: Any, way: str = "queue/join", cookie: str = "") -> Answer:
    """Send a file's path to a function that takes files."""
    number, kinds = taker
    data = [[file] if kind in ("file", "uploadbutton") else None for kind in kinds]
    return server.send(
        "POST", f"/gradio_api/{way}", {"data": data, "fn_index": number, "session_hash": "s"}, cookie=cookie
    )


def file_data(path: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}


def test_only_uploaded_files_are_taken_in(
    server: Live, studio: Studio, machine: Path, takers: dict[str, tuple[int, list[str]]]
) -> None:
    assert len(takers) >= 2
    uploads = studio.own / "uploads"
    paths = [
        machine / "secret.png", machine / "secret.toml", "/etc/passwd", f"{uploads}/../../../secret.toml",
        uploads / "link.toml", uploads, uploads / "nothing", "secret.toml", "http://127.0.0.1/x.png", "", "a\0b",
    ]  # fmt: skip
    hidden = [
        {"value": file_data(str(machine / "secret.png"))},
        {"path": None},
        {"path": [str(machine / "secret.png")]},
    ]
    for taker, way in itertools.product(takers.values(), ("queue/join", "run/predict")):
        for file in [*(file_data(str(path)) for path in paths), *hidden]:
            answer = hand_in(server, taker, file, way)
            assert (answer.status, b"not uploaded here" in answer.body) == (400, True), file
    assert (machine / "secret.toml").is_file() and (machine / "secret.png").is_file()


def upload(server: Live, content: bytes, cookie: str) -> str:
    """Upload an image as a page does; returns its path."""
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="mine.png"\r\n\r\n%s\r\n--x--\r\n' % content
    kind = "multipart/form-data; boundary=x"
    (path,) = server.ask("/gradio_api/upload", "POST", body=form, content_type=kind, cookie=cookie).json()
    return str(path)


def test_uploaded_file_is_taken_in_for_the_session_that_sent_it(
    server: Live, studio: Studio, machine: Path, takers: dict[str, tuple[int, list[str]]]
) -> None:
    own, other = (server.ask("/").headers["set-cookie"] for _ in range(2))
    assert own != other and "HttpOnly" in own and "SameSite=Lax" in own
    own, other = own.partition(";")[0], other.partition(";")[0]
    assert "set-cookie" not in server.ask("/", cookie=own).headers
    path = upload(server, (machine / "secret.png").read_bytes(), own)
    assert Path(path).is_relative_to(studio.own.resolve())
    drop = next(taker for taker in takers.values() if "file" in taker[1])
    for foreign in (other, "", "sdlora-session=x", f"a=b; {other}"):
        for way in ("queue/join", "run/predict"):
            answer = hand_in(server, drop, file_data(path), way, cookie=foreign)
            assert (answer.status, b"not uploaded here" in answer.body) == (400, True), foreign
    assert hand_in(server, drop, file_data(path), cookie=f"a=b; {own}").status == 200
    until = time.monotonic() + 20
    while not list(studio.sets.rglob("mine.png")) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(studio.sets.rglob("mine.png"))
    nobody = upload(server, b"of no session", "")
    assert hand_in(server, drop, file_data(nobody)).status == 400


def test_the_queue_of_clicks_is_bounded(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MOST_QUEUED", 0)
    with live(make_app(Context(studio, Jobs(studio), LoraSampler()), host="127.0.0.1")) as full:
        queued = next(one for one in json.loads(full.ask("/config").body)["dependencies"] if one["queue"])
        content = {"data": [None] * len(queued["inputs"]), "fn_index": queued["id"], "session_hash": "s"}
        assert full.send("POST", "/gradio_api/queue/join", content).status == 503


@pytest.mark.parametrize(
    "path", ["/gradio_api/run/%70redict", "/gradio_api/run/%2570redict", "/gradio_api/run/predict/"]
)
def test_other_spellings_of_a_path_are_not_a_way_around(server: Live, machine: Path, path: str) -> None:
    content = {"data": [file_data(str(machine / "secret.toml"))], "fn_index": 0, "session_hash": "s"}
    assert server.send("POST", path, content).status in (400, 404)


def test_pages_of_other_ports_read_nothing(server: Live) -> None:
    own = f"http://127.0.0.1:{server.port}"
    for origin in ("http://localhost:1", "http://127.0.0.1:1", "null", "http://[", "http://evil.com"):
        for method, path in (("GET", "/config"), ("GET", "/studio/draft.toml"), ("GET", "/"), ("OPTIONS", "/config")):
            answer = server.ask(path, method, origin=origin, access_control_request_method="GET")
            assert answer.status in (403, 404)
            assert not [name for name in answer.headers if name.startswith("access-control-")]
    answer = server.ask("/config", origin=own)
    assert answer.status == 200 and "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_forwarded_headers_and_unknown_parameters_are_dropped(server: Live) -> None:
    forged = server.ask("/config", x_forwarded_host="evil.com", x_forwarded_proto="https", x_gradio_server="//evil.com")
    assert b"evil.com" not in forged.body
    plain = server.ask("/").body
    for query in ("page=x", "deep_link=x", "view=api&page=../x"):
        answer = server.ask(f"/?{query}")
        assert (answer.status, len(answer.body)) == (200, len(plain))
    assert server.ask("/gradio_api/queue/data?session_hash=../x").status == 404


def test_functions_of_the_queue_are_not_run_directly(server: Live) -> None:
    config = json.loads(server.ask("/config").body)
    queued = [one for one in config["dependencies"] if one["queue"]]
    assert len(queued) > 20
    for one in queued:
        content = {"data": [None] * len(one["inputs"]), "fn_index": one["id"], "session_hash": "s"}
        assert server.send("POST", "/gradio_api/run/predict", content).status == 404


def test_requests_to_gradio_are_limited(server: Live) -> None:
    def send(body: bytes, kind: str = "application/json") -> int:
        return server.ask("/gradio_api/queue/join", "POST", body=body, content_type=kind).status

    assert send(b'{"data": ["' + b"x" * MOST_JSON_BYTES + b'"]}') == 413
    assert send(b"{}", "text/plain") == send(b"{}", "multipart/form-data; boundary=x") == 415
    for body in (b"{", b"[]", b"{}", b'{"data": [], "fn_index": 100000, "session_hash": "s"}', b"[" * 10**5):
        assert send(body) == 400


async def never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the request was passed on")


def ask(app: Any, parts: list[Message], path: str = "/gradio_api/queue/join") -> int:
    """Ask an app without a network; where no part of the body is left, the next one never comes."""
    found: list[Message] = []

    async def receive() -> Message:
        if not parts:
            await asyncio.sleep(60)
        return parts.pop(0)

    async def send(message: Message) -> None:
        found.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"x")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return int(found[0]["status"])


def test_body_that_does_not_arrive_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    slow: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
    assert ask(GradioGuard(never, {}, tmp_path), slow) == 408
    assert ask(GradioGuard(never, {}, tmp_path), [{"type": "http.disconnect"}]) == 413


@pytest.mark.parametrize(("error", "code"), [("Value: x is not in the list of choices", 400), (None, 500)])
def test_fault_of_the_input_is_not_one_of_the_studio(tmp_path: Path, error: str | None, code: int) -> None:
    body = json.dumps({"data": ["x"], "fn_index": 3, "session_hash": "s"}).encode()
    app = RequestFilter(GradioGuard(JSONResponse({"error": error}, 500), {3: 1}, tmp_path))
    assert ask(app, [{"type": "http.request", "body": body}]) == code
