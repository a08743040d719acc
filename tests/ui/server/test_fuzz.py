"""Hundreds of hostile requests: nothing is read, written or fetched outside, and none is an error of the studio."""

from __future__ import annotations

import itertools
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile import ADDRESSES, CAPTIONS, NAMES
from helpers.live import Answer, Live, live
from helpers.promises import Figure
from helpers.studios import write_image

from sdlora.ui.pages.context import Context
from sdlora.ui.server.server import make_app
from sdlora.ui.settings.draft import read_draft
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Jobs
from sdlora.ui.state.try_lora import LoraSampler

SECRET = "the-secret-of-this-machine"
BOUNDARY = "edge"

pytestmark = pytest.mark.slow


class Fuzz:
    """A studio that others can reach, with secrets beside it, a port that listens for fetches, and what was asked."""

    def __init__(self, folder: Path, server: Live, trap: socket.socket, seed: int = 0) -> None:
        self.folder, self.server, self.trap = folder, server, trap
        self.random, self.asked = random.Random(seed), 0
        config = json.loads(server.ask("/config").body)
        self.functions: dict[int, int] = {one["id"]: len(one["inputs"]) for one in config["dependencies"]}
        self.kinds = {part["id"]: part["type"] for part in config["components"]}
        self.inputs = {one["id"]: [self.kinds[number] for number in one["inputs"]] for one in config["dependencies"]}
        self.direct = [one["id"] for one in config["dependencies"] if not one["queue"]]

    @property
    def fetch(self) -> str:
        """An address whose request would be noticed."""
        return f"127.0.0.1:{self.trap.getsockname()[1]}"

    def texts(self) -> list[str]:
        """Texts that mean harm, wherever they are put."""
        own = [
            f"{self.folder}/secret.txt", f"{self.folder}/secret.toml", f"../{self.folder.name}/secret.txt",
            "/etc/passwd", f"file://{self.folder}/secret.txt", f"http://{self.fetch}/x", f"webhdfs://{self.fetch}/x",
            f"ftp://{self.fetch}/x", f"s3://{self.fetch}/x", f"zip://*::http://{self.fetch}/x.zip", "~", "~nobody/x",
            f"{self.folder}/outside", "\ud800", "x" * 70_000, "", "null", "[]", "0", "9" * 400, "-1e999",
            "\x00", "\u2028",
        ]  # fmt: skip
        return [*own, *NAMES, *CAPTIONS]

    def check(self, answer: Answer, what: object) -> None:
        self.asked += 1
        assert answer.status < 500, ascii(what)
        assert SECRET.encode() not in answer.body, what


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    folder = tmp_path_factory.mktemp("machine")
    for suffix in (".txt", ".toml", ".jsonl", ".json"):
        (folder / f"secret{suffix}").write_text(f"seed = '{SECRET}'\n")
    write_image(folder / "outside" / "secret.png")
    (folder / "outside" / "secret.txt").write_text(SECRET)
    studio = Studio(folder / "runs", any_folder=False)
    studio.create()
    write_image(studio.image_set("set") / "a.png")
    (studio.image_set("set") / "a.txt").write_text("a red thing")
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.01)
        with live(make_app(Context(studio, Jobs(studio), LoraSampler()), host="127.0.0.1")) as server:
            yield Fuzz(folder, server, trap)


