"""A small run that has every phase of a large one, and the bytes that it must end in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.commandline import CommandLine, Outcome, Point
from helpers.tiny import make_tiny_pipeline
from PIL import Image, ImageDraw


@dataclass
class Scene:
    """A base, images and a configuration, and a command line to train them on.

    Attributes:
        root: The folder of everything.
        command: The command line.
        cache: A cache that is filled by the first run.
    """

    root: Path
    command: CommandLine
    cache: Path

    @property
    def config(self) -> Path:
        return self.root / "hero.toml"

    def arguments(
        self, run: Path, *, resume: bool = False, cache: Path | None = None, changes: Sequence[str] = ()
    ) -> list[str]:
        """`train`, into a run's folder."""
        sets = [f"cache.dir={cache or self.cache}", *changes]
        flags = [part for change in sets for part in ("--set", change)] + (["--resume"] if resume else [])
        return ["train", str(self.config), "--output", str(run), *flags]

    def train(self, run: Path, *, points: Sequence[Point] = (), counted: Sequence[str] = (), **options: Any) -> Outcome:
        """Train, or go on, and wait."""
        return self.command.run(*self.arguments(run, **options), points=points, counted=counted)

    def go_on(self, run: Path, **options: Any) -> Outcome:
        """What a person does after a crash: resume, or start where nothing had begun."""
        return self.train(run, resume=(run / "config.toml").exists(), **options)


def make_scene(
    root: Path, command: CommandLine, make_base: Callable[[Path], None] = make_tiny_pipeline, *options: str
) -> Scene:
    """A scene on a tiny base, with further options of its sections `base` and `lora` as dotted TOML."""
    make_base(root / "tiny")
    folder = root / "set"
    folder.mkdir()
    for index, color in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).ellipse((4 + index, 4, 24, 26), fill=color)
        image.save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"a {color} ball", encoding="utf-8")
    validation = root / "heldout"
    validation.mkdir()
    Image.new("RGB", (32, 32), "orange").save(validation / "orange.png")
    (validation / "orange.txt").write_text("an orange wall", encoding="utf-8")
    scene = Scene(root, command, root / "cache")
    further = "\n        ".join(options)
    scene.config.write_text(
        f"""
        base.path = "{root / "tiny"}"
        lora.rank = 2
        lora.alpha = 2
        {further}
        preview = {{ num_steps = 1, num_captions = 1, prompts = ["a red ball"], seeds = [0] }}
        [data]
        folder = "{folder}"
        validation_folder = "{validation}"
        trigger = "zumi"
        resolution_px = 32
        bucket_step_px = 8
        repeats = 3
        [train]
        epochs = 2
        batch_size = 2
        ema_decay = 0.9
        learning_rate = 1e-2
        checkpoint_every_steps = 2
        log_every_steps = 2
        device = "cpu"
        precision = "fp32"
        """,
        encoding="utf-8",
    )
    return scene


def digests(run: Path) -> dict[str, str]:
    """What a finished run must be, byte for byte: files by name, but for the times that are written into some."""
    found = {}
    for file in sorted([*run.rglob("*.safetensors"), *run.rglob("*.png"), *run.rglob("copycheck.json")]):
        content = file.read_bytes()
        if file.suffix == ".safetensors" and "checkpoints" not in file.parts:
            content = content[8 + int.from_bytes(content[:8], "little") :]  # the header holds the time of writing
        found[str(file.relative_to(run))] = hashlib.sha256(content).hexdigest()
    for file in sorted(run.glob("checkpoints/*/complete.json")):
        counters = json.loads(file.read_text(encoding="utf-8"))
        # The metrics hold seconds, in more or fewer digits.
        del counters["extra"]["metrics_bytes"], counters["sha256"]
        found[str(file.relative_to(run))] = json.dumps(counters)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found["metrics.jsonl"] = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    return found
