"""From base.path (a built-in base's name, a folder, a file, a hub id) to a loaded base model.

Only safetensors files are read: a pickled checkpoint can run code. A checkpoint in one file is converted by diffusers,
offline; the configurations that it lacks are written to a temporary folder from the families' true shapes.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn

from sdlora.common.bundled import BUILTIN_BASES, builtin_base
from sdlora.common.families import Family
from sdlora.diffusion.noise import PredictionType
from sdlora.errors import BaseModelError, ConfigError
from sdlora.lora.inject import NETWORKS
from sdlora.lora.quantize import Quantization, quantize_linears
from sdlora.models.architectures import ARCHITECTURES, Identified, identify, read_header
from sdlora.models.base import BaseModel, Source, TextOptions
from sdlora.models.families import (
    CLASSES,
    class_of,
    identify_base,
    is_transformer,
    network_of,
)
from sdlora.models.folder import LOADER_ERRORS, check_folder, part_config, read_index, text_dtypes
from sdlora.models.network_file import check_readable, read_text_encoder, read_transformer, read_vae
from sdlora.models.single_file import check_weights, has_old_clip_names, text_encoder_of_old_names, with_defaults
from sdlora.models.unet import clip_tokenizer

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class LoadOptions:
    """How to load a base model."""

    revision: str | None = None  # a branch, tag or commit on the hub; None for the default
    variant: str | None = None  # the variant of the weight files, such as "fp16"
    prediction_type: PredictionType | None = None  # overrides the prediction type in its files
    text: TextOptions = field(default_factory=TextOptions)  # how captions are encoded
    quantization: Quantization | Literal["none"] = "none"  # of the linear weights in its attention blocks
    offload: bool = False  # keep the network's blocks on the host between their uses
    # Changes weights, given the UNet and the text encoders by name, and the names of the float32 ones to change.
    change: Callable[[Mapping[str, nn.Module], Collection[str]], None] | None = None
    components: str | None = None  # the diffusers folder or hub id that a transformer alone takes all other parts from
    text_encoder: str | None = None  # a file that its text encoder comes from instead
    vae: str | None = None  # a file that the VAE comes from instead
    allows_distilled: bool = False  # whether a model that is distilled to draw in a few steps is accepted


def load_base(path: str, *, device: torch.device, dtype: torch.dtype, options: LoadOptions | None = None) -> BaseModel:
    """Load a base model.

    Args:
        path: "pocket", a folder in diffusers' layout, a checkpoint in one .safetensors file, or a hub id such as
            "owner/name".
        dtype: The frozen UNet's dtype.

    Raises:
        BaseModelError: It does not exist, cannot be read, or is not a text-to-image model of a known family.
        ConfigError: An option does not fit the family.
    """
    options = options or LoadOptions()
    load, revision, vae_config = _loader(path, options)

    def reload(unet_dtype: torch.dtype, **present: Any) -> DiffusionPipeline:
        if options.vae is not None and "vae" not in present:
            present["vae"] = _own_vae(options.vae, vae_config())
        pipeline = load(unet_dtype=unet_dtype if options.change is None else torch.float32, **present)
        if options.change is not None:
            # A transformer is called as a UNet is; language models have no LoRAs.
            texts = NETWORKS[1:] if class_of(pipeline).trains_text else ()
            found = {NETWORKS[0]: network_of(pipeline)} | {name: getattr(pipeline, name, None) for name in texts}
            networks = {name: network for name, network in found.items() if network is not None}
            # What is present was changed when it was loaded.
            options.change(networks, networks.keys() - present.keys())
            network_of(pipeline).to(unet_dtype)
        if options.prediction_type is not None:
            pipeline.scheduler.register_to_config(prediction_type=options.prediction_type)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # Quantization rounds the weights as they were stored, not those of the compute dtype.
    first = reload(dtype if options.quantization == "none" else torch.float32)
    source = Source(first, path, revision, reload)
    network, family = network_of(source.pipeline), class_of(source.pipeline)
    if options.quantization != "none":
        # Before it moves to a device that may be too small for the unquantized weights.
        quantize_linears(network, options.quantization, family.packed_blocks)
        # The other weights still point into the mapped file, which would keep the unquantized ones in memory as well.
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
    return family(source, device=device, dtype=dtype, text=options.text, offload=options.offload)


class _Location(NamedTuple):
    """Where a base model was found."""

    load: Callable[..., DiffusionPipeline]
    revision: str | None  # the commit that a hub id was resolved to
    vae_config: Callable[[], Mapping[str, Any]]


def _loader(path: str, options: LoadOptions) -> _Location:
    place = Path(path).expanduser()
    if (own := builtin_base(path)) is None and place.is_file():
        check_readable(place, path)
        found = identify_base(read_header(place), path)
        if is_transformer(found):
            return _transformer_loader(path, place, found, options)
    for name, value in (("components", options.components), ("text_encoder", options.text_encoder)):
        if value is not None:
            raise ConfigError(
                f"base.{name} is for a transformer alone in one file, and {path!r} is a whole base model. Leave it "
                "unset."
            )
    if own is not None:
        return _folder_loader(path, own, None, options)
    if place.is_dir():
        return _folder_loader(path, place, None, options)
    if place.is_file():
        return _Location(
            partial(_load_single_file, path, place, options.prediction_type), None, lambda: found.architecture.vae
        )
    if is_hub_id(path):
        snapshot = download(path, options)
        # In the hub's cache a snapshot's folder is named by its commit.
        return _folder_loader(path, snapshot, snapshot.name, options)
    builtin = " or ".join(map(repr, BUILTIN_BASES))
    raise BaseModelError(
        f"Base model {path!r} was not found. base.path takes {builtin} (built in), a folder with a model_index.json, a "
        ".safetensors checkpoint, or a hub id such as 'owner/name'."
    )


def _folder_loader(path: str, folder: Path, revision: str | None, options: LoadOptions) -> _Location:
    return _Location(partial(_load_folder, path, folder, options), revision, lambda: part_config(folder, "vae") or {})


def _transformer_loader(path: str, file: Path, found: Identified, options: LoadOptions) -> _Location:
    """A transformer in one file, with the rest of a base model, whose commit is the one returned."""
    kind = CLASSES[found.family]
    _refuse_distilled(kind, path, read_header(file).metadata, options)
    title = kind.names.title
    if options.components is None:
        raise BaseModelError(
            f"{path!r} is the transformer of {title} alone, without text encoder, tokenizer and VAE. Set "
            f"base.components to a diffusers folder or a Hub id of {title}, which they are then taken from."
        )
    given = {name for name in ("text_encoder", "vae") if getattr(options, name) is not None}
    folder, revision = _components_folder(options, given)
    check_folder(options.components, folder, parts_for=kind, given=given)
    _, vae, texts = kind.true_configs()

    def load(unet_dtype: torch.dtype, **present: Any) -> DiffusionPipeline:
        if options.text_encoder is not None and "text_encoder" not in present:
            config = part_config(folder, "text_encoder") or texts[0]
            present["text_encoder"] = _own_text_encoder(options.text_encoder, kind, config)
        network = read_transformer(file, kind.network_class, found.architecture.unet, unet_dtype, path)
        return _load_parts(options.components or "", kind, folder, options, unet_dtype, transformer=network, **present)

    return _Location(load, revision, lambda: part_config(folder, "vae") or vae)


def _own_vae(path: str, config: Mapping[str, Any]) -> nn.Module:
    """A VAE in float32 from a file, whose configuration is given, a folder or a hub id."""
    place = Path(path).expanduser()
    if place.is_file():
        check_readable(place, path)
        return read_vae(place, config, path)
    if not place.is_dir() and not is_hub_id(path):
        raise BaseModelError(
            f"base.vae = {path!r} was not found. It takes a .safetensors file, a VAE's folder in diffusers layout, or "
            "its hub id such as 'owner/name'."
        )
    try:
        kind = getattr(diffusers, config.get("_class_name", "AutoencoderKL"))
        vae: nn.Module = kind.from_pretrained(place if place.is_dir() else path, use_safetensors=True)
    except LOADER_ERRORS as error:
        raise _not_loaded(path, error) from error
    return vae


def _own_text_encoder(path: str, kind: type[BaseModel], config: Mapping[str, Any]) -> nn.Module:
    """A language model from a file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise BaseModelError(f"base.text_encoder = {path!r} was not found. It takes a .safetensors file.")
    check_readable(file, path)
    with init_empty_weights(include_buffers=False):
        empty = kind.empty_text_encoder(config)
    encoder: Any = read_text_encoder(file, empty, path)
    encoder.config.dtype = encoder.dtype  # as of one that is read from a folder
    return cast(nn.Module, encoder)


