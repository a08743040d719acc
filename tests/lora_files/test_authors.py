"""LoRA files of FLUX.2 klein in every spelling: read at their strength, and written as other programs read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from helpers.command import call
from helpers.tiny import make_tiny_klein
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.errors import DataError
from sdlora.lora.inject import LoraState, LoraWeights, adaptable, find_targets
from sdlora.lora_files.authors import by_diffusers_layers
from sdlora.lora_files.names import kohya_name, transformer_path
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import describe_lora, read_file, transformer_family
from sdlora.models.families import FAMILIES
from sdlora.models.flux2 import NETWORK_4B, NETWORK_9B

RANK, ALPHA = 4, 2.0
NAMES = FAMILIES["flux2-klein-4b"]
# The authors' layers of a block, and diffusers' in their place.
FUSED = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{name}_proj" for name in ("q", "k", "v")],
}
RENAMED = {
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
    "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
    "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.linear_out",
    "double_blocks.0.txt_mlp.0": "transformer_blocks.0.ff_context.linear_in",
    "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.linear_out",
    "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
    "single_blocks.1.linear1": "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "single_blocks.1.linear2": "single_transformer_blocks.1.attn.to_out",
}


def transformer(**shape: Any) -> Flux2Transformer2DModel:
    small = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
    }  # fmt: skip
    return Flux2Transformer2DModel(**(small | shape))


@pytest.fixture
def trained() -> LoraState:
    """Weights on every layer of the blocks."""
    network, draw = transformer(), torch.Generator().manual_seed(0)
    state: LoraState = {}
    for path in find_targets(network, ["attention", "mlp"]):
        rows, columns = network.get_submodule(path).weight.shape
        down, up = torch.randn(RANK, columns, generator=draw), torch.randn(rows, RANK, generator=draw)
        state[path] = LoraWeights(down, up, ALPHA)
    return state


def by_path(state: LoraState, prefix: str, kinds: tuple[str, str], *, folded: bool) -> dict[str, Tensor]:
    scale = ALPHA / RANK if folded else 1.0
    tensors = {f"{prefix}{path}.{kinds[0]}.weight": w.down.clone() for path, w in state.items()}
    tensors |= {f"{prefix}{path}.{kinds[1]}.weight": w.up * scale for path, w in state.items()}
    return tensors if folded else tensors | {f"{prefix}{path}.alpha": torch.tensor(ALPHA) for path in state}


def with_underscores(state: LoraState, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, w in state.items():
        name = prefix + path.replace(".", "_")
        found |= {f"{name}.lora_down.weight": w.down.clone(), f"{name}.lora_up.weight": w.up.clone()}
        found[f"{name}.alpha"] = torch.tensor(w.alpha)
    return found


def by_authors(state: LoraState) -> LoraState:
    """The same update on the authors' layers: adapters of fused ones as blocks, as musubi-tuner converts them."""
    found = {theirs: state[ours] for theirs, ours in RENAMED.items()}
    for theirs, ours in FUSED.items():
        down, up = torch.cat([state[path].down for path in ours]), torch.block_diag(*(state[path].up for path in ours))
        found[theirs] = LoraWeights(down, up, ALPHA * len(ours))
    return found


