"""What leaves a run: its LoRA files with the proof beside each, the model card, and their upload to the Hub.

Written by `run` at the end of every epoch and of the run. The card reveals captions, folders and file names only if
`file.include_captions` is set. `sdlora push` sends it: huggingface_hub reads the token from its own store; sdlora never
sees it.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's own
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from PIL import Image

from sdlora.common.files import atomic_path, write_json, write_text
from sdlora.common.run_files import read_state
from sdlora.common.version import __version__
from sdlora.config.schema import RunConfig
from sdlora.copycheck.verdict import EpochCheck
from sdlora.data.dataset import Example
from sdlora.errors import ConfigError, HubError, OutputError
from sdlora.events import EpochDone, PlanMade
from sdlora.lora.inject import NETWORKS
from sdlora.lora_files.elsewhere import check_same_weights, comfyui_modules, dora_elsewhere, write_peft_folders
from sdlora.lora_files.names import PEFT_METADATA
from sdlora.lora_files.read import DTYPES_BY_NAME
from sdlora.lora_files.verify import verify_lora
from sdlora.lora_files.write import LoraMetadata, add_metadata, save_lora
from sdlora.models.architectures import read_header
from sdlora.models.unet import PROBED_TIMESTEPS
from sdlora.previews.sampler import PreviewRequest
from sdlora.run.arguments import timestep_rank
from sdlora.run.folder import RunFolder
from sdlora.run.lora_inputs import CONTINUED, MERGED
from sdlora.run.setup import RunContext

THUMBNAIL_PX = 256
# A quarter of the header that ComfyUI reads; the names and shapes of all of SDXL take another third.
MAX_CAPTION_BYTES = 1 << 18
MAX_PREVIEWS = 6
FOR_DIFFUSERS = "adapter-peft.safetensors"
_FAMILY_TAGS = {
    "stable-diffusion-v1": "stable-diffusion",
    "stable-diffusion-v2": "stable-diffusion",
    "stable-diffusion-xl-v1-base": "stable-diffusion-xl",
}


def export_epoch(context: RunContext, event: EpochDone) -> None:
    """Write an epoch's LoRA, verify it in diffusers, and save the result beside it.

    A DoRA under kohya's names, whose magnitudes diffusers does not read, is verified by its weights, and written under
    PEFT's names for diffusers as well.
    """
    file, state, config = context.folder.epoch_lora(event.epoch), context.adapter.state(), context.config
    dtype, metadata = DTYPES_BY_NAME[config.file.precision], _metadata(context, event)
    pipeline = context.base.fresh_pipeline()
    found: dict[str, Any] = {}
    networks = {name: getattr(pipeline, name, None) for name in NETWORKS}
    save_lora(file, state, metadata=metadata, spelling=config.file.format, dtype=dtype)
    verified, has_two_forms = file, context.base.names.lora_prefix is None
    if has_two_forms and config.file.format == "peft":
        found["comfyui_modules"] = comfyui_modules(state)
    elif has_two_forms and config.lora.dora:
        check_same_weights(file, state, dtype, two_text_encoders=networks["text_encoder_2"] is not None)
        verified = file.with_name(FOR_DIFFUSERS)
        save_lora(verified, state, metadata=metadata, spelling="peft", dtype=dtype)
        known = {name: network for name, network in networks.items() if network is not None}
        found["dora_elsewhere"] = dora_elsewhere(known, state)
    proof = verify_lora(verified, state, pipeline, timestep_rank(config, context.base), dtype)
    context.base.offload()
    write_json(file.with_name("proof.json"), asdict(proof) | found)


def export_run(folder: RunFolder, epoch: int) -> None:
    """Make the files of an epoch the run's."""
    own = folder.epoch_lora(epoch)
    for source, target in ((own, folder.lora), (own.with_name(FOR_DIFFUSERS), folder.lora_for_diffusers)):
        if source.is_file():
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
    if PEFT_METADATA in read_header(own).metadata:
        write_peft_folders(own, folder.peft)


def _metadata(context: RunContext, event: EpochDone) -> LoraMetadata:
    config = context.config
    return LoraMetadata(
        name=context.folder.name,
        base=context.base.path,
        architecture=context.base.architecture,
        resolution_px=config.data.resolutions(context.base.resolution_px)[-1],
        trigger=", ".join(config.data.triggers) or None,
        epoch=event.epoch,
        step=event.step,
        started=context.folder.config.stat().st_mtime,
        settings=_settings(config),
        timestep_rank=timestep_rank(config, context.base),
        prediction_type=context.base.prediction_type,
        clip_skip=config.base.clip_skip,
        private=caption_metadata(context.data.dataset.examples) if config.file.include_captions else {},
        origins=context.origins,
    )


