"""One run: from a configuration to a proven LoRA file, as an iterator of events.

Floor 7, the only place that knows the order of things. The faces call `start` and read the events; what is wrong
with the input is found before the run's folder is made.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from sdlora.adapters import limits_elsewhere, make_adapter, timestep_rank
from sdlora.config import RunConfig
from sdlora.configfile import dump_toml, load_config, options
from sdlora.data.cache import Cache
from sdlora.data.dataset import Dataset, load_dataset
from sdlora.data.doctor import examine_sizes, warnings_in_short
from sdlora.data.split import split_off
from sdlora.errors import ConfigError, OutOfMemoryError, SdloraError
from sdlora.events import CheckpointDue, EpochDone, Event, Exported, Notice, PlanMade, PreviewsDone, RunDone
from sdlora.files import atomic_path, remove_partial, write_json
from sdlora.lora.export import LoraMetadata, save_lora
from sdlora.lora.inject import Adapter
from sdlora.lora.prove import prove_lora
from sdlora.lora.targets import find_targets
from sdlora.models.base import BaseModel
from sdlora.models.load import load_base
from sdlora.preview.report import write_report
from sdlora.preview.sampler import PreviewRequest, draw_previews
from sdlora.preview.sheet import contact_sheet
from sdlora.runfolder import Recorder, RunFolder
from sdlora.shipped import resolve_data_folder
from sdlora.training.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from sdlora.training.data import TrainingData, held_out_data, training_data
from sdlora.training.heldout import HeldOut
from sdlora.training.loop import Trainer

HIGH_RANK = 32
_FREE_WHEN_RESUMING = {"cache.dir", "train.log_every_steps", "train.checkpoint_every_steps"}


class Stopped(Exception):
    """The user asked the run to stop; its checkpoint is written and it can be resumed."""


@dataclass
class _Parts:
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
    notices: list[str]
    device: torch.device
    precision: str


def start(
    config: RunConfig, output: Path, *, resume: bool = False, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Run a configuration.

    Args:
        config: What to do.
        output: The run's folder.
        resume: Go on from the newest complete checkpoint in `output`.
        should_stop: Asked between steps; True saves a checkpoint and ends the run with `Stopped`.

    Yields:
        The run's events, ending in `RunDone`.

    Raises:
        SdloraError: Bad input (before anything is written) or a failure on the way.
        Stopped: `should_stop` said so.
    """
    begin = time.monotonic()
    folder = RunFolder(output, config.name or "lora")
    folder.check(resume=resume)
    if resume:
        _check_same(config, folder)
    try:
        parts = _prepare(config, folder)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"The base {config.base.path!r} does not fit into memory. {error}") from error
    folder.create(dump_toml(config))
    remove_partial(folder.path)
    recorder = Recorder(folder)
    try:
        for event in _events(parts, recorder, resume, should_stop, begin):
            recorder.record(event)
            yield event
    except Stopped:
        recorder.finish("stopped")
        raise
    except torch.OutOfMemoryError as error:
        message = (
            f"The {parts.device.type} device ran out of memory. Lower train.batch_size (now {config.train.batch_size}; "
            "raise train.gradient_accumulation_steps by the same factor), then data.resolution_px."
        )
        recorder.log(traceback.format_exc())
        recorder.finish("failed", message)
        raise OutOfMemoryError(message) from error
    except SdloraError as error:
        recorder.finish("failed", str(error))
        raise
    except Exception as error:
        recorder.log(traceback.format_exc())
        recorder.finish("failed", f"{type(error).__name__}: {error}")
        raise
    recorder.finish("done")


# --- Before anything is written ------------------------------------------------------------------------------------


