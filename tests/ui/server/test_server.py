"""What the studio's server gives out, to whom, and what it never does."""

from __future__ import annotations

import gzip
import io
import json
import re
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hostile import ADDRESSES, CAPTIONS
from helpers.live import Live, live
from helpers.promises import Figure
from helpers.studios import write_image, write_state
from PIL import Image

from sdlora.config.toml import dump_toml, load_config, parse_config
from sdlora.ui.html.render import file_url
from sdlora.ui.pages.context import Context
from sdlora.ui.server.server import make_app
from sdlora.ui.settings.draft import Draft, write_draft
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Jobs
from sdlora.ui.state.try_lora import LoraSampler


@pytest.fixture(scope="module")
def open_(tmp_path_factory: pytest.TempPathFactory) -> Context:
    studio = Studio(tmp_path_factory.mktemp("studio") / "runs")
    studio.create()
    folder = studio.image_set("set")
    write_image(folder / "a.png")
    (folder / "a.txt").write_text("a red thing", encoding="utf-8")
    # Things that must stay where they are, beside those that are given out.
    for name in (".hidden.png", "0" * 40 + ".html", "0" * 40 + ".svg", "secret.png"):
        (studio.shown / name).write_text("<script>secret</script>")
    (studio.shown / "link.png").symlink_to("/etc/passwd")
    (studio.shown / ("a" * 40 + ".png")).symlink_to("/etc/passwd")
    unchecked = {"enabled": False}  # there are no previews that an epoch could be recommended by
    config = parse_config({"data": {"folder": str(folder)}, "copycheck": unchecked}, name="a")
    run = write_state(studio, config, status="done")
    (run / "report.html").write_text("secret")
    (run / "log.txt").write_text("secret")
    for epoch in (1, 2):
        (run / "epochs" / str(epoch)).mkdir(parents=True)
        (run / "epochs" / str(epoch) / "adapter.safetensors").write_bytes(b"lora %d" % epoch)
        (run / "epochs" / str(epoch) / "proof.json").write_text("{}")
    return Context(studio, Jobs(studio), LoraSampler())


@pytest.fixture(scope="module")
def server(open_: Context) -> Iterator[Live]:
    with live(make_app(open_, host="127.0.0.1")) as found:
        yield found


def test_hostile_addresses_give_nothing(server: Live, figure: Figure) -> None:
    assert len(ADDRESSES) >= 25
    for path in ADDRESSES:
        answer = server.ask(path)
        assert answer.status in (400, 403, 404, 422), path
        assert b"secret" not in answer.body and b"root:" not in answer.body, path
    figure("Files over HTTP", f"{len(ADDRESSES)} of {len(ADDRESSES)} hostile addresses refused")


def test_served_images_are_reencoded_copies(server: Live, open_: Context, tmp_path: Path) -> None:
    source = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    Image.new("RGB", (400, 300), "red").save(source, exif=exif)
    answer = server.ask(file_url(open_.studio.shown, source))
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
    assert answer.headers["x-content-type-options"] == "nosniff"
    with Image.open(io.BytesIO(answer.body)) as image:
        assert image.size == (320, 240) and not image.getexif()


def test_page_requests_nothing_from_other_hosts(server: Live) -> None:
    answer = server.ask("/")
    assert answer.status == 200 and "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert b"fonts.googleapis" not in answer.body and b"fonts.gstatic" not in answer.body
    config = json.loads(server.ask("/config").body)
    assert (config["analytics_enabled"], config["run_history"], config["footer_links"]) == (False, False, [])
    assert config["connect_heartbeat"] is False, "ten tabs would need ten of a browser's six connections"


@pytest.mark.parametrize("host", ["evil.com", "127.0.0.1.evil.com", "192.168.0.9:7860", ""])
def test_other_hosts_are_refused(server: Live, host: str) -> None:
    assert server.ask("/", host=host).status == 400


@pytest.mark.parametrize(
    "headers", [{"origin": "http://evil.com"}, {"origin": "null"}, {"sec_fetch_site": "cross-site"}]
)
def test_requests_from_other_sites_are_refused(server: Live, open_: Context, headers: dict[str, str]) -> None:
    fields = {"set": "set", "picture": "a.png", "caption": "changed"}
    assert server.send("PUT", "/studio/caption", fields, **headers).status == 403
    assert server.send("POST", "/gradio_api/queue/join", {}, **headers).status == 403
    assert (open_.studio.image_set("set") / "a.txt").read_text(encoding="utf-8") != "changed"


@pytest.mark.parametrize("caption", CAPTIONS)
def test_hostile_captions_are_stored_as_text(server: Live, open_: Context, caption: str) -> None:
    write_draft(open_.studio, Draft(images="set"))
    before = {path for path in open_.studio.runs.rglob("*") if "pycache" not in str(path)}
    answer = server.send("PUT", "/studio/caption", {"set": "set", "picture": "a.png", "caption": caption})
    assert answer.status == 200 and "<script" not in answer.json()["doctor"]
    assert {path for path in open_.studio.runs.rglob("*") if "pycache" not in str(path)} == before
    written = (open_.studio.image_set("set") / "a.txt").read_text(encoding="utf-8")
    assert written == " ".join(caption.replace("\0", " ").split())


