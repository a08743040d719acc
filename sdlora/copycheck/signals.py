"""Signs of copying other than a preview that looks like a training image: what each measures and says.

Every sign is a figure, how likely chance alone gives as much, and one sentence for a person.
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
from sdlora.diffusion.bands import band_names
from sdlora.diffusion.noise import add_noise, predicted_latents
from sdlora.training.data import TrainingData

OUTSIDE = 0.05
# Four calls of the UNet for each caption probed and ten for each image compared: with so many, a sixth of the calls
# that seven previews of 25 guided steps take.
MOST_PROBED = 4
MOST_COMPARED = 4
PROBED_TIMESTEPS = (999, 800)
NUM_PROBES = 2
NUM_FIELDS = 8


@dataclass(frozen=True)
class Signal:
    """One sign of copying.

    Attributes:
        name: As in `copycheck.json`.
        value: The figure, or None where it cannot be measured.
        p_value: How likely chance alone gives as much, in (0, 1], or None.
        meaning: One sentence for an artist, with the figure or why there is none.
    """

    name: str
    value: float | None
    p_value: float | None
    meaning: str

    @property
    def outside(self) -> bool:
        """Whether chance alone would rarely give as much."""
        return self.p_value is not None and self.p_value <= OUTSIDE

    def to_json(self) -> dict[str, Any]:
        """What `copycheck.json` holds under the signal's name."""
        return {"value": self.value, "p_value": self.p_value, "outside": self.outside, "meaning": self.meaning}


# --- Self-retrieval ------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieve(data: TrainingData, indices: Sequence[int], seed: int) -> list[bool]:
    """Whether a caption alone leads from noise straight to its own image and to no other of the set.

    The network is asked at the highest noise levels, at noise that holds nothing of any image: where a real noisy
    image is sqrt(a) x + sqrt(1 - a) noise, x is zero. What it takes for the clean latents is compared with the
    images of the same shape: means over 8 x 8 fields, for one step from noise gives no detail; minus the mean of
    those images, for what all have in common tells nothing; by the cosine, for the contrast is not right either.

    Args:
        data: The training images, their captions as they are.
        indices: Which captions are asked.
        seed: The run's seed, for the noise.

    Returns:
        For each index 4 answers, 2 for each of the timesteps 999 and 800: whether the image is nearest to its own. A
        image that no other shares its shape with is always found.

    Source: the clean latents in one step are Ho et al. 2006.11239, equation 15.
    """
    hits: list[bool] = []
    means = {i: _mean_latents(data, i) for i in range(len(data.dataset.examples))}
    asked: dict[torch.Size, list[int]] = {}
    for index in indices:
        asked.setdefault(means[index].shape, []).append(index)
    # All captions of a shape at once: a network asked for few latents idles.
    guessed = {
        i: of for similar in asked.values() for i, of in zip(similar, _guesses(data, similar, seed), strict=True)
    }
    for index in indices:
        gallery = {i: mean for i, mean in means.items() if mean.shape == means[index].shape}
        common = torch.stack(list(gallery.values())).mean(dim=0)
        guesses = _fields(guessed[index].cpu() - common)
        similarity = {i: F.cosine_similarity(guesses, _fields(mean - common), dim=1) for i, mean in gallery.items()}
        # A second file of the same image is no other image.
        hits += (similarity[index] >= torch.stack(list(similarity.values())).amax(dim=0)).tolist()
    return hits


def _fields(latents: Tensor) -> Tensor:
    """Means over 8 x 8 fields, (..., C, h, w) to (..., C * 64); small latents are left as they are."""
    height, width = latents.shape[-2:]
    return F.adaptive_avg_pool2d(latents, (min(NUM_FIELDS, height), min(NUM_FIELDS, width))).flatten(-3)


def _mean_latents(data: TrainingData, index: int) -> Tensor:
    """The clean latents of an image without the VAE's noise, (C, h, w)."""
    moments = data.moments([index])
    return data.cache.base.sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))[0]


def _guesses(data: TrainingData, indices: Sequence[int], seed: int) -> Tensor:
    """What the network takes for the clean latents of captions, from noise alone, (P, 4, C, h, w)."""
    base = data.cache.base
    asked = [(timestep, probe) for timestep in PROBED_TIMESTEPS for probe in range(NUM_PROBES)]
    shape = data.moments(indices[:1]).chunk(2, dim=1)[0].shape[1:]
    drawn = [seeds.normal(shape, seed, "self-retrieval", data.name(i), *which) for i in indices for which in asked]
    noise = torch.stack(drawn).to(base.device)
    timesteps = torch.tensor([timestep for timestep, _ in asked], device=base.device).repeat(len(indices))
    alphas_cumprod = base.alphas_cumprod[timesteps]
    noisy = add_noise(torch.zeros_like(noise), noise, alphas_cumprod)
    text = {
        name: states.to(base.device).repeat_interleave(len(asked), dim=0)
        for name, states in data.text([(index, 1) for index in indices]).items()
    }
    clean = predicted_latents(base.prediction_type, noisy, base.predict(noisy, timesteps, text), alphas_cumprod)
    return clean.view(len(indices), len(asked), *shape)


