"""Settings as the arguments of the rooms below."""

from __future__ import annotations

from sdlora.config.schema import LoraConfig, RunConfig
from sdlora.config.toml import parse_config
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.run.arguments import Arguments


def test_timestep_rank_is_none_unless_a_minimum_is_set() -> None:
    assert Arguments(RunConfig()).timestep_rank is None
    lora = LoraConfig(timestep_rank_min=2, timestep_rank_alpha=2.0)
    assert Arguments(RunConfig(lora=lora)).timestep_rank == TimestepRank(2, 2.0)


def test_text_encoder_rate_becomes_a_factor_of_the_learning_rate() -> None:
    assert Arguments(RunConfig()).optimizer.text_encoder_factor == 1.0
    document = {
        "data": {"folder": "x"},
        "lora": {"targets": ["text_encoder"]},
        "train": {"learning_rate": 4e-4, "text_encoder_learning_rate": 1e-4},
    }
    assert Arguments(parse_config(document, name="x")).optimizer.text_encoder_factor == 0.25
