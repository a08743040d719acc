"""Data sets and runs at a URL (S3, GCS, any store with an fsspec driver): downloaded here, and mirrored there.

The only module that handles stores; everything else works in the local folders that it returns.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from platformdirs import user_cache_dir

from sdlora.common.files import atomic_folder, atomic_path, is_partial
from sdlora.common.process import is_main_process
from sdlora.errors import ConfigError, DataError, OutputError, SdloraError, StoreError
from sdlora.events import Event, Notice

# Of one store, or of one read through others, as in simplecache::s3://BUCKET/FOLDER.
_URL = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_AT_ONCE = 64
# Holds the run's ID, which names its local folder.
_MARK = "mirror.json"
_CONFIG = "config.toml"
# Marks a complete checkpoint (`sdlora.training.checkpoint`): uploaded last and deleted first.
_LAST = "complete.json"
_STEP = re.compile(rf"checkpoints/step-(\d+)/{_LAST}")
_LOCK = re.compile(r"(run|batch)\.lock")


def is_url(text: str) -> bool:
    """Whether a setting names a location in a store rather than on the disk."""
    return _URL.match(text) is not None


def check_url(url: str) -> None:
    """Check that a URL can be stored in files that are shared.

    Raises:
        ConfigError: It contains a password or a signature, which the message does not repeat, or is a web page.
    """
    # fsspec reads one store through another: zip://*::s3://BUCKET/set.zip
    for link in url.split("::"):
        try:
            parts = urlsplit(link)
            has_secret = parts.password is not None or parts.query or parts.fragment
        except ValueError:  # an address that is not closed, as in s3://[
            has_secret = True
        if has_secret:
            raise ConfigError(
                "The URL contains a password, a signature or other parameters, which would end up in shared files. Use "
                "SCHEME://BUCKET/FOLDER alone, and put credentials in the store's own settings (for S3, "
                "~/.aws/credentials or AWS_ACCESS_KEY_ID)."
            )
    if urlsplit(url).scheme in ("http", "https"):
        raise ConfigError(
            f"{url} is a web page, whose files cannot be listed. Use a store, such as s3://BUCKET/FOLDER."
        )


def download_set(url: str, wanted: Callable[[str], object] = bool) -> Path:
    """Download a folder at a URL into a local one named by the hash of its listing; local files are reused.

    Args:
        wanted: Selects files by their name in the folder; by default all.

    Raises:
        ConfigError: The URL is invalid.
        DataError: The folder is empty or does not exist.
        StoreError: The store cannot be reached, or needs a driver that is not installed.
    """
    store = Store(url)
    files = {name: mark for name, mark in store.files().items() if wanted(name)}
    if not files:
        raise DataError(f"No files found at {url}. Check the bucket and the folder.")
    blobs = {name: _home() / "blobs" / _hash(store.url, name, mark) for name, mark in files.items()}
    folder = _home() / "sets" / _hash(store.url, *sorted(map(str, files.items())))
    if folder.is_dir():
        return folder
    store.download({name: blob for name, blob in blobs.items() if not blob.is_file()})
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
        pass  # another process was faster and wrote the same files
    return folder


def open_run(output: str, *, resume: bool | None) -> tuple[Path, Callable[[Iterator[Event]], Iterator[Event]]]:
    """The local folder of a run, and a filter for its events that mirrors the folder to a URL.

    Args:
        output: A folder or a URL.
        resume: Whether to resume the run; None resumes it if there is one. A run at a URL is downloaded first, unless
            the local copy is further.

    Raises:
        ConfigError: The URL is invalid.
        OutputError: The URL already holds a run, none that can be resumed, or other files.
        StoreError: The store cannot be reached, or needs a driver that is not installed.
    """
    if not is_url(output):
        return Path(output).expanduser(), lambda events: events
    if not is_main_process():
        return _home() / "runs", lambda events: events  # unused by these processes
    store = Store(output)
    there = store.files()
    folder = _run_of(store, there)
    begun = _CONFIG in there or (folder is not None and (folder / _CONFIG).is_file())
    if begun if resume is None else resume:
        if folder is None or not begun:
            raise OutputError(f"There is no run to resume at {store.url}: it contains no {_CONFIG}.")
        return folder, Mirror(store, folder, _download_run(store, there, folder)).watch
    if begun:
        raise OutputError(
            f"{store.url} already holds a run. Continue it with --resume, or choose another location with --output."
        )
    if there.keys() - {_MARK}:
        raise OutputError(f"{store.url} is not empty. Choose a new location with --output.")
    number = uuid.uuid4().hex
    # Fails before any training if the store is not writable.
    store.write(_MARK, json.dumps({"run": number}).encode())
    folder = _home() / "runs" / number
    return folder, Mirror(store, folder, {}).watch


def work_folder(store: Store) -> Path:
    """The local folder of a batch at a URL; it need not exist."""
    return _home() / "batches" / _hash(store.url)


class Store:
    """A folder at a URL.

    Args:
        url: Such as s3://BUCKET/FOLDER, with credentials left to the driver; or the path of a local folder.

    Raises:
        ConfigError: The URL is invalid.
        StoreError: Its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        if is_url(url):
            check_url(url)
        self.url = url.rstrip("/")
        import fsspec  # late, since few runs need it
        from fsspec.implementations.local import LocalFileSystem

        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise StoreError(
                f"{self.url} needs a driver that is not installed ({error}). Install it with pip."
            ) from error
        except ValueError as error:
            raise ConfigError(f"fsspec does not know this kind of store: {self.url} ({error}).") from error
        self._is_disk = isinstance(self._files, LocalFileSystem)

    def files(self) -> dict[str, str]:
        """All files by name, each with metadata that changes with it (size, time, hash); empty if there is no folder.

        Raises:
            DataError: A name leads out of the folder.
        """
        with self._store_errors():
            self._files.invalidate_cache()
            try:
                found: dict[str, Any] = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        files = {}
        for path, info in found.items():
            name = path.removeprefix(self._root).lstrip("/")
            # A store's keys are arbitrary text, and become local paths.
            if ".." in re.split(r"[/\\]", name) or "\0" in name:
                raise DataError(f"{self.url} contains {name!r}, which leads out of its folder. Delete or rename it.")
            if name and not is_partial(Path(name)):
                files[name] = json.dumps(info, sort_keys=True, default=str)
        return files

    def read(self, name: str) -> bytes:
        """A file's content."""
        with self._store_errors():
            return bytes(self._files.cat_file(self._path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self._store_errors():
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(self._path(name), content)

    def download(self, targets: dict[str, Path]) -> None:
        """Download files, each completely or not at all."""
        names = list(targets)
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            with contextlib.ExitStack() as written:
                partial = [str(written.enter_context(atomic_path(targets[name]))) for name in some]
                with self._store_errors():
                    self._files.get([self._path(name) for name in some], partial)

    def upload(self, file: Path, name: str) -> None:
        """Upload a file, completely or not at all."""
        target = self._path(name)
        with self._store_errors():
            if self._is_disk:
                with atomic_path(Path(target)) as partial:
                    self._files.put_file(str(file), str(partial))
            else:  # object stores show an object only when complete
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(file), target)

    def remove(self, name: str) -> None:
        """Delete a file, if it exists."""
        with self._store_errors(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def has(self, name: str) -> bool:
        """Whether a file or a folder of this name exists."""
        with self._store_errors():
            self._files.invalidate_cache()
            return bool(self._files.exists(self._path(name)))

    def move(self, name: str, target: str) -> None:
        """Rename a folder to a name that is not in use."""
        with self._store_errors():
            self._files.mv(self._path(name), self._path(target), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # A boundary: drivers raise exceptions of their own, without a common base class.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StoreError(
                f"{self.url} cannot be reached ({type(error).__name__}: {reason}). Check the network, the URL and the "
                "store's credentials."
            ) from error


class Mirror:
    """Uploads the files of a local folder to a URL when they are new or have changed.

    Args:
        there: Files at the URL with size and time of the local files they are copies of, None where unknown.
    """

    def __init__(self, store: Store, folder: Path, there: dict[str, tuple[int, int] | None]) -> None:
        self._store, self.folder, self._there = store, folder, there

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass events on, mirroring after each checkpoint and epoch and at the end.

        Raises:
            StoreError: Files could not be uploaded by the end; they stay in the local folder.
        """
        seen, fault = self._stages(), None
        try:
            for event in events:
                yield event
                if (now := self._stages()) != seen:
                    seen, before = now, fault
                    fault = self._try()
                    if fault and not before:
                        told = f"{fault} The run continues in {self.folder}; missing files will be uploaded later."
                        yield Notice(told)
        except BaseException as error:
            if (fault := self._try()) is None:
                raise
            message = f"{fault} The run's files are in {self.folder}; resume it on this machine to continue from there."
            if isinstance(error, SdloraError):
                error.args = (f"{error} {message}",)
                raise
            raise StoreError(message) from error
        if (fault := self._try()) is not None:
            raise StoreError(f"{fault} The run is complete in {self.folder}; resume it on this machine to upload it.")

    def sync(self) -> None:
        """Upload what is new or has changed, and delete what is gone.

        Raises:
            StoreError: The store cannot be reached; the next call tries again.
        """
        here = _states(self.folder)
        changed = [name for name, state in here.items() if self._there.get(name) != state]
        gone = [name for name in self._there if name not in here and name != _MARK]
        # A checkpoint is never marked complete at the URL while one of its files is outdated.
        for name in [name for name in (*changed, *gone) if name.endswith(_LAST) and name in self._there]:
            self._store.remove(name)
            del self._there[name]
        # First the file that marks a run, last those that mark complete checkpoints.
        for name in sorted(changed, key=lambda name: (name.endswith(_LAST), name != _CONFIG)):
            self._store.upload(self.folder / name, name)
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
        """The files that are written when a checkpoint or an epoch is complete."""
        marks = [*self.folder.glob(f"checkpoints/*/{_LAST}"), *self.folder.glob("report.html")]
        return sorted((str(mark), mark.stat().st_mtime_ns) for mark in marks)


def _download_run(store: Store, there: dict[str, str], folder: Path) -> dict[str, tuple[int, int] | None]:
    """Download a run to resume, unless the local copy is further, as it is where mirroring failed.

    Returns what `Mirror` takes as `there`.
    """
    if (folder / _CONFIG).is_file() and _steps(_states(folder)) >= _steps(there):
        return dict.fromkeys(there)
    fresh = folder.with_name(f".{folder.name}.sdlora-partial-{uuid.uuid4().hex}")
    try:
        store.download({name: fresh / name for name in there})
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return dict(_states(folder))


def _run_of(store: Store, there: dict[str, str]) -> Path | None:
    """The local folder of the run at a URL, whether it exists or not."""
    if _MARK not in there:
        return None
    try:
        number = json.loads(store.read(_MARK))["run"]
        return _home() / "runs" / uuid.UUID(number).hex
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(f"{store.url}/{_MARK} was not written by sdlora. Choose another --output.") from error


def _steps(names: Iterable[str]) -> int:
    """The step of the newest complete checkpoint; -1 without one."""
    return max((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), default=-1)


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of all files that belong to a run folder, by name."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and not any(map(is_partial, map(Path, name.parts))) and not _LOCK.fullmatch(file.name):
            state = file.stat()
            found[name.as_posix()] = (state.st_size, state.st_mtime_ns)
    return found


def _home() -> Path:
    return Path(user_cache_dir("sdlora")) / "stores"


def _hash(*texts: str) -> str:
    return hashlib.blake2b(json.dumps(texts).encode("utf-8"), digest_size=16).hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # across disks, or where links are not supported
        shutil.copyfile(source, target)
