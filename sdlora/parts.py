"""What a run works with, checked and loaded before anything is written.

Floor 7, used by `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from sdlora.adapters import make_adapter
from sdlora.config import RunConfig
from sdlora.data.cache import Cache
from sdlora.data.captions import with_trigger
from sdlora.data.dataset import Dataset, load_dataset
from sdlora.data.doctor import examine_sizes, warnings_in_short
from sdlora.data.split import split_off
from sdlora.errors import ConfigError
from sdlora.lora.inject import Adapter
from sdlora.lora.targets import find_targets
from sdlora.models.base import BaseModel
from sdlora.models.load import load_base
from sdlora.models.sd import weights_identity
from sdlora.preview.arbiter import load_arbiters
from sdlora.preview.checker import Checker, Subject
from sdlora.preview.nulls import make_gallery
from sdlora.preview.prompts import novel_prompts
from sdlora.preview.sampler import PreviewRequest
from sdlora.processes import ALONE, Processes
from sdlora.runfolder import RunFolder
from sdlora.shipped import resolve_data_folder
from sdlora.training.data import TrainingData, held_out_data, training_data
from sdlora.training.heldout import HeldOut
from sdlora.training.loop import Trainer

BaseSource = Callable[[RunConfig, torch.device, torch.dtype], BaseModel]
"""Where a run's base comes from; it has no adapter in it."""

HIGH_RANK = 32
NUM_NOVEL = 3


@dataclass
class Parts:
    """Everything a run works with, checked and loaded."""

    config: RunConfig
    folder: RunFolder
    base: BaseModel
    adapter: Adapter
    targets: list[str]
    data: TrainingData
    heldout: HeldOut | None
    trainer: Trainer
    previews: PreviewRequest | None
    checker: Checker | None
    notices: list[str]
    device: torch.device
    precision: str


@dataclass
class Loaded:
    """The pictures and the base, before there is an adapter.

    Attributes:
        base: Its networks, without adapters.
        identity: A hash of its UNet, for cache keys; empty where nothing asks for it.
        dataset: The pictures, their buckets assigned.
        heldout: Pictures that are never trained, or None.
        cache: Of latents, text states and what the copy check compares with.
        notices: What the user should know.
        device: Where the networks are.
        precision: What the UNet computes in.
    """

    base: BaseModel
    identity: str
    dataset: Dataset
    heldout: Dataset | None
    cache: Cache
    notices: list[str]
    device: torch.device
    precision: str


def fresh_base(config: RunConfig, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """The base of a configuration, loaded anew.

    Args:
        config: `base` is read, and whether its schedule ends in pure noise.
        device: Where to compute.
        dtype: The frozen UNet's type.

    Raises:
        SdloraError: There is no such base, or it cannot be used that way.
    """
    base = load_base(
        config.base.path, device=device, dtype=dtype, revision=config.base.revision, variant=config.base.variant
    )
    if config.loss.zero_terminal_snr:
        base.use_zero_terminal_snr()
    return base


def load(config: RunConfig, bases: BaseSource = fresh_base) -> Loaded:
    """Check and load pictures and base.

    Raises:
        SdloraError: Anything that is wrong with them.
    """
    device, dtype, precision = choose_device(config)
    # The pictures are looked at before the base is loaded, which may take minutes.
    dataset = _load_dataset(config, config.data.folder)
    heldout = None if config.data.holdout is None else _load_dataset(config, config.data.holdout)
    if heldout is not None and heldout.folder.resolve() == dataset.folder.resolve():
        raise ConfigError(
            "data.holdout is data.folder: what is trained cannot be held out. Leave data.holdout unset, and a few "
            "pictures are kept out of training, or name another folder."
        )
    if heldout is None and config.data.holdout_split:
        dataset, heldout = split_off(dataset, config.seed)
    notices = list(dataset.notices)
    base = bases(config, device, dtype)
    unassigned, dataset = dataset, _with_buckets(config, base, dataset)
    notices += _size_notices(config, unassigned, dataset) + _long_captions(base, dataset, config.data.trigger)
    return Loaded(
        base=base,
        # Before adapters change the names of the weights.
        identity=weights_identity(base.unet, base.unet.config) if config.copycheck.enabled else "",
        dataset=dataset,
        heldout=None if heldout is None else _with_buckets(config, base, heldout),
        cache=Cache(Path(config.cache.dir) if config.cache.dir else None, base),
        notices=notices,
        device=device,
        precision=precision,
    )


def prepare(
    config: RunConfig, folder: RunFolder, bases: BaseSource = fresh_base, processes: Processes = ALONE
) -> Parts:
    """Check and load everything that a configuration asks for.

    Args:
        config: What to do.
        folder: The run's folder, which is not touched.
        bases: Where the base comes from.
        processes: Those that share every batch.

    Raises:
        SdloraError: Anything that is wrong with the settings, the pictures or the base.
    """
    loaded = load(config, bases)
    base, notices = loaded.base, loaded.notices
    targets = find_targets(base.unet, config.lora.targets, base.text_encoder)
    adapter = make_adapter(config, base, targets)
    rank = max(config.lora.ranks())
    if rank > HIGH_RANK:
        notices.append(
            f"Rank {rank} needs more memory and copies the training pictures more easily than "
            f"rank 8 to {HIGH_RANK}. Compare a lower rank before you keep it."
        )
    data = training_data(config, loaded.dataset, loaded.cache)
    measured = heldout_measure(config, loaded, adapter)
    on_cpu = loaded.device.type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="fp16" if loaded.precision == "fp16" else "no")
    trainer = Trainer(config, base, adapter, data, accelerator, processes)
    if config.train.warmup_steps >= trainer.total_steps:
        raise ConfigError(
            f"train.warmup_steps = {config.train.warmup_steps} never ends in {trainer.total_steps} steps. "
            "Choose a tenth of them or less, or raise data.repeats."
        )
    previews = preview_request(config, loaded.dataset) if config.preview.enabled else None
    checker = None
    if previews is not None and config.copycheck.enabled:
        checker = make_checker(config, loaded, adapter, previews, measured)
    return Parts(
        config=config,
        folder=folder,
        base=base,
        adapter=adapter,
        targets=targets,
        data=data,
        heldout=measured,
        trainer=trainer,
        previews=previews,
        checker=checker,
        notices=notices,
        device=loaded.device,
        precision=loaded.precision,
    )


