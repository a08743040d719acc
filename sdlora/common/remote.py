"""Images and runs at a URL (S3, GCS, whatever fsspec has a driver for): brought here, and mirrored there.

The only place that knows of URLs: everything else works in the local folders that it gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from platformdirs import user_cache_dir

from sdlora.common.files import atomic_folder, is_partial
from sdlora.common.quiet import is_main_process
from sdlora.errors import ConfigError, DataError, OutputError, SdloraError, StoreError
from sdlora.events import Event, Notice

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
_AT_ONCE = 64
# A run's number, by which its local folder is found again.
_MARK = "mirror.json"
_CONFIG = "config.toml"
# What makes a checkpoint whole (`sdlora.training.checkpoint`): it goes last, and is taken away first.
_LAST = "complete.json"
_STEP = re.compile(rf"checkpoints/step-(\d+)/{_LAST}")
_LOCK = re.compile(r"(run|batch)\.lock")


def is_url(text: str) -> bool:
    """Whether a setting names a place in a store rather than on the disk."""
    return _URL.match(text) is not None


def check_url(url: str) -> None:
    """See that a URL can be written down anywhere.

    Raises:
        ConfigError: It holds a password or a signature. The message does not repeat it.
    """
    parts = urlsplit(url)
    if parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            "A URL holds a password, a signature or other parameters, which would end up in files that are shared. "
            "Write SCHEME://BUCKET/FOLDER alone, and leave credentials to the store's own settings (for S3 "
            "~/.aws/credentials or AWS_ACCESS_KEY_ID)."
        )
    if parts.scheme in ("http", "https"):
        raise ConfigError(f"{url} is a page, whose files cannot be listed. Give a store, such as s3://BUCKET/FOLDER.")


def bring_set(url: str, wanted: Callable[[str], object] = bool) -> Path:
    """A folder at a URL as a local one, under the hash of its listing; what is here already is not fetched again.

    Args:
        url: Of the folder.
        wanted: Whether a file, by its name in the folder, is to be brought; all are, if left out.

    Raises:
        ConfigError: The URL cannot be used.
        DataError: Nothing is there.
        StoreError: The store cannot be reached, or has no driver here.
    """
    store = Store(url)
    files = {name: mark for name, mark in store.files().items() if wanted(name)}
    if not files:
        raise DataError(f"There is nothing at {url}. Check the bucket and the folder.")
    blobs = {name: _home() / "blobs" / _hash(store.url, name, mark) for name, mark in files.items()}
    folder = _home() / "sets" / _hash(store.url, *sorted(map(str, files.items())))
    if folder.is_dir():
        return folder
    store.bring({name: blob for name, blob in blobs.items() if not blob.is_file()})
    try:
        with atomic_folder(folder) as temporary:
            for name, blob in blobs.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(blob, target)
    except OSError:
        if not folder.is_dir():
            raise
    except OutputError:
        pass  # another process was faster, with the same files
    return folder


def open_run(output: str, *, resume: bool | None) -> tuple[Path, Callable[[Iterator[Event]], Iterator[Event]]]:
    """Where a run works, and what its events pass through.

    Args:
        output: A folder or a URL.
        resume: Whether the run goes on, None for going on if there is one; from a URL it is brought here first, unless
            it is here and further.

    Raises:
        ConfigError: The URL cannot be used.
        OutputError: A run is there already, or none that could go on, or other files are.
        StoreError: The store cannot be reached, or has no driver here.
    """
    if not is_url(output):
        return Path(output), lambda events: events
    if not is_main_process():
        return _home() / "runs", lambda events: events  # where it touches nothing
    store = Store(output)
    there = store.files()
    folder = _run_of(store, there)
    begun = _CONFIG in there or (folder is not None and (folder / _CONFIG).is_file())
    if begun if resume is None else resume:
        if folder is None or not begun:
            raise OutputError(f"There is no run to resume at {store.url}: it holds no {_CONFIG}.")
        mirror = _resumed(store, there, folder)
    elif begun:
        raise OutputError(
            f"{store.url} already holds a run. Continue it with --resume, or choose another place with --output."
        )
    else:
        mirror = _begun(store, there)
    return mirror.folder, mirror.watch


def work_folder(store: Store) -> Path:
    """The folder for what a batch at a URL writes; it need not be there."""
    return _home() / "batches" / _hash(store.url)


class Store:
    """A folder at a URL.

    Args:
        url: Such as s3://BUCKET/FOLDER, whose credentials are the driver's own business; or the path of a local folder.

    Raises:
        ConfigError: The URL cannot be used.
        StoreError: There is no driver for it.
    """

    def __init__(self, url: str) -> None:
        if is_url(url):
            check_url(url)
        self.url = url.rstrip("/")
        import fsspec  # only now, as few runs need it
        from fsspec.implementations.local import LocalFileSystem

        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise StoreError(f"{self.url} needs a driver that is not installed ({error}). Use pip install.") from error
        except ValueError as error:
            raise ConfigError(f"{self.url} is of no kind of store that fsspec knows: {error}.") from error
        self._is_disk = isinstance(self._files, LocalFileSystem)

    def files(self) -> dict[str, str]:
        """All files in it by name, with what changes when they do (sizes, times, hashes); none if it is not there.

        Raises:
            DataError: A name leads out of the folder.
        """
        with self._talking():
            self._files.invalidate_cache()
            try:
                found: dict[str, Any] = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        names = {path.removeprefix(self._root).lstrip("/"): info for path, info in found.items()}
        for name in names:
            # Keys of a store are any text, and become paths here.
            if ".." in re.split(r"[/\\]", name) or "\0" in name:
                raise DataError(f"{self.url} holds {name!r}, which leads out of its folder. Delete or rename it.")
        return {
            name: json.dumps(info, sort_keys=True, default=str)
            for name, info in names.items()
            if name and not is_partial(Path(name))
        }

    def read(self, name: str) -> bytes:
        """A file's content."""
        with self._talking():
            return bytes(self._files.cat_file(self._path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self._talking():
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(self._path(name), content)

    def bring(self, targets: dict[str, Path]) -> None:
        """Copy files from it, each whole or not at all."""
        names = list(targets)
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            partial = [targets[name].with_name(_partial_name()) for name in some]
            for path in partial:
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._talking():
                    self._files.get([self._path(name) for name in some], list(map(str, partial)))
                for path, name in zip(partial, some, strict=True):
                    path.replace(targets[name])
            finally:
                for path in partial:
                    path.unlink(missing_ok=True)

    def put(self, file: Path, name: str) -> None:
        """Copy a file to it, whole or not at all."""
        with self._talking():
            target = self._path(name)
            folder = target.rpartition("/")[0]
            self._files.makedirs(folder, exist_ok=True)
            if not self._is_disk:
                self._files.put_file(str(file), target)  # a store of objects shows each when it is whole
                return
            partial = f"{folder}/{_partial_name()}"
            try:
                self._files.put_file(str(file), partial)
                Path(partial).replace(target)
            finally:
                Path(partial).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a file in it, if it is there."""
        with self._talking(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def has(self, name: str) -> bool:
        """Whether there is a file or a folder of a name in it."""
        with self._talking():
            self._files.invalidate_cache()
            return bool(self._files.exists(self._path(name)))

    def move(self, name: str, target: str) -> None:
        """Give a folder in it another name, which nothing in it has."""
        with self._talking():
            self._files.mv(self._path(name), self._path(target), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # A boundary: every driver has errors of its own, with no class in common.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StoreError(
                f"{self.url} does not answer ({type(error).__name__}: {reason}). Check the network, the URL and the "
                "store's credentials."
            ) from error


class Mirror:
    """A local folder whose files are put to a URL when they are new or have changed.

    Args:
        store: Where to.
        folder: The local one.
        there: Files at the URL with the state of the local ones that they are copies of, None where that is unknown.
    """

    def __init__(self, store: Store, folder: Path, there: dict[str, tuple[int, int] | None]) -> None:
        self.folder, self._store, self._there = folder, store, there

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass events on, and mirror after each checkpoint and epoch and at the end.

        Raises:
            StoreError: Files could not be put there in the end; they stay here.
        """
        seen, fault = self._stages(), None
        try:
            for event in events:
                yield event
                if (now := self._stages()) != seen:
                    seen, before = now, fault
                    fault = self._try()
                    if fault and not before:
                        yield Notice(f"{fault} The run goes on in {self.folder}; what is missing there is tried again.")
        except BaseException as error:
            if (fault := self._try()) is None:
                raise
            told = (
                f"{fault} What the run has saved is in {self.folder}; resumed on this machine, it goes on from there."
            )
            if isinstance(error, SdloraError):
                error.args = (f"{error} {told}",)
                raise
            raise StoreError(told) from error
        if (fault := self._try()) is not None:
            raise StoreError(
                f"{fault} The run is done and lies whole in {self.folder}; resume it here to put it there."
            )

    def sync(self) -> None:
        """Put what is new or has changed, and take away what is gone.

        Raises:
            StoreError: The store does not answer; the next call tries again.
        """
        here = _states(self.folder)
        changed = [name for name, state in here.items() if self._there.get(name) != state]
        gone = [name for name in self._there if name not in here and name != _MARK]
        # A checkpoint is never whole at the URL while one of its files is not the right one.
        for name in [name for name in (*changed, *gone) if name.endswith(_LAST) and name in self._there]:
            self._store.remove(name)
            del self._there[name]
        # First what says that there is a run, last what says that it can go on from a checkpoint.
        for name in sorted(changed, key=lambda name: (name.endswith(_LAST), name != _CONFIG)):
            self._store.put(self.folder / name, name)
            self._there[name] = here[name]
        for name in [name for name in gone if name in self._there]:
            self._store.remove(name)
            del self._there[name]

    def _try(self) -> StoreError | None:
        try:
            self.sync()
        except StoreError as error:
            return error
        return None

    def _stages(self) -> list[tuple[str, int]]:
        """What is written when a checkpoint or an epoch is whole."""
        marks = [*self.folder.glob(f"checkpoints/*/{_LAST}"), *self.folder.glob("report.html")]
        return sorted((str(mark), mark.stat().st_mtime_ns) for mark in marks)


def _begun(store: Store, there: dict[str, str]) -> Mirror:
    if there.keys() - {_MARK}:
        raise OutputError(f"{store.url} is not empty. Choose a new place with --output.")
    number = uuid.uuid4().hex
    # A store that takes nothing is told before anything is trained.
    store.write(_MARK, json.dumps({"run": number}).encode())
    return Mirror(store, _home() / "runs" / number, {})


def _resumed(store: Store, there: dict[str, str], folder: Path) -> Mirror:
    # What could not be mirrored is here alone, and is further.
    if (folder / _CONFIG).is_file() and _steps(_states(folder)) >= _steps(there):
        return Mirror(store, folder, dict.fromkeys(there))
    fresh = folder.with_name(f".{folder.name}.sdlora-partial-{uuid.uuid4().hex}")
    try:
        store.bring({name: fresh / name for name in there})
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Mirror(store, folder, dict(_states(folder)))


def _run_of(store: Store, there: dict[str, str]) -> Path | None:
    """The local folder of the run at a URL, whether it is here or not."""
    if _MARK not in there:
        return None
    try:
        number = json.loads(store.read(_MARK))["run"]
        return _home() / "runs" / uuid.UUID(number).hex
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(f"{store.url}/{_MARK} is none of sdlora's. Choose another --output.") from error


def _steps(names: Sequence[str] | dict[str, Any]) -> int:
    """How far the newest whole checkpoint is; -1 without one."""
    return max((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), default=-1)


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files that belong to a folder, by name."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and not any(map(is_partial, map(Path, name.parts))) and not _LOCK.fullmatch(file.name):
            state = file.stat()
            found[name.as_posix()] = (state.st_size, state.st_mtime_ns)
    return found


def _partial_name() -> str:
    return f".{uuid.uuid4().hex}.sdlora-partial-"


def _home() -> Path:
    return Path(user_cache_dir("sdlora")) / "stores"


def _hash(*texts: str) -> str:
    return hashlib.blake2b(json.dumps(texts).encode("utf-8"), digest_size=16).hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # between two disks, or where there are no links
        shutil.copyfile(source, target)
