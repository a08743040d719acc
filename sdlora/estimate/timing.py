"""How long a training step takes: the run's largest step, computed up to its gradients, which are discarded.

Used by `sdlora plan`, by a batch's dry run, and by a run before its first step, for the time left.
"""

from __future__ import annotations

import time
from itertools import chain
from math import prod
from statistics import median

import torch

from sdlora.training.prior_preservation import ClassWords
from sdlora.training.trainer import Trainer

_REPEATS = 3  # the first one warms up, and the median leaves it out


def step_seconds(trainer: Trainer, background: str) -> float:
    """Seconds of an average step, from the one with the largest batch, without the optimizer's own arithmetic.

    The trainer is left as it was, but for the step's images and captions in the cache.
    """
    number = _largest_step(trainer)
    for term in trainer.terms:
        for _ in term.loss.data.fill(background, chain.from_iterable(term.schedule.steps[number - 1])):
            pass
    seconds = []
    for _ in range(_REPEATS):
        begin = time.monotonic()
        losses = trainer.step.gradients(number, trainer.position.micro_batch_size)
        if losses is not None:
            losses.sum().item()  # waits for the device
        trainer.step.optimizer.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - begin)
    words, exposures = trainer.terms[0].loss.extra, list(chain.from_iterable(trainer.schedule.steps[number - 1]))
    if not isinstance(words, ClassWords):
        return median(seconds)
    here, average = len(words.compared.intersection(exposures)), len(words.compared) / len(trainer.schedule.timesteps)
    return median(seconds) * comparison_cost(average) / comparison_cost(here / len(exposures))


def arithmetic_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of large matrix products on a device, the fastest that any step can go."""
    edge = 4096 if device.type == "cuda" else 1024
    one, other = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(5):
        begin = time.monotonic()
        (one @ other).sum().item()  # waits for the device
        fastest = min(fastest, time.monotonic() - begin)
    return 2 * edge**3 / fastest


def comparison_cost(share: float) -> float:
    """Arithmetic of exposures of which a share is compared with the base model, over that without any comparison.

    A comparison takes the adapter's prediction forward and backward, as an exposure does, and the base model's forward,
    half as much; the share is in [0, 1].
    """
    return 1 + 1.5 * share


def _largest_step(trainer: Trainer) -> int:
    """The number, from 1, of the step whose largest batch has most pixels, then most comparisons with the base."""
    examples, words = trainer.data.dataset.examples, trainer.terms[0].loss.extra
    compared = words.compared if isinstance(words, ClassWords) else frozenset()

    def size(number: int) -> tuple[int, int]:
        batches = trainer.schedule.steps[number - 1]
        pixels = max(sum(prod(examples[exposure.example].bucket) for exposure in batch) for batch in batches)
        return pixels, len(compared.intersection(chain.from_iterable(batches)))

    return max(range(1, trainer.total_steps + 1), key=size)
