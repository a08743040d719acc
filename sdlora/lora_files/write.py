"""The writer of LoRA files: atomic, with metadata that other programs read and a header no larger than they accept.

`sdlora.run.export` saves trained adapters with it, the command line's tools save what they make of other files.
Captions and folder names get into a file only on request: they are the artist's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdlora.common.files import atomic_path
from sdlora.common.version import __version__
from sdlora.errors import DataError, ExportError, SdloraError
from sdlora.lora.inject import LoraState
from sdlora.lora.timestep_rank import TimestepRank, timestep_rank_metadata
from sdlora.lora_files.names import (
    PEFT_METADATA,
    UNET_PREFIX,
    as_written,
    folded,
    kohya_tensors,
    to_kohya,
    to_peft,
    to_transformer,
    transformer_path,
)
from sdlora.lora_files.read import (
    MAX_HEADER_BYTES,
    LoraFile,
    Spelling,
    family_of,
    header_bytes,
    transformer_family,
)
from sdlora.models.architectures import ARCHITECTURES, FamilyNames
from sdlora.models.families import FAMILIES, family_named

_SPEC = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
}
# Hashes of a file's tensors, which another name or dtype makes wrong; those of the base stay.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_OF_TRANSFORMERS = re.compile(rf"{UNET_PREFIX}(single_)?(transformer|double|single)_blocks_\d+_")
_SMALL_ENTRY_BYTES = 1000
_OF_SINGLE_RANKS = ("sdlora.timestep_rank", "sdlora.frozen_start")
_OF_THE_BASE = {
    *(f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "resolution")),
    *(f"modelspec.{key}" for key in ("prediction_type", "trigger_phrase", "usage_hint")),
    *(f"ss_{key}" for key in ("base_model_version", "v2", "sd_model_name", "sd_model_hash", "new_sd_model_hash")),
    *(f"ss_{key}" for key in ("network_module", "clip_skip", "resolution")),
    "sdlora.merged_into_base",
}


@dataclass(frozen=True)
class LoraMetadata:
    """What the file of a trained adapter says of itself."""

    name: str  # the LoRA's title
    base: str  # the base model, as the user named it; only the last part of a path is written
    architecture: str  # ModelSpec's name of the family, such as "stable-diffusion-v1"
    resolution_px: int
    trigger: str | None
    epoch: int  # number of epochs trained
    step: int  # number of optimizer steps trained
    started: float  # when training began, in seconds since 1970
    settings: dict[str, Any]  # the settings worth knowing later, as JSON values
    timestep_rank: TimestepRank | None = None  # ranks by timestep, which the weights alone do not tell
    private: Mapping[str, str] = field(default_factory=dict)  # captions and folder names, if the artist wants them
    origins: Mapping[str, str] = field(default_factory=dict)  # of the LoRA files it was trained from or on, by key
    prediction_type: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    clip_skip: int | None = None  # the text encoder's layer, counted from the last; None for the family's own


def save_lora(
    path: Path,
    state: LoraState,
    *,
    metadata: LoraMetadata,
    spelling: Spelling = "kohya",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a trained adapter, atomically.

    Args:
        state: Weights by module path; they are written as `portable_state` returns them.
        spelling: Naming scheme; diffusers ignores the magnitudes of a DoRA under kohya's.
        dtype: Dtype of the stored weights; alphas are always float32.

    Raises:
        ExportError: A value is too large for the dtype, or the header is larger than other programs read.
    """
    family = FAMILIES[family_named(metadata.architecture)]
    portable = as_written(state, family)
    extra = dict(metadata.private) | dict(metadata.origins)
    if family.lora_prefix is not None:
        tensors = to_transformer(portable, lora_prefix(portable, family))
    elif spelling == "peft":
        tensors, extra[PEFT_METADATA] = to_peft(portable)
    else:
        tensors = to_kohya(portable, two_text_encoders=family.modelspec == ARCHITECTURES["sdxl"].modelspec)
    if metadata.timestep_rank is not None:
        extra |= timestep_rank_metadata(metadata.timestep_rank)
    if any(weights.initial is not None for weights in state.values()):
        extra["sdlora.frozen_start"] = "the second half of the ranks"
    _save(path, tensors, _training_header(portable, metadata) | extra, dtype, ExportError)


def lora_prefix(state: LoraState, family: FamilyNames) -> str:
    """What a transformer's file has before module paths; magnitudes are read under diffusers' own prefix alone."""
    dora = any(weights.magnitude is not None for weights in state.values())
    return "transformer." if dora or family.lora_prefix is None else family.lora_prefix


