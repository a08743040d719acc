"""A run on a flow-matching transformer: proof, coverage of its own noise levels, and resume in the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path

import pytest
import torch
from helpers.runs import digests, metrics, run, without_times
from helpers.tiny import make_tiny_klein, make_tiny_z_image
from safetensors import safe_open
from safetensors.torch import save_file

from sdlora.config.toml import parse_config
from sdlora.diffusion.timesteps import Density
from sdlora.errors import ConfigError
from sdlora.events import Exported
from sdlora.lora import inject, timestep_rank
from sdlora.lora.inject import find_targets
from sdlora.lora.timestep_rank import TimestepRank, quantiles_of
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import read_file
from sdlora.lora_files.timestep_ranks import apply_timestep_rank
from sdlora.models import flow_model
from sdlora.models.load import load_base
from sdlora.run.arguments import fit_images, read_images
from sdlora.run.run import Stopped
from sdlora.run.setup import fresh_base
from sdlora.training.train_step import StepResult, TrainStep


@dataclass(frozen=True)
class Flow:
    """A tiny base and what its runs' files say.

    Attributes:
        prefix: Of the names in its files.
        num_modules: With an adapter.
        log_shift: Of images of 32 px.
    """

    make: Callable[[Path], None]
    prefix: str
    num_modules: int
    architecture: str
    implementation: str
    log_shift: float


BASES = {
    "Z-Image": Flow(
        make_tiny_z_image, "diffusion_model.layers.", 14, "Z-Image/lora", "https://github.com/Tongyi-MAI/Z-Image",
        log(3),
    ),
    "klein": Flow(
        make_tiny_klein, "transformer.", 16, "Flux.2-klein-4b/lora", "https://github.com/black-forest-labs/flux2",
        0.5 + 0.65 * (16 - 256) / 3840,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=BASES)
def flow(request: pytest.FixtureRequest) -> Flow:
    return BASES[request.param]


@pytest.fixture(scope="module")
def base(flow: Flow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    flow.make(folder)
    return folder


@pytest.fixture
def options(overrides: list[str], base: Path, others: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    # klein pads captions to 512 tokens, which says nothing more here.
    monkeypatch.setattr(flow_model, "MAX_TOKENS", 96)
    return [
        *overrides, f"base.path={base}", 'lora.targets=["attention", "mlp"]', f"data.validation_folder={others}",
        "data.repeats=3", "train.log_every_steps=1", "preview.guidance=3", "loss.weighting=min_snr",
    ]  # fmt: skip


def test_a_run_ends_with_its_proof(options: list[str], flow: Flow, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    events = run(folder, [*options, "copycheck.enabled=true"])
    (exported,) = (event for event in events if isinstance(event, Exported))
    assert (exported.max_error, exported.num_modules) == (0.0, flow.num_modules)
    with safe_open(folder / "hero.safetensors", framework="pt") as file:
        names, header = list(file.keys()), file.metadata()
    assert len(names) == 2 * flow.num_modules
    assert all(name.startswith(flow.prefix) for name in names)
    assert header["modelspec.architecture"] == flow.architecture
    assert header["modelspec.implementation"] == flow.implementation
    assert "modelspec.prediction_type" not in header
    rows = metrics(folder)
    # Every image's exposures fall one into each of as many equal slices of the density that the model's shift moves.
    edges = Density("logit_normal", mean=flow.log_shift).edges
    slices: dict[str, list[int]] = {}
    for row in (row for row in rows if row["event"] == "step"):
        for name, timestep in zip(row["examples"], row["timesteps"], strict=True):  # type: ignore[call-overload]
            middle = (edges[timestep] + edges[timestep + 1]) / 2
            slices.setdefault(name, []).append(int(middle * 6))
    assert all(sorted(found) == list(range(6)) for found in slices.values())
    assert rows[-1]["heldout_change"] is not None


def test_a_stopped_run_resumes_in_the_same_bytes(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (whole, cut):
        folder.parent.mkdir()
    run(whole, options)
    done, original = [0], TrainStep.run

    def count(self: TrainStep, step: int, micro_batch_size: int) -> StepResult:
        done[0] += 1
        return original(self, step, micro_batch_size)

    monkeypatch.setattr(TrainStep, "run", count)
    for steps in (2, 5):
        last = done[0] + steps
        with pytest.raises(Stopped):
            run(cut, options, resume=steps > 2, should_stop=lambda last=last: done[0] >= last)
    run(cut, options, resume=True)
    assert digests(cut) == digests(whole)
    assert without_times(metrics(cut)) == without_times(metrics(whole))


def test_sizes_that_do_not_divide_into_patches_are_refused(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.bucket_step_px.*8"):
        run(tmp_path / "run", [*options, "data.bucket_step_px=4", "data.resolution_px=36"])


def test_captions_that_are_cut_off_are_named(base: Path, images: Path) -> None:
    config = parse_config({"data": {"folder": str(images), "trigger": "zumi", "resolution_px": 32}}, name="x")
    loaded = load_base(str(base), device=torch.device("cpu"), dtype=torch.float32)
    read = read_images(config.data, 0)
    assert not any("tokens" in notice for notice in fit_images(read, loaded, config.data, 1).notices)
    loaded.max_tokens = 5
    (notice,) = (notice for notice in fit_images(read, loaded, config.data, 1).notices if "tokens" in notice)
    assert "5 tokens" in notice and "windows" not in notice


def test_a_prediction_type_is_refused(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base\.prediction_type"):
        run(tmp_path / "run", [*options, "base.prediction_type=epsilon"])


def test_files_are_merged_into_the_transformer(base: Path, tmp_path: Path) -> None:
    plain = load_base(str(base), device=torch.device("cpu"), dtype=torch.float32)
    path, file = find_targets(plain.network, ["attention"])[-1], tmp_path / "lora.safetensors"
    own = plain.network.get_submodule(path).weight
    down, up = torch.ones(2, own.shape[1]), torch.ones(own.shape[0], 2)
    save_file({f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}, file)
    merge = [{"file": str(file), "weight": 0.5}]
    config = parse_config({"data": {"folder": "x"}, "base": {"path": str(base), "merge": merge}}, name="x")
    merged = fresh_base(config, torch.device("cpu"), torch.float32)
    for network in (merged.network, merged.fresh_pipeline().transformer):
        torch.testing.assert_close(network.get_submodule(path).weight, own + 1)


def test_ranks_follow_the_quantiles_of_training_through_file_and_pipeline(
    options: list[str], flow: Flow, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    seen: list[torch.Tensor] = []
    original = timestep_rank.rank_mask

    def watch(timesteps: torch.Tensor, rank: int, setting: TimestepRank) -> torch.Tensor:
        seen.append(timesteps)
        return original(timesteps, rank, setting)

    monkeypatch.setattr(inject, "rank_mask", watch)
    changes = ["lora.rank=4", "lora.timestep_rank_min=1", "preview.enabled=false", "train.epochs=1"]
    events = run(folder, [*options, *changes])
    # Whole numbers, which the network is not told.
    assert seen and all(torch.equal(found, found.round()) for found in seen if len(found) < 3)
    (exported,) = (event for event in events if isinstance(event, Exported))
    assert exported.max_error == 0.0
    file = folder / "hero.safetensors"
    with safe_open(file, framework="pt") as opened:
        setting = timestep_rank.timestep_rank_in(opened.metadata(), "hero")
    assert setting is not None
    assert setting.quantiles == quantiles_of(Density("logit_normal", mean=flow.log_shift).edges)
    loaded = load_base(str(base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = attach(loaded.network, read_file(file))
    expected = loaded.probe(loaded.network)[0]
    adapter.remove()
    with loaded.pipeline() as pipeline:
        pipeline.load_lora_weights(file)
        plain = loaded.probe(loaded.network)[0]
        apply_timestep_rank(pipeline, file)
        found = loaded.probe(loaded.network)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-6, rtol=1e-5)
