"""Prior preservation: keeps what the base model knows beside the subject, by class words or by images of a folder.

Both add to the objective of a training step. With class words the adapter's predictions are held to the base model's
own; images of a folder are a second set, trained beside the first.
Shapes: B batch, K of it compared with the base model, C latent channels, h/w latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count, islice

import torch
from torch import Tensor

from sdlora.common import seeds
from sdlora.data.batches import Exposure, epoch_batches
from sdlora.data.dataset import Dataset
from sdlora.diffusion.losses import mse_per_example
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel, TextEmbeddings
from sdlora.training.data import ExposureSchedule, TrainingData, with_timesteps
from sdlora.training.loss import Batch, Error, diffusion_loss, noised, on_device, text_on_device
from sdlora.training.settings import TrainingSettings


class ClassWords:
    """Adds how far the adapter moves the base model's predictions for captions with a class word as the subject.

    One in `preservation_every` exposures is compared, and counts this often.

    The adapter is switched off for the predictions that are to be kept.

    Attributes:
        compared: The exposures that are compared with the base model.
    """

    def __init__(
        self, adapter: Adapter, data: TrainingData, settings: TrainingSettings, schedule: ExposureSchedule
    ) -> None:
        self.base, self.adapter, self.data, self.settings = data.cache.base, adapter, data, settings
        batches = [batch for step in schedule.steps for batch in step]
        self.compared = one_in(settings.preservation_every, batches, schedule.timesteps, settings.seed)

    def __call__(self, batch: Batch, exposures: Sequence[Exposure], error: Error) -> tuple[Tensor, Tensor]:
        """The loss of a batch and the weighted distance from the base model, each (B,)."""
        rows = [row for row, exposure in enumerate(exposures) if exposure in self.compared]
        if not rows:
            loss = diffusion_loss(self.base, batch, error)
            return loss, torch.zeros_like(loss)
        compared = [exposures[row] for row in rows]
        class_text = self.data.prior_text(compared)
        with torch.no_grad(), self.adapter.disabled():
            prior_text = self.data.prior_text(compared)
        loss, distances = diffusion_loss_with_prior(
            self.base, self.adapter, batch, torch.tensor(rows), class_text, prior_text, error
        )
        # Those that are compared count for the others, too.
        distance = torch.zeros_like(loss).index_add(
            0, torch.tensor(rows).to(loss.device), distances, alpha=self.settings.preservation_every
        )
        return loss, self.settings.preservation_weight * distance


def diffusion_loss_with_prior(
    base: BaseModel,
    adapter: Adapter,
    batch: Batch,
    chosen: Tensor,
    class_text: TextEmbeddings,
    prior_text: TextEmbeddings,
    error: Error = mse_per_example,
) -> tuple[Tensor, Tensor]:
    """The simple loss, and how far the adapter moves the base model's predictions for other words, noise being equal.

    Both come from one forward pass over the batch and the chosen examples, which costs less than two passes.

    Args:
        base: With the adapter in it.
        adapter: Switched off for the predictions that are to be kept.
        batch: On any device.
        chosen: The examples whose distance is measured, (K,) distinct indices into the batch, K at least 1.
        class_text: Text embeddings of their captions without the trigger, K first.
        prior_text: The same from the base model's own text encoder, for the predictions that are to be kept.
        error: Compares prediction and target; the distance is always the unweighted mean square.

    Returns:
        Float32 on the base model's device: the loss as in `diffusion_loss`, (B,), and the distance, (K,).

    Source: Ruiz et al. 2208.12242, equation 2, with the base model's own prediction as the target instead of images
    drawn by it.
    """
    noisy, timesteps, target = noised(base, batch)
    chosen = on_device(base, chosen)
    noisy_again, timesteps_again = noisy[chosen], timesteps[chosen]
    text, class_text = text_on_device(base, batch.text), text_on_device(base, class_text)
    with torch.no_grad(), adapter.disabled():
        kept = base.predict(noisy_again, timesteps_again, text_on_device(base, prior_text))
    both = {name: torch.cat([text[name], class_text[name]]) for name in text}
    predictions = base.predict(torch.cat([noisy, noisy_again]), torch.cat([timesteps, timesteps_again]), both)
    predicted, moved = predictions[: len(noisy)], predictions[len(noisy) :]
    return error(predicted, target, batch.weights), mse_per_example(moved, kept)


def one_in(
    every: int, batches: Sequence[Sequence[Exposure]], timesteps: Mapping[Exposure, int], seed: int
) -> frozenset[Exposure]:
    """One in `every` exposures of each batch, all equally likely and spread over the timesteps.

    Source: systematic sampling with a random start (Madow and Madow 1944).
    """
    chosen: set[Exposure] = set()
    for number, batch in enumerate(batches):
        start = seeds.derive(seed, "kept visits", number) % every
        chosen.update(sorted(batch, key=timesteps.__getitem__)[start::every])
    return frozenset(chosen)


def schedule_prior_images(settings: TrainingSettings, dataset: Dataset, training: ExposureSchedule) -> ExposureSchedule:
    """As many batches of images of a folder in each step as the step has of training images.

    The images come in shuffled rounds, which continue from step to step and from epoch to epoch. Their mean loss, times
    the weight, is added to the objective.

    Source: Ruiz et al. 2208.12242, equation 2.
    """
    seed = seeds.derive(settings.seed, "preserved pictures")
    buckets = [example.buckets for example in dataset.examples]
    rounds = (epoch_batches(buckets, 1, settings.batch_size, number, seed) for number in count(1))
    batches = chain.from_iterable(rounds)
    epochs = [[list(islice(batches, len(step))) for step in steps] for steps in training.epochs]
    return with_timesteps(settings, dataset, epochs, seed)
