"""The benchmarks' own parts, and the promises that the built-in base and the quickstart must keep.

The slow tests use the run that SDLORA_QUICKSTART_RUN names, or train the quickstart themselves.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import classifier
import generate
import learning
import pocket_quality
import pytest
from concepts import CONCEPTS
from PIL import Image

from sdlora.common.bundled import pocket_folder
from sdlora.config.toml import load_config
from sdlora.pocket import world
from sdlora.run.run import start


def test_intervals_are_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263 gives .2553 to .3662.
    low, high = generate.wilson(81 / 263, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_prompts_are_new() -> None:
    captions = {path.read_text().strip() for path in Path(world.__file__).parents[2].glob("datasets/zumi/**/*.txt")}
    prompts = learning.character_prompts(64)
    assert len(prompts) == 64
    assert not set(prompts) & captions
    assert all("zumi" in prompt for prompt in prompts)
    assert all(world.is_unseen(s.kind, s.color, s.place) for s in pocket_quality.unseen_scenes(50))


def test_labels_of_the_judges_images() -> None:
    kinds = [classifier.KINDS[classifier.sample(seed)[1][0]] for seed in range(300)]
    assert set(kinds) == set(classifier.KINDS)
    assert all(10 < kinds.count(name) < 50 for name in CONCEPTS)
    assert 20 < kinds.count(classifier.NOTHING) < 70


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> classifier.Judge:
    return classifier.load_or_train(tmp_path_factory.mktemp("judge") / "judge.pt")


@pytest.mark.slow
def test_the_judge_knows_renders_and_refuses_rubbish(judge: classifier.Judge) -> None:
    found = classifier.examine(judge, 1000)
    assert min(found[name] for name in ("kind", "color", "place", *CONCEPTS)) >= 0.97, found
    assert found["nothing"] >= 0.93, found
    grey = [Image.new("RGB", (64, 64), (shade, shade, shade)) for shade in range(0, 250, 25)]
    assert all(verdict.kind == classifier.NOTHING for verdict in classifier.look(judge, grey))


@pytest.mark.slow
def test_the_base_draws_what_it_is_asked_for(judge: classifier.Judge) -> None:
    found = pocket_quality.measure(pocket_folder(), judge, 100, generate.GUIDANCE)
    assert min(found["accuracy"].values()) >= BASE_ACCURACY, found
    assert found["psnr_db"] >= 28.0, found


@pytest.mark.slow
def test_the_quickstart_teaches_the_character(judge: classifier.Judge, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SDLORA_QUICKSTART_RUN", tmp_path / "run"))
    if not folder.is_dir():
        for _ in start(load_config("quickstart", ["preview.enabled=false"]), folder):
            pass
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validation = [row["heldout_loss"] for row in rows if row["event"] == "epoch"]
    assert min(validation[1:]) < validation[0], validation
    found = learning.measure(folder / "quickstart.safetensors", pocket_folder(), judge, 64, generate.GUIDANCE)
    assert found["base_share"] <= 0.05, found
    assert found["lora_share"] >= 0.75, found
    assert min(found["kept_ratio"].values()) >= 0.85, found


# The card's figures are over 500 prompts; over 100, a base that is right nine times in ten may show 85 %.
BASE_ACCURACY = 0.84