def _components_folder(options: LoadOptions, given: Collection[str]) -> tuple[Path, str | None]:
    path = options.components or ""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder, None
    if not is_hub_id(path):
        raise BaseModelError(
            f"base.components = {path!r} was not found. It takes a folder with a model_index.json, or a hub id such as "
            "'owner/name'."
        )
    folder = download(path, options, transformer=None, **dict.fromkeys(given))
    return folder, folder.name


def _refuse_distilled(kind: type[BaseModel], path: str, index: Mapping[str, Any], options: LoadOptions) -> None:
    if not options.allows_distilled and kind.is_distilled(path, index):
        raise BaseModelError(
            f"{path!r} is distilled to draw in a few steps, which training undoes. Train on the {kind.names.title} "
            "that it was distilled from; the LoRA works on both, and this one can draw the previews (preview.base). Or "
            "name a LoRA that undoes the distillation while training (base.training_adapter)."
        )


def is_hub_id(path: str) -> bool:
    """Whether this may be a model's name on the hub."""
    return _HUB_ID.fullmatch(path) is not None


def download(path: str, options: LoadOptions, **left_out: None) -> Path:
    """The folder of a hub id's files in the hub's cache, downloaded if necessary, without components that are None."""
    try:
        folder = DiffusionPipeline.download(
            path,
            revision=options.revision,
            variant=options.variant,
            use_safetensors=True,
            safety_checker=None,
            **left_out,
        )
    except LOADER_ERRORS as error:
        raise _not_loaded(path, error) from error
    return Path(folder)


