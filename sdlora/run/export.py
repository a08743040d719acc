"""A run's LoRA files: metadata, the proof beside each file, a thumbnail, and what other programs make of them.

Used by `run` at the end of every epoch and of the run.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.common.files import write_json
from sdlora.config.schema import RunConfig
from sdlora.copycheck.verdict import EpochCheck
from sdlora.data.dataset import Example
from sdlora.errors import ConfigError
from sdlora.events import EpochDone
from sdlora.lora_files.read import DTYPES_BY_NAME
from sdlora.lora_files.verify import VERIFY_TIMESTEPS, verify_lora
from sdlora.lora_files.write import LoraMetadata, add_metadata, save_lora
from sdlora.previews.sampler import PreviewRequest
from sdlora.run.arguments import timestep_rank
from sdlora.run.setup import RunContext

THUMBNAIL_PX = 256
# A quarter of the header that ComfyUI reads; the names and shapes of all of SDXL take another third.
MAX_CAPTION_BYTES = 1 << 18


def export_epoch(context: RunContext, event: EpochDone) -> None:
    """Write an epoch's LoRA, verify it in diffusers, and save the result beside it."""
    file, state, config = context.folder.epoch_lora(event.epoch), context.adapter.state(), context.config
    dtype = DTYPES_BY_NAME[config.file.precision]
    save_lora(file, state, metadata=_metadata(context, event), spelling=config.file.format, dtype=dtype)
    proof = verify_lora(file, state, context.base.fresh_pipeline(), timestep_rank(config), dtype)
    context.base.offload()
    write_json(file.with_name("proof.json"), asdict(proof))


def _metadata(context: RunContext, event: EpochDone) -> LoraMetadata:
    config = context.config
    return LoraMetadata(
        name=context.folder.name,
        base=context.base.path,
        architecture=context.base.architecture,
        resolution_px=config.data.resolution_px or context.base.resolution_px,
        trigger=", ".join(config.data.triggers) or None,
        epoch=event.epoch,
        step=event.step,
        started=context.folder.config.stat().st_mtime,
        settings={"seed": config.seed}
        | {name: getattr(config, name).model_dump() for name in ("lora", "train", "timesteps", "loss")},
        timestep_rank=timestep_rank(config),
        prediction_type=context.base.prediction_type,
        clip_skip=config.base.clip_skip,
        private=caption_metadata(context.data.dataset.examples) if config.file.include_captions else {},
    )


def caption_metadata(examples: Sequence[Example]) -> dict[str, str]:
    """Folders and captions under kohya's metadata keys, which A1111 and Forge show.

    Raises:
        ConfigError: They are too long for the header of a file.
    """
    folders: dict[str, list[Example]] = {}
    for example in examples:
        folders.setdefault(example.path.parent.resolve().name, []).append(example)
    tags = {
        folder: dict(Counter(tag for e in found for part in e.prompt.split(",") if (tag := part.strip())))
        for folder, found in folders.items()
    }
    sizes = {
        folder: {"n_repeats": max(e.repeats for e in found), "img_count": len(found)}
        for folder, found in folders.items()
    }
    metadata = {"ss_tag_frequency": json.dumps(tags), "ss_dataset_dirs": json.dumps(sizes)}
    num_bytes = sum(len(json.dumps(text)) for text in metadata.values())
    if num_bytes > MAX_CAPTION_BYTES:
        raise ConfigError(
            f"file.include_captions: the captions take {num_bytes} bytes of metadata, more than {MAX_CAPTION_BYTES}, "
            "which other programs may not read. Set it to false."
        )
    return metadata


def add_thumbnail(file: Path, request: PreviewRequest, folder: Path) -> None:
    """Add a thumbnail to the LoRA file of an epoch's folder: the first preview of a new prompt that is no copy."""
    previews = presentable(request, folder)
    if not previews:
        return
    with Image.open(folder / "previews" / previews[0][0]) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    add_metadata(file, {"modelspec.thumbnail": f"data:image/jpeg;base64,{text}"})


def presentable(request: PreviewRequest, folder: Path, *, captions: bool = False) -> list[tuple[str, str]]:
    """The previews of an epoch's folder that can be published, as file name and prompt: no copies.

    Those drawn from captions come last, and only with `captions`.
    """
    check = EpochCheck.read(folder)
    copies = {match.file.rpartition("/")[2] for match in check.previews if match.significant} if check else set()
    drawn = zip(request.file_names(), request.wanted(), request.kinds(), strict=True)
    found = [(file, prompt, kind) for file, (prompt, _), kind in drawn if file not in copies]
    kinds = ("novel", "training") if captions else ("novel",)
    return [(file, prompt) for wanted in kinds for file, prompt, kind in found if kind == wanted]


def limits_elsewhere(config: RunConfig, proof: Mapping[str, Any]) -> list[str]:
    """What other programs than diffusers do differently with a file of this kind, a sentence each.

    `proof` holds the figures of `sdlora.lora_files.verify.Verification`, by name.
    """
    lora, sentences = config.lora, []
    if lora.timestep_rank_min is not None:
        timesteps = ", ".join(map(str, VERIFY_TIMESTEPS))
        sentences.append(
            "Programs that ignore the timestep rank use all ranks: their predictions differ by "
            f"{proof['rank_mask_difference']:.0%} of what the LoRA changes (root mean square at timesteps {timesteps})."
            " In diffusers, sdlora.apply_timestep_rank sets the right ranks."
        )
    if lora.dora or config.file.format == "peft":
        what = "DoRA" if lora.dora else "file"
        sentences.append(
            f"This {what} has PEFT's names, which diffusers and PEFT read; ComfyUI, A1111 and Forge do not."
        )
    if config.file.precision != "fp32":
        sentences.append(
            f"Rounding the file to {config.file.precision} changes predictions by up to "
            f"{proof['max_rewriting_error']:.2g}, where the LoRA changes them by up to {proof['max_effect']:.2g}."
        )
    if config.loss.zero_terminal_snr:
        sentences.append(
            "This LoRA was trained on a noise schedule that ends in pure noise. Sample with one that does, too: in "
            "diffusers a scheduler with rescale_betas_zero_snr=True and timestep_spacing='trailing'."
        )
    return sentences
