"""The shape of the tree: loose files, file lengths, and the page about it; import-linter holds the order."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sdlora"


def test_only_these_modules_are_outside_of_rooms() -> None:
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "events.py"}
    assert {file.name for file in PACKAGE.parent.joinpath("ui").glob("*.py")} == {"__init__.py"}
    assert {file.name for file in PACKAGE.parent.joinpath("tests").glob("*.py")} == {
        "conftest.py", "test_errors.py", "test_events.py",
    }  # fmt: skip


def test_no_file_is_longer_than_420_lines() -> None:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.joinpath("ui").rglob("*.py")]
    long = {str(file): count for file in files if (count := len(file.read_text().splitlines())) > 420}
    assert not long


def test_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page[page.index("\nsdlora/\n") : page.index("\nconfigs/")]
    named = set(re.findall(r"^ *([\w.]+/?) ", tree, flags=re.MULTILINE))
    found = {
        f"{path.name}/" if path.is_dir() else path.name
        for folder in (PACKAGE, ROOT / "ui")
        for path in folder.iterdir()
        if (path.is_dir() and list(path.glob("*.py"))) or (path.suffix == ".py" and path.name != "__init__.py")
    }
    assert named - {"ui/"} == found


def test_no_room_but_models_knows_a_transformers_family_by_name() -> None:
    """The options' list of names, the built-in bases and the readers of other programs' settings are left out."""
    apart = ("models", "pocket", "config/imports")
    named = re.compile(r"z.?image|flux", re.IGNORECASE)
    files = [
        file
        for file in (*Path("sdlora").rglob("*.py"), *Path("ui").rglob("*.py"))
        if file.name != "families.py" and not any(file.is_relative_to(Path("sdlora", room)) for room in apart)
    ]
    # A paper's or another model's name in a sentence about where a formula is from is not a question.
    code = {file: re.sub(r'"""(.|\n)*?"""|#.*', "", file.read_text(encoding="utf-8")) for file in files}
    assert [str(file) for file, text in code.items() if named.search(text)] == []
