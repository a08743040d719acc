"""From base.path ("pocket", a folder, a file, a hub id) to a loaded base model.

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
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn

from sdlora.common.bundled import pocket_folder
from sdlora.common.families import Family
from sdlora.diffusion.noise import PredictionType
from sdlora.errors import BaseModelError, ConfigError
from sdlora.lora.inject import NETWORKS
from sdlora.lora.quantize import Quantization, quantize_linears
from sdlora.models.architectures import ARCHITECTURES, Identified, identify, read_header
from sdlora.models.base import BaseModel, Source, TextOptions
from sdlora.models.families import (
    CLASSES,
    FAMILIES,
    class_of,
    class_of_pipeline,
    identify_base,
    is_transformer,
    network_of,
)
from sdlora.models.single_file import check_weights, has_old_clip_names, text_encoder_of_old_names, with_defaults
from sdlora.models.transformer_file import check_readable, read_transformer
from sdlora.models.unet import clip_tokenizer

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PLAIN = "Train on the base model that it was made from; the LoRA works on both."
_REFUSED = {
    "Inpaint": f"an inpainting model. {_PLAIN}",
    "Depth2Img": f"a depth model. {_PLAIN}",
    "InstructPix2Pix": f"a model that edits images. {_PLAIN}",
    "StableDiffusionXLImg2Img": "the refiner of Stable Diffusion XL, which only refines finished images. Train on the "
    "base model.",
}


# What diffusers' and transformers' readers raise where a file, or a configuration beside it, is not as they expect.
_LOADER_ERRORS = (OSError, ValueError, LookupError, RuntimeError, AttributeError, TypeError, SafetensorError)


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
    load, revision = _loader(path, options)

    def reload(unet_dtype: torch.dtype, **present: Any) -> DiffusionPipeline:
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


def _loader(path: str, options: LoadOptions) -> tuple[Callable[..., DiffusionPipeline], str | None]:
    """A function that loads the pipeline, and the commit that a hub id was resolved to."""
    place = Path(path).expanduser()
    if path != "pocket" and place.is_file():
        check_readable(place, path)
        found = identify_base(read_header(place), path)
        if is_transformer(found):
            return _transformer_loader(path, place, found, options)
    if options.components is not None:
        raise ConfigError(
            f"base.components is for a transformer alone in one file, and {path!r} is a whole base model. Leave it "
            "unset."
        )
    if path == "pocket":
        return partial(_load_folder, path, pocket_folder(), options), None
    if place.is_dir():
        return partial(_load_folder, path, place, options), None
    if place.is_file():
        return partial(_load_single_file, path, place, options.prediction_type), None
    if _HUB_ID.fullmatch(path):
        snapshot = _download(path, options)
        # In the hub's cache a snapshot's folder is named by its commit.
        return partial(_load_folder, path, snapshot, options), snapshot.name
    raise BaseModelError(
        f"Base model {path!r} was not found. base.path takes 'pocket' (built in), a folder with a model_index.json, a "
        ".safetensors checkpoint, or a hub id such as 'owner/name'."
    )


def _transformer_loader(
    path: str, file: Path, found: Identified, options: LoadOptions
) -> tuple[Callable[..., DiffusionPipeline], str | None]:
    """A function that loads a transformer in one file with the rest of a base model, and the commit of the rest."""
    kind = CLASSES[found.family]
    _refuse_distilled(kind, path, read_header(file).metadata, options)
    title = kind.names.title
    if options.components is None:
        raise BaseModelError(
            f"{path!r} is the transformer of {title} alone, without text encoder and VAE. Set base.components to a "
            f"diffusers folder or a Hub id of {title}, which they are then taken from."
        )
    folder, revision = _components_folder(options)
    _check_folder(options.components, folder, parts_for=kind)

    def load(unet_dtype: torch.dtype, **present: Any) -> DiffusionPipeline:
        network = read_transformer(file, kind.network_class, found.architecture.unet, unet_dtype, path)
        return _load_parts(options.components or "", kind, folder, options, unet_dtype, transformer=network, **present)

    return load, revision


def _components_folder(options: LoadOptions) -> tuple[Path, str | None]:
    path = options.components or ""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder, None
    if not _HUB_ID.fullmatch(path):
        raise BaseModelError(
            f"base.components = {path!r} was not found. It takes a folder with a model_index.json, or a hub id such as "
            "'owner/name'."
        )
    folder = _download(path, options, transformer=None)
    return folder, folder.name


def _refuse_distilled(kind: type[BaseModel], path: str, index: Mapping[str, Any], options: LoadOptions) -> None:
    if not options.allows_distilled and kind.is_distilled(path, index):
        raise BaseModelError(
            f"{path!r} is distilled to draw in a few steps, which training undoes. Train on the {kind.names.title} "
            "that it was distilled from; the LoRA works on both."
        )


def _download(path: str, options: LoadOptions, **left_out: None) -> Path:
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
    except _LOADER_ERRORS as error:
        raise _not_loaded(path, error) from error
    return Path(folder)


def _load_folder(
    path: str, folder: Path, options: LoadOptions, unet_dtype: torch.dtype, **present: Any
) -> DiffusionPipeline:
    """Load a diffusers folder; `present` are components that are in memory already."""
    kind = _check_folder(path, folder)
    _refuse_distilled(kind, path, _index(folder), options)
    return _load_parts(path, kind, folder, options, unet_dtype, **present)


def _load_parts(
    path: str, kind: type[BaseModel], folder: Path, options: LoadOptions, unet_dtype: torch.dtype, **present: Any
) -> DiffusionPipeline:
    try:
        pipeline: DiffusionPipeline = getattr(diffusers, kind.names.pipeline).from_pretrained(
            folder,
            variant=options.variant,
            # The network's dtype at once: SDXL's takes 10 GB in float32, which a small machine does not have.
            dtype={kind.network_name: unet_dtype, "default": torch.float32, **_text_dtypes(kind, folder)},
            use_safetensors=True,
            **present,
            **kind.optional_parts,
        )
    except _LOADER_ERRORS as error:
        raise _not_loaded(path, error) from error
    return pipeline


def _text_dtypes(kind: type[BaseModel], folder: Path) -> dict[str, torch.dtype]:
    """The types of text encoders that keep that of their files; all others are in float32."""
    found = {}
    for part in kind.text_parts if kind.keeps_text_type else ():
        first = read_header(min((folder / part).glob("*.safetensors")))
        found[part] = torch.float32 if "F32" in first.dtypes.values() else torch.bfloat16
    return found


def _not_loaded(path: str, error: Exception) -> BaseModelError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return BaseModelError(
        f"Base model {path!r} could not be loaded: {reason[0]} Check the spelling, the network if it is a hub id, and "
        "that its weights are .safetensors files (base.variant = 'fp16' if their names say so)."
    )


def _index(folder: Path) -> dict[str, Any]:
    """The content of a diffusers folder's index."""
    index = folder / "model_index.json"
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{index} is not valid JSON: {error}.") from error
    if not isinstance(entries, dict):
        raise BaseModelError(f"{index} is not valid JSON: it has no entries.")
    return entries


