"""Images and runs in stores: fsspec's own, and one that fails on demand."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from helpers.command import call
from helpers.runs import digests

from sdlora.common import remote
from sdlora.common.bundled import resolve_data_folder
from sdlora.common.remote import Mirror, Store, open_run
from sdlora.config.toml import parse_config
from sdlora.errors import ConfigError, DataError, OutputError, StoreError
from sdlora.events import Event, Notice, RunDone, StepDone
from sdlora.run.run import Stopped, start

QUICK = ["preview.enabled=false", "copycheck.enabled=false", "data.repeats=2"]
CHECKPOINTS = ["train.checkpoint_every_steps=2", "train.log_every_steps=1"]


class Flaky(MemoryFileSystem):
    """A store of the test's own, which can be made to fail."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    broken: ClassVar[str] = ""
    log: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._say("put", rpath)
        super().put_file(lpath, rpath, **options)

    def rm_file(self, path: str) -> None:
        self._say("rm", path)
        super()._rm(path)

    def _say(self, what: str, path: str) -> None:
        if Flaky.broken and Flaky.broken in path:
            raise RuntimeError("the bucket is on fire")
        Flaky.log.append(f"{what} {path}")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine of its own, and empty remote."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(remote, "user_cache_dir", lambda _: str(tmp_path / "home"))
    yield tmp_path / "home" / "stores"
    for kind in (MemoryFileSystem, Flaky):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Flaky.broken, Flaky.log = "", []


def config(overrides: Sequence[str], *changes: str) -> Any:
    return parse_config({"data": {"folder": "x"}}, name="hero", overrides=[*overrides, *QUICK, *changes])


def run(url: str, settings: Any, *, resume: bool = False, after: int = 10**6) -> list[Event]:
    """A run's events; after some steps it is asked to stop."""
    folder, mirrored = open_run(url, resume=resume)
    seen: list[Event] = []
    stopping = lambda: sum(isinstance(event, StepDone) for event in seen) >= after  # noqa: E731
    for event in mirrored(start(settings, folder, resume=resume, should_stop=stopping)):
        seen.append(event)
    return seen


def contents(files: Any, root: str) -> dict[str, bytes]:
    return {path.removeprefix(root).lstrip("/"): files.cat_file(path) for path in files.find(root)}


def local(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() if f.suffix != ".lock"}


def test_a_run_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_run("~/runs/x", resume=False)[0] == tmp_path / "runs" / "x"


def test_set_is_downloaded_once_and_only_changed_files_again(images: Path, home: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in images.iterdir():
        memory.pipe_file(f"/bucket/set/{file.name}", file.read_bytes())
    first = resolve_data_folder("memory://bucket/set")
    assert local(first) == local(images)
    assert resolve_data_folder("memory://bucket/set/") == first
    inodes = {file.name: file.stat().st_ino for file in first.iterdir()}
    memory.pipe_file("/bucket/set/red.txt", b"a red ball!")
    second = resolve_data_folder("memory://bucket/set")
    assert local(second) == local(images) | {"red.txt": b"a red ball!"}
    assert {file.name for file in second.iterdir() if file.stat().st_ino != inodes[file.name]} == {"red.txt"}
    assert local(first) == local(images)
    assert local(resolve_data_folder(f"file://{images}")) == local(images)
    assert not [path for path in home.rglob("*") if "partial" in path.name]
    with pytest.raises(DataError, match="memory://bucket/none"):
        resolve_data_folder("memory://bucket/none")


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "..\\evil.txt"])
def test_names_that_lead_out_of_the_folder_are_refused(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {f"/bucket/set/{name}": {"size": 4}}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: listed)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: json.dumps({"run": "0" * 32}).encode())
    with pytest.raises(DataError, match=r"evil.txt.*leads out of its folder"):
        resolve_data_folder("memory://bucket/set")
    listed[f"/bucket/set/{remote._MARK}"] = {"size": 4}
    with pytest.raises(DataError, match=r"evil.txt.*leads out of its folder"):
        open_run("memory://bucket/set", resume=True)
    assert not list(tmp_path.rglob("evil.txt"))


def test_urls_with_secrets_or_without_a_driver_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("data.folder", "data.validation_folder", "data.preservation_folder"):
        for url in (
            "s3://me:hunter2@bucket/set", "s3://bucket/set?signature=hunter2", "zip://*::ftp://me:hunter2@host/x.zip",
            "simplecache::s3://me:hunter2@bucket/set", "S3://me:hunter2@bucket/set",
        ):  # fmt: skip
            with pytest.raises(ConfigError, match="password, a signature") as caught:
                parse_config({"data": {"folder": "x"}}, name="a", overrides=[f"{name}={url}"])
            assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError) as refused:
        open_run("s3://me:hunter2@bucket/run", resume=False)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match="https://host/set is a web page"):
        Store("https://host/set")
    with pytest.raises(ConfigError, match="nowhere://host/set"):
        Store("nowhere://host/set")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StoreError, match=r"needs a driver that is not installed.*s3fs"):
        Store("s3://bucket/set")
    monkeypatch.setattr(Flaky, "find", lambda *_, **__: 1 / 0)
    with pytest.raises(StoreError, match=r"flaky://bucket/set .*\(ZeroDivisionError"):
        resolve_data_folder("flaky://bucket/set")


