"""Bad input through the real command line: a message, an exit code, and nothing partially written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers.command import call
from helpers.commandline import CommandLine
from PIL import Image

from sdlora import __version__
from sdlora.cli import config
from sdlora.config.toml import load_config, parse_config
from sdlora.pocket.world import random_scene, render


@pytest.fixture
def train(tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(*changes: str, output: Path = tmp_path / "run", flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
        source = tmp_path / "hero.toml"
        source.write_text("[data]\ntrigger = 'zumi'\n")
        settings = [part for change in (*overrides, *changes) for part in ("--set", change)]
        return call(capsys, "train", str(source), "--output", str(output), *settings, *flags)

    return run


def folder_with(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("_", ".")).write_bytes(content)
    return path


def test_bad_input_has_a_message_and_an_exit_code_and_writes_nothing(train, tmp_path: Path, images: Path) -> None:  # type: ignore[no-untyped-def]
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    png = (tmp_path / "x.png").read_bytes()
    empty = folder_with(tmp_path / "empty")
    bare = folder_with(tmp_path / "bare", a_png=png)
    torn = folder_with(tmp_path / "torn", a_png=png[:50], a_txt=b"a ball")
    cases: list[tuple[list[str], int, str]] = [
        (["data.folder=nowhere"], 3, "There is no folder 'nowhere'"),
        ([f"data.folder={empty}"], 3, "contains no images"),
        ([f"data.folder={bare}"], 3, "1 of 1 images have no caption: a.png"),
        ([f"data.folder={torn}"], 3, "a.png: broken or truncated"),
        (["lora.rnak=4"], 2, "Did you mean lora.rank?"),
        (["train.epochs=9"], 2, "copy-paste overfitting"),
        (['lora.targets=["convolution"]'], 2, "lora.targets"),
        (["base.path=nowhere"], 2, "'nowhere'"),
        ([f"base.path={empty}"], 2, "model_index.json"),
        (["train.device=tpu9"], 2, "train.device"),
        (["train.precision=fp16"], 2, "fp16"),
        (["train.warmup_steps=1000"], 2, "never ends in"),
        ([f"data.validation_folder={images}"], 2, "data.validation_folder is data.folder"),
        ([f"cache.dir={tmp_path / 'x.png' / 'cache'}"], 2, "cache.dir"),
    ]
    for changes, code, reason in cases:
        found, out, err = train(*changes)
        assert (found, out) == (code, ""), err
        assert reason in " ".join(err.split()), err
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists(), changes


def test_output_with_another_run_is_refused(train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("seed = 1")
    code, _, err = train()
    assert code == 2
    assert "already contains a run" in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.toml"]
    code, _, err = train(output=tmp_path / "none", flags=("--resume",))
    assert code == 2
    assert "no run to resume" in err


def test_json_events_equal_the_metrics_file(train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = train("preview.enabled=false", flags=("--json",))
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "plan"
    assert events[-1]["event"] == "done"
    recorded = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event for event in events if event["event"] in ("step", "epoch")] == recorded


def test_progress_shows_exposures_verification_and_previews(train) -> None:  # type: ignore[no-untyped-def]
    code, out, err = train("data.repeats=2")
    assert (code, out) == (0, "")
    assert "seen 4 times" in err
    assert "max error 0" in err
    assert "previews.png" in err


def test_config_show_is_complete_and_valid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(capsys, "config", "show", "quickstart", "--set", "lora.rank=4")
    assert code == 0
    (tmp_path / "shown.toml").write_text(out)
    assert load_config(str(tmp_path / "shown.toml")) == load_config("quickstart", ["lora.rank=4"])
    code, out, _ = call(capsys, "config", "schema")
    assert json.loads(out)["properties"]["lora"]
    assert parse_config({"data": {"folder": "x"}}, name="x").lora.rank == 8


def test_info_shows_what_a_file_contains(train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    train("preview.enabled=false")
    code, out, _ = call(capsys, "info", str(tmp_path / "run" / "hero.safetensors"), "--json")
    assert code == 0
    assert json.loads(out)["modules"] == {"cross_attention": 16}
    code, out, _ = call(capsys, "info", str(tmp_path / "run" / "hero.safetensors"))
    assert "zumi" in out
    code, _, err = call(capsys, "info", str(tmp_path / "nothing.safetensors"))
    assert (code, "nothing.safetensors" in err) == (3, True)


def test_data_lists_errors_and_warnings_with_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "data", "builtin:zumi", "--trigger", "zumi", "--resolution-px", "64")
    assert (code, out, err) == (0, "24 images, 24 captions, 1 bucket: no problems found.\n", "")
    # 64 px images, of which the largest size decides what is too small.
    code, out, _ = call(capsys, "data", "builtin:zumi", "--trigger", "zumi", "--set", "data.resolutions_px=[32, 96]")
    assert (code, "24 images are smaller than the training size" in out) == (0, True)
    assert out.endswith("24 captions, 2 buckets: 1 warning.\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a ball")
    code, out, _ = call(capsys, "data", str(tmp_path))
    told = "Warnings:\n  a.png and b.png are the same image; keep one of them.\n2 images, 2 captions: 1 warning.\n"
    assert (code, out) == (0, told)
    (tmp_path / "c.png").write_bytes(b"")
    code, out, _ = call(capsys, "data", str(tmp_path), "--trigger", "zumi", "--resolution-px", "64")
    assert code == 3
    assert out.startswith("Errors:\n  c.png: not an image")
    assert out.endswith("3 images, 2 captions, 1 bucket: 2 errors, 3 warnings.\n")
    assert "a.png (32 x 32 for 64 x 64)" in out
    assert "All:" not in out
    for name in "defg":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    assert "    All: a.png, b.png, d.png, e.png, f.png, g.png\n" in call(capsys, "data", str(tmp_path))[1]


def test_data_checks_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a thing")
    Image.new("L", (8, 8), 255).save(tmp_path / "a-mask.png")
    code, out, _ = call(capsys, "data", str(tmp_path))
    assert (code, "a-mask.png" in out, "data.masks = 'file'" in out) == (0, True, True)
    code, out, _ = call(capsys, "data", str(tmp_path), "--masks", "file")
    assert (code, *(fact in out for fact in ("a-mask.png", "8 x 8", "64 x 64"))) == (3, True, True, True)


def test_data_names_captions_that_are_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, name in enumerate("abc"):
        Image.new("RGB", (32, 32), (80 * index, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("cat " * 75)
    (tmp_path / "b.txt").write_text("cat " * 76)
    (tmp_path / "c.txt").write_text("a cat\n" + "cat " * 76)
    lines = ("--set", "data.caption_lines=true")
    for options, long in [
        ((), "2 captions are longer than 77 tokens and are cut off there: b.png, c.png."),
        (lines, "2 captions are longer than 77 tokens and are cut off there: b.png, c.png."),
        (("--trigger", "zumi"), "3 captions are longer than 77 tokens and are cut off there: a.png, b.png, c.png."),
    ]:
        code, out, _ = call(capsys, "data", str(tmp_path), *options)
        assert (code, long in out) == (0, True)
    _, out, _ = call(capsys, "data", str(tmp_path), "--set", "data.max_token_windows=2")
    assert "tokens" not in out


def test_data_examines_every_set_of_a_folder_of_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(["10_zumi/a.png", "10_zumi/b.png", "2_big cat/a.png", "2_big cat/b.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        render(random_scene(number % 3)).save(tmp_path / name)
    (tmp_path / "10_zumi/a.txt").write_text("a thing")
    code, out, _ = call(capsys, "data", str(tmp_path), "--trigger", "zumi", "--resolution-px", "128")
    assert code == 0
    assert out.endswith("4 images, 4 captions, 1 bucket: 4 warnings.\n")
    assert "10_zumi: 1 of 2 captions do not contain the trigger 'zumi': a.png." in out
    assert "10_zumi/a.png and 2_big cat/b.png are the same image" in out
    assert "10_zumi/b.png (64 x 64 for 128 x 128)" in out
    (tmp_path / "2_big cat/a.png").write_bytes(b"")
    code, out, _ = call(capsys, "data", str(tmp_path), "--json")
    found = {finding["kind"]: finding["files"] for finding in json.loads(out)["findings"]}
    assert (code, found["unreadable"]) == (3, ["2_big cat/a.png"])


def test_data_json_has_every_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "data", "builtin:blueprint", "--json")
    report = json.loads(out)
    assert (code, report["pictures"], report["findings"]) == (0, 24, [])
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    code, out, _ = call(capsys, "data", str(tmp_path), "--json")
    report = json.loads(out)
    (finding,) = report["findings"]
    assert (code, report["folder"], report["pictures"]) == (3, str(tmp_path), 1)
    assert (finding["kind"], finding["severity"], finding["files"]) == ("no caption", "error", ["a.png"])
    assert finding["message"].startswith("1 of 1 images have no caption: a.png.")
    code, out, err = call(capsys, "data", str(tmp_path / "nowhere"), "--json")
    assert (code, out, "There is no folder" in err) == (3, "", True)
    assert call(capsys, "data", "builtin:zumy")[0] == 2


def test_version_and_help_exit_with_0_and_unknown_commands_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"sdlora {__version__}\n", "")
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(command in out for command in ("train", "data", "config", "info"))
    assert call(capsys, "trian")[0] == 2


def test_internal_error_names_a_file_with_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(config, "load_config", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, _, err = call(capsys, "config", "show", "quickstart")
    assert code == 1
    assert "Internal error: ZeroDivisionError: oops" in err
    (details,) = tmp_path.glob("sdlora-error-*.txt")
    assert str(details) in err.replace("\n", "")
    assert 'raise ZeroDivisionError("oops")' in details.read_text()
    assert "Traceback" not in err


def test_command_line_does_not_import_torch() -> None:
    script = (
        "import sys; import sdlora.config.schema, sdlora.cli.main; assert not {'diffusers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_a_checkpoint_and_names_resume(
    command: CommandLine, tmp_path: Path, overrides: list[str], number: int, code: int
) -> None:
    source = tmp_path / "hero.toml"
    source.write_text("[data]\ntrigger = 'zumi'\nrepeats = 300\n")
    changes = [part for change in [*overrides, "preview.enabled=false"] for part in ("--set", change)]
    started = command.start(["train", str(source), "--output", str(tmp_path / "run"), *changes])
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 20:
            break
        time.sleep(0.1)
    assert started.process.pid is not None
    os.kill(started.process.pid, number)
    outcome = started.wait()
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    assert "--resume" in outcome.err
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert state["status"] == "stopped"
    assert checkpoint.name == f"step-{state['step']:08d}"
    assert (checkpoint / "complete.json").exists()
