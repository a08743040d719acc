"""The mutation score of docs/measurements/mutation.md: what share of small faults the default suite notices.

    python tests/benchmarks/mutation.py --out mutants.jsonl --num 320

needs the `dev` extra and Linux, takes hours, and changes files where it lies: run it in a clone of its own, installed
there with `pip install -e '.[dev]'`. One operator, comparison, number or truth value is changed at a time, and the
tests that reach its line run until one fails. Each result is a line of the file, so that the command can be stopped and
begun again; `--again` repeats what no test has noticed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[2]
# What is changed, and the tests that may notice it.
AREAS = {
    "sdlora/cache": ["cache", "run/test_fill_cache.py"],
    "sdlora/diffusion": ["diffusion"],
    "sdlora/config": ["config/test_[!o]*.py"],
    "sdlora/lora": ["lora"],
    "sdlora/copycheck": ["copycheck"],
    "sdlora/training": ["training/test_[!c]*.py", "training/test_checkpoint.py", "run/test_resume.py"],
    "ui/settings": ["ui/settings", "ui/pages/test_recipe.py"],
    "ui/server": ["ui/server"],
}
# Of processor time: what the tests of one mutant may take together, and when it counts as an endless loop.
BUDGET_SECONDS, CPU_SECONDS = 10, 60
LIMIT_SECONDS, MEMORY_BYTES = 300, 12 << 30

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of a file: the characters from start to end, replaced."""

    file: str
    line: int
    start: int
    end: int
    new: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.file, self.start, self.new


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """A node with one change of its own, for each that there is."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        other = copy.deepcopy(node)
        other.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
        yield other
    elif isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            other_ = copy.deepcopy(node)
            other_.ops[place] = SWAPS[type(op)]()  # type: ignore[call-overload]
            yield other_
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        yield ast.Constant(
            (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 or 1.0
        )


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that are computed.

    Left out are annotations, parts of f-strings, which have no places of their own, and what guards against faults of
    the code itself: assertions, zip's `strict` and a dataclass' `frozen`.
    """
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            guards = isinstance(child, ast.keyword) and child.arg in ("strict", "frozen")
            if isinstance(child, ast.AST) and not guards and not isinstance(child, ast.Assert | ast.JoinedStr):
                yield child
                yield from _nodes(child)


def mutants(file: str, text: str) -> list[Mutant]:
    """Every mutant of a file."""
    raw = text.encode()
    lines = [0]
    for line in raw.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []
    for node in _nodes(ast.parse(text)):
        for other in _changed(node):
            place: Any = node
            start, end = lines[place.lineno - 1] + place.col_offset, lines[place.end_lineno - 1] + place.end_col_offset
            found.append(Mutant(file, place.lineno, start, end, f"({ast.unparse(other)})"))
    return found


def drawn(num: int, seed: int) -> list[Mutant]:
    """A sample of all mutants, at most one of a line."""
    of_line: dict[tuple[str, int], list[Mutant]] = defaultdict(list)
    for area in AREAS:
        for file in sorted((TOP / area).glob("*.py")):
            for mutant in mutants(str(file.relative_to(TOP)), file.read_text(encoding="utf-8")):
                of_line[mutant.file, mutant.line].append(mutant)
    rng = random.Random(seed)
    keys = rng.sample(sorted(of_line), min(num, len(of_line)))
    return [rng.choice(of_line[key]) for key in keys]


# --- Which tests reach a line -----------------------------------------------------------------------------------------


