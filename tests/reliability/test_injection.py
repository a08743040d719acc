"""Names, prompts and captions that would be something else: a path, a flag, a script. And secrets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import mishaps
from helpers.commandline import Point
from helpers.promises import Figure
from helpers.scene import Scene
from PIL import Image

from sdlora.config.toml import parse_config
from sdlora.errors import ConfigError
from sdlora.report.html import TEMPLATES

NAMES = [
    "--n", "-rf", "a;touch x", "$(touch x)", "`touch x`", "a|b&c", "a'b", 'a"b', "<img src=x onerror=alert(1)>",
    "[bold red]", "{0} %s %n", "\u202egnp.exe", "two\nlines",
]  # fmt: skip
WORDS = [
    "<script>alert(1)</script>", "'><svg onload=alert(1)>", "</title></style><script>1</script>", "../../etc/passwd",
    "$(touch executed)", "; touch executed #", "a\u0000b", "a\nb\r\nc", "\u202eright to left", "x" * 300,
    "{{7*7}} ${7*7} %(x)s", "--output /tmp/x", "[link=file:///etc/passwd]x[/link]", "😀" * 40, "<!-- -->", "&lt;b&gt;",
    "javascript:alert(1)",
]  # fmt: skip


class Page(HTMLParser):
    """What a browser would run, ask for or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.faults: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._in_script = tag == "script"
        if tag in ("iframe", "object", "embed", "form", "base"):
            self.faults.append(tag)
        for name, value in attrs:
            outside = name in ("src", "href") and not (value or "").startswith(("data:", "#"))
            if name.startswith("on") or outside:
                self.faults.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)
        self._in_script = False


def files_of(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_names_prompts_and_captions_stay_what_they_are(scene: Scene, tmp_path: Path, figure: Figure) -> None:
    around = tmp_path / "around"
    images = around / "pictures"
    images.mkdir(parents=True)
    captions = [*WORDS, *NAMES]
    for index, name in enumerate(NAMES):
        Image.new("RGB", (32, 32), (index * 19, 255 - index * 9, 90)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(captions[index], encoding="utf-8")
    for index, words in enumerate(captions[len(NAMES) :]):
        Image.new("RGB", (32, 32), (9, index * 13, 255 - index * 7)).save(images / f"p{index}.png")
        (images / f"p{index}.txt").write_text(words, encoding="utf-8")
    before, run = files_of(tmp_path), around / "run"
    changes = [
        f"data.folder={json.dumps(str(images))}", f"preview.prompts={json.dumps(WORDS, ensure_ascii=False)}",
        "data.trigger=<b>zumi</b>", "train.epochs=1", "data.repeats=1", "preview.num_captions=8", "train.batch_size=8",
    ]  # fmt: skip
    outcome = scene.train(run, changes=changes)
    assert outcome.code == 0, outcome.err
    after = files_of(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert all(name.startswith("around/run/") for name in after.keys() - before.keys())
    page = Page()
    page.feed((run / "report.html").read_text(encoding="utf-8"))
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    assert "".join(page.scripts).strip() == script.strip() and not page.faults, page.faults
    assert not list(Path().glob("executed")) and not list(tmp_path.rglob("executed"))
    figure(
        "Injection", f"{len(WORDS) + len(NAMES)} names, prompts and captions: nothing run, nothing written elsewhere"
    )


@pytest.mark.parametrize(
    "name",
    ["--n", "-x", "../x", "/etc/x", "a/b", "a\\b", ".hidden", "a\nb", "a\n", "a\0b", "x" * 101, "", "a<b>", "a;b"],
)
def test_a_name_that_would_be_a_path_or_a_flag_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        parse_config({"name": name, "data": {"folder": "x"}}, name="x")


SECRET = "hf_canaryCanaryCanary"


def test_secrets_are_written_nowhere(scene: Scene, tmp_path: Path, figure: Figure) -> None:
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")
    environment = dict.fromkeys(names, SECRET) | {"TMPDIR": str(tmp_path)}
    changes = ["train.epochs=1", "data.repeats=1"]
    for name, points in {
        "good": [],
        "bad": [Point("sdlora.training.train_step:TrainStep.run", 2, action=mishaps.fails_inside)],
    }.items():
        arguments = scene.arguments(tmp_path / name, changes=changes)
        outcome = scene.command.start(arguments, points=points, environment=environment).wait()
        assert outcome.code == len(points), outcome.err
        assert SECRET not in outcome.out + outcome.err
    assert list(tmp_path.glob("sdlora-error-*.txt")), "a report of the failure was written"
    found = [file for file in tmp_path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert not found
    figure("Secrets", "0 hits in logs, configurations, metadata and reports of failures")
