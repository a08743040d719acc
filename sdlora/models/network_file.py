"""A network alone in one .safetensors file, in its authors' layout or diffusers', in 16, 32 or 8 bits (fp8).

Used by `load` where a base model's parts come from several places: a transformer, of which family its classes tell by
its tensors (`BaseModel.file_config`), a VAE, a language model. diffusers' own converters rename the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdlora.errors import BaseModelError
from sdlora.models.architectures import Header, read_header

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_VAE_PREFIXES = ("first_stage_model.", "vae.")
_TEXT_PREFIXES = ("model.",)
_SCALES = (".scale_weight", ".weight_scale")
# Beside weights in 8 bits: the scales of activations, how a layer is packed, and the mark of a packed file.
_NOT_WEIGHTS = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_FP8 = {"F8_E4M3", "F8_E5M2"}
_COUNT = "num_batches_tracked"  # the only integer among weights
# The ends of tensor names in files that are packed in other ways.
_PACKED = {
    (".qweight", ".wscales", ".smooth_factor", ".proj_down"): "by nunchaku (SVDQuant)",
    (".weight_scale_2",): "in 4 bits (NVFP4)",
    (".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"): "in 4 bits (bitsandbytes)",
}
_WHAT_IS_READ = (
    "sdlora reads weights in bfloat16, float16, float32 and fp8 (e4m3, with its scales): use one of those, and "
    "set base.quantization if memory is too small for it"
)


def bare_shapes(header: Header, prefixes: Sequence[str] = _PREFIXES) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's weights by their names without a prefix."""
    return {bare: header.shapes[name] for name, bare in bare_names(header, prefixes).items()}


def bare_names(header: Header, prefixes: Sequence[str] = _PREFIXES) -> dict[str, str]:
    """The names of a network's weights, and those without a prefix."""
    prefix = _prefix(header, prefixes)
    return {name: name.removeprefix(prefix) for name in _weights(header, prefix)}


def num_blocks(tensors: Collection[str], prefix: str) -> int:
    """How many numbered blocks there are under a prefix of tensors' names."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len(numbers)


def check_readable(file: Path, name: str) -> None:
    """Refuse formats that are no safetensors file of weights in 8 bits or more.

    Raises:
        BaseModelError: It is a GGUF file, or packed by nunchaku or in 4 bits.
    """
    with file.open("rb") as handle:
        if handle.read(4) == b"GGUF" or file.suffix.lower() == ".gguf":
            raise BaseModelError(f"{name} is a GGUF file, which programs that only draw read. {_WHAT_IS_READ}.")
    header = read_header(file)
    for endings, how in _PACKED.items():
        if any(key.endswith(endings) for key in header.shapes):
            raise BaseModelError(f"{name} is packed {how}. {_WHAT_IS_READ}.")


def empty_network(kind: str, config: Mapping[str, Any]) -> Any:
    """A network of a class of diffusers whose parameters are on the meta device."""
    with init_empty_weights(include_buffers=False):
        return getattr(diffusers, kind).from_config(dict(config))


def read_transformer(file: Path, kind: str, config: Mapping[str, Any], dtype: torch.dtype, name: str) -> nn.Module:
    """A transformer with the weights of a file; those in 8 bits are multiplied by their scales.

    Args:
        kind: Its class in diffusers.
        config: Its configuration; see `BaseModel.file_config`.
        dtype: Of its parameters.
        name: The file's name in messages.

    Raises:
        BaseModelError: Weights are missing or left over, have other shapes, or are packed in an unknown way.
    """
    return _read_network(file, empty_network(kind, config), dtype, name, converter(kind, config), _PREFIXES)


def read_vae(file: Path, config: Mapping[str, Any], name: str) -> nn.Module:
    """A VAE in float32; see `read_transformer`."""
    network = empty_network(config.get("_class_name", "AutoencoderKL"), config)

    def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
        # FLUX.2's file has these convolutions inside, and the statistics of its latents.
        names = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
        for inner, outer in names.items():
            checkpoint = {key.replace(inner, outer): tensor for key, tensor in checkpoint.items()}
        statistics = {key: tensor for key, tensor in checkpoint.items() if key.startswith("bn.")}
        return converter("AutoencoderKL", network.config)(checkpoint) | statistics

    return _read_network(file, network, torch.float32, name, convert, _VAE_PREFIXES)


def read_text_encoder(file: Path, network: nn.Module, name: str) -> nn.Module:
    """A language model in float32 if its largest weight is, and in bfloat16 else; see `read_transformer`.

    Args:
        network: Its parameters are on the meta device.
    """
    header = read_header(file)
    largest = max(_weights(header, ""), key=lambda key: prod(header.shapes[key]))

    def without_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in weights.items() if key != "lm_head.weight"}

    dtype = torch.float32 if header.dtypes[largest] == "F32" else torch.bfloat16
    return _read_network(file, network, dtype, name, without_head, _TEXT_PREFIXES)


Converter = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From weights under their authors' names to those under diffusers' names."""


