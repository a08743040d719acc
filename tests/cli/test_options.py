"""How commands print."""

from __future__ import annotations

import io
import json
import sys

import pytest

from sdlora.cli import main
from sdlora.cli.options import print_message, terminal
from sdlora.cli.progress import JsonLines, ProgressBar
from sdlora.events import Notice

PATH = "D:dragon:pics/[red]/:cat:.png"


def test_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_message(PATH)
    terminal(stdout=True).print(PATH)
    with ProgressBar(terminal()) as view:
        view.show(Notice(PATH))
    out, err = capsys.readouterr()
    assert out == f"{PATH}\n" and err.count(PATH) == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_text_is_printed_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["sdlora", "train", "猫é\udcff.toml"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2
    with JsonLines(sys.stdout) as view:
        view.show(Notice("猫é"))
    written = {name: stream.buffer.getvalue() for name, stream in streams.items()}  # type: ignore[attr-defined]
    assert b"\\u732b" in written["stderr"] and b"Internal" not in written["stderr"]
    assert json.loads(written["stdout"])["message"] == "猫é"
