"""The schema: every option with its default, limits and description.

`toml` reads and writes it; command line, studio and documentation show the descriptions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from sdlora.common.families import Family
from sdlora.common.selectors import KINDS, check_selector, is_of_text
from sdlora.config.exposures import spread_exposures
from sdlora.config.schema_data import LOCATION, DataConfig, Section
from sdlora.config.schema_preview import PreviewConfig
from sdlora.config.schema_training import LossConfig, Selector, TimestepsConfig, TrainConfig


def _check_target(value: str) -> str:
    check_selector(value.removeprefix("!"))
    return value


Target = Annotated[str, AfterValidator(_check_target)]
"""A selector of layers, or with a "!" before it one of layers that are left out."""


class MergedLora(Section):
    """One entry of base.merge."""

    file: Annotated[str, LOCATION] = Field(min_length=1)
    """LoRA file of any trainer."""
    weight: float = Field(1.0, ge=-10.0, le=10.0)
    """Strength; 1 is as trained."""

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, value: float) -> float:
        if value == 0.0:
            raise ValueError("a weight of 0 merges nothing; leave the entry out")
        return value


class BaseConfig(Section):
    """The base model that the LoRA is trained on."""

    path: Annotated[str, LOCATION] = "pocket"
    """Base model: 'pocket' (built in), a folder in diffusers layout, a .safetensors checkpoint, or a Hugging Face Hub
    id."""
    components: Annotated[str | None, LOCATION] = None
    """Where a transformer alone in one .safetensors file (Z-Image, FLUX.2 klein) takes text encoder, tokenizer and VAE
    from: a folder in diffusers layout, or a Hugging Face Hub id of its family."""
    text_encoder: Annotated[str | None, LOCATION] = None
    """Text encoder of such a transformer in a .safetensors file of its own, as ComfyUI has them; that of
    base.components if unset."""
    vae: Annotated[str | None, LOCATION] = None
    """VAE to use with any base model: a .safetensors file, a folder in diffusers layout, or a Hugging Face Hub id; the
    base model's own if unset."""
    family: Literal["any", "pocket", Family] = "any"
    """Family that the settings are made for, as presets say: a base model of another one is refused."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; the repository's default branch if unset."""
    variant: str | None = None
    """Variant of the weight files, such as 'fp16'; the files without a variant if unset."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base model predicts; needed only if its files do not say. 'v_prediction' for Stable Diffusion 2.x at 768
    px."""
    clip_skip: int | None = Field(None, ge=1, le=24)
    """Text encoder layer whose output is used, counted from the last (1); the model family's default if unset."""
    quantization: Literal["none", "int8", "fp8", "nf4"] = "none"
    """Quantize the weights of the base model's attention blocks, its largest part, to 8 or 4 bits during training.
    Rounding changes them by about 1 % (int8), 3 % (fp8, the same whatever outliers they have) or 10 % (nf4); previews
    show the quantized model."""
    offload: Literal["none", "blocks"] = "none"
    """Keep the base model's blocks in the computer's own memory and fetch each to the GPU before it computes, which
    saves most of the memory of its weights and makes steps slower; the result is the same."""
    merge: list[MergedLora] = Field([])
    """LoRA files merged into the base model before training, such as [{ file = "style.safetensors", weight = 0.8 }];
    the new LoRA is then made for use together with them."""
    training_adapter: Annotated[str | None, LOCATION] = None
    """LoRA file that undoes the distillation of a distilled base model while training, such as ostris' for
    Z-Image-Turbo; previews are drawn without it, and so is the new LoRA used. For short runs."""

    @field_validator("merge")
    @classmethod
    def _check_duplicates(cls, value: list[MergedLora]) -> list[MergedLora]:
        files = [one.file for one in value]
        if len(set(files)) < len(files):
            raise ValueError("every file may be listed only once; give it the sum of its weights")
        return value


FROM_FILE = (
    "rank",
    "alpha",
    "targets",
    "target_ranks",
    "target_alphas",
    "dora",
    "timestep_rank_min",
    "timestep_rank_alpha",
)
"""The options of an adapter that are taken over from lora.from_file."""


