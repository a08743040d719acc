"""The LoRA file: written atomically with the metadata that other programs read, and read back with care.

Metadata holds captions and folder names only if they are asked for: what an image shows and where it lay is
the artist's own.
"""

from __future__ import annotations

import json
import math
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

import sdlora
from sdlora.common.files import atomic_path
from sdlora.errors import ExportError
from sdlora.lora.inject import LoraState
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.algebra import update
from sdlora.lora_files.names import PEFT_METADATA, UNET_PREFIX, file_form, to_kohya, to_peft
from sdlora.lora_files.read import (
    MAX_HEADER_BYTES,
    Spelling,
    family_of,
    in_type,
    parse_lora,
    read_tensors,
    tensors_sha256,
)
from sdlora.models.architectures import family_named

_KINDS = {
    "cross_attention": r"_attn2_",
    "self_attention": r"_attn1_",
    "mlp": r"_ff_net_",
    "projection": r"_proj_(in|out)$",
    "conv": r"_(resnets|downsamplers|upsamplers)_",
}


@dataclass(frozen=True)
class LoraMetadata:
    """What a file says of itself.

    Attributes:
        name: The LoRA's title.
        base: What it was trained on, as the user called it; only the last part of a path is written.
        architecture: ModelSpec's name of the family, such as "stable-diffusion-v1".
        resolution_px: The size it was trained at.
        trigger: The word that calls it up.
        epoch: How many epochs were trained.
        step: How many optimizer steps were trained.
        started: When training began, in seconds since 1970.
        settings: The settings worth knowing later, JSON values.
        timestep_rank: The ranks to use at each noise level, which the file's weights alone cannot tell.
        private: What only the artist may decide to tell: captions and folders, as other trainers name them.
        prediction_type: What the base predicts.
        clip_skip: Which of the text encoder's layers was read, counted from the last; None for the family's own.
    """

    name: str
    base: str
    architecture: str
    resolution_px: int
    trigger: str | None
    epoch: int
    step: int
    started: float
    settings: dict[str, Any]
    timestep_rank: TimestepRank | None = None
    private: Mapping[str, str] = field(default_factory=dict)
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    clip_skip: int | None = None