def write_file(
    path: Path,
    state: LoraState,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    paths: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a LoRA made of other files, atomically: under kohya's names, or under PEFT's where `paths` are given.

    Transformers' files have names of their own, with alpha / r in B.

    Args:
        state: Weights by kohya module name.
        metadata: Metadata of the source; hashes, rank and alpha are replaced by true ones.
        dtype: Dtype of the stored weights; alphas are always float32.
        paths: Kohya module name to module path.

    Returns:
        The keys of metadata that were left out, the longest first, so that other programs read the header.

    Raises:
        DataError: The header is larger than other programs read even so, or nothing tells which transformer it is of.
        ExportError: A value is too large for the dtype.
    """
    header = _SPEC | {"modelspec.title": path.stem, "ss_output_name": path.stem}
    family = family_of(state, metadata)
    architecture = next((one for one in FAMILIES.values() if one.modelspec == family), None)
    if architecture is not None:
        header["modelspec.architecture"] = f"{architecture.modelspec}/lora"
        header["ss_base_model_version"] = architecture.base_version
        header["modelspec.implementation"] = architecture.implementation
    header |= {key: value for key, value in metadata.items() if key not in (*_HASHES, PEFT_METADATA, "format")}
    header |= _rank_and_alpha(state)
    if (transformer := transformer_family(state, metadata)) is not None:
        by_path = folded({transformer_path(name, transformer): weights for name, weights in state.items()})
        tensors = to_transformer(by_path, lora_prefix(by_path, transformer))
    elif unknown := next((name for name in state if _OF_TRANSFORMERS.match(name)), None):
        raise DataError(
            f"{path.name} would be of a transformer, by its module {unknown!r}, but nothing tells of which one, and "
            "each has names of its own. sdlora writes files for "
            f"{', '.join(names.title for names in FAMILIES.values() if names.lora_prefix)}."
        )
    elif paths is None:
        tensors = kohya_tensors(state, authors_blocks=family == ARCHITECTURES["sdxl"].modelspec)
    else:
        tensors, header[PEFT_METADATA] = to_peft({paths[name]: weights for name, weights in state.items()})
    left_out = _too_much(header, tensors)
    _save(path, tensors, {key: text for key, text in header.items() if key not in left_out}, dtype, DataError)
    return left_out


def _too_much(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """The longest entries of metadata, as many as must go for a header that other programs read."""
    sizes = {key: len(json.dumps({key: text}).encode()) for key, text in header.items() if key != PEFT_METADATA}
    # A tensor takes its name, its type, its shape and two offsets; the hashes are added later.
    own = sum(len(key) + 120 for key in tensors) + len(json.dumps(header.get(PEFT_METADATA, ""))) + 300
    left_out: list[str] = []
    for key in sorted(sizes, key=lambda key: sizes[key], reverse=True):
        if own + sum(sizes.values()) <= MAX_HEADER_BYTES or sizes[key] < _SMALL_ENTRY_BYTES:
            break
        left_out.append(key)
        del sizes[key]
    return left_out


def _save(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str], dtype: torch.dtype, too_large: type[SdloraError]
) -> None:
    """Write tensors in a dtype, alphas in float32, with the hashes of what is written."""
    tensors = {key: tensor if key.endswith(".alpha") else tensor.to(dtype) for key, tensor in tensors.items()}
    if infinite := [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        name = str(dtype).removeprefix("torch.")
        raise ExportError(
            f"{path.name}: {infinite[0]!r} has values outside the range of {name}. Store it as bfloat16 or float32."
        )
    digest = tensors_sha256(tensors)
    header = header | {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        _check_header(temporary, path, too_large)


def add_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Add entries to a file's metadata, atomically; its tensors stay where they are, byte for byte.

    Raises:
        ExportError: The header would be larger than other programs read.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = {**header.get("__metadata__", {}), **entries}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    # The format's own writer aligns tensors to multiples of eight bytes.
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        _check_header(temporary, path, ExportError)


def _check_header(file: Path, path: Path, too_large: type[SdloraError]) -> None:
    num_bytes = header_bytes(file)
    if num_bytes > MAX_HEADER_BYTES:
        raise too_large(
            f"{path.name} would have a header of {num_bytes} bytes, but other programs read at most {MAX_HEADER_BYTES} "
            "(1 MiB). Use less metadata or fewer lora.targets."
        )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all tensors' names and bytes in the order of their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode("utf-8"))
        digest.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metadata_of_new_ranks(files: list[LoraFile]) -> dict[str, str]:
    """The metadata that stays true of a LoRA whose ranks were computed from these files.

    Returns:
        Of one file everything but what describes single ranks. Of several files the entries on base and trigger that
        are the same in all of them; their training figures describe no sum.
    """
    first, *others = (file.metadata for file in files)
    if not others:
        return {key: value for key, value in first.items() if not key.startswith(_OF_SINGLE_RANKS)}
    return {k: v for k, v in first.items() if k in _OF_THE_BASE and all(other.get(k) == v for other in others)}


def _rank_and_alpha(state: LoraState) -> dict[str, str]:
    """The most common rank and alpha, under kohya's keys."""
    ranks, alphas = Counter(w.down.shape[0] for w in state.values()), Counter(w.alpha for w in state.values())
    return {
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(alphas.most_common(1)[0][0]),
    }


def _training_header(state: LoraState, metadata: LoraMetadata) -> dict[str, str]:
    family = FAMILIES[family_named(metadata.architecture)]
    size = metadata.resolution_px
    # ModelSpec knows no name for what flow matching predicts.
    predicts = {"epsilon": "epsilon", "v_prediction": "v"}.get(metadata.prediction_type)
    header = _SPEC | {
        "modelspec.implementation": family.implementation,
        "modelspec.architecture": f"{metadata.architecture}/lora",
        **({"modelspec.prediction_type": predicts} if predicts else {}),
        "modelspec.title": metadata.name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ss_output_name": metadata.name,
        "ss_base_model_version": family.base_version + ("_v" if metadata.architecture.endswith("-v") else ""),
        "ss_v2": str(family.base_version == "sd_v2"),
        "ss_sd_model_name": Path(metadata.base).name,
        "ss_network_module": "networks.lora",
        "ss_resolution": f"({size}, {size})",
        "ss_epoch": str(metadata.epoch),
        "ss_steps": str(metadata.step),
        "ss_training_started_at": str(metadata.started),
        "sdlora.version": __version__,
        "sdlora.settings": json.dumps(metadata.settings, sort_keys=True),
    }
    if metadata.clip_skip is not None:
        header["ss_clip_skip"] = str(metadata.clip_skip)
    if metadata.trigger:
        header["modelspec.trigger_phrase"] = metadata.trigger
        header["modelspec.usage_hint"] = f"Write {metadata.trigger} in the prompt."
    return header | _rank_and_alpha(state)
