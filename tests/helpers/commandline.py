"""The real command line in a process of its own, where chosen calls of chosen functions can be made to fail.

A server process has loaded torch and diffusers and forks for every command, so that a command begins in milliseconds;
what it meets is real all the same: SIGKILL, signals, full disks. Points are calls that are counted, never moments.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

from helpers.quick import leave_out_fsync

Side = Literal["before", "torn", "after"]
Action = Literal["kill", "interrupt", "terminate", "full disk", "out of memory"]
Change = Callable[[tuple[Any, ...], Any], Any]
"""Takes a call's arguments and its result (None before the call); what it gives back is the result."""
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
# Starting a process asks how all others ended. An exit code can be read once: of two threads that ask for it at the
# same moment, the second is told 255.
_ONE_AT_A_TIME = threading.Lock()
PRELOADED = ["torch", "diffusers", "transformers", "peft", "sdlora.run.run", "sdlora.cli.main", "helpers.commandline"]


@dataclass(frozen=True)
class Point:
    """A place in a run: the n-th call of a function.

    Attributes:
        function: "module:name" or "module:Class.name", where the caller looks it up.
        call: From 1.
        side: Before the call; after it; or "torn": after it, with half of the file that it wrote.
        action: What happens there: something of the list, or a function of a module that the process can import.
        every: At every later call as well.
    """

    function: str
    call: int = 1
    side: Side = "before"
    action: Action | Change = "kill"
    every: bool = False

    def __str__(self) -> str:
        return f"{self.function.rpartition('.')[2]} {self.call} {self.side}"


@dataclass
class Outcome:
    """How a command ended: its exit code (negative for a signal), what it printed, and how often things were called."""

    code: int | None
    out: str
    err: str
    calls: dict[str, int] = field(default_factory=dict)


class CommandLine:
    """Runs `sdlora ARGUMENTS` in forked processes.

    Args:
        folder: For what is printed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(
        self,
        arguments: Sequence[str],
        *,
        points: Sequence[Point] = (),
        counted: Sequence[str] = (),
        prepare: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Started:
        """Begin a command.

        Args:
            arguments: As on the command line.
            points: Where something happens.
            counted: Functions whose calls are counted.
            prepare: A function of a module that the other process can import, called there first.
            environment: Variables to set.
        """
        return self._begin(None, arguments, points, counted, prepare, environment)

    def call(
        self, function: Callable[..., None], *arguments: Any, points: Sequence[Point] = (), counted: Sequence[str] = ()
    ) -> Outcome:
        """Call a function of a module that the other process can import, and wait for its end."""
        return self._begin(function, arguments, points, counted, None, None).wait()

    def _begin(
        self,
        function: Callable[..., None] | None,
        arguments: Sequence[Any],
        points: Sequence[Point],
        counted: Sequence[str],
        prepare: Callable[[], None] | None,
        environment: Mapping[str, str] | None,
    ) -> Started:
        self._count += 1
        output = self._folder / f"command{self._count}"
        what = (function, list(arguments), list(points), list(counted), prepare, dict(environment or {}), output)
        process = self._context.Process(target=_process, args=what)
        with _ONE_AT_A_TIME:
            process.start()
        return Started(process, output)

    def run(self, *arguments: str, **options: Any) -> Outcome:
        """Begin a command and wait for its end."""
        return self.start(arguments, **options).wait()


@dataclass
class Started:
    """A command that was begun."""

    process: ForkServerProcess
    output: Path

    def wait(self) -> Outcome:
        """Wait for the end."""
        multiprocessing.connection.wait([self.process.sentinel], 300)
        with _ONE_AT_A_TIME:
            self.process.join(0)
            code = self.process.exitcode
        assert code is not None, "the command hangs"
        printed = [self.output.with_suffix(suffix) for suffix in (".out", ".err")]
        out, err = (file.read_text(encoding="utf-8", errors="replace") if file.exists() else "" for file in printed)
        calls = self.output.with_suffix(".calls")
        return Outcome(code, out, err, json.loads(calls.read_text()) if calls.exists() else {})


def _process(
    function: Callable[..., None] | None,
    arguments: list[Any],
    points: list[Point],
    counted: list[str],
    prepare: Callable[[], None] | None,
    environment: dict[str, str],
    output: Path,
) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(output.with_suffix(suffix), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2))
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from sdlora.cli import main

    torch.set_num_threads(1)
    leave_out_fsync()
    calls: dict[str, int] = {}
    for name in dict.fromkeys([*counted, *(point.function for point in points)]):
        _watch(name, [point for point in points if point.function == name], calls)
    if prepare is not None:
        prepare()
    try:
        if function is not None:
            function(*arguments)
        else:
            sys.argv = ["sdlora", *arguments]
            main.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if counted:
            output.with_suffix(".calls").write_text(json.dumps(calls))


def _watch(function: str, points: Sequence[Point], calls: dict[str, int]) -> None:
    """Replace a function by one that counts its calls and makes happen what is asked for."""
    module_name, _, path = function.partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls[function] = 0

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        calls[function] += 1
        number = calls[function]
        due = [p for p in points if number == p.call or (p.every and number > p.call)]
        for point in due:
            if point.side == "before":
                _act(point, args, None)
        result = original(*args, **kwargs)
        for point in due:
            if point.side == "torn":
                # What is written to comes last where there are two, as in shutil.copyfile.
                for file in [value for value in [*args, *kwargs.values()] if isinstance(value, Path)][-1:]:
                    os.truncate(file, file.stat().st_size // 2)
            if point.side != "before":
                result = _act(point, args, result)
        return result

    setattr(owner, name, watched)


def _act(point: Point, args: tuple[Any, ...], result: Any) -> Any:
    import torch

    if callable(point.action):
        return point.action(args, result)
    if point.action == "full disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    if point.action == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    os.kill(os.getpid(), SIGNALS[point.action])
    return result
