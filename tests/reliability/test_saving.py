"""Whatever is saved is whole: killed while saving, or with a full disk, there is the old file or the new one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import mishaps
from helpers.commandline import CommandLine, Point, Side
from helpers.promises import Figure
from helpers.saver import loaded_step, save_from
from helpers.scene import Scene, digests
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdlora.common.files import is_partial
from sdlora.copycheck.verdict import EpochCheck
from sdlora.training.checkpoint import complete_checkpoints, tidy_checkpoints

# Everything that saving a checkpoint and deleting an old one asks of the system.
SAVING: dict[str, tuple[Side, ...]] = {
    "sdlora.training.checkpoint:save_file": ("before", "torn", "after"),
    "pathlib:Path.write_bytes": ("torn", "after"),
    "os:fsync": ("before", "after"),
    "os:replace": ("before", "after"),
    "os:unlink": ("before",),
    "os:rmdir": ("before", "after"),
    "os:mkdir": ("before",),
}
NUM_SAVED = 5


def killed_while_saving(command: CommandLine, template: Path, point: Point, folder: Path) -> str | None:
    """What is wrong after a kill, or None."""
    shutil.copytree(template, folder)
    outcome = command.call(save_from, folder, 2, 1 + NUM_SAVED, points=[point])
    if outcome.code != -signal.SIGKILL:
        return f"{point}: not reached, it ended with {outcome.code}. {outcome.err}"
    found = complete_checkpoints(folder)
    if not found:
        return f"{point}: no checkpoint is left"
    step = loaded_step(found[-1])
    tidy_checkpoints(folder)
    save_from(folder, step + 1, step + 1)
    if loaded_step(complete_checkpoints(folder)[-1]) != step + 1:
        return f"{point}: cannot be gone on from"
    return None


def test_there_is_always_a_checkpoint_to_go_on_from(command: CommandLine, tmp_path: Path, figure: Figure) -> None:
    template = tmp_path / "template"
    save_from(template, 1, 1)
    shutil.copytree(template, tmp_path / "counted")
    counted = command.call(save_from, tmp_path / "counted", 2, 1 + NUM_SAVED, counted=list(SAVING))
    assert counted.code == 0, counted.err
    points = [
        Point(function, call, side)
        for function, sides in SAVING.items()
        for call in range(1, counted.calls[function] + 1)
        for side in sides
    ]
    assert len(points) >= 100, counted.calls
    chosen = [points[index * len(points) // 100] for index in range(100)]
    assert {point.function for point in chosen} == set(SAVING)

    def one(index: int) -> str | None:
        return killed_while_saving(command, template, chosen[index], tmp_path / str(index))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for fault in pool.map(one, range(100)) if fault]
    assert not faults, "\n".join(faults)
    figure("Always a checkpoint", "100 of 100 kills while saving")


def torn_files(run: Path) -> list[str]:
    """Files that cannot be read to their end, and temporary ones."""
    found = []
    for file in (path for path in run.rglob("*") if path.is_file()):
        try:
            if is_partial(file):
                found.append(f"{file}: left over")
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                load_file(file)
            elif file.suffix == ".png":
                Image.open(file).load()
            elif file.suffix == ".html":
                assert file.read_text(encoding="utf-8").endswith("</html>\n")
            if file.name == "copycheck.json":
                assert EpochCheck.read(file.parent) is not None
        except (ValueError, OSError, AssertionError, SafetensorError) as error:
            found.append(f"{file}: {error}")
    return found


# A write of every kind of file.
WRITES = {
    "config.toml": Point("pathlib:Path.write_bytes", 1, action="full disk"),
    "state.json": Point("pathlib:Path.write_bytes", 4, action="full disk"),
    "cache": Point("sdlora.cache.tensors:save_file", 2, "after", action="full disk"),
    "previews": Point("PIL.Image:Image.save", 2, "torn", action="full disk"),
    "LoRA": Point("sdlora.lora_files.write:save_file", 2, "torn", action="full disk"),
    "checkpoint": Point("sdlora.training.checkpoint:save_file", 3, "torn", action="full disk"),
    "final LoRA": Point("sdlora.run.export:shutil.copyfile", 1, "torn", action="full disk"),
    "page": Point("sdlora.report.report:write_text", 2, action="full disk"),
    "metrics": Point("sdlora.run.folder:_append", 5, action="full disk", every=True),
}


@pytest.fixture(scope="module")
def expected(scene: Scene) -> dict[str, str]:
    outcome = scene.train(scene.root / "whole")
    assert outcome.code == 0, outcome.err
    return digests(scene.root / "whole")


@pytest.mark.slow
def test_a_full_disk_tears_no_file(scene: Scene, expected: dict[str, str], tmp_path: Path, figure: Figure) -> None:
    def one(name: str) -> list[str]:
        run = tmp_path / name / "run"
        cache = tmp_path / name / "cache" if name == "cache" else None
        outcome = scene.train(run, points=[WRITES[name]], cache=cache)
        if outcome.code != 6 or "No disk space left" not in outcome.err or "Traceback" in outcome.err:
            return [f"{name}: exit code {outcome.code}: {outcome.err}"]
        faults = torn_files(tmp_path / name)
        outcome = scene.go_on(run, cache=cache)
        if outcome.code != 0 or digests(run) != expected:
            faults.append(f"{name}: not gone on with: {outcome.err}")
        return faults

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for found in pool.map(one, WRITES) for fault in found]
    assert not faults, "\n".join(faults)
    figure("Atomic files", f"0 torn files after a full disk at {len(WRITES)} kinds of writes; kills as in Exact resume")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs to mount a disk of 4 MB")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_told_beforehand_and_one_that_fills_ends_the_run(
    scene: Scene, expected: dict[str, str], small_disk: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_000_000))
    outcome = scene.train(small_disk / "run")
    assert outcome.code == 6
    assert "MiB left" in outcome.err and "--output" in outcome.err
    assert not (small_disk / "run").exists()
    filler.unlink()
    point = Point("sdlora.training.train_step:TrainStep.run", 6, "after", action=mishaps.disk_fills)
    started = scene.command.start(
        scene.arguments(small_disk / "run"), points=[point], environment={"FILLED": str(filler)}
    )
    outcome = started.wait()
    assert outcome.code == 6, outcome.err
    assert "No disk space left" in outcome.err
    assert not torn_files(small_disk / "run")
    assert loadable(small_disk / "run") == ["step-00000004", "step-00000005"]
    filler.unlink()
    outcome = scene.go_on(small_disk / "run")
    assert outcome.code == 0, outcome.err
    assert digests(small_disk / "run") == expected
    figure("Full disk", "told beforehand, exit code 6 in mid-run, old files whole (a disk of 4 MB)")


def loadable(run: Path) -> list[str]:
    found = complete_checkpoints(run / "checkpoints")
    for checkpoint in found:
        load_file(checkpoint / "state.safetensors")
    return [checkpoint.name for checkpoint in found]
