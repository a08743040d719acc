from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdlora.config.prompt_lines import as_line, split_line
from sdlora.config.schema_preview import PreviewPrompt
from sdlora.config.toml import dump_toml, load_config
from sdlora.errors import ConfigError

KOHYAS = "a cat --n bad, worse --w 833 --h 1216 --d 7 --l 5.5 --s 20"
TABLE = {
    "text": "a cat", "negative_prompt": "bad, worse", "width_px": 832, "height_px": 1216, "seeds": [7],
    "guidance": 5.5, "num_steps": 20,
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (KOHYAS, TABLE),
        ("a --ss k_euler_a --am 0.5 --D 1 --d 2", {
            "text": "a", "sampler": "euler_a", "lora_scale": 0.5, "seeds": [1, 2],
        }),
        ("a --n", {"text": "a", "negative_prompt": ""}),
        ("a cat -- asleep --and-more --ar 16:9", "a cat -- asleep --and-more --ar 16:9"),
        (" plain ", " plain "),
    ],
)  # fmt: skip
def test_lines_are_tables_where_they_have_flags(line: str, expected: Any) -> None:
    assert split_line(line) == expected


@pytest.mark.parametrize("table", [TABLE, {"text": "a", "negative_prompt": ""}, {"text": "a", "lora_scale": -1.0}])
def test_tables_become_the_lines_that_they_are_read_from(table: dict[str, Any]) -> None:
    assert split_line(as_line(table)) == table


def prompts(value: str) -> list[str | PreviewPrompt]:
    return load_config("sdxl-character", ["data.folder=x", f"preview.prompts={value}"]).preview.prompts


def test_strings_lines_and_tables_stand_beside_each_other_and_come_back(tmp_path: Path) -> None:
    given = f'["plain", "{KOHYAS}", {{text = "b", lora_scale = 0.5}}, {{text = "c"}}]'
    plain, line, table, bare = prompts(given)
    assert (plain, bare) == ("plain", "c")
    assert isinstance(line, PreviewPrompt) and line.own() == {k: v for k, v in TABLE.items() if k != "text"}
    assert isinstance(table, PreviewPrompt) and table.own() == {"lora_scale": 0.5}
    config = load_config("sdxl-character", ["data.folder=x", f"preview.prompts={given}"])
    (tmp_path / "config.toml").write_text(dump_toml(config), encoding="utf-8")
    assert load_config(str(tmp_path / "config.toml")).preview == config.preview
    (tmp_path / "tables.toml").write_text(
        '[data]\nfolder = "x"\n[[preview.prompts]]\ntext = "b"\nwidth_px = 832\n[[preview.prompts]]\ntext = "c"\n',
        encoding="utf-8",
    )
    first, second = load_config(str(tmp_path / "tables.toml")).preview.prompts
    assert isinstance(first, PreviewPrompt) and first.width_px == 832 and second == "c"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('["a --w x"]', "preview.prompts: .*--w 'x' of a prompt is not a number"),
        ('["a --w 64 --ar 5 --cn b.png"]', "unknown flags --ar, --cn in 'a --w 64 --ar 5 --cn b.png'"),
        ('["a --w 8"]', r"preview\.prompts\.0\.width_px: found 8"),
        ('["--w 64"]', r"preview\.prompts\.0\.text: found ''"),
        ('["a --ss ddim"]', r"preview\.prompts\.0\.sampler: found 'ddim'"),
        ('[{text = "a", wdth_px = 8}]', r"unknown option\. Did you mean preview\.prompts\.width_px"),
        ('["a", 3]', r"preview\.prompts\.1: found 3"),
    ],
)
def test_what_cannot_be_a_prompt_is_named(value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prompts(value)