@pytest.mark.parametrize(
    "fields",
    [
        {"set": "../runs", "picture": "a.png", "caption": "x"}, {"set": "set", "picture": "../a.png", "caption": "x"},
        {"set": "builtin:zumi", "picture": "zumi_00.png", "caption": "x"}, {"set": "", "picture": "a", "caption": "x"},
        {"set": "set", "picture": 3, "caption": "x"}, {"set": "set"}, [], {"set": "no", "picture": "a", "caption": ""},
        {"set": "set", "picture": "a.png", "caption": "x" * 70_000},
    ],
)  # fmt: skip
def test_malformed_requests_get_a_reason(server: Live, fields: object) -> None:
    answer = server.send("PUT", "/studio/caption", fields)
    assert answer.status == 400 and len(answer.json()["error"]) > 20
    form = server.ask("/studio/caption", "PUT", body=b"set=set", content_type="application/x-www-form-urlencoded")
    assert form.status == 400


def test_files_are_served_as_downloads(server: Live, open_: Context, tmp_path: Path) -> None:
    kept = server.ask("/studio/run/a/epoch/2")
    assert (kept.status, kept.body) == (200, b"lora 2")
    assert kept.headers["content-disposition"] == 'attachment; filename="a.safetensors"'
    assert 'filename="a-epoch-1.safetensors"' in server.ask("/studio/run/a/epoch/1").headers["content-disposition"]
    for path in ("/studio/run/a/epoch/3", "/studio/run/b/epoch/1", "/studio/run/b/all.zip"):
        assert server.ask(path).status == 404
    with zipfile.ZipFile(io.BytesIO(server.ask("/studio/run/a/all.zip").body)) as archive:
        assert archive.namelist() == ["a-epoch-1.safetensors", "a-epoch-2.safetensors", "a.toml"]
    file = tmp_path / "a.toml"
    file.write_bytes(server.ask("/studio/run/a/config.toml").body)
    assert dump_toml(load_config(str(file))) == (open_.studio.run("a") / "config.toml").read_text(encoding="utf-8")


def test_draft_is_a_config_file_of_the_command_line(server: Live, open_: Context) -> None:
    write_draft(open_.studio, Draft(images="set", name="mine").with_values({"data.trigger": "zumi", "seed": 3}))
    found = tomllib.loads(server.ask("/studio/draft.toml").body.decode())
    assert (found["name"], found["seed"], found["data"]["trigger"]) == ("mine", 3, "zumi")
    assert parse_config(found, name="x") == open_.draft().config(open_.studio)


def test_too_large_request_is_refused(server: Live) -> None:
    assert server.ask("/gradio_api/upload", "POST", content_length=str(10**13)).status == 413


def test_pages_are_compressed_and_assets_are_kept(server: Live) -> None:
    page = server.ask("/", accept_encoding="gzip")
    assert page.headers["content-encoding"] == "gzip" and len(page.body) < 100_000
    asset = re.findall(r"/assets/[\w./-]+\.js", gzip.decompress(page.body).decode())[0]
    found = server.ask(asset, accept_encoding="gzip")
    assert found.headers["content-encoding"] == "gzip" and "immutable" in found.headers["cache-control"]
    assert "immutable" not in server.ask("/assets/nothing.js").headers.get("cache-control", "")
    assert "content-encoding" not in server.ask("/studio/run/a/epoch/2", accept_encoding="gzip").headers


def test_tab_at_rest_asks_for_little(server: Live, open_: Context) -> None:
    config = json.loads(server.ask("/config").body)
    number = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "news")
    asked = next(one for one in config["dependencies"] if [number, "click"] in [list(t) for t in one["targets"]])
    content = {"data": [None, None, "", "", ""], "fn_index": asked["id"], "session_hash": "rest", "trigger_id": 1}
    token = server.send("POST", "/gradio_api/run/predict", content).json()["data"][-1]
    answer = server.ask(f"/studio/news/{token}")
    assert answer.status == 204 and server.ask("/studio/news/other").status == 200
    of_headers = sum(len(name) + len(value) + 4 for name, value in answer.headers.items())
    # What Chromium sends of its own is about 600 bytes.
    seconds = int(re.findall(r"EVERY_MS = (\d+)", server.ask("/studio/studio.js").body.decode())[0]) / 1000
    assert (600 + len(token) + of_headers + len(answer.body)) / seconds < 1000, answer.headers
    write_image(open_.studio.image_set("set") / "b.png", "blue")
    write_state(open_.studio, parse_config({"data": {"folder": "x"}}, name="b"), status="done")
    assert server.ask(f"/studio/news/{token}").status == 200
