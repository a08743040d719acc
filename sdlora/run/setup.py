"""What a run works with, checked and loaded before anything is written.

The second step of a run, after its folder was checked; also used by estimates, the cache and the check of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from sdlora.cache.tensors import Cache
from sdlora.config.schema import PreviewConfig, RunConfig
from sdlora.copycheck.checker import Checker, Subject
from sdlora.copycheck.embedders import load_embedders
from sdlora.copycheck.null_distribution import make_gallery
from sdlora.data.dataset import Dataset
from sdlora.errors import ConfigError
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel, weights_identity
from sdlora.models.load import load_base
from sdlora.previews.prompts import novel_prompts
from sdlora.previews.sampler import PreviewRequest
from sdlora.run.arguments import Arguments
from sdlora.run.datasets import Images, fit_images, read_images
from sdlora.run.folder import RunFolder
from sdlora.training.adapter import make_adapter
from sdlora.training.data import TrainingData, evaluation_data, training_data
from sdlora.training.distributed import ALONE, Processes
from sdlora.training.trainer import Trainer
from sdlora.training.validation import Validation

BaseSource = Callable[[RunConfig, torch.device, torch.dtype], BaseModel]
"""Where a run's base model comes from; it has no adapter in it."""

HIGH_RANK = 32
NUM_NOVEL = 3


@dataclass(frozen=True)
class Loaded:
    """Images and base model, before there is an adapter.

    Attributes:
        base: Its networks, without adapters.
        identity: A hash of its UNet.
        images: Their buckets assigned.
        cache: Of latents, text embeddings and what the copy check compares with.
        device: Where the UNet is.
        precision: What it computes in, such as "bf16".
        notices: What the user should know, a sentence each; grows until training starts.
    """

    base: BaseModel
    identity: str
    images: Images
    cache: Cache
    device: torch.device
    precision: str
    notices: list[str]


@dataclass(frozen=True)
class RunContext:
    """What the stages of a run share.

    Attributes:
        config: What the user asked for.
        folder: Where the run's files go.
        loaded: Images and base model.
        trainer: Trains the adapter.
        validation: Measures it on validation images, or None.
        previews: What is drawn after every epoch, or None.
        checker: Draws previews and checks whether they are copies, or None.
    """

    config: RunConfig
    folder: RunFolder
    loaded: Loaded
    trainer: Trainer
    validation: Validation | None
    previews: PreviewRequest | None
    checker: Checker | None

    @property
    def base(self) -> BaseModel:
        """The base model, with the adapter in it."""
        return self.loaded.base

    @property
    def adapter(self) -> Adapter:
        """The adapter that is trained."""
        return self.trainer.adapter

    @property
    def data(self) -> TrainingData:
        """The training images."""
        return self.trainer.data


