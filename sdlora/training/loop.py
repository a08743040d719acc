"""The training loop: an iterator of events over optimizer steps.

Floor 5. The trainer computes and reports; it writes no file, shows no picture and stops only where it is told to.
Shapes: B batch, C latent channels, h/w latents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdlora import seeds
from sdlora.config import RunConfig
from sdlora.data.order import Visit, epoch_batches
from sdlora.diffusion.losses import mse_per_example
from sdlora.diffusion.noise import add_noise, prediction_target
from sdlora.diffusion.timesteps import timestep
from sdlora.errors import DivergedError
from sdlora.events import CheckpointDue, EpochDone, Event, StepDone
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel, TextStates
from sdlora.training.data import TrainingData
from sdlora.training.rates import learning_rate


@dataclass
class Position:
    """How far training has come, with what is needed to report the epoch as if it had never been interrupted.

    Attributes:
        step: Optimizer steps done in the whole run.
        loss_sum: Sum of the losses of the current epoch's visits so far.
        loss_count: How many visits that sum covers.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0


@dataclass
class _Pending:
    """Steps whose losses are still on the device."""

    steps: list[tuple[int, int, float, list[Visit], list[int]]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class Trainer:
    """Trains an adapter on a dataset.

    Args:
        config: The whole run's configuration; `train`, `timesteps`, `data.repeats` and `seed` are read.
        base: The frozen model; the adapter is injected into its UNet.
        adapter: What is trained.
        data: The pictures, their cache filled for every planned visit.
        accelerator: Accelerate's object; it decides device, loss scaling and gradient synchronisation.

    Raises:
        DivergedError: A loss became NaN or infinite (raised while iterating).
    """

    def __init__(
        self, config: RunConfig, base: BaseModel, adapter: Adapter, data: TrainingData, accelerator: Accelerator
    ) -> None:
        self.config = config
        self.base = base
        self.adapter = adapter
        self.data = data
        self.accelerator = accelerator
        self.position = Position()
        self.parameters = list(adapter.parameters())
        optimizer = torch.optim.AdamW(
            self.parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay
        )
        self.optimizer = accelerator.prepare(optimizer)
        buckets = [example.bucket for example in data.dataset.examples]
        self._epochs = [self._groups(buckets, epoch) for epoch in range(1, config.train.epochs + 1)]

    def _groups(self, buckets: Sequence[tuple[int, int]], epoch: int) -> list[list[tuple[Visit, ...]]]:
        """An epoch's optimizer steps, each a list of batches whose gradients are summed."""
        train = self.config.train
        batches = epoch_batches(buckets, self.config.data.repeats, train.batch_size, epoch, self.config.seed)
        size = train.gradient_accumulation_steps
        return [batches[first : first + size] for first in range(0, len(batches), size)]

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return sum(len(groups) for groups in self._epochs)

    def events(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train from the current position to the end.

        Args:
            should_stop: Asked between steps; True ends the iteration after a last `CheckpointDue`.

        Yields:
            `StepDone` for every step, some steps late, since losses are read back together; `CheckpointDue` when
            the state between two steps may be saved; `EpochDone` (its held-out loss left to the run).
        """
        first_step = 1
        for epoch, groups in enumerate(self._epochs, start=1):
            remaining = groups[max(0, self.position.step - first_step + 1) :]
            first_step += len(groups)
            if remaining or self.position.step == first_step - 1:
                start = time.monotonic()
                yield from self._epoch(epoch, remaining, should_stop)
                if self.position.step < first_step - 1:
                    return
                yield self._epoch_done(epoch, time.monotonic() - start)

    def _epoch(
        self, epoch: int, groups: Sequence[list[tuple[Visit, ...]]], should_stop: Callable[[], bool]
    ) -> Iterator[Event]:
        train = self.config.train
        pending = _Pending()
        for index, group in enumerate(groups, start=1):
            self._step(epoch, group, pending)
            stopping, every = should_stop(), train.checkpoint_every_steps
            due = stopping or index == len(groups) or (every > 0 and self.position.step % every == 0)
            if due or len(pending.steps) >= train.log_every_steps:
                yield from self._read_back(pending)
                if due:
                    yield CheckpointDue(epoch, self.position.step)
                pending = _Pending()  # its clock starts here, so that saving is not counted as training
            if stopping:
                return

    def _step(self, epoch: int, group: Sequence[tuple[Visit, ...]], pending: _Pending) -> None:
        """One optimizer step over a group of batches, each example weighing the same."""
        train = self.config.train
        step = self.position.step + 1
        rate = learning_rate(
            step,
            total_steps=self.total_steps,
            peak=train.learning_rate,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
        )
        for options in self.optimizer.param_groups:
            options["lr"] = rate
        num_examples = sum(len(batch) for batch in group)
        visits: list[Visit] = []
        timesteps: list[int] = []
        losses: list[Tensor] = []
        for batch in group:
            drawn = [self._timestep(visit) for visit in batch]
            with self.adapter.dropping(self.config.seed, [(self.data.name(v.example), v.visit) for v in batch]):
                loss = self.loss_per_example(batch, drawn)
                losses.append(loss.detach())
                if train.preservation_weight > 0:
                    loss = loss + train.preservation_weight * self.preservation_per_example(batch, drawn)
            self.accelerator.backward(loss.sum() / num_examples)
            visits += batch
            timesteps += drawn
        if train.max_grad_norm > 0:
            self.accelerator.unscale_gradients(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step = step
        pending.steps.append((epoch, step, rate, visits, timesteps))
        pending.losses.append(torch.cat(losses))

    def _timestep(self, visit: Visit) -> int:
        options = self.config.timesteps
        return timestep(
            options.density,
            options.min,
            options.max,
            seed=self.config.seed,
            example=self.data.name(visit.example),
            visit=visit.visit,
        )

    def loss_per_example(self, batch: Sequence[Visit], timesteps: Sequence[int]) -> Tensor:
        """The loss of a batch at given timesteps, (B,) float32; noise is a function of (seed, example, visit)."""
        latents, noise = self._latents_and_noise(batch)
        text = self.data.text([(visit.example, visit.visit) for visit in batch])
        return diffusion_loss(
            self.base, latents=latents, noise=noise, timesteps=torch.tensor(list(timesteps)), text=text
        )

    def preservation_per_example(self, batch: Sequence[Visit], timesteps: Sequence[int]) -> Tensor:
        """How far the adapter moves the answers to class words, on the same noisy latents, (B,) float32."""
        latents, noise = self._latents_and_noise(batch)
        visits = [(visit.example, visit.visit) for visit in batch]
        text = self.data.preserved_text(visits)
        with torch.no_grad(), self.adapter.disabled():
            kept_text = self.data.preserved_text(visits)
        timestep = torch.tensor(list(timesteps))
        return preservation_loss(
            self.base, self.adapter, latents=latents, noise=noise, timesteps=timestep, text=text, kept_text=kept_text
        )

    def _latents_and_noise(self, batch: Sequence[Visit]) -> tuple[Tensor, Tensor]:
        moments = torch.stack([self.data.moments(visit.example) for visit in batch])
        names = [(self.data.name(visit.example), visit.visit) for visit in batch]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        seed = self.config.seed
        jitter = torch.stack([seeds.normal(shape, seed, "latent", name, visit) for name, visit in names])
        noise = torch.stack([seeds.normal(shape, seed, "noise", name, visit) for name, visit in names])
        return self.base.sample_latents(moments, jitter), noise

    def _read_back(self, pending: _Pending) -> Iterator[StepDone]:
        """Bring the losses to the host, the loop's only wait for the device."""
        values: list[float] = torch.cat(pending.losses).tolist()
        seconds = (time.monotonic() - pending.since) / len(pending.steps)
        for epoch, step, rate, visits, timesteps in pending.steps:
            losses, values = values[: len(visits)], values[len(visits) :]
            if not all(math.isfinite(loss) for loss in losses):
                raise DivergedError(
                    f"The loss became {next(x for x in losses if not math.isfinite(x))} at step {step} "
                    f"(learning rate {rate:g}). Lower train.learning_rate, or set train.precision to 'fp32'."
                )
            self.position.loss_sum += sum(losses)
            self.position.loss_count += len(losses)
            yield StepDone(
                epoch=epoch,
                step=step,
                loss=sum(losses) / len(losses),
                lr=rate,
                examples=[self.data.name(visit.example) for visit in visits],
                visits=[visit.visit for visit in visits],
                timesteps=timesteps,
                losses=losses,
                seconds=seconds,
            )

    def _epoch_done(self, epoch: int, seconds: float) -> EpochDone:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            raise DivergedError(
                f"The adapter holds NaN or infinite numbers after epoch {epoch}. Lower train.learning_rate."
            )
        train_loss = self.position.loss_sum / max(1, self.position.loss_count)
        self.position.loss_sum, self.position.loss_count = 0.0, 0
        return EpochDone(epoch, self.position.step, train_loss, None, seconds)


def diffusion_loss(
    base: BaseModel, *, latents: Tensor, noise: Tensor, timesteps: Tensor, text: dict[str, Tensor]
) -> Tensor:
    """The simple loss of each example at its timestep.

    Args:
        base: The model, its adapter in whatever state it is.
        latents: Clean scaled latents, (B, C, h, w).
        noise: Standard normal noise, (B, C, h, w).
        timesteps: Integers in [0, 999], (B,).
        text: Text states, the batch first.

    Returns:
        (B,) float32 on the base's device.

    Source: Ho et al. 2006.11239, equation 14; for v, Salimans & Ho 2202.00512, section 4.
    """
    noisy, timesteps, alphas_cumprod, states = _prepared(base, latents, noise, timesteps, text)
    predicted = base.predict(noisy, timesteps, states)
    target = prediction_target(base.prediction_type, latents.to(base.device), noise.to(base.device), alphas_cumprod)
    return mse_per_example(predicted, target)


def preservation_loss(
    base: BaseModel,
    adapter: Adapter,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    text: TextStates,
    kept_text: TextStates,
) -> Tensor:
    """The squared distance between the answers with and without the adapter.

    Args:
        base: The model with the adapter in it.
        adapter: Switched off for the answer that is to be kept.
        latents: Clean scaled latents, (B, C, h, w).
        noise: Standard normal noise, (B, C, h, w).
        timesteps: Integers in [0, 999], (B,).
        text: Text states of captions without the trigger, the batch first.
        kept_text: The same from the base's own text encoder, for the answer that is to be kept.

    Returns:
        (B,) float32 on the base's device.

    Source: prior preservation of Ruiz et al. 2208.12242, equation 2, with the base's own prediction as the target
    instead of pictures drawn by it.
    """
    kept_states = {name: value.to(base.device, non_blocking=True) for name, value in kept_text.items()}
    noisy, timesteps, _, states = _prepared(base, latents, noise, timesteps, text)
    with torch.no_grad(), adapter.disabled():
        kept = base.predict(noisy, timesteps, kept_states)
    return mse_per_example(base.predict(noisy, timesteps, states), kept)


def _prepared(
    base: BaseModel, latents: Tensor, noise: Tensor, timesteps: Tensor, text: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Noisy latents, timesteps, their cumulative alphas and text states, on the base's device."""
    device = base.device
    latents, noise, timesteps = (x.to(device, non_blocking=True) for x in (latents, noise, timesteps))
    alphas_cumprod = base.alphas_cumprod[timesteps]
    states = {name: value.to(device, non_blocking=True) for name, value in text.items()}
    return add_noise(latents, noise, alphas_cumprod), timesteps, alphas_cumprod, states
