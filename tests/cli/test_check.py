"""`sdlora check` as it is called: exit codes, JSON, what a person reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdlora.cli.check import EXIT_COPYING
from sdlora.cli.main import app
from sdlora.copycheck.signals import Signal
from sdlora.copycheck.verdict import Match, judge
from sdlora.errors import SdloraError
from sdlora.lora.inject import LoraWeights
from sdlora.lora_files.names import kohya_tensors
from sdlora.lora_files.write import add_metadata
from sdlora.run import check_file as check_file_module

KEYS = {
    "verdict",
    "reason",
    "share",
    "share_lower_bound",
    "false_alarm_rate",
    "signals",
    "previews",
    "copied_images",
    "advice",
}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    state = {"lora_unet_x": LoraWeights(torch.ones(2, 4), torch.ones(4, 2), 2.0)}
    save_file(kohya_tensors(state), tmp_path / "mine.safetensors", metadata={"modelspec.trigger_phrase": "zumi"})
    return tmp_path / "mine.safetensors"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Any]:
    """Replaces drawing and comparing; the parameter is the number of copies among eight previews."""
    configs: list[Any] = []

    def check_file(file: Any, config: Any, output: Path) -> Iterator[Any]:
        configs.append(config)
        matches = [
            Match("a [b] prompt", "novel", 0, "x.png", 0.9, 0.8, 0.01, i < request.param, f"previews/{i}.png")
            for i in range(8)
        ]
        output.mkdir(parents=True)
        judge(matches, [Signal("self_retrieval", 0.5, 0.01, "A sign.")]).write(output)
        yield from ()

    monkeypatch.setattr(check_file_module, "check_file", check_file)
    return configs


def call(lora: Path, tmp_path: Path, *more: str) -> Any:
    fixed = ["check", str(lora), "--data", "builtin:zumi", "--base", "pocket", "--output", str(tmp_path / "out")]
    return CliRunner().invoke(app, [*fixed, *more])


@pytest.mark.parametrize(("asked", "code"), [(0, 0), (1, 0), (5, EXIT_COPYING)], indirect=["asked"])
def test_exit_code_says_copying_and_json_has_all_keys(lora: Path, tmp_path: Path, asked: list[Any], code: int) -> None:
    result = call(lora, tmp_path, "--json")
    assert result.exit_code == code
    assert set(json.loads(result.stdout)) == KEYS


@pytest.mark.parametrize("asked", [5], indirect=True)
def test_output_has_verdict_and_evidence(lora: Path, tmp_path: Path, asked: list[Any]) -> None:
    result = call(lora, tmp_path)
    for told in ("copying: 5 of 8 previews", "a [b] prompt", "x.png", "0.90", "! A sign.", "previews"):
        assert told in result.stdout


@pytest.mark.parametrize("asked", [0], indirect=True)
def test_settings_come_from_options_and_the_file(lora: Path, tmp_path: Path, asked: list[Any]) -> None:
    (tmp_path / "prompts.txt").write_text("zumi on a horse\n\n  zumi asleep \n")
    call(lora, tmp_path, "--prompts", str(tmp_path / "prompts.txt"), "--set", "preview.num_steps=3", "--holdout", "h")
    (config,) = asked
    assert config.preview.prompts == ["zumi on a horse", "zumi asleep"]
    assert (config.preview.num_steps, config.data.triggers, config.data.validation_folder) == (3, ["zumi"], "h")
    assert config.data.validation_split is False


@pytest.mark.parametrize("asked", [0], indirect=True)
def test_several_triggers_are_not_used_as_a_trigger(lora: Path, tmp_path: Path, asked: list[Any]) -> None:
    add_metadata(lora, {"modelspec.trigger_phrase": "zumi, mizu"})
    call(lora, tmp_path)
    (config,) = asked
    assert config.data.triggers == []


@pytest.mark.parametrize("asked", [0], indirect=True)
def test_prompts_may_begin_with_a_byte_order_mark(lora: Path, tmp_path: Path, asked: list[Any]) -> None:
    (tmp_path / "prompts.txt").write_bytes("zumi\u2028 on a horse\r\nzumi asleep".encode("utf-8-sig"))
    call(lora, tmp_path, "--prompts", str(tmp_path / "prompts.txt"))
    (config,) = asked
    assert config.preview.prompts == ["zumi\u2028 on a horse", "zumi asleep"]


@pytest.mark.parametrize("asked", [0], indirect=True)
def test_wrong_options_are_refused_before_drawing(lora: Path, tmp_path: Path, asked: list[Any]) -> None:
    def message(*more: str) -> str:
        result = call(lora, tmp_path, *more)
        assert isinstance(result.exception, SdloraError)
        return str(result.exception)

    (tmp_path / "empty.txt").write_text("\n")
    assert "contains no prompt" in message("--prompts", str(tmp_path / "empty.txt"))
    assert "none.txt" in message("--prompts", str(tmp_path / "none.txt"))
    (tmp_path / "wide.txt").write_text("zumi", encoding="utf-16")
    assert "UTF-16" in message("--prompts", str(tmp_path / "wide.txt"))
    assert "preview.steps" in message("--set", "preview.steps=3")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    assert "already exists" in message()
    assert asked == []
