"""What is drawn, and what of it is checked for copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import CONFIG, digests, run
from PIL import Image

from sdlora.common.bundled import ImageFolder
from sdlora.config.schema_preview import PreviewConfig
from sdlora.config.toml import load_config, toml_value
from sdlora.copycheck.verdict import EpochCheck
from sdlora.data.dataset import Dataset, load_dataset
from sdlora.events import PlanMade, PreviewsDone, Progress
from sdlora.run.preview_requests import drawing_share, further_requests, preview_request, rounds_within_epochs
from sdlora.run.run import start

TABLES: dict[str, dict[str, Any]] = {
    "negative_prompt": {"negative_prompt": "blue"},
    "seeds": {"seeds": [1]},
    "num_steps": {"num_steps": 4},
    "guidance": {"guidance": 3.0},
    "sampler": {"sampler": "euler"},
    "width_px": {"width_px": 64},
    "height_px": {"height_px": 64},
    "lora_scale": {"lora_scale": 0.25},
}


def within(run: Path) -> dict[str, bytes]:
    """The previews within the epochs."""
    return {str(file.relative_to(run)): file.read_bytes() for file in run.glob("steps/*/previews/*.png")}


@pytest.fixture
def dataset(images: Path) -> Dataset:
    return load_dataset(ImageFolder(str(images), trigger="zumi"), ImageFolder(str(images), name="b", trigger="kolo"))


def test_trigger_stands_in_the_prompts_of_a_configuration(dataset: Dataset) -> None:
    preview = PreviewConfig(
        prompts=["{trigger}, night", "a red ball", {"text": "{trigger} at sea", "lora_scale": 0.5}], num_captions=0
    )
    request = preview_request(preview, dataset)
    assert request.prompts == ("zumi, night", "kolo, night", "a red ball")
    (further,) = further_requests(preview, dataset, request)
    assert further.prompts == ("zumi at sea", "kolo at sea")
    assert further.file_names() == ["prompt03_seed0.png", "prompt04_seed0.png"]
    assert further.labels() == ["zumi at sea (LoRA at 0.5)", "kolo at sea (LoRA at 0.5)"]


def test_prompts_that_differ_in_their_seeds_alone_are_checked(dataset: Dataset) -> None:
    preview = PreviewConfig(
        prompts=["a", {"text": "b", "seeds": [4, 5]}, {"text": "c", "guidance": 2.0}], seeds=[0], num_captions=1
    )
    request = preview_request(preview, dataset)
    assert request.wanted()[1:] == [("a", 0), ("b", 4), ("b", 5)]
    assert request.kinds() == ["training", "novel", "novel", "novel"]
    assert request.file_names()[1:] == ["prompt01_seed0.png", "prompt02_seed4.png", "prompt02_seed5.png"]
    assert {seed for _, seed in request.more(8).wanted()} == {6, 7}
    (further,) = further_requests(preview, dataset, request)
    assert further.prompts == ("c",) and further.guidance == 2.0 and further.num_steps == request.num_steps


def test_without_a_prompt_that_is_checked_some_are_made(dataset: Dataset) -> None:
    made = preview_request(PreviewConfig(), dataset)
    preview = PreviewConfig(prompts=[{"text": "a", "width_px": 64}])
    assert preview_request(preview, dataset).prompts == made.prompts
    assert len(further_requests(preview, dataset, made)) == 1


def test_every_setting_of_a_prompt_changes_its_image_alone(tmp_path: Path, overrides: list[str]) -> None:
    prompts = ["a red ball", *({"text": "a red ball", **table} for table in TABLES.values() if "seeds" not in table)]
    other = [{"text": "a blue cat", **TABLES["seeds"]}]
    given = PreviewConfig(prompts=[*prompts, *other]).model_dump()["prompts"]
    sets = ["data.repeats=4", "train.learning_rate=1e-2", "train.epochs=1", "copycheck.enabled=true"]
    sets += [f"preview.prompts={toml_value(given)}", "preview.every_steps=5"]
    events = run(tmp_path / "run", [*overrides, *sets])
    folder = tmp_path / "run" / "epochs"
    plan = next(event for event in events if isinstance(event, PlanMade))
    assert plan.previews == len(given)
    # Checked are the plain prompt and the one with another seed; the others follow.
    names = ["prompt00_seed0.png", "prompt01_seed1.png", *(f"prompt{i:02}_seed0.png" for i in range(2, len(given)))]
    drawn = [(folder / "1" / "previews" / name).read_bytes() for name in names]
    assert len(set(drawn)) == len(given)
    kinds = [name for name in TABLES if name != "seeds"]
    size = {name: Image.open(folder / "1" / "previews" / names[2 + i]).size for i, name in enumerate(kinds)}
    assert size["width_px"] == (64, 32) and size["height_px"] == (32, 64) and size["lora_scale"] == (32, 32)
    # The strength of a LoRA that is not there changes nothing.
    plain, scaled = (
        np.asarray(Image.open(folder / "0" / "previews" / names[i]), dtype=int)
        for i in (0, 2 + kinds.index("lora_scale"))
    )
    assert np.abs(plain - scaled).max() <= 1  # another batch rounds otherwise
    index = json.loads((tmp_path / "run" / "previews.json").read_text())
    assert [one["file"] for one in index] == names and [one["checked"] for one in index] == [True] * 2 + [False] * 7
    # The copy check leaves further previews out, and the page shows them.
    check = EpochCheck.read(folder / "1")
    assert check is not None and [match.file.rpartition("/")[2] for match in check.previews[:2]] == names[:2]
    assert not {match.file.rpartition("/")[2] for match in check.previews} & set(names[2:])
    assert (tmp_path / "run" / "steps" / "5" / "previews" / names[-1]).is_file()
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Further previews" in report and "a red ball (64x32)" in report and "a red ball (LoRA at 0.25)" in report
    assert f'href="epochs/1/previews/{names[2]}"' in report and f'href="steps/5/previews/{names[0]}"' in report


@pytest.mark.slow
def test_previews_within_epochs_leave_the_rest_of_a_run_as_it_is(tmp_path: Path, overrides: list[str]) -> None:
    run(tmp_path / "plain", overrides)
    events = run(tmp_path / "run", [*overrides, "preview.every_steps=2"])
    steps = [event.step for event in events if isinstance(event, PreviewsDone) and event.step is not None]
    # Five images in two buckets and batches of two: three steps an epoch, the third and the sixth end one.
    assert steps == [2, 4] == sorted(int(path.name) for path in (tmp_path / "run" / "steps").iterdir())
    assert rounds_within_epochs(2, 6, 2) == 2 and rounds_within_epochs(2, 6, 2, after=2) == 1
    images = [
        tmp_path / "run" / place / "previews" / "prompt00_seed0.png" for place in ("steps/2", "steps/4", "epochs/1")
    ]
    assert len({image.read_bytes() for image in images}) == 3
    plain, found = digests(tmp_path / "plain"), digests(tmp_path / "run")
    kept = {name for name in plain if not name.startswith("checkpoints")}
    assert {name: found[name] for name in kept} == {name: plain[name] for name in kept}


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [1, 3])
def test_a_run_killed_while_previews_are_drawn_within_an_epoch_ends_in_the_same_bytes(
    tmp_path: Path, overrides: list[str], drawn: int
) -> None:
    table = '{text = "a red ball", lora_scale = 0.5}'
    sets = [*overrides, "preview.every_steps=2", f'preview.prompts=["a red ball", {table}]', "train.ema_decay=0.9"]
    run(tmp_path / "whole", sets)
    config = tmp_path / "hero.toml"
    config.write_text(CONFIG, encoding="utf-8")
    events, seen = start(load_config(str(config), sets), tmp_path / "run"), 0
    for event in events:
        seen += isinstance(event, Progress) and event.phase == "previews within an epoch"
        if seen == drawn:
            break
    events.close()  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "run" / "steps" / str(2 * -(-drawn // 2)))  # what it was drawing is drawn again
    list(start(load_config(str(config), sets), tmp_path / "run", resume=True))
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    assert within(tmp_path / "run") == within(tmp_path / "whole") and len(within(tmp_path / "run")) == 4


def test_the_price_of_drawing_counts_steps_guidance_and_pixels(dataset: Dataset) -> None:
    preview = PreviewConfig(
        prompts=["a", {"text": "b", "num_steps": 20}, {"text": "c", "guidance": 1.0}], num_captions=0, num_steps=10
    )
    request = preview_request(preview, dataset)
    assert drawing_share((request,)) == 1.0
    assert drawing_share((request, *further_requests(preview, dataset, request))) == 1 + 2 + 0.5
