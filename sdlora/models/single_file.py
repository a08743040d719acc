"""What diffusers' reader of checkpoints in one file leaves out: naming missing weights, and reading old CLIP names.

Used by `load`, before diffusers reads the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.errors import BaseModelError
from sdlora.models.architectures import Architecture, Header

_CLIP = "cond_stage_model.transformer."
_NETWORKS: dict[str, tuple[Any, Callable[..., Mapping[str, Tensor | None]]]] = {
    "UNet": (UNet2DConditionModel, convert_ldm_unet_checkpoint),
    "VAE": (AutoencoderKL, convert_ldm_vae_checkpoint),
}


def with_defaults(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the class's own defaults, since diffusers' converter reads keys that may be left out."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty} | dict(config)


def check_weights(header: Header, architecture: Architecture, name: str) -> None:
    """Check that a checkpoint in its authors' layout has every weight of its UNet and VAE, in its shape.

    Diffusers' own conversion is given tensors without data. `name` is the file's, for messages.

    Raises:
        BaseModelError: A weight is missing, or has another shape.
    """
    for title, (kind, convert) in _NETWORKS.items():
        config = with_defaults(kind, architecture.unet if title == "UNet" else architecture.vae)
        try:
            with torch.device("meta"):
                needed = {path: tensor.shape for path, tensor in kind.from_config(config).state_dict().items()}
                tensors = {key: torch.empty(shape) for key, shape in header.shapes.items()}
            found = convert(tensors, config)
            missing = [path for path in needed if found.get(path) is None]
        except KeyError as error:
            missing = [str(error.args[0])]
        except (ValueError, IndexError, RuntimeError, AttributeError, TypeError, ArithmeticError) as error:
            raise BaseModelError(
                f"{name!r} has a {title} of shapes that make no network ({error}). Use another checkpoint."
            ) from error
        if missing:
            many = f"{len(missing)} weights" if len(missing) > 1 else "a weight"
            raise BaseModelError(
                f"{name!r} lacks {many} of its {title}: {missing[0]}{', …' if len(missing) > 1 else ''}. Download it "
                "again, or use another checkpoint. If it is a smaller variant of its family, convert it to a diffusers "
                "folder with its own configuration files."
            )
        for path, shape in needed.items():
            tensor = found[path]
            if tensor is not None and tensor.shape != shape:
                raise BaseModelError(
                    f"{name!r}: {path} of its {title} has the shape {tuple(tensor.shape)} instead of {tuple(shape)}. "
                    "Use another checkpoint."
                )


def has_old_clip_names(header: Header) -> bool:
    """Whether the names of CLIP's weights lack `text_model`, as in checkpoints saved by transformers before 4.0."""
    return header.has(f"{_CLIP}embeddings.")


def text_encoder_of_old_names(file: Path, config: Mapping[str, Any], name: str) -> nn.Module:
    """The text encoder of a Stable Diffusion 1.x checkpoint with old CLIP names, in the file's dtype.

    Raises:
        BaseModelError: A weight is missing, or has another shape; `name` is the file's in the message.
    """
    with safe_open(file, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys() if key.startswith(_CLIP)}  # noqa: SIM118
    found = {path.removeprefix("text_model."): tensor for path, tensor in convert_ldm_clip_checkpoint(tensors).items()}
    with torch.device("meta"):
        encoder: nn.Module = CLIPTextModel(CLIPTextConfig(**config))
    # From transformers 5.6 on, CLIP's weights are no longer inside one named text_model.
    named = {path: found.get(path.removeprefix("text_model.")) for path in encoder.state_dict()}
    for path, needed in encoder.state_dict().items():
        if (tensor := named[path]) is None or tensor.shape != needed.shape:
            what = "lacks" if tensor is None else "has in another shape"
            raise BaseModelError(f"{name!r} {what} a weight of its text encoder: {path}. Use another checkpoint.")
    encoder.load_state_dict(named, assign=True)
    encoder.eval()
    # Positions are no weights: they are counted, not read.
    for module in encoder.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, key, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return encoder
