"""The LoRA files that a run starts with: the one that training continues from, and those merged into its base model.

Read by the run before its folder is made, by estimates and by everything else that needs the settings of such a run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from sdlora.common.files import sha256
from sdlora.config.schema import FROM_FILE, LoraConfig, RunConfig
from sdlora.config.toml import toml_value
from sdlora.errors import ConfigError, DataError
from sdlora.lora.inject import TARGETS
from sdlora.lora.timestep_rank import timestep_rank_in
from sdlora.lora_files.merge import merge_loras
from sdlora.lora_files.names import kohya_target
from sdlora.lora_files.pipelines import with_initial
from sdlora.lora_files.read import LoraFile, parse_lora, read_tensors, without_alpha
from sdlora.models.architectures import read_header

CONTINUED, MERGED = "sdlora.continued_from", "sdlora.merged_into_base"
TRAINING_ADAPTER = "sdlora.training_adapter"
"""Metadata keys of the files that a LoRA continues, and that its base model had merged, for good or while training."""


def starting_file(config: RunConfig) -> LoraFile | None:
    """The content of lora.from_file, or None if it is unset.

    Raises:
        DataError: It cannot be read, or is not a LoRA of known strength.
    """
    return None if config.lora.from_file is None else _read(config.lora.from_file, "lora.from_file")


def with_settings_of_file(config: RunConfig) -> RunConfig:
    """The configuration with ranks, alphas, targets and kind of lora.from_file; the same if it is unset.

    Raises:
        ConfigError: A setting that was given is not the file's; all are named with both values.
        DataError: The file cannot be read, or has layers that are no target.
    """
    file = starting_file(config)
    if file is None:
        return config
    assert config.lora.from_file is not None
    content = sha256(Path(config.lora.from_file).expanduser())
    if any(sha256(Path(one.file).expanduser()) == content for one in config.base.merge):
        raise ConfigError(
            f"lora.from_file and base.merge both name {file.name}, which would count twice. To continue it, leave it "
            "out of base.merge; to train a new LoRA on top of it, leave lora.from_file unset."
        )
    own = _settings(file)
    different = [
        f"  lora.{name} = {_shown(own[name])} (given: {_shown(getattr(config.lora, name))})"
        for name in FROM_FILE
        if name in config.lora.model_fields_set and _plain(getattr(config.lora, name)) != _plain(own[name])
    ]
    if different:
        raise ConfigError(
            f"{file.name} has other settings than lora.from_file is given with, and a LoRA continues as it is. Leave "
            "them out, or set what the file has:\n" + "\n".join(different)
        )
    try:
        lora = LoraConfig.model_validate({**config.lora.model_dump(), **own})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"lora.from_file: {file.name} cannot be trained: {faults}.") from error
    if config.train.text_encoder_learning_rate is not None and not lora.trains_text:
        raise ConfigError(
            f"train.text_encoder_learning_rate has no effect: {file.name} has no layers of the text encoder."
        )
    return config.model_copy(update={"lora": lora})


def merging(
    config: RunConfig, *, for_previews: bool = False
) -> Callable[[Mapping[str, nn.Module], Collection[str]], None] | None:
    """A function that merges the LoRAs of base.merge, see `merge_loras`, or None if there are none.

    The training adapter is merged as well, but not `for_previews`.

    Raises:
        DataError: A file cannot be read, or is not a LoRA of known strength.
    """
    files = [(_read(one.file, "base.merge"), one.weight) for one in config.base.merge]
    if config.base.training_adapter is not None and not for_previews:
        files.append((_read(config.base.training_adapter, "base.training_adapter"), 1.0))
    return partial(merge_loras, files) if files else None


def content_hashes(config: RunConfig) -> dict[str, str]:
    """SHA-256 of every LoRA file that a run starts with, by option and name; empty for most runs."""
    named = [("base.merge", one.file) for one in config.base.merge]
    others = {"lora.from_file": config.lora.from_file, "base.training_adapter": config.base.training_adapter}
    named += [(option, file) for option, file in others.items() if file is not None]
    found = {}
    for option, file in named:
        path = Path(file).expanduser()
        found[f"{option} {file}"] = sha256(path) if path.is_file() else "missing"
    return found


def origins(config: RunConfig, hashes: Mapping[str, str]) -> dict[str, str]:
    """What a file's metadata says of the LoRA files that its run started with; names without folders.

    Args:
        hashes: As `content_hashes` returns them.
    """
    entries = {}
    if (start := config.lora.from_file) is not None:
        base = read_header(Path(start).expanduser()).metadata.get("ss_sd_model_name")
        source = {"file": Path(start).name, "sha256": hashes[f"lora.from_file {start}"]}
        entries[CONTINUED] = json.dumps(source if base is None else source | {"base": base})
    if config.base.merge:
        entries[MERGED] = json.dumps(
            [
                {"file": Path(one.file).name, "weight": one.weight, "sha256": hashes[f"base.merge {one.file}"]}
                for one in config.base.merge
            ]
        )
    if (adapter := config.base.training_adapter) is not None:
        found = {"file": Path(adapter).name, "sha256": hashes[f"base.training_adapter {adapter}"]}
        entries[TRAINING_ADAPTER] = json.dumps(found)
    return entries


def _read(file: str, option: str) -> LoraFile:
    path = Path(file).expanduser()
    try:
        found = parse_lora(*read_tensors(path), name=path.name)
    except DataError as error:
        raise DataError(f"{option}: {error}") from error
    if unknown := without_alpha(found):
        raise DataError(
            f"{option}: {len(unknown)} modules of {path.name} have no alpha, the first is {unknown[0]!r}, so the "
            "LoRA's strength is unknown. Ask whoever trained it, then write a file that has it: sdlora convert "
            f"{path.name} --missing-alpha rank (what diffusers assumes) or --missing-alpha NUMBER."
        )
    return found


def _settings(file: LoraFile) -> dict[str, Any]:
    """The options that describe a file's adapter, each of `FROM_FILE`."""
    targets = {name: kohya_target(name) for name in file.state}
    if unknown := [name for name, target in targets.items() if target is None]:
        raise DataError(
            f"lora.from_file: {file.name} has {len(unknown)} modules that sdlora does not train, the first is "
            f"{unknown[0]!r}. It trains {', '.join(TARGETS)}; to keep this LoRA's effect, merge it with base.merge "
            "and train a new one."
        )
    frozen = "sdlora.frozen_start" in file.metadata
    state = {name: with_initial(file.name, name, w) if frozen else w for name, w in file.state.items()}
    if odd := [name for name, weights in state.items() if not weights.alpha > 0]:
        raise DataError(
            f"lora.from_file: {odd[0]!r} of {file.name} has the alpha {state[odd[0]].alpha:g}, which must be above 0."
        )
    ranks: dict[str, Counter[int]] = {}
    alphas: dict[str, Counter[float]] = {}
    for name, weights in state.items():
        ranks.setdefault(targets[name] or "", Counter())[weights.down.shape[0]] += 1
        alphas.setdefault(targets[name] or "", Counter())[weights.alpha] += 1
    rank, target_ranks = _most_common(ranks)
    alpha, target_alphas = _most_common(alphas)
    setting = timestep_rank_in(file.metadata, file.name)
    return {
        "rank": rank,
        "alpha": alpha,
        "targets": [target for target in TARGETS if target in ranks],
        "target_ranks": target_ranks,
        "target_alphas": target_alphas,
        "dora": any(weights.magnitude is not None for weights in state.values()),
        "timestep_rank_min": None if setting is None else setting.rank_min,
        "timestep_rank_alpha": 1.0 if setting is None else setting.alpha,
    }


def _most_common(counts: Mapping[str, Counter[Any]]) -> tuple[Any, dict[str, Any]]:
    """The most common value of all, and that of each target where it differs."""
    total: Counter[Any] = sum(counts.values(), Counter())
    most = total.most_common(1)[0][0]
    own = {target: counts[target].most_common(1)[0][0] for target in TARGETS if target in counts}
    return most, {target: value for target, value in own.items() if value != most}


def _plain(value: Any) -> Any:
    """A value without the order of its parts."""
    return sorted(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return "unset" if value is None else toml_value(value)
