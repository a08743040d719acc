"""Exact resume with every kind of state that a run has: killed, a run of any settings ends in the same bytes.

SDLORA_KILLS=5 kills each of them at five places, 65 in all; one by default.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from helpers.commandline import Outcome, Point
from helpers.scene import Scene, digests

QUICK = ["preview.enabled=false", "copycheck.enabled=false"]
VARIANTS = {
    "moving average": ["train.ema_decay=0.5"],
    "DoRA": ["lora.dora=true"],
    "accumulation": ["train.gradient_accumulation_steps=2"],
    "several sets": [],  # made below
    "tags": ["data.shuffle_tags=true", "data.tag_dropout=0.3", "data.caption_dropout=0.2"],
    "dropout": ["lora.dropout=0.3"],
    "text encoder": ['lora.targets=["cross_attention", "text_encoder"]'],
    "Prodigy": ["train.optimizer=prodigy", "train.learning_rate=1.0"],
    "Lion": ["train.optimizer=lion"],
    "Adafactor": ["train.optimizer=adafactor"],
    "Muon": ["train.optimizer=muon"],
    "schedule-free": ["train.optimizer=schedule_free", "train.ema_decay=0"],
    "int8": ["base.quantization=int8"],
}
PLACES = [
    Point("sdlora.training.train_step:TrainStep.run", 3, "after"),
    Point("sdlora.training.checkpoint:save_file", 2, "torn"),
    Point("sdlora.training.checkpoint:write_json", 2, "before"),
    Point("sdlora.training.train_step:TrainStep.run", 5, "before"),
    Point("os:replace", 12, "after"),
]


def fault_at(scene: Scene, place: Point, changes: list[str], expected: dict[str, str], run: Path) -> str | None:
    killed = scene.train(run, points=[place], changes=changes)
    if killed.code != -signal.SIGKILL:
        return f"{place}: not reached, exit code {killed.code}: {killed.err}"
    resumed = scene.go_on(run, changes=changes)
    if resumed.code != 0:
        return f"{place}: exit code {resumed.code}: {resumed.err}"
    found = digests(run)
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{place}: differs in {different}" if different else None


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_any_settings_that_is_killed_ends_in_the_same_bytes(name: str, scene: Scene, tmp_path: Path) -> None:
    changes = [*QUICK, *VARIANTS[name]]
    if name == "several sets":
        folders = f'[{{ folder = "{scene.root / "set"}", repeats = 2 }}, {{ folder = "{scene.root / "heldout"}" }}]'
        changes += ['data.folder=""', 'data.validation_folder=""', f"data.sets={folders}"]
    whole = scene.train(tmp_path / "whole", changes=changes)
    assert whole.code == 0, whole.err
    expected, first = digests(tmp_path / "whole"), list(VARIANTS).index(name)
    places = [PLACES[(first + turn) % len(PLACES)] for turn in range(int(os.environ.get("SDLORA_KILLS", "1")))]
    faults = [
        fault
        for turn, place in enumerate(places)
        if (fault := fault_at(scene, place, changes, expected, tmp_path / str(turn)))
    ]
    assert not faults, "\n".join(faults)


def on_two(scene: Scene, run: Path, killed: int = 0, place: Point | None = None) -> list[Outcome]:
    """Train, or go on, with two processes as a launcher starts them; one of them may be killed somewhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = scene.arguments(run, resume=(run / "config.toml").exists(), changes=QUICK)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        scene.command.start(
            arguments,
            points=[place] if place is not None and index == killed else [],
            environment={**shared, "RANK": str(index), "LOCAL_RANK": str(index)},
        )
        for index in range(2)
    ]
    return [one.wait() for one in started]


@pytest.mark.slow
def test_a_run_on_two_processes_of_which_one_is_killed_ends_in_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    whole = on_two(scene, tmp_path / "whole")
    assert [one.code for one in whole] == [0, 0], whole
    expected = digests(tmp_path / "whole")
    # The second process saves nothing: it is killed where both compute.
    places = [(1, PLACES[0]), (0, PLACES[1]), (0, PLACES[2]), (1, PLACES[3]), (0, PLACES[4])]
    for turn, (killed, place) in enumerate(places[: int(os.environ.get("SDLORA_KILLS", "1"))]):
        run = tmp_path / str(turn)
        ended = on_two(scene, run, killed, place)
        assert ended[killed].code == -signal.SIGKILL and ended[1 - killed].code not in (0, None), (str(place), ended)
        resumed = on_two(scene, run)
        assert [one.code for one in resumed] == [0, 0], (str(place), resumed)
        assert digests(run) == expected, str(place)
