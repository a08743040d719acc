"""The training loop: an iterator of events over optimizer steps.

The trainer computes and reports; it writes no file, draws no image and stops only where it is told to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from sdlora.data.batches import Exposure
from sdlora.diffusion.timesteps import NUM_BANDS, band_of
from sdlora.events import CheckpointDue, EpochDone, Event, Notice, PreviewsDue, StepDone, saved_as
from sdlora.lora.inject import Adapter
from sdlora.training.data import Step, TrainingData, make_schedule
from sdlora.training.distributed import ALONE, Processes
from sdlora.training.loss import ExposureLoss, Term
from sdlora.training.optimizers import evaluation_weights
from sdlora.training.prior_preservation import ClassWords, schedule_prior_images
from sdlora.training.settings import TrainingSettings
from sdlora.training.train_step import StepResult, TrainStep


@dataclass
class Position:
    """How far training is, with what is needed to report the epoch as if it had never been interrupted.

    Attributes:
        step: Optimizer steps done in the whole run.
        loss_sum: Of the current epoch's exposures so far, which `loss_count` counts; `band_sums` and `band_counts` are
            the same by band of timesteps.
        micro_batch_size: Micro-batch size after an out-of-memory error; 0 is the whole batch.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    band_sums: list[float] = field(default_factory=lambda: [0.0] * NUM_BANDS)
    band_counts: list[int] = field(default_factory=lambda: [0] * NUM_BANDS)
    micro_batch_size: int = field(default=0, metadata=saved_as("part_size"))

    def add(self, timesteps: Sequence[int], losses: Sequence[float]) -> None:
        """Count the exposures of a step."""
        self.loss_sum += sum(losses)
        self.loss_count += len(losses)
        for timestep, loss in zip(timesteps, losses, strict=True):
            self.band_sums[band_of(timestep)] += loss
            self.band_counts[band_of(timestep)] += 1

    def take_means(self) -> tuple[float, list[float | None]]:
        """The epoch's mean loss and its means by band, None for an empty one; the next epoch starts at zero."""
        mean = self.loss_sum / max(1, self.loss_count)
        bands = [
            total / count if count else None for total, count in zip(self.band_sums, self.band_counts, strict=True)
        ]
        self.loss_sum, self.loss_count = 0.0, 0
        self.band_sums, self.band_counts = [0.0] * NUM_BANDS, [0] * NUM_BANDS
        return mean, bands


Unread = list[tuple[int, list[Exposure], StepResult]]
"""Steps whose losses are still on the device."""
READ_AFTER_SECONDS = 2.0


