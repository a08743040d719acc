"""What the README and the docs name exists: files, headings, options, tests, and commands with their flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from sdlora.cli.main import app
from sdlora.config.toml import option_fields

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONS = list(option_fields())
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(page: Path) -> str:
    """A page without what is quoted from other programs' code."""
    return re.sub(r"```python.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_paths_and_tests_exist(page: Path) -> None:
    for path, test in re.findall(
        r"(?<![\w/.])((?:sdlora|ui|tests|docs|configs|datasets)/[\w./-]*\w)(?:::(\w+))?", code(page)
    ):
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", code(page)):
        assert f"def {name}(" in sources, name


def test_options_exist(page: Path) -> None:
    sections = {name.partition(".")[0] for name in OPTIONS if "." in name}
    for name in re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z]\w*)", code(page)):
        assert name in OPTIONS or name.endswith((".md", ".py", ".toml", ".png", ".txt", ".jsonl")), name
    keys = {"extends", *(name.partition(".")[2] or name for name in OPTIONS)}
    for key in re.findall(r"`(\w+) = [^`]*`", code(page)):
        assert key in keys, f"no section has an option {key}"


def commands(page: Path) -> Iterator[list[str]]:
    """The commands in a page, as words; continued lines are joined."""
    text = code(page).replace("\\\n", " ")
    for line in [*re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE), *re.findall(r"`([^`\n]+)`", text)]:
        for part in re.split(r"&&|\|", line):
            words = re.sub(r"  +\S.*$", "", part.strip()).split()
            words = [word.strip("[],") for word in words if "=" not in word or word.startswith("--")]
            if words and words[0] in ("sdlora", "python"):
                yield words


def test_commands_and_their_flags_exist(page: Path) -> None:
    for words in commands(page):
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "python" and words[1:2] and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            missing = {flag for flag in flags if f'"{flag}"' not in source}
        elif words[0] == "sdlora" and words[1:2] and not words[1].startswith("-"):
            assert words[1] in COMMANDS, words
            command = COMMANDS[words[1]]
            command = command.commands[words[2]] if hasattr(command, "commands") and len(words) > 2 else command
            missing = flags - {option for parameter in command.params for option in parameter.opts} - {"--help"}
        else:
            continue
        assert not missing, f"{' '.join(words)}: {missing}"