def _settings(config: RunConfig) -> dict[str, Any]:
    sections = {name: getattr(config, name).model_dump() for name in ("lora", "train", "timesteps", "loss")}
    if (file := sections["lora"].pop("from_file")) is not None:
        sections["lora"]["from_file"] = Path(file).name
    return {"seed": config.seed} | sections


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
    if config.base.merge:
        merged = " and ".join(f"{Path(one.file).name} at {one.weight:g}" for one in config.base.merge)
        sentences.append(
            f"This LoRA was trained on a base model with {merged} merged into it: use it together with that."
        )
    if (adapter := config.base.training_adapter) is not None:
        sentences.append(
            f"{Path(adapter).name} was merged into the base model while training. Use this LoRA without it."
        )
    if lora.timestep_rank_min is not None:
        timesteps = ", ".join(map(str, PROBED_TIMESTEPS))
        sentences.append(
            "Programs that ignore the timestep rank use all ranks: their predictions differ by "
            f"{proof['rank_mask_difference']:.0%} of what the LoRA changes (root mean square at timesteps {timesteps})."
            " In diffusers, sdlora.apply_timestep_rank sets the right ranks."
        )
    if "comfyui_modules" in proof:
        sentences.append(
            f"This {'DoRA' if lora.dora else 'file'} has PEFT's names, which diffusers and PEFT read. ComfyUI applies "
            f"{proof['comfyui_modules']} of its {proof['num_modules']} modules, as if alpha were the rank"
            f"{' and without magnitudes' if lora.dora else ''}; A1111 applies none, and Forge refuses it or does as "
            'ComfyUI. For them, set file.format = "kohya".'
        )
    elif (wrong := proof.get("dora_elsewhere")) is not None:
        sentences.append(
            f"ComfyUI and Forge apply all {proof['num_modules']} modules of this DoRA with weights that differ by "
            f"{wrong['ComfyUI']:.2g} of what it changes, since they divide by the norms of the base model's weights. "
            f"A1111 divides by the norms of inputs, and differs by {wrong['A1111']:.2g}: do not use the file there. "
            "diffusers drops its magnitudes and needs the file that ends in -peft.safetensors, which lies beside it."
        )
    elif lora.dora or config.file.format == "peft":
        what = "DoRA" if lora.dora else "file"
        sentences.append(f"This {what} has diffusers' names, which diffusers reads; ComfyUI, A1111 and Forge may not.")
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


def verified_how(proof: Mapping[str, Any]) -> str:
    """A sentence on how a file with these figures was verified; see `limits_elsewhere`."""
    loaded = f"was loaded back through diffusers; its greatest difference is {proof['max_error']:g}."
    if "dora_elsewhere" in proof:
        return f"The file's weights were read back and are those that were trained. Its copy for diffusers {loaded}"
    return f"The file {loaded}"


def write_card(context: RunContext, plan: PlanMade, epoch: int) -> None:
    """Write the card of a finished run, of which an epoch was kept."""
    write_text(context.folder.card, f"---\n{_front_matter(context, epoch)}---\n\n{_body(context, plan, epoch)}")


def _front_matter(context: RunContext, epoch: int) -> str:
    config = context.config
    architecture = context.base.architecture.split("/")[0]
    tags = ["text-to-image", "diffusers", "lora", "template:sd-lora", "sdlora"]
    data = ModelCardData(
        license=config.file.licence,
        base_model=_hub_id(config.base.path),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, *([_FAMILY_TAGS[architecture]] if architecture in _FAMILY_TAGS else [])],
        instance_prompt=", ".join(config.data.triggers) or None,
        widget=[{"text": prompt, "output": {"url": file}} for file, prompt in _previews(context, epoch)] or None,
    )
    return str(data.to_yaml()) + "\n"


def _hub_id(base: str) -> str | None:
    """Name of the base on the Hub; None for a folder, a file or the built-in base."""
    return base if base.count("/") == 1 and not Path(base).expanduser().exists() else None


def _previews(context: RunContext, epoch: int) -> list[tuple[str, str]]:
    """The previews to show, as paths within the run folder, with their prompts."""
    if context.previews is None:
        return []
    folder = context.folder.epoch(epoch)
    found = presentable(context.previews, folder, captions=context.config.file.include_captions)[:MAX_PREVIEWS]
    return [
        ((folder / "previews" / file).relative_to(context.folder.path).as_posix(), prompt) for file, prompt in found
    ]


def _body(context: RunContext, plan: PlanMade, epoch: int) -> str:
    config, name = context.config, context.folder.name
    base = _hub_id(config.base.path)
    family = f"a base model of the family {context.base.architecture}"
    base_name = f"[{base}](https://huggingface.co/{base})" if base else family
    lines = [f"# {name}", "", f"A LoRA for {base_name}, trained with sdlora {__version__}.", ""]
    if triggers := config.data.triggers:
        words = " or ".join(f"`{trigger}`" for trigger in triggers)
        lines += [f"Use {words} in the prompt.", ""]
    lines += ["## Does it copy its training images?", "", _verdict(context, epoch), ""]
    merged = [
        line
        for one in config.base.merge
        for line in (
            f"pipe.load_lora_weights({json.dumps('path/to/' + Path(one.file).name)})",
            f"pipe.fuse_lora(lora_scale={one.weight:g})",
            "pipe.unload_lora_weights()",
        )
    ]
    folder = context.folder
    file = folder.lora_for_diffusers if folder.lora_for_diffusers.is_file() else folder.lora
    prompt = context.previews.prompts[-1] if context.previews is not None else ", ".join(config.data.triggers)
    lines += [
        "## Use",
        "",
        "```python",
        "from diffusers import AutoPipelineForText2Image",
        f"pipe = AutoPipelineForText2Image.from_pretrained({json.dumps(base or 'path/to/the/base')})",
        *merged,
        f'pipe.load_lora_weights("path/to/this/folder", weight_name={json.dumps(file.name)})',
        f"image = pipe({json.dumps(prompt, ensure_ascii=False)}).images[0]",
        "```",
        "",
    ]
    lines += ["## Training", "", *_facts(context, plan, epoch), ""]
    if config.file.licence is None:
        terms = "No licence was chosen. The licence of the base model may restrict models derived from it."
        lines += ["## Licence", "", terms, ""]
    return "\n".join(lines)