class Trainer:
    """Trains an adapter on a dataset.

    Args:
        settings: How it is trained.
        adapter: In the base model of `data`.
        data: The training images; their cache must be filled for every scheduled exposure before a step is taken.
        accelerator: Decides device and loss scaling.
        prior: Images of a folder for prior preservation, or None.
        processes: Those that share every batch.

    Attributes:
        terms: What is minimised: the loss of the training images, then that of `prior` if there are any.
        position: How far training is.

    Raises:
        ConfigError: The optimizer's package, the GPU it needs, or the compiler is missing.
        DivergedError: A loss became NaN or infinite (raised while iterating).
    """

    def __init__(
        self,
        settings: TrainingSettings,
        adapter: Adapter,
        data: TrainingData,
        accelerator: Accelerator,
        prior: TrainingData | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.settings, self.adapter, self.data, self.processes = settings, adapter, data, processes
        self.base = data.cache.base
        self.schedule = make_schedule(settings, data.dataset)
        class_words = None if data.prior_caption is None else ClassWords(adapter, data, settings, self.schedule)
        self.terms = [Term(ExposureLoss(data, settings, class_words), self.schedule)]
        if prior is not None:
            beside = schedule_prior_images(settings, prior.dataset, self.schedule)
            self.terms.append(Term(ExposureLoss(prior, settings), beside, settings.preservation_weight))
        self.step = TrainStep(settings, self.base, adapter, self.terms, accelerator, processes)
        self.position = Position()

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return len(self.schedule.steps)

    def averaged(self) -> AbstractContextManager[None]:
        """Use the weights to evaluate and export inside the block, between two steps."""
        return evaluation_weights(self.step.parameters, self.step.optimizer, self.step.average)

    def events(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train from the current position to the end.

        Args:
            should_stop: Asked between steps; True ends the iteration after a last `CheckpointDue`.

        Yields:
            `StepDone` for every step, some steps late, since losses are read back together; `CheckpointDue` when
            the state between two steps may be saved; `PreviewsDue` after it where previews are drawn within an epoch;
            `EpochDone` (its validation loss left to the run).
        """
        first_step = 1
        for epoch, steps in enumerate(self.schedule.epochs, start=1):
            done = max(0, self.position.step - first_step + 1)
            remaining = steps[done:]
            first_step += len(steps)
            if done and remaining and self._is_drawn():
                yield PreviewsDue(epoch, self.position.step)  # again: training stopped before they were all drawn
            if remaining or self.position.step == first_step - 1:
                start = time.monotonic()
                yield from self._epoch(epoch, remaining, should_stop)
                if self.position.step < first_step - 1:
                    return
                loss, bands = self.position.take_means()
                yield EpochDone(epoch, self.position.step, loss, None, time.monotonic() - start, bands)

    def _epoch(self, epoch: int, steps: Sequence[Step], should_stop: Callable[[], bool]) -> Iterator[Event]:
        unread, since, every = Unread(), time.monotonic(), self.settings.checkpoint_every_steps
        for index, batches in enumerate(steps, start=1):
            yield from self._take_step(batches, unread)
            drawn = index < len(steps) and self._is_drawn()
            due = index == len(steps) or drawn or (every > 0 and self.position.step % every == 0)
            # Slow steps are told one by one; several processes cannot agree on a moment.
            late = self.processes.alone and time.monotonic() - since > READ_AFTER_SECONDS
            reading = due or late or len(unread) >= self.settings.log_every_steps
            # All processes stop after the same step; asking the others costs a wait, as reading losses does.
            stopping = (reading or self.processes.alone) and self.processes.any(should_stop())
            if reading or stopping:
                yield from self._read_back(epoch, unread, since)
                if due or stopping:
                    self.step.check_finite(self.position.step)
                    yield CheckpointDue(epoch, self.position.step)
                if drawn and not stopping:
                    yield PreviewsDue(epoch, self.position.step)
                unread, since = [], time.monotonic()  # here, so that saving is not counted as training
            if stopping:
                return

    def _is_drawn(self) -> bool:
        every = self.settings.preview_every_steps
        return every > 0 and self.position.step % every == 0

    def _take_step(self, batches: Step, unread: Unread) -> Iterator[Notice]:
        step, micro_batch_size = self.position.step + 1, self.position.micro_batch_size
        result = self.step.run(step, micro_batch_size)
        self.position.step, self.position.micro_batch_size = step, result.micro_batch_size
        unread.append((step, [exposure for batch in batches for exposure in batch], result))
        if result.micro_batch_size != micro_batch_size:
            yield Notice(
                f"The {self.base.device.type} device ran out of memory: batches are computed in parts of "
                f"{result.micro_batch_size} from step {step} on, to the same result."
            )

    def _read_back(self, epoch: int, unread: Unread, since: float) -> Iterator[StepDone]:
        """Bring losses to the host, the loop's only wait for the device."""
        on_device = torch.cat([result.losses for _, _, result in unread])
        values: list[float] = self.processes.summed(on_device).tolist()
        seconds = (time.monotonic() - since) / len(unread)
        for step, exposures, result in unread:
            losses, values = values[: len(exposures)], values[len(exposures) :]
            timesteps = [self.schedule.timesteps[exposure] for exposure in exposures]
            self.position.add(timesteps, losses)
            yield StepDone(
                epoch=epoch,
                step=step,
                loss=sum(losses) / len(losses),
                lr=result.learning_rate,
                examples=[self.data.name(exposure.example) for exposure in exposures],
                exposures=[exposure.number for exposure in exposures],
                timesteps=timesteps,
                losses=losses,
                seconds=seconds,
            )