def _check_folder(path: str, folder: Path, parts_for: type[BaseModel] | None = None) -> type[BaseModel]:
    """The class of a diffusers folder, which must be supported and complete.

    With `parts_for` it gives the text encoder and the VAE of a transformer of this class.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        lora = any(read_header(file).has("unet.", "lora_") for file in sorted(folder.glob("*lora*.safetensors")))
        what = (
            "it is a LoRA; set base.path to the model that it was trained on" if lora else "it is not a diffusers model"
        )
        raise BaseModelError(f"Folder {path!r} has no model_index.json: {what}.")
    entries = _index(folder)
    kind = str(entries.get("_class_name"))
    if parts_for is not None and kind != parts_for.names.pipeline:
        raise BaseModelError(
            f"base.components = {path!r} is a {kind}, and base.path a transformer of {parts_for.names.title}. Name a "
            "folder or a Hub id of that."
        )
    if refused := next((sentence for mark, sentence in _REFUSED.items() if mark in kind), None):
        raise BaseModelError(f"{path!r} is {refused}")
    found = class_of_pipeline(kind)
    if found is None:
        titles = [names.title for names in FAMILIES.values()]
        raise BaseModelError(
            f"{path!r} is a {kind}, which sdlora does not train. It trains {', '.join(titles[:-1])} and {titles[-1]}."
        )
    for part in found.text_parts:
        if not (folder / part).is_dir() or None in (entries.get(part) or [None]):
            raise BaseModelError(f"Base model {path!r} has no {part}, without which captions cannot be encoded.")
    if found.keeps_text_type and (missing := _without_weights(folder, found)) is not None:
        raise BaseModelError(f"Base model {path!r} has no {missing} (no .safetensors file in it). Download it again.")
    for part in (found.network_name, "vae", *found.text_parts):
        for file in sorted((folder / part).glob("*.safetensors")):
            read_header(file)
    return found


def _without_weights(folder: Path, kind: type[BaseModel]) -> str | None:
    """The first of VAE and text encoders that has no weights."""
    return next((part for part in ("vae", *kind.text_parts) if not [*(folder / part).glob("*.safetensors")]), None)


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
        except _LOADER_ERRORS as error:
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
