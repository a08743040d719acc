"""Signals of copying other than a preview that matches a training image: five measurements, each with a p-value.

Called by `checker` at the end of an epoch; each signal carries a sentence for the report.
Shapes: P images, N previews, C latent channels, h/w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdlora.common import seeds
from sdlora.copycheck.similarity import hp_ms
from sdlora.copycheck.statistics import fisher_z, mcnemar, permutation_test, sign_flip_test
from sdlora.diffusion.timesteps import band_names
from sdlora.training.data import TrainingData

OUTSIDE = 0.05
# Four UNet calls per probed caption and ten per compared image: with these limits, a quarter of the calls that six
# previews of 10 guided steps take.
MAX_PROBED = 2
MAX_COMPARED = 2
PROBED_TIMESTEPS = (999, 800)
NUM_PROBES = 2
NUM_FIELDS = 8


@dataclass(frozen=True)
class Signal:
    """One signal of copying.

    Attributes:
        name: The key in `copycheck.json`.
        value: The measurement, or None where it cannot be taken.
        p_value: One-sided, in (0, 1], or None.
        meaning: One sentence for an artist, with the measurement or the reason why there is none.
    """

    name: str
    value: float | None
    p_value: float | None
    meaning: str

    @property
    def outside(self) -> bool:
        """Whether the p-value is at most 5 %."""
        return self.p_value is not None and self.p_value <= OUTSIDE

    def to_json(self) -> dict[str, Any]:
        """The value of the signal's key in `copycheck.json`."""
        return {"value": self.value, "p_value": self.p_value, "outside": self.outside, "meaning": self.meaning}


@torch.no_grad()
def retrieve(data: TrainingData, indices: Sequence[int], seed: int) -> list[bool]:
    """Whether the one-step prediction from pure noise and a caption is nearest to the caption's own image.

    The network denoises at the highest timesteps from noise that contains no image: where a real noisy image is
    sqrt(a) x + sqrt(1 - a) noise, x is zero. The predicted clean latents are compared with all images of the same
    shape: by means over 8 x 8 fields, because one step from noise gives no detail; minus the mean image, because what
    all images share says nothing; by the cosine, because the contrast of the prediction is arbitrary.

    Args:
        data: The training images, their captions unchanged.
        indices: The captions to probe.

    Returns:
        Four results per index, two for each of the timesteps 999 and 800. An image whose shape no other image has is
        always found.

    Source: Ho et al. 2006.11239, equation 15 (clean latents in one step).
    """
    hits: list[bool] = []
    means = {i: _mean_latents(data, i) for i in range(len(data.dataset.examples))}
    by_shape: dict[torch.Size, list[int]] = {}
    for index in indices:
        by_shape.setdefault(means[index].shape, []).append(index)
    predicted: dict[int, Tensor] = {}
    for same in by_shape.values():  # one batch per shape: small batches leave the device idle
        predicted |= zip(same, _predict(data, same, seed), strict=True)
    for index in indices:
        gallery = {i: mean for i, mean in means.items() if mean.shape == means[index].shape}
        common = torch.stack(list(gallery.values())).mean(dim=0)
        fields = _fields(predicted[index].cpu() - common)
        similarity = {i: F.cosine_similarity(fields, _fields(mean - common), dim=1) for i, mean in gallery.items()}
        # At least as near, so that a duplicate of the image does not count against it.
        hits += (similarity[index] >= torch.stack(list(similarity.values())).amax(dim=0)).tolist()
    return hits


def _fields(latents: Tensor) -> Tensor:
    """Means over 8 x 8 fields, (..., C, h, w) to (..., C * 64); smaller latents stay unchanged."""
    height, width = latents.shape[-2:]
    return F.adaptive_avg_pool2d(latents, (min(NUM_FIELDS, height), min(NUM_FIELDS, width))).flatten(-3)


def _mean_latents(data: TrainingData, index: int) -> Tensor:
    """The mean of the VAE's latent distribution of an image, (C, h, w)."""
    moments = data.moments([index])
    return data.cache.base.sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))[0]


def _predict(data: TrainingData, indices: Sequence[int], seed: int) -> Tensor:
    """Clean latents that the network predicts for captions from pure noise, (P, 4, C, h, w)."""
    base = data.cache.base
    probes = [(timestep, probe) for timestep in PROBED_TIMESTEPS for probe in range(NUM_PROBES)]
    shape = data.moments(indices[:1]).chunk(2, dim=1)[0].shape[1:]
    drawn = [seeds.normal(shape, seed, "self-retrieval", data.name(i), *probe) for i in indices for probe in probes]
    noise = torch.stack(drawn).to(base.device)
    timesteps = torch.tensor([timestep for timestep, _ in probes], device=base.device).repeat(len(indices))
    noisy = base.levels.mix(torch.zeros_like(noise), noise, timesteps)
    text = {
        name: embeddings.to(base.device).repeat_interleave(len(probes), dim=0)
        for name, embeddings in data.text([(index, 1) for index in indices]).items()
    }
    clean = base.levels.clean(noisy, base.predict(noisy, timesteps, text), timesteps)
    return clean.view(len(indices), len(probes), *shape)


def self_retrieval(on: Sequence[bool], off: Sequence[bool]) -> Signal:
    """Whether captions retrieve their own images more often with the adapter than without: results of `retrieve`."""
    gained = sum(a and not b for a, b in zip(on, off, strict=True))
    lost = sum(b and not a for a, b in zip(on, off, strict=True))
    return Signal(
        "self_retrieval",
        fmean(on) - fmean(off),
        mcnemar(gained, lost),
        f"From pure noise, a training caption leads to its own image in {sum(on)} of {len(on)} tries; without the "
        f"LoRA, in {sum(off)}.",
    )


