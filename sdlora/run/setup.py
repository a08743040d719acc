"""What a run works with, checked and loaded before anything is written, and the base model that processes keep.

The second step of a run, after its folder was checked; also used by estimates, the cache and the check of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from sdlora.cache.tensors import Cache
from sdlora.common.bundled import BUILTIN_BASES
from sdlora.config.exposures import exposures_warning
from sdlora.config.presets import presets
from sdlora.config.schema import BaseConfig, RunConfig
from sdlora.copycheck.checker import Checker
from sdlora.copycheck.embedders import load_embedders
from sdlora.copycheck.parts import why_unavailable
from sdlora.copycheck.scale import make_gallery
from sdlora.errors import ConfigError, OutOfMemoryError
from sdlora.estimate.hints import Stage, out_of_memory_message
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel, TextOptions
from sdlora.models.families import FAMILIES, family_named, family_on_disk, suits
from sdlora.models.identity import weights_identity
from sdlora.models.load import LoadOptions, load_base
from sdlora.models.sibling import load_sibling
from sdlora.previews.sampler import PreviewRequest
from sdlora.previews.sibling import Sibling
from sdlora.run.arguments import Images, fit_images, make_adapter, read_images, text_is_trained, training_settings
from sdlora.run.folder import RunFolder
from sdlora.run.lora_inputs import content_hashes, merging, origins, with_settings_of_file
from sdlora.run.preview_requests import drawn_as, further_requests, preview_request
from sdlora.training.data import TrainingData, evaluation_data, training_data
from sdlora.training.distributed import ALONE, Processes
from sdlora.training.schedules import Schedule
from sdlora.training.trainer import Trainer
from sdlora.training.validation import Validation

BaseSource = Callable[[RunConfig, torch.device, torch.dtype], BaseModel]
"""Where a run's base model comes from; it has no adapter in it."""

_BUILTIN = {name: f"the built-in base {name}" for name in BUILTIN_BASES}
_TITLES: dict[str, str] = {name: family.title for name, family in FAMILIES.items()} | _BUILTIN
HIGH_RANK = 32


@dataclass(frozen=True)
class Loaded:
    """Images and base model, before there is an adapter.

    Attributes:
        identity: A hash of the UNet.
        images: Their buckets assigned.
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
        validation: Measures the adapter on validation images, or None.
        previews: What is drawn after every epoch and checked for copies, or None.
        further: What is drawn beside it, and only shown.
        checker: Draws previews and checks whether they are copies, or None.
        origins: Metadata of the LoRA files that the run started with.
        lora_hashes: Their SHA-256.
    """

    config: RunConfig
    folder: RunFolder
    loaded: Loaded
    trainer: Trainer
    validation: Validation | None
    previews: PreviewRequest | None
    further: tuple[PreviewRequest, ...]
    checker: Checker | None
    origins: dict[str, str]
    lora_hashes: dict[str, str]

    @property
    def base(self) -> BaseModel:
        """The base model, with the adapter in it."""
        return self.loaded.base

    @property
    def adapter(self) -> Adapter:
        """The adapter that is trained."""
        return self.trainer.adapter

    @property
    def drawn(self) -> tuple[PreviewRequest, ...]:
        """All that is drawn after every epoch."""
        return () if self.previews is None else (self.previews, *self.further)

    @property
    def num_previews(self) -> int:
        """How many images that are."""
        return sum(len(request.wanted()) for request in self.drawn)

    @property
    def data(self) -> TrainingData:
        """The training images."""
        return self.trainer.data


@contextmanager
def hints_in(stage: Stage, context: RunContext) -> Iterator[None]:
    """Raise an `OutOfMemoryError` that says what to set if the device runs out of memory at a stage of a run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        resolution_px = context.config.data.resolutions(context.base.resolution_px)[-1]
        raise OutOfMemoryError(out_of_memory_message(context.config, stage, resolution_px)) from error


def fresh_base(
    config: RunConfig, device: torch.device, dtype: torch.dtype, *, allows_distilled: bool = False
) -> BaseModel:
    """Load the base model of a configuration, its frozen UNet in a type; one that is distilled only if allowed.

    Raises:
        SdloraError: There is no such base model, or it cannot be used that way.
    """
    if device.type == "cuda":
        # VAE and text encoders stay in float32; beside a 16-bit UNet, TF32 is fine enough for their products.
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    options = replace(
        _load_options(config),
        change=merging(config),
        allows_distilled=allows_distilled or config.base.training_adapter is not None,
    )
    found = config.base.path if config.base.path in BUILTIN_BASES else family_on_disk(config.base.path)
    check_family(config.base, found)
    base = load_base(config.base.path, device=device, dtype=dtype, options=options)
    if found is None:  # a hub id
        check_family(config.base, family_named(base.architecture))
    if config.base.prediction_type is not None and base.prediction_type == "flow":
        raise ConfigError(
            f"base.prediction_type = {config.base.prediction_type!r} is for noise schedules, and {base.path!r} "
            "predicts the velocity of flow matching. Leave it unset."
        )
    if config.loss.zero_terminal_snr:
        base.use_zero_terminal_snr()
    return base


def _load_options(config: RunConfig) -> LoadOptions:
    """How a configuration's base model and its sibling are loaded, apart from what is merged."""
    base, text = config.base, TextOptions(config.base.clip_skip, config.data.max_token_windows)
    return LoadOptions(
        base.revision,
        base.variant,
        base.prediction_type,
        text,
        base.quantization,
        base.offload == "blocks",
        components=base.components,
        text_encoder=base.text_encoder,
        vae=base.vae,
    )


