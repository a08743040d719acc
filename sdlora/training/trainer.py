"""The training loop: an iterator of events over optimizer steps.

The trainer computes and reports; it writes no file, shows no image and stops only where it is told to.
Shapes: B batch, C latent channels, h/w latents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdlora.common import seeds
from sdlora.config.schema import RunConfig
from sdlora.data.batches import Exposure
from sdlora.diffusion.bands import NUM_BANDS, band_of
from sdlora.diffusion.losses import huber_per_example, loss_weight, mse_per_example
from sdlora.events import CheckpointDue, EpochDone, Event, Notice, StepDone
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel
from sdlora.training.data import TrainingData
from sdlora.training.distributed import ALONE, Processes
from sdlora.training.divergence import Watch, check_finite
from sdlora.training.ema import MovingAverage, evaluation_weights
from sdlora.training.loss import Batch, diffusion_loss, diffusion_loss_with_prior
from sdlora.training.lr_schedule import learning_rate
from sdlora.training.optimizers import adapter_groups, make_optimizer, set_rates
from sdlora.training.schedule import Plan, Step, plan_prior, plan_training
from sdlora.training.train_step import LeanStep


@dataclass
class Position:
    """How far training has come, with what is needed to report the epoch as if it had never been interrupted.

    Attributes:
        step: Optimizer steps done in the whole run.
        loss_sum: Sum of the losses of the current epoch's exposures so far.
        loss_count: How many exposures that sum covers.
        band_sums: The same sum by band of timesteps.
        band_counts: The same count by band of timesteps.
        part_size: So many images of a batch are computed at once, since memory is too small for all; 0 for all.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    band_sums: list[float] = field(default_factory=lambda: [0.0] * NUM_BANDS)
    band_counts: list[int] = field(default_factory=lambda: [0] * NUM_BANDS)
    part_size: int = 0

    def add(self, timesteps: Sequence[int], losses: Sequence[float]) -> None:
        """Count the exposures of a step."""
        self.loss_sum += sum(losses)
        self.loss_count += len(losses)
        for place, loss in zip(timesteps, losses, strict=True):
            self.band_sums[band_of(place)] += loss
            self.band_counts[band_of(place)] += 1

    def take_means(self) -> tuple[float, list[float | None]]:
        """The epoch's mean loss and its means by band, None for an empty one; the next epoch begins at zero."""
        mean = self.loss_sum / max(1, self.loss_count)
        bands = [
            total / count if count else None for total, count in zip(self.band_sums, self.band_counts, strict=True)
        ]
        self.loss_sum, self.loss_count = 0.0, 0
        self.band_sums, self.band_counts = [0.0] * NUM_BANDS, [0] * NUM_BANDS
        return mean, bands


