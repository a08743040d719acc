"""Runs that train their images at several sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from helpers.runs import digests, metrics, run, without_times

from sdlora.config.toml import parse_config
from sdlora.data.batches import Exposure
from sdlora.run import estimate
from sdlora.run.folder import RunFolder
from sdlora.run.run import Stopped
from sdlora.run.setup import RunContext, prepare
from sdlora.training.loss import ExposureLoss

SIZES = ["data.resolutions_px=[16, 32]", "data.repeats=3", "data.flip=true"]


@pytest.fixture
def context(tmp_path: Path, overrides: list[str]) -> RunContext:
    config = parse_config({}, name="n", overrides=[*overrides, *SIZES])
    return prepare(config, RunFolder(tmp_path / "run", "n"))


def num_steps(folder: Path) -> int:
    return sum(row["event"] == "step" for row in metrics(folder)) if (folder / "metrics.jsonl").is_file() else 0


def test_every_image_is_trained_at_every_size_in_every_epoch(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, examples = context.trainer, context.data.dataset.examples
    for epoch in trainer.schedule.epochs:
        seen = [exposure for step in epoch for batch in step for exposure in batch]
        counts = Counter((e.example, examples[e.example].at_exposure(e.number).bucket) for e in seen)
        for index, example in enumerate(examples):
            assert sorted(counts[index, bucket] for bucket in example.buckets) == [1, 2]
    # One timestep in each slice of an image's exposures, as with one size.
    for index in range(len(examples)):
        timesteps = sorted(t for e, t in trainer.schedule.timesteps.items() if e.example == index)
        assert [int(t * 6 // 1000) for t in timesteps] == list(range(6))
    list(context.data.fill("white", trainer.schedule.timesteps))
    loss = trainer.terms[0].loss
    assert isinstance(loss, ExposureLoss)
    factor, first = context.base.latent_factor, examples[0].buckets
    for number in (1, 2, 3):
        latents, _ = loss.latents_and_noise([Exposure(0, number)])
        width, height = first[(number - 1) % 2]
        assert latents.shape[2:] == (height // factor, width // factor)
    conditioned: list[object] = []
    monkeypatch.setattr(context.base, "size_conditions", lambda some: conditioned.extend(e.bucket for e in some) or {})
    context.data.text([(0, 1), (0, 2), (0, 3)])
    assert conditioned == [first[0], first[1], first[0]]


def test_run_of_several_sizes_resumes_in_the_same_bytes(tmp_path: Path, overrides: list[str]) -> None:
    options = [*overrides, *SIZES, "train.epochs=1", "train.log_every_steps=1", f"cache.dir={tmp_path / 'shared'}"]
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (whole, cut):
        folder.parent.mkdir()
    run(whole, options)
    with pytest.raises(Stopped):
        run(cut, options, should_stop=lambda: num_steps(cut) >= 4)
    assert 4 <= num_steps(cut) < num_steps(whole)
    run(cut, options, resume=True)
    assert digests(cut) == digests(whole)
    assert without_times(metrics(cut)) == without_times(metrics(whole))


def test_estimate_lists_every_size_and_counts_the_largest(context: RunContext) -> None:
    found = estimate.estimate_config(context.config, None)
    assert found.buckets == {"16x16": 5, "32x32": 3, "40x24": 2}
    assert estimate.memory_inputs(context, context.config).size_px == (32, 32)
    assert found.steps == context.trainer.total_steps