def _load_folder(
    path: str, folder: Path, options: LoadOptions, unet_dtype: torch.dtype, **present: Any
) -> DiffusionPipeline:
    """Load a diffusers folder; `present` are components that are in memory already."""
    kind = check_folder(path, folder)
    _refuse_distilled(kind, path, read_index(folder), options)
    return _load_parts(path, kind, folder, options, unet_dtype, **present)


def _load_parts(
    path: str, kind: type[BaseModel], folder: Path, options: LoadOptions, unet_dtype: torch.dtype, **present: Any
) -> DiffusionPipeline:
    try:
        pipeline: DiffusionPipeline = getattr(diffusers, kind.names.pipeline).from_pretrained(
            folder,
            variant=options.variant,
            # The network's dtype at once: SDXL's takes 10 GB in float32, which a small machine does not have.
            dtype={kind.network_name: unet_dtype, "default": torch.float32, **text_dtypes(kind, folder)},
            use_safetensors=True,
            **present,
            **kind.optional_parts,
        )
    except LOADER_ERRORS as error:
        raise _not_loaded(path, error) from error
    return pipeline


def _not_loaded(path: str, error: Exception) -> BaseModelError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return BaseModelError(
        f"Base model {path!r} could not be loaded: {reason[0]} Check the spelling, the network if it is a hub id, and "
        "that its weights are .safetensors files (base.variant = 'fp16' if their names say so)."
    )


def _load_single_file(
    path: str, file: Path, prediction_type: PredictionType | None, unet_dtype: torch.dtype, **present: Any
) -> DiffusionPipeline:
    """Load a checkpoint in its authors' layout (LDM, sgm); without a prediction type it is taken from the file."""
    header = read_header(file)
    found = identify(header, path)
    check_weights(header, found.architecture, path)
    predicts = prediction_type or found.prediction_type
    if predicts is None:
        raise BaseModelError(
            f"{path!r} is a Stable Diffusion 2.x checkpoint that does not state its prediction type. Set "
            "base.prediction_type to 'v_prediction' if it was trained at 768 px, to 'epsilon' if at 512 px."
        )
    kind = getattr(diffusers, ARCHITECTURES[found.family].pipeline)
    with tempfile.TemporaryDirectory() as folder:
        components = _components(found.family, predicts, found.zero_terminal_snr)
        if has_old_clip_names(header) and "text_encoder" not in present:
            config = found.architecture.text_encoders[0]
            components["text_encoder"] = text_encoder_of_old_names(file, config, path)
        _write_configs(Path(folder), found, predicts)
        try:
            pipeline: DiffusionPipeline = kind.from_single_file(
                str(file), config=folder, local_files_only=True, **(components | present)
            )
        except LOADER_ERRORS as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BaseModelError(
                f"{path!r} could not be loaded ({reason[0].removesuffix('.')}). Download it again, or use another "
                "checkpoint."
            ) from error
    networks = {name: getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    for name, network in networks.items():
        if network is not None and (missing := [key for key, p in network.named_parameters() if p.is_meta]):
            raise BaseModelError(
                f"{path!r} lacks {len(missing)} weights of its {name}, the first of which is {missing[0]!r}. If it is "
                "a smaller variant of its family, convert it to a diffusers folder with its own configuration files."
            )
    # Until here the weights lie in the mapped file, so that none is in memory in a dtype that is not wanted.
    for name, network in networks.items():
        if network is not None and name not in present:
            network.to(unet_dtype if name == "unet" else torch.float32)
    return pipeline


def _components(family: Family, prediction_type: PredictionType, zero_terminal_snr: bool) -> dict[str, Any]:
    """The components that have no weights."""
    settings = ARCHITECTURES[family].scheduler | {"prediction_type": prediction_type}
    if zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, settings.pop("_class_name")).from_config(settings)
    first = clip_tokenizer("!" if family == "sd2" else "<|endoftext|>")
    parts: dict[str, Any] = {"scheduler": scheduler, "tokenizer": first, "feature_extractor": None}
    if family == "sdxl":
        return parts | {"tokenizer_2": clip_tokenizer("!"), "image_encoder": None, "add_watermarker": False}
    return parts | {"safety_checker": None, "image_encoder": None, "requires_safety_checker": False}


def _write_configs(folder: Path, found: Identified, prediction_type: PredictionType) -> None:
    family, architecture = found.family, found.architecture
    unet = with_defaults(UNet2DConditionModel, architecture.unet)
    if family == "sd2" and prediction_type == "epsilon":
        unet["sample_size"] = 64  # latents of 512 px
    configs = {"unet": unet, "vae": with_defaults(AutoencoderKL, architecture.vae)}
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
