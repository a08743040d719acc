"""Configurations as files."""

import time
import tomllib
from pathlib import Path

import pytest

from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, load_config, options, parse_config, read_config
from sdlora.errors import ConfigError


def test_overrides_are_toml_or_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[data]\nfolder = 'a'\n")
    config = load_config(
        str(file), ["data.folder=/some/where", "lora.rank=4", 'lora.targets=["mlp"]', "preview.enabled=false"]
    )
    assert (config.data.sets[0].folder, config.lora.rank, config.lora.targets) == ("/some/where", 4, ["mlp"])
    assert config.preview.enabled is False
    assert config.name == "mine"
    for wrong in ("lora.rank", "=3", "seed.x=1"):
        with pytest.raises(ConfigError):
            load_config(str(file), ["seed=1", wrong])


def test_a_missing_or_broken_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        load_config("quickstrat")
    broken = tmp_path / "broken.toml"
    broken.write_text("[data\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(str(broken))
    broken.write_text("seed = 3", encoding="utf-16")
    with pytest.raises(ConfigError, match="UTF-16"):
        load_config(str(broken))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("small (1).toml", "small 1"), ("zumi+cat.toml", "zumi cat"), ("[v2].toml", "v2"), ("猫.toml", "猫"),
        ("---.toml", "lora"), (f"{'x' * 200}.toml", "x" * 100), (f"{'猫' * 80}.toml", "猫" * 80),
        ("my-run_1.5-.toml", "my-run_1.5-"),
    ],
)  # fmt: skip
def test_any_name_of_a_file_becomes_a_name_of_a_run(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).write_text("data.folder = 'a'")
    assert load_config(str(tmp_path / file)).name == name


def test_a_name_longer_than_files_names_is_refused() -> None:
    assert parse_config({"name": "猫" * 80, "data": {"folder": "x"}}, name="n").name == "猫" * 80
    with pytest.raises(ConfigError, match=r"name: .*240 bytes"):
        parse_config({"name": "猫" * 81, "data": {"folder": "x"}}, name="n")


def test_a_byte_order_mark_is_no_part_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbfseed = 3\r\n[data]\r\nfolder = 'a'\r\n")
    assert load_config(str(tmp_path / "mine.toml")).seed == 3


def test_what_is_written_reads_back_as_the_same() -> None:
    awkward = 'a "quoted" \\ line\nwith é \x7f and \t tab'
    config = parse_config(
        {
            "data": {"sets": [{"folder": "x", "caption": awkward}, {"folder": "y", "repeats": 2}]},
            "preview": {"prompts": [awkward, ""]},
            "train": {"learning_rate": 1e-3},
            "lora": {"targets": ["mlp"], "target_ranks": {"mlp": 3}},
        },
        name="run 1",
    )
    document = tomllib.loads(dump_toml(config))
    assert parse_config(document, name="other") == config
    assert "# validation_folder =" in dump_toml(config)


def test_shipped_configurations_are_valid_and_hold_only_what_differs() -> None:
    for path in (Path(__file__).parents[2] / "configs").glob("*.toml"):
        config = load_config(path.stem, [] if path.stem == "quickstart" else ["data.folder=images"])
        assert config.name == path.stem
        document = tomllib.loads(path.read_text())
        parent = document.pop("extends", None)
        without = dict(options(load_config(parent, ["data.folder=images"]) if parent else RunConfig()))
        for section, values in document.items():
            for key, value in values.items():
                assert without[f"{section}.{key}"] != value, f"{path.name}: {section}.{key} is as without it"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"seed = " + b"9" * 5000, "not valid TOML"),
        (b"a = " + b"[" * 100_000, "not valid TOML"),
        (b"a." * 20_000 + b"a = 1", "more than 100 parts"),
        (b"'a' . " * 20_000 + b"a = 1", "more than 100 parts"),
        (b"# " + b"x" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_hostile_file_is_refused_at_once(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "odd.toml").write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=reason):
        read_config(str(tmp_path / "odd.toml"))
    assert time.monotonic() - begin < 5


def test_path_that_is_too_long_is_refused() -> None:
    for source in ("x" * 300 + ".toml", "x/" * 3000):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config(source)


def test_override_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed"):
        parse_config({"data": {"folder": "x"}}, name="n", overrides=["seed=" + "9" * 5000])