def sibling_of(config: RunConfig, loaded: Loaded, adapter: Adapter) -> Sibling | None:
    """What draws the previews of a configuration in the place of its base model, or None; its notice is added.

    Raises:
        SdloraError: It cannot be loaded, or does not belong to the base model.
    """
    if (path := config.preview_base) is None:
        return None
    options = replace(_load_options(config), change=merging(config, for_previews=True))
    parts = load_sibling(path, loaded.base, dtype=loaded.base.network.dtype, options=options)
    steps = config.preview.num_steps
    loaded.notices.append(f"Previews are drawn by {path} in {steps} steps, without guidance.")
    return Sibling(parts, adapter)


def check_family(base: BaseConfig, found: str | None) -> None:
    """Check that a configuration is made for the family of its base model; None is a family that is not known yet.

    Raises:
        ConfigError: It is made for another one.
    """
    if found is None or suits(base.family, found):
        return
    fitting = [preset.name for preset in presets() if preset.family == found]
    advice = f"Start from {' or '.join(fitting)}" if fitting else "Write a configuration for it"
    raise ConfigError(
        f"The configuration is made for {_TITLES[base.family]} (base.family = {base.family!r}), and base.path = "
        f"{base.path!r} is {_TITLES[found]}. {advice}, or give --force to train with these settings."
    )


class BasePool:
    """The base model that a process keeps between runs and previews, a `BaseSource`.

    It is loaded again for another base, or if an adapter was left in it.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._base: BaseModel | None = None
        self._modules: list[object] = []

    def __call__(self, config: RunConfig, device: torch.device, dtype: torch.dtype) -> BaseModel:
        """The base of a configuration; see `fresh_base`."""
        merged = {file: found for file, found in content_hashes(config).items() if file.startswith("base.")}
        key = (config.base, merged, config.data.max_token_windows, device, dtype, config.loss.zero_terminal_snr)
        # A run that failed while its adapter was being injected leaves other modules, or hooks, behind.
        if self._base is None or key != self._key or _modules(self._base) != self._modules:
            self._base = None  # before the next one is loaded, so that memory never holds two
            self._base = fresh_base(config, device, dtype)
            self._key, self._modules = key, _modules(self._base)
        return self._base


def _modules(base: BaseModel) -> list[object]:
    """The modules of a base's networks, with their hooks."""
    return [
        (name, id(module), *module._forward_hooks, *module._forward_pre_hooks)
        for network in (base.network, *base.text_encoders)
        for name, module in network.named_modules()
    ]


