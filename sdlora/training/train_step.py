"""One optimizer step: learning rate, gradients, clipping, optimizer, average; it stops at a value that is not finite.

Called by the trainer's loop for every step of the schedule. Waiting for a GPU at every step would slow training down,
so a step's values are checked after the next step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdlora.data.batches import Exposure
from sdlora.errors import DivergedError
from sdlora.lora.inject import Adapter
from sdlora.lora.limits import limit_norms
from sdlora.models.base import BaseModel
from sdlora.training.data import Step
from sdlora.training.distributed import Processes
from sdlora.training.loss import Term
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import MovingAverage, adapter_groups, make_optimizer, set_learning_rate
from sdlora.training.schedules import Schedule
from sdlora.training.settings import TrainingSettings


class StepResult(NamedTuple):
    """What a step leaves.

    Attributes:
        losses: Unweighted loss of each exposure of the first term, (B,), still on the device.
        micro_batch_size: The size that fitted into memory; 0 if whole batches do.
    """

    learning_rate: float
    losses: Tensor
    micro_batch_size: int


class TrainStep:
    """Takes optimizer steps on the sum of a few terms.

    Args:
        settings: How a step is computed, and with which optimizer.
        base: With the adapter in it.
        adapter: What is trained.
        terms: What is minimised; the first one's losses are reported.
        accelerator: Places the optimizer and scales the loss.
        processes: Those that share every batch.

    Raises:
        ConfigError: The optimizer's package, the GPU it needs, or the compiler is missing.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        base: BaseModel,
        adapter: Adapter,
        terms: Sequence[Term],
        accelerator: Accelerator,
        processes: Processes,
    ) -> None:
        self.settings, self.base, self.adapter, self.terms = settings, base, adapter, terms
        self.accelerator, self.processes = accelerator, processes
        self.model = TrainingModel(
            base.network,
            adapter,
            adapter_groups(
                adapter,
                settings.loraplus_lr_ratio,
                settings.text_encoder_factor,
                settings.rate_factors,
                text_apart=settings.text_encoder_epochs is not None,
            ),
            optimizer=settings.optimizer,
            gradient_checkpointing=settings.gradient_checkpointing,
            compiled=settings.compile,
        )
        for offloaded in base.offloaded.values():
            offloaded.lay_out()  # layers on one input have a common weight now
        self.parameters = self.model.parameters()
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = accelerator.prepare(
            make_optimizer(
                settings.optimizer,
                self.model.groups,
                learning_rate=rate,
                weight_decay=decay,
                arguments=settings.optimizer_args,
            )
        )
        self.average = MovingAverage(self.parameters, settings.ema_decay) if settings.ema_decay > 0 else None
        self.divergence = DivergenceCheck()

    def run(self, step: int, micro_batch_size: int) -> StepResult:
        """Take a step, counted from 1, with at most `micro_batch_size` images computed at once; 0 for whole batches.

        Raises:
            DivergedError: Loss or gradient of this step, or of the one before it, is not finite.
            OutOfMemoryError: Torch's own, if memory is full and `auto_batch` is off or one image is too many.
        """
        settings = self.settings
        rate = self.learning_rate(step)
        set_learning_rate(self.optimizer, rate)
        while (losses := self.gradients(step, micro_batch_size)) is None:
            micro_batch_size = self._halve(micro_batch_size)
        norm = self._gradient_norm(step)
        # Under loss scaling an infinite gradient only skips the step.
        self.divergence.observe(step, rate, losses, norm if self.accelerator.scaler is None else None)
        if settings.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, settings.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.max_weight_norm > 0:
            limit_norms(self.adapter.layers.values(), settings.max_weight_norm)
        if self.average is not None:
            self.average.update(step)
        return StepResult(rate, losses, micro_batch_size)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, from 1."""
        return Schedule.of(self.settings).rate(step, len(self.terms[0].schedule.steps))

    def _leave_text(self, step: int) -> None:
        """Drop the text encoders' gradients once they are trained no more: no optimizer changes what has none."""
        epochs = self.settings.text_encoder_epochs
        if epochs is None or step <= sum(map(len, self.terms[0].schedule.epochs[:epochs])):
            return
        for group in self.model.groups:
            if group.of_text:
                for parameter in group.parameters:
                    parameter.grad = None

    def gradients(self, step: int, micro_batch_size: int) -> Tensor | None:
        """Leave the gradient of all terms on the parameters, and return the first one's losses, (B,).

        None if memory is full and a smaller micro-batch may be tried.
        """
        size = micro_batch_size or self.settings.batch_size
        try:
            losses = [self._term_gradient(term, term.schedule.steps[step - 1], size) for term in self.terms]
        except torch.OutOfMemoryError:
            if size == 1 or not self.settings.auto_batch:
                raise
            return None
        return losses[0]

    def check_finite(self, step: int) -> None:
        """Raise a `DivergedError` unless everything that a checkpoint or a file would hold is finite."""
        self.divergence.check_pending()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        check_finite(
            {
                "adapter": self.parameters,
                "optimizer": [value for value in states if isinstance(value, Tensor)],
                "average of the adapter": self.average.values if self.average is not None else [],
            },
            step,
        )

    def _term_gradient(self, term: Term, batches: Step, size: int) -> Tensor:
        """Add the gradient of a term's mean over a step, one micro-batch after the other; its losses, (B,)."""
        num_examples = sum(len(batch) for batch in batches)
        micro_batches = [batch[first : first + size] for batch in batches for first in range(0, len(batch), size)]
        return torch.cat([self._accumulate(term, micro_batch, num_examples) for micro_batch in micro_batches])

    def _accumulate(self, term: Term, exposures: Sequence[Exposure], num_examples: int) -> Tensor:
        """Add a micro-batch's gradient; its losses, (B,), zero where another process computes them."""
        own = self.processes.share(exposures)
        if not own:
            return torch.zeros(len(exposures), device=self.base.device)
        named = [(term.loss.data.name(exposure.example), exposure.number) for exposure in own]
        # The backward pass is inside as well, because checkpointing computes blocks again there.
        with self.adapter.dropping(self.settings.seed, named), self.model.forward_backward():
            loss, objective = term.loss(own, [term.schedule.timesteps[exposure] for exposure in own])
            self.accelerator.backward(term.weight * objective.sum() / num_examples)
        return self.processes.placed(loss.detach(), len(exposures))

    def _gradient_norm(self, step: int) -> Tensor:
        """The norm of the whole batch's gradient, which is then on the parameters of every process, unscaled."""
        self.processes.sum_gradients(self.parameters)
        self._leave_text(step)
        self.accelerator.unscale_gradients(self.optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _halve(self, micro_batch_size: int) -> int:
        """Discard what an attempt left behind; the next one computes half as many images at once."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        return (micro_batch_size or self.settings.batch_size) // 2


class DivergenceCheck:
    """Checks the loss and the gradient norm of every step."""

    def __init__(self) -> None:
        # Step, learning rate, the two values, and when they are on the host.
        self._pending: tuple[int, float, Tensor, torch.cuda.Event | None] | None = None

    def observe(self, step: int, learning_rate: float, losses: Tensor, gradient_norm: Tensor | None) -> None:
        """Take the values of a step; checked at once on a CPU, on a GPU with the next step or `check_pending`.

        The gradient norm, a scalar, is None where infinite gradients are expected, as under loss scaling.

        Raises:
            DivergedError: A value of this step, or of the one before it, is not finite.
        """
        self.check_pending()
        values = torch.stack([losses.detach().sum(), losses.new_zeros(()) if gradient_norm is None else gradient_norm])
        if values.device.type != "cuda":
            self._pending = (step, learning_rate, values, None)
            self.check_pending()
            return
        host = torch.empty(2, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._pending = (step, learning_rate, host, copied)

    def check_pending(self) -> None:
        """Check the last step, if that was not done yet; raises as `observe` does."""
        if self._pending is None:
            return
        (step, learning_rate, values, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        for what, value in zip(("loss", "gradient"), values.tolist(), strict=True):
            if not math.isfinite(value):
                raise DivergedError(
                    f"The {what} became {value} at step {step} (learning rate {learning_rate:g}). Lower "
                    "train.learning_rate, or set train.precision to 'fp32'."
                )


def check_finite(named: Mapping[str, Iterable[Tensor]], step: int) -> None:
    """Check everything that a checkpoint or a file would hold after a step, by a name such as "adapter".

    Raises:
        DivergedError: Any value is NaN or infinite.
    """
    for name, tensors in named.items():
        found = [tensor.isfinite().all() for tensor in tensors]
        if found and not bool(torch.stack(found).all()):
            raise DivergedError(
                f"The {name} holds NaN or infinite values after step {step}. Nothing of it is saved. Lower "
                "train.learning_rate."
            )
