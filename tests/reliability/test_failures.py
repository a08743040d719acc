"""Numbers that are none, memory that is full, people who stop, folders and bases that are not there."""

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
from helpers.commandline import Change, Outcome, Point, Side
from helpers.promises import Figure
from helpers.scene import Scene, digests
from safetensors.torch import load_file, save_file

STEPS_PER_EPOCH = 5


@pytest.fixture(scope="module")
def expected(scene: Scene) -> dict[str, str]:
    """What an undisturbed run ends in."""
    outcome = scene.train(scene.root / "undisturbed")
    assert outcome.code == 0, outcome.err
    return digests(scene.root / "undisturbed")


def said(outcome: Outcome) -> str:
    return " ".join(outcome.err.split())


def everything_is_whole(run: Path) -> None:
    """Every file of a run can be read to its end, and every number in it is one."""
    for file in run.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    for file in run.rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()), file
    assert not [file for file in run.rglob("*") if ".sdlora-partial-" in file.name]


REHEARSED = 3  # steps before the first
# The loss's, the gradient's and the latents' step is the point's own; what is broken between two steps shows in the
# next, or when it is to be saved.
NUMBERS: list[tuple[str, str, int, Side, Change, int]] = [
    ("loss", "sdlora.training.loss:diffusion_loss", REHEARSED + 7, "after", mishaps.no_numbers, 7),
    ("latents", "sdlora.training.loss:ExposureLoss.latents_and_noise", REHEARSED + 7, "after", mishaps.no_latents, 7),
    (
        "gradient",
        "sdlora.training.train_step:TrainStep.gradients",
        REHEARSED + 7,
        "after",
        mishaps.infinite_gradient,
        7,
    ),
    ("weight", "sdlora.training.train_step:TrainStep.run", 7, "after", mishaps.infinite_weight, 8),
    ("optimizer", "sdlora.training.train_step:TrainStep.run", 7, "after", mishaps.broken_optimizer, 8),
]


def test_no_number_stops_a_run_within_a_step(
    scene: Scene, expected: dict[str, str], tmp_path: Path, figure: Figure
) -> None:
    for name, function, call, side, change, step in NUMBERS:
        run = tmp_path / name
        outcome = scene.train(run, points=[Point(function, call, side, change)], changes=["train.log_every_steps=100"])
        assert outcome.code == 5, (name, outcome.err)
        assert f"step {step}" in said(outcome), (name, outcome.err)
        assert "Lower train.learning_rate" in said(outcome)
        kept = run / "epochs" / "1" / "adapter.safetensors"
        assert f"The last good epoch is kept: {kept}" in said(outcome), outcome.err
        assert json.loads((run / "state.json").read_text())["status"] == "failed"
        assert not (run / "hero.safetensors").exists()
        everything_is_whole(run)
        assert [path.name for path in (run / "checkpoints").iterdir()][-1:] != ["step-00000008"]
    # It goes on from the last checkpoint as if nothing had been.
    assert scene.go_on(run).code == 0
    assert digests(run) == expected
    figure("NaN, infinity", f"{len(NUMBERS)} of {len(NUMBERS)} sites")


def test_a_vae_without_numbers_is_told_with_the_image(scene: Scene, tmp_path: Path) -> None:
    point = Point("sdlora.models.sd:StableDiffusion.encode_pixels", 2, "after", mishaps.no_numbers)
    outcome = scene.train(tmp_path / "run", points=[point], cache=tmp_path / "cache")
    assert outcome.code == 5
    assert "NaN or infinite values for green.png" in said(outcome)
    assert scene.go_on(tmp_path / "run", cache=tmp_path / "cache").code == 0, "nothing of it is in the cache"


@pytest.mark.slow
def test_full_memory_names_the_setting_to_lower(
    scene: Scene, expected: dict[str, str], tmp_path: Path, figure: Figure
) -> None:
    places = {
        "load": (Point("sdlora.run.run:prepare", action="out of memory"), "train.precision = 'bf16' (now 'fp32'"),
        "cache": (
            Point("sdlora.models.sd:StableDiffusion.encode_pixels", action="out of memory"),
            "data.resolution_px = 24 (now 32",
        ),
        "step": (
            Point("sdlora.training.loss:diffusion_loss", REHEARSED + 4, action="out of memory"),
            "train.batch_size = 1 and train.gradient_accumulation_steps = 2 (now 2 and 1",
        ),
        "preview": (
            Point("sdlora.previews.sampler:_draw", 2, action="out of memory"),
            "preview.enabled=false (now true",
        ),
    }
    for name, (point, advice) in places.items():
        cache = tmp_path / "cache" if name == "cache" else None
        outcome = scene.train(tmp_path / name, points=[point], cache=cache)
        assert outcome.code == 4, (name, outcome.err)
        assert advice in said(outcome), outcome.err
        assert (tmp_path / name).exists() == (name != "load"), "where nothing was begun, nothing is written"
    assert scene.go_on(tmp_path / "step").code == scene.go_on(tmp_path / "preview").code == 0
    assert digests(tmp_path / "step") == digests(tmp_path / "preview") == expected
    figure("Full memory", "4 of 4 places (raised, not caused: no GPU here)")