def forget_accelerator() -> None:
    """Let the next run choose its own precision; Accelerate keeps that of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def load(config: RunConfig, bases: BaseSource = fresh_base) -> Loaded:
    """Check and load images and base model.

    Raises:
        SdloraError: Anything is wrong with them.
    """
    device, dtype, precision = choose_device(config.train.device, config.train.precision)
    # Images are checked before the base model is loaded, which may take minutes.
    images = read_images(config.data, config.seed)
    base = bases(config, device, dtype)
    images = fit_images(images, base, config.data, config.train.batch_size)
    return Loaded(
        base=base,
        # Before adapters change the names of the weights.
        identity=weights_identity(base.network, base.network.config),
        images=images,
        cache=Cache(Path(config.cache.dir) if config.cache.dir else None, base),
        device=device,
        precision=precision,
        notices=list(images.notices),
    )


def prepare(
    config: RunConfig, folder: RunFolder, bases: BaseSource = fresh_base, processes: Processes = ALONE
) -> RunContext:
    """Check and load everything that a run needs; its folder is not touched.

    Raises:
        SdloraError: Anything is wrong with the settings, the images or the base model.
    """
    config = with_settings_of_file(config)
    loaded = load(config, bases)
    config = drawn_as(config, type(loaded.base))
    adapter = make_adapter(config, loaded.base)
    trainer = _make_trainer(config, loaded, adapter, processes)
    loaded.notices.extend(_notices(config, trainer, loaded.cache))
    validation = make_validation(config, loaded, adapter)
    previews: PreviewRequest | None = None
    further: tuple[PreviewRequest, ...] = ()
    if config.preview.enabled:
        previews = preview_request(config.preview, loaded.images.training)
        previews = replace(previews, sibling=sibling_of(config, loaded, adapter))
        further = further_requests(config.preview, loaded.images.training, previews)
    checker = None
    if previews is not None and config.copycheck.enabled:
        checker = make_checker(config, loaded, adapter, previews, validation)
    hashes = content_hashes(config)
    entries = origins(config, hashes)
    return RunContext(config, folder, loaded, trainer, validation, previews, further, checker, entries, hashes)


def _make_trainer(config: RunConfig, loaded: Loaded, adapter: Adapter, processes: Processes) -> Trainer:
    images, on_cpu = loaded.images, loaded.device.type == "cpu"
    settings = training_settings(config, loaded.base)
    data = training_data(settings, images.training, loaded.cache)
    prior = None if images.prior is None else training_data(settings, images.prior, loaded.cache)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="fp16" if loaded.precision == "fp16" else "no")
    trainer = Trainer(settings, adapter, data, accelerator, prior, processes)
    if Schedule.of(settings).warmup_steps(trainer.total_steps) >= trainer.total_steps:
        raise ConfigError(
            f"train.warmup_steps = {settings.warmup_steps} never ends in {trainer.total_steps} steps. Choose a tenth "
            "of them or less, or raise data.repeats."
        )
    return trainer


def _notices(config: RunConfig, trainer: Trainer, cache: Cache) -> Iterator[str]:
    """What the user should know; decides as well whether the cache keeps the embeddings of all captions."""
    if config.lora.from_file is not None:
        yield (
            f"Training continues from {Path(config.lora.from_file).name}, of rank {config.lora.rank} in "
            f"{', '.join(config.lora.targets)}. The base model itself is drawn as epoch 0."
        )
    if config.lora.from_file is None and (config.lora.names_layers or config.train.target_learning_rates):
        yield trainer.adapter.described()
    if ":" in config.train.optimizer:
        yield (
            f"{config.train.optimizer} is none of the optimizers that sdlora tests: whether a resumed run ends exactly "
            "as an uninterrupted one is taken on trust."
        )
    epochs = config.train.epochs
    repeats = [example.repeats for example in trainer.data.dataset.examples]
    if (warning := exposures_warning(min(repeats) * epochs, max(repeats) * epochs)) is not None:
        yield warning
    if (rank := max(config.lora.ranks())) > HIGH_RANK:
        yield (
            f"Rank {rank} needs more memory and copies the training images more easily than rank 8 to {HIGH_RANK}. "
            "Compare a lower rank before you keep it."
        )
    for term in trainer.terms[1:]:
        known, reached = len(term.loss.data.dataset.examples), len({e.example for e in term.schedule.timesteps})
        if reached < known:
            yield (
                f"{known - reached} of {known} images of data.preservation_folder are not reached in a run of this "
                "length."
            )
    if not trainer.data.text_is_trained:
        captions = {caption for term in trainer.terms for caption in term.loss.data.captions(term.schedule.timesteps)}
        needed_gib, max_gib = cache.text_bytes(len(captions)) / 2**30, config.cache.max_text_gib
        cache.keeps_text = needed_gib <= max_gib
        if not cache.keeps_text:
            yield (
                f"{len(captions):,} different captions would take {needed_gib:.2g} GiB (cache.max_text_gib = "
                f"{max_gib:g}), so each is encoded at its exposure: a step takes a little longer, and the result is "
                "the same."
            )


def make_checker(
    config: RunConfig, loaded: Loaded, adapter: Adapter, previews: PreviewRequest, validation: Validation | None
) -> Checker:
    """The copy check of an adapter against the images that were loaded with its base model.

    A network that was asked for and is not available is reported in the notices.
    """
    images, copycheck = loaded.images, config.copycheck
    gallery = make_gallery(images.training, images.validation, config.data.background)
    embedders, missing = load_embedders(sscd=copycheck.sscd, dinov2=copycheck.dinov2, device=loaded.device)
    loaded.notices.extend(missing)
    if copycheck.parts and (reason := why_unavailable(list(gallery.images.values()))) is not None:
        loaded.notices.append(reason)
        copycheck = copycheck.model_copy(update={"parts": False})
    data = evaluation_data(images.training, loaded.cache, text_is_trained=text_is_trained(config))
    return Checker(
        adapter, data, validation, config.seed, previews, gallery, embedders, copycheck.parts, loaded.identity
    )


def make_validation(config: RunConfig, loaded: Loaded, adapter: Adapter) -> Validation | None:
    """Measures an adapter on the validation images, if there are any."""
    if loaded.images.validation is None:
        return None
    data = evaluation_data(loaded.images.validation, loaded.cache, text_is_trained=text_is_trained(config))
    return Validation(data, adapter, config.seed)


def choose_device(name: str, precision: str) -> tuple[torch.device, torch.dtype, str]:
    """The device to train on, the frozen UNet's type, and its name, by `train.device` and `train.precision`.

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