class _Recorder:
    """Tells coverage which test runs, and what each costs; what a file's fixtures reach counts for its tests."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        yield from self._within(item.nodeid.partition("::")[0], item)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        yield from self._within(item.nodeid, item)

    def _within(self, context: str, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(context)
        began = time.process_time()
        yield
        self.seconds[item.nodeid] += time.process_time() - began

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)


def record(area: str, file: Path) -> None:
    """Run an area's tests once, and keep in a JSON file which of them reach each line, and what they load."""
    from coverage import Coverage

    coverage = Coverage(data_file=None, include=[str(TOP / area / "*.py")])
    recorder = _Recorder(coverage)
    tests = [str(path) for pattern in AREAS[area] for path in sorted((TOP / "tests").glob(pattern))]
    coverage.start()
    pytest.main([*tests, "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    coverage.stop()
    data = coverage.get_data()
    lines = {
        str(Path(measured).relative_to(TOP)): {
            line: [context for context in found if context] for line, found in data.contexts_by_lineno(measured).items()
        }
        for measured in data.measured_files()
    }
    seconds = {test: took for test, took in recorder.seconds.items() if test not in recorder.failed}
    # Loaded once for all mutants: everything that is not changed and imports nothing that is.
    ours = tuple(f"{TOP / name}{os.sep}" for name in ("sdlora", "ui", "tests"))
    places = {name: getattr(module, "__file__", None) or ours[0] for name, module in sys.modules.items()}
    loaded = sorted(name for name, place in places.items() if not place.startswith(ours))
    file.write_text(json.dumps({"lines": lines, "seconds": seconds, "loaded": loaded}), encoding="utf-8")


def chosen(mutant: Mutant, reach: dict[str, Any]) -> list[str]:
    """The tests that reach a mutant's line, the cheapest first, as many as fit into the budget.

    Where none does, as with lines that are computed on import, all tests of the area may notice it.
    """
    lines: dict[str, list[str]] = reach["lines"].get(mutant.file, {})
    here = lines.get(str(mutant.line)) or list(reach["seconds"])
    seconds: dict[str, float] = reach["seconds"]
    files = {name for name in here if "::" not in name}
    tests = [test for test in seconds if test in here or test.partition("::")[0] in files]
    found, spent = [], 0.0
    for test in sorted(tests, key=lambda test: (seconds[test], test)):
        spent += seconds[test]
        if found and spent > BUDGET_SECONDS:
            break
        found.append(test)
    return found


# --- Runs -------------------------------------------------------------------------------------------------------------


def forked(action: Callable[[], int], limit_seconds: float | None = None) -> int | None:
    """Call something in a forked process without output: its exit code, or None where the limit is reached."""
    child = os.fork()
    if child == 0:
        os.setsid()
        silent = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silent, number)
        if limit_seconds is not None:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        code = 70
        try:
            code = int(action())
        finally:
            os._exit(code)
    began = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        late = limit_seconds is not None and time.monotonic() - began > limit_seconds
        if ended or late:
            break
        time.sleep(0.05)
    # What the tests started goes as well.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def run(mutant: Mutant, tests: list[str]) -> str:
    """What became of a mutant: "noticed", "timeout" (noticed too), "unnoticed", or "unreached" by any test."""
    if not tests:
        return "unreached"
    file = TOP / mutant.file
    raw, times = file.read_bytes(), file.stat()
    file.write_bytes(raw[: mutant.start] + mutant.new.encode() + raw[mutant.end :])
    try:
        code = forked(lambda: pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider"]), LIMIT_SECONDS)
    finally:
        file.write_bytes(raw)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return "timeout" if code is None else "unnoticed" if code == 0 else "noticed"


def main() -> None:
    """Draw, run, write, sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    out = options.out.absolute()
    os.chdir(TOP)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    reach = {}
    for area in AREAS:
        file = out.with_suffix(f".{area.replace('/', '-')}.json")
        if not file.exists():
            forked(lambda area=area, file=file: record(area, file) or 0)  # type: ignore[misc]
        reach[area] = json.loads(file.read_text(encoding="utf-8"))
        for name in reach[area]["loaded"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    assert "sdlora" not in sys.modules, "mutants would not be seen"
    done: dict[tuple[str, int, str], str] = {}
    if out.exists():
        for line in out.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            done[entry["file"], entry["start"], entry["new"]] = entry["result"]
    for mutant in drawn(options.num, options.seed):
        if mutant.key in done and not (options.again and done[mutant.key] in ("unnoticed", "unreached")):
            continue
        tests, began = chosen(mutant, reach[str(Path(mutant.file).parent)]), time.monotonic()
        done[mutant.key] = run(mutant, tests)
        old = (TOP / mutant.file).read_bytes()[mutant.start : mutant.end].decode()
        entry = {**vars(mutant), "old": old, "result": done[mutant.key], "tests": len(tests)}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "seconds": round(time.monotonic() - began, 1)}) + "\n")
    noticed = sum(result in ("noticed", "timeout") for result in done.values())
    print(f"{noticed} of {len(done)} noticed")


if __name__ == "__main__":
    main()
