"""What the UNet did while previews were drawn: how hard guidance pulled.

Used by the sampler. It listens to calls that are made anyway and makes none of its own.
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
    """Listens to the UNet while previews are drawn; given to `draw_epoch`, and read afterwards.

    Args:
        base: The model that draws.

    Attributes:
        guidance_norms: Per preview, in the order of `PreviewRequest.file_names`: how far the caption's answer is from
            the negative prompt's, as a root mean square over the latent, mean over all calls; empty where guidance is
            off, for then only captions are asked.

    Source: Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024), section
    3.1.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self.guidance_norms: list[float] = []

    @contextmanager
    def batch(self, num_previews: int) -> Iterator[None]:
        """Listen while one batch is drawn; to be entered where answers are float32 whatever the UNet computes in.

        Args:
            num_previews: B. Under guidance the UNet is asked for twice as many answers, the captions' last.
        """
        norms: list[Tensor] = []

        def listen(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            answers = output[0].detach()
            if len(answers) == 2 * num_previews:
                negative, caption = answers.chunk(2)
                norms.append(mse_per_example(caption, negative).sqrt())

        handle = self._base.unet.register_forward_hook(listen)
        try:
            yield
        finally:
            handle.remove()
        if norms:
            self.guidance_norms += torch.stack(norms).mean(dim=0).tolist()
