"""A run as it is looked at is what its trainer left, while it grows as well."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.studios import write_state
from PIL import Image, ImageChops

from sdlora.common.run_files import Metrics
from sdlora.config.schema import RunConfig
from sdlora.config.toml import load_config, parse_config
from sdlora.copycheck.verdict import read_checks
from sdlora.data.images import crop_to_bucket, load_image
from sdlora.errors import SdloraError
from sdlora.events import EpochDone, Event, RunDone
from sdlora.run import setup
from sdlora.run.run import Stopped, start
from sdlora.run.setup import fresh_base
from sdlora.ui.html import views
from sdlora.ui.pages.context import Context, snapshot
from sdlora.ui.pages.result import clone_into_draft, draw
from sdlora.ui.state import run_view
from sdlora.ui.state.bin import Bin
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Jobs, Status
from sdlora.ui.state.run_view import RunView, delete_run, differences, put_back, read_run, settings_of
from sdlora.ui.state.try_lora import LoraSampler, SampleRequest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, images: Path, others: Path) -> Iterator[Context]:
    """A studio with one whole run on a base of random weights, and what it looked like on the way."""
    root = tmp_path_factory.mktemp("trained")
    studio = Studio(root / "runs")
    studio.create()
    context = Context(studio, Jobs(studio), LoraSampler())
    file = root / "small.toml"
    file.write_text(
        f"""
        [base]
        path = "{tiny_base}"
        [data]
        folder = "{images}"
        validation_folder = "{others}"
        resolution_px = 32
        bucket_step_px = 8
        trigger = "ball"
        [lora]
        rank = 2
        [train]
        epochs = 2
        device = "cpu"
        precision = "fp32"
        learning_rate = 1e-2
        [preview]
        num_steps = 2
        num_captions = 1
        prompts = ["a red ball"]
        seeds = [0]
        [cache]
        dir = "{root}/cache"
        """,
        encoding="utf-8",
    )
    for _ in start(load_config(str(file)), studio.run("small")):
        # Whatever is there already can be looked at.
        assert snapshot(context, "small", None).html.keys() == snapshot(context, None, None).html.keys()
    yield context


def config_of(context: Context) -> RunConfig:
    return settings_of(context.studio, "small")


def test_view_has_the_content_of_the_run_folder(trained: Context) -> None:
    run = read_run(trained.studio, "small")
    assert run is not None
    assert [event.epoch for event in run.metrics.epochs] == [0, 1, 2] and len(run.metrics.steps) == 10
    assert run.checks == read_checks(run.folder / "epochs")
    assert sorted(run.loras) == [1, 2] and [len(files) for files in run.previews.values()] == [2, 2, 2]
    kept = run.recommended()
    assert kept is not None
    assert run.loras[kept[0]].read_bytes() == (run.folder / "small.safetensors").read_bytes()
    assert read_run(trained.studio, "small") is run, "it is read once while no file changes"


def test_epoch_is_recommended_once_checked_for_copies(trained: Context) -> None:
    run = read_run(trained.studio, "small")
    assert run is not None

    def recommended(last: int, run: RunView) -> int | None:
        found = replace(run, checks={e: check for e, check in run.checks.items() if e <= last}).recommended()
        return None if found is None else found[0]

    assert [recommended(last, run) for last in (0, 1)] == [None, 1]
    copycheck = run.config.copycheck.model_copy(update={"enabled": False})
    unchecked = replace(run, config=run.config.model_copy(update={"copycheck": copycheck}))
    assert recommended(-1, unchecked) is not None


def test_torn_line_and_unproven_file_are_ignored(trained: Context, tmp_path: Path) -> None:
    studio = Studio(tmp_path / "runs")
    studio.create()
    shutil.copytree(trained.studio.run("small"), studio.run("half"))
    with (studio.run("half") / "metrics.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"event": "step", "epo')
    (studio.run("half") / "epochs" / "2" / "proof.json").unlink()
    run = read_run(studio, "half")
    assert run is not None and len(run.metrics.steps) == 10 and sorted(run.loras) == [1]


def test_run_with_a_line_separator_in_an_image_name_is_resumed_reported_and_shown(
    tmp_path: Path, overrides: list[str], images: Path
) -> None:
    folder, name = tmp_path / "set", "re\u2028d.png"
    shutil.copytree(images, folder)
    for suffix in (".png", ".txt"):
        (folder / f"red{suffix}").rename((folder / name).with_suffix(suffix))
    studio = Studio(tmp_path / "runs")
    studio.create()
    (tmp_path / "a.toml").write_text("[data]\ntrigger = 'zumi'\n", encoding="utf-8")
    config = load_config(str(tmp_path / "a.toml"), [*overrides, f"data.folder={folder}", "data.repeats=2"])
    seen: list[Event] = []
    with pytest.raises(Stopped):
        for event in start(
            config, studio.run("a"), should_stop=lambda: any(isinstance(e, EpochDone) and e.epoch for e in seen)
        ):
            seen.append(event)
    seen.clear()
    assert isinstance(list(start(config, studio.run("a"), resume=True))[-1], RunDone)
    run = read_run(studio, "a")
    assert run is not None and sum(event.examples.count(name) for event in run.metrics.steps) == 4
    assert name in (studio.run("a") / "report.html").read_text(encoding="utf-8")


def test_snapshot_shows_the_run(trained: Context) -> None:
    found = snapshot(trained, "small", 1)
    assert (found.names, found.epochs, found.loras, found.waiting) == (["small"], [0, 1, 2], [1, 2], [])
    assert not any(found.can.values()), "it is done"
    html = found.html
    assert "pair-1-0" in html["pairs"] and "pair-2-0" not in html["pairs"]
    assert html["grid"].count('class="tile') == 6 and "/studio/picture/" in html["grid"]
    assert ">validation<" in html["charts"] and "Timestep coverage" in html["charts"]
    assert "the base model: a red ball" in html["result"], "what it has learned is beside the base model's image"
    assert "is recommended" in html["result"] and "/studio/run/small/epoch/1" in html["result"]
    assert "base64" not in "".join(html.values()), "images are fetched once, not sent with every page"
    nothing = snapshot(trained, None, None)
    assert "No run is chosen" in nothing.html["status"] and "Nothing to see yet" in nothing.html["result"]


def test_training_images_are_cropped_as_trained_or_grey(trained: Context) -> None:
    run = read_run(trained.studio, "small")
    assert run is not None
    gallery = run.training_images()
    assert gallery["red.png"].size == (32, 32) and gallery["orange.png"].size == (40, 24)
    assert gallery["gone.png"].getcolors() == [(32 * 32, (0x88, 0x88, 0x88))]


def run_of(tmp_path: Path, data: dict[str, Any]) -> RunView:
    """A run of some images that has written nothing yet."""
    config = parse_config({"data": data | {"resolution_px": 32, "bucket_step_px": 8}}, name="mine")
    return RunView("mine", tmp_path / "mine", config, Metrics(), {}, {}, {}, "key")


def test_training_images_of_several_sets_are_found_by_their_names(tmp_path: Path, images: Path, others: Path) -> None:
    sets = [{"folder": str(images)}, {"folder": str(others), "name": "more"}]
    gallery = run_of(tmp_path, {"sets": sets}).training_images()
    for name, folder in (("set/red.png", images), ("more/pink.png", others)):
        expected = crop_to_bucket(load_image(folder / Path(name).name, "white"), *gallery[name].size)
        assert gallery[name].tobytes() == expected.tobytes()
    grey = run_of(tmp_path, {"sets": sets}).training_images()["pink.png"]
    assert grey.getcolors() == [(32 * 32, (0x88, 0x88, 0x88))]


@pytest.mark.parametrize(
    ("triggers", "told"),
    [((None, None), ["no trigger word"]), (("mizu", "<b>"), ["<b>mizu</b>", "<b>&lt;b&gt;</b>"])],
    ids=["none", "one per set"],
)
def test_result_names_the_trigger_of_every_set(
    tmp_path: Path, triggers: tuple[str | None, str | None], told: list[str]
) -> None:
    sets = [{"folder": f"set{number}", "trigger": trigger} for number, trigger in enumerate(triggers)]
    run = run_of(tmp_path, {"sets": sets})
    unchecked = run.config.model_copy(update={"copycheck": run.config.copycheck.model_copy(update={"enabled": False})})
    run = replace(run, config=unchecked, loras={1: tmp_path / "a.safetensors"})
    html = views.result_panel(run, Status("mine", "done"), tmp_path)
    assert all(words in html for words in told)
    assert ("no trigger word" in html) == (told == ["no trigger word"])


def test_strength_zero_is_the_base_and_one_the_preview(trained: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    monkeypatch.setattr(setup, "fresh_base", lambda *args: loads.append("base") or fresh_base(*args))
    run = read_run(trained.studio, "small")
    assert run is not None
    wish = SampleRequest("a red ball", 0, (0.0, 1.0, 2.0))
    zero, one, two = trained.sampler.draw(run.config, run.loras[2], wish)
    (base,) = trained.sampler.draw(run.config, None, SampleRequest("a red ball", 0))
    assert loads == ["base"], "it stays loaded, and drawing leaves nothing in it"
    match = next(match for match in run.checks[2].previews if match.prompt == "a red ball")
    assert zero.tobytes() == base.tobytes()
    # Previews are drawn several at once, which may round otherwise.
    for epoch, image in ((0, zero), (2, one)):
        with Image.open(run.folder / "epochs" / str(epoch) / match.file) as preview:
            assert max(high for _, high in ImageChops.difference(image, preview.convert("RGB")).getextrema()) <= 1
    assert len({zero.tobytes(), one.tobytes(), two.tobytes()}) == 3


def test_samples_of_epochs_are_shown_side_by_side(trained: Context) -> None:
    run = read_run(trained.studio, "small")
    assert run is not None
    html = draw(trained, run, [1, 2], SampleRequest("a ball", 3, (1.0,)))
    assert html.count("<img") == 2 and "epoch 1, strength 1" in html and "epoch 2, strength 1" in html
    for epochs, words in (([7], "a ball"), ([1], " ")):
        with pytest.raises(SdloraError):
            draw(trained, run, epochs, SampleRequest(words, 0))
    assert torch.is_grad_enabled()


def test_settings_can_be_compared_and_cloned(trained: Context) -> None:
    config = config_of(trained)
    other = config.model_copy(update={"seed": 5, "name": "b"})
    assert differences(config, other) == [("name", "small", "b"), ("seed", 0, 5)]
    table = views.settings_table("a<b", "c", differences(config, other))
    assert "a&lt;b" in table and ">seed<" in table
    assert "in the recipe now" in clone_into_draft(trained, "small")
    draft = trained.draft()
    assert draft.name == "small-2"
    assert draft.config(trained.studio) == config.model_copy(update={"name": "small-2"})
    with pytest.raises(SdloraError, match="No run is chosen"):
        clone_into_draft(trained, None)


def test_deleting_a_run_keeps_its_images(trained: Context, tmp_path: Path, images: Path) -> None:
    studio = Studio(tmp_path / "runs")
    studio.create()
    folder = studio.run("old")
    folder.mkdir()
    (folder / "config.toml").write_text((trained.studio.run("small") / "config.toml").read_text())
    delete_run(studio, "old")
    assert not folder.exists() and sorted(path.name for path in studio.runs.iterdir()) == [".studio", "pictures"]
    assert len(list(images.glob("*.png"))) == 5
    change = Bin(studio).last(studio.runs)
    assert change is not None and put_back(studio, change.key) == "old is back."
    assert (folder / "config.toml").is_file() and Bin(studio).last(studio.runs) is None
    delete_run(studio, "old")
    (studio.runs / "bases").mkdir()
    (studio.runs / "bases" / "model.safetensors").write_bytes(b"x")
    (studio.runs / "notes").mkdir()
    for name in ("bases", "notes"):
        with pytest.raises(SdloraError):
            delete_run(studio, name)
    assert (studio.runs / "bases" / "model.safetensors").is_file() and (studio.runs / "notes").is_dir()
    (studio.runs / "link").symlink_to(images)
    for name in ("old", "link", "../x", "pictures"):
        with pytest.raises(SdloraError):
            delete_run(studio, name)
    assert len(list(images.glob("*.png"))) == 5


def test_every_run_is_read_once_however_many_there_are(
    context: Context, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(70):
        write_state(context.studio, make_config(f"run {number}"), status="done")
    snapshot(context, None, None)
    read: list[str] = []

    def count(file: str) -> RunConfig:
        read.append(file)
        return load_config(file)

    monkeypatch.setattr(run_view, "load_config", count)
    assert len(snapshot(context, None, None).names) == 70 and read == []
    (context.studio.run("run 3") / "metrics.jsonl").write_text("")
    snapshot(context, None, None)
    assert read == [str(context.studio.run("run 3") / "config.toml")]


def test_messages_escape_user_text() -> None:
    assert "<b>" not in views.message("<b>x</b>", title="<b>") and "&lt;b&gt;" in views.message("<b>x</b>")
