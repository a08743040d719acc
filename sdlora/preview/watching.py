"""What the UNet did while previews were drawn: how hard guidance pulled, and how far it ended from the base.

Floor 6, used by the sampler. It listens to calls that are made anyway, and adds one call per preview.
Shapes: B previews drawn together, C latent channels, h/w latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.diffusion.losses import mse_per_example
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel


class SamplerWatch:
    """Listens to the UNet while previews are drawn; given to `draw_previews`, and read afterwards.

    Args:
        base: The model that draws.
        adapter: Switched off for the one call that is added, and nothing else is done to it.

    Attributes:
        guidance_norms: Per preview, in the order of `PreviewRequest.file_names`: how far the caption's answer is from
            the negative prompt's, as a root mean square over the latent, mean over all calls; empty where guidance is
            off, for then only captions are asked.
        base_distances: Per preview, in the same order: the mean square of the adapter's answer minus the base's at the
            last call, to the caption. Where the text encoder is adapted, the caption is read with the adapter for both.

    Source: the norm is Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR
    2024), section 3.1; the distance follows 2605.26756, which compares a model with one trained less: here the base.
    """

    def __init__(self, base: BaseModel, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter
        self.guidance_norms: list[float] = []
        self.base_distances: list[float] = []

    @contextmanager
    def batch(self, num_previews: int) -> Iterator[None]:
        """Listen while one batch is drawn; to be entered where answers are float32 whatever the UNet computes in.

        Args:
            num_previews: B. Under guidance the UNet is asked for twice as many answers, the captions' last.
        """
        norms: list[Tensor] = []
        last: list[tuple[tuple[Any, ...], Mapping[str, Any], Tensor]] = []

        def listen(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: tuple[Tensor, ...]) -> None:
            answers = output[0].detach()
            if len(answers) == 2 * num_previews:
                negative, caption = answers.float().chunk(2)
                norms.append(mse_per_example(caption, negative).sqrt())
            last[:] = [(args, kwargs, answers[-num_previews:])]

        handle = self._base.unet.register_forward_hook(listen, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        if norms:
            self.guidance_norms += torch.stack(norms).mean(dim=0).tolist()
        (args, kwargs, answers), *_ = last
        with self._adapter.disabled(), torch.no_grad():
            plain = self._base.unet(*_ends(args, num_previews), **_ends(kwargs, num_previews))[0]
        self.base_distances += mse_per_example(answers, plain).tolist()


def _ends(value: Any, count: int) -> Any:
    """The last `count` of every batch in the arguments of a call; what is no batch stays as it is."""
    if isinstance(value, Tensor):
        return value[-count:] if value.ndim > 0 else value
    if isinstance(value, Mapping):
        return {name: _ends(part, count) for name, part in value.items()}
    return tuple(_ends(part, count) for part in value) if isinstance(value, tuple) else value
