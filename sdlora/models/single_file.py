"""A checkpoint in one file as a diffusers pipeline, offline.

diffusers converts the weights; the configurations that such a file lacks are written to a temporary folder from the
families' true shapes.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

from sdlora.diffusion.noise import PredictionType
from sdlora.errors import BaseModelError
from sdlora.models.architectures import ARCHITECTURES, Family
from sdlora.models.detect import identify
from sdlora.models.safetensors_header import read_header
from sdlora.models.tokenizer import clip_tokenizer

_SD2_512_LATENTS = 64


def load_single_file(
    path: str,
    file: Path,
    prediction_type: PredictionType | None,
    unet_dtype: torch.dtype = torch.float32,
    **present: Any,
) -> DiffusionPipeline:
    """Load a checkpoint in its authors' layout (LDM, sgm).

    Args:
        path: What the user called it, for messages.
        file: The .safetensors file.
        prediction_type: "epsilon" or "v_prediction"; None to take it from the file.
        unet_dtype: The UNet's dtype; everything else is in float32.
        present: Components that are in memory already, by name.

    Raises:
        BaseModelError: The file is not a complete base model of a known family, or its prediction type is unknown.
    """
    found = identify(read_header(file), path)
    predicts = prediction_type or found.prediction_type
    if predicts is None:
        raise BaseModelError(
            f"{path!r} is a Stable Diffusion 2.x checkpoint that does not state its prediction type. Set "
            "base.prediction_type to 'v_prediction' if it was trained at 768 px, to 'epsilon' if at 512 px."
        )
    kind = getattr(diffusers, ARCHITECTURES[found.family].pipeline)
    with tempfile.TemporaryDirectory() as folder:
        components = _components(found.family, predicts, found.zero_terminal_snr)
        _write_configs(Path(folder), found.family, predicts)
        try:
            pipeline: DiffusionPipeline = kind.from_single_file(
                str(file), config=folder, local_files_only=True, torch_dtype=None, **(components | present)
            )
        except NotImplementedError as error:  # weights that the file lacks are left on the meta device
            raise BaseModelError(
                f"{path!r} lacks weights of its UNet. If it is a smaller variant of its family, convert it to a "
                "diffusers folder with its own configuration files."
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BaseModelError(f"{path!r} could not be loaded: {reason[0]}") from error
    _check_loaded(pipeline, path)
    # Until here the weights lie in the mapped file, so that none is in memory in a dtype that is not wanted.
    pipeline.unet.to(unet_dtype)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if name not in present and (network := getattr(pipeline, name, None)) is not None:
            network.float()
    return pipeline


def _components(family: Family, prediction_type: PredictionType, zero_terminal_snr: bool) -> dict[str, Any]:
    """The components that have no weights."""
    settings = dict(ARCHITECTURES[family].scheduler) | {"prediction_type": prediction_type}
    if zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, settings.pop("_class_name")).from_config(settings)
    first = clip_tokenizer("!" if family == "sd2" else "<|endoftext|>")
    parts: dict[str, Any] = {"scheduler": scheduler, "tokenizer": first, "feature_extractor": None}
    if family == "sdxl":
        return parts | {"tokenizer_2": clip_tokenizer("!"), "image_encoder": None, "add_watermarker": False}
    return parts | {"safety_checker": None, "image_encoder": None, "requires_safety_checker": False}


def _write_configs(folder: Path, family: Family, prediction_type: PredictionType) -> None:
    architecture = ARCHITECTURES[family]
    unet = _complete(UNet2DConditionModel, architecture.unet)
    if family == "sd2" and prediction_type == "epsilon":
        unet["sample_size"] = _SD2_512_LATENTS
    configs = {"unet": unet, "vae": _complete(AutoencoderKL, architecture.vae)}
    index: dict[str, Any] = {
        "_class_name": architecture.pipeline,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", architecture.scheduler["_class_name"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    if family == "sdxl":
        index |= {
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "force_zeros_for_empty_prompt": True,
        }
    for name, config in zip(("text_encoder", "text_encoder_2"), architecture.text_encoders, strict=False):
        configs[name] = {"model_type": "clip_text_model", **config}
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _complete(kind: type, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the class's own defaults, since diffusers' converter reads keys that may be left out."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty} | config


def _check_loaded(pipeline: DiffusionPipeline, path: str) -> None:
    """Check that the file held every weight; those it did not are still on the meta device."""
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        network = getattr(pipeline, name, None)
        missing = [] if network is None else [key for key, p in network.named_parameters() if p.is_meta]
        if missing:
            raise BaseModelError(
                f"{path!r} lacks {len(missing)} weights of its {name}, the first of which is {missing[0]!r}. If it is "
                "a smaller variant of its family, convert it to a diffusers folder with its own configuration files."
            )
