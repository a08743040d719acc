"""The images of a run: those that are trained, held out and preserved, read before the base and fitted to it.

Used by `parts`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdlora.common.bundled import resolve_data_folder
from sdlora.config.schema import RunConfig
from sdlora.config.schema_data import TrainingSet
from sdlora.data.checks import examine_sizes, warnings_in_short
from sdlora.data.dataset import Dataset, Source, load_dataset, load_mask_pixels
from sdlora.data.masks import MaskKind
from sdlora.data.split import split_off
from sdlora.errors import ConfigError, DataError
from sdlora.models.base import BaseModel
from sdlora.models.text import calls_of_other_files


@dataclass(frozen=True)
class Images:
    """Everything that is looked at in a run.

    Attributes:
        trained: The set.
        heldout: Images that are never trained, or None.
        preserved: Images of what the base is to keep, or None.
        notices: What the user should know of them.
    """

    trained: Dataset
    validation: Dataset | None
    prior: Dataset | None
    notices: tuple[str, ...]


def read_images(config: RunConfig) -> Images:
    """Read and check all folders of a configuration.

    Raises:
        DataError: Any folder has faults.
        ConfigError: A folder is named for two things.
    """
    data = config.data
    _refuse_one_folder_twice(config)
    trained = _read(config, *data.sets, masks=data.masks)
    validation = None if data.validation_set is None else _read(config, data.validation_set)
    prior = None if data.prior_set is None else _read(config, data.prior_set)
    if validation is None and data.validation_split:
        trained, validation = split_off(trained, config.seed)
    _refuse_calls(trained, validation, prior)
    notices = trained.notices
    if prior is not None:
        # So that no name, and no noise that follows from it, is a trained image's.
        named = tuple(replace(example, name=f"preserved: {example.name}") for example in prior.examples)
        notices += tuple(f"data.preservation_folder: {told}" for told in prior.notices)
        prior = replace(prior, examples=named)
    return Images(trained, validation, prior, notices)


def _read(config: RunConfig, *sets: TrainingSet, masks: MaskKind = "none") -> Dataset:
    return load_dataset(
        *(Source(resolve_data_folder(one.folder), one.name, one.caption, one.trigger, one.repeats) for one in sets),
        allow_trigger_only=config.data.allow_trigger_only,
        background=config.data.background,
        masks=masks,
    )


def _refuse_one_folder_twice(config: RunConfig) -> None:
    trained = [resolve_data_folder(one.folder).resolve() for one in config.data.sets]
    validation, prior = (
        None if folder is None else resolve_data_folder(folder).resolve()
        for folder in (config.data.validation_folder, config.data.preservation_folder)
    )
    if len(set(trained)) < len(trained):
        raise ConfigError("data.sets names a folder twice. Name each once, and give it more repeats.")
    if validation in trained:
        raise ConfigError(
            "data.validation_folder is data.folder: images that are trained on cannot validate. Leave "
            "data.validation_folder unset to split a few images off, or name another folder."
        )
    if prior is not None and prior in (*trained, validation):
        raise ConfigError(
            "data.preservation_folder is trained as the set or held out, too. It takes images of what is beside your "
            "subject: name another folder."
        )


def fit_images(config: RunConfig, images: Images, base: BaseModel) -> Images:
    """The same images in the sizes that the base is trained at, with what that brings to light.

    Raises:
        DataError: A mask's white is cropped away.
    """
    trained = _with_buckets(config, base, images.trained)
    for example in trained.examples:
        load_mask_pixels(example)  # an error now, rather than in the run's folder
    # The validation loss is of whole images, as it is unweighted, so that it is one measure for all settings.
    validation = None if images.validation is None else _with_buckets(config, base, images.validation.without_masks())
    prior = None if images.prior is None else _with_buckets(config, base, images.prior)
    found = _sizes(config, images.trained, trained) + _long_captions(base, trained)
    return Images(trained, validation, prior, (*images.notices, *found))


def _with_buckets(config: RunConfig, base: BaseModel, dataset: Dataset) -> Dataset:
    data = config.data
    resolution_px = data.resolution_px or base.resolution_px
    return dataset.with_buckets(resolution_px, data.bucket_step_px, buckets=data.buckets)


def _sizes(config: RunConfig, unassigned: Dataset, dataset: Dataset) -> list[str]:
    sizes, buckets = ({e.name: e.bucket for e in data.examples} for data in (unassigned, dataset))
    found = examine_sizes(sizes, buckets)
    # Batches of one have nothing to share a bucket with.
    return warnings_in_short([f for f in found if f.kind != "lone bucket" or config.train.batch_size > 1])


def _long_captions(base: BaseModel, dataset: Dataset) -> list[str]:
    long = [e.name for e in dataset.examples if base.num_tokens(e.prompt) > base.max_tokens]
    if not long:
        return []
    return [
        f"{len(long)} captions are longer than {base.max_tokens} tokens; their ends are not read. First: {long[0]}. "
        "More windows of 75 are read with data.max_token_windows."
    ]


def _refuse_calls(*datasets: Dataset | None) -> None:
    """Refuse captions that call up other files: the words around them would be trained for what those files show."""
    faults = [
        f"  {example.name}: {calls[0]}"
        for dataset in datasets
        for example in (dataset.examples if dataset else ())
        if (calls := calls_of_other_files(example.caption))
    ]
    if faults:
        raise DataError(
            "Captions call up a textual inversion or another network, which only other programs know. Write in words "
            "what is to be seen:\n" + "\n".join(faults)
        )
