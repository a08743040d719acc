import json
import os
import shutil
from pathlib import Path

import pytest

from sdlora.errors import OutputError
from sdlora.events import EpochDone, Notice, PlanMade, Progress, StepDone
from sdlora.run.folder import Recorder, RunFolder


def step(number: int) -> StepDone:
    return StepDone(1, number, 0.5, 1e-3, ["a.png"], [number], [7], [0.5], 0.1)


def plan(steps: int) -> PlanMade:
    return PlanMade(
        images=5, validation_images=0, split_off=[], repeats=1, epochs=1, exposures_per_image=1, batch_size=1,
        gradient_accumulation_steps=1, steps=steps, trained_parameters=1, base_parameters=1, targets=[], device="cpu",
        precision="fp32",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run", "hero")
    made.create("seed = 1\n")
    return made


def test_events_are_written_to_state_metrics_and_log(folder: RunFolder) -> None:
    recorder = Recorder(folder)
    recorder.record(Notice("Something to know."))
    recorder.record(Progress("previews", 1, 4))
    for event in (step(1), step(2), EpochDone(1, 2, 0.5, None, 3.0)):
        recorder.record(event)
    state = json.loads(folder.state.read_text())
    assert (state["status"], state["phase"], state["epoch"], state["step"]) == ("running", "train", 1, 2)
    assert state["pid"] == os.getpid()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["event"] for row in rows] == ["step", "step", "epoch"]
    assert "Something to know." in folder.log.read_text()
    recorder.finish("failed", "No room left.")
    state = json.loads(folder.state.read_text())
    assert (state["status"], state["error"], state["eta_seconds"]) == ("failed", "No room left.", None)


def test_metrics_are_truncated_to_a_checkpoint(folder: RunFolder) -> None:
    recorder = Recorder(folder)
    recorder.record(step(1))
    kept = recorder.metrics_bytes()
    recorder.record(step(2))
    recorder.cut_metrics(kept)
    recorder.record(step(2))
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("tail", [b"", b'{"event": "st', b"\0" * 300])
def test_metrics_that_lost_their_end_are_cut_to_whole_lines_and_told(folder: RunFolder, tail: bytes) -> None:
    recorder = Recorder(folder)
    recorder.record(step(1))
    whole = folder.metrics.read_bytes()
    for number in (2, 3):
        recorder.record(step(number))
    counted = recorder.metrics_bytes()
    folder.metrics.write_bytes(whole + tail)
    assert f"{counted - len(whole)} bytes" in (recorder.cut_metrics(counted) or "")
    assert folder.metrics.read_bytes() == whole
    assert recorder.cut_metrics(len(whole)) is None
    folder.metrics.unlink()
    assert recorder.cut_metrics(counted) is not None


def test_metrics_are_on_the_disk_before_a_checkpoint_counts_them(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, synced = Recorder(folder), []
    recorder.record(step(1))
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.path.realpath(f"/proc/self/fd/{handle}")))
    assert recorder.metrics_bytes() == folder.metrics.stat().st_size
    assert synced == [str(folder.metrics.resolve())]


def test_a_resumed_run_is_as_far_as_before_until_it_continues(folder: RunFolder) -> None:
    recorder = Recorder(folder)
    for event in (step(1), step(2)):
        recorder.record(event)
    recorder.finish("stopped")
    again = Recorder(folder)
    again.record(Notice("An image is missing."))
    again.finish("failed", "An image is missing.")
    state = json.loads(folder.state.read_text())
    assert (state["status"], state["epoch"], state["step"]) == ("failed", 1, 2)


def test_steps_of_a_resumed_run_are_the_old_ones_until_it_trains(folder: RunFolder) -> None:
    def total() -> int:
        return int(json.loads(folder.state.read_text())["total_steps"])

    for planned in (6, 9):
        recorder = Recorder(folder)
        recorder.record(plan(planned))
        assert total() == 6
        recorder.record(step(1))
        recorder.finish("stopped")
        assert total() == planned


def test_a_folder_that_is_removed_ends_the_run_and_is_not_made_again(folder: RunFolder) -> None:
    recorder = Recorder(folder)
    recorder.record(step(1))
    shutil.rmtree(folder.path)
    for event in (step(2), Progress("previews", 1, 4)):
        with pytest.raises(OutputError, match="removed"):
            recorder.record(event)
    recorder.finish("failed", "removed")
    assert not folder.path.exists()


def test_folder_with_other_content_is_refused(tmp_path: Path, folder: RunFolder) -> None:
    RunFolder(tmp_path / "new", "x").check(resume=False)
    folder.check(resume=True)
    with pytest.raises(OutputError, match="--resume"):
        folder.check(resume=False)
    with pytest.raises(OutputError, match=r"config\.toml"):
        RunFolder(tmp_path / "new", "x").check(resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        RunFolder(tmp_path / "file", "x").check(resume=False)
    with pytest.raises(OutputError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "below", "x").create("")