def self_retrieval(on: Sequence[bool], off: Sequence[bool]) -> Signal:
    """Whether captions lead straight to their own images more often with the adapter than without.

    Args:
        on: From `retrieve`.
        off: The same within `adapter.disabled()`.
    """
    gained = sum(a and not b for a, b in zip(on, off, strict=True))
    lost = sum(b and not a for a, b in zip(on, off, strict=True))
    return Signal(
        "self_retrieval",
        fmean(on) - fmean(off),
        mcnemar(gained, lost),
        f"From noise alone, a training caption leads to its own image in {sum(on)} of {len(on)} tries, without the "
        f"LoRA in {sum(off)}.",
    )


# --- The gap between trained and validation images -----------------------------------------------------------------


def train_validation_gap(training: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor] | None) -> Signal:
    """How much more the adapter lowers the error on training images than on validation ones.

    Args:
        training: The losses with the adapter and without, as `image_losses` gives them, of the same images.
        heldout: The same for validation images, or None if there are none.
    """
    if validation is None:
        return Signal("train_heldout_gap", None, None, "Without validation images there is nothing to compare with.")
    changes = [(on - off).double().cpu() for on, off in (training, validation)]
    base = torch.cat([training[1], validation[1]]).double().cpu().mean(dim=(0, 2))
    trained, kept = (change.mean(dim=(0, 2)) for change in changes)
    widest = int(((kept - trained) / base).argmax())
    gains = [(-change.mean(dim=(1, 2))).tolist() for change in changes]
    shares = [float(change.mean() / base.mean()) for change in changes]
    return Signal(
        "train_heldout_gap",
        shares[1] - shares[0],
        permutation_test(gains[0], gains[1]),
        f"The LoRA changes the error by {shares[0]:+.0%} on training images and by {shares[1]:+.0%} on validation "
        f"ones; they part most at timesteps {band_names()[widest]}.",
    )


# --- While previews are drawn ---------------------------------------------------------------------------------------

ByPrompt = Sequence[Sequence[float]]
"""A figure per preview: for every prompt, one per seed."""


def guidance_norm(training: tuple[ByPrompt, ByPrompt], novel: tuple[ByPrompt, ByPrompt]) -> Signal:
    """How much harder training captions pull than without the adapter, beside what new prompts do.

    Args:
        training: `SamplerWatch.guidance_norms` of previews from training captions, with the adapter and without.
        novel: The same of previews from new prompts.
    """
    if not any(training[0]) or not any(novel[0]):
        why = "It takes guidance, and previews of training captions and of new prompts, to compare how hard they pull."
        return Signal("guidance_norm", None, None, why)
    own, other = (
        [fmean(a / b for a, b in zip(on, off, strict=True)) for on, off in zip(*pair, strict=True)]
        for pair in (training, novel)
    )
    return Signal(
        "guidance_norm",
        fmean(own) / fmean(other),
        permutation_test(own, other),
        f"Training captions pull on a preview {fmean(own):.2f} times as hard as without the LoRA, new prompts "
        f"{fmean(other):.2f} times.",
    )


# --- Previews that look like one another ----------------------------------------------------------------------------

Images = Sequence[Sequence[Image.Image]]
"""An image per preview: for every prompt, one per seed."""


def seed_collapse(on: Images, off: Images) -> Signal:
    """Whether previews of one prompt look more like one another than the base's do, whatever noise they began with.

    Args:
        on: With the adapter; every prompt has the same seeds.
        off: Without it, the same prompts and seeds.
    """
    num_prompts, num_seeds = len(on), len(on[0])
    if num_seeds == 1:
        return Signal("seed_collapse", None, None, "With one seed there are no two previews of a prompt to compare.")
    flat = [image for images in (on, off) for of_prompt in images for image in of_prompt]
    similarity = hp_ms(flat, flat).double()
    similarity = (similarity + similarity.T) / 2  # of a pair, the first is mirrored and the second is not
    prompts = torch.arange(num_prompts).repeat_interleave(num_seeds)
    pairs = (prompts[:, None] == prompts) & ~torch.eye(len(prompts), dtype=torch.bool)
    size = len(prompts)
    with_it, crossed, without = similarity[:size, :size], similarity[:size, size:], similarity[size:, size:]
    # If the adapter did nothing, either of a preview's two images might be the one with it. Exchanging them changes
    # the sign of what the preview adds to the difference, and of nothing else: similarity between the ways cancels.
    added = ((with_it + crossed - crossed.T - without) * pairs).sum(dim=1)
    means = [float(values[pairs].mean()) for values in (with_it, without)]
    return Signal(
        "seed_collapse",
        means[0] - means[1],
        sign_flip_test(added.tolist()),
        f"Previews of one prompt with other seeds resemble one another by {means[0]:.2f} of 1, without the LoRA by "
        f"{means[1]:.2f}.",
    )


# --- Previews that look like warped training images ---------------------------------------------------------------


def registered_similarity(previews: Tensor, among: Tensor) -> Signal:
    """Whether previews, laid onto training images, are more like them than the set's images are like one another.

    Args:
        previews: The highest `registration.registered` of each, (N,).
        among: The same of images of the set, from `nulls.registered_null`; empty if none could be compared.
    """
    if len(among) == 0:
        return Signal("registered_likeness", None, None, "One image alone has no other to be compared with.")
    drawn, real = fisher_z(previews).tolist(), fisher_z(among).tolist()
    means = [float(values.mean()) for values in (previews, among)]
    return Signal(
        "registered_likeness",
        means[0] - means[1],
        permutation_test(drawn, real),
        f"Laid onto their nearest training image, previews are {means[0]:.2f} of 1 like it; so laid onto one "
        f"another, images of the set are {means[1]:.2f}.",
    )