@pytest.mark.slow
def test_a_run_goes_on_with_what_the_advice_says(scene: Scene, tmp_path: Path) -> None:
    step = Point("sdlora.training.loss:diffusion_loss", 4, "before", mishaps.too_large_for_two, every=True)
    assert scene.train(tmp_path / "step", points=[step]).code == 4
    outcome = scene.go_on(tmp_path / "step", points=[step], changes=["train.auto_batch=true"])
    assert outcome.code == 0, outcome.err
    preview = Point("sdlora.previews.sampler:_draw", 3, action="out of memory", every=True)
    assert scene.train(tmp_path / "preview", points=[preview]).code == 4
    outcome = scene.go_on(tmp_path / "preview", points=[preview], changes=["preview.enabled=false"])
    assert outcome.code == 0, outcome.err


def test_batches_in_parts_give_the_same_result(scene: Scene, tmp_path: Path, figure: Figure) -> None:
    changes = ["train.auto_batch=true", "preview.enabled=false", "train.max_grad_norm=1e-3"]
    full = Point("sdlora.training.loss:diffusion_loss", REHEARSED + 3, "before", mishaps.too_large_for_two, every=True)
    assert scene.train(tmp_path / "whole", changes=changes).code == 0
    outcome = scene.train(tmp_path / "parts", points=[full], changes=changes)
    assert outcome.code == 0, outcome.err
    assert "computed in parts of 1 from step 3 on, to the same result" in said(outcome)

    def rows(name: str) -> list[dict[str, object]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["event"] == "step"]

    keys = ("step", "examples", "visits", "timesteps", "lr")
    assert [[row[key] for key in keys] for row in rows("parts")] == [
        [row[key] for key in keys] for row in rows("whole")
    ]
    one, other = (load_file(tmp_path / name / "epochs" / "2" / "adapter.safetensors") for name in ("whole", "parts"))
    # The same sums in another order: float32 rounds them otherwise in the last places.
    difference = max(float((one[key] - other[key]).abs().max()) for key in one)
    moved = max(float(value.abs().max()) for key, value in one.items() if "lora_up" in key)
    assert moved > 0 and difference < 1e-4 * moved
    figure("Batches in parts", f"weights differ by {difference / moved:.0e} of the largest, as float32 rounds")


SIGNALS: list[tuple[str, Side, int]] = [
    ("sdlora.cache.tensors:Cache.fetch", "after", 1),
    ("sdlora.cache.tensors:Cache.fetch", "before", 4),
    ("sdlora.training.loss:diffusion_loss", "before", 1),
    ("sdlora.training.train_step:TrainStep.run", "after", 3),
    ("sdlora.training.train_step:TrainStep.run", "after", 5),
    ("sdlora.training.checkpoint:save_file", "before", 2),
    ("sdlora.training.checkpoint:save_file", "after", 1),
    ("sdlora.training.checkpoint:write_json", "after", 3),
    ("sdlora.previews.sampler:_draw", "after", 2),
    ("sdlora.run.export:verify_lora", "before", 1),
]


