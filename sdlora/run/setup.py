"""What a run works with, checked and loaded before anything is written.

Used by `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from sdlora.cache.tensors import Cache
from sdlora.config.schema import RunConfig
from sdlora.copycheck.checker import Checker, Subject
from sdlora.copycheck.embedders import load_embedders
from sdlora.copycheck.null_distribution import make_gallery
from sdlora.data.dataset import Dataset
from sdlora.errors import ConfigError
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel
from sdlora.models.latent_diffusion import weights_identity
from sdlora.models.load import load_base
from sdlora.previews.prompts import novel_prompts
from sdlora.previews.sampler import PreviewRequest
from sdlora.run.arguments import Arguments
from sdlora.run.datasets import fit_images, read_images
from sdlora.run.folder import RunFolder
from sdlora.training.adapter import make_adapter
from sdlora.training.data import TrainingData, evaluation_data, training_data
from sdlora.training.distributed import ALONE, Processes
from sdlora.training.trainer import Trainer
from sdlora.training.validation import Validation

BaseSource = Callable[[RunConfig, torch.device, torch.dtype], BaseModel]
"""Where a run's base comes from; it has no adapter in it."""

HIGH_RANK = 32
NUM_NOVEL = 3


@dataclass
class Parts:
    """Everything a run works with, checked and loaded; `identity` is a hash of the base's UNet."""

    config: RunConfig
    folder: RunFolder
    base: BaseModel
    adapter: Adapter
    data: TrainingData
    prior: TrainingData | None
    validation: Validation | None
    trainer: Trainer
    previews: PreviewRequest | None
    checker: Checker | None
    notices: list[str]
    device: torch.device
    precision: str
    identity: str


@dataclass
class Loaded:
    """The images and the base, before there is an adapter.

    Attributes:
        base: Its networks, without adapters.
        identity: A hash of its UNet.
        dataset: The images, their buckets assigned.
        heldout: Images that are never trained, or None.
        preserved: Images of what the base is to keep, or None.
        cache: Of latents, text states and what the copy check compares with.
        notices: What the user should know.
        device: Where the networks are.
        precision: What the UNet computes in.
    """

    base: BaseModel
    identity: str
    dataset: Dataset
    validation: Dataset | None
    prior: Dataset | None
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
    if device.type == "cuda":
        # VAE and text encoders stay in float32; beside a UNet of 16 bits their products need not be finer than TF32.
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    base = load_base(config.base.path, device=device, dtype=dtype, options=Arguments(config).load_options)
    if config.loss.zero_terminal_snr:
        base.use_zero_terminal_snr()
    return base


