"""Exact resume: killed at any point and gone on with, a run ends in the bytes it would have ended in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from commandline import Point, Side
from scene import Scene, digests


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
    Place("start", "sdlora.run:prepare", ("after",)),
    Place("start", "pathlib:Path.write_bytes", ("torn",), 3),  # config.toml and state.json
    Place("caching", "sdlora.data.cache:save_file", ("torn", "after"), 3),
    Place("caching", "os:replace", ("before", "after"), 4),
    Place("null", "sdlora.preview.sampler:_draw", ("before", "after")),
    Place("null", "PIL.Image:Image.save", ("torn",), 3),
    Place("null", "sdlora.preview.nulls:null_scores", ("before", "after")),
]
WARM = [
    Place("step", "sdlora.training.loop:Trainer._step", ("before", "after"), 3),
    Place("step", "sdlora.training.loop:diffusion_loss", ("after",), 3),
    Place("step", "torch.optim.adamw:AdamW.step", ("before", "after"), 2),
    Place("step", "sdlora.training.averages:MovingAverage.update", ("before",), 2),
    Place("save", "sdlora.training.checkpoint:save_file", ("torn", "after"), 3),
    Place("save", "sdlora.training.checkpoint:write_json", ("before", "after"), 3),
    Place("save", "sdlora.training.checkpoint:shutil.rmtree", ("before", "after"), 2),
    Place("epoch's edge", "sdlora.training.loop:Trainer._epoch_done", ("before", "after"), 2),
    Place("epoch's edge", "sdlora.training.heldout:picture_losses", ("after",), 2),
    Place("preview", "sdlora.preview.sampler:_draw", ("before", "after"), 2),
    Place("preview", "PIL.Image:Image.save", ("torn",), 2),
    Place("check", "sdlora.preview.checker:check_previews", ("before", "after"), 2),
    Place("export", "sdlora.run:save_lora", ("before", "after"), 2),
    Place("export", "sdlora.lora.export:save_file", ("torn",), 2),
    Place("export", "sdlora.run:prove_lora", ("before", "after"), 2),
    Place("export", "sdlora.run:shutil.copyfile", ("torn", "after")),
    Place("report", "sdlora.run:write_report", ("before", "after"), 2),
    Place("report", "sdlora.run:contact_sheet", ("before",), 2),
    Place("any file", "os:replace", ("before", "after"), 5),
]


def points(places: Sequence[Place], calls: dict[str, int]) -> list[tuple[str, Point]]:
    """Phases and points: of every place its calls, spread from the first to the last."""
    found = []
    for place in places:
        total = calls[place.function]
        assert total >= place.count, f"{place.function} is called {total} times"
        chosen = [1 + (2 * i + 1) * total // (2 * place.count) for i in range(place.count)]
        found += [(place.phase, Point(place.function, min(n, total), side)) for n in chosen for side in place.sides]
    return found


def trial(scene: Scene, point: Point, folder: Path, expected: dict[str, str], cache: Path | None) -> str | None:
    """Kill a run at a point and go on; what is wrong then, or None."""
    run = folder / "run"
    killed = scene.train(run, points=[point], cache=cache)
    if killed.code != -9:
        return f"{point}: not reached, exit code {killed.code}: {killed.err}"
    resumed = scene.go_on(run, cache=cache)
    if resumed.code != 0:
        return f"{point}: exit code {resumed.code}: {resumed.err}"
    found = digests(run)
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    leftovers = [file.name for file in folder.rglob(".*partial*")]
    if different or leftovers:
        return f"{point}: differs in {different}, left over {leftovers}"
    shutil.rmtree(folder)
    return None


def spread(found: list[tuple[str, Point]], count: int) -> list[tuple[str, Point]]:
    """So many points, every phase among them."""
    return [found[i * len(found) // count] for i in range(count)]


@pytest.fixture(scope="module")
def expected(scene: Scene) -> tuple[dict[str, str], dict[str, int], dict[str, int]]:
    """The bytes of a run that nobody killed, and the calls it makes with an empty cache and with a full one."""
    cold = scene.train(scene.root / "cold", counted=[place.function for place in COLD])
    warm = scene.train(scene.root / "warm", counted=[place.function for place in WARM])
    assert (cold.code, warm.code) == (0, 0), cold.err + warm.err
    found = digests(scene.root / "cold")
    assert found == digests(scene.root / "warm")
    assert {name.split("/")[0] for name in found} == {
        "epochs",
        "checkpoints",
        "hero.safetensors",
        "previews.png",
        "metrics.jsonl",
    }
    return found, cold.calls, warm.calls


def check(scene: Scene, expected: tuple[dict[str, str], dict[str, int], dict[str, int]], root: Path, share: int) -> int:
    bytes_, cold, warm = expected
    # Calls of a full cache's run are counted from the same start, so only those before training lie elsewhere.
    chosen = [(point, True) for _, point in points(COLD, cold)] + [(point, False) for _, point in points(WARM, warm)]
    chosen = chosen[::share]

    def one(index: int) -> str | None:
        point, is_cold = chosen[index]
        folder = root / f"p{index}"
        return trial(scene, point, folder, bytes_, folder / "cache" if is_cold else None)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for fault in pool.map(one, range(len(chosen))) if fault]
    assert not faults, "\n".join(faults)
    return len(chosen)


def test_exact_resume_at_some_points(scene, expected, tmp_path):
    check(scene, expected, tmp_path, 4)


@pytest.mark.slow
def test_exact_resume(scene, expected, tmp_path):
    print(check(scene, expected, tmp_path, 1))