class LoraConfig(Section):
    """The adapter: its size, where it is attached and how it starts."""

    rank: int = Field(8, ge=1, le=256)
    """Capacity of the adapter; above 32 it tends to copy the training images."""
    alpha: float = Field(8.0, gt=0.0, le=1024.0)
    """Strength of the update, which is scaled by alpha / rank."""
    targets: list[Target] = Field(["cross_attention"], min_length=1)
    """Layers that get an adapter: kinds of them, parts (down, mid, up), block numbers such as 4 or 0-7, or patterns of
    paths such as up_blocks.1.* (regular expressions after 're:'); a '!' before one leaves its layers out."""
    target_ranks: dict[Selector, Annotated[int, Field(ge=1, le=256)]] = Field({})
    """Rank of some layers where it differs from lora.rank, by what lora.targets takes, such as { mlp = 4, mid = 8, 0-3
    = 2 }; the last that matches counts."""
    target_alphas: dict[Selector, Annotated[float, Field(gt=0.0, le=1024.0)]] = Field({})
    """Alpha of some layers where it differs from lora.alpha, as for lora.target_ranks."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead of alpha / rank (rank-stabilised LoRA)."""
    dora: bool = False
    """Train the magnitude of each output separately from its direction (DoRA); fewer programs can load the file."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that are set to zero during training."""
    rank_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of a layer's ranks that are left out at each exposure during training."""
    module_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of layers whose update is left out at each exposure during training."""
    init: Literal["gaussian", "orthogonal", "pissa"] = "gaussian"
    """Initial A and B: A random and B zero ('gaussian'), or the singular vectors of a random matrix ('orthogonal') or
    of the layer's weights ('pissa'), with their product subtracted from the weights."""
    timestep_rank_min: int | None = Field(None, ge=1, le=256)
    """Use fewer ranks at noisier timesteps, down to this many at the noisiest (T-LoRA); all ranks everywhere if
    unset."""
    timestep_rank_alpha: float = Field(1.0, gt=0.0, le=10.0)
    """How fast the rank falls with noise under lora.timestep_rank_min; 1 is linear."""
    from_file: Annotated[str | None, LOCATION] = None
    """LoRA file of any trainer that training continues from, with its ranks, alphas and targets; a new LoRA if
    unset."""

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder gets an adapter, too."""
        return any(is_of_text(target) for target in self.targets)

    def ranks(self, *, unet_only: bool = False) -> list[int]:
        """The ranks that layers can have; those of text encoders are left out with `unet_only`."""
        tables = {name: rank for name, rank in self.target_ranks.items() if not (unet_only and is_of_text(name))}
        targets = [t for t in self.targets if not t.startswith("!") and not (unet_only and is_of_text(t))]
        if not targets:
            return []
        if self._is_by_kind:
            by_kind = [self.target_ranks.get(target, self.rank) for target in targets]
            return by_kind + [rank for name, rank in tables.items() if name not in KINDS]
        return [self.rank, *tables.values()]

    @property
    def _is_by_kind(self) -> bool:
        return all(target in KINDS for target in self.targets)

    @property
    def names_layers(self) -> bool:
        """Whether layers are told apart by more than their kind."""
        return not {*self.targets, *self.target_ranks, *self.target_alphas} <= {*KINDS}

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, value: list[Target]) -> list[Target]:
        if len(set(value)) < len(value):
            raise ValueError("every target may be listed only once")
        if all(target.startswith("!") for target in value):
            raise ValueError("all of these leave layers out; name layers to train as well")
        return value

    @model_validator(mode="after")
    def _check_combination(self) -> LoraConfig:
        unused = [
            f"lora.{name}.{target}"
            for name in ("target_ranks", "target_alphas")
            for target in getattr(self, name)
            if target in KINDS and target not in self.targets and self._is_by_kind
        ]
        if unused:
            raise ValueError(f"{', '.join(unused)}: not among lora.targets ({', '.join(self.targets)})")
        if self.timestep_rank_min is None and self.timestep_rank_alpha != 1.0:
            raise ValueError("lora.timestep_rank_alpha has no effect unless lora.timestep_rank_min is set")
        if self.timestep_rank_min is not None:
            lowest = min(self.ranks(unet_only=True), default=None)
            if lowest is None:
                raise ValueError("lora.timestep_rank_min needs a target in the UNet, but lora.targets has none")
            if self.timestep_rank_min >= lowest:
                raise ValueError(
                    f"lora.timestep_rank_min ({self.timestep_rank_min}) must be below the lowest rank of the UNet's "
                    f"layers ({lowest})"
                )
        if self.dora and (self.timestep_rank_min is not None or self.init != "gaussian"):
            raise ValueError("lora.dora requires lora.init = 'gaussian' and no lora.timestep_rank_min")
        if self.dora and self.module_dropout > 0:
            raise ValueError("lora.module_dropout requires lora.dora = false: magnitudes would stay")
        if self.from_file is not None and (self.init != "gaussian" or self.rslora):
            name = "rslora" if self.rslora else "init"
            raise ValueError(f"lora.{name} has no effect with lora.from_file: A, B and alpha are the file's")
        return self

    @model_serializer(mode="wrap")
    def _without_unknown(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What the file decides is left out until it was read, so that a default is never taken for a setting."""
        unknown = set(FROM_FILE) - self.model_fields_set if self.from_file is not None else set()
        return {key: value for key, value in serialize(self).items() if key not in unknown}


