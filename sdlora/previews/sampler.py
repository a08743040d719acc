"""Previews: the same prompts and seeds are drawn after every epoch, to show what the adapter has learned.

Called by `copycheck` and `run`. A diffusers pipeline draws them; the noise comes from separate generators, so training
is not disturbed. Shapes: B previews drawn together, C latent channels, h/w latents.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from sdlora.common.files import atomic_path
from sdlora.errors import ConfigError
from sdlora.events import Event, PreviewsDone, Progress
from sdlora.models.base import BaseModel
from sdlora.previews.sibling import Sibling

Kind = Literal["training", "novel"]
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""Samplers by name: diffusers' scheduler, and what it sets beside the base model's noise schedule."""
_PIXELS_PER_BATCH = 8 * 128 * 128
# Text encoders and VAE take turns on the device; swapping large ones takes about a second.
_BATCHES_PER_TURN = 16
_PAPER, _TEXT, _FAINT = (250, 250, 248), (30, 30, 34), (120, 120, 126)
_TILE_PX, _GAP_PX, _LABEL_PX, _HEADER_PX = 128, 6, 200, 34


@dataclass(frozen=True)
class PreviewRequest:
    """What to draw.

    Attributes:
        prompts: Each is drawn once per seed.
        seeds: Of every prompt.
        num_steps: Denoising steps, at least 1.
        guidance: Classifier-free guidance scale; 1 switches it off.
        num_captions: How many of the prompts, from the first, are captions of training images.
        sampler: A key of `SAMPLERS`, "base" for the base model's own, or "auto".
        size_px: Width and height; None is the base model's own resolution, squared.
        own_seeds: Those of each prompt, in the place of `seeds`; empty if all have the same.
        lora_scale: Strength of the LoRA; 1 is as trained. Who draws sets it: see `Adapter.at_strength`.
        first: Number of the first prompt in the files' names.
        sibling: What draws in the place of the base model's network, or None.
        difference: What the label says beside the prompt, such as "832x1216"; may be empty.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    num_steps: int
    guidance: float
    num_captions: int = 0
    sampler: str = "auto"
    size_px: tuple[int, int] | None = None
    own_seeds: tuple[tuple[int, ...], ...] = ()
    lora_scale: float = 1.0
    first: int = 0
    difference: str = ""
    sibling: Sibling | None = field(default=None, compare=False, repr=False)

    def pixels(self, resolution_px: int) -> tuple[int, int]:
        """Width and height on a base model of a resolution."""
        return self.size_px or (resolution_px, resolution_px)

    def more(self, total: int) -> PreviewRequest:
        """The same prompts with further seeds, until there are at least `total` previews with these."""
        count = -(-(total - len(self.wanted())) // len(self.prompts))
        first = max(seed for _, seed in self.wanted()) + 1
        return replace(self, seeds=tuple(range(first, first + count)), own_seeds=())

    def wanted(self) -> list[tuple[str, int]]:
        """Every image's prompt and seed, prompts first."""
        return [(prompt, seed) for prompt, seeds in self._by_prompt() for seed in seeds]

    def num_seeds(self) -> list[int]:
        """How often each prompt is drawn."""
        return [len(seeds) for _, seeds in self._by_prompt()]

    def _by_prompt(self) -> list[tuple[str, tuple[int, ...]]]:
        return list(zip(self.prompts, self.own_seeds or (self.seeds,) * len(self.prompts), strict=True))

    def kinds(self) -> list[Kind]:
        """The origin of every image's prompt."""
        return [
            "training" if index < self.num_captions else "novel"
            for index, count in enumerate(self.num_seeds())
            for _ in range(count)
        ]

    def file_names(self) -> list[str]:
        """One PNG per prompt and seed, prompts first."""
        numbered = enumerate(self._by_prompt(), start=self.first)
        return [f"prompt{number:02d}_seed{seed}.png" for number, (_, seeds) in numbered for seed in seeds]

    def labels(self) -> list[str]:
        """Every image's prompt, with what sets it apart from the others."""
        added = f" ({self.difference})" if self.difference else ""
        return [f"{prompt}{added}" for prompt, _ in self.wanted()]


class SamplerWatch:
    """Observes the UNet while previews are drawn, and makes no call itself; passed to `draw_epoch` and read afterwards.

    The norm of classifier-free guidance is a sign of memorization.

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
    def batch(self, num_previews: int, *, guided: bool = True) -> Iterator[None]:
        """Observe one batch; enter it where predictions are float32 whatever the UNet computes in.

        Args:
            num_previews: B.
            guided: Whether it is drawn with guidance. Each step then predicts twice as many, for captions and for
                negative prompts, in one call or in one after the other.
        """
        if not guided:
            yield
            return
        norms: list[Tensor] = []
        step: list[Tensor] = []

        def observe(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            # Some transformers predict for a list of latents (C, 1, h, w).
            step.append((torch.stack(output[0]).squeeze(2) if isinstance(output[0], list) else output[0]).detach())
            if sum(map(len, step)) == 2 * num_previews:
                one, other = torch.cat(step).chunk(2)
                norms.append((other - one).float().square().mean(dim=tuple(range(1, one.dim()))).sqrt())
                step.clear()

        handle = self._base.network.register_forward_hook(observe)
        try:
            yield
        finally:
            handle.remove()
        if norms:
            self.guidance_norms += torch.stack(norms).mean(dim=0).tolist()


def draw_epoch(
    base: BaseModel, request: PreviewRequest, epoch: int, folder: Path, watch: SamplerWatch | None = None
) -> Iterator[Event]:
    """Draw every prompt with every seed into `previews` in an epoch's folder, as `PreviewRequest.file_names`."""
    start = time.monotonic()
    yield from draw_files(base, request, folder, "previews", watch)
    files = [str(folder / "previews" / name) for name in request.file_names()]
    yield PreviewsDone(epoch, files, time.monotonic() - start)


