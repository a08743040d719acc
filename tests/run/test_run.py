"""A whole run on a tiny base: the files it leaves, resume, and refusals that write nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import CONFIG, copying_from, digests, metrics, run, without_times
from PIL import ImageOps
from safetensors.torch import load_file

from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, DataError, OutputError
from sdlora.events import (
    CopyChecked,
    EpochDone,
    Exported,
    Notice,
    PlanMade,
    PreviewsDone,
    Progress,
    RunDone,
    StepDone,
    StepRehearsed,
)
from sdlora.pocket.world import random_scene, render
from sdlora.run.folder import RunFolder
from sdlora.run.run import Stopped, start
from sdlora.run.setup import prepare
from sdlora.training.train_step import StepResult, TrainStep


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[[], bool]]:
    """Makes a wish to stop that comes true after so many further steps."""
    done = [0]
    original = TrainStep.run

    def count(self: TrainStep, step: int, micro_batch_size: int) -> StepResult:
        result = original(self, step, micro_batch_size)
        done[0] += 1
        return result

    monkeypatch.setattr(TrainStep, "run", count)

    def make(steps: int) -> Callable[[], bool]:
        last = done[0] + steps
        return lambda: done[0] >= last

    return make


StopAfter = Callable[[int], Callable[[], bool]]


def test_run_leaves_its_files_and_events(tmp_path: Path, overrides: list[str], others: Path) -> None:
    folder = tmp_path / "run"
    events = run(folder, [*overrides, f"data.validation_folder={others}", "data.repeats=2"])
    plan = next(event for event in events if isinstance(event, PlanMade))
    assert (plan.images, plan.exposures_per_image) == (5, 4)
    # Two buckets of 3 and 2 images, two rounds of each in batches of 2: 3 + 2 steps an epoch.
    assert plan.steps == 10 == len([event for event in events if isinstance(event, StepDone)])
    # A step is timed before anything that takes long, so that the time left can be told.
    (rehearsal,) = [event for event in events if isinstance(event, StepRehearsed)]
    drawn = [event for event in events if isinstance(event, PreviewsDone)]
    assert rehearsal.seconds > 0 and events.index(rehearsal) < events.index(drawn[0])
    assert [len(event.files) for event in drawn] == [plan.previews] * 3
    exported = next(event for event in events if isinstance(event, Exported))
    assert exported.max_error == 0.0
    assert exported.num_modules == len(plan.targets) * 4 * 4
    assert isinstance(events[-1], RunDone)
    for name in ("config.toml", "state.json", "metrics.jsonl", "log.txt", "report.html", "previews.png"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "hero.safetensors").read_bytes() == (
        folder / "epochs" / str(exported.epoch) / "adapter.safetensors"
    ).read_bytes()
    for epoch in range(3):
        assert (folder / "epochs" / str(epoch) / "previews" / "prompt00_seed0.png").exists()
    state = json.loads((folder / "state.json").read_text())
    assert (state["status"], state["step"], state["error"]) == ("done", 10, None)
    assert not list(folder.rglob("*.sdlora-partial-*"))


def test_metrics_have_the_promised_keys_and_every_exposure_once(tmp_path: Path, overrides: list[str]) -> None:
    run(tmp_path / "run", [*overrides, "data.repeats=2", "preview.enabled=false"])
    rows = metrics(tmp_path / "run")
    steps = [row for row in rows if row["event"] == "step"]
    assert set(steps[0]) == {
        "event", "epoch", "step", "loss", "lr", "examples", "visits", "timesteps", "losses", "seconds",
    }  # fmt: skip
    seen = [pair for row in steps for pair in zip(row["examples"], row["visits"], strict=True)]  # type: ignore[call-overload]
    names = [f"{color}.png" for color in ("blue", "green", "orange", "purple", "red")]
    assert sorted(seen) == [(name, exposure) for name in names for exposure in range(1, 5)]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert [row["epoch"] for row in epochs] == [0, 1, 2]
    losses = [loss for row in steps if row["epoch"] == 1 for loss in row["losses"]]  # type: ignore[attr-defined]
    assert epochs[1]["train_loss"] == pytest.approx(sum(losses) / len(losses))
    placed = [pair for row in steps if row["epoch"] == 1 for pair in zip(row["timesteps"], row["losses"], strict=True)]  # type: ignore[call-overload]
    for band, found in enumerate(epochs[1]["train_bands"]):  # type: ignore[arg-type]
        inside = [loss for timestep, loss in placed if 200 * band <= timestep < 200 * (band + 1)]
        assert found == (pytest.approx(sum(inside) / len(inside)) if inside else None)
    assert epochs[0]["train_bands"] is epochs[1]["heldout_bands"] is epochs[1]["heldout_change"] is None


def test_stopped_and_resumed_run_ends_in_the_same_bytes(
    tmp_path: Path, overrides: list[str], others: Path, stop_after: StopAfter
) -> None:
    options = [*overrides, "data.repeats=3", "train.log_every_steps=2", f"data.validation_folder={others}"]
    options += [f"cache.dir={tmp_path / 'shared'}"]
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    whole.parent.mkdir()
    cut.parent.mkdir()
    run(whole, options)
    for steps in (3, 9):
        with pytest.raises(Stopped):
            run(cut, options, resume=steps > 3, should_stop=stop_after(steps))
        assert json.loads((cut / "state.json").read_text())["status"] == "stopped"
    run(cut, options, resume=True)
    assert digests(cut) == digests(whole)
    assert without_times(metrics(cut)) == without_times(metrics(whole))
    assert metrics(whole)[-1]["heldout_change"] is not None


def test_page_is_written_after_every_epoch(tmp_path: Path, overrides: list[str]) -> None:
    source = tmp_path / "hero.toml"
    source.write_text(CONFIG, encoding="utf-8")
    for event in start(load_config(str(source), overrides), tmp_path / "run"):
        if isinstance(event, StepDone) and event.epoch == 2:
            page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
            assert "Epoch 1 of 2. This page is written anew after every epoch." in page
    assert "Epoch 2 of 2" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_split_off_images_are_never_trained(tmp_path: Path, overrides: list[str]) -> None:
    options = [*overrides, "data.folder=builtin:zumi", "preview.enabled=false", "train.epochs=1"]
    events = run(tmp_path / "run", options)
    plan = next(event for event in events if isinstance(event, PlanMade))
    assert (plan.images, plan.validation_images, len(plan.split_off)) == (22, 2, 2)
    trained = {name for event in events if isinstance(event, StepDone) for name in event.examples}
    assert len(trained) == 22 and not trained & set(plan.split_off)
    assert all(event.validation_loss for event in events if isinstance(event, EpochDone))


FORMS = [
    ['lora.targets=["cross_attention", "text_encoder", "conv"]', "lora.dropout=0.2", "lora.rslora=true"],
    ["lora.init=pissa", "lora.timestep_rank_min=1"],
    ["lora.dora=true", "base.quantization=fp8"],
    ["base.quantization=int8"],
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adapter_resumes_in_the_same_bytes(
    tmp_path: Path, overrides: list[str], form: list[str], others: Path, stop_after: StopAfter
) -> None:
    options = [*overrides, *form, f"data.validation_folder={others}", f"cache.dir={tmp_path / 'shared'}"]
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    whole.parent.mkdir()
    cut.parent.mkdir()
    run(whole, options)
    with pytest.raises(Stopped):
        run(cut, options, should_stop=stop_after(4))
    run(cut, options, resume=True)
    assert digests(cut) == digests(whole)
    assert without_times(metrics(cut)) == without_times(metrics(whole))


def test_run_out_of_memory_resumes_with_less(tmp_path: Path, overrides: list[str], stop_after: StopAfter) -> None:
    options = [*overrides, "preview.enabled=false", f"cache.dir={tmp_path / 'shared'}"]
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (whole, cut):
        folder.parent.mkdir()
    run(whole, options)
    with pytest.raises(Stopped):
        run(cut, options, should_stop=stop_after(4))
    run(cut, [*options, "train.gradient_checkpointing=true"], resume=True)
    found, expected = (load_file(folder / "hero.safetensors") for folder in (cut, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_compiled_run_resumes_in_the_same_bytes_or_without_its_compiler(
    tmp_path: Path, overrides: list[str], stop_after: StopAfter
) -> None:
    options = [*overrides, f"cache.dir={tmp_path / 'shared'}", 'lora.targets=["cross_attention", "self_attention"]']
    options += ["data.buckets=false", "train.batch_size=1"]
    folders = {name: tmp_path / name / "run" for name in ("plain", "whole", "cut", "without")}
    for folder in folders.values():
        folder.parent.mkdir()
    run(folders["plain"], options)
    compiled = [*options, "train.compile=true", "train.gradient_checkpointing=true"]
    run(folders["whole"], compiled)
    for name in ("cut", "without"):
        with pytest.raises(Stopped):
            run(folders[name], compiled, should_stop=stop_after(4))
    run(folders["cut"], compiled, resume=True)
    run(folders["without"], [*compiled, "train.compile=false"], resume=True)
    assert digests(folders["cut"]) == digests(folders["whole"])
    files = {name: load_file(folder / "hero.safetensors") for name, folder in folders.items()}
    for key, tensor in files["plain"].items():
        for name in ("whole", "without"):
            assert (files[name][key] - tensor).norm() <= 1e-3 * tensor.norm(), (name, key)


def test_timestep_rank_ignored_by_other_programs_is_measured_and_reported(tmp_path: Path, overrides: list[str]) -> None:
    options = [*overrides, "preview.enabled=false", "lora.timestep_rank_min=1", "train.learning_rate=1e-2"]
    events = run(tmp_path / "run", options)
    proof = json.loads((tmp_path / "run" / "epochs" / "2" / "proof.json").read_text())
    assert proof["rank_mask_difference"] > 0.01
    (told,) = [e.message for e in events if isinstance(e, Notice) and "ignore the timestep rank" in e.message]
    assert f"differ by {proof['rank_mask_difference']:.0%} of" in told
    assert "ignore the timestep rank" in (tmp_path / "run" / "report.html").read_text()


def test_folder_with_another_run_is_left_alone(tmp_path: Path, overrides: list[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("mine")
    with pytest.raises(OutputError, match="--resume"):
        run(folder, overrides)
    assert [file.name for file in folder.iterdir()] == ["config.toml"]
    (folder / "config.toml").rename(folder / "notes.txt")
    with pytest.raises(OutputError, match="not empty"):
        run(folder, overrides)


def test_resuming_with_other_settings_is_refused(tmp_path: Path, overrides: list[str]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        run(folder, [*overrides, "preview.enabled=false"], should_stop=lambda: True)
    before = (folder / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=r"lora\.rank: was 4, now 5") as caught:
        run(folder, [*overrides, "preview.enabled=false", "lora.rank=5", "seed=3"], resume=True)
    assert "seed: was 0, now 3" in str(caught.value)
    assert (folder / "config.toml").read_bytes() == before
    run(folder, [*overrides, "preview.enabled=false", "train.log_every_steps=3"], resume=True)


def test_resuming_with_other_images_is_refused(
    tmp_path: Path, overrides: list[str], images: Path, stop_after: StopAfter
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(images, mine)
    options = [*overrides, "preview.enabled=false", f"data.folder={mine}"]
    with pytest.raises(Stopped):
        run(tmp_path / "run", options, should_stop=stop_after(1))
    (mine / "red.txt").write_text("another caption")
    (mine / "blue.png").rename(mine / "navy.png")
    (mine / "blue.txt").rename(mine / "navy.txt")
    with pytest.raises(DataError, match="started with other images") as caught:
        run(tmp_path / "run", options, resume=True)
    assert "added: navy.png" in str(caught.value)
    assert "no longer there: blue.png" in str(caught.value)
    assert "changed, or its caption: red.png" in str(caught.value)
    shutil.rmtree(mine)
    shutil.copytree(images, mine)
    assert isinstance(run(tmp_path / "run", options, resume=True)[-1], RunDone)


def test_previews_of_captions_contain_the_trigger(tmp_path: Path, overrides: list[str]) -> None:
    changes = [*overrides, "preview.prompts=[]", "preview.num_captions=3"]
    run(tmp_path / "run", [*changes, "train.epochs=1"])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "prompt05_seed0.png" in log
    request = prepare(load_config(str(tmp_path / "hero.toml"), changes), RunFolder(tmp_path / "other", "hero")).previews
    assert request is not None
    assert all(prompt.startswith("zumi, a ") for prompt in request.prompts[:3])
    assert request.kinds() == ["training"] * 3 + ["novel"] * 3
    assert all(prompt.startswith("zumi ") for prompt in request.prompts[3:])


def test_high_rank_is_reported(tmp_path: Path, overrides: list[str]) -> None:
    options = [*overrides, "preview.enabled=false", "lora.rank=33", "train.epochs=1"]
    events = run(tmp_path / "run", options)
    told = " ".join(event.message for event in events if isinstance(event, Notice))
    assert "Rank 33 needs more memory and copies the training images more easily" in told


def test_captions_too_many_to_cache_are_reported(tmp_path: Path, overrides: list[str], images: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(images, mine)
    (mine / "red.txt").write_text("a red ball, one, two, three, four")
    options = [*overrides, f"data.folder={mine}", "data.shuffle_tags=true", "data.repeats=3"]
    assert not any("different captions" in str(event) for event in run(tmp_path / "kept", options))
    events = run(tmp_path / "live", [*options, "cache.max_text_gib=1e-5"])
    (told,) = [event.message for event in events if isinstance(event, Notice) and "different captions" in event.message]
    assert "would take" in told and "(cache.max_text_gib = 1e-05)" in told
    assert digests(tmp_path / "kept") == digests(tmp_path / "live")


def test_warnings_about_images_come_before_training(tmp_path: Path, overrides: list[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    scene, other = render(random_scene(0)), render(random_scene(1))
    for name, image in {"a": scene, "b": ImageOps.mirror(scene), "c": other.resize((24, 48))}.items():
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a thing")
    changes = [f"data.folder={folder}", "preview.enabled=false", "train.epochs=1"]
    events = run(tmp_path / "run", [*overrides, *changes])
    first_step = next(index for index, event in enumerate(events) if isinstance(event, StepDone))
    told = [event.message for event in events[:first_step] if isinstance(event, Notice)]
    assert "a.png and b.png are near-duplicates; keep one of them." in told
    assert any("3 of 3 captions" in message and "'zumi'" in message for message in told)
    assert any("alone in a bucket" in message and "c.png (24 x 40)" in message for message in told)
    events = run(tmp_path / "ones", [*overrides, *changes, "train.batch_size=1", "data.resolution_px=64"])
    told = [event.message for event in events if isinstance(event, Notice)]
    assert any("smaller than the training size and will be enlarged: c.png" in message for message in told)
    assert not any("alone in a bucket" in message for message in told)


def test_validation_loss_chooses_the_epoch(tmp_path: Path, overrides: list[str], others: Path) -> None:
    events = run(tmp_path / "run", [*overrides, f"data.validation_folder={others}", "preview.enabled=false"])
    losses = {event.epoch: event.validation_loss for event in events if isinstance(event, EpochDone)}
    best = min((1, 2), key=lambda epoch: losses[epoch] or 0.0)
    assert next(event for event in events if isinstance(event, Exported)).epoch == best


CHECKED = ["copycheck.enabled=true", "train.epochs=3", "preview.num_captions=1"]


def test_epoch_that_copies_is_not_kept(
    tmp_path: Path, overrides: list[str], others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying_from(2, monkeypatch)
    events = run(
        tmp_path / "run", [*overrides, *CHECKED, f"data.validation_folder={others}", "train.learning_rate=1e-2"]
    )
    assert [event.verdict for event in events if isinstance(event, CopyChecked)] == [
        "clean", "clean", "copying", "copying",
    ]  # fmt: skip
    kept = tmp_path / "run" / "epochs" / "1" / "adapter.safetensors"
    assert (tmp_path / "run" / "hero.safetensors").read_bytes() == kept.read_bytes()
    told = [event.message for event in events if isinstance(event, Notice)]
    assert any("epoch 2 and what follows." in message for message in told)


def test_training_stops_at_the_first_epoch_that_copies(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copying_from(2, monkeypatch)
    options = [*overrides, *CHECKED, "copycheck.stop=true"]
    events = run(tmp_path / "run", options)
    assert isinstance(events[-1], RunDone)
    assert {path.name for path in (tmp_path / "run" / "epochs").iterdir()} == {"0", "1", "2"}
    assert (tmp_path / "run" / "epochs" / "2" / "adapter.safetensors").exists()
    exported = next(event for event in events if isinstance(event, Exported))
    assert exported.epoch == 1
    # Resumed, it ends in the same place.
    before = (tmp_path / "run" / "hero.safetensors").read_bytes()
    assert isinstance(run(tmp_path / "run", options, resume=True)[-1], RunDone)
    assert (tmp_path / "run" / "hero.safetensors").read_bytes() == before
    assert not (tmp_path / "run" / "epochs" / "3").exists()


def test_copy_check_leaves_training_unchanged(tmp_path: Path, overrides: list[str]) -> None:
    run(tmp_path / "with", [*overrides, *CHECKED])
    run(tmp_path / "without", [*overrides, *CHECKED, "copycheck.enabled=false"])
    first, second = (tmp_path / name / "epochs" / "3" / "adapter.safetensors" for name in ("with", "without"))
    ours, theirs = load_file(first), load_file(second)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_run_can_be_stopped_before_training(tmp_path: Path, overrides: list[str]) -> None:
    done: list[str] = []

    def in_phase(phase: str) -> Callable[[], bool]:
        return lambda: bool(done) and done[-1] == phase

    source = tmp_path / "hero.toml"
    source.write_text(CONFIG, encoding="utf-8")
    config = load_config(str(source), [*overrides, *CHECKED])
    for phase in ("cache pictures", "comparing the images", "previews"):
        done.clear()
        with pytest.raises(Stopped):
            for event in start(config, tmp_path / "run", resume=phase != "cache pictures", should_stop=in_phase(phase)):
                done += [event.phase] if isinstance(event, Progress) else []
        assert done[-1] == phase
        assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "stopped"
        assert not (tmp_path / "run" / "checkpoints").exists()
    # Whoever is interrupted while an event is shown closes the run without asking it.
    interrupted = start(config, tmp_path / "run", resume=True)
    assert any(isinstance(event, Progress) for event in interrupted)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "running"
    interrupted.close()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "stopped"
    assert isinstance(run(tmp_path / "run", [*overrides, *CHECKED], resume=True)[-1], RunDone)
