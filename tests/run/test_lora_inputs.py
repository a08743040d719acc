"""Training from a LoRA file, and on a base model with LoRAs merged into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.adapters import UNET_TARGETS, injected
from helpers.runs import digests, metrics, run, without_times
from helpers.tiny import make_tiny_pipeline
from helpers.trainers import diffusers_script, kohya_trainer
from safetensors.torch import load_file, save_file
from torch import nn

from sdlora.batch.jobs import Fingerprints
from sdlora.config.schema import LoraConfig
from sdlora.config.toml import dump_toml, load_config, parse_config
from sdlora.errors import ConfigError, DataError, OutputError
from sdlora.estimate.meta_model import shapes_of_base as shapes_of
from sdlora.events import Notice, StepDone
from sdlora.lora.inject import AdapterSpec
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import read_file
from sdlora.lora_files.write import LoraMetadata, save_lora
from sdlora.models.base import BaseModel
from sdlora.models.load import load_base
from sdlora.run.arguments import make_adapter, training_settings
from sdlora.run.estimate import estimate_shapes
from sdlora.run.lora_inputs import with_settings_of_file
from sdlora.run.run import Stopped
from sdlora.run.setup import BasePool, fresh_base

CPU = torch.device("cpu")
METADATA = LoraMetadata("hero", "folder/anime.safetensors", "stable-diffusion-v1", 64, None, 1, 1, 1.7e9, {})
MIXED: dict[str, Any] = {"r": 3, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 3, "attn2.to_k": 1}}


def fresh(base: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


def own(file: Path, pipeline: Any, spec: AdapterSpec, timestep_rank: TimestepRank | None = None) -> None:
    adapter = injected(pipeline, [*UNET_TARGETS, "text_encoder"], spec)
    metadata = METADATA if timestep_rank is None else LoraMetadata(**vars(METADATA) | {"timestep_rank": timestep_rank})
    save_lora(file, adapter.state(), metadata=metadata)


def lycoris_dora(file: Path, pipeline: Any) -> None:
    """kohya's file with LyCORIS' magnitudes by output, moved away from the norms of the base's weights."""
    kohya_trainer(file, pipeline, text=True)
    tensors = load_file(file)
    for name, weight in weights_by_kohya_name(pipeline).items():
        if f"{name}.alpha" in tensors:
            norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
            tensors[f"{name}.dora_scale"] = norm * torch.linspace(0.8, 1.3, len(norm)).reshape(norm.shape)
    save_file(tensors, file)


