"""Exact resume: killed at any point and gone on with, a run ends in the bytes it would have ended in."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from helpers.commandline import CommandLine, Point, Side
from helpers.promises import Figure
from helpers.scene import Scene, digests, make_scene
from helpers.tiny import make_tiny_z_image

from sdlora.common.files import is_partial


@dataclass(frozen=True)
class Place:
    """A function at which to kill.

    Attributes:
        phase: What a run does there.
        function: As in `Point`.
        sides: As in `Point`.
        count: How many of its calls are chosen, spread over all that a run makes.
    """

    phase: str
    function: str
    sides: tuple[Side, ...]
    count: int = 1


# Before training: with an empty cache.
COLD = [
    Place("start", "sdlora.run.run:prepare", ("after",)),
    Place("start", "pathlib:Path.write_bytes", ("torn",), 3),  # config.toml and state.json
    Place("caching", "sdlora.cache.tensors:save_file", ("torn", "after"), 3),
    Place("caching", "os:replace", ("before", "after"), 4),
    Place("null", "sdlora.previews.sampler:_draw", ("before", "after")),
    Place("null", "PIL.Image:Image.save", ("torn",), 3),
    Place("null", "sdlora.copycheck.scale:_registered_among", ("before", "after")),
]
WARM = [
    Place("step", "sdlora.training.train_step:TrainStep.run", ("before", "after"), 3),
    Place("step", "sdlora.training.loss:diffusion_loss", ("after",), 3),
    Place("step", "torch.optim.adamw:AdamW.step", ("before", "after"), 2),
    Place("step", "sdlora.training.optimizers:MovingAverage.update", ("before",), 2),
    Place("save", "sdlora.training.checkpoint:save_file", ("torn", "after"), 3),
    Place("save", "sdlora.training.checkpoint:write_json", ("before", "after"), 3),
    Place("save", "sdlora.training.checkpoint:shutil.rmtree", ("before", "after"), 2),
    Place("epoch's edge", "sdlora.training.trainer:Position.take_means", ("before", "after"), 2),
    Place("epoch's edge", "sdlora.training.validation:image_losses", ("after",), 2),
    Place("preview", "sdlora.previews.sampler:_draw", ("before", "after"), 2),
    Place("preview", "PIL.Image:Image.save", ("torn",), 2),
    Place("check", "sdlora.copycheck.checker:match_previews", ("before", "after"), 2),
    Place("export", "sdlora.run.export:save_lora", ("before", "after"), 2),
    Place("export", "sdlora.lora_files.write:save_file", ("torn",), 2),
    Place("export", "sdlora.run.export:verify_lora", ("before", "after"), 2),
    Place("export", "sdlora.run.export:shutil.copyfile", ("torn", "after")),
    Place("report", "sdlora.run.epoch_end:write_report", ("before", "after"), 2),
    Place("report", "sdlora.run.epoch_end:contact_sheet", ("before",), 2),
    Place("any file", "os:replace", ("before", "after"), 5),
]


@dataclass(frozen=True)
class Trial:
    """A point to kill at.

    Attributes:
        phase: What a run does there.
        point: Where it is.
        is_cold: Whether the cache is empty when the run begins.
    """

    phase: str
    point: Point
    is_cold: bool


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed.

    Attributes:
        scene: Where it ran; its cache is full.
        digests: What it ended in.
        trials: Points for all places, spread over its calls.
    """

    scene: Scene
    digests: dict[str, str]
    trials: list[Trial]


def trials(places: Sequence[Place], calls: Mapping[str, int], *, is_cold: bool) -> list[Trial]:
    """Of every place its calls, spread from the first to the last."""
    found = []
    for place in places:
        total = calls[place.function]
        assert total >= place.count, f"{place.function} is called {total} times"
        chosen = [1 + (2 * i + 1) * total // (2 * place.count) for i in range(place.count)]
        found += [
            Trial(place.phase, Point(place.function, min(number, total), side), is_cold)
            for number in chosen
            for side in place.sides
        ]
    return found


@pytest.fixture(scope="module")
def whole(scene: Scene) -> Whole:
    return run_whole(scene)


def run_whole(scene: Scene) -> Whole:
    """Run a scene with an empty cache and with a full one, and choose where to kill."""
    scene = replace(scene, cache=scene.root / "cold cache")  # other tests may have filled the scene's own
    cold = scene.train(scene.root / "cold", counted=[place.function for place in COLD])
    warm = scene.train(scene.root / "warm", counted=[place.function for place in WARM])
    assert (cold.code, warm.code) == (0, 0), cold.err + warm.err
    found = digests(scene.root / "cold")
    assert found == digests(scene.root / "warm"), "a run that finds everything in the cache is the same run"
    kinds = {name.split("/")[0] for name in found}
    assert kinds == {"epochs", "checkpoints", "hero.safetensors", "previews.png", "metrics.jsonl"}
    return Whole(scene, found, trials(COLD, cold.calls, is_cold=True) + trials(WARM, warm.calls, is_cold=False))


def fault_of(scene: Scene, trial: Trial, expected: dict[str, str], folder: Path) -> str | None:
    """Kill a run at a point and go on; what is wrong then, or None."""
    run, cache = folder / "run", folder / "cache" if trial.is_cold else None
    killed = scene.train(run, points=[trial.point], cache=cache)
    if killed.code != -signal.SIGKILL:
        return f"{trial.point}: not reached, exit code {killed.code}: {killed.err}"
    resumed = scene.go_on(run, cache=cache)
    if resumed.code != 0:
        return f"{trial.point}: exit code {resumed.code}: {resumed.err}"
    found = digests(run)
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    leftovers = [file.name for file in folder.rglob("*") if is_partial(file)]
    if different or leftovers:
        return f"{trial.point}: differs in {different}, left over {leftovers}"
    shutil.rmtree(folder)
    return None


def check(whole: Whole, chosen: Sequence[Trial], folder: Path) -> None:
    def one(index: int) -> str | None:
        return fault_of(whole.scene, chosen[index], whole.digests, folder / str(index))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for fault in pool.map(one, range(len(chosen))) if fault]
    assert not faults, "\n".join(faults)


def test_a_run_killed_in_every_phase_ends_in_the_same_bytes(whole: Whole, tmp_path: Path) -> None:
    phases: dict[str, list[Trial]] = {}
    for trial in whole.trials:
        phases.setdefault(trial.phase, []).append(trial)
    # Before and after take turns, and so do early and late calls.
    check(whole, [found[index * len(found) // len(phases)] for index, found in enumerate(phases.values())], tmp_path)


@pytest.mark.slow
def test_a_run_killed_here_and_there_ends_in_the_same_bytes(whole: Whole, tmp_path: Path) -> None:
    check(whole, whole.trials[::5], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_flow_matching_run_killed_at_ten_points_ends_in_the_same_bytes(tmp_path: Path, command: CommandLine) -> None:
    options = ('lora.targets = ["attention"]', "lora.timestep_rank_min = 1", 'base.offload = "blocks"')
    (tmp_path / "scene").mkdir()
    whole = run_whole(make_scene(tmp_path / "scene", command, make_tiny_z_image, *options))
    chosen = [whole.trials[(2 * index + 1) * len(whole.trials) // 20] for index in range(10)]
    assert len({trial.phase for trial in chosen}) >= 5
    check(whole, chosen, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_a_run_killed_anywhere_ends_in_the_same_bytes(whole: Whole, tmp_path: Path, figure: Figure) -> None:
    assert len(whole.trials) >= 60
    check(whole, whole.trials, tmp_path)
    figure("Exact resume", f"{len(whole.trials)} of {len(whole.trials)} on CPU")
