"""The end of an epoch: previews, their check, and the other signals."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checks import textured

from sdlora.cache.tensors import Cache
from sdlora.common.bundled import ImageFolder
from sdlora.copycheck import checker as checker_module
from sdlora.copycheck.checker import Checker
from sdlora.copycheck.decoded import through_vae
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.scale import Gallery, make_gallery
from sdlora.copycheck.verdict import EpochCheck
from sdlora.data.dataset import load_dataset
from sdlora.events import CopyChecked, EpochDone, PreviewsDone
from sdlora.lora.inject import Adapter, find_targets, inject
from sdlora.models.load import load_base
from sdlora.pocket.world import random_scene, render
from sdlora.previews.sampler import PreviewRequest
from sdlora.training.data import TrainingData
from sdlora.training.validation import Validation


@pytest.fixture
def parts(tiny_base: Path, tmp_path: Path) -> tuple[Adapter, Checker, Validation]:
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(5):
        render(random_scene(index)).resize((32, 32)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"scene {index}")
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = inject(base.network, find_targets(base.network, ["cross_attention"], base.text_encoders), 2, 2.0, 0)
    whole = load_dataset(ImageFolder(str(folder)))
    trained, held = replace(whole, examples=whole.examples[:3]), replace(whole, examples=whole.examples[3:])
    cache = Cache(tmp_path / "cache", base)
    data, kept = (TrainingData(d, cache, lambda i, _, d=d: d.examples[i].caption) for d in (trained, held))
    validation = Validation(kept, adapter, 0)
    list(kept.fill("white"))
    request = PreviewRequest(("scene 0", "a dog"), (0, 1), "", 2, 5.0, num_captions=1)
    gallery = make_gallery(trained, held, "white")
    return adapter, Checker(adapter, data, validation, 0, request, gallery, Embedders()), validation


def test_epoch_writes_previews_and_check(parts: tuple[Adapter, Checker, Validation], tmp_path: Path) -> None:
    _, checker, _ = parts
    list(checker.prepare("white"))
    *_, drawn, event = checker.epoch(0, tmp_path / "0", tmp_path / "0")
    assert isinstance(drawn, PreviewsDone)
    assert isinstance(event, CopyChecked)
    assert (event.epoch, event.verdict) == (0, "clean")
    kept = json.loads((tmp_path / "0" / "copycheck.json").read_text())
    assert set(kept) == {
        "verdict", "reason", "share", "share_lower_bound", "false_alarm_rate", "signals", "previews",
        "copied_images", "advice",
    }  # fmt: skip
    assert [preview["kind"] for preview in kept["previews"]] == ["training", "training", "novel", "novel"]
    assert all((tmp_path / "0" / preview["file"]).exists() for preview in kept["previews"])
    assert all(preview["guidance_norm"] > 0 for preview in kept["previews"])
    assert event.most_similar[0] in ("0.png", "1.png", "2.png")
    assert kept["signals"] == {}


def test_signals_are_zero_for_an_untrained_adapter(parts: tuple[Adapter, Checker, Validation], tmp_path: Path) -> None:
    adapter, checker, validation = parts
    list(checker.prepare("white"))
    list(checker.epoch(0, tmp_path / "0", tmp_path / "0"))

    def signals_of(epoch: int) -> dict[str, Any]:
        validation.measure(EpochDone(epoch, 1, None, None, 0.0))
        list(checker.epoch(epoch, tmp_path / str(epoch), tmp_path / "0"))
        found: dict[str, Any] = json.loads((tmp_path / str(epoch) / "copycheck.json").read_text())["signals"]
        return found

    untrained = signals_of(1)
    assert set(untrained) == {
        "self_retrieval",
        "train_heldout_gap",
        "seed_collapse",
        "guidance_norm",
        "registered_likeness",
        "preview_change",
    }
    # B is zero, so the adapter has no effect yet.
    assert [untrained[name]["value"] for name in ("self_retrieval", "train_heldout_gap", "seed_collapse")] == [0, 0, 0]
    assert untrained["preview_change"]["value"] == pytest.approx(1.0)
    assert untrained["guidance_norm"]["value"] == pytest.approx(1.0)
    assert not any(signal["outside"] for signal in untrained.values())
    with torch.no_grad():
        for up in adapter.up_parameters():
            up.normal_(generator=torch.Generator().manual_seed(0))
    trained = signals_of(2)
    for name in ("train_heldout_gap", "seed_collapse", "guidance_norm", "registered_likeness"):
        assert trained[name]["value"] != pytest.approx(untrained[name]["value"]), name


def test_parts_are_looked_for_where_they_are_asked_for(
    parts: tuple[Adapter, Checker, Validation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cv2")
    _, plain, _ = parts
    gallery = Gallery({f"{index}.png": textured(index) for index in range(3)}, {})
    files = plain.request.file_names()

    def drawn(base: Any, request: Any, epoch: int, folder: Path, watch: Any) -> Iterator[PreviewsDone]:
        (folder / "previews").mkdir(parents=True)
        for index, name in enumerate(files):
            preview = textured(10 + index)
            if epoch == 1 and index == 2:
                preview.paste(gallery.images["1.png"].crop((20, 40, 140, 160)), (120, 100))
            preview.save(folder / "previews" / name)
        yield PreviewsDone(epoch, [], 0.0)

    monkeypatch.setattr(checker_module, "draw_epoch", drawn)
    monkeypatch.setattr(Checker, "_signals", lambda *_: [])
    found = {}
    for asked in (False, True):
        checker = replace(plain, gallery=gallery, finds_parts=asked)
        list(checker.prepare("white"))
        for epoch in (0, 1):
            list(checker.epoch(epoch, tmp_path / f"{asked}{epoch}", tmp_path / f"{asked}0"))
        check = EpochCheck.read(tmp_path / f"{asked}1")
        assert check is not None
        found[asked] = check
    assert found[False].signals == {}
    assert found[True].signals["parts"]["value"] == 1 / 4
    assert [match.part for match in found[False].previews] == [None] * 4
    shown = [match.part for match in found[True].previews]
    assert shown[2] is not None and shown[2].name == "1.png"
    assert [part for part in shown if part is not None] == [shown[2]]
    assert found[True].verdict == found[False].verdict  # it decides nothing


def test_previews_are_compared_as_the_base_model_sees_and_draws_images(
    parts: tuple[Adapter, Checker, Validation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, checker, _ = parts
    list(checker.prepare("white"))
    drawn = [through_vae(checker.data.cache.base, image) for image in checker.gallery.images.values()]
    soft = [image.tobytes() for image in checker._drawn.images.values()]
    # The cache rounds latents to float16.
    assert all(np.abs(np.asarray(a, int) - np.frombuffer(b, np.uint8).reshape(32, 32, 3)).max() <= 3
               for a, b in zip(drawn, soft, strict=True))  # fmt: skip
    with torch.no_grad():
        for up in adapter.up_parameters():
            up.normal_(generator=torch.Generator().manual_seed(0))
    list(checker.epoch(0, tmp_path / "0", tmp_path / "0"))
    with adapter.disabled():
        again = replace(checker)
        list(again.prepare("white"))
        off = again.compare(tmp_path / "0", [])
    check = EpochCheck.read(tmp_path / "0")
    assert check is not None
    assert all(-1 <= (match.features or -2) <= 1 for match in check.previews)
    on = checker.compare(tmp_path / "0", [])
    assert [match.features for match in on.previews] == [match.features for match in off.previews]
    monkeypatch.setattr(checker_module, "feature_block", lambda _: None)
    list(checker.prepare("white"))
    without = checker.compare(tmp_path / "0", [])
    assert all(match.features is None for match in without.previews)


@pytest.mark.parametrize(("significant", "drawn"), [(0, 4), (1, 24), (4, 4)])
def test_more_previews_are_drawn_only_where_a_few_are_significant(
    significant: int, drawn: int, parts: tuple[Adapter, Checker, Validation], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _, checker, validation = parts
    list(checker.prepare("white"))
    list(checker.epoch(0, tmp_path / "0", tmp_path / "0"))
    real = checker_module.match_previews

    def found(request: PreviewRequest, *arguments: Any) -> Any:
        matches, measured = real(request, *arguments)
        count = significant if request == checker.request else 0
        return [replace(match, significant=index < count) for index, match in enumerate(matches)], measured

    monkeypatch.setattr(checker_module, "match_previews", found)
    validation.measure(EpochDone(1, 1, None, None, 0.0))
    list(checker.epoch(1, tmp_path / "1", tmp_path / "0"))
    check = EpochCheck.read(tmp_path / "1")
    assert check is not None and len(check.previews) == drawn
    assert len(list((tmp_path / "1" / "previews").glob("*.png"))) == drawn
    assert check.share == significant / drawn
    assert sum(image.matches for image in check.copied_images) == significant
    assert all(image.exposures == 1 for image in check.copied_images)


def test_resumed_run_holds_later_epochs_against_the_base_model(
    parts: tuple[Adapter, Checker, Validation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the base model draws cannot be a copy, whether it was drawn by this process or before."""
    _, checker, validation = parts
    real = checker_module.match_previews

    def all_significant(*arguments: Any) -> Any:
        matches, measured = real(*arguments)
        return [replace(match, significant=True) for match in matches], measured

    monkeypatch.setattr(checker_module, "match_previews", all_significant)
    list(checker.prepare("white"))
    list(checker.epoch(0, tmp_path / "0", tmp_path / "0"))
    before = checker._scale.among
    list(checker.prepare("white"))
    plain = checker._scale.among
    validation.measure(EpochDone(1, 1, None, None, 0.0))
    list(checker.epoch(1, tmp_path / "1", tmp_path / "0"))
    assert len(before) == len(plain) + 4
    assert torch.equal(checker._scale.among, before)
