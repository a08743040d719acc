"""The preview section of the schema: which images are drawn from the base model and from the LoRA in training.

Part of `schema`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
)

from sdlora.config.prompt_lines import split_line
from sdlora.config.schema_data import LOCATION, Section

Sampler = Literal["auto", "base", "euler", "euler_a", "dpmpp_2m_karras", "unipc"]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]
EdgePx = Annotated[int, Field(ge=64, le=4096, multiple_of=8)]
NumSteps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=1.0, le=50.0)]

PROMPT_TAGS = ("a text", "a table")
"""What an entry of preview.prompts is; part of the place that a validation error names."""


class PreviewPrompt(Section):
    """One entry of preview.prompts with settings of its own; those left out are taken from `preview`."""

    text: str = Field(min_length=1)
    """The prompt, in which '{trigger}' stands for the trigger word."""
    negative_prompt: str | None = None
    """Like preview.negative_prompt."""
    seeds: Seeds | None = None
    """Like preview.seeds."""
    num_steps: NumSteps | None = None
    """Like preview.num_steps."""
    guidance: Guidance | None = None
    """Like preview.guidance."""
    sampler: Sampler | None = None
    """Like preview.sampler."""
    width_px: EdgePx | None = None
    """Like preview.width_px."""
    height_px: EdgePx | None = None
    """Like preview.height_px."""
    lora_scale: float = Field(1.0, ge=-10.0, le=10.0)
    """Strength of the LoRA; 1 is as trained."""

    @model_serializer(mode="wrap")
    def _only_own(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what `preview` decides."""
        return {"text": self.text} | self.own(serialize(self))

    def own(self, values: dict[str, Any] | None = None) -> dict[str, Any]:
        """The settings in which it differs from `preview`, by name; none for a plain text."""
        found = dict(self) if values is None else values
        return {
            name: value
            for name, value in found.items()
            if name != "text" and value is not None and (name, value) != ("lora_scale", 1.0)
        }


def _kind_of_prompt(value: Any) -> str:
    return PROMPT_TAGS[isinstance(value, (dict, PreviewPrompt))]


Prompt = Annotated[
    Annotated[str, Tag(PROMPT_TAGS[0])] | Annotated[PreviewPrompt, Tag(PROMPT_TAGS[1])],
    Discriminator(_kind_of_prompt),
]


class PreviewConfig(Section):
    """Preview images, generated from the base model and after every epoch."""

    enabled: bool = True
    """Generate previews from the base model and after every epoch."""
    prompts: list[Prompt] = Field([])
    """Prompts that no caption contains, in which '{trigger}' stands for the trigger word; if empty, three are made from
    it in new places. A table { text = "...", width_px = 832, lora_scale = 0.7 } has settings of its own, as has a line
    of kohya's such as "a cat --w 832 --h 1216 --d 7"; what differs in more than its seeds is shown, and not checked for
    copies."""
    num_captions: int = Field(3, ge=0, le=64)
    """Number of training captions that are used as prompts, too; copies show up there first."""
    seeds: Seeds = Field([0])
    """Seeds; every prompt is generated once per seed."""
    negative_prompt: str = ""
    """Negative prompt of the previews."""
    num_steps: NumSteps = Field(10)
    """Denoising steps per preview; samplers other than DPM++ 2M and UniPC need about 25."""
    guidance: Guidance = Field(7.5)
    """Guidance scale; 1 disables classifier-free guidance."""
    sampler: Sampler = "auto"
    """Sampler of the previews: the base model's own, Euler, Euler a, DPM++ 2M Karras or UniPC; 'auto' is DPM++ 2M
    Karras, or the base model's own where noise schedules end in pure noise."""
    width_px: int | None = Field(None, ge=64, le=4096, multiple_of=8)
    """Width of the previews; that of the shape that most images are trained in if unset."""
    height_px: int | None = Field(None, ge=64, le=4096, multiple_of=8)
    """Height of the previews; that of the shape that most images are trained in if unset."""
    base: Annotated[str | None, LOCATION] = None
    """Distilled model of the same family (Z-Image-Turbo, FLUX.2 klein) that draws the previews with the LoRA, in few
    steps and without guidance: a folder in diffusers layout, a transformer in one .safetensors file, or a Hub id; the
    base model itself if unset. preview.num_steps and preview.guidance are then not used."""
    base_steps: int | None = Field(None, ge=1, le=1000)
    """Denoising steps with preview.base; its family's own if unset: 8 for Z-Image-Turbo, 4 for FLUX.2 klein."""
    every_steps: int = Field(0, ge=0)
    """Also generate previews within an epoch, after every this many steps and without a verdict; 0 for none."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _read_lines(cls, value: Any) -> Any:
        """Lines with kohya's flags become tables."""
        if not isinstance(value, (list, tuple)):
            return value
        return [split_line(entry) if isinstance(entry, str) else entry for entry in value]

    @field_validator("prompts")
    @classmethod
    def _plain_where_possible(cls, value: list[str | PreviewPrompt]) -> list[str | PreviewPrompt]:
        return [entry.text if isinstance(entry, PreviewPrompt) and not entry.own() else entry for entry in value]