def test_train_reads_from_one_url_and_writes_to_another(
    tmp_path: Path, overrides: list[str], images: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, url = tmp_path / "hero.toml", f"file://{tmp_path}/bucket/run"
    source.write_text("[data]\ntrigger = 'zumi'\n")
    changes = [*overrides, *QUICK, f"data.folder=file://{images}"]
    arguments = ["train", str(source), "--output", url, *(part for one in changes for part in ("--set", one))]
    code, _, err = call(capsys, *arguments)
    assert code == 0, err
    (folder,) = (home / "runs").iterdir()
    there = local(tmp_path / "bucket/run")
    assert json.loads(there.pop("mirror.json"))["run"] == folder.name
    assert there == local(folder) and {"hero.safetensors", "state.json", "report.html"} <= there.keys()
    assert f'folder = "file://{images}"' in there["config.toml"].decode()
    code, _, err = call(capsys, *arguments)
    assert code == OutputError.exit_code and "already holds a run" in err
    code, _, err = call(capsys, *arguments[:3], f"{url}2", *arguments[4:], "--resume")
    assert code == OutputError.exit_code and "no run to resume" in err


def test_run_resumes_from_its_url_on_another_machine(overrides: list[str], home: Path, tmp_path: Path) -> None:
    settings = config(overrides, *CHECKPOINTS)
    whole = list(start(settings, tmp_path / "whole"))
    total = sum(isinstance(event, StepDone) for event in whole)
    with pytest.raises(Stopped):
        run("memory://bucket/run", settings, after=5)
    shutil.rmtree(home)
    events = run("memory://bucket/run", settings, resume=True)
    assert isinstance(events[-1], RunDone)
    assert 0 < sum(isinstance(event, StepDone) for event in events) < total
    (folder,) = (home / "runs").iterdir()
    there = contents(fsspec.filesystem("memory"), "/bucket/run")
    there.pop("mirror.json")
    assert there == {name: content for name, content in local(folder).items() if name != "mirror.json"}
    for place in (folder, tmp_path / "whole"):
        (place / "previews.png").touch()  # which these runs do not draw
    assert digests(folder) == digests(tmp_path / "whole")


def test_checkpoint_at_the_url_is_complete_only_with_its_last_file(tmp_path: Path) -> None:
    folder, files = tmp_path / "run", Flaky()
    step = folder / "checkpoints/step-00000002"
    step.mkdir(parents=True)
    for name in ("complete.json", "state.safetensors"):
        (step / name).write_text(name)
    (folder / "config.toml").write_text("first")
    (folder / "run.lock").touch()
    (folder / ".x.sdlora-partial-1").touch()
    mirror = Mirror(Store("flaky://bucket/run"), folder, {})
    Flaky.broken = "state"
    with pytest.raises(StoreError, match="on fire"):
        mirror.sync()
    assert files.find("/bucket/run") == ["/bucket/run/config.toml"]
    Flaky.broken, Flaky.log = "", []
    mirror.sync()
    place = "/bucket/run/checkpoints/step-00000002"
    assert Flaky.log == [f"put {place}/state.safetensors", f"put {place}/complete.json"]
    Flaky.log = []
    mirror.sync()
    assert not Flaky.log
    for name in ("complete.json", "state.safetensors"):
        (step / name).write_text(f"{name} anew")
    mirror.sync()
    assert Flaky.log == [f"rm {place}/complete.json", f"put {place}/state.safetensors", f"put {place}/complete.json"]
    Flaky.log = []
    shutil.rmtree(step)
    mirror.sync()
    assert Flaky.log == [f"rm {place}/complete.json", f"rm {place}/state.safetensors"]
    assert files.find("/bucket/run") == ["/bucket/run/config.toml"]


def test_file_on_disk_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = Store(f"file://{tmp_path}/bucket"), tmp_path / "metrics.jsonl"
    file.write_text("one\n")
    store.upload(file, "run/metrics.jsonl")
    file.write_text("one\ntwo\n")

    def half(_: Any, source: str, target: str, **__: Any) -> None:
        Path(target).write_text(Path(source).read_text()[:5])
        raise OSError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "put_file", half)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # nobody is left to tidy up
        with pytest.raises(StoreError, match="machine is gone"):
            store.upload(file, "run/metrics.jsonl")
    assert len(list((tmp_path / "bucket/run").iterdir())) == 2
    assert list(store.files()) == ["run/metrics.jsonl"] and store.read("run/metrics.jsonl") == b"one\n"
    store.upload(file, "run/metrics.jsonl")
    assert store.read("run/metrics.jsonl") == b"one\ntwo\n"


def test_failing_store_loses_neither_the_run_nor_its_files(overrides: list[str], home: Path) -> None:
    settings = config(overrides, *CHECKPOINTS)
    url, files = "flaky://bucket/run", Flaky()
    folder, mirrored = open_run(url, resume=False)
    told = []
    for event in mirrored(start(settings, folder)):
        told += [event.message] if isinstance(event, Notice) and "on fire" in event.message else []
        if isinstance(event, StepDone):
            Flaky.broken = "bucket" if event.step in (3, 4) else ""
    assert len(told) == 1 and str(folder) in told[0]
    there = contents(files, "/bucket/run")
    there.pop("mirror.json")
    assert there == local(folder)
    Flaky.broken = ".safetensors"
    with pytest.raises(StoreError, match=r"on fire.*is complete in .*resume it"):
        run("flaky://bucket/other", settings)
    assert "hero.safetensors" not in contents(files, "/bucket/other")
    Flaky.broken = ""
    assert isinstance(run("flaky://bucket/other", settings, resume=True)[-1], RunDone)
    assert "hero.safetensors" in contents(files, "/bucket/other")
    Flaky.broken = "bucket"
    with pytest.raises(DataError, match=r"nowhere"):
        run("flaky://bucket/third", config(overrides, "data.folder=nowhere"))