SPELLINGS = {
    "folded": lambda state: by_path(state, "transformer.", ("lora_A", "lora_B"), folded=True),
    "alpha beside": lambda state: by_path(state, "transformer.", ("lora_A", "lora_B"), folded=False),
    "down and up": lambda state: by_path(state, "transformer.", ("lora_down", "lora_up"), folded=False),
    "other prefix": lambda state: by_path(state, "diffusion_model.", ("lora_A", "lora_B"), folded=False),
    "kohya": lambda state: with_underscores(state, "lora_unet_"),
    "OneTrainer": lambda state: with_underscores(state, "lora_transformer_"),
    "LyCORIS": lambda state: with_underscores(state, "lycoris_"),
    "authors, kohya": lambda state: with_underscores(by_authors(state), "lora_unet_"),
    "authors, ai-toolkit": lambda state: {
        f"diffusion_model.{path}.{kind}.weight": tensor
        for path, w in by_authors(state).items()
        for kind, tensor in (("lora_A", w.down.clone()), ("lora_B", w.up * (ALPHA / RANK)))
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_at_its_strength(spelling: str, trained: LoraState, tmp_path: Path) -> None:
    file = saved(SPELLINGS[spelling](trained), tmp_path / "lora.safetensors")
    found = read_file(file)
    assert describe_lora(file)["family"] == "Flux.2-klein-4b"
    assert describe_lora(file)["modules"] == {"attention": 12, "mlp": 4}
    adapter = attach(transformer(), found)
    assert adapter.layers.keys() == trained.keys()
    for path, layer in adapter.layers.items():
        own = trained[path]
        assert layer.rank == RANK
        expected = ALPHA / RANK * own.up @ own.down
        torch.testing.assert_close(layer.scale * layer.up @ layer.down, expected, rtol=1e-5, atol=1e-5)


def test_the_file_of_diffusers_script_has_its_alpha_in_its_metadata(trained: LoraState, tmp_path: Path) -> None:
    network = transformer()
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(trained)))
    for path, weights in trained.items():
        layer = network.get_submodule(path)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = weights.down, weights.up
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(network),
        transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )
    found = read_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(found.state) == len(trained)
    assert {weights.alpha for weights in found.state.values()} == {ALPHA}


def test_fused_layers_that_share_their_ranks_are_divided_by_rows() -> None:
    down, up = torch.randn(RANK, 32), torch.randn(96, RANK)
    magnitude = torch.rand(96, 1)
    parts = {"lora_unet_double_blocks_0_img_attn_qkv": {"down": down, "up": up, "scale": magnitude}}
    found = by_diffusers_layers(parts, NAMES.lora_authors, dotted=False, file="x")
    assert list(found) == [kohya_name(path) for path in FUSED["double_blocks.0.img_attn.qkv"]]
    for index, part in enumerate(found.values()):
        assert torch.equal(part["up"], up[32 * index : 32 * (index + 1)])
        assert torch.equal(part["scale"], magnitude[32 * index : 32 * (index + 1)])
        assert torch.equal(part["down"], down)


def test_layers_that_are_there_twice_or_indivisible_are_refused() -> None:
    part = {"down": torch.ones(2, 32), "up": torch.ones(96, 2)}
    twice = {"double_blocks.0.img_attn.qkv": part, "transformer_blocks.0.attn.to_k": part}
    with pytest.raises(DataError, match="twice"):
        by_diffusers_layers(twice, NAMES.lora_authors, dotted=True, file="x")
    odd = {"double_blocks.0.img_attn.qkv": part | {"up": torch.ones(95, 2)}}
    with pytest.raises(DataError, match="95 rows"):
        by_diffusers_layers(odd, NAMES.lora_authors, dotted=True, file="x")


def comfyui(double: int, single: int) -> set[str]:
    """The names that ComfyUI reads of a FLUX.2, by its rules (`flux_to_diffusers` in comfy/utils.py), not its code.

    A layer of its own double and single blocks by diffusers' name behind "transformer."; queries, keys and values are
    parts of one layer there.
    """
    streams = [
        ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_in", "ff.linear_out"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff_context.linear_in",
         "ff_context.linear_out"),
    ]  # fmt: skip
    inside = [f"transformer_blocks.{block}.{name}" for block in range(double) for stream in streams for name in stream]
    inside += [
        f"single_transformer_blocks.{i}.attn.{name}" for i in range(single) for name in ("to_qkv_mlp_proj", "to_out")
    ]
    return {f"transformer.{name}" for name in inside}


@pytest.mark.parametrize(("shape", "double", "single"), [(NETWORK_4B, 5, 20), (NETWORK_9B, 8, 24)])
def test_comfyui_reads_every_layer_that_is_trained(shape: dict[str, Any], double: int, single: int) -> None:
    with torch.device("meta"):
        network = Flux2Transformer2DModel(**shape)
    paths = find_targets(network, ["attention", "mlp"])
    assert {f"{NAMES.lora_prefix}{path}" for path in paths} == comfyui(double, single)
    assert len(paths) == 12 * double + 2 * single


def test_every_layer_is_found_again_by_its_kohya_name() -> None:
    with torch.device("meta"):
        paths = adaptable(Flux2Transformer2DModel(**NETWORK_4B))
    assert [transformer_path(kohya_name(path), NAMES) for path in paths] == paths