def _verdict(context: RunContext, epoch: int) -> str:
    check = EpochCheck.read(context.folder.epoch(epoch))
    if check is None:
        return "No copy check was run."
    room = f" That leaves room for up to {check.most_copies:.0%} of such matches among further images."
    if check.copied_images and (first := check.copied_images[0]).matches > 1:
        room += f" One training image draws {first.matches} of the matches."
    found = f"{check.num_matches} of {len(check.previews)} previews"
    return (
        f"**{check.verdict}**: {found} are as similar to a training image as a copy, according to sdlora's copy check "
        f"against every training image and its mirror image.{room} A part of an image in another place is not seen."
    )


def _facts(context: RunContext, plan: PlanMade, epoch: int) -> list[str]:
    lora, origins = context.config.lora, []
    if lora.from_file is not None:
        source = json.loads(context.origins[CONTINUED])
        origins.append(f"- continued from {source['file']} (SHA-256 {source['sha256']})")
    if context.config.base.merge:
        origins += [
            f"- on a base model with {one['file']} merged into it at {one['weight']:g} (SHA-256 {one['sha256']})"
            for one in json.loads(context.origins[MERGED])
        ]
    exposures = plan.exposures_per_image * epoch // plan.epochs
    seen = f"at most {exposures}" if len({one.repeats for one in plan.sets}) > 1 else str(exposures)
    resolutions = " and ".join(map(str, context.config.data.resolutions(context.base.resolution_px)))
    return [
        f"- {plan.images} images at {resolutions} px, each seen {seen} times by epoch {epoch} of "
        f"{plan.epochs}, which is this file",
        f"- rank {lora.rank}, alpha {lora.alpha:g}, in {', '.join(lora.targets)}",
        *origins,
        f"- {plan.trained_parameters:,} trainable parameters; the base model is unchanged",
        f"- {context.config.train.optimizer}, learning rate {context.config.train.learning_rate:g}",
        "- loaded back through diffusers and compared with the trained weights before it was given away",
    ]


def push_run(folder: RunFolder, repo: str, *, private: bool, api: HfApi | None = None) -> str:
    """Upload a finished run to a repository, "owner/name", and return its URL.

    The repository is created, privately if so asked, if it does not exist.

    Raises:
        OutputError: The folder has no finished run.
        HubError: The Hub cannot be reached, or refuses.
    """
    files = files_to_push(folder)
    api = api or HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder.path, allow_patterns=files, commit_message=f"Upload {folder.name}"
        )
    except HFValidationError as error:
        raise HubError(f"--repo {repo!r} is not a valid repository name; use 'owner/name'.") from error
    except LocalTokenNotFoundError as error:
        raise HubError("You are not logged in to the Hub. Run: hf auth login") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            refusal = f"You cannot write to {repo!r} on the Hub ({status}). Log in with a token that can: hf auth login"
        else:
            refusal = f"The Hub refused {repo!r} with status {status}. Try again later, or see status.huggingface.co."
        raise HubError(refusal) from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise HubError(
            f"The Hub cannot be reached ({type(error).__name__}). Check the network, and that "
            "HF_HUB_OFFLINE is not set."
        ) from error
    return str(url)


def files_to_push(folder: RunFolder) -> list[str]:
    """The files of a run to upload, as paths within its folder.

    Raises:
        OutputError: It is not a run folder, or the run is not done.
    """
    state = read_state(folder.state)
    if state is None:
        raise OutputError(f"{folder.path} is not a run folder: it has no readable state.json.")
    if state.status != "done" or not folder.lora.is_file() or not folder.card.is_file():
        raise OutputError(
            f"The run in {folder.path} is not done (its status is {state.status!r}). Finish it with --resume."
        )
    card = ModelCard.load(folder.card)
    shown = [entry["output"]["url"] for entry in card.data.to_dict().get("widget") or []]
    inside = [url for url in shown if (folder.path / url).resolve().is_relative_to(folder.path.resolve())]
    for_diffusers = [folder.lora_for_diffusers.name] if folder.lora_for_diffusers.is_file() else []
    return [folder.card.name, folder.lora.name, *for_diffusers, *(url for url in inside if Path(url).suffix == ".png")]
