"""A run's LoRA files: what they say of themselves, the proof beside each, and an image to know them by.

Used by `run`.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from sdlora.common.files import write_json
from sdlora.copycheck.verdict import EpochCheck
from sdlora.data.dataset import Example
from sdlora.errors import ConfigError
from sdlora.events import EpochDone
from sdlora.lora_files.read import DTYPES_BY_NAME
from sdlora.lora_files.verify import verify_lora
from sdlora.lora_files.write import LoraMetadata, add_metadata, save_lora
from sdlora.previews.sampler import PreviewRequest
from sdlora.run.arguments import Arguments
from sdlora.run.setup import RunContext

THUMBNAIL_PX = 256
# A quarter of what ComfyUI reads: names and shapes of all of SDXL take another third.
MOST_PRIVATE_BYTES = 1 << 18


def export_epoch(context: RunContext, event: EpochDone) -> None:
    """Write an epoch's LoRA, load it back through diffusers, and keep the figures beside it."""
    file, state, config = context.folder.epoch_lora(event.epoch), context.adapter.state(), context.config
    dtype = DTYPES_BY_NAME[config.file.precision]
    save_lora(file, state, metadata=_metadata(context, event), spelling=config.file.format, dtype=dtype)
    proof = verify_lora(file, state, context.base.fresh_pipeline(), Arguments(config).timestep_rank, dtype)
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
        timestep_rank=Arguments(config).timestep_rank,
        prediction_type=context.base.prediction_type,
        clip_skip=config.base.clip_skip,
        private=captions_told(context.data.dataset.examples) if config.file.include_captions else {},
    )


def captions_told(examples: Sequence[Example]) -> dict[str, str]:
    """Folders and captions as kohya's trainer tells them, which A1111 and Forge show.

    Raises:
        ConfigError: They are too many for a header that programs read.
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
    told = {"ss_tag_frequency": json.dumps(tags), "ss_dataset_dirs": json.dumps(sizes)}
    num_bytes = sum(len(json.dumps(text)) for text in told.values())
    if num_bytes > MOST_PRIVATE_BYTES:
        raise ConfigError(
            f"file.include_captions: the captions make {num_bytes} bytes, and at most {MOST_PRIVATE_BYTES} fit into "
            "the part of a file that programs read. Set it to false."
        )
    return told


def add_thumbnail(file: Path, request: PreviewRequest, folder: Path) -> None:
    """Put a preview into a LoRA file's metadata: the first new prompt's that is no copy; none if all are.

    Args:
        file: The LoRA.
        request: What was drawn.
        folder: The epoch's.
    """
    shown = presentable(request, folder)
    if not shown:
        return
    with Image.open(folder / "previews" / shown[0][0]) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    add_metadata(file, {"modelspec.thumbnail": f"data:image/jpeg;base64,{text}"})


def presentable(request: PreviewRequest, folder: Path, *, captions: bool = False) -> list[tuple[str, str]]:
    """The previews that may be shown to everyone, file name and prompt: no copies, and of no caption.

    Args:
        request: What was drawn.
        folder: The epoch's.
        captions: Whether those of captions are among them, last.
    """
    check = EpochCheck.read(folder)
    copies = {match.file.rpartition("/")[2] for match in check.previews if match.significant} if check else set()
    drawn = zip(request.file_names(), request.wanted(), request.kinds(), strict=True)
    found = [(file, prompt, kind) for file, (prompt, _), kind in drawn if file not in copies]
    kinds = ("novel", "training") if captions else ("novel",)
    return [(file, prompt) for wanted in kinds for file, prompt, kind in found if kind == wanted]