def test_the_size_is_told_by_the_width_of_layers_or_by_metadata() -> None:
    def on(width: int) -> LoraState:
        weights = LoraWeights(torch.ones(1, width), torch.ones(8, 1), 1.0)
        return {"lora_unet_single_transformer_blocks_0_attn_to_qkv_mlp_proj": weights}

    for width, metadata, title in [
        (3072, {}, "FLUX.2 klein 4B"),
        (4096, {}, "FLUX.2 klein 9B"),
        (32, {"modelspec.architecture": "Flux.2-klein-9b/lora"}, "FLUX.2 klein 9B"),
        (6144, {"modelspec.architecture": "Flux.2-dev/lora"}, None),
    ]:
        family = transformer_family(on(width), metadata)
        assert (family and family.title) == title


def saved(tensors: dict[str, Tensor], file: Path) -> Path:
    """A file that says what it is for, since these layers are narrower than any model's."""
    save_file(tensors, file, metadata={"modelspec.architecture": "Flux.2-klein-4b/lora"})
    return file


def updates(file: Path) -> dict[str, Tensor]:
    return {
        name: weights.alpha / len(weights.down) * weights.up @ weights.down
        for name, weights in read_file(file).state.items()
    }


def test_files_made_of_others_have_the_form_that_programs_read(
    trained: LoraState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(SPELLINGS["authors, kohya"](trained), tmp_path / "source.safetensors")
    expected = updates(source)
    wanted = {f"transformer.{path}.{kind}.weight" for path in trained for kind in ("lora_A", "lora_B")}
    for command, factor in {
        "convert SOURCE OUT --to peft": 1.0,
        "merge --output OUT SOURCE SOURCE --weights 1 0.5": 1.5,
        "resize SOURCE OUT --rank 4": 1.0,
    }.items():
        out = tmp_path / f"{command.split()[0]}.safetensors"
        words = [{"SOURCE": str(source), "OUT": str(out)}.get(word, word) for word in command.split()]
        code, _, said = call(capsys, *words)
        assert code == 0, said
        assert set(load_file(out)) == wanted
        for name, update in updates(out).items():
            torch.testing.assert_close(update, factor * expected[name], rtol=1e-4, atol=1e-4)
    code, out, _ = call(capsys, "info", str(tmp_path / "convert.safetensors"), "--json")
    assert code == 0 and json.loads(out)["architecture"] == "Flux.2-klein-4b/lora"
    code, _, said = call(capsys, "convert", str(source), str(tmp_path / "kohya.safetensors"), "--to", "kohya")
    assert code == DataError.exit_code and "FLUX.2 klein" in said


def test_a_file_of_an_unknown_transformer_is_not_written(
    trained: LoraState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = {path: w for path, w in trained.items() if path.endswith("to_q")}
    source = tmp_path / "queries.safetensors"
    save_file(SPELLINGS["folded"](queries), source)
    out = tmp_path / "out.safetensors"
    code, _, said = call(capsys, "resize", str(source), str(out), "--rank", "2")
    assert code == DataError.exit_code and "FLUX.2 klein" in said
    assert not out.exists()


def test_a_file_is_merged_into_a_folder_and_extracted_from_it(
    trained: LoraState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, merged, out = tmp_path / "base", tmp_path / "merged", tmp_path / "out.safetensors"
    make_tiny_klein(base)
    source = saved(SPELLINGS["folded"](trained), tmp_path / "source.safetensors")
    code, said, _ = call(capsys, "merge", "--output", str(merged), "--into", str(base), str(source))
    assert code == 0 and "16 layers" in said
    before, after = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (base, merged)
    )
    for path, weights in trained.items():
        change = ALPHA / RANK * weights.up @ weights.down
        torch.testing.assert_close(after[f"{path}.weight"] - before[f"{path}.weight"], change, atol=1e-5, rtol=1e-4)
    assert call(capsys, "extract", str(merged), str(base), str(out), "--rank", "4")[0] == 0
    assert set(load_file(out)) == set(load_file(source))
    expected = updates(source)
    for name, update in updates(out).items():
        torch.testing.assert_close(update, expected[name], atol=1e-4, rtol=1e-3)