def load(config: RunConfig, bases: BaseSource = fresh_base) -> Loaded:
    """Check and load images and base.

    Raises:
        SdloraError: Anything that is wrong with them.
    """
    device, dtype, precision = choose_device(config)
    # The images are looked at before the base is loaded, which may take minutes.
    images = read_images(config)
    base = bases(config, device, dtype)
    images = fit_images(config, images, base)
    return Loaded(
        base=base,
        # Before adapters change the names of the weights.
        identity=weights_identity(base.unet, base.unet.config),
        dataset=images.trained,
        validation=images.validation,
        prior=images.prior,
        cache=Cache(Path(config.cache.dir) if config.cache.dir else None, base),
        notices=list(images.notices),
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
        SdloraError: Anything that is wrong with the settings, the images or the base.
    """
    arguments = Arguments(config)
    loaded = load(config, bases)
    base, notices = loaded.base, loaded.notices
    adapter = make_adapter(arguments.adapter, base)
    rank = max(config.lora.ranks())
    if rank > HIGH_RANK:
        notices.append(
            f"Rank {rank} needs more memory and copies the training images more easily than "
            f"rank 8 to {HIGH_RANK}. Compare a lower rank before you keep it."
        )
    data = training_data(arguments.captions, loaded.dataset, loaded.cache)
    measured = validation_measure(config, loaded, adapter)
    on_cpu = loaded.device.type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="fp16" if loaded.precision == "fp16" else "no")
    prior = None if loaded.prior is None else training_data(arguments.captions, loaded.prior, loaded.cache)
    trainer = Trainer(arguments.training, base, adapter, data, accelerator, prior, processes)
    notices += _unreached(trainer) + _limit_text_cache(trainer, loaded.cache, config.cache.max_text_gib)
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
        data=data,
        prior=prior,
        validation=measured,
        trainer=trainer,
        previews=previews,
        checker=checker,
        notices=notices,
        device=loaded.device,
        precision=loaded.precision,
        identity=loaded.identity,
    )


def _unreached(trainer: Trainer) -> list[str]:
    """Says how many images for prior preservation the run is too short for."""
    for term in trainer.terms[1:]:
        known, reached = len(term.loss.data.dataset.examples), len({e.example for e in term.schedule.timesteps})
        if reached < known:
            return [
                f"{known - reached} of {known} images of data.preservation_folder are not reached in a run of this "
                "length."
            ]
    return []


def _limit_text_cache(trainer: Trainer, cache: Cache, max_text_gib: float) -> list[str]:
    """Encode captions at every exposure if keeping all of them would take too much space; says so."""
    if trainer.data.text_is_trained:
        return []
    captions = {caption for term in trainer.terms for caption in term.loss.data.captions(term.schedule.timesteps)}
    needed_gib = cache.text_bytes(len(captions)) / 2**30
    cache.keeps_text = needed_gib <= max_text_gib
    if cache.keeps_text:
        return []
    return [
        f"{len(captions):,} different captions would take {needed_gib:.2g} GiB (cache.max_text_gib = "
        f"{max_text_gib:g}), so each is encoded at its exposure: a step takes a little longer, and the result is the "
        "same."
    ]


def make_checker(
    config: RunConfig, loaded: Loaded, adapter: Adapter, previews: PreviewRequest, validation: Validation | None
) -> Checker:
    """The copy check of an adapter on the images that were loaded with its base.

    A network that was asked for and cannot be had is told in the notices.
    """
    gallery = make_gallery(loaded.dataset, loaded.validation, config.data.background)
    copycheck = config.copycheck
    embedders, missing = load_embedders(sscd=copycheck.sscd, dinov2=copycheck.dinov2, device=loaded.device)
    loaded.notices.extend(missing)
    data = evaluation_data(loaded.dataset, loaded.cache, text_is_trained=Arguments(config).text_is_trained)
    subject = Subject(adapter, data, validation, loaded.cache, loaded.identity, config.seed)
    return Checker(subject, previews, gallery, embedders)


def validation_measure(config: RunConfig, loaded: Loaded, adapter: Adapter) -> Validation | None:
    """What measures an adapter on the validation images, if there are any."""
    if loaded.validation is None:
        return None
    data = evaluation_data(loaded.validation, loaded.cache, text_is_trained=Arguments(config).text_is_trained)
    return Validation(data, adapter, config.seed)


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


def preview_request(config: RunConfig, dataset: Dataset) -> PreviewRequest:
    """What is drawn: some captions of the set, then the user's prompts or new ones."""
    preview = config.preview
    captions = [example.prompt for example in dataset.examples]
    # Spread over the set, which is in the order of its names.
    number = min(preview.num_captions, len(captions))
    drawn = list(dict.fromkeys(captions[index * len(captions) // number] for index in range(number)))
    triggers = list(dict.fromkeys(example.trigger for example in dataset.examples))
    novel = preview.prompts or [
        prompt for trigger in triggers for prompt in novel_prompts(captions, trigger, -(-NUM_NOVEL // len(triggers)))
    ]
    return PreviewRequest(
        prompts=(*drawn, *novel),
        seeds=tuple(preview.seeds),
        negative_prompt=preview.negative_prompt,
        num_steps=preview.num_steps,
        guidance=preview.guidance,
        num_captions=len(drawn),
    )
