"""`sdlora import`: what is printed, what is written, and when nothing is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.command import call
from helpers.imports import FIXTURES, workplace

from sdlora.config.toml import load_config


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [path.name for path in sorted(FIXTURES.iterdir())])
def test_what_is_written_is_a_configuration(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = call(capsys, "import", str(FIXTURES / name))
    written = f"{Path(name).stem}.toml"
    assert (code, err) == (0, "")
    assert f"Wrote {written}" in out
    assert load_config(written).data.folders
    assert name in Path(written).read_text(encoding="utf-8").splitlines()[0]


def test_every_setting_is_printed_under_what_became_of_it(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    shutil.copy(FIXTURES / "kohya_ss.json", folder)
    settings = json.loads(Path("kohya_ss.json").read_text(encoding="utf-8"))
    Path("kohya_ss.json").write_text(json.dumps(settings | {"optimizer": "DAdaptAdam", "lr_sheduler": "cosine"}))
    code, out, err = call(capsys, "import", "kohya_ss.json")
    assert code == 2
    translated, dropped, refused, unknown = (
        out.index(word) for word in ("Translated (", "Dropped (", "Refused", "Unknown")
    )
    assert translated < out.index("network_dim = 32 -> lora.rank = 32") < dropped
    assert dropped < out.index("save_model_as = safetensors") < refused
    assert refused < out.index("optimizer = DAdaptAdam: sdlora has no DAdaptAdam") < unknown
    assert unknown < out.index(
        "lr_sheduler = cosine: not a key of kohya_ss that sdlora knows; did you mean lr_scheduler?"
    )
    assert "optimizer, optimizer_args.betas, lr_sheduler" in err and "--partial" in err
    assert not list(folder.glob("*.toml"))


def test_a_partial_file_says_what_is_left(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    Path("run.toml").write_text("network_dim = 8\nlr_scheduler = 'wsd'\nhub_token = 'x'\ntrain_data_dir = 'photos'\n")
    code, out, _ = call(capsys, "import", "run.toml", "--partial", "--output", "mine.toml")
    assert code == 0
    text = Path("mine.toml").read_text(encoding="utf-8")
    assert "#   lr_scheduler = wsd: " in text
    assert "#   hub_token = (not shown): " in text and "hub_token = x" not in out
    assert load_config("mine.toml").lora.rank == 8


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    shutil.copy(FIXTURES / "sd_scripts.toml", folder / "run.toml")
    before = Path("run.toml").read_bytes()
    code, out, _ = call(capsys, "import", "run.toml")
    assert code == 0 and "Wrote run-sdlora.toml" in out
    for arguments in (["run.toml"], ["run.toml", "--output", "run.toml"]):
        code, _, err = call(capsys, "import", *arguments)
        assert code == 2 and "exists already" in err
    assert Path("run.toml").read_bytes() == before


def test_outcomes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "import", str(FIXTURES / "onetrainer.json"), "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["form"], report["output"]) == ("OneTrainer", "onetrainer.toml")
    by_key = {entry["key"]: entry for entry in report["settings"]}
    assert by_key["lora_rank"] == {
        "key": "lora_rank",
        "value": "32",
        "given": True,
        "status": "translated",
        "options": {"lora.rank": 32},
        "reason": "",
    }
    assert "hf_secret" not in out
    assert {entry["status"] for entry in report["settings"]} == {"translated", "dropped"}


@pytest.mark.parametrize("name", [path.name for path in sorted(FIXTURES.iterdir())])
def test_secrets_are_neither_shown_nor_written(capsys: pytest.CaptureFixture[str], folder: Path, name: str) -> None:
    text = (FIXTURES / name).read_text(encoding="utf-8").replace("hf_secret", "S3CRET").replace("key_secret", "S3CRET")
    (folder / "settings").write_text(text, encoding="utf-8")
    code, out, err = call(capsys, "import", "settings")
    assert code == 0
    assert "S3CRET" not in out + err + Path("settings.toml").read_text(encoding="utf-8")


def test_files_that_are_no_configuration_have_a_message(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    Path("ours.toml").write_text("[data]\nfolder = 'photos'\n")
    Path("text.txt").write_text("just words\n")
    Path("other.yaml").write_text("a: 1\n")
    Path("bytes.json").write_bytes(b"\xff\xfe\x00")
    Path("flux.sh").write_text("accelerate launch train_dreambooth_lora_flux.py --rank 4\n")
    for name, expected in (
        ("missing.json", "cannot be read"),
        ("ours.toml", "already a configuration of sdlora"),
        ("text.txt", "neither a configuration"),
        ("other.yaml", "not a configuration that sdlora can translate"),
        ("bytes.json", "not valid UTF-8"),
        ("flux.sh", "train_dreambooth_lora_flux.py"),
    ):
        code, _, err = call(capsys, "import", name)
        assert (code, expected in err) == (2, True), err
