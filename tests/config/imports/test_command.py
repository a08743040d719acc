"""Command lines: how they are written, and for which scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.imports import option

from sdlora.config.imports.detect import import_file
from sdlora.config.imports.rules import Imported
from sdlora.errors import ConfigError


def run(folder: Path, content: str) -> Imported:
    (folder / "run.sh").write_text(content, encoding="utf-8")
    return import_file(folder / "run.sh")


@pytest.mark.parametrize("end", ["\\\n", "\\\r\n", "^\n", "`\n", "\\  \n", " "])
def test_lines_may_be_continued(folder: Path, end: str) -> None:
    found = run(
        folder, f"python train_text_to_image_lora.py {end}  --train_data_dir=photos {end} --rank=8 {end} --seed 3\n"
    )
    assert (option(found, "lora.rank"), option(found, "seed"), option(found, "data.folder")) == (8, 3, "photos")
    assert not found.open_keys


def test_variables_comments_and_quotes_are_read_as_a_shell_does(folder: Path) -> None:
    found = run(
        folder,
        "#!/bin/bash\n# --rank 99 train.py\nexport MODEL='a b/c'\nDIR=photos\n"
        'accelerate launch train_dreambooth_lora.py --pretrained_model_name_or_path="${MODEL}" '
        "--instance_data_dir=$DIR --instance_prompt='a cat, $DIR'\n",
    )
    assert option(found, "base.path") == "a b/c"
    assert (option(found, "data.folder"), option(found, "data.caption")) == ("photos", "a cat, photos")


def test_sd_scripts_command_lines_are_read(folder: Path) -> None:
    found = run(
        folder,
        "accelerate launch sdxl_train_network.py --train_data_dir photos --max_train_epochs 10 --network_dim 16 "
        "--clip_skip 2 --network_args conv_dim=4 conv_alpha=2 --optimizer_args weight_decay=0.1 --cache_latents\n",
    )
    assert not found.open_keys
    assert (option(found, "lora.rank"), option(found, "lora.target_ranks")) == (16, {"conv": 4})
    assert (option(found, "train.weight_decay"), option(found, "train.epochs")) == (0.1, 5)
    assert option(found, "base.clip_skip") is None, "SDXL's scripts do not use it"


def test_other_scripts_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"flux_train_network\.py"):
        run(folder, "accelerate launch flux_train_network.py --network_dim 4\n")


def test_a_quote_that_never_ends_has_a_message(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        run(folder, 'python train_dreambooth_lora.py --instance_prompt "a cat\n')