def converter(kind: str, config: Mapping[str, Any]) -> Converter:
    """diffusers' own for one of its classes."""
    own = partial(SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"], config=dict(config))
    return lambda weights: own(checkpoint=weights)


def _read_network(
    file: Path, network: nn.Module, dtype: torch.dtype, name: str, convert: Converter, prefixes: Sequence[str]
) -> nn.Module:
    """A network whose parameters are on the meta device, with the weights of a file that has one of some prefixes."""
    header = read_header(file)
    prefix = _prefix(header, prefixes)
    _check_dtypes(header, prefix, name)
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    empty = {key: torch.empty(shape, device="meta") for key, shape in bare_shapes(header, prefixes).items()}
    found = {key: tuple(tensor.shape) for key, tensor in diffusers_names(convert, empty, expected, name).items()}
    missing, left = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or left:
        what = f"lacks {missing[0]!r}" if missing else f"has {left[0]!r}, which its family does not know"
        count = len(missing or left)
        raise BaseModelError(f"{name} {what} ({count} weights in all). Download it again, or use a diffusers folder.")
    if other := next((key for key in expected if expected[key] != found[key]), None):
        raise BaseModelError(
            f"{name}: {other!r} has the shape {found[other]}, where its other weights need {expected[other]}. Use a "
            "diffusers folder, which holds a configuration."
        )
    weights = diffusers_names(convert, _read(file, header, prefix, dtype, name), expected, name)
    for key in weights:  # one after the other, so that memory never holds all of a fused layer's parts twice
        weights[key] = weights[key].clone()
    network.load_state_dict(weights, assign=True)
    return network.eval()


def _prefix(header: Header, prefixes: Sequence[str]) -> str:
    return next((prefix for prefix in prefixes if header.has(prefix)), "")


def _weights(header: Header, prefix: str) -> list[str]:
    """The names of a network's weights, with their prefix."""
    return [name for name in header.shapes if name.startswith(prefix) and not name.endswith(_NOT_WEIGHTS)]


def _check_dtypes(header: Header, prefix: str, name: str) -> None:
    for key in _weights(header, prefix):
        if (dtype := header.dtypes[key]) not in _FLOATS and not key.endswith(_COUNT):
            raise BaseModelError(f"{name} is packed in a way that sdlora does not read ({dtype}). {_WHAT_IS_READ}.")


def _read(file: Path, header: Header, prefix: str, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """The weights by their names without a prefix, in a type."""
    found = dict[str, Tensor]()
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in _weights(header, prefix):
                weight = tensors.get_tensor(key)
                if header.dtypes[key] in _FP8:
                    scales = [key.removesuffix(".weight") + ending for ending in _SCALES]
                    scale = next((tensors.get_tensor(one) for one in scales if one in header.shapes), None)
                    weight = weight.float() if scale is None else weight.float() * _by_row(scale, weight, key, name)
                found[key.removeprefix(prefix)] = weight if key.endswith(_COUNT) else weight.to(dtype)
    except (OSError, SafetensorError) as error:
        raise BaseModelError(f"{name} cannot be read: {error}.") from error
    return found


def _by_row(scale: Tensor, weight: Tensor, key: str, name: str) -> Tensor:
    """One scale for a weight (o, i), or one for each row as (o, 1)."""
    if scale.numel() == 1:
        return scale.float().reshape(())
    if scale.numel() == weight.shape[0]:
        return scale.float().reshape(-1, *(1 for _ in weight.shape[1:]))
    raise BaseModelError(
        f"{name}: {key!r} has {scale.numel()} scales for {weight.shape[0]} rows, blocks of weights that sdlora does "
        f"not read. {_WHAT_IS_READ}."
    )


def diffusers_names(
    convert: Converter, tensors: dict[str, Tensor], expected: Mapping[str, Any], name: str
) -> dict[str, Tensor]:
    """Weights under diffusers' names."""
    if expected.keys() <= tensors.keys():
        return tensors
    try:
        return convert(tensors)
    except KeyError as error:
        raise BaseModelError(
            f"{name} has weights that its family does not know ({json.dumps(str(error.args[0]))}). Download it again, "
            "or use a diffusers folder."
        ) from error