def _prepare(config: RunConfig, folder: RunFolder) -> _Parts:
    device, dtype, precision = choose_device(config)
    notices: list[str] = []
    # The pictures are looked at before the base is loaded, which may take minutes.
    dataset = _load_dataset(config, config.data.folder)
    heldout = None if config.data.holdout is None else _load_dataset(config, config.data.holdout)
    if heldout is None and config.data.holdout_split:
        dataset, heldout = split_off(dataset, config.seed)
    notices += dataset.notices
    base = load_base(
        config.base.path, device=device, dtype=dtype, revision=config.base.revision, variant=config.base.variant
    )
    if config.loss.zero_terminal_snr:
        base.use_zero_terminal_snr()
    unassigned, dataset = dataset, _with_buckets(config, base, dataset)
    notices += _size_notices(config, unassigned, dataset)
    targets = find_targets(base.unet, config.lora.targets, base.text_encoder)
    adapter = make_adapter(config, base, targets)
    rank = max([config.lora.rank, *config.lora.target_ranks.values()])
    if rank > HIGH_RANK:
        notices.append(
            f"Rank {rank} needs more memory and copies the training pictures more easily than "
            f"rank 8 to {HIGH_RANK}. Compare a lower rank before you keep it."
        )
    cache = Cache(Path(config.cache.dir) if config.cache.dir else None, base)
    data = training_data(config, dataset, cache)
    notices += _long_captions(base, dataset)
    measured = None
    if heldout is not None:
        held_out = held_out_data(config, _with_buckets(config, base, heldout), cache)
        measured = HeldOut(held_out, adapter, config.seed)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="fp16" if precision == "fp16" else "no")
    return _Parts(
        config=config,
        folder=folder,
        base=base,
        adapter=adapter,
        targets=targets,
        data=data,
        heldout=measured,
        trainer=Trainer(config, base, adapter, data, accelerator),
        previews=_preview_request(config, dataset),
        notices=notices,
        device=device,
        precision=precision,
    )


def _check_same(config: RunConfig, folder: RunFolder) -> None:
    """A run goes on only with the settings it was started with.

    Raises:
        ConfigError: Any setting that matters differs; all are named with both values.
    """
    before = dict(options(load_config(str(folder.config))))
    different = [
        f"  {name}: was {before[name]!r}, now {value!r}"
        for name, value in options(config)
        if name not in _FREE_WHEN_RESUMING and before[name] != value
    ]
    if different:
        raise ConfigError(f"The run in {folder.path} was started with other settings:\n" + "\n".join(different))


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


def _long_captions(base: BaseModel, dataset: Dataset) -> list[str]:
    long = [e.name for e in dataset.examples if base.num_tokens(e.caption) > base.max_tokens]
    if not long:
        return []
    return [
        f"{len(long)} captions are longer than {base.max_tokens} tokens; their ends are not read. First: {long[0]}."
    ]


