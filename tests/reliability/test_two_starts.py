"""Two starts at once: in one folder, and on one device, exactly one runs."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from helpers import mishaps
from helpers.commandline import Point
from helpers.promises import Figure
from helpers.scene import Scene

SHORT = ["train.epochs=1", "data.repeats=1", "preview.enabled=false"]


def start_two(scene: Scene, folder: Path) -> list[str]:
    """Start two runs in one folder, which both find free; what is wrong then."""
    gate = folder / "gate"
    gate.mkdir(parents=True)
    at_gate = Point("sdlora.run.run:check_disks", 1, "after", mishaps.wait_for_two)
    commands = [
        scene.command.start(
            scene.arguments(folder / "run", changes=SHORT), points=[at_gate], environment={"GATE": str(gate)}
        )
        for _ in range(2)
    ]
    outcomes = [command.wait() for command in commands]
    if sorted(outcome.code or 0 for outcome in outcomes) != [0, 2]:
        return [f"exit codes {[outcome.code for outcome in outcomes]}: {[outcome.err for outcome in outcomes]}"]
    refused = next(outcome.err for outcome in outcomes if outcome.code == 2)
    told = "is in use by another run" in refused or "already contains a run" in refused
    return [] if told and "Traceback" not in refused else [refused]


@pytest.mark.slow
def test_of_two_starts_in_a_folder_exactly_one_runs_here_and_there(scene: Scene, tmp_path: Path) -> None:
    assert not [fault for index in range(3) for fault in start_two(scene, tmp_path / str(index))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_two_starts_in_a_folder_exactly_one_runs(scene: Scene, tmp_path: Path, figure: Figure) -> None:
    assert not [fault for index in range(20) for fault in start_two(scene, tmp_path / str(index))]
    figure("Two starts at once", "20 of 20 pairs in one folder: one runs, one is refused; taking turns on a device")


def test_on_one_device_a_run_waits_and_begins_when_the_other_is_killed(scene: Scene, tmp_path: Path) -> None:
    lock, gate = tmp_path / "gpu.lock", tmp_path / "gate"
    gate.mkdir()
    environment = {"DEVICE_LOCK": str(lock), "GATE": str(gate)}
    options = {"prepare": mishaps.gpu_of_a_file, "environment": environment}
    # The first run stays where it is until it is killed.
    first = scene.command.start(
        scene.arguments(tmp_path / "first", changes=SHORT),
        points=[Point("sdlora.training.train_step:TrainStep.run", 1, "before", mishaps.wait_for_two)],
        **options,  # type: ignore[arg-type]
    )
    while not list(gate.iterdir()):
        assert first.process.is_alive()
        time.sleep(0.02)
    other = scene.arguments(tmp_path / "second", changes=SHORT)
    refused = scene.command.run(*other, "--no-wait", **options)
    assert refused.code == 2 and "The GPU is in use by process" in refused.err, refused.err
    assert not (tmp_path / "second").exists()
    given_up = Point("sdlora.common.locks:time.sleep", 1, "before", "interrupt")
    stopped = scene.command.run(*other, points=[given_up], **options)
    assert stopped.code == 130 and "Nothing was written" in stopped.err, stopped.err
    killing = Point("sdlora.common.locks:time.sleep", 1, "before", mishaps.kill_holder)
    waited = scene.command.run(*other, points=[killing], **options)
    assert waited.code == 0, waited.err
    assert "Waiting for the GPU, which is in use by process" in waited.err
    assert first.wait().code == -signal.SIGKILL