class CopyCheckConfig(Section):
    """The copy check: whether previews are copies of training images."""

    enabled: bool = True
    """Compare the previews of every epoch with the training images."""
    stop: bool = False
    """Stop training after the first epoch that copies; all files are kept."""
    sscd: bool = False
    """Also use SSCD, a network trained for copy detection, which is downloaded from the Hub."""
    dinov2: bool = False
    """Choose the epoch by how well the previews show the concept, measured with DINOv2, which is downloaded from the
    Hub."""
    parts: bool = False
    """Also look for parts of training images in the previews, such as a subject in another place, by local features;
    needs OpenCV (pip install 'sdlora[opencv]') and images of at least 256 px."""

    def needing_previews(self) -> list[str]:
        """The options in use that need previews to check."""
        return [f"copycheck.{name}" for name in ("stop", "sscd", "dinov2", "parts") if getattr(self, name)]

    @model_validator(mode="after")
    def _check_enabled(self) -> CopyCheckConfig:
        if not self.enabled and (used := self.needing_previews()):
            raise ValueError(f"{used[0]} has no effect unless copycheck.enabled is true")
        return self


class FileConfig(Section):
    """The LoRA file of a run, and the model card beside it."""

    format: Literal["kohya", "peft"] = "kohya"
    """Naming of the tensors: kohya's, which all programs load, or PEFT's, for diffusers and PEFT."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the stored weights; fp16 and bf16 round them and halve the file size."""
    thumbnail: bool = True
    """Store a small preview in the file; never one of a caption or one that copies."""
    licence: str | None = Field(None, pattern=r"^[a-z0-9.-]+$")
    """Licence in the model card, under its name on the Hub, such as 'cc-by-4.0'."""
    include_captions: bool = False
    """Include captions and folder names in the file and the model card; otherwise they stay private."""


class CacheConfig(Section):
    """The cache of encoded images and captions, which runs share."""

    dir: Annotated[str | None, LOCATION] = None
    """Folder of the cache; the user's cache folder if unset."""
    max_text_gib: float = Field(2.0, ge=0.0, le=1000.0)
    """Disk and memory limit for encoded captions, in GiB. If shuffled tags need more, captions are encoded at every
    exposure instead; the result is the same."""


MAX_NAME_BYTES = 240
"""The longest name of a LoRA; with its suffix, systems take 255 bytes."""