def stopped_and_gone_on(scene: Scene, expected: dict[str, str], trial: tuple[str, str, Side, int], run: Path) -> str:
    """Send a signal at a point; what is wrong then."""
    action, function, side, call = trial
    outcome = scene.train(run, points=[Point(function, call, side, action)])  # type: ignore[arg-type]
    code = {"interrupt": 130, "terminate": 143}[action]
    if outcome.code != code or "--resume" not in outcome.err or "Traceback" in outcome.err:
        return f"{trial}: exit code {outcome.code}: {outcome.err}"
    state = json.loads((run / "state.json").read_text())
    begun = call if function.endswith(".run") else None
    saved = max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/*")), default=0)
    if state["status"] != "stopped" or (begun is not None and saved != begun):
        return f"{trial}: {state}, saved at {saved}"
    outcome = scene.go_on(run)
    if outcome.code != 0 or digests(run) != expected:
        return f"{trial}: not gone on with, {outcome.err}"
    return ""


def check_signals(
    scene: Scene, expected: dict[str, str], chosen: list[tuple[str, str, Side, int]], folder: Path
) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [
            pool.submit(stopped_and_gone_on, scene, expected, trial, folder / str(i)) for i, trial in enumerate(chosen)
        ]
        faults = [fault for task in tasks if (fault := task.result())]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_a_signal_stops_a_run_that_can_go_on_here_and_there(
    scene: Scene, expected: dict[str, str], tmp_path: Path
) -> None:
    chosen = [("interrupt", *SIGNALS[0]), ("terminate", *SIGNALS[5]), ("interrupt", *SIGNALS[8])]
    check_signals(scene, expected, chosen, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_signal_stops_a_run_that_can_go_on(
    scene: Scene, expected: dict[str, str], tmp_path: Path, figure: Figure
) -> None:
    chosen = [(action, *point) for action in ("interrupt", "terminate") for point in SIGNALS]
    check_signals(scene, expected, chosen, tmp_path)
    figure("Stop", f"{len(chosen)} of {len(chosen)} signals")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_at_once_which_says_so_and_resumes(
    scene: Scene, expected: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    twice = [Point("sdlora.training.loss:diffusion_loss", REHEARSED + 5, "before", "interrupt")] * 2
    outcome = scene.train(run, points=twice)
    assert outcome.code == 130, outcome.err
    assert "--resume" in outcome.err and "Traceback" not in outcome.err
    assert json.loads((run / "state.json").read_text())["status"] == "stopped"
    assert scene.go_on(run).code == 0
    assert digests(run) == expected


@pytest.mark.slow
def test_ctrl_c_while_the_base_is_loaded_says_that_nothing_was_written(scene: Scene, tmp_path: Path) -> None:
    for times, told in ((1, "Stopping"), (2, "Nothing was written yet")):
        points = [Point("sdlora.run.setup:make_adapter", 1, "before", "interrupt")] * times
        outcome = scene.train(tmp_path / "run", points=points)
        assert outcome.code == 130, outcome.err
        assert told in outcome.err and "Traceback" not in outcome.err
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.slow
def test_a_read_only_cache_that_lacks_a_caption_is_told_before_the_run(scene: Scene, tmp_path: Path) -> None:
    arguments = scene.arguments(tmp_path / "run", changes=["data.caption_prefix=new"])
    outcome = scene.command.run(*arguments, prepare=mishaps.read_only_cache)
    assert outcome.code == 2 and "cache.dir" in said(outcome), outcome.err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() == 0:  # for whom a file's mode means nothing
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("root may not mount here")
        yield folder
        subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_a_folder_that_cannot_be_written_is_told_before_the_base_is_loaded(scene: Scene, read_only: Path) -> None:
    outcome = scene.train(read_only / "run", points=[Point("sdlora.run.run:prepare", action=mishaps.fails_inside)])
    assert outcome.code == 2, outcome.err
    assert "is read-only. Choose another --output" in said(outcome)


@pytest.mark.slow
def test_a_base_that_vanishes_stops_the_run_and_it_goes_on_when_the_base_is_back(
    scene: Scene, expected: dict[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(scene.root / "tiny", base)
    changes = [f"base.path={base}"]
    point = Point("sdlora.training.train_step:TrainStep.run", 2, "after", mishaps.base_vanishes)
    outcome = scene.train(tmp_path / "run", points=[point], changes=changes)
    assert outcome.code == 2 and "base" in outcome.err, outcome.err
    everything_is_whole(tmp_path / "run")
    outcome = scene.go_on(tmp_path / "run", changes=changes)
    assert outcome.code == 2 and "was not found" in said(outcome)
    base.with_name("away").rename(base)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    true = weights.read_bytes()
    tensors = load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    outcome = scene.go_on(tmp_path / "run", changes=changes)
    assert outcome.code == 2 and "another base" in said(outcome), outcome.err
    weights.write_bytes(true)
    assert scene.go_on(tmp_path / "run", changes=changes).code == 0
    assert digests(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(scene: Scene, expected: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = scene.command.run(*scene.arguments(run), prepare=mishaps.clock_jumps)
    assert outcome.code == 0, outcome.err
    assert digests(run) == expected


def test_resuming_a_run_older_than_the_copy_check_says_how_to_disable_it(scene: Scene, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert scene.train(run, points=[Point("sdlora.training.train_step:TrainStep.run", 4)]).code == -signal.SIGKILL
    (run / "epochs" / "0" / "copycheck.json").unlink()
    outcome = scene.go_on(run)
    assert outcome.code == 2
    assert "--set copycheck.enabled=false" in said(outcome)
    text = (run / "config.toml").read_text(encoding="utf-8")
    before, after = text.split("[copycheck]", 1)
    text = before + "[copycheck]" + after.replace("enabled = true", "enabled = false", 1)
    (run / "config.toml").write_text(text, encoding="utf-8")
    assert scene.go_on(run, changes=["copycheck.enabled=false"]).code == 0
