"""Stable Diffusion 1.x: one CLIP text encoder, an AutoencoderKL, a UNet with cross-attention.

Floor 3. Shapes: B batch, C latent channels (4), H/W pixels, h/w latents, L tokens (77), D text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdlora.diffusion.noise import check_prediction_type, zero_terminal_snr
from sdlora.errors import BaseModelError, ConfigError
from sdlora.models.base import TextStates

_SD2_TEXT_WIDTH = 1024


class StableDiffusion:
    """A Stable Diffusion 1.x base; see `sdlora.models.base.BaseModel` for the attributes.

    Args:
        pipeline: The loaded pipeline, in float32 on the CPU.
        path: Where it came from.
        device: Where to compute.
        dtype: The frozen UNet's type; VAE and text encoder stay in float32, for they are small or run once.
        reload: Loads the same pipeline anew.

    Raises:
        BaseModelError: The pipeline is an inpainting model or a Stable Diffusion 2.x, or predicts something sdlora does
            not train.
    """

    architecture = "stable-diffusion-v1"

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        *,
        path: str,
        device: torch.device,
        dtype: torch.dtype,
        reload: Callable[[], StableDiffusionPipeline],
    ) -> None:
        self._pipeline = pipeline
        self._reload = reload
        self.path = path
        self.device = device
        self.unet: UNet2DConditionModel = pipeline.unet
        self.vae: AutoencoderKL = pipeline.vae
        self.text_encoder: CLIPTextModel = pipeline.text_encoder
        self.tokenizer: CLIPTokenizer = pipeline.tokenizer
        channels = self.unet.config.in_channels
        if channels != self.vae.config.latent_channels:
            raise BaseModelError(
                f"The UNet of {path!r} takes {channels} channels and its VAE makes {self.vae.config.latent_channels}: "
                "this is an inpainting or depth model. Train on the plain model it was made from."
            )
        if self.unet.config.cross_attention_dim == _SD2_TEXT_WIDTH:
            raise BaseModelError(
                f"{path!r} is a Stable Diffusion 2.x: its text states are {_SD2_TEXT_WIDTH} numbers wide. "
                "sdlora trains Stable Diffusion 1.x; choose such a base."
            )
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction_type = check_prediction_type(schedule.config.prediction_type)
        self.alphas_cumprod: Tensor = schedule.alphas_cumprod.float().to(device)
        self.latent_factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution_px: int = self.unet.config.sample_size * self.latent_factor
        self.max_tokens: int = self.tokenizer.model_max_length
        self.vae_identity = weights_identity(self.vae, self.vae.config)
        vocabulary = self.tokenizer.get_vocab()
        self.text_identity = weights_identity(self.text_encoder, self.text_encoder.config.to_dict(), vocabulary)
        for module in (self.unet, self.vae, self.text_encoder):
            module.requires_grad_(False).eval().to(device)
        self.unet.to(dtype)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to posterior moments (B, 2C, h, w) in float32."""
        moments: Tensor = self.vae.encode(pixels.to(self.device)).latent_dist.parameters
        return moments

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw from the posterior and scale: (mean + exp(log-variance / 2) * noise) * scaling_factor."""
        mean, log_variance = moments.chunk(2, dim=1)
        # diffusers clamps the log-variance to this range as well (DiagonalGaussianDistribution).
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents: Tensor = (mean + deviation * noise) * self.vae.config.scaling_factor
        return latents

    def encode_captions(self, captions: Sequence[str]) -> TextStates:
        """Captions to {"states": (B, L, D)}; words past the encoder's window are cut off."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        return {"states": self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state}

    def num_tokens(self, caption: str) -> int:
        """How many tokens a caption needs, the start and end marks included."""
        return len(self.tokenizer(caption, truncation=False, verbose=False).input_ids)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        """The UNet's answer (B, C, h, w) in float32."""
        dtype = self.unet.dtype
        answer: Tensor = self.unet(noisy.to(dtype), timesteps, text["states"].to(dtype), return_dict=False)[0]
        return answer.float()

    def use_zero_terminal_snr(self) -> None:
        """Rescale the schedule, for training and for previews, so that the highest level is pure noise.

        Raises:
            ConfigError: The base predicts epsilon, which says nothing of the picture where there is only noise.
        """
        if self.prediction_type != "v_prediction":
            raise ConfigError(
                f"loss.zero_terminal_snr needs a v-prediction base, and {self.path!r} predicts {self.prediction_type}. "
                "Set it to false, or raise loss.noise_offset a little for darker and brighter pictures."
            )
        self.alphas_cumprod = zero_terminal_snr(self.alphas_cumprod)
        # Sampling must begin at the last level, too (Lin et al. 2305.08891, section 3.3); DDIM can.
        self._pipeline.scheduler = DDIMScheduler.from_config(
            self._pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )

    @contextmanager
    def pipeline(self) -> Iterator[StableDiffusionPipeline]:
        """The pipeline around these networks; latents stay in float32 whatever the UNet computes in."""
        before = self.unet.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        after = self.unet.register_forward_hook(_cast_outputs)
        try:
            yield self._pipeline
        finally:
            before.remove()
            after.remove()

    def fresh_pipeline(self) -> StableDiffusionPipeline:
        """The same base loaded anew in float32 on the CPU."""
        return self._reload()


def _cast_inputs(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    dtype = next(unet.parameters()).dtype

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}


def _cast_outputs(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in output)


def weights_identity(module: nn.Module, *descriptions: Any) -> str:
    """A hash of a module's weights and of whatever else decides what it computes."""
    digest = hashlib.blake2b(digest_size=16)
    for description in descriptions:
        # Names that begin with an underscore tell where a network was loaded from, and by which version.
        settings = {key: value for key, value in dict(description).items() if not str(key).startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode("utf-8"))
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode("utf-8"))
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