class RunConfig(Section):
    """A whole run."""

    name: str | None = Field(None, pattern=r"^[\w][\w. -]{0,99}$")
    """Name of the LoRA; the name of the configuration file if unset."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random."""
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    timesteps: TimestepsConfig = TimestepsConfig()
    loss: LossConfig = LossConfig()
    preview: PreviewConfig = PreviewConfig()
    copycheck: CopyCheckConfig = CopyCheckConfig()
    file: FileConfig = FileConfig()
    cache: CacheConfig = CacheConfig()

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"files have names of at most {MAX_NAME_BYTES} bytes in UTF-8; use a shorter name")
        return value

    @property
    def lora_files(self) -> list[str]:
        """The LoRA files that a run starts with: those merged into the base model, then the one that is continued."""
        start = [file for file in (self.base.training_adapter, self.lora.from_file) if file is not None]
        return [*(one.file for one in self.base.merge), *start]

    @property
    def preview_base(self) -> str | None:
        """What draws previews in the place of the network that is trained: it has no training adapter merged."""
        if self.preview.base is not None or self.base.training_adapter is None:
            return self.preview.base
        return self.base.path

    @model_validator(mode="before")
    @classmethod
    def _spread_exposures(cls, document: Any) -> Any:
        return spread_exposures(document) if isinstance(document, dict) else document

    @model_validator(mode="after")
    def _check_combination(self) -> RunConfig:
        targets_are_known = self.lora.from_file is None or "targets" in self.lora.model_fields_set
        text_is_trained = self.lora.trains_text or not targets_are_known
        if self.train.text_encoder_learning_rate is not None and not text_is_trained:
            raise ValueError("train.text_encoder_learning_rate requires 'text_encoder' in lora.targets")
        if self.train.text_encoder_epochs is not None and not text_is_trained:
            raise ValueError("train.text_encoder_epochs requires 'text_encoder' in lora.targets")
        if not self.preview.enabled and (used := self.copycheck.needing_previews()):
            raise ValueError(f"{used[0]} requires preview.enabled = true: the copy check compares previews")
        if self.preview.base_steps is not None and self.preview_base is None:
            raise ValueError("preview.base_steps has no effect without preview.base")
        if self.loss.mask_floor != 0.1 and self.data.masks == "none":
            raise ValueError("loss.mask_floor has no effect unless data.masks is 'alpha' or 'file'")
        dropouts = ("dropout", "rank_dropout", "module_dropout")
        if self.train.compile and (used := [name for name in dropouts if getattr(self.lora, name) > 0]):
            raise ValueError(f"train.compile requires lora.{used[0]} = 0, since dropout draws a new mask at every step")
        if self.train.max_weight_norm > 0 and self.lora.init != "gaussian":
            raise ValueError("train.max_weight_norm requires lora.init = 'gaussian'")
        if self.train.compile and self.base.quantization != "none":
            raise ValueError(
                "train.compile requires base.quantization = 'none', since compiled blocks would keep the weights "
                "unpacked in memory"
            )
        if self.train.compile and self.base.offload != "none":
            raise ValueError("train.compile requires base.offload = 'none', since compiled blocks must stay in place")
        return self

    @model_validator(mode="after")
    def _check_preservation(self) -> RunConfig:
        data, weight = self.data, self.train.preservation_weight
        given = [name for name in ("class_words", "preservation_folder") if getattr(data, name)]
        if weight > 0 and len(given) != 1:
            raise ValueError(
                "train.preservation_weight requires either data.class_words (no further images needed) or "
                "data.preservation_folder (your own regularisation images)"
            )
        if given and weight == 0:
            raise ValueError(f"data.{given[0]} has no effect unless train.preservation_weight is above 0")
        if data.class_words and not all(one.trigger for one in data.sets):
            raise ValueError(
                "data.class_words replace the trigger word, so every set needs one: set data.trigger, or a trigger in "
                "every entry of data.sets"
            )
        if self.train.preservation_every > 1 and not data.class_words:
            raise ValueError("train.preservation_every has no effect without data.class_words")
        if data.preservation_caption and not data.preservation_folder:
            raise ValueError("data.preservation_caption requires data.preservation_folder")
        return self