def draw_files(
    base: BaseModel, request: PreviewRequest, folder: Path, phase: str, watch: SamplerWatch | None = None
) -> Iterator[Progress]:
    """The files of `draw_epoch`; the phase is what progress is called."""
    files = [folder / "previews" / name for name in request.file_names()]
    done = 0
    for images in draw(base, request, request.wanted(), watch):
        for image in images:
            with atomic_path(files[done]) as temporary:
                image.save(temporary, format="PNG")
            done += 1
        yield Progress(phase, done, len(files))


def draw(
    base: BaseModel, request: PreviewRequest, wanted: Sequence[tuple[str, int]], watch: SamplerWatch | None = None
) -> Iterator[list[Image.Image]]:
    """Draw images of wanted prompts and seeds, in order and in batches; those of the request are ignored."""
    size = max(1, _PIXELS_PER_BATCH // prod(request.pixels(base.resolution_px)))
    batches = [wanted[first : first + size] for first in range(0, len(wanted), size)]
    with request.sibling.drawing(base) if request.sibling else nullcontext():
        for first in range(0, len(batches), _BATCHES_PER_TURN):
            turn = batches[first : first + _BATCHES_PER_TURN]
            with torch.no_grad():
                negative = request.negative_prompt
                encoded = [base.prompt_embeddings([prompt for prompt, _ in b], [negative] * len(b)) for b in turn]
            for batch, prompts in zip(turn, encoded, strict=True):
                yield _draw(base, request, batch, prompts, watch)


def _draw(
    base: BaseModel,
    request: PreviewRequest,
    batch: Sequence[tuple[str, int]],
    prompts: dict[str, Any],
    watch: SamplerWatch | None,
) -> list[Image.Image]:
    # The watch's context is the inner one, so that it sees float32 predictions.
    width, height = request.pixels(base.resolution_px)
    watching = watch.batch(len(batch), guided=request.guidance > 1) if watch else nullcontext()
    if request.sampler not in base.samplers:
        raise ConfigError(
            f"preview.sampler = {request.sampler!r} is for other families than that of {base.path!r}; it has "
            f"{' and '.join(base.samplers)}. Leave it unset."
        )
    if odd := next((edge for edge in (width, height) if edge % base.size_step_px), None):
        raise ConfigError(
            f"{base.path!r} needs widths and heights that are multiples of {base.size_step_px} px, and a preview would "
            f"have {odd}. Set preview.width_px and preview.height_px, or the prompt's own, to multiples of "
            f"{base.size_step_px}."
        )
    with base.pipeline() as pipeline, _sampling(pipeline, request.sampler), watching, torch.no_grad():
        result = pipeline(
            **prompts,
            width=width,
            height=height,
            num_inference_steps=request.num_steps,
            guidance_scale=base.guidance_argument(request.guidance),
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
        )
    images: list[Image.Image] = result.images
    return images


@contextmanager
def _sampling(pipeline: DiffusionPipeline, name: str) -> Iterator[None]:
    """Exchange a pipeline's sampler, which keeps the base model's noise schedule and prediction type."""
    own = pipeline.scheduler
    if name == "auto":
        # Karras' noise levels have to end somewhere, and flow matching has its own.
        has_own = "beta_schedule" not in own.config or own.config.get("rescale_betas_zero_snr")
        name = "base" if has_own else "dpmpp_2m_karras"
    if name != "base":
        kind, options = SAMPLERS[name]
        pipeline.scheduler = kind.from_config(own.config, **options)
    try:
        yield
    finally:
        pipeline.scheduler = own


def contact_sheet(labels: Sequence[str], columns: Sequence[tuple[str, Sequence[Path]]], target: Path) -> None:
    """Write all previews into one PNG: a label for each row; for each column a heading and files from top to bottom."""
    width = _LABEL_PX + len(columns) * (_TILE_PX + _GAP_PX) + _GAP_PX
    height = _HEADER_PX + len(labels) * (_TILE_PX + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    heading, small = ImageFont.load_default(15), ImageFont.load_default(13)
    for row, label in enumerate(labels):
        y = _HEADER_PX + row * (_TILE_PX + _GAP_PX)
        draw.multiline_text((_GAP_PX * 2, y + 8), textwrap.fill(label, 26), fill=_FAINT, font=small, spacing=4)
    for column, (title, files) in enumerate(columns):
        x = _LABEL_PX + column * (_TILE_PX + _GAP_PX)
        draw.text((x + 2, 9), title, fill=_TEXT, font=heading)
        for row, file in enumerate(files):
            with Image.open(file) as image:
                # Nearest neighbour keeps small sprites crisp; larger images are reduced smoothly.
                method = Image.Resampling.NEAREST if image.width < _TILE_PX else Image.Resampling.LANCZOS
                tile = ImageOps.contain(image.convert("RGB"), (_TILE_PX, _TILE_PX), method)
            y = _HEADER_PX + row * (_TILE_PX + _GAP_PX)
            sheet.paste(tile, (x + (_TILE_PX - tile.width) // 2, y + (_TILE_PX - tile.height) // 2))
    with atomic_path(target) as temporary:
        sheet.save(temporary, format="PNG")
