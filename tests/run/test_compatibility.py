from typing import Any

from sdlora.config.schema import LoraConfig, RunConfig
from sdlora.config.schema_training import LossConfig
from sdlora.run.compatibility import limits_elsewhere


def limits(proof: dict[str, Any] | None = None, **sections: Any) -> list[str]:
    return limits_elsewhere(RunConfig(**sections), proof or {})


def test_plain_file_has_no_limits() -> None:
    assert limits() == []


def test_ignored_timestep_rank_is_reported_with_the_measured_figure() -> None:
    lora = LoraConfig(timestep_rank_min=2, timestep_rank_alpha=2.0)
    (sentence,) = limits({"rank_mask_difference": 0.1234}, lora=lora)
    assert "12%" in sentence and "apply_timestep_rank" in sentence


def test_dora_and_zero_terminal_snr_are_reported() -> None:
    (sentence,) = limits(lora=LoraConfig(dora=True))
    assert "DoRA" in sentence
    (sentence,) = limits(loss=LossConfig(zero_terminal_snr=True))
    assert "rescale_betas_zero_snr=True" in sentence