def weights_by_kohya_name(pipeline: Any) -> dict[str, torch.Tensor]:
    """The weights of a pipeline's layers by the names of their modules in kohya's files."""
    networks = {"lora_unet": pipeline.unet, "lora_te_text_model": pipeline.text_encoder}
    return {
        # From version 5 on, transformers has no text_model.
        f"{prefix}_{name.removeprefix('text_model.')}".replace(".", "_"): module.weight
        for prefix, network in networks.items()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


WRITERS: dict[str, Callable[[Path, Any], None]] = {
    "kohya": lambda file, pipeline: kohya_trainer(file, pipeline, text=True),
    "PEFT, mixed": lambda file, pipeline: diffusers_script(file, pipeline, old_names=False, **MIXED),
    "PEFT, DoRA": lambda file, pipeline: diffusers_script(file, pipeline, old_names=False, use_dora=True, **MIXED),
    "kohya, DoRA": lambda file, pipeline: lycoris_dora(file, pipeline),
    "own": lambda file, pipeline: own(file, pipeline, AdapterSpec(target_ranks={"mlp": 3}, rslora=True)),
    "own, DoRA": lambda file, pipeline: own(file, pipeline, AdapterSpec(dora=True)),
    "own, orthogonal": lambda file, pipeline: own(file, pipeline, AdapterSpec(init="orthogonal")),
    "own, timestep rank": lambda file, pipeline: own(
        file, pipeline, AdapterSpec(timestep_rank=TimestepRank(2, 1.5)), TimestepRank(2, 1.5)
    ),
}


@pytest.fixture
def lora(tiny_base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Writes a LoRA file in one of several forms."""

    def write(form: str) -> Path:
        file = tmp_path / "theirs.safetensors"
        WRITERS[form](file, fresh(tiny_base))
        return file

    return write


def without_settings(overrides: Sequence[str]) -> list[str]:
    """The settings of a small run without those that the file decides."""
    return [one for one in overrides if not one.startswith(("lora.rank", "lora.alpha"))]


def settings(tiny_base: Path, *overrides: str) -> Any:
    document = {"data": {"folder": "x"}, "base": {"path": str(tiny_base)}, "train": {"device": "cpu"}}
    return parse_config(document, name="x", overrides=overrides)


@torch.no_grad()
def predictions(base: BaseModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    text = base.encode_captions(["a red ball", "a cat"])
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return [base.predict(latents, torch.tensor([10, 700]), text), *text.values()]


def loaded(tiny_base: Path) -> BaseModel:
    return load_base(str(tiny_base), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("form", WRITERS)
def test_continued_adapter_predicts_exactly_as_the_file(
    form: str, tiny_base: Path, lora: Callable[[str], Path]
) -> None:
    file = lora(form)
    config = with_settings_of_file(settings(tiny_base, f"lora.from_file={file}", "lora.dropout=0.25"))
    base, other = loaded(tiny_base), loaded(tiny_base)
    adapter = make_adapter(config, base)
    expected = attach(other.network, read_file(file), text_encoders=other.text_encoders)
    for mine, theirs in zip(predictions(base), predictions(other), strict=True):
        assert torch.equal(mine, theirs)
    assert adapter.layers.keys() == expected.layers.keys()
    for path, layer in adapter.layers.items():
        assert (layer.rank, layer.alpha) == (expected.layers[path].rank, expected.layers[path].alpha)
        assert layer.dropout == 0.25 and all(parameter.requires_grad for parameter in layer.trained())
    ranks = {layer.rank for layer in adapter.layers.values()}
    assert {config.lora.rank, *config.lora.target_ranks.values()} <= ranks
    assert config.lora.dora == ("DoRA" in form)
    assert config.lora.timestep_rank_min == (2 if "timestep" in form else None)
    assert ("text_encoder" in config.lora.targets) == ("PEFT" not in form)
    assert training_settings(config).text_is_trained == ("PEFT" not in form)


@torch.no_grad()
def test_kohyas_dora_predicts_as_lycoris_computes_it(tiny_base: Path, lora: Callable[[str], Path]) -> None:
    tensors, pipeline, base = load_file(file := lora("kohya, DoRA")), fresh(tiny_base), loaded(tiny_base)
    plain = predictions(base)
    make_adapter(with_settings_of_file(settings(tiny_base, f"lora.from_file={file}")), base)
    mine = predictions(base)
    merged = loaded(tiny_base)
    pipeline.unet, pipeline.text_encoder = merged.network, merged.text_encoders[0]
    changed = 0
    # LyCORIS 4.1 (locon.py): W' = dora_scale (W + s B A) / (||W + s B A|| + eps), norms of rows.
    for name, weight in weights_by_kohya_name(pipeline).items():
        if f"{name}.alpha" not in tensors:
            continue
        down, up = (tensors[f"{name}.lora_{part}.weight"].float() for part in ("down", "up"))
        update = (up.flatten(1) @ down.flatten(1)).view_as(weight) * float(tensors[f"{name}.alpha"]) / len(down)
        total = weight + update
        norm = total.flatten(1).norm(dim=1).reshape(tensors[f"{name}.dora_scale"].shape)
        weight.copy_(total * tensors[f"{name}.dora_scale"] / (norm + torch.finfo(torch.float32).eps))
        changed += 1
    assert changed == len(tensors) // 4
    for found, expected, before in zip(mine, predictions(merged), plain, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert (found - before).norm() > 0.01 * before.norm()


def test_ranks_and_alphas_of_single_modules_are_kept(tiny_base: Path, lora: Callable[[str], Path]) -> None:
    tensors = load_file(file := lora("kohya"))
    names = sorted({key.partition(".")[0] for key in tensors})
    for index, name in enumerate(names):
        rank = 1 + index % 4
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:rank].contiguous()
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :rank].contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(0.5 + index % 3)
    save_file(tensors, file)
    adapter = make_adapter(with_settings_of_file(settings(tiny_base, f"lora.from_file={file}")), loaded(tiny_base))
    found = sorted((layer.rank, layer.alpha) for layer in adapter.layers.values())
    assert found == sorted((1 + index % 4, 0.5 + index % 3) for index in range(len(names)))


def test_file_of_every_target_trains_them_all(tiny_base: Path, lora: Callable[[str], Path]) -> None:
    config = with_settings_of_file(settings(tiny_base, f"lora.from_file={lora('own')}"))
    assert (
        config.lora.targets
        == LoraConfig(
            targets=["cross_attention", "self_attention", "mlp", "projection", "conv", "text_encoder"]
        ).targets
    )
    assert config.lora.target_ranks == {"mlp": 3} and config.lora.rank == 4
    assert config.lora.target_alphas == {} or config.lora.alpha > 0
    assert not config.lora.rslora


def test_settings_that_contradict_the_file_are_named_in_one_message(
    tiny_base: Path, lora: Callable[[str], Path]
) -> None:
    start = f"lora.from_file={lora('PEFT, DoRA')}"
    with pytest.raises(ConfigError) as caught:
        with_settings_of_file(
            settings(tiny_base, start, 'lora.targets=["mlp"]', "lora.rank=8", "lora.dora=false", "lora.alpha=6")
        )
    message = str(caught.value)
    assert "theirs.safetensors" in message
    assert 'lora.targets = ["cross_attention", "self_attention"] (given: ["mlp"])' in message
    assert "lora.dora = true (given: false)" in message and "lora.rank = 3 (given: 8)" in message
    assert "lora.alpha" not in message
    same = ['lora.targets=["self_attention", "cross_attention"]', "lora.rank=3", "lora.dora=true"]
    assert with_settings_of_file(settings(tiny_base, start, *same)).lora.rank == 3


def test_defaults_are_no_settings_however_often_they_are_written(
    tiny_base: Path, lora: Callable[[str], Path], tmp_path: Path
) -> None:
    config = settings(tiny_base, f"lora.from_file={lora('PEFT, DoRA')}")
    for form in ("unread", "read"):
        (tmp_path / f"{form}.toml").write_text(dump_toml(config), encoding="utf-8")
        again = load_config(str(tmp_path / f"{form}.toml"))
        copied = type(config).model_validate(again.model_dump(mode="json"))
        assert with_settings_of_file(again).lora == with_settings_of_file(copied).lora
        config = with_settings_of_file(config)
    assert (config.lora.rank, config.lora.dora) == (3, True)


def lokr(file: Path, pipeline: Any) -> None:
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": torch.ones(2, 2)}, file)


def with_module(name: str) -> Callable[[Path, Any], None]:
    def write(file: Path, pipeline: Any) -> None:
        kohya_trainer(file, pipeline)
        tensors = load_file(file)
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(64, 2)}
        save_file(tensors | {f"{name}.alpha": torch.tensor(1.0)}, file)

    return write


REFUSED: list[tuple[Callable[[Path, Any], None], list[str]]] = [
    (lokr, ["lora.from_file", "lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "LoKr"]),
    (with_module("lora_unet_time_embedding_linear_1"), ["lora_unet_time_embedding_linear_1", "cross_attention"]),
    (lambda file, pipeline: kohya_trainer(file, pipeline, alpha=None), ["no alpha", "lora_unet_", "sdlora convert"]),
    (lambda file, pipeline: kohya_trainer(file, pipeline, alpha=0.0), ["alpha", "is 0", "above 0"]),
    (lambda file, pipeline: kohya_trainer(file, pipeline, rank=300), ["theirs.safetensors", "rank", "256"]),
    (lambda file, pipeline: None, ["lora.from_file", "does not exist"]),
]


@pytest.mark.parametrize(("write", "facts"), REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(
    write: Callable[[Path, Any], None], facts: list[str], pipeline: Any, tiny_base: Path, tmp_path: Path
) -> None:
    write(tmp_path / "theirs.safetensors", pipeline)
    with pytest.raises((DataError, ConfigError)) as caught:
        with_settings_of_file(settings(tiny_base, f"lora.from_file={tmp_path / 'theirs.safetensors'}"))
    assert all(fact in str(caught.value) for fact in facts), str(caught.value)


def test_text_encoder_rate_needs_a_file_with_text_layers(tiny_base: Path, lora: Callable[[str], Path]) -> None:
    rate = "train.text_encoder_learning_rate=1e-5"
    with pytest.raises(ConfigError, match="text_encoder_learning_rate"):
        with_settings_of_file(settings(tiny_base, f"lora.from_file={lora('PEFT, mixed')}", rate))
    found = with_settings_of_file(settings(tiny_base, f"lora.from_file={lora('kohya')}", rate))
    assert training_settings(found).text_encoder_factor == pytest.approx(0.05)


def test_lora_of_another_family_is_refused_before_anything_is_written(tmp_path: Path, overrides: list[str]) -> None:
    make_tiny_pipeline(tmp_path / "wide", text_width=32)
    kohya_trainer(tmp_path / "wide.safetensors", fresh(tmp_path / "wide"))
    for option in (
        f"lora.from_file={tmp_path}/wide.safetensors",
        f'base.merge=[{{file="{tmp_path}/wide.safetensors"}}]',
    ):
        with pytest.raises(DataError, match=r"attn2_to_k.*text of width 32"):
            run(tmp_path / "run", [*without_settings(overrides), option])
        assert not (tmp_path / "run").exists()


def test_one_file_cannot_be_merged_and_continued(tiny_base: Path, lora: Callable[[str], Path], tmp_path: Path) -> None:
    file = lora("kohya")
    shutil.copy(file, tmp_path / "copy.safetensors")
    with pytest.raises(ConfigError, match="count twice"):
        with_settings_of_file(
            settings(tiny_base, f"lora.from_file={file}", f'base.merge=[{{file="{tmp_path}/copy.safetensors"}}]')
        )


@pytest.mark.parametrize("form", ["kohya", "PEFT, DoRA", "own, orthogonal"])
def test_continued_run_resumes_in_the_same_bytes(
    form: str, tmp_path: Path, overrides: list[str], lora: Callable[[str], Path]
) -> None:
    file = lora(form)
    more = {"kohya": ["train.ema_decay=0.9"], "PEFT, DoRA": ["train.optimizer=schedule_free"], "own, orthogonal": []}
    options = [*without_settings(overrides), f"lora.from_file={file}", "train.learning_rate=1e-2", *more[form]]
    events = run(tmp_path / "whole", options)
    assert any(isinstance(event, Notice) and "theirs.safetensors" in event.message for event in events)
    steps = 0

    def counted() -> bool:
        nonlocal steps
        steps += 1
        return steps > 12

    with pytest.raises(Stopped):
        run(tmp_path / "cut", options, should_stop=counted)
    run(tmp_path / "cut", options, resume=True)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert without_times(metrics(tmp_path / "cut")) == without_times(metrics(tmp_path / "whole"))
    proof = json.loads((tmp_path / "whole/epochs/1/proof.json").read_text(encoding="utf-8"))
    assert proof["max_error"] == 0.0
    written = (tmp_path / "whole" / "config.toml").read_text(encoding="utf-8")
    assert f'from_file = "{file}"' in written and "\nrank = " in written
    metadata = read_file(tmp_path / "whole" / "hero.safetensors").metadata
    source = json.loads(metadata["sdlora.continued_from"])
    assert source["file"] == "theirs.safetensors" and len(source["sha256"]) == 64
    assert source.get("base") == ("anime.safetensors" if "own" in form else None)
    assert json.loads(metadata["sdlora.settings"])["lora"]["from_file"] == "theirs.safetensors"
    assert str(tmp_path) not in str(metadata)
    # Half of the ranks of a file with frozen initial factors are those.
    dims = {"kohya": "4", "PEFT, DoRA": "3", "own, orthogonal": "8"}
    assert (metadata["ss_network_dim"], metadata["ss_network_module"]) == (dims[form], "networks.lora")
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert f"continued from theirs.safetensors (SHA-256 {source['sha256']})" in card


def test_rate_of_almost_zero_leaves_the_file_and_epoch_0_is_the_base(
    tmp_path: Path, overrides: list[str], lora: Callable[[str], Path]
) -> None:
    file = lora("kohya")
    options = [*without_settings(overrides), "train.epochs=1"]
    run(tmp_path / "plain", options)
    run(tmp_path / "run", [*options, f"lora.from_file={file}", "train.learning_rate=1e-20"])
    before, after = load_file(file), load_file(tmp_path / "run" / "hero.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].float(), after[key]) for key in before)
    name = "epochs/0/previews/prompt00_seed0.png"
    drawn = [(tmp_path / folder / name).read_bytes() for folder in ("plain", "run")]
    assert drawn[0] == drawn[1]
    assert (tmp_path / "run" / name.replace("/0/", "/1/")).read_bytes() != drawn[1]


def test_losses_of_the_first_step_are_the_files(
    tmp_path: Path, overrides: list[str], lora: Callable[[str], Path]
) -> None:
    def first_loss(*more: str) -> float:
        events = run(tmp_path / f"run{len(more)}", [*without_settings(overrides), "preview.enabled=false", *more])
        return next(event.loss for event in events if isinstance(event, StepDone))

    assert abs(first_loss() - first_loss(f"lora.from_file={lora('kohya')}")) > 1e-4


@pytest.mark.parametrize("option", ["lora.from_file", "base.merge"])
def test_changed_file_is_refused_when_resuming(
    option: str, tmp_path: Path, overrides: list[str], lora: Callable[[str], Path]
) -> None:
    file = lora("kohya")
    value = f'[{{file="{file}", weight=0.5}}]' if option == "base.merge" else str(file)
    base = overrides if option == "base.merge" else without_settings(overrides)
    options = [*base, f"{option}={value}", "preview.enabled=false"]
    run(tmp_path / "run", options)
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_te" in key and key.endswith("up.weight"))
    save_file(tensors | {key: tensors[key] * 2}, file)
    with pytest.raises(OutputError, match=rf"{option}.*theirs\.safetensors"):
        run(tmp_path / "run", options, resume=True)


@pytest.mark.parametrize("form", ["kohya", "PEFT, mixed", "PEFT, DoRA"])
def test_merged_base_is_that_of_diffusers(form: str, tiny_base: Path, lora: Callable[[str], Path]) -> None:
    file = lora(form)
    config = settings(tiny_base, f'base.merge=[{{file="{file}", weight=0.8}}]')
    base = fresh_base(config, CPU, torch.float32)
    theirs = fresh(tiny_base)
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    theirs.fuse_lora(lora_scale=0.8)
    theirs.unload_lora_weights()
    for mine in (base, base.fresh_pipeline()):
        network = base.network if mine is base else mine.unet
        encoder = base.text_encoders[0] if mine is base else mine.text_encoder
        for ours, fused in ((network, theirs.unet), (encoder, theirs.text_encoder)):
            expected = fused.state_dict()
            for name, value in ours.state_dict().items():
                torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    plain = loaded(tiny_base)
    moved = [(a - b).abs().max() for a, b in zip(predictions(base), predictions(plain), strict=True)]
    assert moved[0] > 1e-2
    assert (base.text_identity == plain.text_identity) == ("PEFT" in form)
    assert base.vae_identity == plain.vae_identity


def test_merging_comes_before_rounding(tiny_base: Path, lora: Callable[[str], Path]) -> None:
    config = settings(tiny_base, f'base.merge=[{{file="{lora("kohya")}", weight=0.8}}]')
    exact = fresh_base(config, CPU, torch.float32).network.state_dict()
    for name, value in fresh_base(config, CPU, torch.bfloat16).network.state_dict().items():
        assert torch.equal(value, exact[name].bfloat16())
    int8 = config.model_copy(update={"base": config.base.model_copy(update={"quantization": "int8"})})
    rounded = fresh_base(int8, CPU, torch.float32)
    plain = fresh_base(settings(tiny_base, "base.quantization=int8"), CPU, torch.float32)
    near, far = (
        (predictions(other)[0] - predictions(rounded)[0]).abs().max()
        for other in (fresh_base(config, CPU, torch.float32), plain)
    )
    assert near < far


def test_run_on_a_merged_base_says_so_and_is_relative_to_it(
    tmp_path: Path, overrides: list[str], lora: Callable[[str], Path]
) -> None:
    file = lora("kohya")
    options = [*overrides, "train.epochs=1", "copycheck.enabled=true", "preview.num_captions=1"]
    events = run(tmp_path / "run", [*options, f'base.merge=[{{file="{file}", weight=0.8}}]'])
    run(tmp_path / "plain", options)
    name = "epochs/0/previews/prompt00_seed0.png"
    assert (tmp_path / "run" / name).read_bytes() != (tmp_path / "plain" / name).read_bytes()
    proof = json.loads((tmp_path / "run/epochs/1/proof.json").read_text(encoding="utf-8"))
    assert proof["max_error"] == 0.0
    metadata = read_file(tmp_path / "run" / "hero.safetensors").metadata
    (merged,) = json.loads(metadata["sdlora.merged_into_base"])
    assert (merged["file"], merged["weight"]) == ("theirs.safetensors", 0.8)
    assert str(tmp_path) not in str(metadata)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"theirs.safetensors merged into it at 0.8 (SHA-256 {merged['sha256']})" in card
    assert "pipe.fuse_lora(lora_scale=0.8)" in card and str(tmp_path) not in card
    assert any(isinstance(event, Notice) and "theirs.safetensors at 0.8" in event.message for event in events)
    plain = read_file(tmp_path / "plain" / "hero.safetensors").metadata
    assert not {"sdlora.merged_into_base", "sdlora.continued_from"} & plain.keys()
    assert "from_file" not in plain["sdlora.settings"]


def test_pool_keeps_a_merged_base_until_a_file_changes(tiny_base: Path, lora: Callable[[str], Path]) -> None:
    bases, file = BasePool(), lora("kohya")
    config = settings(tiny_base, f'base.merge=[{{file="{file}"}}]')
    first = bases(config, CPU, torch.float32)
    assert bases(config, CPU, torch.float32) is first
    kohya_trainer(file, fresh(tiny_base), seed=9)
    second = bases(config, CPU, torch.float32)
    assert second is not first
    assert bases(settings(tiny_base), CPU, torch.float32) is not second
    heavier = settings(tiny_base, f'base.merge=[{{file="{file}", weight=2.0}}]')
    assert bases(heavier, CPU, torch.float32).network.state_dict().keys() == second.network.state_dict().keys()


def test_files_with_timestep_ranks_are_not_merged(tiny_base: Path, lora: Callable[[str], Path]) -> None:
    config = settings(tiny_base, f'base.merge=[{{file="{lora("own, timestep rank")}"}}]')
    with pytest.raises(DataError, match=r"theirs\.safetensors.*timestep_rank_min"):
        fresh_base(config, CPU, torch.float32)


def test_estimate_counts_the_modules_of_the_file(tiny_base: Path, lora: Callable[[str], Path]) -> None:
    config = settings(tiny_base, f"lora.from_file={lora('own')}")
    base = loaded(tiny_base)
    found = estimate_shapes(config, shapes_of(base), 1, on_cpu=True)
    adapter = make_adapter(with_settings_of_file(config), base)
    assert found.trainable_parameters == adapter.num_parameters()
    assert not any("lora.rank" in change.values for change in found.changes)


def test_fingerprint_of_a_job_covers_its_files(images: Path, lora: Callable[[str], Path], tiny_base: Path) -> None:
    def of(*overrides: str) -> str:
        return Fingerprints().of(parse_config({"data": {"folder": str(images)}}, name="x", overrides=overrides))

    file = lora("kohya")
    options = [f"lora.from_file={file}", f'base.merge=[{{file="{file}"}}]']
    before = [of(), *(of(option) for option in options)]
    kohya_trainer(file, fresh(tiny_base), seed=9)
    after = [of(), *(of(option) for option in options)]
    assert before[0] == after[0]
    assert len({*before, *after}) == 5
