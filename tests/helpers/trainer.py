"""A trainer on a tiny base."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from sdlora.cache.tensors import Cache
from sdlora.common.bundled import BucketOptions, ImageFolder
from sdlora.config.toml import parse_config
from sdlora.data.dataset import load_dataset
from sdlora.data.images import MaskKind
from sdlora.lora.inject import AdapterSpec, find_targets, inject
from sdlora.models.load import load_base
from sdlora.run.arguments import training_settings
from sdlora.training.data import TrainingData
from sdlora.training.trainer import Trainer


def make_trainer(
    base_folder: Path,
    images: Path,
    cache: Path,
    dtype: torch.dtype = torch.float32,
    *,
    targets: tuple[str, ...] = ("cross_attention",),
    spec: AdapterSpec | None = None,
    loss: dict[str, object] | None = None,
    timesteps: dict[str, object] | None = None,
    **train: object,
) -> Trainer:
    masks: MaskKind = "file" if loss and "mask_floor" in loss else "none"
    preserving = {"trigger": "picture", "class_words": ["cat"]} if train.get("preservation_weight") else {}
    config = parse_config(
        {
            "data": {"folder": "x", "repeats": 2, "masks": masks, **preserving},
            "train": {"epochs": 1, "batch_size": 2, **train},
            "lora": {"rank": 2, "targets": list(targets)},
            "loss": loss or {},
            "timesteps": timesteps or {},
        },
        name="n",
    )
    base = load_base(str(base_folder), device=torch.device("cpu"), dtype=dtype)
    paths = find_targets(base.network, targets, base.text_encoders)
    adapter = inject(base.network, paths, 2, 2.0, 0, spec=spec, text_encoders=base.text_encoders)
    dataset = load_dataset(ImageFolder(str(images), repeats=2), masks=masks)
    dataset = dataset.with_buckets(32, BucketOptions(8, buckets=False))
    data = TrainingData(
        dataset,
        Cache(cache, base),
        lambda index, _: dataset.examples[index].caption,
        (lambda *_: "a cat") if preserving else None,
        text_is_trained="text_encoder" in targets,
    )
    trainer = Trainer(training_settings(config), adapter, data, Accelerator(cpu=True))
    list(data.fill("white", trainer.schedule.timesteps))
    return trainer
