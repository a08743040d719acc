"""Turns settings into what the rooms below take: their arguments, and the images, read and fitted to the base model.

Used by whatever starts from a configuration: the run, the cache, estimates and the studio. Images are read first, so
that what is wrong with them is found before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sdlora.common.bundled import ImageFolder, resolve_data_folder
from sdlora.config.schema import RunConfig
from sdlora.config.schema_data import DataConfig
from sdlora.data.checks import Decode, decode, summarize_warnings
from sdlora.data.dataset import Dataset, load_dataset, load_mask_pixels, split_validation
from sdlora.data.fit import examine_lengths, examine_sizes
from sdlora.data.images import MaskKind
from sdlora.diffusion.timesteps import Density
from sdlora.errors import ConfigError, DataError
from sdlora.lora.inject import Adapter, AdapterSpec, find_targets, inject
from sdlora.lora.timestep_rank import TimestepRank, quantiles_of, timestep_rank_in
from sdlora.lora_files.pipelines import attach
from sdlora.models.base import BaseModel, references_to_other_files
from sdlora.run.lora_inputs import starting_file
from sdlora.training.settings import TrainingSettings


def text_is_trained(config: RunConfig) -> bool:
    """Whether the adapter is on the text encoder, too."""
    return config.lora.trains_text


def timestep_rank(config: RunConfig, base: BaseModel | None = None) -> TimestepRank | None:
    """The ranks in use at each timestep, or None for all of them everywhere.

    On a flow-matching base they follow the density of its timesteps at the largest size, or the file's that is
    continued.
    """
    lora = config.lora
    if lora.timestep_rank_min is None:
        return None
    if (file := starting_file(config)) is not None:
        return timestep_rank_in(file.metadata, file.name)
    if base is None or base.prediction_type != "flow":
        return TimestepRank(lora.timestep_rank_min, lora.timestep_rank_alpha)
    edges = training_settings(config, base).density.edges
    return TimestepRank(lora.timestep_rank_min, lora.timestep_rank_alpha, base.told, quantiles_of(edges))


def adapter_spec(config: RunConfig, base: BaseModel | None = None) -> AdapterSpec:
    """The kind of adapter that is trained; without a base model its ranks are those of a DDPM schedule."""
    lora = config.lora
    return AdapterSpec(
        target_ranks=lora.target_ranks,
        target_alphas=lora.target_alphas,
        rslora=lora.rslora,
        dora=lora.dora,
        dropout=lora.dropout,
        rank_dropout=lora.rank_dropout,
        module_dropout=lora.module_dropout,
        init=lora.init,
        timestep_rank=timestep_rank(config, base),
    )


def make_adapter(config: RunConfig, base: BaseModel) -> Adapter:
    """Inject an adapter, fresh or of lora.from_file, into a base's network, and its text encoders if they are a target.

    Raises:
        ConfigError: A target matches no layer, or the initialisation needs more singular values than a layer has.
        DataError: The file does not fit this base model.
    """
    lora, spec = config.lora, adapter_spec(config, base)
    _refuse_for_family(config, base)
    base.offload()  # a network that waits elsewhere comes back first: what is trained stays where it is put
    texts = base.move_text_encoders() if text_is_trained(config) else base.text_encoders
    if (file := starting_file(config)) is not None:
        adapter = attach(base.network, file, text_encoders=texts)
        for layer in adapter.layers.values():
            layer.dropout, layer.rank_dropout = lora.dropout, lora.rank_dropout
            layer.module_dropout = lora.module_dropout
        return adapter
    paths = find_targets(base.network, lora.targets, base.text_encoders)
    return inject(base.network, paths, lora.rank, lora.alpha, config.seed, spec=spec, text_encoders=texts)


def _refuse_for_family(config: RunConfig, base: BaseModel) -> None:
    """Refuse what a base model without a UNet and CLIP does not have."""
    if base.trains_text:
        return
    if text_is_trained(config):
        raise ConfigError(
            f"lora.targets: the text encoder of {base.path!r} is a language model, which LoRAs leave as it is. Remove "
            "'text_encoder'."
        )


def training_settings(config: RunConfig, base: BaseModel | None = None) -> TrainingSettings:
    """How the adapter is trained: the options of the same names, and what is derived from others and from the base.

    Without a base model, timesteps are those of a DDPM schedule.

    Raises:
        ConfigError: The density means nothing on this base model.
    """
    train, timesteps = config.train, config.timesteps
    flows = base is not None and base.prediction_type == "flow"
    density = {"auto": "logit_normal" if flows else "uniform"}.get(timesteps.density, timesteps.density)
    edge = 0 if base is None else config.data.resolutions(base.resolution_px)[-1]
    values = {name: value for section in (config.data, train, config.loss) for name, value in section}
    values |= {
        "seed": config.seed,
        "density": Density(
            density,
            mean=timesteps.mean,
            std=timesteps.std,
            minimum=timesteps.min,
            maximum=timesteps.max,
            high_noise_keep=timesteps.high_noise_keep,
            log_shift=0.0 if base is None else base.log_shift_at((edge, edge)),
            shift_at=None if base is None else base.log_shift_at,
        ),
        "coverage": timesteps.coverage,
        "preview_every_steps": config.preview.every_steps if config.preview.enabled else 0,
        "text_is_trained": text_is_trained(config),
        "text_encoder_factor": (train.text_encoder_learning_rate or train.learning_rate) / train.learning_rate,
        "rate_factors": {name: rate / train.learning_rate for name, rate in train.target_learning_rates.items()},
    }
    return TrainingSettings(**{field.name: values[field.name] for field in fields(TrainingSettings)})


@dataclass(frozen=True)
class Images:
    """All images of a run, those for prior preservation from a folder, and what the user should know about them."""

    training: Dataset
    validation: Dataset | None
    prior: Dataset | None
    notices: tuple[str, ...]


def read_images(data: DataConfig, seed: int, decode: Decode = decode) -> Images:
    """Read and check all folders of a configuration; the seed is for the images that are split off.

    `decode` replaces the function of that name, for example by one that caches.

    Raises:
        DataError: A folder has faults.
        ConfigError: A folder is named for two purposes.
    """
    _refuse_one_folder_twice(data)

    def read(*folders: ImageFolder, masks: MaskKind = "none") -> Dataset:
        trigger_only, background = data.allow_trigger_only, data.background
        return load_dataset(
            *folders, allow_trigger_only=trigger_only, background=background, masks=masks, decode=decode
        )

    training = read(*data.sets, masks=data.masks)
    validation = None if data.validation_set is None else read(data.validation_set)
    prior = None if data.prior_set is None else read(data.prior_set)
    if validation is None and data.validation_split:
        training, validation = split_validation(training, seed)
    _refuse_calls(training, validation, prior)
    notices = training.notices
    if prior is not None:
        # Their names, which noise depends on, must differ from those of training images.
        named = tuple(replace(example, name=f"preserved: {example.name}") for example in prior.examples)
        notices += tuple(f"data.preservation_folder: {notice}" for notice in prior.notices)
        prior = replace(prior, examples=named)
    return Images(training, validation, prior, notices)


def _refuse_one_folder_twice(data: DataConfig) -> None:
    training = [resolve_data_folder(one.folder).resolve() for one in data.sets]
    validation, prior = (
        None if folder is None else resolve_data_folder(folder).resolve()
        for folder in (data.validation_folder, data.preservation_folder)
    )
    if len(set(training)) < len(training):
        raise ConfigError("data.sets names a folder twice. Name each once, and give it more repeats.")
    if validation in training:
        raise ConfigError(
            "data.validation_folder is data.folder: images that are trained on cannot validate. Leave "
            "data.validation_folder unset to split a few images off, or name another folder."
        )
    if prior is not None and prior in (*training, validation):
        raise ConfigError(
            "data.preservation_folder is also a training or validation folder. Name a folder with images of what the "
            "base model should keep, such as other subjects of the same class."
        )


def fit_images(images: Images, base: BaseModel, data: DataConfig, batch_size: int) -> Images:
    """The same images in the base model's training sizes, with more notices.

    Raises:
        DataError: All white of a mask is cropped away.
        ConfigError: The base model cannot be trained at one of the sizes.
    """

    def fitted(dataset: Dataset) -> Dataset:
        return dataset.with_buckets(data.resolution_px or base.resolution_px, data.bucket_options)

    training = fitted(images.training)
    sizes_px = {edge for example in training.examples for bucket in example.buckets for edge in bucket}
    if odd := sorted(edge for edge in sizes_px if edge % base.size_step_px):
        raise ConfigError(
            f"{base.path!r} needs widths and heights that are multiples of {base.size_step_px} px, and some images "
            f"would be trained at {odd[0]}. Set data.bucket_step_px and data.resolution_px to multiples of "
            f"{base.size_step_px}."
        )
    for example in training.examples:
        for bucket in example.buckets:
            load_mask_pixels(replace(example, bucket=bucket))  # raises now, and not after the run's folder was made
    # Validation is of whole images and unweighted, so that its loss compares across settings.
    validation = None if images.validation is None else fitted(images.validation.without_masks())
    prior = None if images.prior is None else fitted(images.prior)
    sizes, buckets = ({e.name: e.bucket for e in read.examples} for read in (images.training, training))
    # In batches of one, an image alone in its bucket loses nothing.
    found = [f for f in examine_sizes(sizes, buckets) if f.kind != "lone bucket" or batch_size > 1]
    lengths = {e.name: max(map(base.num_tokens, e.texts)) for e in training.examples}
    found += examine_lengths(lengths, base.max_tokens, in_windows=base.reads_windows)
    return Images(training, validation, prior, (*images.notices, *summarize_warnings(found)))


def _refuse_calls(*datasets: Dataset | None) -> None:
    """Refuse captions that call up other files, whose content the words around them would be trained for."""
    faults = [
        f"  {example.name}: {calls[0]}"
        for dataset in datasets
        for example in (dataset.examples if dataset else ())
        if (calls := references_to_other_files("\n".join([example.caption, *example.texts])))
    ]
    if faults:
        raise DataError(
            "Captions call up a textual inversion or another network, which sdlora does not load. Describe in words "
            "what the image shows:\n" + "\n".join(faults)
        )