def train_validation_gap(training: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor] | None) -> Signal:
    """How much more the adapter lowers the loss on training images than on validation images.

    Args:
        training: Losses of `image_losses` with the adapter and without, of the same images.
        validation: The same of validation images, or None if there are none.
    """
    if validation is None:
        return Signal("train_heldout_gap", None, None, "No validation images, so there is nothing to compare with.")
    changes = [(on - off).double().cpu() for on, off in (training, validation)]
    base = torch.cat([training[1], validation[1]]).double().cpu().mean(dim=(0, 2))
    trained, unseen = (change.mean(dim=(0, 2)) for change in changes)
    widest = int(((unseen - trained) / base).argmax())
    gains = [(-change.mean(dim=(1, 2))).tolist() for change in changes]
    shares = [float(change.mean() / base.mean()) for change in changes]
    return Signal(
        "train_heldout_gap",
        shares[1] - shares[0],
        permutation_test(gains[0], gains[1]),
        f"The LoRA changes the loss by {shares[0]:+.0%} on training images and by {shares[1]:+.0%} on validation "
        f"images; the gap is widest at timesteps {band_names()[widest]}.",
    )


ByPrompt = Sequence[Sequence[float]]
"""One value per preview: for every prompt, one per seed."""


def guidance_norm(training: tuple[ByPrompt, ByPrompt], novel: tuple[ByPrompt, ByPrompt]) -> Signal:
    """How much more the adapter raises the guidance norm of training captions than of new prompts.

    Args:
        training: `SamplerWatch.guidance_norms` of previews from training captions, with the adapter and without.
        novel: The same of previews from new prompts.
    """
    if not any(training[0]) or not any(novel[0]):
        why = "Needs guidance, and previews of both training captions and new prompts."
        return Signal("guidance_norm", None, None, why)
    trained, new = (
        [fmean(a / b for a, b in zip(on, off, strict=True)) for on, off in zip(*pair, strict=True)]
        for pair in (training, novel)
    )
    return Signal(
        "guidance_norm",
        fmean(trained) / fmean(new),
        permutation_test(trained, new),
        f"The guidance of training captions is {fmean(trained):.2f} times as strong as without the LoRA; that of new "
        f"prompts, {fmean(new):.2f} times.",
    )


Images = Sequence[Sequence[Image.Image]]
"""One image per preview: for every prompt, one per seed."""


def seed_collapse(on: Images, off: Images) -> Signal:
    """Whether previews of one prompt with different seeds are more similar to each other than the base model's are."""
    num_seeds = [len(of_prompt) for of_prompt in on]
    if max(num_seeds) == 1:
        return Signal("seed_collapse", None, None, "Needs two seeds, so that each prompt has two previews to compare.")
    flat = [image for images in (on, off) for of_prompt in images for image in of_prompt]
    similarity = hp_ms(flat, flat).double()
    similarity = (similarity + similarity.T) / 2  # hp_ms mirrors only the first of a pair
    prompts = torch.arange(len(on)).repeat_interleave(torch.tensor(num_seeds))
    pairs = (prompts[:, None] == prompts) & ~torch.eye(len(prompts), dtype=torch.bool)
    size = len(prompts)
    with_it, crossed, without = similarity[:size, :size], similarity[:size, size:], similarity[size:, size:]
    # If the adapter had no effect, a preview's two images would be exchangeable. Exchanging them flips the sign of the
    # preview's contribution to the difference and nothing else: the similarity across the two conditions cancels.
    added = ((with_it + crossed - crossed.T - without) * pairs).sum(dim=1)
    means = [float(values[pairs].mean()) for values in (with_it, without)]
    return Signal(
        "seed_collapse",
        means[0] - means[1],
        sign_flip_test(added.tolist()),
        f"The mean similarity of previews of one prompt with different seeds is {means[0]:.2f} (1 is identical); "
        f"without the LoRA, {means[1]:.2f}.",
    )


PREVIEW_CHANGE = "preview_change"


def preview_change(on: Images, off: Images) -> Signal:
    """How much of the base model's previews is left in those of the same prompts and seeds; it has no p-value."""
    pairs = [pair for both in zip(on, off, strict=True) for pair in zip(*both, strict=True)]
    kept = fmean(float(hp_ms([first], [second])) for first, second in pairs)
    meaning = f"The mean similarity of previews to those of the base model is {kept:.2f} (1 is identical)."
    return Signal(PREVIEW_CHANGE, kept, None, meaning)


def registered_similarity(previews: Tensor, among: Tensor) -> Signal:
    """Whether previews, aligned to training images, match them better than the set's images match each other.

    Args:
        previews: The highest `registered_correlation` of each preview, (N,).
        among: The same of images of the set, each with the others; empty if none could be compared.
    """
    if len(among) == 0:
        return Signal("registered_likeness", None, None, "Needs a second training image to compare with.")
    drawn, real = fisher_z(previews).tolist(), fisher_z(among).tolist()
    means = [float(values.mean()) for values in (previews, among)]
    return Signal(
        "registered_likeness",
        means[0] - means[1],
        permutation_test(drawn, real),
        f"Aligned to their nearest training image, previews have a mean similarity of {means[0]:.2f} (1 is identical); "
        f"images of the set aligned to each other, {means[1]:.2f}.",
    )