def fresh_base(config: RunConfig, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """Load the base model of a configuration.

    Args:
        config: `base` is read, and whether the noise schedule ends in pure noise.
        device: Where to compute.
        dtype: The frozen UNet's type.

    Raises:
        SdloraError: There is no such base model, or it cannot be used that way.
    """
    if device.type == "cuda":
        # VAE and text encoders stay in float32; beside a 16-bit UNet, TF32 is fine enough for their products.
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    base = load_base(config.base.path, device=device, dtype=dtype, options=Arguments(config).load_options)
    if config.loss.zero_terminal_snr:
        base.use_zero_terminal_snr()
    return base


def load(arguments: Arguments, bases: BaseSource = fresh_base) -> Loaded:
    """Check and load images and base model.

    Raises:
        SdloraError: Anything is wrong with them.
    """
    config = arguments.config
    device, dtype, precision = choose_device(config.train.device, config.train.precision)
    # Images are checked before the base model is loaded, which may take minutes.
    images = read_images(config.data, config.seed)
    base = bases(config, device, dtype)
    images = fit_images(images, base, config.data, config.train.batch_size)
    return Loaded(
        base=base,
        # Before adapters change the names of the weights.
        identity=weights_identity(base.unet, base.unet.config),
        images=images,
        cache=Cache(Path(config.cache.dir) if config.cache.dir else None, base),
        device=device,
        precision=precision,
        notices=list(images.notices),
    )


def prepare(
    arguments: Arguments, folder: RunFolder, bases: BaseSource = fresh_base, processes: Processes = ALONE
) -> RunContext:
    """Check and load everything that a run needs.

    Args:
        arguments: What to do.
        folder: The run's folder, which is not touched.
        bases: Where the base model comes from.
        processes: Those that share every batch.

    Raises:
        SdloraError: Anything is wrong with the settings, the images or the base model.
    """
    config = arguments.config
    loaded = load(arguments, bases)
    adapter = make_adapter(arguments.adapter, loaded.base)
    trainer = _make_trainer(arguments, loaded, adapter, processes)
    loaded.notices.extend(
        [
            *_high_rank(max(config.lora.ranks())),
            *_unreached(trainer),
            *_limit_text_cache(trainer, loaded.cache, config.cache.max_text_gib),
        ]
    )
    validation = make_validation(arguments, loaded, adapter)
    previews = preview_request(config.preview, loaded.images.training) if config.preview.enabled else None
    checker = None
    if previews is not None and config.copycheck.enabled:
        checker = make_checker(arguments, loaded, adapter, previews, validation)
    return RunContext(config, folder, loaded, trainer, validation, previews, checker)


def _make_trainer(arguments: Arguments, loaded: Loaded, adapter: Adapter, processes: Processes) -> Trainer:
    images, on_cpu = loaded.images, loaded.device.type == "cpu"
    data = training_data(arguments.captions, images.training, loaded.cache)
    prior = None if images.prior is None else training_data(arguments.captions, images.prior, loaded.cache)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="fp16" if loaded.precision == "fp16" else "no")
    trainer = Trainer(arguments.training, loaded.base, adapter, data, accelerator, prior, processes)
    warmup_steps = arguments.optimizer.warmup_steps
    if warmup_steps >= trainer.total_steps:
        raise ConfigError(
            f"train.warmup_steps = {warmup_steps} never ends in {trainer.total_steps} steps. Choose a tenth of them or "
            "less, or raise data.repeats."
        )
    return trainer


def _high_rank(rank: int) -> list[str]:
    if rank <= HIGH_RANK:
        return []
    return [
        f"Rank {rank} needs more memory and copies the training images more easily than rank 8 to {HIGH_RANK}. Compare "
        "a lower rank before you keep it."
    ]


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
    arguments: Arguments, loaded: Loaded, adapter: Adapter, previews: PreviewRequest, validation: Validation | None
) -> Checker:
    """The copy check of an adapter against the images that were loaded with its base model.

    A network that was asked for and is not available is reported in the notices.
    """
    config, images = arguments.config, loaded.images
    gallery = make_gallery(images.training, images.validation, config.data.background)
    copycheck = config.copycheck
    embedders, missing = load_embedders(sscd=copycheck.sscd, dinov2=copycheck.dinov2, device=loaded.device)
    loaded.notices.extend(missing)
    data = evaluation_data(images.training, loaded.cache, text_is_trained=arguments.text_is_trained)
    subject = Subject(adapter, data, validation, loaded.identity, config.seed)
    return Checker(subject, previews, gallery, embedders)


def make_validation(arguments: Arguments, loaded: Loaded, adapter: Adapter) -> Validation | None:
    """Measures an adapter on the validation images, if there are any."""
    if loaded.images.validation is None:
        return None
    data = evaluation_data(loaded.images.validation, loaded.cache, text_is_trained=arguments.text_is_trained)
    return Validation(data, adapter, arguments.config.seed)


def choose_device(name: str, precision: str) -> tuple[torch.device, torch.dtype, str]:
    """The device to train on, the frozen UNet's type, and its name.

    Args:
        name: `train.device`.
        precision: `train.precision`.

    Raises:
        ConfigError: The device is not available, or fp16 is set for a CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"train.device = {name!r} cannot be used here. Try 'auto', 'cpu' or 'cuda'.") from error
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if fast else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision = 'fp16' needs a GPU. On a CPU choose 'bf16' or 'fp32'.")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return device, dtype, precision


def preview_request(preview: PreviewConfig, dataset: Dataset) -> PreviewRequest:
    """What is drawn: some captions of the dataset, then the user's prompts or generated ones."""
    captions = [example.prompt for example in dataset.examples]
    # Spread over the dataset, which is sorted by name.
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
