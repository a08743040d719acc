"""`sdlora cache`: latents and text embeddings of a run, encoded before it by several processes.

Every file is written atomically under the hash of its content, so that an interrupted call can simply be repeated, and
two processes may write the same file.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdlora.cache.tensors import Cache
from sdlora.common.process import quiet_libraries
from sdlora.config.schema import RunConfig
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Example
from sdlora.errors import SdloraError
from sdlora.estimate.costs import cached_content
from sdlora.events import Notice, Progress
from sdlora.run.arguments import training_settings
from sdlora.run.lora_inputs import with_settings_of_file
from sdlora.run.setup import Loaded, choose_device, fresh_base, load
from sdlora.training.data import TrainingData, evaluation_data, make_schedule, training_data
from sdlora.training.prior_preservation import schedule_prior_images

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

_POLL_SECONDS = 1.0

Share = tuple[Sequence[Example], Sequence[str]]
"""The images and captions that one process encodes."""


def fill_cache(config: RunConfig, num_workers: int) -> Iterator[Notice | Progress]:
    """Encode all images and captions that a run needs, in `num_workers` processes that each load the base model.

    Raises:
        SdloraError: Images, base or cache cannot be used.
    """
    config = with_settings_of_file(config)
    loaded = load(config)
    for message in loaded.notices:
        yield Notice(message)
    examples, captions = _needed(config, loaded)
    shares: list[Share] = [(examples[i::num_workers], captions[i::num_workers]) for i in range(num_workers)]
    total, done = len(examples) + len(captions), 0
    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    context = multiprocessing.get_context("spawn")
    results: Queue[str | None] = context.Queue()
    workers = [
        context.Process(target=_work, args=(config, share, num_threads, results), daemon=True) for share in shares[1:]
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in _fill(loaded.cache, shares[0], config.data.background):
            done += 1 + _count(results)
            yield Progress("cache", done, total)
        while busy := [worker for worker in workers if worker.is_alive()]:
            busy[0].join(_POLL_SECONDS)
            done += _count(results)
            yield Progress("cache", done, total)
        done += _count(results)
        yield Progress("cache", done, total)
        lost = [worker.exitcode for worker in workers if worker.exitcode != 0]
        if lost:
            raise SdloraError(
                f"{len(lost)} of {num_workers} processes died (exit code {lost[0]}). Run the same command again to "
                "continue; fewer --workers need less memory."
            )
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _needed(config: RunConfig, loaded: Loaded) -> tuple[list[Example], list[str]]:
    """All images of a run, and its captions without repetition: of its exposures and of the copy check."""
    settings, images, cache = training_settings(config, loaded.base), loaded.images, loaded.cache
    is_live = settings.text_is_trained
    schedule = make_schedule(settings, images.training)
    sources: list[tuple[TrainingData, list[Exposure] | None]] = [
        (training_data(settings, images.training, cache), list(schedule.timesteps)),
        (evaluation_data(images.training, cache, text_is_trained=is_live), None),
    ]
    if images.prior is not None:
        beside = schedule_prior_images(settings, images.prior, schedule)
        sources.append((training_data(settings, images.prior, cache), list(beside.timesteps)))
    if images.validation is not None:
        sources.append((evaluation_data(images.validation, cache, text_is_trained=is_live), None))
    examples, captions = cached_content(sources)
    return examples, [] if is_live else captions


def _fill(cache: Cache, share: Share, background: str) -> Iterator[Progress]:
    yield from cache.fill_moments(share[0], background)
    yield from cache.fill_text(share[1])


def _work(config: RunConfig, share: Share, num_threads: int, results: Queue[str | None]) -> None:
    """Entry point of a process; sends None for every encoded item, or the message of an error."""
    quiet_libraries()
    torch.set_num_threads(num_threads)
    try:
        device, dtype, _ = choose_device(config.train.device, config.train.precision)
        cache = Cache(Path(config.cache.dir) if config.cache.dir else None, fresh_base(config, device, dtype))
        for _ in _fill(cache, share, config.data.background):
            results.put(None)
    except SdloraError as error:
        results.put(str(error))


def _count(results: Queue[str | None]) -> int:
    """The number of items encoded since the last call; raises the error of a process that failed."""
    count = 0
    while True:
        try:
            fault = results.get_nowait()
        except queue.Empty:
            return count
        if fault is not None:
            raise SdloraError(fault)
        count += 1