def outside(folder: Path) -> dict[str, bytes]:
    """Everything on the machine that is not the studio's."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_relative_to(folder / "runs")]
    return {str(file): file.read_bytes() for file in files}


def values(fuzz: Fuzz, function: int) -> list[Any]:
    """Inputs of a function, some of them hostile."""
    texts = fuzz.texts()

    def one(kind: str) -> Any:
        text = fuzz.random.choice(texts)
        path = {"path": text, "meta": {"_type": "gradio.FileData"}, "url": f"http://{fuzz.fetch}/x", "orig_name": text}
        odd = [None, True, -1, 10**30, 1e300, text, [text], {"value": text}, [[[]]], path, [path], {"a": {"b": path}}]
        return path if kind in ("file", "uploadbutton") else fuzz.random.choice(odd)

    return [one(kind) for kind in fuzz.inputs[function]]


def bodies(fuzz: Fuzz) -> Iterator[tuple[str, bytes]]:
    """Requests to Gradio's functions: each with hostile values, and then malformed ones."""
    for function, _ in itertools.product(fuzz.functions, range(5)):
        body = {"data": values(fuzz, function), "fn_index": function, "session_hash": "fuzz"}
        way = "run/predict" if function in fuzz.direct else "queue/join"
        yield way, json.dumps(body).encode()
    direct = fuzz.direct[-1]
    good: dict[str, Any] = {"data": [None] * fuzz.functions[direct], "fn_index": direct, "session_hash": "fuzz"}
    changes: list[dict[str, Any]] = [{"fn_index": value} for value in (None, -1, 10**9, "0", [], True, 1.5)] + [
        {"data": value} for value in (None, {}, [], "x", [None] * 1000, [[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]])
    ]
    changes += [{"session_hash": value} for value in (None, 3, "../x", "x" * 10_000, "a b", {"path": "/etc/passwd"})]
    changes += [
        {"event_data": {"path": "/etc/passwd"}},
        {"trigger_id": "x"},
        {"batched": True},
        {"simple_format": True},
    ]
    for change, way in itertools.product(changes, ("run/predict", "queue/join")):
        yield way, json.dumps(good | change).encode()
    raw = json.dumps(good)
    broken = ["", "{", "null", "[]", raw + "x", raw.replace("null", "NaN", 1), raw.replace("null", "9" * 5000, 1),
              raw[:-1] + ', "fn_index": 0}', "[" * 100_000, '{"a":' * 100_000, "\ufeff" + raw]  # fmt: skip
    for text, way in itertools.product(broken, ("run/predict", "queue/join")):
        yield way, text.encode()
        yield way, text.encode("utf-16")
    yield "run/predict", b"\xff\xfe" + raw.encode()


def test_hostile_requests_to_gradio_reach_nothing(fuzz: Fuzz) -> None:
    before = outside(fuzz.folder)
    for way, body in bodies(fuzz):
        answer = fuzz.server.ask(f"/gradio_api/{way}", "POST", body=body, content_type="application/json")
        fuzz.check(answer, body[:2000])
    assert outside(fuzz.folder) == before


def test_hostile_requests_to_other_routes_reach_nothing(fuzz: Fuzz) -> None:
    before = outside(fuzz.folder)
    ask = fuzz.server.ask
    for text in fuzz.random.sample(fuzz.texts(), 40):
        for fields in (
            {"set": text, "picture": "a.png", "caption": "x"}, {"set": "set", "picture": text, "caption": "x"},
            {"set": "set", "picture": "a.png", "caption": text},
        ):  # fmt: skip
            fuzz.check(fuzz.server.send("PUT", "/studio/caption", fields), fields)
        fuzz.check(fuzz.server.send("DELETE", "/studio/picture", {"set": "set", "picture": text + "/"}), text)
        quoted = "".join(f"%{byte:02x}" for byte in text.encode("utf-8", errors="replace"))[:6000]
        for path in ("/studio/run/{}/epoch/1", "/studio/run/{}/all.zip", "/assets/{}", "/static/{}", "/{}"):
            fuzz.check(ask(path.format(quoted)), (path, text[:100]))
        for path in ("/?deep_link={}", "/?page={}", "/config?deep_link={}", "/gradio_api/queue/data?session_hash={}"):
            fuzz.check(ask(path.format(quoted)), (path, text[:100]))
        safe = text.encode("utf-8", errors="replace").replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")
        part = b'--%s\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\nx\r\n--%s--\r\n'
        form = part % (BOUNDARY.encode(), safe, BOUNDARY.encode())
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        fuzz.check(ask("/gradio_api/upload", "POST", body=form, content_type=kind), text[:100])
    for path, method in itertools.product(ADDRESSES, ("GET", "POST", "PUT", "OPTIONS", "HEAD", "TRACE")):
        fuzz.check(ask(path, method), (method, path))
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "text/plain",
        "x",
        "",
        "multipart/form-data; boundary=\xff",
    ):
        fuzz.check(ask("/gradio_api/upload", "POST", body=b"--x", content_type=kind), kind)
    assert outside(fuzz.folder) == before


def test_nothing_was_fetched_and_enough_was_asked(fuzz: Fuzz, figure: Figure) -> None:
    with pytest.raises(TimeoutError):
        fuzz.trap.accept()
    assert fuzz.asked >= 500
    studio = Studio(fuzz.folder / "runs", any_folder=False)
    assert SECRET not in json.dumps(read_draft(studio).values)
    for file in studio.runs.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    figure("Hostile requests", f"{fuzz.asked}: nothing read, written or fetched outside, no internal error")
