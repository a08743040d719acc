"""What is sent for: one of a kind at a time, told of whatever becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.captioners import make
from helpers.studios import write_image, write_state

from sdlora.config.schema import RunConfig
from sdlora.errors import SdloraError
from sdlora.ui.html import views
from sdlora.ui.pages import background_tasks
from sdlora.ui.pages.background_tasks import files_to_upload, start_captioning
from sdlora.ui.pages.context import Context, snapshot
from sdlora.ui.state import subprocesses
from sdlora.ui.state.folders import Studio

TOKEN = "hf_averysecrettoken"


@pytest.fixture
def folder(context: Context) -> Path:
    """A set of three images, of which one has a caption."""
    made = context.studio.image_set("set")
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        write_image(made / f"{name}.png", color)
    (made / "b.txt").write_text("my own words", encoding="utf-8")
    return made


def ended(context: Context, kind: Any) -> str:
    """Wait for an background task's process; what is told of it then."""
    task = context.tasks.find(kind)
    assert task is not None
    if (process := subprocesses.find(task.pid, task.began)) is not None:
        psutil.wait_procs([process], timeout=120)
    return snapshot(context, None, None).html[kind]


def test_model_captions_only_uncaptioned_images(context: Context, folder: Path, tmp_path: Path) -> None:
    model = make("blip", tmp_path / "blip")
    assert start_captioning(context, "set", str(model)) == ""
    with pytest.raises(SdloraError, match="'set'"):
        start_captioning(context, "set", str(model))
    assert snapshot(context, None, None).ends == {"caption": "Stop", "publish": None}
    told = ended(context, "caption")
    assert "2 captions written" in told and "verdict clean" in told
    assert (folder / "b.txt").read_text(encoding="utf-8") == "my own words"
    assert all((folder / f"{name}.txt").read_text(encoding="utf-8").strip() for name in "ac")
    assert "caption already" in start_captioning(context, "set", str(model))
    assert snapshot(context, None, None).ends["caption"] == "Hide this"
    context.tasks.end("caption")
    assert snapshot(context, None, None).html["caption"] == ""


@pytest.mark.parametrize("model", ["nobody/nothing", "--overwrite", "a b; touch x"])
def test_missing_model_is_reported_in_one_sentence(context: Context, folder: Path, model: str) -> None:
    start_captioning(context, "set", model)
    told = ended(context, "caption")
    assert "could not be loaded" in told and "verdict copying" in told and "Traceback" not in told
    assert [path.name for path in folder.glob("*.txt")] == ["b.txt"]


@pytest.mark.parametrize(
    ("model", "told"), [("", "captioning model"), ("/no/where", "no folder"), ("~/no", "no folder")]
)
def test_no_model_is_asked_for_at_once(context: Context, folder: Path, model: str, told: str) -> None:
    with pytest.raises(SdloraError, match=told):
        start_captioning(context, "set", model)
    assert context.tasks.find("caption") is None


def test_folder_elsewhere_is_refused_over_the_network(context: Context, folder: Path, tmp_path: Path) -> None:
    closed = Context(Studio(context.studio.runs, any_folder=False), context.jobs, context.sampler)
    with pytest.raises(SdloraError, match="over the network"):
        start_captioning(closed, "set", str(tmp_path))


def test_stopped_task_keeps_written_captions(context: Context, folder: Path, sleepers: list[psutil.Process]) -> None:
    start_captioning(context, "set", "owner/model")
    said = context.studio.logs / ".caption.log"
    assert said.read_text(encoding="utf-8") == f"started with caption {folder.absolute()} --model=owner/model\n"
    assert "Loading the model" in views.background_task(context.tasks, "caption")
    (folder / "a.txt").write_text("a red thing", encoding="utf-8")
    assert "1 of 2 written" in views.background_task(context.tasks, "caption")
    context.tasks.end("caption")
    assert "1 of 2 were written" in ended(context, "caption")
    assert len(sleepers) == 1


def test_booru_tags_are_written_by_a_tagger(context: Context, folder: Path, sleepers: list[psutil.Process]) -> None:
    with pytest.raises(SdloraError, match="tagger"):
        start_captioning(context, "set", "", "booru tags")
    start_captioning(context, "set", "owner/tagger", "booru tags")
    said = context.studio.logs / ".caption.log"
    assert said.read_text(encoding="utf-8") == f"started with caption {folder.absolute()} --tagger=owner/tagger\n"


def test_killed_task_has_failed(context: Context, folder: Path, sleepers: list[psutil.Process]) -> None:
    start_captioning(context, "set", "owner/model")
    (context.studio.logs / ".caption.log").write_text("")
    sleepers[0].kill()
    assert "killed" in ended(context, "caption")


# --- A run on the Hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def done(context: Context, make_config: Callable[..., RunConfig]) -> Path:
    """A run as it is when it is done."""
    run = write_state(context.studio, make_config("hero"), status="done")
    (run / "hero.safetensors").write_bytes(b"x")
    card = {"widget": [{"text": "a", "output": {"url": "epochs/1/previews/p.png"}}]}
    (run / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n", encoding="utf-8")
    return run


def test_upload_lists_its_files_and_asks_to_log_in(
    context: Context, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_tasks, "get_token", lambda: TOKEN)
    assert files_to_upload(context, "hero") == ["README.md", "hero.safetensors", "epochs/1/previews/p.png"]
    monkeypatch.setattr(background_tasks, "get_token", lambda: None)
    with pytest.raises(SdloraError, match="hf auth login"):
        files_to_upload(context, "hero")


def test_unfinished_run_is_not_uploaded(context: Context, make_config: Callable[..., RunConfig]) -> None:
    write_state(context.studio, make_config("half"), status="stopped")
    with pytest.raises(SdloraError, match="is not done"):
        files_to_upload(context, "half")
    with pytest.raises(SdloraError, match="No run is chosen"):
        files_to_upload(context, None)


@pytest.mark.parametrize("words", ["", "hero", "a/b/c", "../x", "me/he ro", "--public", "me/x\n"])
def test_invalid_repository_is_refused(words: str) -> None:
    if words == "me/x\n":
        assert background_tasks._repository(words) == "me/x"
    else:
        with pytest.raises(SdloraError, match="not a repository on the Hub"):
            background_tasks._repository(words)


def test_upload_reads_the_token_itself_and_never_shows_it(
    context: Context, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    context.tasks.start("publish", "hero", ["push", str(done), "--repo=me/hero"])
    told = ended(context, "publish")
    assert "The Hub cannot be reached" in told and "verdict copying" in told
    shown = "".join(snapshot(context, "hero", None).html.values())
    written = "".join(path.read_text(errors="replace") for path in context.studio.runs.rglob("*") if path.is_file())
    assert TOKEN not in shown + written
