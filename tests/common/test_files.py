import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sdlora.common import files
from sdlora.common.files import read_text
from sdlora.errors import DiskFullError, OutputError


def test_texts_are_read_with_or_without_a_byte_order_mark_and_lines_end_in_line_feeds(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    text = "one\u2028 two\x85\r\nthree\n"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        assert read_text(file).split("\n") == ["one\u2028 two\x85", "three", ""]
    for content in (text.encode("utf-16"), "a cat".encode("utf-16-le"), "café".encode("latin-1")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"not valid UTF-8.*Save it as UTF-8"):
            read_text(file)


def test_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    files.write_json(target, {"step": 1})
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == '{\n  "step": 1\n}\n'
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_or_quota_raises_disk_full_error(tmp_path: Path, number: int) -> None:
    target = tmp_path / "lora.safetensors"
    target.write_text("old")
    with pytest.raises(DiskFullError, match=r"lora\.safetensors") as caught, files.atomic_path(target):
        raise OSError(number, "full")
    assert caught.value.exit_code == 6
    assert target.read_text() == "old"
    with pytest.raises(OSError, match="else") as other, files.atomic_path(target):
        raise OSError(errno.EIO, "something else")
    assert not isinstance(other.value, DiskFullError)


def test_file_is_on_the_disk_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, calls = tmp_path / "state.json", list[str]()
    replace = Path.replace

    def named(handle: int) -> str:
        return str(Path(f"/proc/self/fd/{handle}").readlink())

    def renamed(self: Path, other: Path) -> Path:
        calls.append(f"rename to {other}")
        return replace(self, other)

    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(f"sync {named(handle)}"))
    monkeypatch.setattr(Path, "replace", renamed)
    with files.atomic_path(target) as temporary:
        temporary.write_text("x")
    assert calls == [f"sync {temporary}", f"rename to {target}", f"sync {tmp_path}"]


def test_partial_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "a" / "x.png") as mine:
        mine.write_text("whole")
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mark, _, thread = mine.name.rpartition(f"-{os.getpid()}-")
    leftover = tmp_path / "a" / f"{mark}-{ended.stdout.strip()}-{thread}"
    leftover.write_text("half")
    # By a process that had this one's number before.
    folder = tmp_path / f".merged{mark.removeprefix('.x.png')}-{os.getpid()}-1"
    folder.mkdir()
    (folder / "half").write_text("half")
    others = tmp_path / "a" / f"{mark}-{os.getppid()}-{thread}"
    others.write_text("still being written")
    elsewhere = tmp_path / "a" / ".x.png.sdlora-partial-another-123-1"
    elsewhere.write_text("being written on another machine")
    assert files.remove_partial(tmp_path) == [folder, leftover]
    assert not folder.exists()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"x.png", others.name, elsewhere.name}
    assert [files.is_partial(path) for path in (others, elsewhere, tmp_path / "a" / "x.png")] == [True, True, False]


def test_full_disk_is_recognized_in_a_safetensors_error(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="x"), files.disk_full_errors(tmp_path / "x"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), files.disk_full_errors(tmp_path / "x"):
        raise SafetensorError("Error while deserializing header: HeaderTooLarge")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert files.sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_atomic_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    with pytest.raises(RuntimeError), files.atomic_folder(target) as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError
    with pytest.raises(DiskFullError, match="merged"), files.atomic_folder(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
    with files.atomic_folder(target) as temporary:
        (temporary / "whole").write_text("whole")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    with pytest.raises(OutputError, match="already exists"), files.atomic_folder(target):
        pass


def test_threads_writing_the_same_file_do_not_collide(tmp_path: Path) -> None:
    file, barrier, faults = tmp_path / "a.json", threading.Barrier(8), list[BaseException]()

    def write(number: int) -> None:
        barrier.wait()
        try:
            for _ in range(20):
                files.write_json(file, {"by": number})
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert json.loads(file.read_text(encoding="utf-8"))["by"] in range(8)
    assert list(tmp_path.iterdir()) == [file]