def save_lora(
    path: Path,
    state: LoraState,
    *,
    metadata: LoraMetadata,
    spelling: Spelling = "kohya",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a LoRA, atomically.

    Args:
        path: The .safetensors file.
        state: The weights; they are written as `file_form` gives them.
        metadata: What the file says of itself.
        spelling: Whose names; PEFT's whatever it says if there are magnitudes (DoRA), since kohya's lose them.
        dtype: What the numbers are stored in; alphas are always float32.

    Raises:
        ExportError: A number is too large for the type, or the header for the programs that read it.
    """
    form = file_form(state)
    extra = dict(metadata.private)
    if spelling == "peft" or any(weights.magnitude is not None for weights in form.values()):
        tensors, extra[PEFT_METADATA] = to_peft(form)
    else:
        two = len(family_named(metadata.architecture).text_encoders) > 1
        tensors = to_kohya(form, two_text_encoders=two)
    if metadata.timestep_rank is not None:
        extra["sdlora.timestep_rank_min"] = str(metadata.timestep_rank.rank_min)
        extra["sdlora.timestep_rank_alpha"] = str(metadata.timestep_rank.alpha)
    if any(weights.initial is not None for weights in state.values()):
        extra["sdlora.frozen_start"] = "the second half of the ranks"
    tensors = in_type(tensors, dtype)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=_header(form, tensors, metadata) | extra)
        _check_header(temporary, path)


def add_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Add to what a file says of itself; its tensors stay where they are, byte for byte.

    Raises:
        ExportError: The header would be too large for the programs that read it.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = {**header.get("__metadata__", {}), **entries}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    # Tensors begin at multiples of eight, as the format's own writer lays them.
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        _check_header(temporary, path)


def _check_header(file: Path, path: Path) -> None:
    with file.open("rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ExportError(
            f"{path.name} would have a header of {header_bytes} bytes, and programs read 1 MiB. Train fewer targets."
        )


def _header(state: LoraState, tensors: dict[str, Tensor], metadata: LoraMetadata) -> dict[str, str]:
    ranks = Counter(weights.down.shape[0] for weights in state.values())
    alphas = Counter(weights.alpha for weights in state.values())
    family = family_named(metadata.architecture)
    base_name = Path(metadata.base).name
    size = f"{metadata.resolution_px}x{metadata.resolution_px}"
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{metadata.architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v" if metadata.prediction_type == "v_prediction" else "epsilon",
        "modelspec.title": metadata.name,
        "modelspec.resolution": size,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.hash_sha256": "0x" + tensors_sha256(tensors),
        "ss_output_name": metadata.name,
        "sshs_model_hash": tensors_sha256(tensors),
        "ss_base_model_version": family.base_version + ("_v" if metadata.architecture.endswith("-v") else ""),
        "ss_v2": str(family.base_version == "sd_v2"),
        "ss_sd_model_name": base_name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(alphas.most_common(1)[0][0]),
        "ss_resolution": f"({metadata.resolution_px}, {metadata.resolution_px})",
        "ss_epoch": str(metadata.epoch),
        "ss_steps": str(metadata.step),
        "ss_training_started_at": str(metadata.started),
        "sdlora.version": sdlora.__version__,
        "sdlora.settings": json.dumps(metadata.settings, sort_keys=True),
    }
    if metadata.clip_skip is not None:
        header["ss_clip_skip"] = str(metadata.clip_skip)
    if metadata.trigger:
        header["modelspec.trigger_phrase"] = metadata.trigger
        header["modelspec.usage_hint"] = f"Write {metadata.trigger} in the prompt."
    return header


def describe_lora(path: Path) -> dict[str, Any]:
    """What a LoRA file of any trainer holds, for people and programs.

    Raises:
        DataError: It cannot be read; see `sdlora.lora_files.read.parse_lora`.
    """
    file = parse_lora(*read_tensors(path), name=path.name)
    state, metadata = file.state, file.metadata
    modules: Counter[str] = Counter()
    for name in state:
        kind = next((kind for kind, mark in _KINDS.items() if re.search(mark, name)), "other")
        modules[kind if name.startswith(UNET_PREFIX) else "text_encoder"] += 1
    unknown = any(math.isnan(weights.alpha) for weights in state.values())
    dora, frozen_start = any(w.magnitude is not None for w in state.values()), "sdlora.frozen_start" in metadata
    numbers = sum(
        w.down.numel() + w.up.numel() + (0 if w.magnitude is None else w.magnitude.numel()) for w in state.values()
    )
    norm = math.sqrt(sum(float(torch.linalg.matrix_norm(update(weights))) ** 2 for weights in state.values()))
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "names": file.spelling,
        "family": family_of(state),
        "dtype": str(file.dtype).removeprefix("torch."),
        "title": metadata.get("modelspec.title"),
        "architecture": metadata.get("modelspec.architecture"),
        "base": metadata.get("ss_sd_model_name"),
        "trigger": metadata.get("modelspec.trigger_phrase"),
        "ranks": sorted({weights.down.shape[0] for weights in state.values()}),
        "alphas": "not in the file" if unknown else sorted({weights.alpha for weights in state.values()}),
        "modules": dict(modules),
        "dora": dora,
        "frozen_start": frozen_start,
        "timestep_rank_min": metadata.get("sdlora.timestep_rank_min"),
        # Half of the ranks of such a file are the start, which was not trained.
        "parameters": numbers // 2 if frozen_start else numbers,
        # How long the update of a DoRA is depends on the base.
        "update_norm": None if unknown or dora else round(norm, 6),
        "metadata": metadata,
    }