def _preview_request(config: RunConfig, dataset: Dataset) -> PreviewRequest | None:
    preview = config.preview
    if not preview.enabled:
        return None
    count = len(dataset.examples)
    # Without prompts of the user's own, three captions spread over the set show at least what is being learned.
    own = [dataset.examples[i * count // 3].caption for i in range(min(3, count))]
    return PreviewRequest(
        prompts=tuple(preview.prompts or dict.fromkeys(own)),
        seeds=tuple(preview.seeds),
        negative_prompt=preview.negative_prompt,
        num_steps=preview.num_steps,
        guidance=preview.guidance,
    )


# --- The run itself ------------------------------------------------------------------------------------------------


def _events(
    parts: _Parts, recorder: Recorder, resume: bool, should_stop: Callable[[], bool], begin: float
) -> Iterator[Event]:
    config, trainer, folder = parts.config, parts.trainer, parts.folder
    yield _plan(parts)
    for message in parts.notices:
        yield Notice(message)
    yield from parts.data.fill(config.train.epochs * config.data.repeats, config.data.background)
    if parts.heldout is not None:
        yield from parts.heldout.data.fill(1, config.data.background)
    losses: dict[int, float] = {}
    checkpoints = complete_checkpoints(folder.checkpoints) if resume else []
    if checkpoints:
        extra = load_checkpoint(checkpoints[-1], trainer)
        recorder.cut_metrics(extra["metrics_bytes"])
        losses = {int(epoch): loss for epoch, loss in extra["heldout_losses"].items()}
        yield Notice(f"Resumed at step {trainer.position.step} of {trainer.total_steps}.")
    else:
        recorder.cut_metrics(0)
        yield from _close_epoch(parts, EpochDone(0, 0, None, None, 0.0), losses)
    for event in trainer.events(should_stop):
        if isinstance(event, CheckpointDue):
            extra = {"metrics_bytes": recorder.metrics_bytes(), "heldout_losses": losses}
            save_checkpoint(folder.checkpoints, trainer, extra)
        elif isinstance(event, EpochDone):
            yield from _close_epoch(parts, event, losses)
        else:
            yield event
    if trainer.position.step < trainer.total_steps:
        raise Stopped
    epoch, reason = _recommend(losses, config.train.epochs)
    with atomic_path(folder.lora) as temporary:
        shutil.copyfile(folder.epoch_lora(epoch), temporary)
    proof = json.loads((folder.epoch(epoch) / "proof.json").read_text(encoding="utf-8"))
    yield Exported(str(folder.lora), epoch, proof["num_modules"], proof["max_error"], folder.lora.stat().st_size)
    yield Notice(reason)
    proven = f"The file was loaded back through diffusers; its greatest difference is {proof['max_error']:g}."
    limits = limits_elsewhere(config.lora, proof)
    for message in limits:
        yield Notice(message)
    _report(parts, [reason, proven, *limits])
    yield RunDone(str(folder.lora), str(folder.path), time.monotonic() - begin)


def _plan(parts: _Parts) -> PlanMade:
    config = parts.config
    heldout = () if parts.heldout is None else parts.heldout.data.dataset.examples
    return PlanMade(
        pictures=len(parts.data.dataset.examples),
        heldout_pictures=len(heldout),
        split_off=[] if config.data.holdout is not None else [example.name for example in heldout],
        repeats=config.data.repeats,
        epochs=config.train.epochs,
        exposures_per_picture=config.data.repeats * config.train.epochs,
        batch_size=config.train.batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        steps=parts.trainer.total_steps,
        trained_parameters=parts.adapter.num_parameters(),
        base_parameters=parts.adapter.num_base_parameters(),
        targets=list(config.lora.targets),
        device=str(parts.device),
        precision=parts.precision,
    )


def _close_epoch(parts: _Parts, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    """What belongs to an epoch's end: held-out loss, the LoRA file, previews, the contact sheet, the page."""
    with parts.trainer.averaged():
        yield from _judge_epoch(parts, event, losses)


def _judge_epoch(parts: _Parts, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    folder = parts.folder
    if parts.heldout is not None:
        event = parts.heldout.measure(event)
        assert event.heldout_loss is not None, "it was just measured"
        losses[event.epoch] = event.heldout_loss
    yield event
    if event.epoch > 0:
        _export(parts, event)
    if parts.previews is not None:
        start = time.monotonic()
        yield from draw_previews(parts.base, parts.previews, folder.epoch(event.epoch) / "previews")
        files = _write_sheet(parts, parts.previews, event.epoch)
        yield PreviewsDone(event.epoch, files, time.monotonic() - start)
    done = f"Epoch {event.epoch} of {parts.config.train.epochs}" if event.epoch else "The base, before training"
    _report(parts, [f"{done}. This page is written anew after every epoch."])


def _report(parts: _Parts, sentences: list[str]) -> None:
    folder = parts.folder
    write_report(
        folder.report,
        title=folder.name,
        sentences=sentences,
        sheet=folder.sheet,
        metrics=folder.metrics,
        config=folder.config,
        pictures=parts.data.dataset.folder,
        background=parts.config.data.background,
    )


def _write_sheet(parts: _Parts, request: PreviewRequest, last_epoch: int) -> list[str]:
    def files(epoch: int) -> list[Path]:
        return [parts.folder.epoch(epoch) / "previews" / name for name in request.file_names()]

    labels = [prompt for prompt in request.prompts for _ in request.seeds]
    columns = [("base" if epoch == 0 else f"epoch {epoch}", files(epoch)) for epoch in range(last_epoch + 1)]
    contact_sheet(labels, columns, parts.folder.sheet)
    return [str(file) for file in files(last_epoch)]


def _metadata(parts: _Parts, event: EpochDone) -> LoraMetadata:
    config = parts.config
    return LoraMetadata(
        name=parts.folder.name,
        base=parts.base.path,
        architecture=parts.base.architecture,
        resolution_px=config.data.resolution_px or parts.base.resolution_px,
        trigger=config.data.trigger,
        epoch=event.epoch,
        step=event.step,
        settings={"lora": config.lora.model_dump(), "train": config.train.model_dump(), "seed": config.seed},
        timestep_rank=timestep_rank(config.lora),
    )


def _export(parts: _Parts, event: EpochDone) -> None:
    """Write an epoch's LoRA, load it back through diffusers, and keep the figures beside it."""
    file, state = parts.folder.epoch_lora(event.epoch), parts.adapter.state()
    save_lora(file, state, metadata=_metadata(parts, event))
    proof = prove_lora(file, state, parts.base.fresh_pipeline(), timestep_rank(parts.config.lora))
    write_json(file.with_name("proof.json"), asdict(proof))


def _recommend(losses: dict[int, float], epochs: int) -> tuple[int, str]:
    """The epoch to keep, and why in one sentence."""
    trained = {epoch: loss for epoch, loss in losses.items() if epoch > 0}
    if not trained:
        return epochs, f"Epoch {epochs}, the last one, is kept: without held-out pictures nothing can be compared."
    best = min(trained, key=lambda epoch: trained[epoch])
    return (
        best,
        f"Epoch {best} is kept: its held-out loss, {trained[best]:.5f}, is the lowest of {len(trained)} epochs.",
    )
