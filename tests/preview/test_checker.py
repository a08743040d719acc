"""An epoch's end: previews and their check."""

import json
from pathlib import Path

import torch

from sdlora.data.cache import Cache
from sdlora.events import CopyChecked, PreviewsDone
from sdlora.lora.inject import inject
from sdlora.lora.targets import find_targets
from sdlora.models.load import load_base
from sdlora.pocket.world import random_scene, render
from sdlora.preview.arbiter import Arbiters
from sdlora.preview.checker import Checker
from sdlora.preview.nulls import Gallery
from sdlora.preview.sampler import PreviewRequest


def test_an_epoch_is_drawn_checked_and_kept(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = inject(base.unet, find_targets(base.unet, ["cross_attention"], base.text_encoder), 2, 2.0, 0)
    gallery = Gallery({f"{i}.png": render(random_scene(i)) for i in range(3)}, {})
    request = PreviewRequest(("a red cat", "a dog"), (0, 1), "", 2, 5.0, num_captions=1)
    checker = Checker(base, adapter, request, gallery, Cache(tmp_path / "cache", base), "unet", Arbiters())
    list(checker.prepare())
    *_, drawn, event = checker.epoch(3, tmp_path / "3")
    assert isinstance(drawn, PreviewsDone)
    assert isinstance(event, CopyChecked)
    assert (event.epoch, event.verdict) == (3, "clean")
    kept = json.loads((tmp_path / "3" / "copycheck.json").read_text())
    assert set(kept) == {
        "verdict", "reason", "share", "share_lower_bound", "false_alarm_rate", "signals", "previews",
    }  # fmt: skip
    assert [preview["kind"] for preview in kept["previews"]] == ["training", "training", "novel", "novel"]
    assert all((tmp_path / "3" / preview["file"]).exists() for preview in kept["previews"])
    assert event.most_alike[0] in gallery.pictures
