"""What a wheel contains, and that an installed wheel trains from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, because setuptools leaves its own folders beside the sources.
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    yield built


def test_wheel_contains_all_data_and_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"sdlora", f"sdlora-{_version()}.dist-info"}
    for needed in (
        "sdlora/configs/quickstart.toml", "sdlora/datasets/zumi/zumi_00.png", "sdlora/datasets/zumi/zumi_00.txt",
        "sdlora/datasets/zumi/holdout/zumi_24.png", "sdlora/datasets/blueprint/LICENSE.md", "sdlora/ui/__init__.py",
        "sdlora/ui/pages/studio.css", "sdlora/ui/pages/studio.js", "sdlora/report/templates/report.html",
        "sdlora/report/templates/page.css", "sdlora/ui/html/templates/message.html", "sdlora/report/templates/page.js",
        "sdlora/py.typed", "sdlora/pocket/weights/model_index.json",
        "sdlora/pocket/weights/unet/diffusion_pytorch_model.safetensors", "sdlora/pocket/weights/tokenizer/vocab.json",
    ):  # fmt: skip
        assert needed in names, needed


def _version() -> str:
    from sdlora import __version__

    return __version__


@pytest.mark.slow
def test_installed_wheel_trains_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python, sdlora = venv / "bin" / "python", venv / "bin" / "sdlora"
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True, cwd=empty)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    changes = ["train.epochs=1", "data.repeats=1", "preview.num_steps=2", f"cache.dir={tmp_path / 'cache'}"]
    settings = [part for change in changes for part in ("--set", change)]
    result = subprocess.run(
        [sdlora, "train", "quickstart", *settings], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (empty / "runs" / "quickstart" / "quickstart.safetensors").stat().st_size > 0
    script = "import importlib.util as u; print([n for n in ('ui', 'configs', 'datasets', 'tests') if u.find_spec(n)])"
    listed = subprocess.run(
        [python, "-c", script],
        cwd=empty, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout.strip() == "[]"


def test_repository_has_only_these_top_level_names() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in files}
    assert top <= {
        "sdlora", "ui", "configs", "datasets", "tests", "docs", "pyproject.toml", "README.md", "LICENSE", "SECURITY.md",
        ".ci",
        ".gitignore", ".gitattributes",
    }  # fmt: skip


def test_built_in_base_model_is_below_25_mb() -> None:
    weights = ROOT / "sdlora" / "pocket" / "weights"
    assert 0 < sum(path.stat().st_size for path in weights.rglob("*") if path.is_file()) <= 25_000_000
