"""A transformer alone in one .safetensors file, in its authors' layout or diffusers', in 16, 32 or 8 bits (fp8).

Used by `load` where text encoder, tokenizer and VAE come from elsewhere. Which family it is of, its classes tell by its
tensors (`BaseModel.file_config`); diffusers' own converter renames the weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
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
_SCALES = (".scale_weight", ".weight_scale")
# Beside weights in 8 bits: the scales of activations, how a layer is packed, and the mark of a packed file.
_NOT_WEIGHTS = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_FP8 = {"F8_E4M3", "F8_E5M2"}
# The ends of tensor names in files that are packed in other ways.
_PACKED = {
    (".qweight", ".wscales", ".smooth_factor", ".proj_down"): "by nunchaku (SVDQuant)",
    (".weight_scale_2",): "in 4 bits (NVFP4)",
    (".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"): "in 4 bits (bitsandbytes)",
}
_WHAT_IS_READ = (
    "sdlora reads transformers in bfloat16, float16, float32 and fp8 (e4m3, with its scales): use one of those, and "
    "set base.quantization if memory is too small for it"
)


def bare_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes of a transformer's weights by their names without a prefix."""
    return {_bare(name, _prefix(header)): shape for name, shape in header.shapes.items() if _is_weight(name, header)}


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
    header = read_header(file)
    _check_dtypes(header, name)
    network: nn.Module = empty_network(kind, config)
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    empty = {key: torch.empty(shape, device="meta") for key, shape in bare_shapes(header).items()}
    found = {key: tuple(tensor.shape) for key, tensor in _converted(kind, config, empty, expected, name).items()}
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
    weights = _converted(kind, config, _read(file, header, dtype, name), expected, name)
    for key in weights:  # one after the other, so that memory never holds all of a fused layer's parts twice
        weights[key] = weights[key].clone()
    network.load_state_dict(weights, assign=True)
    return network.eval()


def _prefix(header: Header) -> str:
    return next((prefix for prefix in _PREFIXES if header.has(prefix)), "")


def _bare(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _is_weight(name: str, header: Header) -> bool:
    return name.startswith(_prefix(header)) and not name.endswith(_NOT_WEIGHTS)


def _check_dtypes(header: Header, name: str) -> None:
    for key, dtype in header.dtypes.items():
        if _is_weight(key, header) and dtype not in _FLOATS:
            raise BaseModelError(f"{name} is packed in a way that sdlora does not read ({dtype}). {_WHAT_IS_READ}.")


def _read(file: Path, header: Header, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """The weights by their names without a prefix, in a type."""
    prefix, found = _prefix(header), dict[str, Tensor]()
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in filter(lambda key: _is_weight(key, header), header.shapes):
                weight = tensors.get_tensor(key)
                if header.dtypes[key] in _FP8:
                    scales = [key.removesuffix(".weight") + ending for ending in _SCALES]
                    scale = next((tensors.get_tensor(one) for one in scales if one in header.shapes), None)
                    weight = weight.float() if scale is None else weight.float() * _by_row(scale, weight, key, name)
                found[_bare(key, prefix)] = weight.to(dtype)
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


def _converted(
    kind: str, config: Mapping[str, Any], tensors: dict[str, Tensor], expected: Mapping[str, Any], name: str
) -> dict[str, Tensor]:
    """Weights under diffusers' names."""
    if expected.keys() <= tensors.keys():
        return tensors
    convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    try:
        found: dict[str, Tensor] = convert(checkpoint=tensors, config=dict(config))
    except KeyError as error:
        raise BaseModelError(
            f"{name} has weights that its family does not know ({json.dumps(str(error.args[0]))}). Download it again, "
            "or use a diffusers folder."
        ) from error
    return found
