"""The norm of classifier-free guidance while previews are drawn, a sign of memorization.

Used by the sampler and read by the copy check. It observes the sampler's UNet calls and makes none itself.
Shapes: B previews drawn together, C latent channels, h/w latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.diffusion.losses import mse_per_example
from sdlora.models.base import BaseModel


class SamplerWatch:
    """Observes the UNet while previews are drawn; passed to `draw_epoch` and read afterwards.

    Args:
        base: The model that draws.

    Attributes:
        guidance_norms: Per preview, in the order of `PreviewRequest.file_names`: the root mean square over the latent
            of the difference between the predictions for caption and negative prompt, mean over all calls; empty
            without guidance, which makes no negative predictions.

    Source: Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024), section
    3.1.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self.guidance_norms: list[float] = []

    @contextmanager
    def batch(self, num_previews: int) -> Iterator[None]:
        """Observe one batch; enter it where predictions are float32 whatever the UNet computes in.

        Args:
            num_previews: B. With guidance the UNet predicts twice as many, the captions' last.
        """
        norms: list[Tensor] = []

        def observe(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            predictions = output[0].detach()
            if len(predictions) == 2 * num_previews:
                negative, caption = predictions.chunk(2)
                norms.append(mse_per_example(caption, negative).sqrt())

        handle = self._base.unet.register_forward_hook(observe)
        try:
            yield
        finally:
            handle.remove()
        if norms:
            self.guidance_norms += torch.stack(norms).mean(dim=0).tolist()