def make_checker(
    config: RunConfig, loaded: Loaded, adapter: Adapter, previews: PreviewRequest, heldout: HeldOut | None
) -> Checker:
    """The copy check of an adapter on the pictures that were loaded with its base.

    A network that was asked for and cannot be had is told in the notices.
    """
    gallery = make_gallery(loaded.dataset, loaded.heldout, config.data.background)
    copycheck = config.copycheck
    arbiters, missing = load_arbiters(sscd=copycheck.sscd, dinov2=copycheck.dinov2, device=loaded.device)
    loaded.notices.extend(missing)
    data = held_out_data(config, loaded.dataset, loaded.cache)
    subject = Subject(adapter, data, heldout, loaded.cache, loaded.identity, config.seed)
    return Checker(subject, previews, gallery, arbiters)


def heldout_measure(config: RunConfig, loaded: Loaded, adapter: Adapter) -> HeldOut | None:
    """What measures an adapter on the held-out pictures, if there are any."""
    if loaded.heldout is None:
        return None
    return HeldOut(held_out_data(config, loaded.heldout, loaded.cache), adapter, config.seed)


def choose_device(config: RunConfig) -> tuple[torch.device, torch.dtype, str]:
    """The device to train on, the frozen UNet's type, and its name.

    Raises:
        ConfigError: The device is not there, or fp16 is asked of a CPU.
    """
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"train.device = {name!r} cannot be used here. Try 'auto', 'cpu' or 'cuda'.") from error
    precision = config.train.precision
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if fast else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision = 'fp16' needs a GPU. On a CPU choose 'bf16' or 'fp32'.")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return device, dtype, precision


def _load_dataset(config: RunConfig, folder: str) -> Dataset:
    data = config.data
    return load_dataset(
        resolve_data_folder(folder),
        caption=data.caption,
        trigger=data.trigger,
        allow_trigger_only=data.allow_trigger_only,
        background=data.background,
    )


def _with_buckets(config: RunConfig, base: BaseModel, dataset: Dataset) -> Dataset:
    data = config.data
    resolution_px = data.resolution_px or base.resolution_px
    return dataset.with_buckets(resolution_px, data.bucket_step_px, buckets=data.buckets)


def _size_notices(config: RunConfig, unassigned: Dataset, dataset: Dataset) -> list[str]:
    sizes, buckets = ({e.name: e.bucket for e in data.examples} for data in (unassigned, dataset))
    found = examine_sizes(sizes, buckets)
    # Batches of one have nothing to share a bucket with.
    return warnings_in_short([f for f in found if f.kind != "lone bucket" or config.train.batch_size > 1])


def _long_captions(base: BaseModel, dataset: Dataset, trigger: str | None) -> list[str]:
    long = [e.name for e in dataset.examples if base.num_tokens(with_trigger(e.caption, trigger)) > base.max_tokens]
    if not long:
        return []
    return [
        f"{len(long)} captions are longer than {base.max_tokens} tokens; their ends are not read. First: {long[0]}."
    ]


def preview_request(config: RunConfig, dataset: Dataset) -> PreviewRequest:
    """What is drawn: some captions of the set, then the user's prompts or new ones."""
    preview = config.preview
    captions = [with_trigger(example.caption, config.data.trigger) for example in dataset.examples]
    # Spread over the set, which is in the order of its names.
    number = min(preview.num_captions, len(captions))
    drawn = list(dict.fromkeys(captions[index * len(captions) // number] for index in range(number)))
    novel = preview.prompts or novel_prompts(captions, config.data.trigger, NUM_NOVEL)
    return PreviewRequest(
        prompts=(*drawn, *novel),
        seeds=tuple(preview.seeds),
        negative_prompt=preview.negative_prompt,
        num_steps=preview.num_steps,
        guidance=preview.guidance,
        num_captions=len(drawn),
    )