@dataclass
class _Pending:
    """Steps whose losses are still on the device."""

    steps: list[tuple[int, int, float, list[Exposure], list[int]]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class Trainer:
    """Trains an adapter on a dataset.

    Args:
        config: The whole run's configuration; `train`, `timesteps`, `loss` and `seed` are read.
        base: The frozen model; the adapter is injected into its UNet.
        adapter: What is trained.
        data: The images, their cache filled for every planned exposure.
        accelerator: Accelerate's object; it decides device and loss scaling.
        preserved: Images of what the base is to keep, trained beside the set; None for none.
        processes: Those that share every batch.

    Raises:
        ConfigError: The optimizer's package, the GPU it needs, or the compiler that is asked for is missing.
        DivergedError: A loss became NaN or infinite (raised while iterating).
    """

    def __init__(
        self,
        config: RunConfig,
        base: BaseModel,
        adapter: Adapter,
        data: TrainingData,
        accelerator: Accelerator,
        prior: TrainingData | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.config = config
        self.processes = processes
        self.base = base
        self.adapter = adapter
        self.data = data
        self.prior = prior
        self.accelerator = accelerator
        self.position = Position()
        loss = config.loss
        self._error = mse_per_example if loss.kind == "mse" else partial(huber_per_example, delta=loss.huber_delta)
        train = config.train
        self.lean = LeanStep(
            base.unet,
            adapter,
            adapter_groups(adapter, train.loraplus_lr_ratio, self._text_encoder_factor()),
            optimizer=train.optimizer,
            gradient_checkpointing=train.gradient_checkpointing,
            compiled=train.compile,
        )
        self.parameters = self.lean.parameters()
        self.optimizer = accelerator.prepare(
            make_optimizer(train.optimizer, self.lean.groups, rate=train.learning_rate, weight_decay=train.weight_decay)
        )
        self.average = MovingAverage(self.parameters, train.ema_decay) if train.ema_decay > 0 else None
        self.plan = plan_training(config, data.dataset)
        self.prior_plan = Plan() if prior is None else plan_prior(config, prior.dataset, self.plan)
        self._prior_steps = [step for steps in self.prior_plan.epochs for step in steps]
        self._watch = Watch()

    def _text_encoder_factor(self) -> float:
        """The text encoder's learning rate over the run's."""
        train = self.config.train
        return (train.text_encoder_learning_rate or train.learning_rate) / train.learning_rate

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return sum(len(steps) for steps in self.plan.epochs)

    def averaged(self) -> AbstractContextManager[None]:
        """The weights that are judged and exported, for the length of a block between two steps."""
        return evaluation_weights(self.parameters, self.optimizer, self.average)

    def events(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train from the current position to the end.

        Args:
            should_stop: Asked between steps; True ends the iteration after a last `CheckpointDue`.

        Yields:
            `StepDone` for every step, some steps late, since losses are read back together; `CheckpointDue` when
            the state between two steps may be saved; `EpochDone` (its validation loss left to the run).
        """
        first_step = 1
        for epoch, groups in enumerate(self.plan.epochs, start=1):
            remaining = groups[max(0, self.position.step - first_step + 1) :]
            first_step += len(groups)
            if remaining or self.position.step == first_step - 1:
                start = time.monotonic()
                yield from self._epoch(epoch, remaining, should_stop)
                if self.position.step < first_step - 1:
                    return
                yield self._epoch_done(epoch, time.monotonic() - start)

    def rehearse(self) -> float:
        """Seconds that a step takes: the middle one of the first three, whose gradients are thrown away again."""
        taken = []
        for number, group in enumerate(self.plan.epochs[0][:3], start=1):
            begin = time.monotonic()
            losses = self._gradients(group, number)
            if losses is not None:
                losses.sum().item()  # waits for the device
            self.optimizer.zero_grad(set_to_none=True)
            taken.append(time.monotonic() - begin)
        return median(taken)

    def _epoch(self, epoch: int, groups: Sequence[Step], should_stop: Callable[[], bool]) -> Iterator[Event]:
        train = self.config.train
        pending = _Pending()
        for index, group in enumerate(groups, start=1):
            part_size = self.position.part_size
            self._step(epoch, group, pending)
            if self.position.part_size != part_size:
                yield Notice(
                    f"The {self.base.device.type} device ran out of memory: batches are computed in parts of "
                    f"{self.position.part_size} from step {self.position.step} on, to the same result."
                )
            every = train.checkpoint_every_steps
            due = index == len(groups) or (every > 0 and self.position.step % every == 0)
            reading = due or len(pending.steps) >= train.log_every_steps
            # All processes stop after the same step; asking the others costs a wait, as reading losses does.
            stopping = (reading or self.processes.alone) and self.processes.any(should_stop())
            due = due or stopping
            if due or reading:
                yield from self._read_back(pending)
                if due:
                    self._check_state()
                    yield CheckpointDue(epoch, self.position.step)
                pending = _Pending()  # its clock starts here, so that saving is not counted as training
            if stopping:
                return

    def _step(self, epoch: int, group: Step, pending: _Pending) -> None:
        """One optimizer step over a group of batches, each example weighing the same."""
        train = self.config.train
        step = self.position.step + 1
        rate = learning_rate(
            step,
            total_steps=self.total_steps,
            peak=train.learning_rate,
            schedule=train.lr_schedule,
            warmup_steps=train.warmup_steps,
        )
        set_rates(self.optimizer, rate)
        while (losses := self._gradients(group, step)) is None:
            self._halve_parts()
        self.processes.sum_gradients(self.parameters)
        self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self._watch.see(step, rate, losses, norm if self.accelerator.scaler is None else None)
        if train.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, train.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        self.position.step = step
        exposures = [exposure for batch in group for exposure in batch]
        pending.steps.append((epoch, step, rate, exposures, [self.plan.timesteps[exposure] for exposure in exposures]))
        pending.losses.append(losses)

    def _gradients(self, group: Step, step: int) -> Tensor | None:
        """Gradients of the mean over a step's exposures, which are left on the parameters.

        Returns:
            The losses (B,) of all exposures; None if memory is too small and `train.auto_batch` allows smaller parts.
        """
        num_examples = sum(len(batch) for batch in group)
        size = self.position.part_size or self.config.train.batch_size
        try:
            losses = [
                self._accumulate(self.data, part, [self.plan.timesteps[exposure] for exposure in part], num_examples)
                for part in _parts(group, size)
            ]
            if self.prior is not None:
                self._preserve(self.prior, self._prior_steps[step - 1], size)
        except torch.OutOfMemoryError:
            if size == 1 or not self.config.train.auto_batch:
                raise
            return None
        return torch.cat(losses)

    def _halve_parts(self) -> None:
        """Let go of what an attempt left behind; the next one takes half as many images at once."""
        self.position.part_size = (self.position.part_size or self.config.train.batch_size) // 2
        self.optimizer.zero_grad(set_to_none=True)
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_state(self) -> None:
        """See that everything which is saved is finite."""
        self._watch.judge()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        check_finite(
            {
                "adapter": self.parameters,
                "optimizer": [value for value in states if isinstance(value, Tensor)],
                "average of the adapter": self.average.values if self.average is not None else [],
            },
            self.position.step,
        )

    def _preserve(self, data: TrainingData, step: Step, size: int) -> None:
        """Add the gradients of images of what is preserved: their mean loss, times its weight.

        Source: Ruiz et al. 2208.12242, equation 2.
        """
        num_examples, weight = sum(len(batch) for batch in step), self.config.train.preservation_weight
        for part in _parts(step, size):
            drawn = [self.prior_plan.timesteps[exposure] for exposure in part]
            self._accumulate(data, part, drawn, num_examples, weight)

    def _accumulate(
        self,
        data: TrainingData,
        batch: Sequence[Exposure],
        timesteps: Sequence[int],
        num_examples: int,
        weight: float = 1.0,
    ) -> Tensor:
        """Add a batch's gradients over `num_examples`; its losses, zero for what other processes compute."""
        own, drawn = self.processes.share(batch), self.processes.share(timesteps)
        if not own:
            return torch.zeros(len(batch), device=self.base.device)
        # The way back is inside, too: checkpointing computes again there.
        dropping = self.adapter.dropping(self.config.seed, [(data.name(v.example), v.exposure) for v in own])
        with dropping, self.lean.live():
            loss, objective = self.losses_per_example(own, drawn, data)
            self.accelerator.backward(weight * objective.sum() / num_examples)
        return self.processes.placed(loss.detach(), len(batch))

    def losses_per_example(
        self, exposures: Sequence[Exposure], timesteps: Sequence[int], data: TrainingData | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch at given timesteps; noise is a function of (seed, example, exposure).

        Args:
            exposures: B of them, of one size.
            timesteps: As many.
            data: Whose images are visited; those that are trained if None.

        Returns:
            The loss before any weighting and what is minimised, each (B,) float32.
        """
        loss, preservation = self.config.loss, self.config.train.preservation_weight
        data = data or self.data
        latents, noise = self._latents_and_noise(exposures, data)
        pairs = [(exposure.example, exposure.exposure) for exposure in exposures]
        text, weights = data.text(pairs), self._weights(exposures, latents, data)
        batch = Batch(latents, noise, torch.tensor(list(timesteps)), text, weights)
        kept = [] if data.prior_caption is None else [i for i, v in enumerate(exposures) if v in self.plan.kept]
        if kept:
            again, chosen = [pairs[index] for index in kept], torch.tensor(kept)
            class_text = data.prior_text(again)
            with torch.no_grad(), self.adapter.disabled():
                kept_text = data.prior_text(again)
            plain, distances = diffusion_loss_with_prior(
                self.base, self.adapter, batch, chosen, class_text, kept_text, self._error
            )
            # Those that stand for the others count for them, too.
            distance = torch.zeros_like(plain).index_add(
                0, chosen.to(plain.device), distances, alpha=self.config.train.preservation_every
            )
        else:
            plain = diffusion_loss(self.base, batch, self._error)
            distance = torch.zeros_like(plain)
        alphas_cumprod = self.base.alphas_cumprod[batch.timesteps.to(self.base.device)]
        weight = loss_weight(loss.weighting, alphas_cumprod, self.base.prediction_type, loss.gamma)
        return plain, weight * plain + preservation * distance

    def _weights(self, exposures: Sequence[Exposure], latents: Tensor, data: TrainingData) -> Tensor | None:
        """How much each place of the images counts, (B, 1, h, w), or None where no image has a mask."""
        masks = [data.mask(exposure.example) for exposure in exposures]
        if all(mask is None for mask in masks):
            return None
        whole = torch.ones(1, *latents.shape[2:])
        shares = torch.stack([whole if mask is None else mask for mask in masks])
        floor = self.config.loss.mask_floor
        return floor + (1 - floor) * shares

    def _latents_and_noise(self, batch: Sequence[Exposure], data: TrainingData) -> tuple[Tensor, Tensor]:
        moments = data.moments(exposure.example for exposure in batch)
        names = [(data.name(exposure.example), exposure.exposure) for exposure in batch]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        seed = self.config.seed
        jitter = torch.stack([seeds.normal(shape, seed, "latent", name, exposure) for name, exposure in names])
        noise = torch.stack([seeds.normal(shape, seed, "noise", name, exposure) for name, exposure in names])
        if (share := self.config.loss.noise_offset) > 0:
            offset = [seeds.normal((shape[0], 1, 1), seed, "noise offset", name, exposure) for name, exposure in names]
            noise = noise + share * torch.stack(offset)
        return self.base.sample_latents(moments, jitter), noise

    def _read_back(self, pending: _Pending) -> Iterator[StepDone]:
        """Bring the losses to the host, the loop's only wait for the device."""
        values: list[float] = self.processes.summed(torch.cat(pending.losses)).tolist()
        seconds = (time.monotonic() - pending.since) / len(pending.steps)
        for epoch, step, rate, exposures, timesteps in pending.steps:
            losses, values = values[: len(exposures)], values[len(exposures) :]
            self.position.add(timesteps, losses)
            yield StepDone(
                epoch=epoch,
                step=step,
                loss=sum(losses) / len(losses),
                lr=rate,
                examples=[self.data.name(exposure.example) for exposure in exposures],
                exposures=[exposure.exposure for exposure in exposures],
                timesteps=timesteps,
                losses=losses,
                seconds=seconds,
            )

    def _epoch_done(self, epoch: int, seconds: float) -> EpochDone:
        train_loss, train_bands = self.position.take_means()
        return EpochDone(epoch, self.position.step, train_loss, None, seconds, train_bands)


def _parts(step: Step, size: int) -> list[tuple[Exposure, ...]]:
    """A step's batches, each cut into parts of at most so many exposures."""
    return [batch[first : first + size] for batch in step for first in range(0, len(batch), size)]
