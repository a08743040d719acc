"""A fuzzer that is led by the branches it reaches, for every reader of what strangers send.

    pip install atheris
    python tests/helpers/fuzzing.py captions|configuration|lora|zip [-runs=N] [a folder of inputs to begin with]

What a reader does not read it refuses by an `SdloraError`; anything else that is raised ends the fuzzer, which keeps
the input. Everything after the reader's name goes to libFuzzer.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sdlora"]):
    from sdlora.config.toml import load_config
    from sdlora.data.captions import read_captions
    from sdlora.errors import SdloraError
    from sdlora.lora_files.read import read_file
    from sdlora.ui.state.uploads import store_upload


def captions(folder: Path, content: bytes) -> None:
    """A list of captions, and two beside their images."""
    for name in ("metadata.jsonl", "a.txt", "b.json"):
        (folder / name).write_bytes(content)
    read_captions(folder, ["a.png", "b.png"])


def configuration(folder: Path, content: bytes) -> None:
    """A TOML file."""
    (folder / "x.toml").write_bytes(content)
    load_config(str(folder / "x.toml"), [])


def lora(folder: Path, content: bytes) -> None:
    """A LoRA file."""
    (folder / "x.safetensors").write_bytes(content)
    read_file(folder / "x.safetensors")


def upload(folder: Path, content: bytes) -> None:
    """An archive of images and captions; what it writes lies in the set's folder."""
    (folder / "x.zip").write_bytes(content)
    try:
        store_upload([("x.zip", folder / "x.zip")], folder / "set")
    finally:
        beside = {path.name for path in folder.iterdir()} - {"x.zip", "set"}
        if beside:
            raise AssertionError(f"written outside of the set: {sorted(beside)}")


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "captions": captions,
    "configuration": configuration,
    "lora": lora,
    "zip": upload,
}


def main() -> None:
    name, *options = sys.argv[1:]
    reader = READERS[name]
    folder = Path(tempfile.mkdtemp())

    def try_once(content: bytes) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            reader(folder, content)
        except SdloraError as error:
            if not str(error):
                raise AssertionError("refused without a word") from error

    atheris.Setup([sys.argv[0], *options], try_once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
