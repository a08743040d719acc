"""`sdlora cache`, `batch` and `ui`: what is encoded, exit codes, failed jobs, a dry run, and how the studio opens."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.command import call
from helpers.studios import auth_file

from sdlora.cli import runs
from sdlora.cli.runs import EXIT_NOT_ALL_DONE, resume_command
from sdlora.config.toml import dump_toml, parse_config


def jobs_file(folder: Path, text: str) -> Path:
    file = folder / "jobs.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_command_to_resume_has_what_the_run_was_started_with() -> None:
    sets = ["lora.rank=4", 'preview.prompts=["a cat"]']
    command = resume_command("my settings.toml", "runs/my cat", sets, force=True)
    assert shlex.split(command) == [
        "sdlora", "train", "my settings.toml", "--output", "runs/my cat", "--resume",
        "--set", sets[0], "--set", sets[1], "--force",
    ]  # fmt: skip
    again = resume_command("quickstart", "out", [], force=False, memory="8 GiB")
    assert shlex.split(again)[-2:] == ["--memory", "8 GiB"]
    assert resume_command("quickstart", "out", [], force=False) == "sdlora train quickstart --output out --resume"


@pytest.mark.parametrize(("memory", "told"), [("x", "cannot parse 'x' as a size"), ("1KiB", "is too little")])
def test_memory_that_nothing_fits_into_is_refused_before_anything_is_written(
    memory: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--set", "train.device=cpu"]
    code, _, err = call(capsys, "train", "quickstart", *sets, "--memory", memory, "--output", str(tmp_path / "run"))
    assert code == 2 and told in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["{}/out", "file://{}/out"])
def test_batch_of_invalid_jobs_exits_with_8_and_writes_results(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    output = kind.format(tmp_path)
    file = jobs_file(tmp_path, "[defaults]\nconfig = 'quickstart'\nset = { 'lora.rank' = 999 }\n[[jobs]]\nname='a'\n")
    code, out, err = call(capsys, "batch", str(file), "--output", output, "--json")
    assert code == EXIT_NOT_ALL_DONE
    assert "0 of 1 jobs are done." in err and "1 failed: a." in err
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["planned", "batch"]
    code, out, err = call(capsys, "batch", str(file), "--output", output)
    assert (code, out) == (EXIT_NOT_ALL_DONE, "")
    assert f"{output}/report.html" in err
    assert (tmp_path / "out" / "results.csv").exists() and (tmp_path / "out" / "report.html").exists()


def test_invalid_file_of_jobs_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jobs_file(tmp_path, "[[jobs]]\nname = 'a'\n")
    code, _, err = call(capsys, "batch", str(file), "--output", str(tmp_path / "out"))
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert "no config" in err


def test_dry_run_estimates_every_job_and_writes_nothing(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config({"data": {"folder": "x"}}, name="quick", overrides=overrides)
    (tmp_path / "quick.toml").write_text(dump_toml(config), encoding="utf-8")
    file = jobs_file(
        tmp_path,
        f"[defaults]\nconfig = '{tmp_path}/quick.toml'\n[[jobs]]\nname = 'a'\n"
        "[[jobs]]\nname = 'b'\nset = { 'data.folder' = 'nowhere' }\n[[jobs]]\nname = 'c'\nset = { 'lora.rank' = 999 }",
    )
    code, out, err = call(capsys, "batch", str(file), "--output", str(tmp_path / "out"), "--dry-run", "--json")
    assert code == 0, err
    a, b, c = (json.loads(line) for line in out.splitlines())
    # 5 images, 2 epochs, 2 buckets of 3 and 2 images in batches of 2: 3 steps an epoch.
    assert (a["pictures"], a["exposures"], a["steps"], a["fault"]) == (5, 2, 6, None)
    assert a["training_seconds"] > 0 and a["preview_seconds"] > 0
    assert "There is no folder 'nowhere'" in b["fault"]
    assert "lora.rank" in c["fault"]
    assert not (tmp_path / "out").exists()


def test_cache_is_filled_and_nothing_is_trained(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("")
    settings = [part for change in overrides for part in ("--set", change)]
    code, out, err = call(capsys, "cache", "mine.toml", *settings, "--workers", "1", "--json")
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1] == {"event": "progress", "phase": "cache", "done": 10, "total": 10}
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 10
    assert not (tmp_path / "runs").exists()
    code, _, err = call(capsys, "cache", "mine.toml", *settings, "--set", "data.folder=nowhere")
    assert code == 3 and "nowhere" in err


@pytest.mark.parametrize(
    ("flags", "has_screen", "opened"),
    [
        ([], True, ["http://127.0.0.1:7861"]), ([], False, []), (["--no-browser"], True, []),
        (["--host", "0.0.0.0", "--auth-file", "auth"], True, ["http://localhost:7861"]),
    ],
)  # fmt: skip
def test_studio_says_at_once_that_it_starts_and_opens_its_page(
    flags: list[str], has_screen: bool, opened: list[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(auth_file(tmp_path).parent)
    pages: list[str] = []

    def serve(**options: Any) -> None:
        said = capsys.readouterr().err
        assert "Starting" in said and "http" not in said
        options["entrance"].connections.close()
        options["opened"](7861)

    monkeypatch.setitem(sys.modules, "sdlora.ui.server.server", SimpleNamespace(serve=serve))
    monkeypatch.setattr(runs.webbrowser, "open", pages.append)
    monkeypatch.setattr(runs, "_has_screen", lambda: has_screen)
    code, _, err = call(capsys, "ui", "--port", "0", *flags)
    assert (code, pages) == (0, opened) and ":7861" in err


def test_browser_is_opened_for_somebody_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    assert runs._has_screen()
    monkeypatch.setenv("SSH_CONNECTION", "x")
    assert not runs._has_screen()
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False))
    assert not runs._has_screen(), "a service, or a test"
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("DISPLAY")
    assert not runs._has_screen()
