"""What a wheel contains, and that an installed wheel trains from an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def _required(extra: str | None = None) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return [Requirement(line) for line in listed]


def test_every_import_is_a_dependency_with_an_upper_bound() -> None:
    bounds = {canonicalize_name(one.name): str(one.specifier) for one in _required()}
    assert [name for name, bound in bounds.items() if "<" not in bound] == ["fsspec"]
    sources = [path.read_text(encoding="utf-8") for top in ("sdlora", "ui") for path in (ROOT / top).rglob("*.py")]
    imported = {name for text in sources for name in re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)}
    homes = packages_distributions()
    needed = {canonicalize_name(homes[name][0]) for name in imported - set(sys.stdlib_module_names) if name in homes}
    assert needed - bounds.keys() - {"sdlora"} == set()


@pytest.mark.parametrize(("file", "extras"), [("locked.txt", [None]), ("locked-dev.txt", [None, "dev"])])
def test_lock_has_an_allowed_version_with_hashes_of_every_dependency(file: str, extras: list[str | None]) -> None:
    lock = (ROOT / ".ci" / file).read_text(encoding="utf-8")
    assert "://" not in lock and "nvidia" not in lock
    entries = [entry.split(" \\\n    --hash=") for entry in re.split(r"\n(?=\S)", lock.strip())]
    assert all(len(entry) > 1 and all(part.startswith("sha256:") for part in entry[1:]) for entry in entries)
    pinned = [Requirement(entry[0]) for entry in entries]
    versions = {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in pinned
        if one.marker is None or one.marker.evaluate()
    }
    assert "torch" not in versions, "each GPU has a build of its own"
    for wanted in [one for extra in extras for one in _required(extra)]:
        if wanted.name not in ("torch", "sdlora") and (wanted.marker is None or wanted.marker.evaluate()):
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), wanted
